"""The selective scan on CUDA: which variant of kernels/selective_scan.cu a call needs, and its launch."""

import struct
from dataclasses import dataclass

import torch

from corey import _cuda
from corey._scan_args import TILE, check_chunk_size, check_tensors

SOURCE, NAME = "selective_scan.cu", "selective_scan"
COLUMNS, THREADS = 32, 128  # as in the kernel: channels times tiles a block, threads
TOKENS, CHANNELS, STRIDED, CONSTANT = range(4)  # what is contiguous and aligned in memory

_TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
_POINTERS = struct.Struct("=13Q")
_NUMBERS = struct.Struct("=27q6i")


def macros(*, dtypes, layouts, states, z=True, D=True, bias=True, softplus=True):
    """The variant's macros. dtypes: of u, delta, z, B, C; layouts: of u, delta, z, y, B, C."""
    named = zip(("T_U", "T_DELTA", "T_Z", "T_B", "T_C"), (_TYPES[dtype] for dtype in dtypes))
    placed = zip(("LAYOUT_U", "LAYOUT_DELTA", "LAYOUT_Z", "LAYOUT_Y", "LAYOUT_B", "LAYOUT_C"), layouts)
    flags = (("N", states), ("HAS_Z", int(z)), ("HAS_D", int(D)), ("HAS_BIAS", int(bias)), ("SOFTPLUS", int(softplus)))
    return (*named, *placed, *flags)


TUNED = [
    (SOURCE, NAME, macros(dtypes=(dtype,) * 5, layouts=layouts, states=16))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for layouts in ((TOKENS,) * 6, (CHANNELS,) * 6)
]


@dataclass(frozen=True)
class Plan:
    """All that a launch needs but the addresses. It holds for tensors of these shapes, strides, dtypes and alignments."""

    function: _cuda.Function
    grid: tuple[int, int, int]
    shared_bytes: int
    scratch_bytes: int  # 0 where no state passes from block to block
    numbers: bytes
    version: int


_plans: dict[tuple, Plan] = {}


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size, outputs):
    """y and the last state. `outputs(u, A)` makes them; chunk_size is an int, None or a 0-dim int32 CUDA tensor."""
    on_device = isinstance(chunk_size, torch.Tensor)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    key = (
        delta_softplus,
        "device" if on_device else chunk_size,
        u.device.index,
        *(x if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15, x.device.index) for x in tensors),
    )
    plan = _plans.get(key)
    if plan is None or plan.version != _cuda.source_version():
        check_tensors(*tensors)
        if chunk_size is not None:
            check_chunk_size(chunk_size, multiple_of=TILE, device=u.device)
        plan = _plans[key] = _plan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size)
    y, last = outputs(u, A)
    if plan.grid[0] == 0:
        last.copy_(initial_state) if initial_state is not None else last.zero_()
        return y, last
    if u.device.index != torch.cuda.current_device():
        with torch.cuda.device(u.device):
            _launch(plan, u, delta, A, B, C, D, z, delta_bias, initial_state, chunk_size, on_device, y, last)
    else:
        _launch(plan, u, delta, A, B, C, D, z, delta_bias, initial_state, chunk_size, on_device, y, last)
    return y, last


def _launch(plan, u, delta, A, B, C, D, z, delta_bias, initial_state, chunk_size, on_device, y, last):
    scratch = _cuda.scratch(u.device.index, plan.scratch_bytes) if plan.scratch_bytes else None
    addresses = _POINTERS.pack(
        u.data_ptr(),
        delta.data_ptr(),
        0 if z is None else z.data_ptr(),
        y.data_ptr(),
        B.data_ptr(),
        C.data_ptr(),
        A.data_ptr(),
        0 if D is None else D.data_ptr(),
        0 if delta_bias is None else delta_bias.data_ptr(),
        0 if initial_state is None else initial_state.data_ptr(),
        last.data_ptr(),
        chunk_size.data_ptr() if on_device else 0,
        0 if scratch is None else scratch.data_ptr(),
    )
    _cuda.launch(plan.function, plan.grid, THREADS, plan.shared_bytes, addresses + plan.numbers)


# ---- plans -----------------------------------------------------------------------------------------------------------


