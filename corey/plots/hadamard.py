"""Figures of the Hadamard rotation (notebook 02). Rows are those of `corey.hadamard_study`."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from corey.figures import GREY, LABEL_POINTS, MARKERS, NOTE_POINTS, PALETTE, interval

BEFORE, AFTER = PALETTE[7], PALETTE[0]
ROUTINE_COLOURS = {"published": PALETTE[3], "orthonormal": PALETTE[2]}
SETTINGS = ("W8A8", "W4A8", "W4A4")


def plot_entropy_pairs(before: pd.DataFrame, after: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Paired bars by sequence length with intervals and the mean difference above each pair: the paper's Figure 1.

    before, after: seqlen, mean, low, high of the normalised entropy.
    """
    ax = plt.gca() if ax is None else ax
    place = np.arange(len(before))
    for shift, rows, colour, label in ((-0.2, before, BEFORE, "before"), (0.2, after, AFTER, "after")):
        ax.bar(place + shift, rows["mean"], 0.38, color=colour, alpha=0.55, label=label)
        interval(
            ax, list(place + shift), *(list(rows[name]) for name in ("mean", "low", "high")), color="black", marker=""
        )
    for x, top, gain in zip(place, np.maximum(after.high, before.high), after["mean"].array - before["mean"].array):
        ax.annotate(f"+{gain:.3f}".replace("+0", "+"), (x, top), xytext=(0, 2), textcoords="offset points", ha="center",
                    fontsize=NOTE_POINTS)  # fmt: skip
    ax.set_xticks(place, [_thousands(seqlen) for seqlen in before.seqlen])
    ax.set(xlabel="sequence length", ylim=(0, 1))
    return ax


