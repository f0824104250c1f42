"""The device's own time of a call whose inputs come from memory, and the limits of a GPU to hold it against.

The calls on several sets of inputs, together larger than any L2 cache, are recorded in one CUDA graph; a replay between
two events, over the calls in it, is the time of one call. What is compared is replayed in the same rounds of
`corey.benchmark.paired`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch

from corey import benchmark, clocks

COLD_BYTES = 240e6  # of all sets together: four times the L2 of an H200
MAX_SETS = 16
CALLS = 16  # a graph holds at least so many, so that what the flush before it leaves in the cache does not count


@dataclass(frozen=True)
class Limits:
    """What bounds a kernel here: the clock is the highest the GPU runs at, the copy counts bytes read and written."""

    multiprocessors: int
    clock_hz: float
    copy_bytes_per_s: float


def measure_limits(rounds: int) -> Limits:
    """The limits of the current CUDA device; the rate of a copy is that of 512 MiB."""
    from cuda.core import Device

    index = torch.cuda.current_device()
    x = torch.zeros(1 << 28, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    rows = time_calls({"copy": [lambda: y.copy_(x)] * 4}, rounds=rounds, seed=0, device="cuda")
    rate = 2 * x.nbytes / (rows.latency_us.median() * 1e-6)
    clock = Device(index).properties.clock_rate * 1e3  # kHz
    return Limits(torch.cuda.get_device_properties(index).multi_processor_count, clock, rate)


def time_calls(calls: Mapping[str, Sequence[Callable]], *, rounds: int, seed: int, device) -> pd.DataFrame:
    """Rows of `benchmark.paired` in which latency_us is that of one call; each name's calls make one graph."""
    graphs = {
        name: clocks.on_device(lambda each=each: [call() for call in each], device) for name, each in calls.items()
    }
    rows = benchmark.paired(graphs, rounds=rounds, seed=seed, device=device)
    return rows.assign(latency_us=rows.latency_us / rows.name.map({name: len(each) for name, each in calls.items()}))


def rotated(function: Callable, sets: Sequence, calls: int = CALLS) -> list[Callable]:
    """Calls of `function` on one set after another, over again until there are at least so many."""
    return [partial(function, each) for each in list(sets) * -(-calls // len(sets))]


def num_sets(nbytes: int) -> int:
    """How many sets of so many bytes are beyond any cache together, from 2 to MAX_SETS."""
    return min(max(2, int(COLD_BYTES // nbytes) + 1), MAX_SETS)


def ratio(times: pd.DataFrame, numerator: str, denominator: str, name: str) -> dict:
    """The columns name, name_low and name_high: a ratio of latencies and its 95 % interval.

    They are NaN where the numerator was not measured.
    """
    if numerator not in set(times.name):
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    found = benchmark.ratio_interval(times, numerator, denominator)
    return {name: found["ratio"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
