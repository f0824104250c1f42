"""What notebook 04 puts through every policy: a checkpoint on its prompts, and random weights on text in bytes."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from corey import side_summary
from corey.longbench import load_rows, official
from corey.mamba import ChunkPolicy, Mamba
from corey.mamba_weights import random_mamba
from corey.own_path import OWN_PATH, own_path_rows, transformers_twin
from corey.policy_equivalence import Rows, policy_rows
from corey.training import byte_tokenizer

BY_MODEL = ["model", "dtype"]


@dataclass(frozen=True)
class Subject:
    """A lean model and transformers' model of the same weights, with the prompts that both read.

    scored: whether answers are scored; those of random weights mean nothing.
    """

    name: str
    dtype: str
    model: Mamba
    client: torch.nn.Module
    tokenizer: object
    rows: Rows
    max_prompt_tokens: int
    scored: bool = True


def rows_in_turn(source: str, tasks: Iterable[str], limit: int) -> Rows:
    """The first `limit` rows of every task of a place that `load_rows` reads, the tasks in turn."""
    tasks = list(tasks)
    turns = zip(*(load_rows(source, task, limit=limit) for task in tasks))
    return [(task, row) for turn in turns for task, row in zip(tasks, turn)]


def random_subjects(
    shape: str, dtypes: Sequence[str], rows: Rows, max_prompt_tokens: int, *, seed: int, device: str | torch.device
) -> Iterator[Subject]:
    """Random weights in a published shape, one subject a dtype and one in memory at a time; none for shape "".

    They read the bytes of a text as token ids, so that no tokenizer has to be fetched. One seed gives one model, which
    the dtypes round differently.
    """
    for dtype in dtypes if shape else ():
        model = random_mamba(shape, seed=seed, device=device, dtype=getattr(torch, dtype))
        name = f"random {shape}"
        yield Subject(
            name, dtype, model, transformers_twin(model), byte_tokenizer(), rows, max_prompt_tokens, scored=False
        )


def measure(
    subject: Subject, policies: Mapping[str, ChunkPolicy | None], *, new_tokens: int, twin_rows: int,
    twin_prompt_tokens: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """(rows of `policy_rows` on every prompt, rows of `own_path_rows` on the first `twin_rows`, cut shorter).

    transformers' own path is a loop over tokens where mamba_ssm is not installed, hence the fewer and shorter prompts.
    Both have the columns model and dtype besides.
    """
    arguments = {"protocol": official(), "new_tokens": new_tokens}
    by_policy = policy_rows(
        subject.model, subject.tokenizer, subject.rows, policies,
        max_prompt_tokens=subject.max_prompt_tokens, scored=subject.scored, **arguments,
    )  # fmt: skip
    by_twin = own_path_rows(
        subject.model, subject.client, subject.tokenizer, subject.rows[:twin_rows],
        max_prompt_tokens=min(twin_prompt_tokens, subject.max_prompt_tokens), **arguments,
    )  # fmt: skip
    told = {"model": subject.name, "dtype": subject.dtype}
    return pd.DataFrame(by_policy).assign(**told), pd.DataFrame(by_twin).assign(**told)


def policy_agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """`side_summary.agreement` of every model: its columns and model, dtype."""
    found = [side_summary.agreement(group).assign(**told) for told, group in _by_model(rows)]
    return pd.concat(found, ignore_index=True)


def largest_deviations(rows: pd.DataFrame) -> pd.DataFrame:
    """By model and dtype, over all policies and prompts: prompts, and how far policies strayed from the passive side.

    Columns: model, dtype, prompts, logit_max_abs_diff, score_delta_points (missing where nothing was scored) and
    perplexity_ratio_deviation, the largest |ratio - 1| of one prompt.
    """
    found = []
    for told, group in _by_model(rows):
        scored = "score" in group and group.score.notna().any()
        found.append(
            told
            | {
                "prompts": group.row_id.nunique(),
                "logit_max_abs_diff": group.logit_max_abs_diff.max(),
                "score_delta_points": side_summary.score_deltas(group).max_abs.max() if scored else math.nan,
                "perplexity_ratio_deviation": side_summary.perplexities(group).max_ratio_deviation.max(),
            }
        )
    return pd.DataFrame(found)


def twin_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """By model and dtype, how far transformers' own path is from the lean model.

    Columns: model, dtype, prompts, tokens (of the longest), logit_max_abs_diff and argmax_agreement over the prompts,
    perplexity_ratio; parted, how many of the prompts' greedy tokens differ, earliest, the first token that does in any,
    and top2_gap_max, the largest distance of the two best tokens where they part.
    """
    found = []
    for told, group in _by_model(rows):
        own = group[group.side == OWN_PATH]
        perplexity = side_summary.perplexities(group).set_index("side")
        found.append(
            told
            | {
                "prompts": len(own),
                "tokens": own.prompt_tokens.max(),
                "logit_max_abs_diff": own.logit_max_abs_diff.max(),
                "argmax_agreement": own.argmax_agreement.mean(),
                "perplexity_ratio": perplexity.ratio[OWN_PATH],
                "parted": int((~own.tokens_equal.astype(bool)).sum()),
                "earliest": own.token_first_divergence.min(),
                "top2_gap_max": own.top2_gap.max(),
            }
        )
    return pd.DataFrame(found)


def _by_model(rows: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    for key, group in rows.groupby(BY_MODEL, sort=False):
        yield dict(zip(BY_MODEL, key)), group
