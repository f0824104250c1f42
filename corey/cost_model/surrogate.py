"""The paper's formulas for latency, traffic, tiles and "quality" of a grouped chain, with and without method names.

As published, a method's name enters its own result: "ours" is given a shorter launch, more reuse and a bonus on
quality, "static" less reuse and "none" a longer launch. `name_terms=False` gives all methods the same formulas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from corey._check import bad_value
from corey.cost_model.groups import Group, mean_depth

METHODS = ("none", "static", "ours", "arithmetic", "matched")
PRECISIONS = {"fp16": (1.0, 0.0), "w8a8": (1.12, 0.7), "w4a8": (1.22, 1.3)}  # name: (speed-up, sensitivity)


@dataclass(frozen=True)
class Layer:
    """What the surrogate reads of one draw: normalised entropies, and the share of values beyond six sigma.

    `entropy_gain` is that of the draw; `entropy_after` is the moving average that the paper mixes with the one before.
    """

    seqlen: int
    entropy_gain: float
    entropy_after: float
    outliers_before: float
    outliers_after: float


def estimate(
    groups: Sequence[Group], layer: Layer, method: str, precision: str = "fp16", *, name_terms: bool = True
) -> dict[str, float]:
    """Latency (ms), tokens/s, DRAM bytes per token, quality proxy and mean resources per group of one schedule.

    Per group of depth d, with l = log2 L: time = 0.012 mem l reuse + 0.007 AI l / speedup + launch. The time grows with
    log2(L)^2 and the tokens with L, so throughput rises with L by construction.
    """
    _check_method(method)
    if precision not in PRECISIONS:
        raise bad_value("precision", repr(precision), f"one of {', '.join(PRECISIONS)}")
    speedup, sensitivity = PRECISIONS[precision]
    log_length = math.log2(layer.seqlen)
    reuse_name = method if name_terms else ""
    traffic = [_memory(group) * log_length * _reuse(group, reuse_name, layer.entropy_gain) for group in groups]
    compute = [_arithmetic(group) * log_length / speedup for group in groups]
    launch = [_launch_ms(len(group), reuse_name) for group in groups]
    latency_ms = sum(0.012 * m + 0.007 * a + t for m, a, t in zip(traffic, compute, launch))
    return {
        "latency_ms": latency_ms,
        "tokens_per_s": 1e3 * layer.seqlen / latency_ms,
        "dram_bytes_per_token": 1024 * sum(traffic) / layer.seqlen,
        "quality_proxy": _quality_proxy(mean_depth(groups), layer, method, sensitivity, name_terms),
        "mean_depth": mean_depth(groups),
        "occupancy": _mean(min(op.occupancy for op in group) for group in groups),
        "registers": _mean(sum(op.registers for op in group) for group in groups),
        "shared_memory": _mean(sum(op.shared_memory for op in group) for group in groups),
    }


def tile_size(entropy: float) -> int:
    """Tokens per tile, 32 round((64 + 448 H) / 32) for a normalised entropy H in [0, 1]."""
    return 32 * round((64 + 448 * min(max(entropy, 0.0), 1.0)) / 32)


def trace_tiles(groups: Sequence[Group], seqlen: int, method: str, *, name_terms: bool = True) -> list[dict]:
    """Per group: tile size, tile count, and group and mean tile latency (ms) of the paper's tile trace.

    The trace has formulas of its own: 0.04 H more reuse for "ours" in place of the entropy gain, and
    0.02 max(H - 0.55, 0) for "matched". It then spreads
    each group's time over its tiles by a sine of the position, which changes no mean.
    """
    _check_method(method)
    name = method if name_terms else ""
    log_length = math.log2(seqlen)
    rows = []
    for group in groups:
        entropy = _entropy(group)
        bonus = {"ours": 0.04 * entropy, "matched": 0.02 * max(entropy - 0.55, 0.0)}.get(name, 0.0)
        reuse = _clipped(_common_reuse(group) + _static_penalty(name, entropy) - bonus)
        latency_ms = log_length * (0.012 * _memory(group) * reuse + 0.007 * _arithmetic(group))
        latency_ms += _launch_ms(len(group), name)
        tokens = tile_size(entropy)
        count = math.ceil(seqlen / tokens)
        rows.append(
            {
                "tile_tokens": tokens,
                "tiles": count,
                "group_latency_ms": latency_ms,
                "tile_latency_ms": latency_ms / count,
            }
        )
    return rows


def _reuse(group: Group, name: str, entropy_gain: float) -> float:
    bonus = 0.06 * max(entropy_gain, 0.0) if name == "ours" else 0.0
    return _clipped(_common_reuse(group) + _static_penalty(name, _entropy(group)) - bonus)


def _common_reuse(group: Group) -> float:
    return 1 - 0.09 * (len(group) - 1) - 0.08 * _entropy(group)


def _static_penalty(name: str, entropy: float) -> float:
    return 0.04 * max(0.0, 0.62 - entropy) if name == "static" else 0.0


def _clipped(reuse: float) -> float:
    return min(max(reuse, 0.42), 1.1)


def _launch_ms(depth: int, name: str) -> float:
    base = 0.28 if name == "none" else 0.16
    discount = 0.02 * min(depth - 1, 2) if name == "ours" else 0.0
    return base + 0.03 * max(depth - 3, 0) - discount


def _quality_proxy(depth: float, layer: Layer, method: str, sensitivity: float, name_terms: bool) -> float:
    over_fusion = max(0.0, depth - 2) * max(0.0, 0.63 - layer.entropy_after)
    bonus = 0.0
    if name_terms:
        over_fusion *= {"none": 0.0, "ours": 0.35}.get(method, 1.0)
        if method == "ours":
            removed = max(layer.outliers_before - layer.outliers_after, 0.0)
            bonus = 0.45 * max(layer.entropy_gain, 0.0) + 5 * removed
    return max(0.0, sensitivity * (0.12 + 10 * layer.outliers_before) + over_fusion - bonus)


def _entropy(group: Group) -> float:
    return _mean(op.entropy for op in group)


def _memory(group: Group) -> float:
    return sum(op.memory for op in group)


def _arithmetic(group: Group) -> float:
    return sum(op.arithmetic for op in group)


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise bad_value("method", repr(method), f"one of {', '.join(METHODS)}")
