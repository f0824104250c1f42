"""Which chunk is fastest for which shape: every legal chunk of one call, over sequence length and width."""

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch

from corey import benchmark
from corey._check import bad_value
from corey.clocks import median_interval
from corey.cold_calls import cold_calls, input_sets
from corey.cold_timing import time_calls
from corey.progress import progress
from corey.scan import TILE, selective_scan

TIE = 0.02  # a chunk is as good as the fastest unless it is slower by more than this, beyond doubt


def layer_inputs(batch: int, d_inner: int, seqlen: int, d_state: int, *, seed: int, dtype, device) -> dict:
    """Arguments of the scan as a Mamba layer gives them: u, delta and z (B, D, L), B and C (B, N, L) in `dtype`, with
    skip, bias and softplus. Drawn on the device itself, since only their time is of interest.
    """
    generator = torch.Generator(device).manual_seed(seed)
    wide, projection = (batch, d_inner, seqlen), (batch, d_state, seqlen)
    u, delta, z, B, C = (
        torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        for shape in (wide, wide, wide, projection, projection)
    )
    ones = torch.ones(d_inner, device=device)
    weights = {
        "A": -torch.arange(1.0, d_state + 1, device=device).repeat(d_inner, 1),
        "D": ones,
        "delta_bias": -4 * ones,
    }
    return {"u": u, "delta": delta, "z": z, "B": B, "C": C, "delta_softplus": True} | weights


def parse_width(text: str) -> tuple[int, int]:
    """ "8 x 2048" as (batch, d_inner)."""
    batch, _, d_inner = text.partition("x")
    if not (batch.strip().isdigit() and d_inner.strip().isdigit()):
        raise bad_value("width", repr(text), "batch x channels, such as '8 x 2048'")
    return int(batch), int(d_inner)


def shape_rows(
    widths: Iterable[str],
    seqlens: Iterable[int],
    chunk_sizes: Iterable[int],
    *,
    d_state: int,
    rounds: int,
    seed: int,
    dtype: torch.dtype,
    device,
) -> pd.DataFrame:
    """Every chunk of one call, on the device, at every width ("B x D") and length; all chunks of a shape share rounds.

    Chunks are those of `chunk_sizes` below L, the whole sequence as one, and the one of the scan's own rule, whose
    chunk_size is missing. Columns: batch, d_inner, seqlen, chunk_size, median_us with its 95 % interval low_us and
    high_us; ratio over the fastest given chunk with low, high and n; tied, whether the chunk is within TIE of it.
    """
    found = []
    shapes = [(*parse_width(width), seqlen) for width in widths for seqlen in seqlens]
    for batch, d_inner, seqlen in progress(shapes, "shapes"):
        inputs = layer_inputs(batch, d_inner, seqlen, d_state, seed=seed, dtype=dtype, device=device)
        sizes = [*sorted(size for size in chunk_sizes if size < seqlen), -(-seqlen // TILE) * TILE, None]
        sets = input_sets(inputs)
        calls = {str(size): cold_calls(partial(_scan, chunk_size=size), sets) for size in sizes}
        timed = time_calls(calls, rounds=rounds, seed=seed, device=device)
        shape = {"batch": batch, "d_inner": d_inner, "seqlen": seqlen}
        found += [shape | row for row in chunk_table(timed, sizes)]
    return pd.DataFrame(found).astype({"chunk_size": "Int64"})


def chunk_table(timed: pd.DataFrame, sizes: Iterable[int | None]) -> list[dict]:
    """The rows of `shape_rows` for one shape, from the rows of `benchmark.paired` with names str(size)."""
    generator = np.random.default_rng(0)
    latency = {size: timed[timed.name == str(size)].latency_us for size in sizes}
    medians = {size: median_interval(values, generator) for size, values in latency.items()}  # median, low, high
    fastest = min((size for size in medians if size is not None), key=lambda size: medians[size][0])
    rows = []
    for size, (median, low, high) in medians.items():
        if size == fastest:
            ratio = {"ratio": 1.0, "low": 1.0, "high": 1.0, "n": len(latency[size])}
        else:
            ratio = benchmark.ratio_interval(timed, str(size), str(fastest))
        row = {"chunk_size": size, "median_us": median, "low_us": low, "high_us": high} | ratio
        rows.append(row | {"tied": ratio["low"] <= 1 + TIE})
    return rows


def best_chunks(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a shape from `shape_rows`: batch, d_inner, seqlen, best_chunk (the fastest), first_tied and last_tied
    (the range of chunks within TIE of it), spread (slowest chunk over fastest), and rule_ratio with rule_low and
    rule_high (the scan's own rule over the fastest).
    """
    found = []
    for shape, group in rows.groupby(["batch", "d_inner", "seqlen"], sort=False):
        given, rule = group[group.chunk_size.notna()], group[group.chunk_size.isna()].iloc[0]
        tied = given[given.tied].chunk_size
        best = given.loc[given.median_us.idxmin(), "chunk_size"]
        row = dict(zip(("batch", "d_inner", "seqlen"), shape)) | {"best_chunk": int(best)}
        row |= {"first_tied": int(tied.min()), "last_tied": int(tied.max()), "spread": float(given.ratio.max())}
        found.append(row | {"rule_ratio": rule.ratio, "rule_low": rule.low, "rule_high": rule.high})
    return pd.DataFrame(found)


def _scan(inputs: Mapping, chunk_size: int | None) -> torch.Tensor:
    return selective_scan(**inputs, chunk_size=chunk_size)
