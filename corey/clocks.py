"""Two ways to put a call before `corey.benchmark.paired` on a GPU, and the interval of a median.

`from_idle` starts with the device at rest, so that the time holds all that the host does. `on_device` replays a CUDA
graph, whose time is the device's alone. On a CPU both are the call itself.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from corey import benchmark


def from_idle(function: Callable[[], object], device: str | torch.device) -> Callable[[], object]:
    """`function`, begun only when the GPU has nothing left to do: the flush before a timed call would hide the host."""
    if torch.device(device).type == "cpu":
        return function

    def after_the_flush() -> object:
        torch.cuda.synchronize(device)
        return function()

    return after_the_flush


def on_device(function: Callable[[], object], device: str | torch.device) -> Callable[[], object]:
    """The replay of `function` from a CUDA graph; `function` must not read anything back to the host."""
    return function if torch.device(device).type == "cpu" else benchmark.capture(function)


def median_interval(
    values: Sequence[float], generator: np.random.Generator, resamples: int = 2000
) -> tuple[float, float, float]:
    """The median and its 95 % percentile bootstrap interval."""
    values = np.asarray(values)
    medians = np.median(generator.choice(values, (resamples, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)
