"""One pass, one in two parts, or a split: how many tiles a block of the scan walks, and what kind of block."""

import math

import torch

from corey._scan_args import TILE
from corey._scan_blocks import IN_PARTS, PAIRS, plain_block, shared_bytes
from corey._scan_layout import CHANNELS_A_THREAD, TOKENS_A_THREAD, layout_of, order_of

# What decides, measured on an H200. Blocks of 32 channels a multiprocessor with which one pass with one lane a share is
# faster than a split at 4096 tokens; nanoseconds that a token takes in pairs, by the block's walking warps, in two
# parts, and in a split for every block of 32 channels a multiprocessor. The latter two take longer to begin than pairs
# do, and a split of little work takes longer than in proportion, so it is the maximum of two lines.
ONE_PASS = ((0.9, 1), (1.3, math.inf))
IN_PAIRS_NS = {
    "channel_major": {3: 14.1, 4: 17, 6: 24, 8: 31, 10: 41, 12: 51},
    "token_major": {3: 19.3, 4: 19, 6: 28, 8: 32, 10: 47, 12: 56},
}
IN_PARTS_NS, PARTS_NS = {"channel_major": 10.8, "token_major": 12.1}, 1400
SPLIT_NS = ((9000, 46.4), (14500, 38))

SHORT = 5  # tiles up to which one pass in pairs is always the fastest

# Of a sequence in two parts: how much the first block walks, and from where the second one looks ahead.
FIRST, LEAD = 0.625, 0.25


def way(blocks, tiles, processors, chunk_size, layout, pairs, parts):
    """Tiles a chunk, and its blocks in pairs, if any; `blocks` are those of one lane a share.

    A split sequence has every exp computed twice and is three launches, so one pass wins where the sequence is short or
    the GPU is kept busy. It takes as long as its slowest multiprocessor, so a little more than one block for each pays
    for two; blocks in pairs are of the size that gives each at most one. Where that is less than half of one, two can
    share a sequence. A sequence that is split goes a tile a chunk, which keeps the GPU even; beyond 64 blocks a
    multiprocessor, up to four.
    """
    if isinstance(chunk_size, torch.Tensor):
        return tiles, None
    blocks_of = {tiles: pairs} | ({first_part(tiles): parts} if parts else {})
    if chunk_size is None:
        chunk = _fastest(blocks, tiles, processors, layout, pairs, parts)
    else:
        chunk = min(chunk_size // TILE, tiles)
    return chunk, blocks_of.get(chunk)


def _fastest(blocks, tiles, processors, layout, pairs, parts):
    busy = blocks / processors
    split = min(max(1, blocks * tiles // (64 * processors)), 4, tiles)
    if not pairs:
        return tiles if tiles <= 2 or any(low <= busy <= high for low, high in ONE_PASS) else split
    if tiles <= SHORT:
        return tiles
    tokens = tiles * TILE
    ns = {split: max(begin + a_token * busy * tokens for begin, a_token in SPLIT_NS)}
    ns[tiles] = IN_PAIRS_NS[layout][pairs.walkers] * tokens
    if parts:
        ns[first_part(tiles)] = IN_PARTS_NS[layout] * tokens + PARTS_NS
    return min(ns, key=ns.get)


def first_part(tiles):
    """Tiles of the first of two parts, more than half of them."""
    return round(FIRST * tiles)


def lead(tiles):
    """The tile from which the second part looks ahead, up to the end of the first part."""
    return round(LEAD * tiles)


def way_of(u, groups, states, chunk_size):
    batch, channels, length = u.shape
    gpu = torch.cuda.get_device_properties(u.device.index)
    blocks = batch * groups * -(-(channels // groups) // plain_block(states).channels)
    pairs, parts = (pairs_for(u, groups, gpu), parts_for(u, groups, gpu)) if states == 16 else (None, None)
    return way(blocks, -(-length // TILE), gpu.multi_processor_count, chunk_size, layout_of(u), pairs, parts)


def pairs_for(u, groups, gpu):
    """The smallest blocks in pairs of which a multiprocessor gets at most one, and can hold it, or None."""
    return _smallest(PAIRS, u, groups, gpu)


def parts_for(u, groups, gpu):
    """The same for two blocks that share a sequence, as a cluster."""
    long_enough = u.shape[2] > SHORT * TILE
    return _smallest([IN_PARTS], u, groups, gpu) if gpu.major >= 9 and long_enough else None


def _smallest(blocks, u, groups, gpu):
    """Of these blocks, which are in pairs.

    Warps that feed others must read whole vectors to keep up. In other blocks than of 3, 4 and 8 warps float32 would
    spill what is on its way from memory, and so wait for it. Three warps walk only where every block has its 12
    channels.
    """
    batch, channels, length = u.shape
    if order_of(u, groups) not in (TOKENS_A_THREAD, CHANNELS_A_THREAD):
        return None
    of_group, tiles = channels // groups, -(-length // TILE)
    for block in blocks:
        few = batch * groups * -(-of_group // block.channels) * block.parts <= gpu.multi_processor_count
        even = block.walkers > 3 or of_group % block.channels == 0
        nbytes = shared_bytes(16, block, True, first_part(tiles) - lead(tiles))
        enough_registers = u.dtype.itemsize == 2 or block.walkers in (3, 4, 8)
        fits = nbytes <= gpu.shared_memory_per_block_optin
        if few and even and fits and enough_registers and block.tokens < 2 * length:
            return block
    return None


def default_chunk(u):
    """The tokens a chunk that chunk_size=None stands for: u (batch, d_inner, seqlen) on a GPU, 16 states, no groups."""
    return TILE * way_of(u, 1, 16, None)[0]
