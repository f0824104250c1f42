"""The operator chain of the paper's cost model and the resources a fused group may use."""

import math
from dataclasses import dataclass

import numpy as np

from corey.entropy import tier1_entropy

# name, arithmetic intensity and memory traffic at length scale 1, registers, shared memory, occupancy
_TEMPLATES = (
    ("input_norm", 1.6, 18.0, 20, 8, 0.94),
    ("gate_projection", 2.7, 22.0, 36, 12, 0.91),
    ("selective_scan", 4.8, 31.0, 72, 28, 0.79),
    ("state_mix", 3.9, 24.0, 54, 22, 0.83),
    ("output_projection", 3.4, 19.0, 48, 18, 0.87),
    ("activation", 1.9, 14.0, 24, 8, 0.96),
    ("residual_merge", 1.5, 12.0, 18, 6, 0.97),
)


@dataclass(frozen=True)
class Operator:
    """One operator of a chain. All numbers are the model's own; none was measured on a device."""

    name: str
    entropy: float
    arithmetic: float
    memory: float
    registers: int
    shared_memory: int
    occupancy: float


@dataclass(frozen=True)
class Limits:
    """What a fused group may use: sums of registers and of shared memory, and the least occupancy of its members."""

    registers: int
    shared_memory: int
    occupancy: float

    def allow(self, group: tuple[Operator, ...]) -> bool:
        """Whether the group fits."""
        return (
            sum(op.registers for op in group) <= self.registers
            and sum(op.shared_memory for op in group) <= self.shared_memory
            and min(op.occupancy for op in group) >= self.occupancy
        )


def published_chain(activations: np.ndarray, rotated: np.ndarray, seqlen: int) -> tuple[Operator, ...]:
    """The seven operators of a Mamba block with the entropies the paper gives them.

    Args:
        activations: (num_samples, channels) float64.
        rotated: the Hadamard rotation of `activations`, (num_samples, at least channels).
        seqlen: L; arithmetic and memory grow by 1 + log2(L) / 6.

    Operator i gets 0.55 H + 0.45 H_rotated of the i-th of seven contiguous blocks of channels. The blocks have nothing
    to do with the operators: all come from one random matrix.
    """
    channels = activations.shape[1]
    scale = 1 + math.log2(seqlen) / 6
    raw_blocks = np.array_split(activations, len(_TEMPLATES), axis=1)  # 7 x (num_samples, 27 or 28)
    rotated_blocks = np.array_split(rotated[:, :channels], len(_TEMPLATES), axis=1)
    entropies = [
        min(max(0.55 * tier1_entropy(raw) + 0.45 * tier1_entropy(turned), 0.0), 1.0)
        for raw, turned in zip(raw_blocks, rotated_blocks)
    ]
    return tuple(
        Operator(name, entropy, arithmetic * scale, memory * scale, registers, shared_memory, occupancy)
        for entropy, (name, arithmetic, memory, registers, shared_memory, occupancy) in zip(entropies, _TEMPLATES)
    )


def published_limits(seqlen: int) -> Limits:
    """180 registers and 96 units of shared memory, both less floor(2 log2 L); occupancy from 0.72."""
    penalty = math.floor(2 * math.log2(seqlen))
    return Limits(registers=180 - penalty, shared_memory=96 - penalty, occupancy=0.72)
