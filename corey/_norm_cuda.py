"""The residual sum and norm of CUDA tensors: which variant of kernels/rms_norm.cu runs, and its launch."""

import struct
from dataclasses import dataclass

import torch

from corey import _cuda
from corey._check import bad_value
from corey._operands import CPP_TYPES

SOURCE, NAME = "rms_norm.cu", "add_rms_norm"
VECTOR = 8  # columns a thread, as in the kernel
WIDEST = 1024 * VECTOR  # columns

_PARAMS = struct.Struct("=5Q2qf4x")


def macros(dtype, width, residual, wide):
    """What kernels/rms_norm.cu is compiled with. width: columns; wide: rows are 16-byte vectors."""
    return (
        ("T_X", CPP_TYPES[dtype]),
        ("D", width),
        ("RESIDUAL", int(residual)),
        ("WIDE", int(wide)),
    )


TUNED = [
    (SOURCE, NAME, macros(dtype, width, residual, True))
    for dtype in CPP_TYPES
    for width in (768, 1024, 2048, 2560)
    for residual in (False, True)
]


@dataclass(frozen=True)
class Plan:
    """All that a launch needs but the addresses, for tensors of these shapes, strides, dtypes and alignments."""

    function: _cuda.Function
    rows: int
    threads: int
    x_row: int
    residual_row: int
    version: int


_plans: dict[tuple, Plan] = {}
MOST_PLANS = 4096  # a server meets ever new lengths


def norm(x, residual, weight, eps, check):
    """y and h. check(x, residual, weight) raises for bad arguments."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return norm(x, residual, weight, eps, check)
    key = tuple(map(_layout, (x, residual, weight)))
    plan = _plans.get(key)
    if plan is None or plan.version != _cuda.source_version():
        check(x, residual, weight)
        if x.numel() and (_row(x) is None or _row(residual) is None or weight.stride(0) != 1):
            residual = residual if residual is None else residual.contiguous()
            return norm(x.contiguous(), residual, weight.contiguous(), eps, check)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _plan(x, residual, weight)
    y, h = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)
    if plan.rows:
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (x, residual, weight, y, h))
        params = _PARAMS.pack(*addresses, plan.x_row, plan.residual_row, eps)
        _cuda.launch(plan.function, (plan.rows, 1, 1), plan.threads, 0, params)
    return y, h


def _layout(tensor):
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15, tensor.device.index


def _row(tensor):
    """Elements from one row (the last dimension) to the next; None if elements or rows are not evenly spaced so."""
    if tensor is None:
        return 0
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return None
    step = span = None  # the stride of rows, and of as many rows as the dimensions so far have
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1])):
        if size == 1:
            continue
        if step is None:
            step = span = stride
        elif stride != span:
            return None
        span *= size
    return step or 0


def _plan(x, residual, weight):
    width = x.shape[-1]
    rows = x.numel() // width
    if rows == 0:
        return Plan(None, 0, 0, 0, 0, _cuda.source_version())
    if width > WIDEST or rows >= 2**31:
        raise bad_value("x", f"shape {tuple(x.shape)}", f"at most {WIDEST} columns and fewer than 2^31 rows")
    steps = [(x, _row(x)), (weight, 0), (residual, _row(residual))]
    wide = width % VECTOR == 0 and all(
        tensor is None or (tensor.data_ptr() % 16 == 0 and step * tensor.dtype.itemsize % 16 == 0)
        for tensor, step in steps
    )
    variant = macros(x.dtype, width, residual is not None, wide)
    function = _cuda.function(SOURCE, NAME, x.device.index, variant)
    threads = -(-width // (32 * VECTOR)) * 32
    return Plan(function, rows, threads, _row(x), _row(residual), _cuda.source_version())
