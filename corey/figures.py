"""House style and the only writer of figures/: paper width, colour-blind palette, direct labels, deterministic bytes.

The plot functions themselves are in `corey.plots`; each takes tidy rows and an axes and returns the axes.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from tueplots import bundles

from corey import paths
from corey._check import bad_type, bad_value
from corey._files import write_atomically

WIDTH_FULL = 5.5  # inches: the text width of the NeurIPS 2024 style
WIDTH_HALF = 2.7  # inches: two side by side
PALETTE = seaborn.color_palette("colorblind").as_hex()
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")  # one per colour, so that colour is never the only cue
GREY = "#595959"
NOTE_POINTS, LABEL_POINTS = 6, 7
MAX_PNG_BYTES = 300_000

STYLE = {
    "font.family": "STIXGeneral",  # comes with matplotlib, so every machine draws the same glyphs
    "mathtext.fontset": "stix",
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": LABEL_POINTS,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "errorbar.capsize": 1.5,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "savefig.bbox": "standard",  # keep the width that was asked for
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
}


def use_style() -> None:
    """Make tueplots' NeurIPS 2024 sizes with this project's choices the style of every figure drawn from now on."""
    plt.rcParams.update(bundles.neurips2024(usetex=False) | STYLE)
    if get_ipython() is not None:
        set_matplotlib_formats("retina", bbox_inches=None)  # in a notebook the size that is saved, sharp on any screen


def save(fig: Figure, stem: str) -> list[Path]:
    """Write figures/<stem>.pdf and figures/<stem>.png; returns [pdf, png].

    The same figure gives the same bytes at every save: no date and no program version is stored. Raises ValueError for
    a stem that is not lower-case words, a figure wider than the text, or a PNG of more than 300 kB.
    """
    if not isinstance(fig, Figure):
        raise bad_type("fig", fig, "a matplotlib Figure")
    if not isinstance(stem, str) or not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", stem):
        raise bad_value("stem", repr(stem), "lower-case words joined by underscores, such as '03_chunk_sweep'")
    if fig.get_figwidth() > WIDTH_FULL + 1e-9:
        raise bad_value("fig", f"{fig.get_figwidth()} in wide", f"at most {WIDTH_FULL} in")
    pdf = _rendered(fig, "pdf", {"Creator": "corey", "Producer": None, "CreationDate": None})
    png = _rendered(fig, "png", {"Software": None})
    if len(png) > MAX_PNG_BYTES:
        raise bad_value("fig", f"a PNG of {len(png)} bytes", f"at most {MAX_PNG_BYTES}: draw fewer marks")
    return [
        write_atomically(paths.FIGURES / f"{stem}.{kind}", content) for kind, content in (("pdf", pdf), ("png", png))
    ]


def drawn() -> list[Path]:
    """The PNGs in figures/, sorted; each has its PDF beside it."""
    return sorted(paths.FIGURES.glob("*.png"))


def interval(
    ax: Axes, x, y, low, high, *, color=None, marker: str = "o", linestyle: str = "none", label: str | None = None
):
    """Points with the interval [low, high] as error bars; x, y, low and high are sequences of one length."""
    if not len(x) == len(y) == len(low) == len(high):
        raise bad_value(
            "low", f"lengths {len(x)}, {len(y)}, {len(low)}, {len(high)}", "one length for x, y, low and high"
        )
    below, above = [a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]
    return ax.errorbar(
        x, y, yerr=[below, above], color=color, marker=marker, linestyle=linestyle, elinewidth=0.8, label=label
    )


def label_line(ax: Axes, x: float, y: float, text: str, *, color=None, offset: tuple[float, float] = (4, 0)):
    """Write `text` beside the point (x, y), `offset` points away, in place of a legend."""
    align = "left" if offset[0] >= 0 else "right"
    return ax.annotate(
        text,
        (x, y),
        xytext=offset,
        textcoords="offset points",
        color=color,
        fontsize=LABEL_POINTS,
        va="center",
        ha=align,
    )


def label_lines(ax: Axes, x: float, ys: Sequence[float], texts: Sequence[str], *, colors: Sequence) -> None:
    """Label several lines at the abscissa x where they end, moving labels apart where they would overlap.

    Call it after the limits and scales of the axes are set.
    """
    if not len(ys) == len(texts) == len(colors):
        raise bad_value("texts", f"{len(texts)} texts and {len(colors)} colours", f"one each for {len(ys)} lines")
    ax.get_xlim(), ax.get_ylim()  # settles the autoscaling that the transform below reads
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [float(to_axes.transform((x, y))[1]) for y in ys]
    gap = 1.15 * LABEL_POINTS / 72 / (ax.get_position().height * ax.get_figure().get_figheight())
    for index, height in _spread(heights, gap).items():
        ax.annotate(
            texts[index],
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=colors[index],
            fontsize=LABEL_POINTS,
            va="center",
        )


def device_note(ax: Axes, text: str) -> None:
    """Say at the foot of the figure which device its numbers come from; notes of several axes share one line."""
    figure = ax.get_figure()
    notes = [*getattr(figure, "corey_notes", []), text]
    figure.corey_notes = list(dict.fromkeys(notes))
    figure.supxlabel("; ".join(figure.corey_notes), x=0.99, ha="right", fontsize=NOTE_POINTS, color=GREY)


def _spread(heights: list[float], gap: float) -> dict[int, float]:
    """Heights by index, each moved up as little as keeps it `gap` above the one below."""
    placed: dict[int, float] = {}
    lowest = float("-inf")
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        lowest = max(heights[index], lowest + gap)
        placed[index] = lowest
    return placed


def _rendered(fig: Figure, kind: str, metadata: dict) -> bytes:
    stream = io.BytesIO()
    fig.savefig(stream, format=kind, metadata=metadata, dpi=300)
    return stream.getvalue()
