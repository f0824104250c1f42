"""Figures of the chunk sweep (notebook 03). Rows are those of `corey.chunk_study`."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from corey.figures import GREY, MARKERS, NOTE_POINTS, PALETTE, interval

FORM_LABELS = {
    "reset": "host loop, state dropped (published)",
    "carried": "host loop, state carried",
    "one_launch": "one call, chunk inside",
}


def plot_chunk_sweep(summary: pd.DataFrame, fit: Mapping, ax: Axes | None = None) -> Axes:
    """Latency against chunk for each form with its interval, and the launch-cost line of the published loop.

    summary: `summarise` of a sweep; fit: intercept_us, slope_us and r_squared of the reset loop.
    """
    ax = plt.gca() if ax is None else ax
    seqlen = summary.chunk_size.max()
    for index, (form, label) in enumerate(FORM_LABELS.items()):
        rows = summary[summary.form == form].sort_values("chunk_size")
        x = rows.chunk_size * 2.0 ** ((index - 1) * 0.08)  # a little apart, so that intervals do not cover each other
        columns = (rows.median_us / 1e3, rows.low_us / 1e3, rows.high_us / 1e3)
        interval(ax, x, *map(list, columns), color=PALETTE[index], marker=MARKERS[index], label=label)
    chunks = np.geomspace(summary.chunk_size.min(), seqlen, 200)
    line = (fit["intercept_us"] + fit["slope_us"] * seqlen / chunks) / 1e3
    text = f"{fit['intercept_us'] / 1e3:.2f} ms + {fit['slope_us']:.0f} µs a call, R² = {fit['r_squared']:.3f}"
    ax.plot(chunks, line, color=PALETTE[0], linewidth=0.8, linestyle="--", label=text)
    ax.set_ylabel("latency (ms)")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")
    return _chunk_axis(ax, sorted(summary.chunk_size.unique()))


def plot_published_sweep(rows: pd.DataFrame, fit: Mapping, ax: Axes | None = None) -> Axes:
    """The published sweep (table `chunk_sweep`) with its standard deviations, its line and the unsliced call."""
    ax = plt.gca() if ax is None else ax
    sliced, unsliced = rows[rows.n_launches > 1], rows[rows.n_launches == 1]
    for part, index, label in ((sliced, 0, "published loop"), (unsliced, 2, "unsliced, in no table")):
        low, high = part.latency_ms - part.std_ms, part.latency_ms + part.std_ms
        columns = map(list, (part.chunk_size, part.latency_ms, low, high))
        interval(ax, *columns, color=PALETTE[index], marker=MARKERS[index], label=label)
    chunks = np.geomspace(sliced.chunk_size.min(), unsliced.chunk_size.max(), 200)
    line = (fit["intercept_us"] + fit["slope_us"] * unsliced.chunk_size.max() / chunks) / 1e3
    text = f"{fit['intercept_us'] / 1e3:.2f} ms + {fit['slope_us']:.0f} µs a call\nR² = {fit['r_squared']:.4f}"
    ax.plot(chunks, line, color=PALETTE[0], linewidth=0.8, linestyle="--", label=text)
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")
    return _chunk_axis(ax, sorted(rows.chunk_size))


def plot_reset_error(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Relative error against chunk: the published loop for each kind of memory, and the forms that keep the state.

    rows: `error_rows` with a column `memory`.
    """
    ax = plt.gca() if ax is None else ax
    for index, (memory, text) in enumerate((("long", "long memory"), ("forgetful", "forgetful"))):
        reset = rows[(rows.form == "reset") & (rows.memory == memory)].sort_values("chunk_size")
        sliced = reset[reset.chunk_size < reset.chunk_size.max()]
        label = f"state dropped, {text}"
        ax.plot(sliced.chunk_size, sliced.relative_error, MARKERS[index] + "-", color=PALETTE[3 * index], label=label)
        kept = rows[(rows.form != "reset") & (rows.memory == memory)].groupby("chunk_size").relative_error.max()
        colour, marker = PALETTE[2 + 2 * index], MARKERS[2 + index]
        ax.plot(kept.index, kept, marker + "-", color=colour, label=f"state kept, {text}")
    ax.set_yscale("log")
    ax.set_ylim(1e-8, 8)
    ax.yaxis.set_major_locator(LogLocator(base=100))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("relative error (L2) against float64")
    ax.legend(loc="center left", bbox_to_anchor=(0.02, 0.37), ncols=2)
    return _chunk_axis(ax, sorted(rows.chunk_size.unique()))


