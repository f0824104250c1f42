"""Figures of the cost model (notebook 05). Rows are those of `corey.cost_model.study`."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from corey.figures import GREY, MARKERS, NOTE_POINTS, PALETTE

BUCKET_LABELS = {
    "short": "short\n1k, 2k",
    "medium": "medium\n4k, 8k",
    "long": "long\n16k, 32k",
    "ultra_long": "ultra-long\n64k",
}
THRESHOLD_PANELS = (
    ("latency_ms", "latency (ms)"),
    ("mean_depth", "operators per group"),
    ("quality_proxy", "quality proxy"),
)
METHOD_LABELS = {
    "none": "no fusion",
    "static": "static triples",
    "matched": "arithmetic, same depth",
    "ours": "entropy score",
}
NAMED = {True: "as published", False: "without method names"}
NAMED_COLOURS = {True: PALETTE[3], False: PALETTE[0]}


def plot_buckets(rows: pd.DataFrame, published: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean latency per bucket and method with its range over draws, and the published means as ticks across the bars.

    rows: fp16 rows of `method_rows`; published: the table `tier1_buckets`, fp16.
    """
    ax = ax or plt.gca()
    width = 0.8 / len(METHOD_LABELS)
    for index, (method, label) in enumerate(METHOD_LABELS.items()):
        x = np.arange(len(BUCKET_LABELS)) + (index - (len(METHOD_LABELS) - 1) / 2) * width
        latency = (
            rows[rows.method == method]
            .groupby("bucket")
            .latency_ms.agg(["mean", "min", "max"])
            .loc[list(BUCKET_LABELS)]
        )
        spread = [latency["mean"] - latency["min"], latency["max"] - latency["mean"]]
        ax.bar(x, latency["mean"], width * 0.92, color=PALETTE[index], label=label)
        ax.errorbar(x, latency["mean"], yerr=spread, fmt="none", ecolor="black", elinewidth=0.7, capsize=1.5)
        printed = published[published.method == method].set_index("bucket").latency_ms.reindex(list(BUCKET_LABELS))
        ax.plot(
            x, printed, "D", ms=3, mfc="white", mec="black", mew=0.7, label="published" if method == "ours" else None
        )
    ax.set_xticks(range(len(BUCKET_LABELS)), BUCKET_LABELS.values())
    ax.set_ylabel("surrogate latency (ms)")
    ax.set_ylim(0, 132)
    ax.legend(ncols=3, loc="upper left", columnspacing=1.2, handlelength=1.2)
    return ax


def plot_name_terms(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """What the entropy score gains over arithmetic at the same depth, draw by draw, with and without method names.

    rows: fp16 rows of `method_rows` for both values of `name_terms`.
    """
    ax = ax or plt.gca()
    wide = rows.pivot(index=["name_terms", "seqlen", "repeat"], columns="method", values="latency_ms")
    gain = (wide["matched"] - wide["ours"]).rename("gain_ms").reset_index()
    positions = {seqlen: index for index, seqlen in enumerate(sorted(gain.seqlen.unique()))}
    x = gain.seqlen.map(positions) + (gain.repeat - gain.repeat.max() / 2) * 0.13
    ax.axhline(0, color=GREY, linewidth=0.7)
    for index, (named, text) in enumerate(NAMED.items()):
        chosen = gain.name_terms == named
        label = f"{text}: mean {gain.gain_ms[chosen].mean():+.2f} ms".replace("-", "−")
        ax.plot(x[chosen], gain.gain_ms[chosen], MARKERS[index], color=NAMED_COLOURS[named], ms=4, mew=0, label=label)
    ax.set_xticks(list(positions.values()), [f"{seqlen // 1024}k" for seqlen in positions])
    ax.set_xlabel("sequence length L (five draws each)")
    ax.set_ylabel("latency saved against arithmetic\nof the same depth (ms)")
    ax.legend(loc="lower left")
    return ax


def plot_grid(rows: pd.DataFrame, bucket: str, ax: Axes | None = None) -> Axes:
    """Mean latency of each (alpha, beta) cell of one bucket; the best cells are framed and the default is starred.

    rows: rows of `grid_rows` with the published terms.
    """
    ax = ax or plt.gca()
    table = rows[rows.bucket == bucket].groupby(["alpha", "beta"]).latency_ms.mean().unstack()  # (alpha, beta)
    ax.imshow(table, cmap="cividis_r", aspect="auto", origin="lower")
    middle = (table.min(axis=None) + table.max(axis=None)) / 2
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        default = (table.index[row], table.columns[column]) == (0.45, 0.35)
        colour = "white" if value > middle else "black"
        ax.text(
            column,
            row,
            f"{value:.1f}{'*' if default else ''}",
            ha="center",
            va="center",
            fontsize=NOTE_POINTS,
            color=colour,
        )
        if value <= table.min(axis=None) + 1e-9:
            ax.add_patch(
                plt.Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=PALETTE[3], linewidth=1.4)
            )
    ax.set_xticks(range(table.shape[1]), [f"{value:.2f}" for value in table.columns])
    ax.set_yticks(range(table.shape[0]), [f"{value:.2f}" for value in table.index])
    ax.set_xlabel("arithmetic weight β")
    ax.set_title(BUCKET_LABELS[bucket].replace("\n", ", L = "))
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def plot_thresholds(rows: pd.DataFrame, column: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """One column of `threshold_rows` against the threshold, with and without names; mean over the four buckets."""
    ax = ax or plt.gca()
    means = rows.groupby(["name_terms", "tau", "bucket"])[column].mean().groupby(["name_terms", "tau"]).mean()
    for index, (named, text) in enumerate(NAMED.items()):
        line = means.loc[named]
        ax.plot(line.index, line, marker=MARKERS[index], markersize=2.5, color=NAMED_COLOURS[named], label=text)
    ax.axvspan(0.45, 0.60, color=GREY, alpha=0.12, linewidth=0)
    ax.set_xlabel("threshold τ")
    ax.set_ylabel(ylabel)
    ax.set_ylim(bottom=0)
    ax.margins(x=0.05)
    return ax
