"""Figure of the fastest chunk by shape (notebook 03). Rows are those of `corey.shape_study`."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from corey.figures import NOTE_POINTS

SPREAD_SHOWN = 4.0  # slowest over fastest chunk at which the colour ends


def plot_best_chunks(best: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A cell for each shape: the chunks that none beats beyond doubt, coloured by the slowest chunk over the fastest.

    best: `best_chunks`; length across, width (B x D) up. The colours are the same for every machine; `colour_scale`
    explains them.
    """
    ax = plt.gca() if ax is None else ax
    best = best.assign(channels=best.batch * best.d_inner, width=_widths(best))
    widths = best.drop_duplicates("width").sort_values("channels").width.tolist()
    seqlens = sorted(best.seqlen.unique())
    spread = best.pivot(index="width", columns="seqlen", values="spread").loc[widths, seqlens]
    ax.imshow(spread, norm=LogNorm(1, SPREAD_SHOWN), cmap="cividis", aspect="auto", origin="lower")
    for row in best.itertuples():
        place = seqlens.index(row.seqlen), widths.index(row.width)
        colour = "white" if row.spread < SPREAD_SHOWN**0.6 else "black"
        ax.text(*place, _range(row), ha="center", va="center", fontsize=NOTE_POINTS, color=colour)
    ax.set_xticks(range(len(seqlens)), [short(seqlen) for seqlen in seqlens])
    ax.set_yticks(range(len(widths)), widths)
    ax.tick_params(length=0)
    ax.set(xlabel="tokens L", ylabel="B × D")
    return ax


def colour_scale(ax: Axes) -> None:
    """The colour bar beside one of the maps; all share it."""
    ticks = np.array([1, 1.5, 2, 3, SPREAD_SHOWN])
    bar = ax.get_figure().colorbar(ax.images[0], ax=ax, extend="max", ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.set_label("slowest chunk / fastest")


def short(tokens: int) -> str:
    """4096 as 4k; what is no multiple of 1024 stays as it is."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _range(row) -> str:
    ends = dict.fromkeys([row.first_tied, row.last_tied])
    return "–".join(short(chunk) for chunk in ends)


def _widths(best: pd.DataFrame) -> list[str]:
    return [f"{batch} × {d_inner}" for batch, d_inner in zip(best.batch, best.d_inner)]
