"""Plots of the two-minute tour: a histogram with its entropy, and the published loop's error along the sequence."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from corey import figures


def plot_histogram(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of values per bin; rows: bin_centre, probability, and one entropy_nats for all."""
    ax = plt.gca() if ax is None else ax
    width = rows["bin_centre"].diff().median()
    ax.bar(rows["bin_centre"], rows["probability"], width=width, color=figures.PALETTE[0], linewidth=0)
    entropy_nats = rows["entropy_nats"].iloc[0]
    ax.text(
        0.97,
        0.95,
        f"H = {entropy_nats:.2f} nats",
        transform=ax.transAxes,
        ha="right",
        va="top",
        fontsize=figures.LABEL_POINTS,
    )
    ax.set(xlabel="activation", ylabel="share of values")
    return ax


def plot_reset_error(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Relative error along the sequence; rows: form, token, relative_error."""
    ax = plt.gca() if ax is None else ax
    for (form, trace), color in zip(rows.groupby("form", sort=False), figures.PALETTE):
        ax.plot(trace["token"], trace["relative_error"], color=color)
        x, y = trace["token"].iloc[-1], trace["relative_error"].max()
        figures.label_line(ax, x, y, form, color=color, offset=(-1, 7))
    ax.set(xlabel="token", ylabel="relative error of y", ylim=(-0.05, 1.15 * rows["relative_error"].max()))
    return ax
