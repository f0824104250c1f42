"""Figures of the equivalence of routed and passive runs (notebook 04). Rows are those of `corey.side_summary` and
`corey.equivalence_study`."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from corey.figures import GREY, MARKERS, PALETTE, WIDTH_FULL

MEASURES = {"logits_bitwise_equal": "all logits, bit by bit", "tokens_equal": "all greedy tokens"}


def plot_agreement(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Fraction of prompts on which each side equals the passive one, with Wilson intervals; one line a side.

    rows: those of `side_summary.agreement`.
    """
    ax = ax or plt.gca()
    sides = list(dict.fromkeys(rows["side"]))
    for index, (measure, label) in enumerate(MEASURES.items()):
        found = rows[rows["measure"] == measure]
        y = [sides.index(side) + (index - 0.5) * 0.3 for side in found["side"]]
        _fractions(ax, found, y, index, label=label)
    counts = rows.groupby("side", sort=False)["n"].max()
    ax.set_yticks(range(len(sides)), [f"{side} ({counts[side]})" for side in sides])
    ax.set_ylabel("side (prompts)")
    ax.set_ylim(len(sides) - 0.5, -0.5)  # the first side on top
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1)
    ax.set_xlabel("fraction equal to passive")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.2, borderaxespad=0, labelspacing=0.2)
    return ax


def plot_logit_differences(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Largest logit difference of each prompt from the passive side; the axis is linear near zero, so zero is on it.

    rows: those of `side_by_side.compare_sides` without the passive side. Draw it beside `plot_agreement` of the same
    rows, which labels the lines.
    """
    ax = ax or plt.gca()
    _strip(ax, rows, "logit_max_abs_diff")
    ax.set_xscale("symlog", linthresh=1e-6, linscale=1)
    ax.set_xlim(-4e-7, 1e2)
    ax.set_xticks([0, 1e-6, 1e-4, 1e-2, 1, 1e2], ["0", "$10^{-6}$", "$10^{-4}$", "$10^{-2}$", "1", "100"])
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.set_xlabel("largest logit difference")
    return ax


def plot_first_divergence(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """First position of the prompt at which any bit of the logits differs; sides that never differ say so.

    rows: those of `side_by_side.compare_sides` without the passive side.
    """
    ax = ax or plt.gca()
    sides = _strip(ax, rows, "logit_first_divergence")
    longest = rows["prompt_tokens"].max()
    for index, side in enumerate(sides):
        if rows.loc[rows["side"] == side, "logit_first_divergence"].isna().all():
            ax.text(0.5, index, "never", transform=ax.get_yaxis_transform(), ha="center", va="center", fontsize=7)
    ax.set_xscale("symlog", linthresh=1, linscale=0.5)
    ax.set_xlim(-0.4, longest)
    ax.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.set_xlabel("first differing token")
    return ax


def plot_scores(
    rows: pd.DataFrame, series: Mapping[tuple[str, str], str], labels: Mapping[str, str], ax: Axes | None = None
) -> Axes:
    """Mean score of each task, and of all, with bootstrap intervals; one series a (protocol, side).

    rows: those of `side_summary.scores`; a mean of fewer than five prompts is left out. series: (protocol, side) ->
    label, in the order of drawing; the number of prompts is added in brackets. labels: task -> label.
    """
    ax = ax or plt.gca()
    rows = rows[rows["n"] >= 5]
    tasks = [task for task in dict.fromkeys(rows["task"]) if task != "all"] + ["all"]
    for index, ((protocol, side), label) in enumerate(series.items()):
        chosen = rows[(rows["protocol"] == protocol) & (rows["side"] == side)].set_index("task").reindex(tasks)
        x = np.arange(len(tasks)) + (index - (len(series) - 1) / 2) * 0.15
        ax.errorbar(
            x,
            chosen["value"],
            yerr=[chosen["value"] - chosen["low"], chosen["high"] - chosen["value"]],
            fmt=MARKERS[index],
            color=PALETTE[index],
            elinewidth=0.8,
            label=f"{label} ({chosen.loc['all', 'n']:.0f})",
            clip_on=False,
        )
    ax.axvline(len(tasks) - 1.5, color=GREY, lw=0.5)
    ax.set_xticks(range(len(tasks)), [*(labels[task] for task in tasks[:-1]), "all"])
    ax.set_ylim(0, 100)
    ax.set_ylabel("score (points)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, columnspacing=1.5, handletextpad=0.2)
    return ax


def plot_policies(rows: pd.DataFrame, measure: str, ax: Axes | None = None) -> Axes:
    """Fraction of prompts on which each chunk policy equals the passive side, with Wilson intervals; a series a model.

    rows: those of `equivalence_study.policy_agreement`. measure: one of MEASURES.
    """
    ax = ax or plt.gca()
    rows = rows[rows["measure"] == measure]
    policies = list(dict.fromkeys(rows["side"]))
    models = rows.groupby(["model", "dtype"], sort=False)
    for index, (key, found) in enumerate(models):
        y = [policies.index(side) + (index - (len(models) - 1) / 2) * 0.22 for side in found["side"]]
        _fractions(ax, found, y, index, label=f"{', '.join(key)} ({found['n'].max()} prompts)", ms=3)
    ax.set_yticks(range(len(policies)), policies)
    ax.set_ylim(len(policies) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0.95 * rows["low"].min(), 1)
    ax.set_xlabel(f"fraction equal to passive:\n{MEASURES[measure]}")
    return ax


def draw_policies(agreement: pd.DataFrame, own_path: pd.DataFrame) -> Figure:
    """Both measures of `plot_policies` and, beside them, `plot_parting`, under one legend of the models."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH_FULL, 3.0), width_ratios=(1, 1, 1.2))
    for ax, measure in zip(axes, MEASURES):
        plot_policies(agreement, measure, ax)
    axes[1].set_yticklabels([])
    plot_parting(own_path, axes[2])
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, handletextpad=0.1)
    return fig


