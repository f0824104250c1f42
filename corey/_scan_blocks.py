"""Blocks of threads of kernels/selective_scan.cu: their sizes and what they take of shared memory."""

from typing import NamedTuple

WALKERS, EACH = 4, 8  # as in the kernel: warps of a block that walk, elements a thread takes at a time
RING = 3  # with two lanes a share: rounds in shared memory


class Block(NamedTuple):
    """Lanes a channel, warps that walk, tokens at a time; in pairs other warps do what is element by element.

    parts: the blocks that share a sequence.
    """

    lanes: int
    walkers: int
    tokens: int
    in_pairs: bool
    parts: int = 1

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
IN_PARTS = _pair(4, 64)._replace(parts=2)


def plain_block(states):
    lanes = lanes_a_channel(states)
    return Block(lanes, WALKERS, EACH * lanes, False)


def lanes_a_channel(states):
    return 1 if states <= 4 else 2 if states <= 8 else 4 if states <= 16 else 8


def shared_bytes(states, block, with_outputs, ahead=0):
    """What a pass takes of shared memory: in the kernel `Constants`, `Memory` and, for so many tiles ahead, `Inbox`."""
    shares, channels, tokens = lanes_a_channel(states), block.channels, block.tokens
    rows = -(-(channels * (tokens + 4) + channels // 8 * (4 if channels > 16 else 8)) // 32) * 32 + 16
    projection = tokens * shares * max(4, -(-states // (4 * shares)) * 4) + 2 * tokens
    constants = 2 * channels + (tokens if block.in_pairs else 4)
    memory = 2 * rows + projection + (projection + shares * rows if with_outputs else 8)
    barriers = 4
    inbox = 32 * block.walkers * (2 + 4 * ahead) + 4 if block.parts > 1 else 0
    return 4 * (constants + (RING * (memory + barriers) + inbox if block.in_pairs else memory))
