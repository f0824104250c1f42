"""Figures of the mixed regimes (notebook 07). Rows are those of `corey.regime_study` and `corey.content_study`."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from corey.figures import GREY, LABEL_POINTS, MARKERS, NOTE_POINTS, PALETTE
from corey.plots.shapes import short

LINEAR_PERCENT = 5  # regrets are linear up to here and logarithmic beyond
TICKS = (-10, 0, 5, 20, 100, 1000)


def plot_regrets(regrets: pd.DataFrame, rules: Sequence[str], ax: Axes | None = None) -> Axes:
    """A line for each rule: the regret of its choice alone, and with what deciding costs, with 95 % intervals.

    regrets: rows of `regret_rows` of one regime; rules: from top to bottom, whether or not they are among the rows. On
    a GPU the choice is that of replayed graphs, which no host slows down. Labels are left to `shared_legend`.
    """
    ax = plt.gca() if ax is None else ax
    ax.axvline(0, color=GREY, linewidth=0.7)
    for index, (label, rows) in enumerate(_series(regrets).items()):
        heights = np.array([len(rules) - 1 - rules.index(rule) for rule in rows.scheduler]) + 0.2 * (1 - index)
        x_error = [rows.regret_percent - rows.low_percent, rows.high_percent - rows.regret_percent]
        colour, marker = PALETTE[(2, 0, 3)[index]], MARKERS[index]
        ax.errorbar(
            rows.regret_percent, heights, xerr=x_error, fmt=marker, color=colour, elinewidth=0.8, markersize=2.5,
            capsize=0, label=label,
        )  # fmt: skip
    return _regret_axis(ax, rules)


def plot_each_regime(regrets: pd.DataFrame, rules: Sequence[str], axes: np.ndarray) -> None:
    """`plot_regrets` of every regime, in the order of the rows, on a table of axes."""
    regimes = regrets[regrets.regime != "all"].groupby("regime", sort=False)
    for ax, (_, rows) in zip(axes.flat, regimes):
        plot_regrets(rows, rules, ax).set_title(_regime_title(rows.iloc[0]), fontsize=LABEL_POINTS)
    for ax in axes[-1]:
        ax.set_xlabel("regret (%)")


def plot_average(regrets: pd.DataFrame, rules: Sequence[str], ax: Axes | None = None) -> Axes:
    """`plot_regrets` of the average over regimes, with a grey dot for each regime's total regret behind it."""
    ax = plt.gca() if ax is None else ax
    each = regrets[(regrets.regime != "all") & (regrets.part == "total") & (regrets.engine == "calls")]
    heights = [len(rules) - 1 - rules.index(rule) for rule in each.scheduler]
    ax.plot(each.regret_percent, heights, ".", color=GREY, alpha=0.45, markersize=2.5, label="a regime, total")
    return plot_regrets(regrets[regrets.regime == "all"], rules, ax)


def shared_legend(fig: Figure, axes: Iterable[Axes]) -> None:
    """One legend above all axes, each label once."""
    found = {}
    for ax in axes:
        found |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(found.values(), found.keys(), loc="outside upper center", ncols=len(found), handletextpad=0.1)


def plot_contents(ratios: pd.DataFrame, first: str, margin: float, ax: Axes | None = None) -> Axes:
    """Latency of each content over that of the first kind, with 90 % intervals and the margin.

    ratios: `content_ratios`; first: the kind that all are compared with.
    """
    ax = plt.gca() if ax is None else ax
    ax.axvspan(-100 * margin / (1 + margin), 100 * margin, color=PALETTE[2], alpha=0.15, linewidth=0)
    ax.axvline(0, color=GREY, linewidth=0.7)
    for height, row in zip(range(len(ratios))[::-1], ratios.itertuples()):
        control = row.content == "again"
        x_error = [[100 * (row.ratio - row.low)], [100 * (row.high - row.ratio)]]
        style = {"color": GREY if control else PALETTE[0], "marker": "D" if control else "o"}
        ax.errorbar(100 * (row.ratio - 1), height, xerr=x_error, elinewidth=0.8, **style)
    ax.set_yticks(range(len(ratios))[::-1], [_content(name, first) for name in ratios.content])
    ax.set_ylim(-0.6, len(ratios) - 0.4)
    reach = 100 * max(2 * margin, 1.1 * max(ratios.high.max() - 1, 1 - ratios.low.min()))
    ax.set_xlim(-reach, reach)
    text = f" ±{100 * margin:g} %"
    ax.text(100 * margin, len(ratios) - 0.45, text, fontsize=NOTE_POINTS, color=PALETTE[2], va="top")
    ax.set_xlabel(f"slower than {first.replace('_', ' ')} (%)")
    return ax


