"""The state update of CUDA tensors: which variant of kernels/state_update.cu runs, and its launch."""

import struct
from dataclasses import dataclass

import torch

from corey import _cuda
from corey._operands import CPP_TYPES
from corey._plans import ABSENT, Plans, alignment, empty

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


_plans = Plans()


def update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, check):
    """y; the state is updated. check(state, x, dt, A, B, C, D, z, dt_bias) raises for bad arguments."""
    if x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, check)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)

    def make():
        check(*tensors)
        return _plan(*tensors, dt_softplus)

    plan = _plans.get((dt_softplus,), tensors, make)
    y = x.new_empty(x.shape)
    if plan.grid[0]:
        _launch(plan, [0 if tensor is None else tensor.data_ptr() for tensor in tensors], y)
    return y


def update_again(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """The same for arguments like those of an earlier call, whose checks need not be repeated; else None."""
    try:
        addresses = (
            state.data_ptr(),
            x.data_ptr(),
            dt.data_ptr(),
            A.data_ptr(),
            B.data_ptr(),
            C.data_ptr(),
            0 if D is None else D.data_ptr(),
            0 if z is None else z.data_ptr(),
            0 if dt_bias is None else dt_bias.data_ptr(),
        )
        options = (x.shape, dt_softplus, alignment(*addresses))
        compared = (
            state,
            x,
            dt,
            A,
            B,
            C,
            ABSENT[0] if D is None else D,
            ABSENT[1] if z is None else z,
            ABSENT[2] if dt_bias is None else dt_bias,
        )
        found = _plans.find(options, compared)
    except (AttributeError, TypeError, RuntimeError):  # not tensors: the checks will say so
        return None
    if found is not None:
        plan, (y,) = found
        y = empty(*y)
        _launch(plan, addresses, y)
        return y
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    if x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return update_again(*tensors, dt_softplus)
    plan = _plans.known((dt_softplus,), tensors)
    if plan is None or plan.grid[0] == 0:
        return None
    y = x.new_empty(x.shape)
    _launch(plan, addresses, y)
    _plans.keep(plan, (y,), options, compared)
    return y


def _launch(plan, addresses, y):
    params = _POINTERS.pack(*addresses, y.data_ptr()) + plan.numbers
    _cuda.launch(plan.function, plan.grid, _THREADS, 0, params)


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