def plot_mixing_fit(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """L1 distance from the histogram after rotation: the fitted mixing and no mixing at all, a dot a draw.

    rows: seqlen, l1_fit, l1_unmixed.
    """
    ax = plt.gca() if ax is None else ax
    seqlens = sorted(rows.seqlen.unique())
    texts = {"l1_fit": "fitted doubly stochastic mixing", "l1_unmixed": "no mixing"}
    for index, (column, text) in enumerate(texts.items()):
        across = rows.seqlen.map(seqlens.index) + (index - 0.5) * 0.3
        ax.plot(across, rows[column], MARKERS[index], color=PALETTE[index], markersize=2.5, alpha=0.8, label=text)
    ax.set_xticks(range(len(seqlens)), [_thousands(seqlen) for seqlen in seqlens])
    ax.set(xlabel="sequence length", ylabel="L1 distance", ylim=(0, 1.35 * rows.l1_fit.max()))
    ax.legend(loc="upper right", borderaxespad=0.0, handletextpad=0.1)
    return ax


def plot_gain_by_bins(own: pd.DataFrame, common: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Entropy gain of rotation, over each tensor's own range and over bins common to both, with intervals.

    own, common: seqlen, mean, low, high in nats.
    """
    ax = plt.gca() if ax is None else ax
    place = list(range(len(own)))
    for index, (rows, text) in enumerate(((own, "own range of each"), (common, "bins common to both"))):
        columns = (list(rows[name]) for name in ("mean", "low", "high"))
        interval(ax, place, *columns, color=PALETTE[2 + index], marker=MARKERS[index], linestyle="-")
        ax.annotate(text, (place[-1], rows["mean"].iloc[-1]), xytext=(0, -18 if index == 0 else 6), ha="right",
                    textcoords="offset points", fontsize=LABEL_POINTS, color=PALETTE[2 + index])  # fmt: skip
    ax.axhline(0, color=GREY, linewidth=0.7)
    ax.set_xticks(place, [_thousands(seqlen) for seqlen in own.seqlen])
    ax.set(xlabel="sequence length", ylabel="entropy gain (nats)")
    return ax


def plot_norm_ratio(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Norm after over norm before, on normal vectors, against the width, for both routines.

    rows: width, routine, mean.
    """
    ax = plt.gca() if ax is None else ax
    for index, (routine, colour) in enumerate(ROUTINE_COLOURS.items()):
        line = rows[rows.routine == routine].sort_values("width")
        ax.plot(line.width, line["mean"], MARKERS[index] + "-", color=colour)
        ax.annotate(f"{routine} routine", (line.width.iloc[-1], line["mean"].iloc[-1]),
                    xytext=(0, 14 if routine == "published" else -10), textcoords="offset points", ha="right",
                    fontsize=LABEL_POINTS, color=colour)  # fmt: skip
    ax.set(xscale="log", xlabel="width d", ylabel="norm after / norm before", ylim=(0, 1.1))
    ax.set_xticks(sorted(rows.width.unique()), [str(width) for width in sorted(rows.width.unique())])
    ax.xaxis.set_minor_locator(NullLocator())
    return ax


def plot_gain_by_distribution(means: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Entropy gain by distribution for both routines, with intervals; one line a distribution.

    means: distribution, routine, mean, low, high in nats.
    """
    ax = plt.gca() if ax is None else ax
    names = list(dict.fromkeys(means.distribution))[::-1]
    for index, (routine, colour) in enumerate(ROUTINE_COLOURS.items()):
        rows = means[means.routine == routine].set_index("distribution").loc[names]
        heights = np.arange(len(names)) + 0.12 * (1 - 2 * index)
        ax.errorbar(rows["mean"], heights, xerr=[rows["mean"] - rows.low, rows.high - rows["mean"]], fmt=MARKERS[index],
                    color=colour, elinewidth=0.8)  # fmt: skip
    ax.axvline(0, color=GREY, linewidth=0.7)
    ax.set_yticks(range(len(names)), [name.replace(" x ", " × ") for name in names])
    ax.set_ylim(-0.5, len(names) - 0.5)
    ax.set_xlabel("entropy gain (nats)")
    return ax


def plot_layer_gain(
    rows: pd.DataFrame,
    means: pd.DataFrame,
    ax: Axes | None = None,
    *,
    published=None,
    others: Mapping[str, pd.DataFrame] | None = None,
) -> Axes:
    """Entropy gain of rotating a model's activations, layer by layer, for both routines.

    rows: layer, routine, gain_nats, a dot a prompt. means: layer, routine, mean, low, high. published: None or the
    (low, high) of the paper's gains, drawn as a band. others: label to the means of another machine, drawn as lines.
    """
    ax = plt.gca() if ax is None else ax
    if published is not None:
        ax.axhspan(*published, color=GREY, alpha=0.25, linewidth=0)
        ax.annotate("published, mean ± sd", (0.02, published[0]), xycoords=("axes fraction", "data"), xytext=(0, -2),
                    textcoords="offset points", va="top", fontsize=NOTE_POINTS, color=GREY)  # fmt: skip
    for index, (routine, colour) in enumerate(ROUTINE_COLOURS.items()):
        dots, line = rows[rows.routine == routine], means[means.routine == routine]
        shift = 0.1 * (2 * index - 1)
        ax.plot(dots.layer + shift, dots.gain_nats, ".", color=colour, markersize=3, alpha=0.5)
        columns = (list(line[name]) for name in ("mean", "low", "high"))
        interval(
            ax, list(line.layer + shift), *columns, color=colour, marker="_", linestyle="-", label=f"{routine} routine"
        )
    for label, other in (others or {}).items():
        for index, (_, line) in enumerate(other.groupby("routine")):
            columns = (list(line[name]) for name in ("layer", "mean", "low", "high"))
            interval(ax, *columns, color=GREY, marker="x", linestyle=":", label=None if index else label)
    ax.axhline(0, color=GREY, linewidth=0.7)
    ax.set_xticks(sorted(rows.layer.unique())[:: max(1, rows.layer.nunique() // 12)])
    ax.set_xlabel("layer")
    return ax


def plot_largest_entry(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Largest entry of a vector before and after rotation, and its bound, in units of the vector's norm, by origin.

    rows: vectors, l1_share (the bound), largest_before, largest_after; one row a vector, drawn as medians with the 5th
    to 95th percentile.
    """
    ax = plt.gca() if ax is None else ax
    sources = list(dict.fromkeys(rows.vectors))[::-1]
    series = (
        ("largest_before", "before", BEFORE),
        ("largest_after", "after", AFTER),
        ("l1_share", "bound", PALETTE[3]),
    )
    for index, (column, text, colour) in enumerate(series):
        groups = rows.groupby("vectors")[column]
        middle, low, high = (groups.quantile(level).loc[sources] for level in (0.5, 0.05, 0.95))
        heights = np.arange(len(sources)) + 0.2 * (1 - index)
        spread = [middle - low, high - middle]
        ax.errorbar(middle, heights, xerr=spread, fmt=MARKERS[index], color=colour, markersize=2.5, elinewidth=0.8,
                    label=text)  # fmt: skip
    ax.set_yticks(range(len(sources)), sources)
    ax.set(xlabel="largest entry / norm", ylim=(-0.6, len(sources) - 0.4), xlim=(0, 1.03))
    ax.legend(loc="center", bbox_to_anchor=(0.55, 0.55), handletextpad=0.1)
    return ax


def plot_overflow(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of vectors with an entry beyond a threshold, before and after rotation, and what the bound allows.

    rows: `overflow_rows`.
    """
    ax = plt.gca() if ax is None else ax
    series = (("before", "before", BEFORE, "-"), ("after", "after", AFTER, "-"), ("bound", "bound", PALETTE[3], "--"))
    for column, text, colour, style in series:
        ax.plot(rows.threshold, rows[column], style, color=colour, label=text)
    ax.set(xscale="log", xlabel="threshold / rms", ylabel="share of tokens beyond", ylim=(-0.02, 1.04))
    ticks = [tick for tick in (1, 3, 10, 30, 100) if rows.threshold.min() <= tick <= rows.threshold.max()]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(loc="lower left")
    return ax


def plot_quantisation(means: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A quantity of the quantised model, plain and rotated, for every setting, with intervals; log scale.

    means: setting, rotated, mean, low, high.
    """
    ax = plt.gca() if ax is None else ax
    names = [name for name in SETTINGS if name in set(means.setting)]
    for index, (rotated, text) in enumerate(((False, "plain"), (True, "rotated"))):
        rows = means[means.rotated == rotated].set_index("setting").loc[names]
        columns = (list(rows[name]) for name in ("mean", "low", "high"))
        place = list(np.arange(len(names)) + 0.16 * (2 * index - 1))
        interval(ax, place, *columns, color=(BEFORE, AFTER)[index], marker=MARKERS[index], label=text)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.5, len(names) - 0.5)
    return ax


def _thousands(seqlen: int) -> str:
    return f"{seqlen // 1024}k"
