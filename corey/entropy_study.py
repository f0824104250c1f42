"""What notebook 01 measures: how the estimator answers to bins, samples and outliers, and what it reads off a model."""

import math
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from corey._check import bad_value
from corey.activations import capture_activations
from corey.entropy import histogram_entropy
from corey.equivalence import mean_interval
from corey.longbench import TASKS, load_rows, published
from corey.progress import progress
from corey.routing import route
from corey.schedulers import PUBLISHED_RANGES, ChunkRule

FIXED_RANGE = (-8.0, 8.0)
LEGACY_H_REF = 8.0  # the published kernel benchmarks' reference, log2 256 applied to nats
SYNTHETIC = {
    "uniform": lambda size, generator: torch.rand(size, generator=generator),
    "normal": lambda size, generator: torch.randn(size, generator=generator),
    "SiLU of normal": lambda size, generator: torch.nn.functional.silu(torch.randn(size, generator=generator)),
}


def draw(distribution: str, size: int, seed: int) -> Tensor:
    """(size,) float32 values of one of `SYNTHETIC`, drawn on the CPU so that every device sees the same."""
    if distribution not in SYNTHETIC:
        raise bad_value("distribution", repr(distribution), f"one of {', '.join(SYNTHETIC)}")
    return SYNTHETIC[distribution](size, torch.Generator().manual_seed(seed))


def bin_rows(values: Mapping[str, Tensor], bins: Sequence[int]) -> pd.DataFrame:
    """Entropy and chosen chunk for every named tensor and number of bins K, in the kernel benchmarks' range 32 to 512.

    Columns: signal, num_bins, entropy_nats, share_of_ceiling (H / ln K), chunk_log_k (H_ref = ln K), chunk_legacy
    (H_ref = 8).
    """
    return pd.DataFrame(
        _bin_row(signal, num_bins, float(histogram_entropy(x, num_bins)))
        for signal, x in values.items()
        for num_bins in bins
    )


def sample_count_rows(counts: Sequence[int], *, draws: int, seed: int, device="cpu") -> pd.DataFrame:
    """Entropy (K = 256) of `draws` samples of each size, over the sample's own range and over the fixed one.

    Columns: distribution, range, num_values, draw, entropy_nats.
    """
    return pd.DataFrame(
        {
            "distribution": name,
            "range": "own" if bounds is None else "fixed",
            "num_values": count,
            "draw": index,
            "entropy_nats": float(histogram_entropy(draw(name, count, seed + index).to(device), range=bounds)),
        }
        for name in ("normal", "SiLU of normal")
        for count in counts
        for index in range(draws)
        for bounds in (None, FIXED_RANGE)
    )


def outlier_rows(deviations: Sequence[float], *, num_values: int, draws: int, seed: int, device="cpu") -> pd.DataFrame:
    """Entropy (K = 256) of a normal sample with one value moved `deviations` standard deviations out (0 moves none).

    Columns: range, outlier_deviations, draw, entropy_nats.
    """
    return pd.DataFrame(
        {
            "range": "own" if bounds is None else "fixed",
            "outlier_deviations": deviation,
            "draw": index,
            "entropy_nats": float(histogram_entropy(_with_outlier(x, deviation), range=bounds)),
        }
        for index in range(draws)
        for x in (draw("normal", num_values, seed + index).to(device),)
        for deviation in deviations
        for bounds in (None, FIXED_RANGE)
    )


def prompt_rows(
    model: torch.nn.Module,
    tokenizer,
    source: str,
    *,
    rows_per_task: int,
    max_tokens: int,
    prefixes: Sequence[int],
    device="cpu",
) -> pd.DataFrame:
    """Entropy (K = 256, own range) of the embeddings and of every layer's scan input, prompt by prompt.

    Prompts are those of the paper's protocol, cut on the right at `max_tokens`. The model is causal, so the entropy of
    each prefix length comes from the same forward pass; the whole prompt is the row with `whole` true.

    Columns: task, prompt, signal ("embedding" or "scan input"), layer (-1 for the embedding), tokens, whole,
    entropy_nats, entropy_bits, and for every published range chunk_<range>.
    """
    found = prompts(tokenizer, source, rows_per_task=rows_per_task, max_tokens=max_tokens)
    return pd.DataFrame(
        row
        for task, index, ids in progress(found, "prompts", total=len(TASKS) * rows_per_task)
        for row in _prompt_rows(model, task, index, ids.to(device), prefixes)
    )


def prompts(tokenizer, source: str, *, rows_per_task: int, max_tokens: int) -> Iterator[tuple[str, int, Tensor]]:
    """(task, row number, token ids (1, L)) of the paper's protocol for the first rows of every task."""
    protocol = published()
    for task in TASKS:
        for index, row in enumerate(load_rows(source, task, limit=rows_per_task)):
            yield task, index, torch.tensor([protocol.encode(tokenizer, task, row, max_tokens).ids])


def mean_rows(rows: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Mean of `column` in each group with its 95 % bootstrap interval: columns `by`, mean, low, high, n."""
    found = [(keys, mean_interval(list(group[column]))) for keys, group in rows.groupby(by, sort=False)]
    return pd.DataFrame(
        dict(zip(by, keys)) | {"mean": each.value, "low": each.low, "high": each.high, "n": each.n}
        for keys, each in found
    )


def dominant_share(chunks: pd.Series) -> float:
    """The share of the commonest chunk."""
    return float(chunks.value_counts(normalize=True).max())


def spread_between(values: pd.Series, groups: pd.Series) -> float:
    """Share of the variance of `values` that lies between `groups` (eta squared), 0 to 1."""
    means = values.groupby(groups).transform("mean")
    return float(((means - values.mean()) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def _bin_row(signal: str, num_bins: int, entropy_nats: float) -> dict:
    return {
        "signal": signal,
        "num_bins": num_bins,
        "entropy_nats": entropy_nats,
        "share_of_ceiling": entropy_nats / math.log(num_bins),
        "chunk_log_k": ChunkRule(32, 512, math.log(num_bins))(entropy_nats),
        "chunk_legacy": ChunkRule(32, 512, LEGACY_H_REF)(entropy_nats),
    }


def _with_outlier(x: Tensor, deviation: float) -> Tensor:
    return torch.cat([x[:-1], x.new_tensor([deviation])]) if deviation else x


def _prompt_rows(
    model: torch.nn.Module, task: str, index: int, token_ids: Tensor, prefixes: Sequence[int]
) -> Iterator[dict]:
    with route(model):
        kept = capture_activations(model, token_ids)
    seqlen = token_ids.shape[1]
    signals = [("embedding", -1, kept.embeddings.transpose(1, 2))]  # (B, d_model, L)
    signals += [("scan input", layer, u) for layer, u in enumerate(kept.u)]  # (B, D, L)
    for signal, layer, x in signals:
        for tokens in [*(n for n in prefixes if n < seqlen), seqlen]:
            entropy_nats = float(histogram_entropy(x[..., :tokens]))
            yield {
                "task": task,
                "prompt": f"{task}-{index}",
                "signal": signal,
                "layer": layer,
                "tokens": tokens,
                "whole": tokens == seqlen,
                "entropy_nats": entropy_nats,
                "entropy_bits": entropy_nats / math.log(2),
            } | {f"chunk_{name}": ChunkRule(*bounds)(entropy_nats) for name, bounds in PUBLISHED_RANGES.items()}
