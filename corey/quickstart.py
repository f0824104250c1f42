"""Inputs and small tables of the two-minute tour."""

from collections.abc import Mapping

import pandas as pd
import torch

from corey.entropy import histogram_entropy

# An edit to try: log(1 + e^x) without its logarithm, half a per cent off where the step is 0.01. (file, old, new)
SHORTER_SOFTPLUS = {
    "cpu": (
        "_cpu_kernel.py",
        "    return at_least(x, splat(ZERO)) + fma(twice * v, p, twice)",
        "    return at_least(x, splat(ZERO)) + e",
    ),
    "cuda": ("common.cuh", "    return __fmaf_rn(e, log1p_over(e), fmaxf(x, 0.0f));", "    return fmaxf(x, 0.0f) + e;"),
}

def long_memory_inputs(
    d_inner: int, seqlen: int, *, d_state: int = 16, seed: int = 0, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Arguments of `selective_scan` (batch 1, float32) whose state remembers about a thousand tokens.

    u is the SiLU of normal noise; with softplus and this bias the step is near 0.01, and A decays at rates 0.1 to 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "u": torch.nn.functional.silu(normal(1, d_inner, seqlen)),  # (B, D, L)
        "delta": 0.5 * normal(1, d_inner, seqlen),  # (B, D, L)
        "A": -torch.linspace(0.1, 1.0, d_state).repeat(d_inner, 1),  # (D, N)
        "B": normal(1, d_state, seqlen),  # (B, N, L)
        "C": normal(1, d_state, seqlen),  # (B, N, L)
        "delta_bias": torch.full((d_inner,), -4.6),  # (D,); softplus(-4.6) = 0.01
    }
    return {name: x.to(device) for name, x in inputs.items()}


def histogram_rows(x: torch.Tensor, *, num_bins: int) -> pd.DataFrame:
    """The min-max histogram whose entropy is taken, as rows (bin_centre, probability, entropy_nats)."""
    x = x.float().flatten().cpu()
    counts, edges = torch.histogram(x, bins=num_bins)
    centres = (edges[:-1] + edges[1:]) / 2
    entropy_nats = histogram_entropy(x, num_bins=num_bins).item()
    return pd.DataFrame({"bin_centre": centres, "probability": counts / x.numel(), "entropy_nats": entropy_nats})


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
