"""One pass or a split: how many tiles a block of the scan walks, and whether two lanes share a chain of states."""

import math

import torch

from corey._scan_args import TILE
from corey._scan_blocks import PAIRS, plain_block, shared_bytes
from corey._scan_layout import CHANNELS_A_THREAD, TOKENS_A_THREAD, layout_of, order_of

# What decides between one pass and a split, measured on an H200: blocks of 32 channels a multiprocessor with which one
# pass with one lane a share is faster at 4096 tokens; nanoseconds that a token takes in pairs, by the block's walking
# warps, and in a split, for every block of 32 channels a multiprocessor; and how much longer launching a split takes.
ONE_PASS = ((0.9, 1), (1.3, math.inf))
IN_PAIRS_NS = {
    "channel_major": {3: 14.1, 4: 17, 6: 24, 8: 31, 10: 41, 12: 51},
    "token_major": {3: 19.3, 4: 19, 6: 28, 8: 32, 10: 47, 12: 56},
}
SPLIT_NS, LAUNCHES_NS = 46.4, 9000


def way(blocks, tiles, processors, chunk_size, layout, pairs):
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


def way_of(u, groups, states, chunk_size):
    batch, channels, length = u.shape
    gpu = torch.cuda.get_device_properties(u.device.index)
    blocks = batch * groups * -(-(channels // groups) // plain_block(states).channels)
    pairs = pairs_for(u, groups, gpu) if states == 16 else None
    return way(blocks, -(-length // TILE), gpu.multi_processor_count, chunk_size, layout_of(u), pairs)


def pairs_for(u, groups, gpu):
    """The smallest blocks in pairs of which a multiprocessor gets at most one, and can hold it, or None.

    Warps that feed others must read whole vectors to keep up. In other blocks than of 3, 4 and 8 warps float32 would
    spill what is on its way from memory, and so wait for it. Three warps walk only where every block has its 12
    channels.
    """
    batch, channels, length = u.shape
    if order_of(u, groups) not in (TOKENS_A_THREAD, CHANNELS_A_THREAD):
        return None
    of_group = channels // groups
    for block in PAIRS:
        few = batch * groups * -(-of_group // block.channels) <= gpu.multi_processor_count
        even = block.walkers > 3 or of_group % block.channels == 0
        fits = shared_bytes(16, block, True) <= gpu.shared_memory_per_block_optin
        enough_registers = u.dtype.itemsize == 2 or block.walkers in (3, 4, 8)
        if few and even and fits and enough_registers and block.tokens < 2 * length:
            return block
    return None


def default_chunk(u):
    """The tokens a chunk that chunk_size=None stands for: u (batch, d_inner, seqlen) on a GPU, 16 states, no groups."""
    return TILE * way_of(u, 1, 16, None)[0]
