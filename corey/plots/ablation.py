"""Figures of the scheduler ablation (notebook 06). Rows are those of `corey.ablation_study`."""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corey.figures import GREY, MARKERS, PALETTE

GROUPS = {  # label: colour, marker, policies besides the static chunks, from top to bottom
    "one chunk for all": (PALETTE[0], MARKERS[0], ("oracle",)),
    "reads no value": (PALETTE[2], MARKERS[2], (
        "operator's rule", "shape", "table", "no-entropy", "random", "hist-shuffled",
    )),
    "reads the activations": (PALETTE[1], MARKERS[1], (
        "hist", "device-hist", "sampled-hist", "token-hist", "cheap-proxy", "variance-proxy", "kurtosis-proxy",
        "guarded-hist", "guarded-sampled-hist", "hist-every-4th", "table-always-reads", "device-hist-on-the-way",
        "device-hist-every-4th",
    )),
}  # fmt: skip
PARTS = {  # part: colour, marker, label
    "statistic": (PALETTE[0], MARKERS[0], "statistic"),
    "decision": (PALETTE[1], MARKERS[1], "decision, with reading it"),
    "chunk": (PALETTE[2], MARKERS[2], "chunk"),
    "all": (PALETTE[3], MARKERS[3], "all, measured"),
}


def policy_order(schedulers: Sequence[str]) -> list[str]:
    """Policies from top to bottom: static chunks by size, then the groups in order."""
    statics = sorted({name for name in schedulers if name.startswith("static-")}, key=_static_key)
    named = [name for _, _, members in GROUPS.values() for name in members if name in set(schedulers)]
    return statics + named


def plot_policy_ratios(ratios: pd.DataFrame, control: str, order: Sequence[str], ax: Axes | None = None) -> Axes:
    """A line for each policy: its latency over the reference's with the interval, and the control's as a band.

    ratios: `policy_ratios` of one step; order: `policy_order` of every machine in the figure.
    """
    ax = plt.gca() if ax is None else ax
    order = list(order)[::-1]
    for label, (colour, marker, members) in GROUPS.items():
        in_group = ratios.scheduler.isin(members)
        if label == "one chunk for all":
            in_group |= ratios.scheduler.str.startswith("static-")
        rows = ratios[in_group & (ratios.scheduler != control)]
        _points(ax, rows, [order.index(name) for name in rows.scheduler], color=colour, marker=marker, label=label)
    again = ratios[ratios.scheduler == control]
    _points(ax, again, [order.index(control)], color=GREY, marker="D", label="the reference again")
    ax.axvspan(again.low.iloc[0], again.high.iloc[0], color=GREY, alpha=0.15, linewidth=0)
    ax.axvline(1, color=GREY, linewidth=0.7)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(-0.7, len(order) - 0.3)
    ax.set_xlabel("latency / static-512")
    return ax


def same_scale(axes: Iterable[Axes], ratios: pd.DataFrame) -> None:
    """Give panels of ratios one scale, which shows every estimate in `ratios`."""
    for ax in axes:
        ax.set_xlim(_reach(ratios.ratio, ratios.low, ratios.high))


def plot_overheads(parts: pd.DataFrame, published: pd.DataFrame, order: Sequence[str], ax: Axes | None = None) -> Axes:
    """Per cent of the reference's prefill that each part of a policy costs, beside the published overhead.

    parts: `overheads`; published: `published_ratios`, whose per cent are of a generation; order: policies from top to
    bottom, whether or not they are in `parts`.
    """
    ax = plt.gca() if ax is None else ax
    order = list(order)[::-1]
    for index, (part, (colour, marker, label)) in enumerate(PARTS.items()):
        rows = _percent(parts[parts.part == part])
        heights = [order.index(name) + 0.15 * (2 - index) for name in rows.scheduler]
        _points(ax, rows, heights, color=colour, marker=marker, label=label)
    shown = _percent(published[published.scheduler.isin(order)])
    heights = [order.index(name) - 0.3 for name in shown.scheduler]
    _points(ax, shown, heights, color=GREY, marker="*", label="published, of a generation", markersize=5)
    ax.axvline(0, color=GREY, linewidth=0.7)
    for boundary in range(1, len(order)):
        ax.axhline(boundary - 0.5, color=GREY, linewidth=0.3, alpha=0.5)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(-0.5, len(order) - 0.5)
    ours = _percent(parts[parts.part.isin(PARTS)])
    ax.set_xlim(_reach(*(pd.concat([ours[name], shown[name].fillna(0)]) for name in ("ratio", "low", "high"))))
    ax.set_xlabel("cost (% of a prefill)")
    return ax


def shared_legend(fig: Figure, ax: Axes, ncols: int) -> None:
    """The labels of one axes above all."""
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=ncols, handletextpad=0.1)


def _points(ax: Axes, rows: pd.DataFrame, heights: Sequence[float], **style) -> None:
    error = [(rows.ratio - rows.low).fillna(0), (rows.high - rows.ratio).fillna(0)]
    ax.errorbar(rows.ratio, heights, xerr=error, linestyle="none", elinewidth=0.8, **({"markersize": 3} | style))


def _percent(ratios: pd.DataFrame) -> pd.DataFrame:
    return ratios.assign(**{name: 100 * (ratios[name] - 1) for name in ("ratio", "low", "high")})


def _reach(centre: pd.Series, low: pd.Series, high: pd.Series) -> tuple[float, float]:
    """Limits that show every estimate and of intervals as much as is no wider than the estimates' own range."""
    width = max(centre.max() - centre.min(), 1e-6)
    return max(low.min(), centre.min() - width) - 0.05 * width, min(high.max(), centre.max() + width) + 0.05 * width


def _static_key(name: str) -> tuple[int, str]:
    return int(name.split("-")[1].split()[0]), name
