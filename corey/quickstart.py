"""What the two-minute tour looks at: inputs with a long memory, one setting at a time, and an edit of the scan."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from corey import chunk_study
from corey._check import bad_value
from corey.benchmark import paired
from corey.entropy import histogram_entropy
from corey.scan import TILE, scan_reset_ref, selective_scan
from corey.schedulers import Scheduler, get_scheduler

DISTRIBUTIONS = ("SiLU of normal", *chunk_study.DISTRIBUTIONS)
POLICIES = (
    "hist sampled-hist token-hist cheap-proxy variance-proxy kurtosis-proxy guarded-hist no-entropy random static shape"
).split()

# An edit to try: log(1 + e^x) without its logarithm, half a per cent off where the step is 0.01. (file, old, new)
SHORTER_SOFTPLUS = {
    "cpu": (
        "_cpu_kernel.py",
        "    return at_least(x, splat(ZERO)) + fma(twice * v, p, twice)",
        "    return at_least(x, splat(ZERO)) + e",
    ),
    "cuda": (
        "common.cuh",
        "    return __fmaf_rn(e, log1p_over<X>(e), fmaxf(x, 0.0f));",
        "    return fmaxf(x, 0.0f) + e;",
    ),
}


def long_memory_inputs(
    d_inner: int,
    seqlen: int,
    *,
    distribution: str = "SiLU of normal",
    d_state: int = 16,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Arguments of `selective_scan` (batch 1, float32) whose state remembers about a thousand tokens.

    u is of one of `DISTRIBUTIONS` and the rest does not depend on which; with softplus and this bias the step is near
    0.01, and A decays at rates 0.1 to 1.
    """
    if distribution not in DISTRIBUTIONS:
        raise bad_value("distribution", repr(distribution), f"one of {', '.join(DISTRIBUTIONS)}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    u = torch.nn.functional.silu(normal(1, d_inner, seqlen))
    if distribution in chunk_study.DISTRIBUTIONS:
        u = chunk_study.draw(distribution, u.shape, seed=seed)
    inputs = {
        "u": u,  # (B, D, L)
        "delta": 0.5 * normal(1, d_inner, seqlen),  # (B, D, L)
        "A": -torch.linspace(0.1, 1.0, d_state).repeat(d_inner, 1),  # (D, N)
        "B": normal(1, d_state, seqlen),  # (B, N, L)
        "C": normal(1, d_state, seqlen),  # (B, N, L)
        "delta_bias": torch.full((d_inner,), -4.6),  # (D,); softplus(-4.6) = 0.01
    }
    return {name: x.to(device) for name, x in inputs.items()}


@dataclass(frozen=True)
class Tour:
    """What one setting shows.

    histogram: rows (bin_centre, probability). entropy_nats: of that histogram. chunk_size: the policy's choice.
    latency: rows (chunk_size, median_us, low_us, high_us) with quartiles. errors: rows (form, token, relative_error).
    relative_l2: of the published loop's y at that chunk.
    """

    policy: str
    num_bins: int
    histogram: pd.DataFrame
    entropy_nats: float
    chunk_size: int
    latency: pd.DataFrame
    errors: pd.DataFrame
    relative_l2: float


def tour(
    *,
    d_inner: int,
    seqlen: int,
    distribution: str,
    num_bins: int,
    policy: str,
    seed: int = 0,
    device: str = "cpu",
    rounds: int = 9,
) -> Tour:
    """Measure one setting: histogram, entropy, chosen chunk, the scan's latency at every chunk, the loop's error."""
    inputs = long_memory_inputs(d_inner, seqlen, distribution=distribution, seed=seed, device=device)
    u, scheduler = inputs["u"], build_policy(policy, num_bins=num_bins, seed=seed)
    chunk_size = int(scheduler(u))
    y = selective_scan(**inputs, delta_softplus=True)
    reset = scan_reset_ref(**inputs, delta_softplus=True, chunk_size=chunk_size)
    one_call = selective_scan(**inputs, delta_softplus=True, chunk_size=chunk_size)
    return Tour(
        policy=scheduler.name,
        num_bins=num_bins,
        histogram=histogram_rows(u, num_bins=num_bins),
        entropy_nats=histogram_entropy(u, num_bins=num_bins).item(),
        chunk_size=chunk_size,
        latency=latency_rows(inputs, {chunk_size, *chunks_within(seqlen)}, rounds=rounds, seed=seed),
        errors=error_along_sequence({"published loop": reset, "one call": one_call}, y, window=max(32, seqlen // 64)),
        relative_l2=((reset - y).norm() / y.norm()).item(),
    )


def tour_rows(seen: Tour, device: str) -> pd.DataFrame:
    """The numbers of a setting as rows (quantity, chunk_size, value, low, high, device); low and high are quartiles."""
    latency = seen.latency.set_axis(["chunk_size", "low", "value", "high"], axis=1).assign(quantity="scan_latency_us")
    single = pd.DataFrame(
        [("entropy_nats", seen.entropy_nats), ("reset_loop_relative_l2", seen.relative_l2)],
        columns=["quantity", "value"],
    ).assign(chunk_size=seen.chunk_size)
    rows = pd.concat([single, latency], ignore_index=True).assign(device=device)
    return rows[["quantity", "chunk_size", "value", "low", "high", "device"]]


def build_policy(name: str, *, num_bins: int, seed: int = 0) -> Scheduler:
    """One of `POLICIES` over the range of the published routed runs, chunks 128 to 512."""
    if name not in POLICIES:
        raise bad_value("policy", repr(name), f"one of {', '.join(POLICIES)}")
    own = {"static": {}, "shape": {}, "random": {"seed": seed}}
    return get_scheduler(name, **own.get(name, {"num_bins": num_bins}))


def chunks_within(seqlen: int) -> list[int]:
    """The powers of two from one tile to 2048 tokens that are no longer than the sequence; one tile at least."""
    return [TILE] + [TILE << power for power in range(1, 5) if TILE << power <= seqlen]


def latency_rows(inputs: Mapping[str, torch.Tensor], chunk_sizes, *, rounds: int, seed: int) -> pd.DataFrame:
    """Rows (chunk_size, median_us, low_us, high_us): median and quartiles of one scan, in paired rounds."""
    scans = {c: lambda c=c: selective_scan(**inputs, delta_softplus=True, chunk_size=c) for c in sorted(chunk_sizes)}
    times = paired(scans, rounds=rounds, seed=seed, device=inputs["u"].device)
    quartiles = times.groupby("name").latency_us.quantile([0.25, 0.5, 0.75]).unstack()
    quartiles.columns = ["low_us", "median_us", "high_us"]
    return quartiles.rename_axis("chunk_size").reset_index()


def try_scan(source: str, inputs: Mapping[str, torch.Tensor], truth: torch.Tensor, *, rounds: int = 15) -> dict:
    """One call of the scan and `rounds` more, as a row that `source` names.

    first_call_s: with what it compiles or reads from disk. latency_us: the median of the others. relative_error: L2,
    against `truth`. bitwise_equal: to it.
    """
    start = time.perf_counter()
    y = selective_scan(**inputs, delta_softplus=True)
    error = ((y - truth).norm() / truth.norm()).item()  # waits for the device
    first_call_s = time.perf_counter() - start
    times = paired({"scan": lambda: selective_scan(**inputs, delta_softplus=True)}, rounds=rounds, device=y.device)
    return {
        "source": source,
        "first_call_s": first_call_s,
        "latency_us": times.latency_us.median(),
        "relative_error": error,
        "bitwise_equal": torch.equal(y, truth),
    }


def histogram_rows(x: torch.Tensor, *, num_bins: int) -> pd.DataFrame:
    """The min-max histogram whose entropy is taken, as rows (bin_centre, probability)."""
    x = x.float().flatten().cpu()
    counts, edges = torch.histogram(x, bins=num_bins)
    return pd.DataFrame({"bin_centre": (edges[:-1] + edges[1:]) / 2, "probability": counts / x.numel()})


def error_along_sequence(outputs: Mapping[str, torch.Tensor], truth: torch.Tensor, *, window: int = 32) -> pd.DataFrame:
    """Relative L2 error over the channels of every `window` tokens, as rows (form, token, relative_error).

    Outputs and truth are (B, D, L); tokens after the last whole window are left out.
    """
    windows = truth.unfold(-1, window, window)  # (B, D, L / window, window)
    scale = torch.linalg.vector_norm(windows, dim=(0, 1, 3)).mean()
    tables = []
    for form, y in outputs.items():
        error = torch.linalg.vector_norm(y.unfold(-1, window, window) - windows, dim=(0, 1, 3)) / scale  # (L / window,)
        token = torch.arange(len(error)) * window + window // 2
        tables.append(pd.DataFrame({"form": form, "token": token, "relative_error": error.cpu()}))
    return pd.concat(tables, ignore_index=True)
