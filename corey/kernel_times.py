"""The GPU's time kernel by kernel, from torch.profiler, and which part of a prefill each kernel is."""

import re
from collections.abc import Callable, Iterable

import pandas as pd
import torch

OWN = {  # of corey's kernels, by the start of the name
    "add_rms_norm": "norm",
    "causal_conv1d": "conv",
    "histogram": "statistic",
    "scan_": "scan",
}
STOCK = {"selective_scan_fwd": "scan", "causal_conv1d": "conv"}  # anywhere in the name
GEMM = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk", re.IGNORECASE)
REDUCTION = re.compile("splitkreduce", re.IGNORECASE)  # adds up a product that was split, the one before it


def kernel_times(function: Callable[[], object]) -> pd.DataFrame:
    """Every kernel and copy that one call starts, in order: columns name, time_us."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        function()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    on_device.sort(key=lambda event: event.time_range.start)
    found = [(event.name, event.device_time_total) for event in on_device if not event.name.startswith("## ")]
    return pd.DataFrame(found, columns=["name", "time_us"])


def parts_of_prefill(names: Iterable[str]) -> list[str]:
    """The part of `corey.mamba` that each kernel of its forwards is, from names in the order in which they ran.

    A matrix product is known by the kernels around it: in_proj after a norm, x_proj and dt_proj after a convolution,
    out_proj after a scan, and lm_head after the norm that no convolution follows. What is left is "other".
    """
    names = list(names)
    own = [next((part for start, part in OWN.items() if name.startswith(start)), None) for name in names]
    parts, before, products = [], None, 0
    for i, name in enumerate(names):
        part = own[i] or "other"
        if own[i] in ("norm", "conv", "scan"):
            before, products = own[i], 0
        elif own[i] is None and GEMM.search(name):
            products += not REDUCTION.search(name)
            after = next((each for each in own[i + 1 :] if each), None)
            part = {
                "norm": "in_proj" if after == "conv" else "lm_head",
                "conv": "x_proj" if products <= 1 else "dt_proj",
                "scan": "out_proj",
            }.get(before, "other")
        parts.append(part)
    return parts


def parts_of_client(names: Iterable[str]) -> list[str]:
    """The same for transformers' model on the stock kernels: scan, conv, matrix products, or other."""

    def part(name: str) -> str:
        known = next((part for piece, part in STOCK.items() if piece in name), None)
        return known or ("matrix products" if GEMM.search(name) else "other")

    return [part(name) for name in names]
