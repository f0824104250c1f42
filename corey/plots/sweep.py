"""Figures of the chunk sweep (notebook 03). Rows are those of `corey.chunk_study`."""

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from corey.figures import GREY, LABEL_POINTS, MARKERS, NOTE_POINTS, PALETTE, interval

FORM_STYLES = {  # form: colour, marker, filled, label
    "reset": (PALETTE[0], MARKERS[0], True, "host loop, state dropped (published)"),
    "carried": (PALETTE[1], MARKERS[1], True, "host loop, state carried"),
    "reset_graph": (PALETTE[0], MARKERS[0], False, "state dropped, one graph"),
    "carried_graph": (PALETTE[1], MARKERS[1], False, "state carried, one graph"),
    "one_launch": (PALETTE[2], MARKERS[2], True, "one call, chunk inside"),
    "one_launch_graph": (PALETTE[2], MARKERS[2], False, "one call as a graph"),
}
PARTS = {  # part: colour, label
    "host": (PALETTE[3], "host"),
    "cut": (PALETTE[4], "cutting, on the device"),
    "scan": (PALETTE[2], "the scan, uncut"),
}


def plot_chunk_sweep(summary: pd.DataFrame, fit: Mapping, ax: Axes | None = None) -> Axes:
    """Latency against chunk for each form with its interval, and the launch-cost line of the published loop.

    summary: `summarise` of a sweep; fit: intercept_us, slope_us and r_squared of the reset loop. Both axes are
    logarithmic. Labels are left to `shared_legend`.
    """
    ax = plt.gca() if ax is None else ax
    shown = [form for form in FORM_STYLES if form in set(summary.form)]
    for index, form in enumerate(shown):
        rows = summary[summary.form == form].sort_values("chunk_size")
        shift = 2.0 ** (
            (index - (len(shown) - 1) / 2) * 0.06
        )  # a little apart, so that intervals do not cover each other
        _plot_form(
            ax, form, rows.chunk_size * shift, *(rows[name] / 1e3 for name in ("median_us", "low_us", "high_us"))
        )
    _plot_fit(ax, fit, sorted(summary.chunk_size.unique()), summary.chunk_size.max())
    ax.set_ylabel("latency (ms)")
    return _chunk_axis(ax, sorted(summary.chunk_size.unique()))


def plot_published_sweep(rows: pd.DataFrame, fit: Mapping, ax: Axes | None = None) -> Axes:
    """The published sweep (table `chunk_sweep`) with its standard deviations, its line and the unsliced call."""
    ax = plt.gca() if ax is None else ax
    for form, part in (("reset", rows[rows.n_launches > 1]), ("one_launch", rows[rows.n_launches == 1])):
        _plot_form(
            ax, form, part.chunk_size, part.latency_ms, part.latency_ms - part.std_ms, part.latency_ms + part.std_ms
        )
    unsliced = rows.loc[rows.chunk_size.idxmax()]
    ax.annotate(
        "in no table",
        (unsliced.chunk_size, unsliced.latency_ms),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=NOTE_POINTS,
        color=GREY,
    )
    _plot_fit(ax, fit, sorted(rows.chunk_size), rows.chunk_size.max())
    return _chunk_axis(ax, sorted(rows.chunk_size))


def shared_legend(fig: Figure, axes: Iterable[Axes], ncols: int) -> None:
    """One legend above all axes, each label once, in the order of `FORM_STYLES`."""
    found = {}
    for ax in axes:
        found |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    order = [style[3] for style in FORM_STYLES.values()]
    labels = sorted(found, key=order.index)
    fig.legend([found[label] for label in labels], labels, loc="outside upper center", ncols=ncols, handletextpad=0.1)


def plot_launch_cost(parts: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """What the time of one host loop is made of, against the number of its calls, each part with its interval.

    parts: `launch_cost_parts` of one form. Both axes are logarithmic; a part whose interval reaches zero is left out.
    """
    ax = plt.gca() if ax is None else ax
    for index, (part, (colour, label)) in enumerate(PARTS.items()):
        rows = parts[(parts.part == part) & (parts.low_us > 0)].sort_values("n_launches")
        columns = (list(rows[name]) for name in ("n_launches", "latency_us", "low_us", "high_us"))
        interval(ax, *columns, color=colour, marker=MARKERS[index], linestyle="-", label=label)
    counts = sorted(parts.n_launches.unique())
    ax.set(xscale="log", yscale="log", xlabel="calls of the scan")
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.xaxis.set_minor_locator(NullLocator())
    return ax


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

    rows: `best_chunk_rows`; correlation: `spearman_permutation`; rule: entropy in nats to chunk. Labels are left to a
    legend of the figure.
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
    ax.set_ylim(chunks[0] / 1.5, chunks[-1] * 2.6)
    ax.set_xlabel("entropy of u (nats, 256 bins)")
    ax.set_ylabel("chunk (tokens)")
    rho = f"{correlation['rho']:+.2f}".replace("-", "−")
    text = f"Spearman ρ = {rho}, p = {correlation['p_value']:.2f}, n = {correlation['n']}"
    ax.text(0.02, 1, text, transform=ax.transAxes, va="top", fontsize=LABEL_POINTS)
    return ax


def _plot_form(ax: Axes, form: str, x, y, low, high) -> None:
    colour, marker, filled, label = FORM_STYLES[form]
    bars = interval(ax, *map(list, (x, y, low, high)), color=colour, marker=marker, label=label)
    if not filled:
        bars.lines[0].set_markerfacecolor("white")


def _plot_fit(ax: Axes, fit: Mapping, chunks: list[int], seqlen: int) -> None:
    """The line in the number of calls, drawn over the chunks, with its numbers in the upper right corner."""
    across = np.geomspace(chunks[0], chunks[-1], 200)
    line = (fit["intercept_us"] + fit["slope_us"] * seqlen / across) / 1e3
    ax.plot(across, np.where(line > 0, line, np.nan), color=PALETTE[0], linewidth=0.8, linestyle="--")
    text = f"{fit['intercept_us'] / 1e3:.2f} ms + {fit['slope_us']:.0f} µs a call\nR² = {fit['r_squared']:.4f}"
    ax.text(1, 1, text, transform=ax.transAxes, ha="right", va="top", fontsize=LABEL_POINTS, color=PALETTE[0])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _chunk_axis(ax: Axes, chunks: list[int]) -> Axes:
    ax.set_xscale("log", base=2)
    ax.set_xticks(chunks, [f"{chunk}" if chunk < 1024 else f"{chunk // 1024}k" for chunk in chunks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("chunk (tokens)")
    return ax
