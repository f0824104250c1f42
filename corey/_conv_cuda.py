"""The causal convolution of CUDA tensors: which kernel of kernels/causal_conv1d.cu runs, and its launch."""

import struct
from dataclasses import dataclass

import torch

from corey import _cuda, _entropy_cuda
from corey._operands import CPP_TYPES
from corey._plans import ABSENT, Plans, alignment, empty

SOURCE = "causal_conv1d.cu"
MAX_BINS = _entropy_cuda.MAX_BINS
CHANNELS = 4  # a thread of the token-major kernel moves at once
_WALKS, _COUNTING_WALKS = (24, 16, 8), (32, 16, 8)  # tokens a thread of it walks: the most that keeps the device busy
SAMPLING_COLUMNS = 8  # of the histogram of sampled tokens, which few threads meet in
VECTORS = 4  # a thread of the channel-major kernel computes, as in the kernel

_THREADS, _UPDATE_THREADS = 256, 128  # as in the kernel
_WALKERS, _COUNTING_WALKERS = 256, 512  # threads of the token-major kernel, as there
_BUSY = 480  # threads of it that keep a multiprocessor busy

_POINTERS = struct.Struct("=6Q")
_NUMBERS = struct.Struct("=10qIiiii4x")
_UPDATE_POINTERS = struct.Struct("=5Q")
_UPDATE_NUMBERS = struct.Struct("=8q")


def macros(dtype, weight_dtype, width, silu, channels=1, num_bins=0, quick=False, sampled=False):
    """What kernels/causal_conv1d.cu is compiled with. num_bins: 0 where nothing is counted."""
    counts = 0 if num_bins == 0 else 2 if num_bins & (num_bins - 1) == 0 else 1
    return (
        ("T_X", CPP_TYPES[dtype]),
        ("T_W", CPP_TYPES[weight_dtype]),
        ("WIDTH", width),
        ("SILU", int(silu)),
        ("VECTOR", channels),
        ("HISTOGRAM", counts),
        ("SAMPLED", int(sampled)),
        ("COLUMNS", _columns(num_bins, sampled) if num_bins else 0),
        ("QUICK", int(quick)),
    )


def _columns(num_bins, sampled):
    return min(_entropy_cuda.columns(num_bins), SAMPLING_COLUMNS if sampled else 32)


TUNED = [
    (SOURCE, name, macros(dtype, dtype, 4, True, channels, num_bins, quick, sampled))
    for dtype, num_bins, quick, sampled in (
        *((dtype, 0, False, False) for dtype in CPP_TYPES),
        *((dtype, 256, quick, sampled) for dtype in CPP_TYPES for quick in (False, True) for sampled in (False, True)),
    )
    for name, channels in (("causal_conv1d_token_major", CHANNELS), ("causal_conv1d_channel_major", 1))
] + [(SOURCE, "causal_conv1d_update", macros(torch.bfloat16, torch.bfloat16, 4, True))]


@dataclass(frozen=True)
class Plan:
    """All that a launch needs but the addresses, for tensors of these shapes, strides, dtypes and alignments."""

    function: _cuda.Function
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    numbers: bytes
    version: int


_plans, _update_plans = Plans(), Plans()


def convolve(x, weight, bias, silu, initial_state, check, outputs, counting=None):
    """y and the last state; with `counting`, (num_bins, lo, hi, stride, least, least_chunk), also entropy and chunk.

    check(x, weight, bias, initial_state) raises for bad arguments; outputs(x, weight) makes y and the last state.
    """
    if x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return convolve(x, weight, bias, silu, initial_state, check, outputs, counting)
    tensors = (x, weight, bias, initial_state)

    def make():
        check(*tensors)
        return _plan(x, weight, silu, initial_state, counting)

    plan = _plans.get((silu, counting), tensors, make)
    y, last = outputs(x, weight)
    results = (y, last)
    if plan.grid[0] == 0:
        last.copy_(initial_state) if initial_state is not None else last.zero_()
        return results
    weight, bias = _packed(weight), _packed(bias)
    params = _POINTERS.pack(*map(_address, (x, weight, bias, initial_state, y, last))) + plan.numbers
    if counting is not None:
        entropy = x.new_empty((), dtype=torch.float32)
        chunk = x.new_empty((), dtype=torch.int32)
        num_bins, lo, hi, stride, least, least_chunk = counting
        pointers, _, _held = _entropy_cuda.sink_pointers(x.device.index, 1, num_bins, entropy, chunk)
        counted = x[..., ::stride].numel()
        numbers = _entropy_cuda.sink_numbers(counted, 1.0, least, least_chunk)
        bins, _ = _entropy_cuda.fixed_bins(lo, hi, num_bins, x.dtype)
        params += pointers + numbers + bins
        results += (entropy, chunk)
    _cuda.launch(plan.function, plan.grid, plan.threads, plan.shared_bytes, params, early=True)
    return results


