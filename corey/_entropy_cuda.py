"""Histogram entropy on CUDA: how a call's values lie in memory, which kernels of kernels/histogram.cu they need.

The result and the chunk stay on the device. A call is one launch. Bins over a fixed range take one pass over the data;
bins over the tensor's own range take two, of which the second finds up to 128 KiB a multiprocessor in registers and
more in L2. Counts are integers, so the result is the same bit for bit in every run.
"""

import math
import struct
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from corey import _cuda
from corey._operands import CPP_TYPES

SOURCE = "histogram.cu"
MAX_BINS = 8192  # one counter each then fills the 32 KiB of a block's table
P_EPS = 1e-10  # as in corey/entropy.py and the kernel

_THREADS, _FIXED_DEPTH, _DEPTH, _MOST_BLOCKS = 1024, 4, 8, 192  # as in the kernel; Hopper has fewer
_POOL_THREADS = 512
_FEW_VALUES = 8192  # up to here one block takes a pool as fast as many

_SINK_POINTERS = struct.Struct("=4Q")
_SINK_NUMBERS = struct.Struct("=Q2d32f2i")
_POINTERS = struct.Struct("=2Q")
_NUMBERS = struct.Struct("=6q15I")
BINS = struct.Struct("=6f")
_PADDING = bytes(-(_NUMBERS.size + BINS.size) % 8)


