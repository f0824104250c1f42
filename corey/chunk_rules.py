"""The maps from an entropy or a shape to a chunk: on the host, and the same decisions made on the device."""

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from corey._check import bad_value, check_count
from corey.entropy import entropy_chunk


@dataclass(frozen=True)
class ChunkRule:
    """The published map C = clip(2^round(log2(c_min + min(H / h_ref, 1) (c_max - c_min))), c_min, c_max).

    c_min and c_max are powers of two with c_min <= c_max, in tokens; h_ref is in nats. The paper's code rounds the
    exponent and its text takes the floor: rounding="round" or "floor". The kernel benchmarks' range starts at 32. A
    chunk below 128 is a legal answer of this map and no legal chunk of `corey.scan`, whose tile is 128 tokens: a rule
    that is to drive the scan has c_min >= 128.
    """

    c_min: int
    c_max: int
    h_ref: float
    rounding: str = "round"

    def __post_init__(self):
        _check_power_of_two("c_min", self.c_min)
        _check_power_of_two("c_max", self.c_max)
        if self.c_max < self.c_min:
            raise bad_value("c_max", self.c_max, f"at least c_min = {self.c_min}")
        if not 0.0 < self.h_ref < math.inf:
            raise bad_value("h_ref", self.h_ref, "a positive number of nats")
        if self.rounding not in ("round", "floor"):
            raise bad_value("rounding", repr(self.rounding), "'round' or 'floor'")

    def __call__(self, entropy_nats: float) -> int:
        """Chunk in tokens for an entropy in nats, at least 0; entropies above h_ref give c_max."""
        if not 0.0 <= entropy_nats < math.inf:
            raise bad_value("entropy_nats", entropy_nats, "a finite number, at least 0")
        raw = self.c_min + min(entropy_nats / self.h_ref, 1.0) * (self.c_max - self.c_min)
        exponent = math.floor(math.log2(raw)) if self.rounding == "floor" else round(math.log2(raw))
        return min(max(2**exponent, self.c_min), self.c_max)


@dataclass(frozen=True)
class GuardedRule(ChunkRule):
    """A `ChunkRule` behind `guard`, as one map from the entropy to the chunk that a device can take.

    fallback, a power of two of tokens, and delta as in `guard`. The guarded map must still begin at c_min and end at
    c_max: each is the fallback itself or at least delta doublings away from it.
    """

    fallback: int = 512
    delta: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        _check_power_of_two("fallback", self.fallback)
        for name in ("c_min", "c_max"):
            chunk = getattr(self, name)
            if guard(chunk, self.fallback, self.delta) != chunk:
                raise bad_value(name, chunk, f"fallback = {self.fallback} or at least {self.delta} doublings from it")

    def __call__(self, entropy_nats: float) -> int:
        """Chunk in tokens for an entropy in nats, at least 0: that of the `ChunkRule`, guarded."""
        return guard(super().__call__(entropy_nats), self.fallback, self.delta)


def device_chunk(u: Tensor, rule: ChunkRule, num_bins: int = 256, range: tuple[float, float] | None = None) -> Tensor:
    """`rule` of the histogram entropy of all of `u`, decided where `u` is: 0-dim int32, equal to what the rule says.

    num_bins, range: as in `histogram_entropy`. On CUDA nothing is read by the host and a NaN gives c_min; on CPU it
    raises. The map rises with the entropy, so the device compares with the least entropy of each chunk, found here by
    bisection of the rule itself.
    """
    return entropy_chunk(u, num_bins, range, _least_entropies(rule), rule.c_min)


@lru_cache
def _least_entropies(rule: ChunkRule) -> tuple[float, ...]:
    """For each chunk above c_min the least fp32 entropy in nats that gives it, infinity where none does."""
    return tuple(_least_entropy(rule, chunk) for chunk in powers_of_two(rule.c_min, rule.c_max)[1:])


def _least_entropy(rule: ChunkRule, chunk: int) -> float:
    def number(bits: int) -> float:  # fp32 numbers from 0 up are ordered as their bits are
        return struct.unpack("f", struct.pack("I", bits))[0]

    below, reached = 0, 0x7F800000  # zero, infinity
    while reached - below > 1:
        middle = (below + reached) // 2
        if rule(number(middle)) >= chunk:
            reached = middle
        else:
            below = middle
    return number(reached)


def continuous_tile(entropy_nats: float) -> int:
    """The tile of the paper's proposed fused kernel: T = 32 round((64 + min(e / 8, 1) 448) / 32), 64 to 512 tokens."""
    if not 0.0 <= entropy_nats < math.inf:
        raise bad_value("entropy_nats", entropy_nats, "a finite number, at least 0")
    return 32 * round((64 + min(entropy_nats / 8.0, 1.0) * 448) / 32)


def guard(chunk_size: int, fallback: int = 512, delta: float = 2.0) -> int:
    """`fallback` where the choice is fewer than `delta` powers of two away from it, else the choice itself."""
    check_count("chunk_size", chunk_size, 1)
    check_count("fallback", fallback, 1)
    if not delta >= 0.0:
        raise bad_value("delta", delta, "a number of doublings, at least 0")
    return fallback if abs(math.log2(chunk_size) - math.log2(fallback)) < delta else chunk_size


def shape_chunk(
    batch: int, d_inner: int, seqlen: int, processors: int, *, c_min: int = 128, c_max: int = 2048, fill: int = 4
) -> int:
    """The largest chunk that still leaves every processor `fill` pieces of work; this project's rule, no data read.

    A sequence cut into ceil(seqlen / C) chunks gives batch * d_inner * ceil(seqlen / C) pieces. Longer chunks hand on
    fewer states, so the rule takes the largest power of two in [c_min, c_max] with at least fill * processors pieces,
    and c_min where no chunk gives that many.
    """
    for name, count in (("batch", batch), ("d_inner", d_inner), ("processors", processors), ("fill", fill)):
        check_count(name, count, 1)
    check_count("seqlen", seqlen, 0)
    candidates = powers_of_two(c_min, c_max)
    filling = [c for c in candidates if batch * d_inner * math.ceil(seqlen / c) >= fill * processors]
    return max(filling, default=c_min)


def powers_of_two(c_min: int, c_max: int) -> list[int]:
    """The powers of two from c_min to c_max, both included and both powers of two."""
    rule = ChunkRule(c_min, c_max, 1.0)
    return [2**e for e in range(rule.c_min.bit_length() - 1, rule.c_max.bit_length())]


def _check_power_of_two(name: str, value: object) -> None:
    check_count(name, value, 1)
    if value & (value - 1):
        raise bad_value(name, value, "a power of two")
