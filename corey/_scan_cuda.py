"""The selective scan on CUDA: the launches of a call."""

import struct
from dataclasses import dataclass

import torch

from corey import _cuda
from corey._check import bad_value
from corey._plans import ABSENT, Plans, alignment, empty
from corey._scan_args import TILE, check_chunk_size, check_tensors
from corey._scan_blocks import plain_block, shared_bytes
from corey._scan_layout import is_wide, order_of, projection, projection_strides, token_major
from corey._scan_variants import CARRY, SOURCE, macros
from corey._scan_way import lead, way_of

CARRY_THREADS = 64  # small blocks, which spread over all multiprocessors

_POINTERS = struct.Struct("=14Q")
_NUMBERS = struct.Struct("=27q9I5i")


@dataclass(frozen=True)
class Plan:
    """All that the launches need but the addresses, for tensors of these shapes, strides, dtypes and alignments."""

    launches: tuple  # (function, grid, threads, shared bytes), in order
    tiles: int  # of a sequence that is split, else 0
    numbers: bytes
    version: int


_plans = Plans()


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size, outputs):
    """y and the last state. `outputs(u, A)` makes them; chunk_size is an int, None or a 0-dim int32 CUDA tensor."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)

    def make():
        check_tensors(*tensors)
        if chunk_size is not None:
            check_chunk_size(chunk_size, multiple_of=TILE, device=u.device)
        return _plan(*tensors[:8], delta_softplus, initial_state, chunk_size)

    plan = _plans.get(_options(delta_softplus, chunk_size), tensors, make)
    return _run(plan, tensors, chunk_size, outputs)


def scan_again(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size, outputs):
    """The same for arguments like those of an earlier call, whose checks need not be repeated; else None.

    This is what keeps the host's share of a call small.
    """
    chunk, device_chunk = (None, chunk_size) if isinstance(chunk_size, torch.Tensor) else (chunk_size, None)
    try:
        addresses = (
            u.data_ptr(),
            delta.data_ptr(),
            A.data_ptr(),
            B.data_ptr(),
            C.data_ptr(),
            0 if D is None else D.data_ptr(),
            0 if z is None else z.data_ptr(),
            0 if delta_bias is None else delta_bias.data_ptr(),
            0 if initial_state is None else initial_state.data_ptr(),
            0 if device_chunk is None else device_chunk.data_ptr(),
        )
        options = (u.shape, delta_softplus, type(delta_softplus), chunk, type(chunk), alignment(*addresses))
        compared = (
            u,
            delta,
            A,
            B,
            C,
            ABSENT[0] if D is None else D,
            ABSENT[1] if z is None else z,
            ABSENT[2] if delta_bias is None else delta_bias,
            ABSENT[3] if initial_state is None else initial_state,
            ABSENT[4] if device_chunk is None else device_chunk,
        )
        found = _plans.find(options, compared)
    except (AttributeError, TypeError, RuntimeError):  # not tensors: the checks will say so
        return None
    if found is not None:
        plan, (y, last) = found
        y, last = empty(*y), empty(*last)
        _launch(plan, addresses, y, last)
        return y, last
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.get_device() != torch.cuda.current_device():
        with torch.cuda.device(u.device):
            return scan_again(*tensors[:8], delta_softplus, initial_state, chunk_size, outputs)
    plan = _plans.known(_options(delta_softplus, chunk_size), tensors)
    if plan is None:
        return None
    results = _run(plan, tensors, chunk_size, outputs)
    if plan.launches:
        _plans.keep(plan, results, options, compared)
    return results


def _options(delta_softplus, chunk_size):
    """What a plan depends on beside the tensors. Types, as 1 and 128.0 are no options but equal to some."""
    chunk = chunk_size
    if isinstance(chunk, torch.Tensor):
        chunk = (chunk.shape, chunk.dtype, chunk.device)
    return delta_softplus, type(delta_softplus), chunk, type(chunk_size)


def _run(plan, tensors, chunk_size, outputs):
    u, _, A, *_, initial_state = tensors
    y, last = outputs(u, A)
    if not plan.launches:
        last.zero_() if initial_state is None else last.copy_(initial_state)
        return y, last
    device_chunk = chunk_size if isinstance(chunk_size, torch.Tensor) else None
    addresses = [0 if x is None else x.data_ptr() for x in (*tensors, device_chunk)]
    if u.get_device() == torch.cuda.current_device():
        _launch(plan, addresses, y, last)
    else:
        with torch.cuda.device(u.device):
            _launch(plan, addresses, y, last)
    return y, last


def _launch(plan, addresses, y, last):
    """addresses: of u, delta, A, B, C, D, z, delta_bias, initial_state and a chunk on the device; 0 where None."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, device_chunk = addresses
    tiles = sums = 0
    if plan.tiles:  # what passes between the launches: the state of every tile, then the sum of its steps
        batch, channels, states = last.shape
        rows = plan.tiles * batch * channels
        between = last.new_empty(rows * (states + 1))
        tiles = between.data_ptr()
        sums = tiles + 4 * rows * states
    pointers = _POINTERS.pack(
        u,
        delta,
        z,
        y.data_ptr(),
        B,
        C,
        A,
        D,
        delta_bias,
        initial_state,
        last.data_ptr(),
        tiles,
        sums,
        device_chunk,
    )
    params = pointers + plan.numbers
    for function, grid, threads, shared in plan.launches:
        _cuda.launch(function, grid, threads, shared, params, early=True)


