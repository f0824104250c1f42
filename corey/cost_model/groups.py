"""Where the cost model cuts a chain: the entropy score with its greedy rule, and the rules it is compared with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from corey._check import bad_value
from corey.cost_model.chain import Limits, Operator

Group = tuple[Operator, ...]
TAU = 0.52


@dataclass(frozen=True)
class Weights:
    """alpha, beta and gamma of the score; the defaults are the paper's."""

    entropy: float = 0.45
    arithmetic: float = 0.35
    memory: float = 0.20


ARITHMETIC_ONLY = Weights(entropy=0.0)


def score(group: Group, chain: Sequence[Operator], weights: Weights = Weights()) -> float:
    """S = alpha n(mean H) + beta n(sum AI / sqrt(d)) - gamma n(sum mem / d^1.15) + min(0.18 (d - 1), 0.36).

    d is the depth of the group and n scales by the smallest and largest single operator of `chain`, clipped to [0, 1].
    The last term is in the published code and not in the published formula.
    """
    depth = len(group)
    entropy = sum(op.entropy for op in group) / depth
    arithmetic = sum(op.arithmetic for op in group) / math.sqrt(depth)
    memory = sum(op.memory for op in group) / depth**1.15
    return (
        weights.entropy * _scaled(entropy, [op.entropy for op in chain])
        + weights.arithmetic * _scaled(arithmetic, [op.arithmetic for op in chain])
        - weights.memory * _scaled(memory, [op.memory for op in chain])
        + min(0.18 * (depth - 1), 0.36)
    )


def greedy_groups(
    chain: Sequence[Operator], limits: Limits, tau: float = TAU, weights: Weights = Weights()
) -> list[Group]:
    """Walk left to right; take the next operator in while the group would score above `tau` and fit."""
    _check_chain(chain)
    groups: list[Group] = []
    current: Group = (chain[0],)
    for operator in chain[1:]:
        longer = (*current, operator)
        if score(longer, chain, weights) > tau and limits.allow(longer):
            current = longer
        else:
            groups.append(current)
            current = (operator,)
    return [*groups, current]


def single_groups(chain: Sequence[Operator]) -> list[Group]:
    """No fusion: every operator alone."""
    _check_chain(chain)
    return [(operator,) for operator in chain]


def fixed_groups(chain: Sequence[Operator], limits: Limits, size: int = 3) -> list[Group]:
    """Static fusion: runs of `size` operators, shortened where they do not fit."""
    _check_chain(chain)
    groups, start = [], 0
    while start < len(chain):
        group = tuple(chain[start : start + size])
        while len(group) > 1 and not limits.allow(group):
            group = group[:-1]
        groups.append(group)
        start += len(group)
    return groups


def depth_matched_groups(
    chain: Sequence[Operator], limits: Limits, depth: float, tau: float = TAU
) -> tuple[float, list[Group]]:
    """Groups by arithmetic alone (alpha = 0) whose mean depth is as near as can be to `depth`.

    Tries 21 thresholds from -0.2 to 0.8 beside `tau`; of equals, the one nearest to `tau`. Returns (threshold, groups).
    """
    thresholds = [tau, *np.linspace(-0.2, max(tau, 0.8), 21).round(2)]
    found = [(float(each), greedy_groups(chain, limits, each, ARITHMETIC_ONLY)) for each in thresholds]
    return min(found, key=lambda pair: (round(abs(mean_depth(pair[1]) - depth), 9), abs(pair[0] - tau)))


def mean_depth(groups: Sequence[Group]) -> float:
    """Operators per group."""
    return sum(len(group) for group in groups) / len(groups)


def _scaled(value: float, singles: Sequence[float]) -> float:
    low, high = min(singles), max(singles)
    return 0.5 if math.isclose(low, high) else min(max((value - low) / (high - low), 0.0), 1.0)


def _check_chain(chain: Sequence[Operator]) -> None:
    if len(chain) == 0:
        raise bad_value("chain", "no operators", "at least one")
