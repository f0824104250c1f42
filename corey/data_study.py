"""Does the content of a tensor matter to the time of a scan, and does its entropy predict the fastest chunk?"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor

from corey import benchmark
from corey._check import bad_value
from corey.chunk_study import DISTRIBUTIONS, draw, scan_form
from corey.clocks import on_device
from corey.cold_calls import cold_calls, input_sets
from corey.cold_timing import time_calls
from corey.entropy import histogram_entropy
from corey.scan import selective_scan


def distribution_timings(inputs: Mapping, chunk_size: int, *, rounds: int, seed: int) -> pd.DataFrame:
    """Paired timings, on the device, of one call of the scan at one chunk with u from each distribution.

    "control" is a second normal tensor: what it differs from "normal" by is noise, so it shows what the test can see.
    """
    u = inputs["u"]
    tensors = {name: draw(name, u.shape, seed=seed).to(u.device, u.dtype) for name in DISTRIBUTIONS}
    tensors["control"] = draw("normal", u.shape, seed=seed + 1).to(u.device, u.dtype)
    calls = {
        name: cold_calls(lambda each: selective_scan(**each, chunk_size=chunk_size), input_sets({**inputs, "u": x}))
        for name, x in tensors.items()
    }
    return time_calls(calls, rounds=rounds, seed=seed, device=u.device)


def distribution_ratios(rows: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Latency of each distribution over that of "normal": ratio with its 90 % interval, and two verdicts.

    `equivalent`: the interval lies inside [1 / (1 + margin), 1 + margin]. `differs`: it lies wholly outside. Where
    neither holds the measurement is too noisy for the margin.
    """
    found = []
    for name in ("control", *(each for each in DISTRIBUTIONS if each != "normal")):
        row = {"distribution": name} | benchmark.equivalent_within(rows, name, "normal", margin)
        found.append(row | {"differs": row["low"] > 1 + margin or row["high"] < 1 / (1 + margin)})
    return pd.DataFrame(found)


def best_chunk_rows(
    inputs: Mapping, tensors: Mapping[str, Tensor], chunk_sizes: Iterable[int], *, rounds: int, seed: int
) -> pd.DataFrame:
    """For each tensor as u: its entropy and the `fastest_chunk` of the one-launch scan, timed on the device.

    All tensors and chunks share the rounds, so that drift of the machine falls on every entropy alike.
    """
    functions = {
        f"{name} {size}": on_device(scan_form("one_launch", {**inputs, "u": u}, size), u.device)
        for name, u in tensors.items()
        for size in chunk_sizes
    }
    timed = benchmark.paired(functions, rounds=rounds, warmup=1, seed=seed, device=inputs["u"].device)
    timed[["tensor", "name"]] = timed.name.str.rsplit(" ", n=1, expand=True)
    found = {name: fastest_chunk(rows) for name, rows in timed.groupby("tensor")}
    return pd.DataFrame(
        {"tensor": name, "entropy_nats": float(histogram_entropy(u))} | found[name] for name, u in tensors.items()
    )


def fastest_chunk(timed: pd.DataFrame) -> dict:
    """The chunk with the lowest median in rows of `benchmark.paired` whose names are chunks.

    Returns best_chunk over all rounds, best_chunk_even and best_chunk_odd over each half of them, and spread, the
    slowest median over the fastest. The halves say how far a best chunk repeats itself, which bounds what could
    predict it.
    """
    medians = timed.groupby("name").latency_us.median()
    halves = timed.groupby([timed["round"] % 2, "name"]).latency_us.median()
    return {
        "best_chunk": int(medians.idxmin()),
        "best_chunk_even": int(halves[0].idxmin()),
        "best_chunk_odd": int(halves[1].idxmin()),
        "spread": float(medians.max() / medians.min()),
    }


def repeatability(rows: pd.DataFrame, *, seed: int = 0) -> dict:
    """How the best chunk of the even rounds goes with that of the odd ones, over the tensors of `best_chunk_rows`:
    `spearman_permutation`, with rho 0 where one half has the same best chunk for all, so that tensors do not differ.
    """
    if rows.best_chunk_even.nunique() == 1:
        return {"rho": 0.0, "p_value": 1.0, "n": len(rows)}
    return spearman_permutation(rows.best_chunk_even, rows.best_chunk_odd, seed=seed)


def spearman_permutation(x: Sequence[float], y: Sequence[float], *, resamples: int = 9999, seed: int = 0) -> dict:
    """Spearman's correlation with a two-sided permutation test: dict(rho, p_value, n); rho is 0 if y is constant."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 5:
        raise bad_value("y", f"shapes {x.shape} and {y.shape}", "two sequences of one length, at least 5")
    if np.ptp(x) == 0:
        raise bad_value("x", "one value throughout", "at least two different values")
    if np.ptp(y) == 0:
        return {"rho": 0.0, "p_value": 1.0, "n": len(x)}  # one best chunk for all: nothing to predict
    ranks_x, ranks_y = stats.zscore(stats.rankdata(x)), stats.zscore(stats.rankdata(y)) / len(y)
    found = stats.permutation_test(
        (ranks_x,),
        lambda permuted: permuted @ ranks_y,  # Spearman's rho: Pearson's of the ranks
        permutation_type="pairings",
        n_resamples=resamples,
        alternative="two-sided",
        rng=np.random.default_rng(seed),
    )
    return {"rho": float(found.statistic), "p_value": float(found.pvalue), "n": len(x)}