# ---- plans -----------------------------------------------------------------------------------------------------------


def _plan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size):
    batch, channels, length = u.shape
    states = A.shape[1]
    if u.numel() == 0:
        return Plan((), 0, b"", _cuda.source_version())
    groups = max([1, *(x.shape[1] for x in (B, C) if x.dim() == 4)])
    per_group = channels // groups
    gate = u if z is None else z
    y_strides = (channels * length, 1, channels) if token_major(u) else (channels * length, length, 1)
    rows = [(x.stride(), x.data_ptr(), x.dtype.itemsize) for x in (u, delta, gate)] + [(y_strides, 0, u.dtype.itemsize)]
    order = order_of(u, groups)
    device = u.device.index
    tiles = -(-length // TILE)
    chunk, pairs = way_of(u, groups, states, chunk_size)
    block = pairs or plain_block(states)
    split = isinstance(chunk_size, torch.Tensor) or (chunk < tiles and not pairs)
    ahead_from = lead(tiles) if block.parts > 1 else 0
    blocks_of_group = -(-per_group // block.channels)
    pieces = batch * groups * blocks_of_group
    pieces *= tiles if isinstance(chunk_size, torch.Tensor) else -(-tiles // chunk)
    rows_of_state = -(-batch * channels * states // CARRY_THREADS)
    if max(pieces, rows_of_state, length + 4 * TILE) >= 2**31:
        raise bad_value(
            "u", f"shape {tuple(u.shape)}", "fewer than 2^31 - 512 tokens a sequence and 2^31 blocks of work"
        )
    variant = macros(
        dtypes=(u.dtype, delta.dtype, gate.dtype, B.dtype, C.dtype),
        states=states,
        block=block,
        split=split,
        whole=length % block.tokens == 0 and per_group % block.channels == 0,
        order=order,
        vectors=[is_wide(order, u.shape, groups, *row) for row in rows],
        projections=[projection(x, states) for x in (B, C)],
        z=z is not None,
        D=D is not None,
        bias=delta_bias is not None,
        softplus=delta_softplus,
    )

    def launch(name, shared):
        function = _cuda.function(SOURCE, name, device, variant)
        if shared > 48 << 10:
            function.allow_shared(shared)
        return function, (pieces, 1, 1), block.threads, shared

    without, with_outputs = (shared_bytes(states, block, outputs, chunk - ahead_from) for outputs in (False, True))
    if split:
        carry = _cuda.function(CARRY, "scan_carry", device, (("N", states),))
        launches = (
            launch("scan_states", without),
            (carry, (rows_of_state, 1, 1), CARRY_THREADS, 0),
            launch("scan_outputs", with_outputs),
        )
    else:
        launches = (launch("scan_both", with_outputs),)
    numbers = [*u.stride(), *delta.stride(), *gate.stride(), *y_strides]
    numbers += [*projection_strides(B), *projection_strides(C), *A.stride()]
    numbers += [0 if x is None else x.stride(0) for x in (D, delta_bias)]
    numbers += (0, 0, 0) if initial_state is None else initial_state.stride()
    numbers += [*_divisor(blocks_of_group), *_divisor(groups), *_divisor(batch)]
    numbers += [channels, per_group, length, chunk * TILE, ahead_from * TILE]
    return Plan(launches, tiles * split, _NUMBERS.pack(*numbers), _cuda.source_version())


def _divisor(by):
    """by, magic and shift of a `Divisor`: n // by == (n * magic // 2**32 + n) >> shift for n below 2**31."""
    shift = (by - 1).bit_length()
    return by, (2**shift - by << 32) // by + 1, shift
