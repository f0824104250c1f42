"""The state update of CUDA tensors: which variant of kernels/state_update.cu runs, and its launch."""

import struct
from dataclasses import dataclass

import torch

from corey import _cuda
from corey._operands import CPP_TYPES

SOURCE, NAME = "state_update.cu", "selective_state_update"

_THREADS = 128
_FULL = 512  # threads on a multiprocessor; while there are more, a thread takes more batch rows
_POINTERS = struct.Struct("=10Q")
_NUMBERS = struct.Struct("=22q")


def macros(dtypes, states, rows, softplus, vector):
    """What kernels/state_update.cu is compiled with. dtypes: of x, dt, B, C, D, z and dt_bias."""
    types = zip(("T_X", "T_DT", "T_B", "T_C", "T_D", "T_Z", "T_BIAS"), (CPP_TYPES[dtype] for dtype in dtypes))
    return (*types, ("STATES", states), ("ROWS", rows), ("SOFTPLUS", int(softplus)), ("VECTOR", int(vector)))


TUNED = [
    (SOURCE, NAME, macros((*(dtype,) * 4, torch.float32, dtype, dtype), 16, rows, True, True))
    for dtype in CPP_TYPES
    for rows in (1, 4)
]


@dataclass(frozen=True)
class Plan:
    """All that a launch needs but the addresses, for tensors of these shapes, strides, dtypes and alignments."""

    function: _cuda.Function
    grid: tuple[int, int, int]
    numbers: bytes
    version: int


_plans: dict[tuple, Plan] = {}


def update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, check):
    """y; the state is updated. check(state, x, dt, A, B, C, D, z, dt_bias) raises for bad arguments."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, check)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    key = (dt_softplus, *map(_layout, tensors))
    plan = _plans.get(key)
    if plan is None or plan.version != _cuda.source_version():
        check(*tensors)
        plan = _plans[key] = _plan(*tensors, dt_softplus)
    y = x.new_empty(x.shape)
    if plan.grid[0] == 0:
        return y
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, y))
    _cuda.launch(plan.function, plan.grid, _THREADS, 0, _POINTERS.pack(*addresses) + plan.numbers)
    return y


def _layout(tensor):
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15, tensor.device.index


def _plan(state, x, dt, A, B, C, D, z, dt_bias, softplus):
    batch, dim = x.shape
    states = A.shape[1]
    if batch * dim == 0:
        return Plan(None, (0, 1, 1), b"", _cuda.source_version())
    device = x.device.index
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    lanes = 1 << max(-(-states // 8) - 1, 0).bit_length()
    rows = max(r for r in (1, 2, 4) if batch % r == 0 and (r == 1 or batch * dim * lanes // r >= processors * _FULL))
    dtypes = [tensor.dtype for tensor in (x, dt, B, C)] + [
        x.dtype if tensor is None else tensor.dtype for tensor in (D, z, dt_bias)
    ]
    vector = states % 4 == 0 and all(map(_states_are_vectors, (state, A, B, C)))
    function = _cuda.function(SOURCE, NAME, device, macros(dtypes, states, rows, softplus, vector))
    groups = max(tensor.shape[1] if tensor.dim() == 3 else 1 for tensor in (B, C))
    numbers = _NUMBERS.pack(
        batch,
        dim,
        dim // groups,
        *state.stride(),
        *x.stride(),
        *dt.stride(),
        *A.stride(),
        *_projection_strides(B),
        *_projection_strides(C),
        0 if D is None else D.stride(0),
        *((0, 0) if z is None else z.stride()),
        0 if dt_bias is None else dt_bias.stride(0),
    )
    blocks = -(-dim // (_THREADS // lanes)) * (batch // rows)
    if blocks >= 2**31:
        raise ValueError(f"x: got shape {tuple(x.shape)}, which is more than 2^31 blocks of work for one launch")
    return Plan(function, (blocks, 1, 1), numbers, _cuda.source_version())


def _states_are_vectors(tensor):
    """Whether 4 neighbouring states are one aligned access."""
    aligned = tensor.data_ptr() % (4 * tensor.element_size()) == 0
    rows = zip(tensor.shape[:-1], tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and aligned and all(size == 1 or stride % 4 == 0 for size, stride in rows)


def _projection_strides(tensor):
    """Batch, group, state."""
    if tensor.dim() == 2:
        return tensor.stride(0), 0, tensor.stride(1)
    return tensor.stride()
