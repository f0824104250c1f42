"""The paper's synthetic activations, in the order its random stream produced them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from corey._check import bad_type, bad_value

SEQLENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
BUCKETS = {
    1024: "short",
    2048: "short",
    4096: "medium",
    8192: "medium",
    16384: "long",
    32768: "long",
    65536: "ultra_long",
}
REPEATS = 5
HIDDEN = 192
PROJECTION = 256


@dataclass(frozen=True)
class Draw:
    """One synthetic layer: activations (num_samples, 192) and weight (256, 192), both float64."""

    seqlen: int
    repeat: int
    activations: np.ndarray
    weight: np.ndarray


def num_samples(seqlen: int) -> int:
    """Rows drawn for a sequence length: an eighth of the tokens, between 512 and 4096."""
    return min(4096, max(512, seqlen // 8))


def published_draws(seed: int = 7) -> Iterator[Draw]:
    """Yield the 35 draws of the paper's Tier 1 (7 lengths x 5 repeats) from one random stream.

    One generator serves all draws, so draw k depends on all earlier ones: iterate in order and from the start.
    Activations are N(0, 1) + 0.35 (1 + log2(L) / 20) t_3; heavier tails stand in for longer sequences.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise bad_type("seed", seed, "an int")
    if seed < 0:
        raise bad_value("seed", seed, "a number from 0")
    return _draws(seed)


def _draws(seed: int) -> Iterator[Draw]:
    # a generator function of its own, so that the checks above run at the call and not at the first item
    rng = np.random.default_rng(seed)
    for seqlen in SEQLENS:
        shape = (num_samples(seqlen), HIDDEN)
        for repeat in range(REPEATS):
            gaussian = rng.standard_normal(shape)
            tails = rng.standard_t(3, size=shape)
            weight = rng.standard_normal((PROJECTION, HIDDEN))
            activations = gaussian + 0.35 * (1 + math.log2(seqlen) / 20) * tails
            yield Draw(seqlen, repeat, activations, weight)