def convolve_again(x, weight, bias, silu, initial_state, outputs):
    """y and the last state, where arguments are like those of an earlier call, which was checked; else None."""
    try:
        addresses = (
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if initial_state is None else initial_state.data_ptr(),
        )
        options = (x.shape, silu, alignment(*addresses))
        compared = (
            x,
            weight,
            ABSENT[0] if bias is None else bias,
            ABSENT[1] if initial_state is None else initial_state,
        )
        found = _plans.find(options, compared)
    except (AttributeError, TypeError, RuntimeError):  # not tensors: the checks will say so
        return None
    if found is not None:
        plan, (y, last) = found
        y, last = empty(*y), empty(*last)
        _launch(plan, _POINTERS.pack(*addresses, y.data_ptr(), last.data_ptr()))
        return y, last
    if x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return convolve_again(x, weight, bias, silu, initial_state, outputs)
    plan = _plans.known((silu, None), (x, weight, bias, initial_state))
    if plan is None or plan.grid[0] == 0 or not _is_packed(weight) or not _is_packed(bias):
        return None
    y, last = outputs(x, weight)
    _launch(plan, _POINTERS.pack(*addresses, y.data_ptr(), last.data_ptr()))
    _plans.keep(plan, (y, last), options, compared)
    return y, last


def update(x, conv_state, weight, bias, silu, check):
    """y; conv_state is updated. check(x, conv_state, weight, bias) raises for bad arguments."""
    if x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return update(x, conv_state, weight, bias, silu, check)
    tensors = (x, conv_state, weight, bias)

    def make():
        check(*tensors)
        return _update_plan(x, conv_state, weight, silu)

    plan = _update_plans.get((silu,), tensors, make)
    y = x.new_empty(x.shape)
    if plan.grid[0] == 0:
        return y
    weight, bias = _packed(weight), _packed(bias)
    _launch(plan, _UPDATE_POINTERS.pack(*map(_address, (x, conv_state, weight, bias, y))))
    return y