def plot_parting(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Where greedy tokens of transformers' own path part from the lean model's, over the prompt's logit difference.

    rows: those of `own_path.own_path_rows` with model and dtype, without the lean model itself. A prompt whose tokens
    all agree stands on the line "never".
    """
    ax = ax or plt.gca()
    never = int(rows["new_tokens"].max())
    for index, (_, found) in enumerate(rows.groupby(["model", "dtype"], sort=False)):
        ax.plot(
            found["logit_max_abs_diff"],
            found["token_first_divergence"].fillna(never),
            MARKERS[index],
            color=PALETTE[index],
            ms=4,
            alpha=0.7,
            mew=0,
            clip_on=False,
        )
    ticks = [0, never // 4, never // 2, 3 * never // 4]
    ax.axhline(never, color=GREY, lw=0.5)
    ax.set_yticks([*ticks, never], [*map(str, ticks), "never"])
    ax.set_ylim(0, never)
    ax.set_xscale("log")
    ax.set_xlim(*_decades(rows["logit_max_abs_diff"]))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("first differing new token")
    ax.set_xlabel("largest logit difference\nfrom transformers' own path")
    return ax


def _strip(ax: Axes, rows: pd.DataFrame, column: str) -> list[str]:
    """One mark a prompt on a line a side; marks are spread over the line's height in the order of the prompts."""
    sides = list(dict.fromkeys(rows["side"]))
    for index, side in enumerate(sides):
        values = rows.loc[rows["side"] == side, column]
        spread = np.linspace(-0.28, 0.28, len(values)) if len(values) > 1 else np.zeros(1)
        ax.plot(values, index + spread, MARKERS[0], ms=2, color=PALETTE[0], alpha=0.6, mew=0, clip_on=False)
    ax.set_ylim(len(sides) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    return sides


def _fractions(ax: Axes, rows: pd.DataFrame, y: list[float], series: int, **style) -> None:
    """One series of fractions with their intervals."""
    ax.errorbar(
        rows["value"],
        y,
        xerr=[rows["value"] - rows["low"], rows["high"] - rows["value"]],
        fmt=MARKERS[series],
        color=PALETTE[series],
        elinewidth=0.8,
        clip_on=False,
        **style,
    )


def _decades(values: pd.Series) -> tuple[float, float]:
    """The powers of ten around positive values, with room to the next where one lies on them."""
    low, high = np.log10(values.min() / 1.1), np.log10(values.max() * 1.1)
    return 10.0 ** np.floor(low), 10.0 ** np.ceil(high)
