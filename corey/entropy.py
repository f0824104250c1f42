"""Entropy of a tensor's value histogram: the statistic COREY schedules from, and the cheaper statistics beside it."""

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from corey._check import bad_type, bad_value

UNITS = {"nats": 1.0, "bits": math.log(2.0)}
_SPAN_EPS = 1e-8  # published: added to the span, and the span below which a tensor counts as constant
_P_EPS = 1e-10  # published: added inside the logarithm, and the share below which a bin counts as empty


def histogram_entropy(
    x: Tensor,
    num_bins: int = 256,
    range: tuple[float, float] | None = None,
    unit: str = "nats",
    *,
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """Entropy of the histogram of `x`'s values.

    H = -sum_k p_k ln(p_k + 1e-10) over p_k > 1e-10, p_k = count_k / (n + 1e-10), with value v in bin
    clamp(floor(q num_bins), 0, num_bins - 1). Only values enter; their order does not.

    Args:
        x: any shape, any floating dtype; binned in fp32, counted in int64. Take a strided sample by slicing first.
        num_bins: K, at least 2. The ceiling of the result is ln K nats, log2 K bits.
        range: None bins over the tensor's own minimum and maximum, as the paper's code does:
            q = (v - min) / (max - min + 1e-8), and H = 0 where max - min < 1e-8. That ties H to the sample count and to
            single outliers. A pair (lo, hi) bins over fixed ends, q = (v - lo) / (hi - lo), in one pass over the data;
            values outside fall into the end bins, infinities included.
        unit: "nats" or "bits".
        dim: the dimension or dimensions pooled into one histogram; None pools all of them.

    Returns:
        fp32, 0-dim for `dim=None`, else the shape of `x` without the pooled dimensions. Empty pools give 0.
        On CPU a NaN (and, with the tensor's own range, an infinity) raises; on other devices the affected entries are
        NaN, because raising would need a host synchronisation. Nothing here synchronises a CUDA stream.
        Not differentiable.

    On CUDA a fused kernel (kernels/histogram.cu) computes this with the same counts as on CPU, without a copy for up to
    three dimensions of any strides; float64 is converted first. More than 8192 bins run as PyTorch operators.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_tensor(x)
    _check_bins(num_bins)
    return torch.ops.corey.histogram_entropy(
        x.detach(), num_bins, _check_range(range), _check_unit(unit), _check_dims(dim, x.ndim)
    )


def entropy_chunk(
    x: Tensor, num_bins: int, range: tuple[float, float] | None, least: tuple[float, ...], least_chunk: int
) -> Tensor:
    """The chunk that `histogram_entropy` of all of `x` picks: 0-dim int32 on the device of `x`, not synchronised.

    least: entropies in nats, ascending, at most 32. The chunk is least_chunk, doubled for each of them that the entropy
        reaches. On CUDA a NaN reaches none. `corey.chunk_rules.device_chunk` takes a `ChunkRule` instead.
    """
    _check_tensor(x)
    _check_bins(num_bins)
    if len(least) > 32 or not 1 <= least_chunk << len(least) < 2**31:
        raise bad_value("least", f"{len(least)} entropies above {least_chunk} tokens", "chunks below 2^31 tokens")
    return torch.ops.corey.entropy_chunk(x.detach(), num_bins, _check_range(range), least, least_chunk)


# ---- the registered operators ----------------------------------------------------------------------------------------

_library = torch.library.Library("corey", "FRAGMENT")  # a reload of this module takes the old registrations with it
torch.library.define(
    "corey::histogram_entropy",
    "(Tensor x, int num_bins, float[]? range, float log_base, int[] pooled) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
    lib=_library,
)
torch.library.define(
    "corey::entropy_chunk",
    "(Tensor x, int num_bins, float[]? range, float[] least, int least_chunk) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
    lib=_library,
)


def _histogram_entropy(
    x: Tensor, num_bins: int, bounds: list[float] | None, log_base: float, pooled: list[int]
) -> Tensor:
    pools, kept_shape = _as_pools(x, pooled)  # (S, n)
    if pools.numel() == 0:
        return x.new_zeros(kept_shape, dtype=torch.float32)
    if bounds is None:
        counts, valid, constant = _own_range_counts(pools, num_bins)
    else:
        counts, valid, constant = _fixed_range_counts(pools, num_bins, *bounds)
    if x.device.type == "cpu" and not bool(valid.all()):
        raise bad_value("x", "NaN or a span beyond fp32", "values whose range is finite")
    p = counts.double() / (pools.shape[-1] + _P_EPS)  # (S, K)
    terms = torch.where(p > _P_EPS, p * torch.log(p + _P_EPS), 0.0)
    # One full bin leaves -1e-10 behind through the epsilons; an entropy is not negative.
    entropy = (-terms.sum(-1) / log_base).clamp_min(0.0)  # (S,)
    entropy = entropy.masked_fill(constant, 0.0).masked_fill(~valid, math.nan)
    return entropy.float().reshape(kept_shape)


def _entropy_chunk(
    x: Tensor, num_bins: int, bounds: list[float] | None, least: list[float], least_chunk: int
) -> Tensor:
    entropy = _histogram_entropy(x, num_bins, bounds, 1.0, range(x.ndim))
    chunk = torch.full((), least_chunk, dtype=torch.int32, device=x.device)
    for bound in least:  # numbers, not a tensor of them, which would have to travel to the device
        chunk = chunk + chunk * (entropy >= bound)
    return chunk


@torch.library.impl("corey::histogram_entropy", "CUDA", lib=_library)
def _histogram_entropy_cuda(
    x: Tensor, num_bins: int, bounds: list[float] | None, log_base: float, pooled: list[int]
) -> Tensor:
    from corey import _entropy_cuda

    if x.numel() == 0 or num_bins > _entropy_cuda.MAX_BINS:
        return _histogram_entropy(x, num_bins, bounds, log_base, pooled)
    return _entropy_cuda.entropy(x, num_bins, bounds and tuple(bounds), log_base, tuple(pooled))


@torch.library.impl("corey::entropy_chunk", "CUDA", lib=_library)
def _entropy_chunk_cuda(
    x: Tensor, num_bins: int, bounds: list[float] | None, least: list[float], least_chunk: int
) -> Tensor:
    from corey import _entropy_cuda

    if x.numel() == 0 or num_bins > _entropy_cuda.MAX_BINS:
        return _entropy_chunk(x, num_bins, bounds, least, least_chunk)
    return _entropy_cuda.chunk(x, num_bins, bounds and tuple(bounds), tuple(least), least_chunk)


# Called, not used as decorators: those leave None in place of the function.
torch.library.impl("corey::histogram_entropy", "default", _histogram_entropy, lib=_library)
torch.library.impl("corey::entropy_chunk", "default", _entropy_chunk, lib=_library)


@torch.library.register_fake("corey::histogram_entropy", lib=_library)
def _histogram_entropy_fake(x, num_bins, bounds, log_base, pooled):
    return x.new_empty([size for d, size in enumerate(x.shape) if d not in pooled], dtype=torch.float32)


@torch.library.register_fake("corey::entropy_chunk", lib=_library)
def _entropy_chunk_fake(x, num_bins, bounds, least, least_chunk):
    return x.new_empty((), dtype=torch.int32)


# ---- references and other statistics ---------------------------------------------------------------------------------


def histogram_entropy_ref(
    x: np.ndarray, num_bins: int = 256, range: tuple[float, float] | None = None, unit: str = "nats"
) -> float:
    """Pooled `histogram_entropy` in float64 numpy, written as the published formula reads."""
    _check_bins(num_bins)
    bounds = _check_range(range)
    log_base = _check_unit(unit)
    values = np.asarray(x, dtype=np.float64).ravel()
    if values.size == 0:
        return 0.0
    lo, hi = bounds if bounds is not None else (values.min(), values.max())
    if hi - lo < _SPAN_EPS:
        return 0.0
    q = (values - lo) / (hi - lo + (_SPAN_EPS if bounds is None else 0.0))
    bins = np.clip(np.floor(q * num_bins), 0, num_bins - 1).astype(np.int64)
    p = np.bincount(bins, minlength=num_bins) / (values.size + _P_EPS)
    p = p[p > _P_EPS]
    return max(0.0, float(-(p * np.log(p + _P_EPS)).sum() / log_base))


def tier1_entropy(x: np.ndarray, num_bins: int = 64) -> float:
    """Normalised entropy in [0, 1] of the paper's cost model (Tier 1): float64, its own widened range.

    The tensor's own range is widened by 5 % of the span (at least 1e-6) at each end, and the entropy in nats is divided
    by ln num_bins and clipped. A (nearly) constant tensor gives 0, and so does an empty one.
    """
    _check_bins(num_bins)
    values = np.asarray(x, dtype=np.float64).ravel()
    if values.size == 0 or np.isclose(values.min(), values.max()):
        return 0.0
    counts, _ = np.histogram(values, bins=num_bins, range=widened_range(values.min(), values.max()))
    p = counts[counts > 0] / values.size
    return float(np.clip(-(p * np.log(p + 1e-12)).sum() / math.log(num_bins), 0.0, 1.0))


def widened_range(lo: float, hi: float) -> tuple[float, float]:
    """Tier 1's bin range: [lo, hi] with a margin of 5 % of its span, at least 1e-6, at each end."""
    margin = max(0.05 * (hi - lo), 1e-6)
    return lo - margin, hi + margin


class MovingEntropy:
    """Exponential moving average of a stream of entropies; the first value starts it.

    The published Figure 1 feeds two streams to one such object in turn, which mixes them; give each stream its own.
    """

    def __init__(self, decay: float = 0.85):
        if not 0.0 <= decay < 1.0:
            raise bad_value("decay", decay, "a number in [0, 1)")
        self.decay = decay
        self.value: float | None = None

    def update(self, entropy: float) -> float:
        """Takes one entropy in, and returns the average so far."""
        self.value = entropy if self.value is None else self.decay * self.value + (1.0 - self.decay) * entropy
        return self.value


def cheap_proxy(x: Tensor, num_bins: int = 256) -> Tensor:
    """mean|x| / rms(x), clamped to [0, 1] and scaled to ln num_bins nats (0.798 ln K for Gaussian values).

    Any shape and floating dtype; 0-dim fp32 on the device of `x`, no synchronisation. An empty tensor counts as zeros,
    here and in the two proxies below.
    """
    values = _proxy_values(x, num_bins)
    ratio = values.abs().mean() / ((values.square().mean() + 1e-8).sqrt() + 1e-8)
    return ratio.clamp(0.0, 1.0) * math.log(num_bins)


def variance_proxy(x: Tensor, num_bins: int = 256) -> Tensor:
    """s / (mean|x| + s), s the standard deviation over all values, scaled to ln num_bins nats; 0-dim fp32."""
    values = _proxy_values(x, num_bins)
    deviation = (values.var(correction=0) + 1e-8).sqrt()
    return deviation / (values.abs().mean() + deviation + 1e-8) * math.log(num_bins)


def kurtosis_proxy(x: Tensor, num_bins: int = 256) -> Tensor:
    """1 - exp(-max(excess kurtosis, 0) / 8), scaled to ln num_bins nats; 0-dim fp32.

    As published it runs against entropy: heavy tails, which lower the histogram's entropy, raise this proxy.
    """
    values = _proxy_values(x, num_bins)
    centred = values - values.mean()
    excess = centred.pow(4).mean() / (centred.square().mean() + 1e-8).square() - 3.0
    return (1.0 - torch.exp(-excess.clamp_min(0.0) / 8.0)) * math.log(num_bins)


def _own_range_counts(pools: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    lo, hi = pools.amin(-1), pools.amax(-1)  # (S,)
    span = hi.double() - lo.double()
    # The published code forms the span in float64 on the host and divides in fp32; so does this, on the device.
    width = (span + _SPAN_EPS).float()
    counts = _bin_counts((pools - lo[:, None]) / width[:, None], num_bins)
    return counts, torch.isfinite(width), span < _SPAN_EPS


def _fixed_range_counts(pools: Tensor, num_bins: int, lo: float, hi: float) -> tuple[Tensor, Tensor, Tensor]:
    # Divided by a tensor: for a number, CUDA multiplies by the reciprocal, which rounds otherwise.
    width = torch.full((), hi - lo, dtype=torch.float64, device=pools.device).float()
    counts = _bin_counts((pools - lo) / width, num_bins)
    return counts, ~pools.isnan().any(-1), torch.zeros(pools.shape[0], dtype=torch.bool, device=pools.device)


def _bin_counts(q: Tensor, num_bins: int) -> Tensor:
    # Clamped before the cast so that infinities land in the end bins, and after it because a NaN casts to anything.
    bins = (q * num_bins).floor_().clamp_(0, num_bins - 1).long().clamp_(0, num_bins - 1)  # (S, n)
    counts = torch.zeros(q.shape[0], num_bins, dtype=torch.int64, device=q.device)
    # scatter_add_ rather than bincount: bincount reads the largest index back to the host on CUDA.
    return counts.scatter_add_(-1, bins, counts.new_ones(1, 1).expand_as(bins))


def _as_pools(x: Tensor, pooled: Collection[int]) -> tuple[Tensor, tuple[int, ...]]:
    kept = [d for d in range(x.ndim) if d not in pooled]
    kept_shape = tuple(x.shape[d] for d in kept)
    pool_size = math.prod(x.shape[d] for d in pooled)
    return x.float().permute((*kept, *pooled)).reshape(math.prod(kept_shape), pool_size), kept_shape


def _proxy_values(x: Tensor, num_bins: int) -> Tensor:
    _check_tensor(x)
    _check_bins(num_bins)
    return x.float() if x.numel() else x.new_zeros(1, dtype=torch.float32)


def _check_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        raise bad_type("x", x, "a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"x: got a tensor of {x.dtype}, want a floating dtype")


def _check_bins(num_bins: object) -> None:
    if not isinstance(num_bins, int) or isinstance(num_bins, bool):
        raise bad_type("num_bins", num_bins, "an int")
    if num_bins < 2:
        raise bad_value("num_bins", num_bins, "at least 2")


def _check_range(bounds: object) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if not isinstance(bounds, tuple | list):
        raise bad_type("range", bounds, "None or a pair (lo, hi)")
    if len(bounds) != 2 or not all(math.isfinite(b) for b in bounds) or not bounds[0] < bounds[1]:
        raise bad_value("range", bounds, "a pair (lo, hi) of finite numbers with lo < hi")
    return float(bounds[0]), float(bounds[1])


def _check_unit(unit: object) -> float:
    if unit not in UNITS:
        raise bad_value("unit", repr(unit), "'nats' or 'bits'")
    return UNITS[unit]


def _check_dims(dim: object, ndim: int) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(ndim))
    pooled = tuple(_check_dim(d, ndim) for d in (dim if isinstance(dim, tuple) else (dim,)))
    if not pooled or len(set(pooled)) != len(pooled):
        raise bad_value("dim", dim, "one or more different dimensions")
    return pooled


def _check_dim(dim: object, ndim: int) -> int:
    if not isinstance(dim, int):
        raise bad_type("dim", dim, "None, an int or a tuple of ints")
    if not -ndim <= dim < ndim:
        raise bad_value("dim", dim, f"a dimension of a {ndim}-dimensional tensor")
    return dim % ndim
