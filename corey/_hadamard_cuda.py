"""The Hadamard transform of CUDA tensors: which layout of kernels/hadamard.cu runs, and its launch."""

import struct
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from corey import _cuda
from corey._operands import CPP_TYPES

SOURCE, NAME = "hadamard.cu", "hadamard_transform"
WIDEST = 32768
_WIDEST_IN_A_WARP = 2048


class Plan(NamedTuple):
    """A block: its threads, the rows that it takes, its shared memory in bytes; how many blocks share one row."""

    threads: int
    rows: int
    shared_bytes: int
    blocks: int = 1


@cache
def plan(itemsize: int, width: int, tensor_cores: bool = False) -> Plan:
    """The block for rows of `width` columns, a power of two from 2 to WIDEST, of `itemsize` bytes each.

    Depends on nothing else, so that a row comes out the same alone and in any batch. tensor_cores: `on_tensor_cores`.
    """
    if tensor_cores:
        return Plan(512, 1, 4 * width + 2 * width + (32 << 10) + 16)  # `Shared` in the kernel
    vector = min(16 // itemsize, width)  # columns
    if width <= _WIDEST_IN_A_WARP:
        columns = max(4 * vector, width // 32)  # a thread, of one row or several: enough loads at a time
        return Plan(128, 128 * columns // width, 0)
    blocks = 2 if width == WIDEST else 1
    part = width // blocks
    gaps = vector * (part // (64 * vector)) + (4 * (part // 32) if vector == 8 else 0)  # place() in the kernel
    return Plan(part // 64, 1, 4 * (part + gaps), blocks)


@cache
def on_tensor_cores(device: int, itemsize: int, width: int) -> bool:
    """Whether they do a part of it: of the widest rows in 16 bits, on a GPU of which a block has room for one."""
    return (
        (itemsize, width) == (2, WIDEST)
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and plan(itemsize, width, True).shared_bytes <= _shared_bytes_of_a_block(device)
    )


def covers(x: Tensor, width: int) -> bool:
    """Whether the kernel computes this: one of its dtypes and widths, on a GPU with enough shared memory."""
    if x.dtype not in CPP_TYPES or not 2 <= width <= WIDEST:
        return False
    return plan(x.element_size(), width).shared_bytes <= _shared_bytes_of_a_block(x.device.index)


def transform(x: Tensor, width: int) -> Tensor:
    """H x / sqrt(width) along the last dimension, (..., n) -> (..., width), contiguous; for x that `covers` allows.

    x is read where it lies, whatever its strides.
    """
    z = x.new_empty((*x.shape[:-1], width))
    rows = z.numel() // width
    if rows == 0:
        return z
    n, step = x.shape[-1], x.stride(-1)
    itemsize = x.element_size()
    leading = collapse(x.shape[:-1], x.stride()[:-1])
    strided = step != 1 and n > 1
    load_bytes = itemsize if strided else widest_load(x.data_ptr(), n, [stride for _, stride in leading], itemsize)
    with torch.cuda.device(x.device):
        version = _cuda.source_version()
        tensor_cores = on_tensor_cores(x.device.index, itemsize, width)
        function = _function(version, x.device.index, x.dtype, width, load_bytes, strided, len(leading), tensor_cores)
        block = plan(itemsize, width, tensor_cores)
        blocks = -(-rows // block.rows) * block.blocks
        if tensor_cores:  # each takes one row after another, all equally many
            blocks = -(-rows // -(-rows // _multiprocessors(x.device.index)))
        sizes, strides = zip(*leading)
        numbers = (rows, step, n, _rows_ahead(x.device.index, width * itemsize), *sizes, *strides)
        params = struct.pack(f"<{6 + 2 * len(leading)}q", x.data_ptr(), z.data_ptr(), *numbers)
        _cuda.launch(function, (blocks, 1, 1), block.threads, block.shared_bytes, params, early=True)
    return z


@cache
def _rows_ahead(device: int, row_bytes: int) -> int:
    """How far ahead of its own row a block has one brought into L2: 32 KiB for every multiprocessor."""
    return _multiprocessors(device) * max(1, (32 << 10) // row_bytes)


def collapse(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Dimensions as the fewest (size, stride) pairs with the same elements in the same order; at least one."""
    pairs: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides):
        if size == 1:
            continue
        if pairs and pairs[-1][1] == size * stride:
            pairs[-1] = (pairs[-1][0] * size, stride)
        else:
            pairs.append((size, stride))
    return pairs or [(1, 0)]


def widest_load(address: int, n: int, strides: list[int], itemsize: int) -> int:
    """The bytes, a power of two up to 16, that divide the address of every row and the length of a row."""
    bits = 16 | address | n * itemsize
    for stride in strides:
        bits |= stride * itemsize
    return bits & -bits


def macros(dtype: torch.dtype, width: int, load_bytes=16, strided=False, leading=1, tensor_cores=False):
    """What kernels/hadamard.cu is compiled with."""
    threads, rows, shared_bytes, _ = plan(dtype.itemsize, width, tensor_cores)
    return (
        ("T_X", CPP_TYPES[dtype]),
        ("LOG_D", width.bit_length() - 1),
        ("LOAD_BYTES", load_bytes),
        ("STRIDED", int(strided)),
        ("LEADING", leading),
        ("THREADS", threads),
        ("ROWS", rows),
        ("SHARED_BYTES", shared_bytes),
        ("TENSOR_CORES", int(tensor_cores)),
    )


TUNED = [
    (SOURCE, NAME, macros(dtype, width))
    for dtype in CPP_TYPES
    for width in (64, 512, 1024, 2048, 4096, 8192, 16384, WIDEST)
]
TUNED_FROM_HOPPER = [
    (SOURCE, NAME, macros(dtype, WIDEST, tensor_cores=True)) for dtype in (torch.float16, torch.bfloat16)
]


@cache
def _function(version: int, device: int, dtype: torch.dtype, width: int, load_bytes, strided, leading, tensor_cores):
    """`version` is that of the sources, so that an edited kernel is compiled anew."""
    variant = macros(dtype, width, load_bytes, strided, leading, tensor_cores)
    function = _cuda.function(SOURCE, NAME, device, variant)
    function.allow_shared(plan(dtype.itemsize, width, tensor_cores).shared_bytes)
    return function


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_bytes_of_a_block(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
