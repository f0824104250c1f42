"""The least time that a GPU allows each part of a prefill, from its bytes, its matrix products and its exponentials."""

from dataclasses import dataclass

import torch

from corey.cold_timing import Limits, time_calls
from corey.kernel_speed import scan_floors
from corey.mamba import MambaConfig

GEMM_SIZE = 8192  # of the square matrix product whose rate is the highest that is expected here


@dataclass(frozen=True)
class Floor:
    """floor_us of all layers, and what sets it: bytes, matrix products or special functions."""

    floor_us: float
    bound: str


def measure_gemm_rate(
    rounds: int, *, dtype: torch.dtype = torch.bfloat16, size: int = GEMM_SIZE, device="cuda"
) -> float:
    """FLOP/s of a large square matrix product of random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rows = time_calls({"gemm": [lambda: a @ b] * 4}, rounds=rounds, seed=0, device=device)
    return 2 * size**3 / (rows.latency_us.median() * 1e-6)


def prefill_floors(
    config: MambaConfig, batch: int, seqlen: int, itemsize: int, limits: Limits, flops_per_s: float
) -> dict[str, Floor]:
    """The floor of each part that `kernel_times.parts_of_prefill` names, but for "other" and "statistic".

    A matrix product reads both operands and writes the product once. The norm reads x and the float32 residual and
    writes both. The convolution reads its half of in_proj and writes as much. The scan's floors are `scan_floors`.
    """
    rows, c = batch * seqlen, config

    def product(rows: int, columns: int, depth: int, layers: int) -> Floor:
        moved = (rows * depth + columns * depth + rows * columns) * itemsize / limits.copy_bytes_per_s
        compute = 2 * rows * columns * depth / flops_per_s
        return Floor(layers * max(moved, compute) * 1e6, "bytes" if moved > compute else "matrix products")

    def copied(nbytes: float) -> Floor:
        return Floor(nbytes / limits.copy_bytes_per_s * 1e6, "bytes")

    scan = scan_floors(batch, c.d_inner, seqlen, c.d_state, itemsize, limits)
    name = max(scan, key=scan.get)
    bounds = {"hbm_floor_us": "bytes", "mufu_floor_us": "special functions", "issue_floor_us": "instructions"}
    return {
        "in_proj": product(rows, 2 * c.d_inner, c.d_model, c.n_layer),
        "x_proj": product(rows, c.dt_rank + 2 * c.d_state, c.d_inner, c.n_layer),
        "dt_proj": product(rows, c.d_inner, c.dt_rank, c.n_layer),
        "out_proj": product(rows, c.d_model, c.d_inner, c.n_layer),
        "lm_head": product(batch, c.vocab_size, c.d_model, 1),
        "norm": copied(c.n_layer * rows * c.d_model * 2 * (itemsize + 4)),
        "conv": copied(c.n_layer * 2 * rows * c.d_inner * itemsize),
        "scan": Floor(c.n_layer * scan[name], bounds[name]),
    }
