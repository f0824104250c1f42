"""The selective scan on CUDA: which variant of kernels/selective_scan.cu a call needs, and its launches."""

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch

from corey import _cuda
from corey._check import bad_value
from corey._operands import CPP_TYPES
from corey._plans import ABSENT, Plans, alignment, empty
from corey._scan_args import TILE, check_chunk_size, check_tensors

SOURCE, CARRY = "selective_scan.cu", "scan_carry.cu"
WALKERS, EACH = 4, 8  # as in the kernel: warps of a block that walk, elements a thread takes at a time
RING = 3  # with two lanes a share: rounds in shared memory
CARRY_THREADS = 64  # small blocks, which spread over all multiprocessors
TOKENS_A_THREAD, CHANNELS_A_THREAD, THREADS_ON_TOKENS, THREADS_ON_CHANNELS = range(4)
VECTORS_OF_TOKENS, VECTORS_OF_STATES, STRIDED, CONSTANT = range(4)

_POINTERS = struct.Struct("=14Q")
_NUMBERS = struct.Struct("=27q9I4i4x")


class Block(NamedTuple):
    """Lanes a channel, warps that walk, tokens at a time; in pairs other warps do what is element by element."""

    lanes: int
    walkers: int
    tokens: int
    in_pairs: bool

    @property
    def channels(self):
        return 32 * self.walkers // self.lanes

    @property
    def threads(self):
        feeders = self.in_pairs * self.channels * self.tokens // EACH
        busy = self.walkers % 4 if self.in_pairs and self.walkers < 8 else 0  # schedulers without feeding warps
        return 32 * (self.walkers - busy) + feeders * 4 // (4 - busy)

    @property
    def roomy(self):
        """Whether a thread may have 128 registers."""
        return self.threads <= 512


def _pair(walkers, tokens):
    return Block(8, walkers, tokens, True)


PAIRS = (*(_pair(walkers, 64) for walkers in (3, 4, 6, 8, 10)), _pair(12, 32))  # from the smallest
LAYOUTS = "channel_major", "token_major"


def macros(
    *,
    dtypes,
    states,
    block=None,
    split=False,
    whole=True,
    order,
    vectors=(True,) * 4,
    projections,
    z=True,
    D=True,
    bias=True,
    softplus=True,
):
    """The variant's macros. dtypes: of u, delta, z, B, C; vectors: of u, delta, z, y; projections: of B, C.

    whole: whether every block has all its channels, and all tokens whenever it takes some.
    """
    block = block or _plain_block(states)
    named = zip(("T_U", "T_DELTA", "T_Z", "T_B", "T_C"), (CPP_TYPES[dtype] for dtype in dtypes))
    wide = zip(("VECTOR_U", "VECTOR_DELTA", "VECTOR_Z", "VECTOR_Y"), (int(vector) for vector in vectors))
    flags = (("HAS_Z", int(z)), ("HAS_D", int(D)), ("HAS_BIAS", int(bias)), ("SOFTPLUS", int(softplus)))
    lie = (("MAP", order), ("LAYOUT_B", projections[0]), ("LAYOUT_C", projections[1]))
    sizes = (("LANES", block.lanes), ("WALKERS", block.walkers), ("TOKENS", block.tokens))
    return (*named, *wide, *flags, *lie, ("N", states), *sizes, ("SPLIT", int(split)), ("WHOLE", int(whole)))


def _plain_block(states):
    lanes = _lanes_a_channel(states)
    return Block(lanes, WALKERS, EACH * lanes, False)


def _lanes_a_channel(states):
    return 1 if states <= 4 else 2 if states <= 8 else 4 if states <= 16 else 8


def _tuned(layout, name, block=None, dtypes=(torch.bfloat16, torch.float16, torch.float32)):
    token_major = layout == "token_major"
    lie = {
        "order": CHANNELS_A_THREAD if token_major else TOKENS_A_THREAD,
        "projections": (VECTORS_OF_STATES if token_major else VECTORS_OF_TOKENS,) * 2,
    }
    split = name != "scan_both"
    return [
        (SOURCE, name, macros(dtypes=(dtype,) * 5, states=16, block=block, split=split, whole=whole, **lie))
        for dtype in dtypes
        for whole in (True, False)
    ]


