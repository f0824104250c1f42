"""How fast the CUDA kernels are on the GPU at hand: `python -m corey.kernel_speed [--quick]`.

The scan is timed against mamba-ssm's extension module `selective_scan_cuda`, where that is installed, the operators
beside it against a device copy, by the method of corey/cold_timing.py. Rows go to the sets kernel_speed_scan,
kernel_speed_operators and kernel_speed_host.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import pandas as pd
import torch

from corey import paths, results
from corey.cold_timing import CALLS, COLD_BYTES, Limits, measure_limits, num_sets, ratio, rotated, time_calls
from corey.operator_speed import operator_rows, operators
from corey.scan import selective_scan

SHAPES = (  # (B, D, L)
    (1, 1024, 4096),
    (1, 1536, 4096),
    (1, 2048, 4096),
    (1, 4096, 4096),
    (1, 5120, 4096),
    (8, 2048, 4096),
    (8, 5120, 2048),
    (1, 1024, 1024),
    (1, 2048, 1024),
    (1, 2048, 16384),
    (1, 2048, 65536),
    (1, 512, 16384),
    (1, 256, 16384),
    (1, 64, 65536),
    (1, 2048, 4097),
    (64, 2048, 128),
)
QUICK_SHAPES = ((1, 2048, 4096), (8, 2048, 4096), (1, 256, 16384))
STATES = 16
DTYPE = torch.bfloat16
ROUNDS, QUICK_ROUNDS = 30, 7

MUFU_A_CLOCK = 16  # exponentials and reciprocals that a multiprocessor starts a clock, on compute capability 8 to 12
LANES_A_CLOCK = 128  # lane-instructions that it issues a clock


# ---- the scan against the stock kernel -------------------------------------------------------------------------------


def scan_floors(batch: int, dim: int, seqlen: int, states: int, itemsize: int, limits: Limits) -> dict:
    """The least time, in us, that each limit allows a scan with gate and softplus.

    hbm: u, delta, z, B and C read once and y and the last state written, at the rate of a copy. mufu: for every channel
    and token one exponential a state, one for softplus, and an exponential and a reciprocal for the gate. issue: the
    leanest inner loop counted so far, 5.5 lane-instructions a state and 25 a token.
    """
    steps = batch * dim * seqlen
    moved = (4 * steps + 2 * batch * states * seqlen) * itemsize + 4 * batch * dim * states
    clocks_a_s = limits.multiprocessors * limits.clock_hz
    return {
        "hbm_floor_us": moved / limits.copy_bytes_per_s * 1e6,
        "mufu_floor_us": steps * (states + 3) / (MUFU_A_CLOCK * clocks_a_s) * 1e6,
        "issue_floor_us": steps * (5.5 * states + 25) / (LANES_A_CLOCK * clocks_a_s) * 1e6,
    }


def stock_scan() -> tuple[Callable | None, str]:
    """mamba-ssm's forward and its version, or None and what is missing."""
    try:
        module = importlib.import_module("selective_scan_cuda")
    except ImportError as error:
        return None, f"not measured: {error}"
    try:
        return module.fwd, f"mamba-ssm {importlib.metadata.version('mamba-ssm')}"
    except importlib.metadata.PackageNotFoundError:
        return module.fwd, getattr(module, "__version__", "of unknown version")


