"""Paired timing: every round calls each function once, in a new random order, so that drift falls on all of them alike.

Ratios are judged on per-round log ratios with a bootstrap interval, never on two separate means.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats

from corey._check import bad_type, bad_value
from corey.progress import progress
from corey.results import device_name

__all__ = ["capture", "device_name", "equivalent_within", "launch_cost_fit", "paired", "ratio_interval"]

L2_FLUSH_BYTES = 256 << 20  # five times the L2 of an H200
RESAMPLES = 9999


def paired(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    flush_bytes: int | None = None,
) -> pd.DataFrame:
    """Time functions without arguments against one another; returns rows (round, order, name, latency_us).

    Each of `rounds` rounds calls every function once, in an order shuffled by `seed`. On a CPU the clock is
    `perf_counter_ns` around the call; on a GPU it is a pair of CUDA events, so the time is the device's. Before each
    call a buffer of `flush_bytes` is overwritten to empty the cache; None means 256 MiB on a GPU and no flush on a CPU.
    """
    if not isinstance(functions, Mapping) or not functions or not all(callable(each) for each in functions.values()):
        raise bad_type("functions", functions, "a non-empty mapping of names to functions without arguments")
    for argument, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0)):
        if not isinstance(value, int) or value < least:
            raise bad_value(argument, value, f"an integer of at least {least}")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise bad_value("device", repr(str(device)), "'cpu' or 'cuda[:index]'")
    if flush_bytes is None:
        flush_bytes = L2_FLUSH_BYTES if device.type == "cuda" else 0
    if flush_bytes < 0:
        raise bad_value("flush_bytes", flush_bytes, "zero or more bytes")
    clock = _cuda_us if device.type == "cuda" else _cpu_us
    scratch = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
    for _ in range(warmup):
        for function in functions.values():
            clock(function, scratch)
    shuffle = random.Random(seed).sample
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a call would be charged to that call
    try:
        rows = [
            (index, order, name, clock(functions[name], scratch))
            for index in progress(range(rounds), "rounds")
            for order, name in enumerate(shuffle(list(functions), len(functions)))
        ]
    finally:
        if collecting:
            gc.enable()
    return pd.DataFrame(rows, columns=["round", "order", "name", "latency_us"])


def ratio_interval(rows: pd.DataFrame, numerator: str, denominator: str, *, confidence: float = 0.95) -> dict:
    """Latency of `numerator` over that of `denominator`, as dict(ratio, low, high, n).

    The ratio is the median of the n per-round ratios; the interval is a percentile bootstrap of that median over rounds
    (a bias correction by jackknife is not consistent for a median).
    """
    if not 0 < confidence < 1:
        raise bad_value("confidence", confidence, "a number between 0 and 1")
    logs = _log_ratios(rows, numerator, denominator)
    ratio = float(np.exp(np.median(logs)))
    if len(logs) < 5:
        raise bad_value("rows", f"{len(logs)} rounds", "at least 5 for an interval")
    if np.ptp(logs) == 0:
        return {"ratio": ratio, "low": ratio, "high": ratio, "n": len(logs)}
    found = stats.bootstrap(
        (logs,),
        np.median,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = np.exp(found.confidence_interval)
    return {"ratio": ratio, "low": float(low), "high": float(high), "n": len(logs)}


def equivalent_within(rows: pd.DataFrame, a: str, b: str, margin: float) -> dict:
    """Two one-sided tests at 5 %: dict(ratio, low, high, equivalent).

    `equivalent` is true when the 90 % interval of the latency ratio a / b lies inside [1 / (1 + margin), 1 + margin].
    """
    if not 0 < margin < 1:
        raise bad_value("margin", margin, "a fraction between 0 and 1, such as 0.02")
    found = ratio_interval(rows, a, b, confidence=0.90)
    inside = 1 / (1 + margin) <= found["low"] and found["high"] <= 1 + margin
    return {"ratio": found["ratio"], "low": found["low"], "high": found["high"], "equivalent": bool(inside)}


def launch_cost_fit(n_launches: Sequence[float], latency_us: Sequence[float]) -> dict:
    """Least-squares line latency_us = intercept_us + slope_us * n_launches: dict(intercept_us, slope_us, r_squared)."""
    counts, times = np.asarray(n_launches, dtype=float), np.asarray(latency_us, dtype=float)
    if counts.ndim != 1 or counts.shape != times.shape:
        raise bad_value("latency_us", f"shape {times.shape}", f"one value per launch count, {counts.shape}")
    if len(np.unique(counts)) < 3:
        raise bad_value("n_launches", f"{len(np.unique(counts))} different counts", "at least 3")
    if not (np.isfinite(counts).all() and np.isfinite(times).all()):
        raise bad_value("latency_us", "a value that is not finite", "finite numbers")
    line = stats.linregress(counts, times)
    return {"intercept_us": float(line.intercept), "slope_us": float(line.slope), "r_squared": float(line.rvalue**2)}


def capture(function: Callable[[], object], *, warmup: int = 3) -> Callable[[], None]:
    """Record `function` in a CUDA graph and return its replay, whose time no longer holds Python or launch cost.

    The function must read and write the same tensors at every call; its results stay alive with the replay.
    """
    if not callable(function):
        raise bad_type("function", function, "a function without arguments")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay(_kept=kept) -> None:
        graph.replay()

    return replay


def _cpu_us(function: Callable[[], object], scratch: torch.Tensor) -> float:
    scratch.fill_(1)
    start = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start) / 1e3


def _cuda_us(function: Callable[[], object], scratch: torch.Tensor) -> float:
    with torch.cuda.device(scratch.device):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        scratch.fill_(1)  # also keeps the device busy while the host enqueues what follows
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3


def _log_ratios(rows: pd.DataFrame, numerator: str, denominator: str) -> np.ndarray:
    missing = {"round", "name", "latency_us"} - set(rows.columns)
    if missing:
        raise bad_value("rows", f"no column {sorted(missing)[0]!r}", "the rows of corey.benchmark.paired")
    for name in (numerator, denominator):
        if name not in set(rows["name"]):
            raise bad_value("name", repr(name), f"one of {sorted(set(rows['name']))}")
    if numerator == denominator:
        raise bad_value("denominator", repr(denominator), "a name other than the numerator")
    by_round = rows.pivot(index="round", columns="name", values="latency_us")[
        [numerator, denominator]
    ]  # raises on duplicates
    if by_round.isna().any(axis=None) or (by_round <= 0).any(axis=None):
        raise bad_value("rows", "a round with a missing or non-positive time", "both functions timed in every round")
    return np.log(by_round[numerator].to_numpy() / by_round[denominator].to_numpy())
