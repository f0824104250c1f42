"""Plots of the two-minute tour: histogram and entropy, the scan's latency by chunk, the published loop's error."""

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corey import figures


def plot_tour(seen, device: str) -> Figure:
    """A `corey.quickstart.Tour` in three panels, the width of the page; `device` names what the times belong to."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(figures.WIDTH_FULL, 2.1), width_ratios=(1, 0.9, 1.1))
    share = seen.entropy_nats / math.log(seen.num_bins)
    plot_histogram(seen.histogram, left).set_title(
        f"H = {seen.entropy_nats:.2f} nats, {share:.0%} of ln {seen.num_bins}"
    )
    chosen = seen.latency.set_index("chunk_size").median_us[seen.chunk_size] / 1e3
    plot_latency(seen.latency, seen.chunk_size, middle).set_title(f"chunk {seen.chunk_size}: {chosen:.3g} ms")
    plot_reset_error(seen.errors, right).set_title(f"published loop: y off by {seen.relative_l2:.0%}")
    figures.device_note(middle, f"chunk chosen by {seen.policy}; {device}; latencies: median and quartiles")
    return figure


def plot_histogram(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of values per bin; rows: bin_centre, probability."""
    ax = plt.gca() if ax is None else ax
    width, color = rows["bin_centre"].diff().median(), figures.PALETTE[0]
    edge = {"edgecolor": color, "linewidth": 0.5}  # so that one full bin of thousands is still seen
    ax.bar(rows["bin_centre"], 100 * rows["probability"], width=width, color=color, **edge)
    ax.set(xlabel="activation", ylabel="share of values (%)")
    return ax


def plot_latency(rows: pd.DataFrame, chosen: int, ax: Axes | None = None) -> Axes:
    """Latency by chunk with quartiles, the chosen chunk filled; rows: chunk_size, median_us, low_us, high_us."""
    ax = plt.gca() if ax is None else ax
    color = figures.PALETTE[2]
    for part, fill in ((rows[rows.chunk_size != chosen], "white"), (rows[rows.chunk_size == chosen], color)):
        times = (part[name] / 1e3 for name in ("median_us", "low_us", "high_us"))
        figures.interval(ax, part.chunk_size, *times, color=color).lines[0].set_markerfacecolor(fill)
    ax.set_xscale("log", base=2)
    ax.set_xticks(rows.chunk_size, [str(size) for size in rows.chunk_size])
    ax.set(xlabel="chunk (tokens)", ylabel="scan (ms)", ylim=(0, 1.15 * rows.high_us.max() / 1e3))
    ax.minorticks_off()
    ax.margins(x=0.12)
    return ax


def plot_reset_error(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Relative error along the sequence; rows: form, token, relative_error. Lines at zero share a label."""
    ax = plt.gca() if ax is None else ax
    highest = rows.groupby("form", sort=False).relative_error.max()
    top = max(100 * highest.max(), 1)
    for (form, trace), color in zip(rows.groupby("form", sort=False), (figures.PALETTE[3], figures.PALETTE[2])):
        ax.plot(trace.token, 100 * trace.relative_error, color=color, linewidth=1)
        if highest[form]:
            figures.label_line(ax, rows.token.max(), 100 * highest[form], form, color=color, offset=(-1, 7))
    exact = ", ".join(highest[highest == 0].index)
    figures.label_line(ax, rows.token.max(), 0, exact, color=figures.PALETTE[2], offset=(-1, 7))
    ax.set(xlabel="token", ylabel="error of y (%)", ylim=(-0.05 * top, 1.25 * top))
    return ax