def scan_inputs(batch: int, dim: int, seqlen: int, *, seed: int, device="cuda", dtype=DTYPE) -> dict[str, dict]:
    """Arguments of the scan with every option on, as {"channel_major": ..., "token_major": ...} of equal values.

    Token-major B and C are slices of one projection (B, L, R + 2 N), as a Mamba block has them.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    rank = -(-dim // 256) * 8  # Mamba's D / 32, in whole vectors
    rows = {name: normal(batch, seqlen, dim).to(dtype).transpose(1, 2) for name in ("u", "delta", "z")}
    projection = normal(batch, 1, seqlen, rank + 2 * STATES).to(dtype).transpose(2, 3)
    projected = {"B": projection[:, :, rank : rank + STATES], "C": projection[:, :, rank + STATES :]}
    weights = {
        "A": -torch.arange(1.0, STATES + 1, device=device).repeat(dim, 1),
        "D": normal(dim),
        "delta_bias": 0.3 * normal(dim) - 4.6,
        "delta_softplus": True,
    }
    token_major = rows | projected
    channel_major = {name: x.contiguous() for name, x in token_major.items()}
    return {"channel_major": channel_major | weights, "token_major": token_major | weights}


def scan_resources(inputs: Mapping) -> dict:
    """Launches of one call, and what the last of them, the one that writes y, takes of a multiprocessor."""
    from corey import _scan_cuda

    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
    plan = _scan_cuda._plan(*(inputs[name] for name in names), None, None)
    function, grid, threads, shared = plan.launches[-1]
    return {
        "launches": len(plan.launches),
        "registers": function.registers,
        "spilled_bytes": function.local_bytes,
        "shared_bytes": function.shared_bytes + shared,
        "blocks": grid[0],
        "blocks_per_sm": function.blocks_per_sm(threads, shared),
    }


def scan_rows(shape, limits: Limits, stock: Callable | None, *, rounds: int, seed: int, device="cuda") -> list[dict]:
    """Two rows, one a layout of u, delta, z, B and C, with times, ratios to stock and floors.

    stock_us is the stock kernel's own time and copies_us what it costs to give it its layout. `speedup` counts both,
    `kernel_speedup` the kernels alone; each with its 95 % interval. relative_error is that to the stock output.
    """
    batch, dim, seqlen = shape
    count = num_sets(4 * batch * dim * seqlen * DTYPE.itemsize)
    sets = [scan_inputs(batch, dim, seqlen, seed=seed + i, device=device) for i in range(count)]
    calls = {layout: rotated(lambda x: selective_scan(**x), [x[layout] for x in sets]) for layout in sets[0]}
    error = float("nan")
    if stock is not None:
        calls["stock"] = rotated(partial(_stock_call, stock), [x["channel_major"] for x in sets])
        calls["copies"] = rotated(_copies, [x["token_major"] for x in sets])
        error = _relative_error(selective_scan(**sets[0]["token_major"]), calls["stock"][0]())
    times = time_calls(calls, rounds=rounds, seed=seed, device=device)
    if stock is not None:
        times = pd.concat([times, _sum(times, "stock", "copies", "stock with copies")], ignore_index=True)
    median = times.groupby("name").latency_us.median()
    floors = scan_floors(batch, dim, seqlen, STATES, DTYPE.itemsize, limits)
    rows = []
    for layout in ("channel_major", "token_major"):
        token_major = layout == "token_major"
        row = {"batch": batch, "dim": dim, "seqlen": seqlen, "states": STATES, "dtype": str(DTYPE), "layout": layout}
        row |= {"latency_us": median[layout], "stock_us": median.get("stock", float("nan"))}
        row["copies_us"] = median.get("copies", float("nan")) if token_major else 0.0
        row |= ratio(times, "stock with copies" if token_major else "stock", layout, "speedup")
        row |= ratio(times, "stock", layout, "kernel_speedup")
        row |= floors | {"over_floor": median[layout] / max(floors.values()), "relative_error": error}
        row |= scan_resources(sets[0][layout])
        rows.append(row | {"n_rounds": rounds, "n_sets": count, "device": str(device)})
    return rows


def _stock_call(stock, x):
    return stock(*(x[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), x["delta_softplus"])


def _copies(x):
    return [x[name].contiguous() for name in ("u", "delta", "z", "B", "C")]


def _relative_error(y, stock_outputs) -> float:
    want = stock_outputs[-1].double()  # out, the states at chunk ends, out gated by z
    return ((y.double() - want).norm() / want.norm()).item()


def _sum(times: pd.DataFrame, a: str, b: str, name: str) -> pd.DataFrame:
    """Rows of what takes as long as both, round by round."""
    first, second = (times[times.name == each].set_index("round") for each in (a, b))
    return first.assign(name=name, latency_us=first.latency_us + second.latency_us).reset_index()


# ---- the host --------------------------------------------------------------------------------------------------------


def host_rows(stock: Callable | None, *, repeats: int, device="cuda") -> list[dict]:
    """What a call costs the host, in us: eager calls behind one another, and the first call of a process and a variant.

    The eager shape is so small that the device keeps up, and the median is over `repeats` runs of 200 calls.
    """
    inputs = scan_inputs(1, 256, 128, seed=0, device=device)["channel_major"]
    chunk = torch.tensor(128, dtype=torch.int32, device=device)
    calls = {
        "selective_scan": lambda: selective_scan(**inputs),
        "selective_scan, chunk on the device": lambda: selective_scan(**inputs, chunk_size=chunk),
    }
    if stock is not None:
        calls["stock"] = lambda: _stock_call(stock, inputs)
    rows = [{"quantity": f"eager call, {name}", "latency_us": _wall_us(call, repeats)} for name, call in calls.items()]
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "warm"):
            rows += [
                {"quantity": f"{name}, {state} cache", "latency_us": us} for name, us in _first_calls(cache).items()
            ]
    return [row | {"device": str(device)} for row in rows]


def _wall_us(call: Callable, repeats: int, calls: int = 200) -> float:
    for _ in range(calls):
        call()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        found.append((time.perf_counter_ns() - start) / 1e3 / calls)
    return statistics.median(found)


_FIRST_CALLS = """
import json, time, torch
from corey import kernel_speed, selective_scan
found = {}
for name, dtype in (("first call of a process", torch.bfloat16), ("first call of another variant", torch.float32)):
    inputs = kernel_speed.scan_inputs(1, 256, 256, seed=0, dtype=dtype)["token_major"]
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    selective_scan(**inputs)
    torch.cuda.synchronize()
    found[name] = (time.perf_counter_ns() - start) / 1e3