def plot_data_dependence(ratios: pd.DataFrame, margin: float, ax: Axes | None = None) -> Axes:
    """Latency of each distribution over that of normal values at one chunk, with 90 % intervals and the margin.

    ratios: `distribution_ratios`.
    """
    ax = plt.gca() if ax is None else ax
    heights = np.arange(len(ratios))[::-1]
    ax.axvspan(1 / (1 + margin), 1 + margin, color=PALETTE[2], alpha=0.15, linewidth=0)
    ax.axvline(1, color=GREY, linewidth=0.7)
    for height, row in zip(heights, ratios.itertuples()):
        control = row.distribution == "control"
        ax.errorbar(
            row.ratio,
            height,
            xerr=[[row.ratio - row.low], [row.high - row.ratio]],
            color=GREY if control else PALETTE[0],
            marker="D" if control else "o",
        )
    names = ["normal again" if name == "control" else name for name in ratios.distribution]
    ax.set_yticks(heights, names)
    ax.set_ylim(-0.6, len(ratios) - 0.4)
    reach = max(2 * margin, 1.1 * max(ratios.high.max() - 1, 1 - ratios.low.min()))
    ax.set_xlim(1 - reach, 1 + reach)
    ax.text(
        1 + margin,
        len(ratios) - 0.45,
        f" ±{margin:.0%}".replace("%", " %"),
        fontsize=NOTE_POINTS,
        color=PALETTE[2],
        va="top",
    )
    ax.set_xlabel("latency over that of normal values")
    return ax


def plot_entropy_vs_best_chunk(
    rows: pd.DataFrame, correlation: Mapping, rule: Mapping[float, int], ax: Axes | None = None
) -> Axes:
    """Measured best chunk of each tensor against its entropy, beside the chunk that the published rule gives.

    rows: `best_chunk_rows`; correlation: `spearman_permutation`; rule: entropy in nats to chunk.
    """
    ax = plt.gca() if ax is None else ax
    jitter = 2.0 ** (0.22 * np.sin(2.4 * np.arange(len(rows))))  # without a trend along the tensors
    ax.plot(
        list(rule),
        list(rule.values()),
        color=PALETTE[3],
        linewidth=1.0,
        drawstyle="steps-post",
        label="published rule, 128 to 2048",
    )
    ax.plot(
        rows.entropy_nats,
        rows.best_chunk * jitter,
        "o",
        color=PALETTE[0],
        alpha=0.75,
        label="fastest measured, one mark a tensor",
    )
    ax.set_yscale("log", base=2)
    chunks = [2**power for power in range(7, int(np.log2(max(rows.best_chunk.max(), 2048))) + 1)]
    ax.set_yticks(chunks, [str(chunk) for chunk in chunks])
    ax.set_ylim(chunks[0] / 1.5, chunks[-1] * 3.2)
    ax.set_xlabel("entropy of u (nats, 256 bins)")
    ax.set_ylabel("chunk (tokens)")
    rho = f"{correlation['rho']:+.2f}".replace("-", "−")
    title = f"Spearman ρ = {rho}, p = {correlation['p_value']:.2f}, n = {correlation['n']}"
    ax.legend(loc="upper left", title=title, ncols=2, title_fontsize=7, alignment="left")
    return ax


def _chunk_axis(ax: Axes, chunks: list[int]) -> Axes:
    ax.set_xscale("log", base=2)
    ax.set_xticks(chunks, [f"{chunk}" if chunk < 1024 else f"{chunk // 1024}k" for chunk in chunks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("chunk (tokens)")
    return ax