def plot_gains(gains: pd.DataFrame, first: str, published_percent: float, ax: Axes | None = None) -> Axes:
    """What the right chunk gains on each content and what knowing the content gains beyond that, with 95 % intervals.

    gains: `content_gains`; published_percent: the gain that the paper states for tables, drawn as a line.
    """
    ax = plt.gca() if ax is None else ax
    names = [_gain(row, first) for row in gains.itertuples()]
    ax.axvline(0, color=GREY, linewidth=0.7)
    ax.axvline(published_percent, color=PALETTE[3], linewidth=0.8, linestyle="--")
    for height, row in zip(range(len(gains))[::-1], gains.itertuples()):
        x_error = [[row.gain_percent - row.low_percent], [row.high_percent - row.gain_percent]]
        colour, marker = (PALETTE[0], "o") if row.part == "chunk" else (PALETTE[1], "s")
        ax.errorbar(row.gain_percent, height, xerr=x_error, color=colour, marker=marker, elinewidth=0.8)
    ax.annotate(
        "published, tables", (published_percent, 1), xycoords=("data", "axes fraction"), xytext=(0, 1),
        textcoords="offset points", ha="center", va="bottom", fontsize=NOTE_POINTS, color=PALETTE[3],
    )  # fmt: skip
    ax.set_yticks(range(len(gains))[::-1], names)
    ax.set_ylim(-0.6, len(gains) - 0.4)
    ax.set_xlim(right=max(1.4 * published_percent, ax.get_xlim()[1]))
    ax.set_xlabel("gain (%)")
    return ax


def _series(regrets: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label to rows, in the order of drawing; totals only of rules that have something to decide."""
    by_part = dict(list(regrets.groupby(["engine", "part"])))
    choice = by_part.get(("graph", "choice"), by_part["calls", "choice"])
    found = {"the choice alone": choice}
    for engine, label in (("calls", "with deciding, launched by the host"), ("graph", "with deciding, in a graph")):
        if (engine, "deciding") in by_part:
            deciding = set(by_part[engine, "deciding"].scheduler)
            total = by_part[engine, "total"]
            found[label] = total[total.scheduler.isin(deciding)]
    return found


def _regime_title(row: Mapping) -> str:
    """ "short_chat" of 16 prompts of 32 tokens as "short chat, 16 × 32"."""
    return f"{row['regime'].replace('_', ' ')}, {int(row['batch'])} × {short(int(row['seqlen']))}"


def _regret_axis(ax: Axes, rules: Sequence[str]) -> Axes:
    ax.set_xscale("symlog", linthresh=LINEAR_PERCENT, linscale=0.8)
    ax.xaxis.set_major_locator(FixedLocator(TICKS))  # which leaves the limits alone
    ax.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}".replace("-", "−")))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yticks(range(len(rules))[::-1], rules, fontsize=NOTE_POINTS)
    ax.set_ylim(-0.6, len(rules) - 0.4)
    ax.tick_params(axis="x", labelsize=NOTE_POINTS)
    return ax


def _content(name: str, first: str) -> str:
    return f"{first} again".replace("_", " ") if name == "again" else name.replace("_", " ")


def _gain(row, first: str) -> str:
    if row.part == "chunk":
        return _content(row.content, first)
    return row.part if row.content == "all" else f"{_content(row.content, first)}, {row.part}"
