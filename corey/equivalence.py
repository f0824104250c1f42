"""How far two runs of one model agree: logits bit by bit, greedy tokens, metrics, perplexity, each with its interval.

"Bitwise equal" is meant literally: the bits of every logit are compared, so 0.0 and -0.0 differ and two equal NaNs
agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from corey._check import bad_type, bad_value

_INTEGER_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> dtype that shows its bits
NUM_RESAMPLES = 9999


@dataclass(frozen=True)
class LogitComparison:
    """`max_abs_diff` and `rms_diff` in logit units; `first_divergence` is the first position along L with a differing
    bit, None when there is none."""

    bitwise_equal: bool
    differing_fraction: float
    max_abs_diff: float
    rms_diff: float
    first_divergence: int | None


@dataclass(frozen=True)
class TokenComparison:
    """`agreement` is the fraction of positions with equal tokens, over the longer sequence; `first_divergence` the
    first position that differs (also where the shorter one ends), None when all agree."""

    equal: bool
    agreement: float
    first_divergence: int | None


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval it lies in, from `n` observations."""

    value: float
    low: float
    high: float
    n: int


def compare_logits(a: torch.Tensor, b: torch.Tensor) -> LogitComparison:
    """Compare logits (..., L, V) of two runs: same shape, same floating dtype, any device.

    Differences are taken in float64 between elements whose bits differ; NaN against a number gives NaN.
    """
    for name, value in {"a": a, "b": b}.items():
        if not isinstance(value, torch.Tensor):
            raise bad_type(name, value, "a tensor")
        if not value.is_floating_point() or value.element_size() not in _INTEGER_OF:
            raise bad_value(name, value.dtype, "float16, bfloat16, float32 or float64")
        if value.dim() < 2 or value.numel() == 0:
            raise bad_value(name, tuple(value.shape), "logits (..., L, V) with at least one element")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise bad_value("b", f"{tuple(b.shape)} {b.dtype}", f"the shape and dtype of a, {tuple(a.shape)} {a.dtype}")
    a, b = a.detach().contiguous(), b.detach().to(a.device).contiguous()
    differs = _bits(a) != _bits(b)  # (..., L, V)
    if not differs.any():
        return LogitComparison(True, 0.0, 0.0, 0.0, None)
    gaps = torch.where(differs, a.double() - b.double(), 0.0)  # (..., L, V)
    positions = differs.any(-1).reshape(-1, a.shape[-2]).any(0)  # (L,)
    return LogitComparison(
        bitwise_equal=False,
        differing_fraction=differs.double().mean().item(),
        max_abs_diff=gaps.abs().max().item(),
        rms_diff=gaps.square().mean().sqrt().item(),
        first_divergence=int(positions.nonzero()[0]),
    )


def bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two floating tensors of one shape and dtype hold the same bits; on one device nothing else leaves it."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise bad_value("b", f"{tuple(b.shape)} {b.dtype}", f"the shape and dtype of a, {tuple(a.shape)} {a.dtype}")
    return torch.equal(_bits(a.contiguous()), _bits(b.contiguous()))


def compare_tokens(a: Sequence[int], b: Sequence[int]) -> TokenComparison:
    """Compare two token sequences, of equal length or not."""
    for name, tokens in {"a": a, "b": b}.items():
        if isinstance(tokens, str | torch.Tensor) or not isinstance(tokens, Sequence):
            raise bad_type(name, tokens, "a sequence of int")
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool):
                raise bad_type(name, token, "a sequence of int")
    longest = max(len(a), len(b))
    if longest == 0:
        return TokenComparison(True, 1.0, None)
    equal = [x == y for x, y in zip(a, b)] + [False] * (longest - min(len(a), len(b)))
    return TokenComparison(all(equal), sum(equal) / longest, None if all(equal) else equal.index(False))


