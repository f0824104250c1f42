"""Tier 1 of the paper: a cost model on paper, as published and without the terms that depend on a method's name."""

from corey.cost_model.chain import Limits, Operator, published_chain, published_limits
from corey.cost_model.draws import BUCKETS, REPEATS, SEQLENS, Draw, num_samples, published_draws
from corey.cost_model.groups import (
    TAU,
    Weights,
    depth_matched_groups,
    fixed_groups,
    greedy_groups,
    mean_depth,
    score,
    single_groups,
)
from corey.cost_model.launches import PUBLISHED_CHAINS, PUBLISHED_LAUNCH_MS, launch_counts, made_chain
from corey.cost_model.study import Case, grid_rows, method_rows, published_cases, threshold_rows, tile_rows
from corey.cost_model.surrogate import METHODS, PRECISIONS, Layer, estimate, tile_size, trace_tiles

__all__ = [
    "BUCKETS",
    "METHODS",
    "PRECISIONS",
    "PUBLISHED_CHAINS",
    "PUBLISHED_LAUNCH_MS",
    "REPEATS",
    "SEQLENS",
    "TAU",
    "Case",
    "Draw",
    "Layer",
    "Limits",
    "Operator",
    "Weights",
    "depth_matched_groups",
    "estimate",
    "fixed_groups",
    "greedy_groups",
    "grid_rows",
    "launch_counts",
    "made_chain",
    "mean_depth",
    "method_rows",
    "num_samples",
    "published_cases",
    "published_chain",
    "published_draws",
    "published_limits",
    "score",
    "single_groups",
    "threshold_rows",
    "tile_rows",
    "tile_size",
    "trace_tiles",
]