def _tuned_pairs(roomy):
    halves = (torch.bfloat16, torch.float16)  # float32 in pairs spills a word off sm_90
    blocks = ((layout, block) for layout in LAYOUTS for block in PAIRS if block.roomy == roomy)
    return [variant for layout, block in blocks for variant in _tuned(layout, "scan_both", block, halves)]


TUNED = [
    *(
        variant
        for layout in LAYOUTS
        for name in ("scan_both", "scan_states", "scan_outputs")
        for variant in _tuned(layout, name)
    ),
    *_tuned_pairs(roomy=True),
    (CARRY, "scan_carry", (("N", 16),)),
]
TUNED_ON_HOPPER = _tuned_pairs(roomy=False)  # whose registers do there


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
    order = _order(u, groups)
    device = u.device.index
    tiles = -(-length // TILE)
    chunk, pairs = _way_of(u, groups, states, chunk_size)
    split = isinstance(chunk_size, torch.Tensor) or chunk < tiles
    block = pairs or _plain_block(states)
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
        vectors=[_is_wide(order, u.shape, groups, *row) for row in rows],
        projections=[_projection(x, states) for x in (B, C)],
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

    without, with_outputs = (_shared_bytes(states, block, outputs) for outputs in (False, True))
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
    numbers += [*_projection_strides(B), *_projection_strides(C), *A.stride()]
    numbers += [0 if x is None else x.stride(0) for x in (D, delta_bias)]
    numbers += (0, 0, 0) if initial_state is None else initial_state.stride()
    numbers += [*_divisor(blocks_of_group), *_divisor(groups), *_divisor(batch)]
    numbers += [channels, per_group, length, chunk * TILE]
    return Plan(launches, tiles * split, _NUMBERS.pack(*numbers), _cuda.source_version())


# What decides between one pass and a split, measured on an H200: blocks of 32 channels a multiprocessor with which one
# pass with one lane a share is faster at 4096 tokens; nanoseconds that a token takes in pairs, by the block's walking
# warps, and in a split, for every block of 32 channels a multiprocessor; and how much longer launching a split takes.
ONE_PASS = ((0.9, 1), (1.3, math.inf))
IN_PAIRS_NS = {
    "channel_major": {3: 14.1, 4: 17, 6: 24, 8: 31, 10: 41, 12: 51},
    "token_major": {3: 19.3, 4: 19, 6: 28, 8: 32, 10: 47, 12: 56},
}
SPLIT_NS, LAUNCHES_NS = 46.4, 9000


def _way(blocks, tiles, processors, chunk_size, layout, pairs):
    """Tiles a chunk, and the blocks in pairs of one pass, if any; `blocks` are those of one lane a share.

    A split sequence has every exp computed twice and is three launches, so one pass wins where the sequence is short or
    the GPU is kept busy. It takes as long as its slowest multiprocessor, so a little more than one block for each pays
    for two; blocks in pairs are of the size that gives each at most one. A sequence that is split goes a tile a chunk,
    which keeps the GPU even; beyond 64 blocks a multiprocessor, up to four.
    """
    busy = blocks / processors
    if pairs:
        slower = IN_PAIRS_NS[layout][pairs.walkers] - SPLIT_NS * busy  # a token
        faster = tiles <= 5 or slower * TILE * tiles < LAUNCHES_NS
    else:
        faster = tiles <= 2 or any(low <= busy <= high for low, high in ONE_PASS)
    if isinstance(chunk_size, torch.Tensor):
        return tiles, None
    if chunk_size is not None:
        chunk = min(chunk_size // TILE, tiles)
    elif faster:
        chunk = tiles
    else:
        chunk = min(max(1, blocks * tiles // (64 * processors)), 4, tiles)
    return chunk, pairs if chunk == tiles else None


def _way_of(u, groups, states, chunk_size):
    batch, channels, length = u.shape
    gpu = torch.cuda.get_device_properties(u.device.index)
    blocks = batch * groups * -(-(channels // groups) // _plain_block(states).channels)
    pairs = _pairs(u, groups, gpu) if states == 16 else None
    return _way(blocks, -(-length // TILE), gpu.multi_processor_count, chunk_size, _layout(u), pairs)


def _pairs(u, groups, gpu):
    """The smallest blocks in pairs of which a multiprocessor gets at most one, and can hold it, or None.

    Warps that feed others must read whole vectors to keep up. In other blocks than of 3, 4 and 8 warps float32 would
    spill what is on its way from memory, and so wait for it. Three warps walk only where every block has its 12
    channels.
    """
    batch, channels, length = u.shape
    if _order(u, groups) not in (TOKENS_A_THREAD, CHANNELS_A_THREAD):
        return None
    of_group = channels // groups
    for block in PAIRS:
        few = batch * groups * -(-of_group // block.channels) <= gpu.multi_processor_count
        even = block.walkers > 3 or of_group % block.channels == 0
        fits = _shared_bytes(16, block, True) <= gpu.shared_memory_per_block_optin
        enough_registers = u.dtype.itemsize == 2 or block.walkers in (3, 4, 8)
        if few and even and fits and enough_registers and block.tokens < 2 * length:
            return block
    return None


def _divisor(by):
    """by, magic and shift of a `Divisor`: n // by == (n * magic // 2**32 + n) >> shift for n below 2**31."""
    shift = (by - 1).bit_length()
    return by, (2**shift - by << 32) // by + 1, shift


def default_chunk(u):
    """The tokens a chunk that chunk_size=None stands for: u (batch, d_inner, seqlen) on a GPU, 16 states, no groups."""
    return TILE * _way_of(u, 1, 16, None)[0]


def _shared_bytes(states, block, with_outputs):
    """What a pass takes of shared memory: `Constants` and `Memory` in the kernel."""
    shares, channels, tokens = _lanes_a_channel(states), block.channels, block.tokens
    rows = -(-(channels * (tokens + 4) + channels // 8 * (4 if channels > 16 else 8)) // 32) * 32 + 16
    projection = tokens * shares * max(4, -(-states // (4 * shares)) * 4) + 2 * tokens
    constants = 2 * channels + (tokens if block.in_pairs else 4)
    memory = 2 * rows + projection + (projection + shares * rows if with_outputs else 8)
    barriers = 4
    return 4 * (constants + (RING * (memory + barriers) if block.in_pairs else memory))


def token_major(x):
    return 0 < x.stride(1) < x.stride(2)


def _layout(u):
    return LAYOUTS[token_major(u)]


def _order(u, groups):
    """How the elements of a piece of u lie among the threads."""
    for wide in (TOKENS_A_THREAD, CHANNELS_A_THREAD):
        if _is_wide(wide, u.shape, groups, u.stride(), u.data_ptr(), u.dtype.itemsize):
            return wide
    return THREADS_ON_CHANNELS if token_major(u) else THREADS_ON_TOKENS


def _is_wide(order, shape, groups, strides, address, itemsize):
    """Whether 8 neighbouring elements of a (B, D, L) tensor are 16-byte vectors, in the given order."""
    across = {TOKENS_A_THREAD: 2, CHANNELS_A_THREAD: 1}.get(order)
    if across is None or strides[across] != 1 or address % 16:
        return False
    if across == 1 and groups > 1 and shape[1] // groups * itemsize % 16:
        return False
    return all(strides[axis] * itemsize % 16 == 0 for axis in {0, 1, 2} - {across} if shape[axis] > 1)


def _projection(x, states):
    """How B or C lies: (B, N, L), (B, G, N, L), or constant (D, N)."""
    if x.dim() == 2:
        return CONSTANT
    token, state = x.dim() - 1, x.dim() - 2

    def wide(across, elements):
        size = min(16, elements * x.dtype.itemsize)
        others = [axis for axis in range(x.dim()) if axis != across and x.shape[axis] > 1]
        aligned = all(x.stride(axis) * x.dtype.itemsize % size == 0 for axis in others)
        return x.stride(across) == 1 and x.data_ptr() % size == 0 and aligned

    if wide(token, 2):
        return VECTORS_OF_TOKENS
    return VECTORS_OF_STATES if states % 8 == 0 and wide(state, 8) else STRIDED


def _projection_strides(x):
    """batch, group, state, token; where constant, the channel's stride stands for the token's."""
    if x.dim() == 2:
        return 0, 0, x.stride(1), x.stride(0)
    if x.dim() == 3:
        return x.stride(0), 0, x.stride(1), x.stride(2)
    return x.stride()
