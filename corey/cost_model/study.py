"""Every Tier 1 table as tidy rows, from one pass over the published draws."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from corey.cost_model.chain import Limits, Operator, published_chain, published_limits
from corey.cost_model.draws import BUCKETS, HIDDEN, Draw, published_draws
from corey.cost_model.groups import (
    ARITHMETIC_ONLY,
    TAU,
    Group,
    Weights,
    depth_matched_groups,
    fixed_groups,
    greedy_groups,
    mean_depth,
    single_groups,
)
from corey.cost_model.surrogate import PRECISIONS, Layer, estimate, trace_tiles
from corey.entropy import MovingEntropy, tier1_entropy
from corey.hadamard import hadamard_transform

PUBLISHED_GRID = tuple(Weights(alpha, beta) for alpha in (0.0, 0.45, 0.90) for beta in (0.0, 0.35, 0.70))


@dataclass(frozen=True)
class Case:
    """One draw made ready for the model: its chain, its limits and what the surrogate reads of it."""

    seqlen: int
    repeat: int
    chain: tuple[Operator, ...]
    limits: Limits
    layer: Layer
    entropy_before_average: float  # the moving average that the paper plots as "before"

    @property
    def labels(self) -> dict:
        """The columns that identify the draw in every row."""
        return {"seqlen": self.seqlen, "bucket": BUCKETS[self.seqlen], "repeat": self.repeat}

    @cached_property
    def plans(self) -> dict[str, tuple[float, list[Group]]]:
        """Threshold and groups of each method at the default threshold; NaN where a method has none."""
        ours = greedy_groups(self.chain, self.limits)
        return {
            "none": (float("nan"), single_groups(self.chain)),
            "static": (float("nan"), fixed_groups(self.chain, self.limits)),
            "ours": (TAU, ours),
            "arithmetic": (TAU, greedy_groups(self.chain, self.limits, TAU, ARITHMETIC_ONLY)),
            "matched": depth_matched_groups(self.chain, self.limits, mean_depth(ours)),
        }


def published_cases(seed: int = 7) -> list[Case]:
    """The 35 published draws, made ready. As published, one moving average per length takes in both streams in turn."""
    return list(_cases(published_draws(seed)))


def method_rows(cases: Iterable[Case], *, name_terms: bool = True) -> list[dict]:
    """One row per draw, precision and method: `estimate` beside the threshold and the depths of the groups."""
    return [
        case.labels
        | {"precision": precision, "method": method, "name_terms": name_terms, "tau": tau, "depths": _depths(groups)}
        | estimate(groups, case.layer, method, precision, name_terms=name_terms)
        for case in cases
        for precision in PRECISIONS
        for method, (tau, groups) in case.plans.items()
    ]


def threshold_rows(cases: Iterable[Case], taus: Iterable[float], *, name_terms: bool = True) -> list[dict]:
    """One row per draw, precision and threshold, for the entropy score."""
    return [
        case.labels
        | {"precision": precision, "tau": tau, "name_terms": name_terms}
        | estimate(greedy_groups(case.chain, case.limits, tau), case.layer, "ours", precision, name_terms=name_terms)
        for case in cases
        for tau in taus
        for precision in PRECISIONS
    ]


def grid_rows(
    cases: Iterable[Case], grid: Iterable[Weights] = PUBLISHED_GRID, *, name_terms: bool = True
) -> list[dict]:
    """One fp16 row per draw and pair (alpha, beta). As published, every cell counts as "ours", even alpha = 0."""
    return [
        case.labels
        | {"alpha": weights.entropy, "beta": weights.arithmetic, "name_terms": name_terms}
        | estimate(greedy_groups(case.chain, case.limits, TAU, weights), case.layer, "ours", name_terms=name_terms)
        for case in cases
        for weights in grid
    ]


def tile_rows(cases: Iterable[Case], *, name_terms: bool = True) -> list[dict]:
    """One row per draw, method and group: `trace_tiles`."""
    return [
        case.labels | {"method": method, "name_terms": name_terms, "group": index} | row
        for case in cases
        for method, (_, groups) in case.plans.items()
        for index, row in enumerate(trace_tiles(groups, case.seqlen, method, name_terms=name_terms))
    ]


def outlier_fraction(x: np.ndarray, sigmas: float = 6.0) -> float:
    """Share of values further than `sigmas` standard deviations from the mean."""
    return float((np.abs(x - x.mean()) > sigmas * x.std()).mean())


def _cases(draws: Iterable[Draw]) -> Iterator[Case]:
    averages: dict[int, MovingEntropy] = {}
    rotation = hadamard_transform(torch.eye(HIDDEN, dtype=torch.float64)).numpy()  # (192, 256), rows of H
    for draw in draws:
        average = averages.setdefault(draw.seqlen, MovingEntropy(decay=0.85))
        rotated = draw.activations @ rotation  # (num_samples, 256)
        before, after = tier1_entropy(draw.activations), tier1_entropy(rotated)
        average_before, average_after = average.update(before), average.update(after)
        outliers = outlier_fraction(draw.activations), outlier_fraction(rotated)
        yield Case(
            seqlen=draw.seqlen,
            repeat=draw.repeat,
            chain=published_chain(draw.activations, rotated, draw.seqlen),
            limits=published_limits(draw.seqlen),
            layer=Layer(draw.seqlen, after - before, average_after, *outliers),
            entropy_before_average=average_before,
        )


def _depths(groups: list[Group]) -> str:
    return "+".join(str(len(group)) for group in groups)
