"""Figure of the cost of a chunk decision (notebook 03). Rows are those of `corey.decision_study`."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from corey.figures import GREY, MARKERS, NOTE_POINTS, PALETTE

STEP_LABELS = {
    "statistic": "statistic, device time",
    "decision": "decision, from an idle device",
    "decision and scan": "decision and scan",
    "captured": "decision and scan, one graph",
}


def plot_decision_costs(costs: pd.DataFrame, scan_us: float, policies: Sequence[str], ax: Axes | None = None) -> Axes:
    """A line for each policy: its statistic, its decision, and both with the scan after them, on a log scale of time.

    costs: `decision_costs`; scan_us: the time of the scan alone, drawn as a line; policies: those of every machine in
    the figure, from top to bottom, whether or not this one measured them.
    """
    ax = plt.gca() if ax is None else ax
    policies = list(policies)[::-1]
    for index, (step, label) in enumerate(STEP_LABELS.items()):
        rows = costs[costs.step == step]
        heights = [policies.index(policy) + 0.14 * (1.5 - index) for policy in rows.scheduler]
        x_error = [rows.median_us - rows.low_us, rows.high_us - rows.median_us]
        colour, marker = PALETTE[index], MARKERS[index]
        ax.errorbar(
            rows.median_us, heights, xerr=x_error, fmt=marker, color=colour, elinewidth=0.8, markersize=2.5, label=label
        )
    ax.axvline(scan_us, color=GREY, linewidth=0.7)
    ax.annotate(
        "the scan", (scan_us, 1), xycoords=("data", "axes fraction"), xytext=(0, 1), textcoords="offset points",
        ha="center", va="bottom", fontsize=NOTE_POINTS, color=GREY,
    )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yticks(range(len(policies)), policies)
    ax.set_ylim(-0.5, len(policies) - 0.5)
    ax.set_xlabel("time (µs)")
    return ax
