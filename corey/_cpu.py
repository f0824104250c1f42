"""The host side of the compiled CPU scan: it describes the tensors, picks a chunk, and shares blocks out to threads.

Work is split over (batch, group, block of 16 channels) between Python threads that run without the interpreter lock.
Threads share nothing they write, so calls from several threads are safe and the number of threads never changes a bit.
Numba's own threading layers are not used: not all are thread-safe, and those built on OpenMP do not survive a fork.
An edit of the kernel's file is live at the next call, as one of kernels/ is on CUDA.
"""

import hashlib
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from corey import _cpu_kernel as kernel

PACKED_BYTES = 256 * 1024  # float32 B and C of one chunk, shared by a group's channels; sized for a private L2 cache
TOKEN_MAJOR_CHUNK = 256  # tokens; each is on another page, and few of them are still mapped for the next channels
SERIAL_STATE_STEPS = 1 << 19  # below this, waking a second thread costs more than it saves

_KINDS = {torch.float32: kernel.FLOAT32, torch.bfloat16: kernel.BFLOAT16, torch.float16: kernel.FLOAT16}


def _default_chunk(u, states, tile):
    """What measured fastest: few tokens if they lie apart, else all tiles whose B and C fit PACKED_BYTES."""
    if 0 < u.stride(1) < u.stride(2):
        return TOKEN_MAJOR_CHUNK
    return tile * max(1, PACKED_BYTES // (2 * -(-states // kernel.LANES) * kernel.VECTOR) // tile)


def _describe(tensor, batch=None, group=None, lane=None, row=None):
    """One row of the table: where a tensor lies, its dtype code, and its strides in bytes along the kernel's axes."""
    if tensor is None:
        return (0, kernel.ABSENT, 0, 0, 0, 0)
    size = tensor.element_size()
    strides = [0 if dim is None else tensor.stride(dim) * size for dim in (batch, group, lane, row)]
    return (tensor.data_ptr(), _KINDS[tensor.dtype], *strides)


def _describe_projection(tensor):
    """B or C: (B, N, L), (B, G, N, L), or constant (D, N), whose lanes are channels instead of states."""
    if tensor.dim() == 2:
        return _describe(tensor, lane=0, row=1)
    if tensor.dim() == 3:
        return _describe(tensor, batch=0, lane=1, row=2)
    return _describe(tensor, batch=0, group=1, lane=2, row=3)


_pool_lock = threading.Lock()
_pool = None


def _workers():
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="corey-scan")
        return _pool


def _forget_workers():
    """A forked child has the pool's bookkeeping and none of its threads."""
    global _pool, _pool_lock, _reload_lock
    _pool, _pool_lock, _reload_lock = None, threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


# ---- the source, as it is on disk now --------------------------------------------------------------------------------

SOURCE = Path(kernel.__file__)
_reload_lock = threading.Lock()
_looked = float("-inf")
_stamp = None


def follow_source():
    """The kernel that SOURCE holds now; looks every 0.2 s, so that a call pays for a clock and no more.

    A source is compiled once: an edit that is undone costs nothing. Whatever a broken source raises is raised at every
    call until it is mended.
    """
    global kernel, _looked, _stamp
    now = time.monotonic()
    if now - _looked <= 0.2:
        return kernel
    with _reload_lock:
        status = SOURCE.stat()
        stamp = (SOURCE, status.st_mtime_ns, status.st_size)
        if stamp != _stamp:
            text = SOURCE.read_bytes()
            kernel = _version(text)
            sys.modules[kernel.__name__] = kernel  # where Numba looks up what it keeps on disk
            _stamp = stamp
        _looked = now
        return kernel


@contextmanager
def source_in(folder):
    """Runs the file of SOURCE's name in another folder, a copy, inside the block."""
    global SOURCE, _looked
    kept, SOURCE, _looked = SOURCE, Path(folder) / SOURCE.name, float("-inf")
    try:
        yield
    finally:
        SOURCE, _looked = kept, float("-inf")


def _version(text):
    digest = hashlib.sha256(text).digest()
    if digest not in _versions:
        module = ModuleType(kernel.__name__)
        module.__file__ = str(SOURCE)
        exec(compile(text, SOURCE, "exec"), module.__dict__)
        _versions[digest] = module
    return _versions[digest]


_versions = {hashlib.sha256(SOURCE.read_bytes()).digest(): kernel}


# ---- the call --------------------------------------------------------------------------------------------------------


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out, state, chunk_size, tile):
    """Fill `out`, and turn `state` from the initial into the last state. Arguments are checked by the caller."""
    kernel = follow_source()  # one for the whole call, whatever another thread's call finds
    batch, dim, length = u.shape
    states = A.shape[1]
    groups = max([1, *(x.shape[1] for x in (B, C) if x.dim() == 4)])
    channels = dim // groups
    blocks = batch * groups * -(-channels // kernel.LANES)
    if blocks == 0 or length == 0:
        return
    chunk = chunk_size if chunk_size is not None else _default_chunk(u, states, tile)
    chunk = min(chunk, -(-length // tile) * tile)
    rows = [_describe(x, batch=0, lane=1, row=2) for x in (u, delta, z, out)]
    rows += [_describe_projection(B), _describe_projection(C), _describe(A, lane=0, row=1)]
    rows += [_describe(D, lane=0), _describe(delta_bias, lane=0), _describe(state, batch=0, lane=1, row=2)]
    table = np.array(rows, dtype=np.int64)
    sizes = kernel.Sizes(groups, channels, length, states, chunk, delta_softplus, B.dim() == 2, C.dim() == 2)

    # An interrupt may end this call before the other threads are done: each holds on to the memory it works on.
    def work(first, last, tensors=(u, delta, A, B, C, D, z, delta_bias, out, state)):
        scratch = np.empty(kernel.scratch_bytes(chunk, states), np.uint8)
        kernel.scan_blocks(table, sizes, scratch.ctypes.data, first, last)

    threads = min(torch.get_num_threads(), blocks)
    if batch * dim * length * states < SERIAL_STATE_STEPS:
        threads = 1
    bounds = [blocks * i // threads for i in range(threads + 1)]
    others = [_workers().submit(work, *pair) for pair in pairwise(bounds[1:])]
    work(bounds[0], bounds[1])
    wait(others)
    for other in others:
        other.result()
