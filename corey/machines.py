"""Rows of a CPU and of a GPU in sets of their own, so that a notebook can show the one beside the other.

Where a notebook on a CPU writes the set 03_chunk_sweep_latency, on a GPU it writes 03_chunk_sweep_gpu_latency. Both can
be committed, and each machine finds the other's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from corey import results


@dataclass(frozen=True)
class Side:
    """Rows of one machine, the name of its device, and the parameters that its notebook ran with."""

    device: str
    rows: pd.DataFrame
    parameters: Mapping


def set_name(notebook: str, suffix: str, device: str | torch.device) -> str:
    """The result set of a notebook's rows: 03_chunk_sweep_latency on a CPU, 03_chunk_sweep_gpu_latency on a GPU."""
    return f"{notebook}_{suffix}" if torch.device(device).type == "cpu" else f"{notebook}_gpu_{suffix}"


def sides(rows: pd.DataFrame, notebook: str, suffix: str, parameters: Mapping) -> list[Side]:
    """The rows measured here and, where they are committed, those of the other kind of machine.

    `parameters` are those of the run; its `device` is the torch device measured on.
    """
    device = parameters["device"]
    here = Side(results.device_name(device), rows, parameters)
    other = _other_set(notebook, suffix, device)
    if other not in results.names("committed"):
        return [here]
    kept = results.read_rows(other, "committed")
    return [here, Side(kept.device.iloc[0], kept, results.read_provenance(other, "committed")["parameters"])]


def gpu_side(found: list[Side]) -> Side | None:
    """The one of `sides` whose device is a GPU, if there is one."""
    return next((side for side in found if not results.is_cpu(side.device)), None)


def beside(notebook: str, suffix: str, device: str | torch.device) -> str:
    """A sentence on whether committed rows of the other kind of machine will be shown."""
    other = _other_set(notebook, suffix, device)
    if other in results.names("committed"):
        return f"beside this machine: committed rows of {results.read_rows(other, 'committed').device.iloc[0]}"
    return (
        f"no {'GPU' if '_gpu_' in other else 'CPU'} rows are committed yet: tables and figures show this machine alone"
    )


def _other_set(notebook: str, suffix: str, device: str | torch.device) -> str:
    return set_name(notebook, suffix, "cuda" if torch.device(device).type == "cpu" else "cpu")