def update_again(x, conv_state, weight, bias, silu):
    """The same for arguments like those of an earlier call, whose checks need not be repeated; else None."""
    try:
        addresses = (
            x.data_ptr(),
            conv_state.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        options = (x.shape, silu, alignment(*addresses))
        compared = (
            x,
            conv_state,
            weight,
            ABSENT[0] if bias is None else bias,
        )
        found = _update_plans.find(options, compared)
    except (AttributeError, TypeError, RuntimeError):  # not tensors: the checks will say so
        return None
    if found is not None:
        plan, (y,) = found
        y = empty(*y)
        _launch(plan, _UPDATE_POINTERS.pack(*addresses, y.data_ptr()))
        return y
    if x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return update_again(x, conv_state, weight, bias, silu)
    plan = _update_plans.known((silu,), (x, conv_state, weight, bias))
    if plan is None or plan.grid[0] == 0 or not _is_packed(weight) or not _is_packed(bias):
        return None
    y = x.new_empty(x.shape)
    _launch(plan, _UPDATE_POINTERS.pack(*addresses, y.data_ptr()))
    _update_plans.keep(plan, (y,), options, compared)
    return y


def _launch(plan, pointers):
    _cuda.launch(plan.function, plan.grid, plan.threads, plan.shared_bytes, pointers + plan.numbers, early=True)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _packed(parameter):
    """weight or bias as the kernels read them; a copy only of what no module keeps so."""
    return parameter if _is_packed(parameter) else parameter.clone(memory_format=torch.contiguous_format)


def _is_packed(parameter):
    return parameter is None or (parameter.is_contiguous() and parameter.data_ptr() % 16 == 0)


# ---- plans -----------------------------------------------------------------------------------------------------------


def token_major(x):
    return 0 < x.stride(1) < x.stride(2)


def _plan(x, weight, silu, initial_state, counting):
    batch, dim, length = x.shape
    if batch * dim * length == 0:
        return Plan(None, (0, 1, 1), 0, 0, b"", _cuda.source_version())
    device = x.device.index
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    num_bins, quick, stride = 0, False, 1
    if counting:
        num_bins, lo, hi, stride, *_ = counting
        _, quick = _entropy_cuda.fixed_bins(lo, hi, num_bins, x.dtype)
    if token_major(x):
        name = "causal_conv1d_token_major"
        channels = CHANNELS if _channels_are_vectors(x) else 1
        walks, threads = (_COUNTING_WALKS, _COUNTING_WALKERS) if counting and stride == 1 else (_WALKS, _WALKERS)
        blocks, segments, lanes, walk = _token_major_split(
            batch, dim, length, channels, walks, processors * _BUSY, threads
        )
    else:
        name = "causal_conv1d_channel_major"
        channels = 1
        threads = _THREADS
        blocks, segments, lanes = _channel_major_split(batch, dim, length, 16 // x.dtype.itemsize)
        walk = 0
    if blocks >= 2**31:
        raise ValueError(f"x: got shape {tuple(x.shape)}, which is more than 2^31 blocks of work for one launch")
    variant = macros(x.dtype, weight.dtype, weight.shape[1], silu, channels, num_bins, quick, stride > 1)
    function = _cuda.function(SOURCE, name, device, variant)
    shared = _entropy_cuda.table_bytes(num_bins, _columns(num_bins, stride > 1)) if counting else 0
    grid = min(blocks, processors * max(function.blocks_per_sm(threads, shared), 1)) if counting else blocks
    numbers = _NUMBERS.pack(
        batch,
        dim,
        length,
        *x.stride(),
        *((0, 0, 0) if initial_state is None else initial_state.stride()),
        segments,
        blocks,
        lanes.bit_length() - 1,
        walk,
        num_bins,
        stride,
    )
    return Plan(function, (grid, 1, 1), threads, shared, numbers, _cuda.source_version())


def _channels_are_vectors(x):
    """Whether one load takes CHANNELS channels of a token, and one store those of y, which is packed."""
    steps = [x.shape[1]] + [x.stride(axis) for axis in (0, 2) if x.shape[axis] > 1]
    aligned = x.data_ptr() % (CHANNELS * x.dtype.itemsize) == 0
    return x.stride(1) == 1 and aligned and all(step % CHANNELS == 0 for step in steps)


def _token_major_split(batch, dim, length, channels, walks, busy, threads):
    """Blocks of work, walks a batch row, lanes side by side over channels, tokens a walk.

    The longest of `walks` tokens of which there are `busy`, for the device; `threads` walk in a block.
    """
    columns = -(-dim // channels)
    fitting = [walk for walk in walks if walk <= max(length, walks[-1])]
    full = [walk for walk in fitting if columns * batch * (length // walk) >= busy]
    walk = max(full, default=fitting[-1])
    segments = -(-length // walk)
    lanes = min(32, _power_of_two(columns))
    walkers = threads // lanes
    return -(-batch * segments // walkers) * -(-columns // lanes), segments, lanes, walk


def _channel_major_split(batch, dim, length, vector):
    """Blocks of work, pieces of a row, lanes side by side over a row's tokens."""
    vectors = length // vector if length % vector == 0 else (length + 2 * (vector - 1)) // vector
    lanes = min(_THREADS, _power_of_two(-(-vectors // VECTORS)))
    segments = -(-vectors // (VECTORS * lanes))
    return -(-batch * dim * segments // (_THREADS // lanes)), segments, lanes


def _power_of_two(n):
    """The least one that is at least n."""
    return 1 << (n - 1).bit_length()


def _update_plan(x, conv_state, weight, silu):
    batch, dim = x.shape
    if batch * dim == 0:
        return Plan(None, (0, 1, 1), 0, 0, b"", _cuda.source_version())
    variant = macros(x.dtype, weight.dtype, weight.shape[1], silu)
    function = _cuda.function(SOURCE, "causal_conv1d_update", x.device.index, variant)
    numbers = _UPDATE_NUMBERS.pack(batch, dim, conv_state.shape[2], *x.stride(), *conv_state.stride())
    blocks = -(-batch * dim // _UPDATE_THREADS)
    return Plan(function, (blocks, 1, 1), _UPDATE_THREADS, 0, numbers, _cuda.source_version())