def _plan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size):
    batch, channels, length = u.shape
    states = A.shape[1]
    groups = max([1, *(x.shape[1] for x in (B, C) if x.dim() == 4)])
    if batch * channels * length == 0:
        return Plan(None, (0, 1, 1), 0, 0, b"", _cuda.source_version())
    y_strides = (channels * length, 1, channels) if token_major(u) else (channels * length, length, 1)
    per_group = channels // groups
    layouts = [_layout(x, groups, per_group) for x in (u, delta, u if z is None else z)]
    layouts += [_rows_layout((batch, channels, length), y_strides, 0, u.dtype, groups, per_group)]
    layouts += [_projection_layout(x, states) for x in (B, C)]
    dtypes = (u.dtype, delta.dtype, u.dtype if z is None else z.dtype, B.dtype, C.dtype)
    variant = macros(
        dtypes=dtypes,
        layouts=layouts,
        states=states,
        z=z is not None,
        D=D is not None,
        bias=delta_bias is not None,
        softplus=delta_softplus,
    )
    device = u.device.index
    function = _cuda.function(SOURCE, NAME, device, variant)
    properties = torch.cuda.get_device_properties(device)

    tiles = -(-length // TILE)
    room = properties.shared_memory_per_block_optin
    widest = max(w for w in range(3) if w == 0 or _shared_bytes(dtypes, layouts, states, z is not None, w) * 2 + 4096 < room)
    shared = _shared_bytes(dtypes, layouts, states, z is not None, widest)
    function.allow_shared(shared)
    capacity = properties.multi_processor_count * max(function.blocks_per_sm(THREADS, shared), 1)
    chunk, log_width = _split(batch, groups, per_group, tiles, capacity, widest, chunk_size)

    spans = -(-per_group // (COLUMNS >> log_width))
    most_chunks = tiles if isinstance(chunk_size, torch.Tensor) else -(-tiles // (chunk // TILE))
    items = most_chunks * batch * groups * spans
    if items >= 2**31:
        raise ValueError(f"u: got shape {tuple(u.shape)}, which is more than 2^31 pieces of work for one launch")
    shared = _shared_bytes(dtypes, layouts, states, z is not None, log_width)
    capacity = properties.multi_processor_count * max(function.blocks_per_sm(THREADS, shared), 1)
    numbers = [*u.stride(), *delta.stride(), *((0, 0, 0) if z is None else z.stride()), *y_strides]
    numbers += [*_projection_strides(B), *_projection_strides(C), *A.stride()]
    numbers += [0 if x is None else x.stride(0) for x in (D, delta_bias)]
    numbers += (0, 0, 0) if initial_state is None else initial_state.stride()
    numbers += [batch, channels, length, groups, chunk, log_width]
    return Plan(
        function,
        (min(items, capacity), 1, 1),
        shared,
        16 + 2 * states * batch * channels * 8 if most_chunks > 1 else 0,
        _NUMBERS.pack(*numbers),
        _cuda.source_version(),
    )


def _split(batch, groups, per_group, tiles, capacity, widest, chunk_size):
    """chunk in tokens and log2 of the tiles that a block works on at a time."""
    if batch * groups * -(-per_group // COLUMNS) >= capacity:
        widest = 0
    if isinstance(chunk_size, int):
        return min(-(-chunk_size // TILE), tiles) * TILE, widest
    if widest == 0 or batch * groups * -(-per_group // (COLUMNS >> widest)) * 10 >= capacity * 9:
        return tiles * TILE, widest
    return min(TILE << widest, tiles * TILE), widest


def token_major(x):
    return 0 < x.stride(1) < x.stride(2)


def _layout(x, groups, per_group):
    return _rows_layout(x.shape, x.stride(), x.data_ptr(), x.dtype, groups, per_group)


def _rows_layout(shape, strides, address, dtype, groups, per_group):
    """Of u, delta, z or y: (B, D, L)."""
    vector = 16 // dtype.itemsize

    def aligned(*axes):
        return address % 16 == 0 and all(shape[axis] == 1 or strides[axis] % vector == 0 for axis in axes)

    if strides[2] == 1 and aligned(0, 1):
        return TOKENS
    if strides[1] == 1 and aligned(0, 2) and (groups == 1 or per_group % vector == 0):
        return CHANNELS
    return STRIDED


def _projection_layout(x, states):
    """Of B or C: (B, N, L), (B, G, N, L), or constant (D, N)."""
    if x.dim() == 2:
        return CONSTANT
    vector = 16 // x.dtype.itemsize

    def aligned(*axes):
        return x.data_ptr() % 16 == 0 and all(x.shape[axis] == 1 or x.stride(axis) % vector == 0 for axis in axes)

    token, state = x.dim() - 1, x.dim() - 2
    others = range(state)
    if x.stride(token) == 1 and aligned(state, *others):
        return TOKENS
    if x.stride(state) == 1 and _states_a_group(states) == 8 and aligned(token, *others):
        return CHANNELS
    return STRIDED


def _states_a_group(states):
    return -(-states // (-(-states // 8) if states > 16 else 2))


def _projection_strides(x):
    """batch, group, state, token; where constant, the channel's stride stands for the token's."""
    if x.dim() == 2:
        return 0, 0, x.stride(1), x.stride(0)
    if x.dim() == 3:
        return x.stride(0), 0, x.stride(1), x.stride(2)
    return x.stride()


def _shared_bytes(dtypes, layouts, states, gated, log_width):
    """What the kernel takes of dynamic shared memory; see the list at its top."""

    def tile(dtype):
        return COLUMNS * (TILE * dtype.itemsize + 16)

    u, delta, z, B, C = dtypes
    total = 2 * tile(u) + tile(delta) + gated * tile(z) + (TILE * _states_a_group(states) * 8 << log_width)
    for dtype, layout in ((B, layouts[4]), (C, layouts[5])):
        if layout < STRIDED:
            total += TILE * 8 * dtype.itemsize << log_width
        elif layout == CONSTANT:
            total += states * COLUMNS * 4
    return total + states * COLUMNS * 12 + COLUMNS * 8