print(json.dumps(found))
"""


def _first_calls(cache: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_CALLS],
        cwd=paths.ROOT,
        env=os.environ | {"COREY_CACHE": cache, "CUDA_CACHE_PATH": cache},  # CUDA's own caches are as empty
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


# ---- the table -------------------------------------------------------------------------------------------------------


def print_scan(rows: pd.DataFrame) -> None:
    """One line a shape: times in us, then how many times faster than stock, and over the highest floor."""
    print(f"{'(B, D, L)':>17} {'stock':>8} {'copies':>7} {'ours cm':>8} {'tm':>8} | {'x cm':>5} {'x tm':>5}", end=" ")
    print(f"{'+copies':>7} | {'floor':>12} {'over':>5} | regs shared/KiB cm, tm")
    for shape, pair in rows.groupby(["batch", "dim", "seqlen"], sort=False):
        cm, tm = (pair[pair.layout == layout].iloc[0] for layout in ("channel_major", "token_major"))
        floors = {name: cm[f"{name}_floor_us"] for name in ("hbm", "mufu", "issue")}
        name = max(floors, key=floors.get)
        print(
            f"{shape!s:>17} {cm.stock_us:8.1f} {tm.copies_us:7.1f} {cm.latency_us:8.1f} {tm.latency_us:8.1f} | "
            f"{cm.speedup:5.2f} {tm.kernel_speedup:5.2f} {tm.speedup:7.2f} | {name:>5} {floors[name]:6.1f} "
            f"{cm.over_floor:5.2f} | {cm.registers}, {tm.registers} "
            f"{cm.shared_bytes / 1024:.0f}, {tm.shared_bytes / 1024:.0f}"
        )


def markdown(rows: pd.DataFrame) -> str:
    """The committed rows as a table: medians in us, ratios to stock, and how far from the highest floor."""
    lines = [
        "| (B, D, L) | stock, us | ours, channel-major | ours, token-major | times faster | the same, token-major, "
        "with stock's copies | floor, us | over it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, pair in rows.groupby(["batch", "dim", "seqlen"], sort=False):
        cm, tm = (pair[pair.layout == layout].iloc[0] for layout in ("channel_major", "token_major"))
        floor = max(cm.hbm_floor_us, cm.mufu_floor_us, cm.issue_floor_us)
        lines.append(
            f"| {shape} | {cm.stock_us:.1f} | {cm.latency_us:.1f} | {tm.latency_us:.1f} | {cm.speedup:.2f} | "
            f"{tm.speedup:.2f} | {floor:.1f} | {cm.over_floor:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corey.kernel_speed", description="Time the CUDA kernels.")
    parser.add_argument("--quick", action="store_true", help="three shapes and fewer rounds")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the committed rows; measures nothing"
    )
    asked = parser.parse_args(arguments)
    quick = asked.quick
    if asked.markdown:
        print(markdown(results.read_rows("kernel_speed_scan", "committed")))
        return 0
    if not torch.cuda.is_available():
        print("corey.kernel_speed measures CUDA kernels, and torch sees no CUDA device here", file=sys.stderr)
        return 1
    rounds, shapes, seed = (QUICK_ROUNDS, QUICK_SHAPES, 0) if quick else (ROUNDS, SHAPES, 0)
    stock, version = stock_scan()
    limits = measure_limits(rounds)
    parameters = {"rounds": rounds, "seed": seed, "stock": version, "cold_bytes": COLD_BYTES, "calls": CALLS}
    parameters |= asdict(limits)
    print(f"{results.machine('cuda')}\nstock scan: {version}; copy {limits.copy_bytes_per_s / 1e12:.2f} TB/s")

    rows = []
    for shape in shapes:
        rows += scan_rows(shape, limits, stock, rounds=rounds, seed=seed)
        torch.cuda.empty_cache()
    results.write_rows(rows, "kernel_speed_scan", parameters=parameters)
    print_scan(pd.DataFrame(rows))

    rows = operator_rows(operators(), limits, rounds=rounds, seed=seed)
    results.write_rows(rows, "kernel_speed_operators", parameters=parameters)
    for row in rows:
        share = f"{row['copy_share']:5.0%} of a copy" if row["copy_share"] == row["copy_share"] else ""
        name = f"{row['operator']}, {row['variant']} {row['shape']}"
        print(f"{name:>52} {row['latency_us']:7.2f} us, floor {row['floor_us']:6.2f} {share}")

    rows = host_rows(stock, repeats=rounds)
    results.write_rows(rows, "kernel_speed_host", parameters=parameters)
    for row in rows:
        print(f"{row['quantity']:>52} {row['latency_us']:10.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
