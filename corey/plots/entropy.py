"""Figures of the estimator and of a model's entropies (notebook 01). Rows are those of `corey.entropy_study`."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from corey.figures import GREY, LABEL_POINTS, MARKERS, NOTE_POINTS, PALETTE, interval, label_lines

ROUTED_BOUNDARIES = (
    (128, 0.0, 0.766),
    (256, 0.766, 3.38),
    (512, 3.38, 5.545),
)  # chunk, from, to in nats, H_ref = ln 256


def plot_prompt_entropy(
    rows: pd.DataFrame, summary: pd.DataFrame, column: str, labels: dict, ax: Axes | None = None, *, published=None
) -> Axes:
    """One dot a prompt by task, with the mean and its interval.

    rows: task and `column`, one row a prompt. summary: task, mean, low, high. labels: task -> label. published: None or
    the (low, high) of the paper's own prompts, drawn as a band.
    """
    ax = plt.gca() if ax is None else ax
    for place, (task, label) in enumerate(labels.items()):
        values = rows[rows.task == task][column].to_numpy()
        across = place + np.linspace(-0.3, 0.3, len(values) + 2)[1:-1]
        ax.plot(across, values, ".", color=PALETTE[place], markersize=4, alpha=0.7, label=label)
        mean = summary[summary.task == task]
        interval(
            ax, [place], *([float(mean[name].iloc[0])] for name in ("mean", "low", "high")), color="black", marker="_"
        )
    if published is not None:
        ax.axhspan(*published, color=GREY, alpha=0.25, linewidth=0)
        ax.annotate(
            "published (Mamba-370M)", (3.5, published[0]), xytext=(0, -2), textcoords="offset points",
            ha="right", va="top", fontsize=NOTE_POINTS, color=GREY,
        )  # fmt: skip
    ax.set_xticks(range(len(labels)), labels.values(), rotation=30, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.6, len(labels) - 0.4)
    ax.margins(y=0.12)
    return ax


def shade_chunks(ax: Axes, *, label: bool = True) -> Axes:
    """Mark the entropies that the published map (128 to 512, H_ref = ln 256) sends to one chunk, within the y range."""
    bottom, top = ax.get_ylim()
    for index, (chunk_size, low, high) in enumerate(ROUTED_BOUNDARIES):
        low, high = max(low, bottom), min(high, top)
        if low >= high:
            continue
        if index % 2:
            ax.axhspan(low, high, color=PALETTE[1], alpha=0.1, linewidth=0, zorder=0)
        if not label:
            continue
        ax.annotate(
            f"chunk {chunk_size}", (0.99, (high if chunk_size < 512 else low)), xycoords=("axes fraction", "data"),
            xytext=(0, -2 if chunk_size < 512 else 2), textcoords="offset points", ha="right",
            va="top" if chunk_size < 512 else "bottom", fontsize=NOTE_POINTS, color=GREY,
        )  # fmt: skip
    ax.set_ylim(bottom, top)
    return ax


def plot_layer_entropy(
    rows: pd.DataFrame,
    summary: pd.DataFrame,
    labels: dict,
    ax: Axes | None = None,
    *,
    others: Mapping[str, pd.DataFrame] | None = None,
) -> Axes:
    """Entropy of every layer's scan input: a dot a prompt, the mean with its interval, and the chunks it maps to.

    rows: layer, task and entropy_nats, one row a prompt and layer. summary: layer, mean, low, high. others: label to
    the summary of another machine, drawn as a line.
    """
    ax = plt.gca() if ax is None else ax
    for index, (task, label) in enumerate(labels.items()):
        of_task = rows[rows.task == task]
        across = of_task.layer + (index - 1.5) * 0.13
        ax.plot(
            across, of_task.entropy_nats, MARKERS[index], color=PALETTE[index], markersize=2, alpha=0.7, label=label
        )
    columns = (list(summary[name]) for name in ("layer", "mean", "low", "high"))
    interval(ax, *columns, color="black", marker="_", linestyle="-")
    for label, other in (others or {}).items():
        columns = (list(other[name]) for name in ("layer", "mean", "low", "high"))
        interval(ax, *columns, color=GREY, marker="x", linestyle=":", label=label)
    ax.set(xlabel="layer", ylabel="entropy of the scan input (nats)", ylim=(0, 5.7))
    ax.xaxis.set_major_locator(FixedLocator(sorted(rows.layer.unique())[:: max(1, rows.layer.nunique() // 12)]))
    ax.legend(loc="lower left", handletextpad=0.1, borderaxespad=0.1)
    return shade_chunks(ax)


def plot_prefix_entropy(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean entropy of each layer's scan input over the first tokens of the prompts.

    rows: layer, tokens and entropy_nats.
    """
    ax = plt.gca() if ax is None else ax
    means = rows.groupby(["layer", "tokens"]).entropy_nats.mean().unstack("tokens")
    colours = plt.get_cmap("cividis")(np.linspace(0, 0.75, len(means)))
    for colour, (_, line) in zip(colours, means.iterrows()):
        ax.plot(line.index, line, "o-", color=colour, markersize=2.5)
    ax.set(xscale="log", xlabel="tokens read", ylim=(0, 5.7))
    _power_ticks(ax, means.columns)
    shown = [0, len(means) // 2, len(means) - 1]
    texts = [f"layer {means.index[i]}" for i in shown]
    label_lines(ax, means.columns[-1], [means.iloc[i, -1] for i in shown], texts, colors=[colours[i] for i in shown])
    return shade_chunks(ax, label=False)


def plot_bin_share(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """H / ln K against the number of bins K, one line a signal, with the share at which the map turns to 512.

    rows: signal, num_bins, share_of_ceiling.
    """
    ax = plt.gca() if ax is None else ax
    ends = []
    for index, (signal, line) in enumerate(rows.groupby("signal", sort=False)):
        ax.plot(line.num_bins, line.share_of_ceiling, MARKERS[index] + "-", color=PALETTE[index], label=signal)
        ends.append((line.share_of_ceiling.iloc[-1], signal, PALETTE[index]))
    ax.axhline(_share_of_512(), color=GREY, linewidth=0.7, linestyle="--")
    ax.set(xscale="log", xlabel="bins K", ylabel="H / ln K", ylim=(0, 1.05))
    ax.annotate(
        "chunk 512 above", (rows.num_bins.max(), _share_of_512()), xytext=(0, -2), textcoords="offset points",
        va="top", ha="right", fontsize=NOTE_POINTS, color=GREY,
    )  # fmt: skip
    _power_ticks(ax, rows.num_bins.unique())
    label_lines(ax, rows.num_bins.max(), *zip(*((y, text) for y, text, _ in ends)), colors=[c for _, _, c in ends])
    return ax


def plot_bin_chunks(rows: pd.DataFrame, column: str, ax: Axes | None = None) -> Axes:
    """The chosen chunk against the number of bins, one line a signal, lines a little apart.

    rows: signal, num_bins and `column`, chunk_log_k or chunk_legacy.
    """
    ax = plt.gca() if ax is None else ax
    signals = list(rows.signal.unique())
    for index, (_, line) in enumerate(rows.groupby("signal", sort=False)):
        lifted = line[column] * 2 ** ((index - (len(signals) - 1) / 2) * 0.09)
        ax.plot(line.num_bins, lifted, MARKERS[index] + "-", color=PALETTE[index], markersize=2.5, linewidth=0.9)
    ax.set(xscale="log", yscale="log", xlabel="bins K", ylim=(25, 740))
    ax.set_yticks([32, 64, 128, 256, 512], ["32", "64", "128", "256", "512"])
    ax.yaxis.set_minor_locator(NullLocator())
    _power_ticks(ax, rows.num_bins.unique())
    return ax


def plot_sample_bias(summary: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Entropy against the number of values, for each distribution and bin range.

    summary: distribution, range, num_values, mean, low, high.
    """
    ax = plt.gca() if ax is None else ax
    for index, ((distribution, bounds), line) in enumerate(summary.groupby(["distribution", "range"])):
        columns = (list(line[name]) for name in ("num_values", "mean", "low", "high"))
        style = "-" if bounds == "own" else "--"
        interval(ax, *columns, color=PALETTE[index // 2], marker=MARKERS[index], linestyle=style)
        end = 0 if bounds == "own" else -1
        ax.annotate(
            f"{distribution}, {bounds} range", (line.num_values.iloc[end], line["mean"].iloc[end]), xytext=(0, 7),
            textcoords="offset points", ha="right" if end else "left", fontsize=LABEL_POINTS, color=PALETTE[index // 2],
        )  # fmt: skip
    ax.set(xscale="log", xlabel="number of values", ylabel="entropy (nats), K = 256")
    ax.margins(y=0.1)
    return ax


def plot_outlier(summary: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Entropy of a normal sample against the height of its one outlier, for each bin range.

    summary: range, outlier_deviations, mean, low, high.
    """
    ax = plt.gca() if ax is None else ax
    for index, (bounds, line) in enumerate(summary.groupby("range", sort=False)):
        columns = (list(line[name]) for name in ("outlier_deviations", "mean", "low", "high"))
        style = "-" if bounds == "own" else "--"
        interval(ax, *columns, color=PALETTE[3 + index], marker=MARKERS[index], linestyle=style)
        place = -2 if bounds == "own" else -1
        ax.annotate(
            f"{bounds} range", (line.outlier_deviations.iloc[place], line["mean"].iloc[place]), xytext=(3, 7),
            textcoords="offset points", ha="right" if place == -1 else "left", fontsize=LABEL_POINTS,
            color=PALETTE[3 + index],
        )  # fmt: skip
    ax.set(xlabel="one outlier, in standard deviations")
    ax.margins(y=0.1)
    return ax


def _share_of_512() -> float:
    return (2**8.5 - 32) / (512 - 32)  # the entropy share at which 32 + r (512 - 32) rounds up to 512


def _power_ticks(ax: Axes, values) -> None:
    values = sorted(values)
    shown = values if len(values) <= 5 else values[:: (len(values) + 3) // 4]
    ax.set_xticks(shown, [f"{value:g}" for value in shown])
    ax.xaxis.set_minor_locator(NullLocator())
