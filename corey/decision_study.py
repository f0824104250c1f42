"""What it costs to decide on a chunk: each policy's statistic, its decision, and both with the scan after them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import pandas as pd
from torch import Tensor

from corey import benchmark
from corey.clocks import from_idle, median_interval, on_device
from corey.cold_calls import cold_calls, in_turn, input_sets
from corey.scan import selective_scan
from corey.schedulers import SCHEDULERS, Scheduler, get_scheduler

STEPS = ("statistic", "decision", "decision and scan", "captured")
WITHOUT_HOST = ("static", "device-hist")  # nothing is read back, so decision and scan fit in one CUDA graph


def measured_policies(device_type: str) -> list[str]:
    """The names of `SCHEDULERS` whose cost is measured on "cpu" or "cuda".

    A guarded policy costs what its inner one does and the oracle is a look-up, so both stay out; the decision on the
    device needs one.
    """
    left_out = ("guarded-", "oracle", *(["device-"] if device_type == "cpu" else []))
    return [name for name in SCHEDULERS if not name.startswith(left_out)]


def decision_rows(inputs: Mapping, *, rounds: int, seed: int) -> pd.DataFrame:
    """Paired timings of every policy on u of the scan's arguments: the rows of `benchmark.paired` with scheduler, step.

    "statistic": the number alone, on the device. "decision": the policy from an idle device until its chunk is known
    where the scan needs it. "decision and scan": both, from an idle device. "captured", for policies that read nothing
    back: decision and scan on the device, by graph replay on a GPU. The scan alone is "captured" of "static".
    """
    device = inputs["u"].device
    functions, columns, passes = {}, {}, {}
    sets = input_sets(inputs)
    for policy in measured_policies(device.type):
        for step, function in _steps(policy, get_scheduler(policy)):
            replayed = step in ("statistic", "captured")
            calls = cold_calls(function, sets) if replayed else [partial(function, inputs)]
            name, clock = f"{policy} {step}", on_device if replayed else from_idle
            functions[name] = clock(partial(in_turn, calls), device)
            columns[name], passes[name] = (policy, step), len(calls)
    rows = benchmark.paired(functions, rounds=rounds, seed=seed, device=device)
    rows["latency_us"] /= rows.name.map(passes)
    rows[["scheduler", "step"]] = [columns[name] for name in rows.name]
    return rows


def decision_costs(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """One row for each policy and step of `decision_rows`: median_us with its 95 % interval low_us, high_us, and n.

    slowdown, with low and high, is "decision and scan" over that of "static", a scan that nothing was decided for.
    """
    generator = np.random.default_rng(seed)
    groups = dict(list(rows.groupby(["scheduler", "step"])))
    found = []
    for policy, step in ((policy, step) for policy in SCHEDULERS for step in STEPS if (policy, step) in groups):
        latency = groups[policy, step].latency_us
        row = {"scheduler": policy, "step": step} | dict(
            zip(("median_us", "low_us", "high_us"), median_interval(latency, generator))
        )
        if step == "decision and scan" and policy != "static":
            ratio = benchmark.ratio_interval(rows, f"{policy} {step}", f"static {step}")
            row |= {"slowdown": ratio["ratio"], "low": ratio["low"], "high": ratio["high"]}
        found.append(row | {"n": len(latency)})
    return pd.DataFrame(found)


def scan_alone_us(costs: pd.DataFrame) -> float:
    """The median time of the scan itself on the device, from a table of `decision_costs`."""
    return float(costs[(costs.scheduler == "static") & (costs.step == "captured")].median_us.iloc[0])


def _steps(policy: str, scheduler: Scheduler) -> Iterator[tuple[str, Callable[[Mapping], object]]]:
    def decide_and_scan(inputs: Mapping) -> Tensor:
        return selective_scan(**inputs, chunk_size=scheduler(inputs["u"]))

    if scheduler.statistic is not None:
        yield "statistic", lambda inputs: scheduler.statistic(inputs["u"])
    yield "decision", lambda inputs: scheduler(inputs["u"])
    yield "decision and scan", decide_and_scan
    if policy in WITHOUT_HOST:
        yield "captured", decide_and_scan