def sequence_nll(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[float, int]:
    """Sum of the negative log-likelihoods, in nats, of tokens[1:] under logits[:-1], and how many tokens that is.

    logits: (L, V) floating. tokens: (L,) int64. Computed in float64 from the logits as given.
    """
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise bad_type("logits", logits, "a floating tensor (L, V)")
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
        raise bad_type("tokens", tokens, "an int64 tensor (L,)")
    if logits.dim() != 2 or tokens.shape != logits.shape[:1] or len(tokens) < 2:
        raise bad_value("tokens", tuple(tokens.shape), f"(L,) for logits (L, V) {tuple(logits.shape)}, L at least 2")
    if tokens.min() < 0 or tokens.max() >= logits.shape[1]:
        raise bad_value("tokens", f"ids {tokens.min()} to {tokens.max()}", f"0 to {logits.shape[1] - 1}")
    nll = torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:], reduction="sum")
    return nll.item(), len(tokens) - 1


def perplexity(nll_nats: Sequence[float], num_tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood over all tokens of all sequences: exp(sum nll / sum tokens)."""
    nll, count = _check_nll(nll_nats, num_tokens)
    return math.exp(nll.sum() / count.sum())


def mean_of_perplexities(nll_nats: Sequence[float], num_tokens: Sequence[int]) -> float:
    """The paper's figure: each sequence's own perplexity, averaged. Short or odd sequences dominate it."""
    nll, count = _check_nll(nll_nats, num_tokens)
    return float(np.exp(nll / count).mean())


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean with its BCa bootstrap interval. Values that are all equal give an interval of no width."""
    values = _check_values("values", values)
    _check_confidence(confidence)
    mean = float(values.mean())
    if len(values) == 1 or np.ptp(values) == 0:  # the bootstrap is not defined without spread
        low, high = (mean, mean) if len(values) > 1 else (math.nan, math.nan)
        return Interval(mean, low, high, len(values))
    bounds = stats.bootstrap(
        (values,), np.mean, n_resamples=NUM_RESAMPLES, confidence_level=confidence, method="BCa", rng=seed
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(values))


def paired_delta(
    before: Sequence[float], after: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of after - before over pairs, with the BCa bootstrap interval over the pairs."""
    before, after = _check_values("before", before), _check_values("after", after)
    if len(before) != len(after):
        raise bad_value("after", f"{len(after)} values", f"one for each of the {len(before)} in before")
    return mean_interval(after - before, confidence=confidence, seed=seed)


def agreement_interval(num_equal: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Fraction num_equal / n with its Wilson score interval, which keeps its width at 0 and at 1."""
    for name, value in {"num_equal": num_equal, "n": n}.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise bad_type(name, value, "an int")
    if n < 1 or not 0 <= num_equal <= n:
        raise bad_value("num_equal", f"{num_equal} of {n}", "0 <= num_equal <= n, n at least 1")
    _check_confidence(confidence)
    bounds = stats.binomtest(int(num_equal), int(n)).proportion_ci(confidence, method="wilson")
    return Interval(num_equal / n, float(bounds.low), float(bounds.high), int(n))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(_INTEGER_OF[x.element_size()])


def _check_values(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise bad_value(name, f"shape {array.shape}", "one dimension, at least one value")
    if not np.isfinite(array).all():
        raise bad_value(name, f"{(~np.isfinite(array)).sum()} values that are not finite", "finite numbers")
    return array


def _check_nll(nll_nats: Sequence[float], num_tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    nll, count = _check_values("nll_nats", nll_nats), _check_values("num_tokens", num_tokens)
    if len(nll) != len(count):
        raise bad_value("num_tokens", f"{len(count)} values", f"one for each of the {len(nll)} in nll_nats")
    if (count < 1).any():
        raise bad_value("num_tokens", count.min(), "at least 1 token a sequence")
    return nll, count


def _check_confidence(confidence: float) -> None:
    if not isinstance(confidence, float) or not 0 < confidence < 1:
        raise bad_value("confidence", confidence, "a float between 0 and 1")