def columns(num_bins: int) -> int:
    """Replicas of every bin in shared memory, one for each lane of a warp where they fit."""
    return min(32, 1 << (MAX_BINS // num_bins).bit_length() - 1)


def table_bytes(num_bins: int, replicas: int) -> int:
    """Dynamic shared memory for a block's table."""
    return ((num_bins + 1) * replicas + 3) // 4 * 16


def copies(num_bins: int) -> int:
    """Copies of a pool's counts in global memory: `finish` in the kernel."""
    return max(1, columns(num_bins) // 4)


def variant(
    name: str, dtype: torch.dtype, num_bins: int, unit_stride: bool, own_range: bool = False, quick: bool = False
) -> tuple[str, str, _cuda.Macros]:
    """What `_cuda.function` needs to know of the kernel `name`, except the device."""
    macros = [
        (name.removeprefix("histogram_").upper(), 1),
        ("T_X", CPP_TYPES[dtype]),
        ("UNIT_STRIDE", int(unit_stride)),
        ("POWER_OF_TWO", int(num_bins & (num_bins - 1) == 0)),
        ("COLUMNS", columns(num_bins)),
    ]
    if name == "histogram_entropy":
        macros += ("OWN_RANGE", int(own_range)), ("QUICK", int(quick))
    return SOURCE, name, tuple(macros)


TUNED = [
    variant("histogram_entropy", dtype, 256, True, *how)
    for how in ((False, True), (False, False), (True, False))
    for dtype in CPP_TYPES
]
TUNED += [variant("histogram_pools", dtype, 256, False) for dtype in CPP_TYPES]


# ---- bins; kernels/histogram.cuh, Bins -------------------------------------------------------------------------------


@cache
def fixed_bins(lo: float, hi: float, num_bins: int, dtype: torch.dtype | None) -> tuple[bytes, bool]:
    """`Bins` over [lo, hi], and whether they are for ONE_PRODUCT: it puts every value of `dtype` where EXACT does.

    The 16-bit types have 2^16 values, so all are tried; in fp32 a span that is a power of two is divided by exactly.
    """
    with np.errstate(all="ignore"):
        low, span, count = np.float32(lo), np.float32(hi - lo), np.float32(num_bins)
        if dtype == torch.float32:
            candidates = [np.float32(1) / span] if np.frexp(span)[0] == 0.5 else []
        else:
            candidates = [] if dtype is None else _neighbours(np.float32(1) / span)
        for scale in candidates:
            for shift in _neighbours(-low * scale)[: 1 if dtype == torch.float32 else 3]:
                if np.isfinite(shift) and (dtype == torch.float32 or _same_bins(dtype, low, span, scale, shift, count)):
                    return BINS.pack(scale, shift, 1.0, 1.0, 0.0, count), True
        scale = np.ldexp(np.float32(1), -max(int(np.frexp(span)[1]), -125))
        if not np.isfinite(scale * low):
            scale = np.float32(1)
        width = span * scale
        inverse = np.minimum(np.float32(1) / width, np.finfo(np.float32).max)
        inverse_low = np.float32(1.0 - np.float64(width) * np.float64(inverse)) * inverse
    return BINS.pack(*map(float, (scale, -scale * low, width, inverse, inverse_low, count))), False


def _neighbours(x: np.float32) -> list[np.float32]:
    return [x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -np.float32(np.inf))]


def _same_bins(dtype, low, span, scale, shift, count) -> bool:
    """Whether ONE_PRODUCT with these puts every value of a 16-bit type where EXACT does."""
    values = _all_values(dtype)
    exact = np.floor(((values - low) / span * count).clip(0, count))
    return np.array_equal(exact, np.floor(fma(values, scale, shift).clip(0, 1) * count))


def fma(x: np.ndarray, y: np.float32, z: np.float32) -> np.ndarray:
    """x * y + z in fp32, rounded once: the product is exact in float64, and the sum there is rounded to odd."""
    product = x.astype(np.float64) * np.float64(y)
    total = product + z
    added = total - product
    lost = (product - (total - added)) + (z - added)
    even = total.view(np.int64) & 1 == 0
    inexact = np.isfinite(total) & (lost != 0)
    return np.where(inexact & even, np.nextafter(total, lost * np.inf), total).astype(np.float32)


@cache
def _all_values(dtype: torch.dtype) -> np.ndarray:
    """Every value of a 16-bit floating type but NaN, in fp32."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float().numpy()
    return values[~np.isnan(values)]


# ---- where a histogram goes; kernels/histogram.cuh, Sink -------------------------------------------------------------


def sink_numbers(size: int, log_base: float, least: tuple[float, ...] = (), least_chunk: int = 0) -> bytes:
    """size: values in a pool. least: nats, ascending: the least entropies of the chunks 2, 4, ... times least_chunk."""
    padded = (*least, *(0.0,) * (32 - len(least)))
    return _SINK_NUMBERS.pack(size, 1.0 / (size + P_EPS), 1.0 / log_base, *padded, len(least), least_chunk)


def sink_pointers(
    device: int, pools: int, num_bins: int, entropy: Tensor | None, chunk: Tensor | None, extremes: int = 0
) -> tuple[bytes, int, Tensor]:
    """The bytes, the address of the extremes, and a tensor to hold until after the launch. The device must be current.

    entropy: fp32, one a pool. chunk: int32, of the only pool. extremes: how many of 8 bytes, which the kernel leaves
    zero as it does the counts.
    """
    counts, begun = 8 * pools * copies(num_bins) * num_bins, 4 * (pools + pools % 2)
    held = _cuda.scratch(device, counts + begun + 8 * extremes, "histogram")
    start = held.data_ptr()
    return (
        _SINK_POINTERS.pack(
            start,
            start + counts,
            0 if entropy is None else entropy.data_ptr(),
            0 if chunk is None else chunk.data_ptr(),
        ),
        start + counts + begun,
        held,
    )


# ---- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All that a call needs but the addresses. It holds for tensors of one shape, strides, dtype and alignment."""

    function: _cuda.Function
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    kept_shape: tuple[int, ...]
    pools: int
    extremes: int  # pairs of floats that blocks tell each other
    together: bool  # whether the blocks wait for each other, so that they must be resident together
    counted: bool  # whether counts pass through global memory
    sink_numbers: bytes
    numbers: bytes
    version: int


_plans: dict[tuple, Plan] = {}


def entropy(
    x: Tensor, num_bins: int, bounds: tuple[float, float] | None, log_base: float, pooled: tuple[int, ...]
) -> Tensor:
    """fp32, in the shape of x without the pooled dimensions, which are distinct and not negative."""
    return _run(x, num_bins, bounds, log_base, pooled, None)


def chunk(
    x: Tensor, num_bins: int, bounds: tuple[float, float] | None, least: tuple[float, ...], least_chunk: int
) -> Tensor:
    """0-dim int32: least_chunk, doubled for every number in `least` that the entropy of all of x in nats reaches."""
    return _run(x, num_bins, bounds, 1.0, tuple(range(x.ndim)), (least, least_chunk))


def _run(x, num_bins, bounds, log_base, pooled, rule):
    """rule: None for the entropies, else `chunk`'s last two arguments."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _run(x, num_bins, bounds, log_base, pooled, rule)
    if x.dtype not in CPP_TYPES:
        x = x.float()
    key = (x.shape, x.stride(), x.dtype, x.data_ptr() & 15, x.device.index, num_bins, bounds, log_base, pooled, rule)
    plan = _plans.get(key)
    if plan is None or plan.version != _cuda.source_version():
        view = _View.of(x, pooled)
        if view is None:  # too many strides for the kernels
            kept = [d for d in range(x.ndim) if d not in pooled]
            shape = [x.shape[d] for d in kept]
            flat = x.permute((*kept, *pooled)).reshape(math.prod(shape), -1)
            result = _run(flat, num_bins, bounds, log_base, (1,), rule)
            return result if rule else result.reshape(shape)
        plan = _plans[key] = _plan(x, view, num_bins, bounds, log_base, rule)

    result = x.new_empty(plan.kept_shape, dtype=torch.float32 if rule is None else torch.int32)
    if plan.counted:
        outcome = (None, result) if rule else (result, None)
        sink, extremes, _held = sink_pointers(x.device.index, plan.pools, num_bins, *outcome, plan.extremes)
    else:
        extremes = 0
        sink = _SINK_POINTERS.pack(0, 0, *((0, result.data_ptr()) if rule else (result.data_ptr(), 0)))
    params = sink + plan.sink_numbers + _POINTERS.pack(x.data_ptr(), extremes) + plan.numbers
    _cuda.launch(plan.function, plan.grid, plan.threads, plan.shared_bytes, params, together=plan.together, early=True)
    return result


@dataclass(frozen=True)
class _View:
    """x as pools of rows: (size, stride) pairs, strides in elements, outermost first."""

    kept_shape: tuple[int, ...]
    kept: list[tuple[int, int]]  # 2
    rows: list[tuple[int, int]]  # 3: the last is along a row

    @staticmethod
    def of(x: Tensor, pooled: tuple[int, ...]) -> "_View | None":
        """None where the kernels cannot step through memory so."""
        pairs = list(zip(x.shape, x.stride()))
        shape = tuple(x.shape[d] for d in range(x.ndim) if d not in pooled)
        kept = _merged([pairs[d] for d in range(x.ndim) if d not in pooled])
        # Order within a pool is free. Repeated values (stride 0) go outside, so that rows stay contiguous.
        rows = _merged(sorted((pairs[d] for d in pooled), key=lambda pair: (pair[1] != 0, -pair[1])))
        if len(kept) > 2 or len(rows) > 3 or (len(rows) == 3 and math.prod(shape) > 65535):
            return None
        return _View(shape, [(1, 0)] * (2 - len(kept)) + kept, [(1, 0)] * (3 - len(rows)) + rows)


def _merged(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours that step through memory evenly become one."""
    merged: list[tuple[int, int]] = []
    for size, stride in pairs:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _plan(x: Tensor, view: _View, num_bins, bounds, log_base, rule) -> Plan:
    device = x.device.index
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    size, pools = math.prod(n for n, _ in view.rows), math.prod(view.kept_shape)
    (rows_outer, outer_stride), (rows_inner, inner_stride), (inner, step) = view.rows
    small = rows_outer == 1 and size < 2**31 and (size <= _FEW_VALUES or pools >= processors)
    unit_stride = not small and step == 1
    vector = 16 // x.dtype.itemsize if unit_stride else 1
    tiles = max(1, math.ceil(inner // vector / (32 * (_FIXED_DEPTH if bounds else _DEPTH))))

    bins, quick = fixed_bins(*(bounds or (0.0, 1.0)), num_bins, None if small else x.dtype)
    members = skip = 1
    together = False
    if small:
        members = _pools_a_block(view, pools, x.dtype.itemsize, columns(num_bins), processors)
        grid = (math.ceil(pools / members), 1, 1)
        threads = _POOL_THREADS if members * size > 2048 else 128
        needed = variant("histogram_pools", x.dtype, num_bins, unit_stride)
    else:
        all_tiles = rows_outer * rows_inner * tiles
        blocks = max(1, min(processors // pools, math.ceil(all_tiles / 4), _MOST_BLOCKS))
        grid = (blocks, pools, 1)
        threads = _THREADS
        skip = blocks * (_THREADS // 32)
        together = bounds is None and blocks > 1
        needed = variant("histogram_entropy", x.dtype, num_bins, unit_stride, bounds is None, quick)

    (_, pool_outer), (pools_inner, pool_inner) = view.kept
    starts = (pool_outer, pool_inner, outer_stride, inner_stride)
    singles = unit_stride and (x.data_ptr() % 16 or any(s % vector for s in (*starts, inner)))
    least, least_chunk = rule or ((), 0)
    return Plan(
        function=_function(device, *needed),
        grid=grid,
        threads=threads,
        shared_bytes=table_bytes(num_bins, columns(num_bins)),
        kept_shape=() if rule else view.kept_shape,
        pools=pools,
        extremes=0 if small or bounds else grid[0] * pools,
        together=together,
        counted=not small,
        sink_numbers=sink_numbers(size, log_base, least, least_chunk),
        numbers=_NUMBERS.pack(
            *starts,
            step,
            inner,
            *_divisor(pools_inner),
            *_divisor(rows_inner),
            *_divisor(tiles),
            pools,
            rows_outer,
            skip // tiles // rows_inner,
            skip // tiles % rows_inner,
            skip % tiles,
            num_bins,
            members,
            bounds is None,
            bool(singles),
        )
        + bins
        + _PADDING,
        version=_cuda.source_version(),
    )


def _pools_a_block(view: _View, pools: int, itemsize: int, most: int, processors: int) -> int:
    """A power of two: how many neighbouring pools the lanes of a warp read side by side."""
    pool_stride, step = view.kept[1][1], view.rows[2][1]
    if not 0 < pool_stride < step:
        return 1
    members, in_a_sector = most, 32 // (pool_stride * itemsize)
    while members > max(in_a_sector, 1) and math.ceil(pools / members) < processors:
        members //= 2
    return members


def _function(device: int, source: str, name: str, macros: _cuda.Macros) -> _cuda.Function:
    return _cuda.function(source, name, device, macros)


def _divisor(by: int) -> tuple[int, int]:
    return by, math.ceil(2**32 / by) if by > 1 else 0
