"""From the rows of `corey.side_by_side` to fractions, score differences and perplexities with their intervals.

Every function takes the rows as a DataFrame and gives tidy rows; scores are in points, 100 times the metric.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from corey._check import bad_type, bad_value
from corey.equivalence import (
    agreement_interval,
    mean_interval,
    mean_of_perplexities,
    paired_delta,
    perplexity,
)

PROMPT = ["protocol", "task", "row_id"]  # what the sides have in common


def agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Fractions of prompts on which a side equals the passive one, with Wilson intervals.

    Columns: side, measure ("logits_bitwise_equal" or "tokens_equal"), value, low, high, n.
    """
    _check_rows(rows)
    found = []
    for side, group in _compared(rows).groupby("side", sort=False):
        for measure in ("logits_bitwise_equal", "tokens_equal"):
            known = group[measure].dropna().astype(bool)
            if len(known):
                interval = agreement_interval(int(known.sum()), len(known))
                found.append({"side": side, "measure": measure, **vars(interval)})
    return pd.DataFrame(found)


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean score of every protocol, side and task, and of all tasks together (task "all"), with bootstrap intervals."""
    _check_rows(rows)
    return _by_task(rows.dropna(subset="score"), lambda group: vars(mean_interval(100 * group["score"])))


def score_deltas(rows: pd.DataFrame) -> pd.DataFrame:
    """Score of a side minus the passive one's on the same prompts: mean with interval, and the largest of a prompt."""

    def summary(group: pd.DataFrame) -> dict:
        before, after = 100 * group["score_passive"], 100 * group["score"]
        return vars(paired_delta(before, after)) | {"max_abs": (after - before).abs().max()}

    return _by_task(_with_passive(rows, "score"), summary)


def perplexities(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of every protocol and side over prompt and reference, and how far its ratio to the passive one strays.

    Columns: protocol, side, n, perplexity (token weighted), mean_of_perplexities (the paper's figure), ratio,
    max_ratio_deviation (largest |ratio - 1| of one prompt).
    """
    pairs = _with_passive(rows, "nll_nats", keep_passive=True)
    found = []
    for (protocol, side), group in pairs.groupby(["protocol", "side"], sort=False):
        ratios = np.exp((group["nll_nats"] - group["nll_nats_passive"]) / group["nll_tokens"])
        mine, passive = (perplexity(group[column], group["nll_tokens"]) for column in ("nll_nats", "nll_nats_passive"))
        found.append(
            {
                "protocol": protocol,
                "side": side,
                "n": len(group),
                "perplexity": mine,
                "mean_of_perplexities": mean_of_perplexities(group["nll_nats"], group["nll_tokens"]),
                "ratio": mine / passive,
                "max_ratio_deviation": (ratios - 1).abs().max(),
            }
        )
    return pd.DataFrame(found)


def _by_task(rows: pd.DataFrame, summary: Callable[[pd.DataFrame], dict]) -> pd.DataFrame:
    both = pd.concat([rows, rows.assign(task="all")])
    return pd.DataFrame(
        {"protocol": protocol, "side": side, "task": task, **summary(group)}
        for (protocol, side, task), group in both.groupby(["protocol", "side", "task"], sort=False)
    )


def _compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of every side but the passive one, which is the first of each prompt."""
    return rows[rows["side"] != rows["side"].iloc[0]]


def _with_passive(rows: pd.DataFrame, column: str, *, keep_passive: bool = False) -> pd.DataFrame:
    """Rows with a value in `column`, joined with the passive side's value of the same prompt."""
    _check_rows(rows)
    passive = rows[rows["side"] == rows["side"].iloc[0]].set_index(PROMPT)[column]
    chosen = (rows if keep_passive else _compared(rows)).dropna(subset=column)
    return chosen.join(passive.rename(f"{column}_passive"), on=PROMPT)


def _check_rows(rows: pd.DataFrame) -> None:
    if not isinstance(rows, pd.DataFrame):
        raise bad_type("rows", rows, "a DataFrame of compare_sides rows")
    missing = {*PROMPT, "side"} - set(rows.columns)
    if missing or rows.empty:
        raise bad_value(
            "rows", f"columns {list(rows.columns)}", f"rows of compare_sides with {', '.join(sorted(missing))}"
        )
    if rows.duplicated([*PROMPT, "side"]).any():
        raise bad_value("rows", "a prompt and side twice", "one row for each")
