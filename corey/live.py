"""Kernel sources to try things on: an edit is live at the operators' next call, in the checkout and in a copy of it.

On CUDA the sources are kernels/*.cu and *.cuh, compiled by NVRTC; on the CPU it is corey/_cpu_kernel.py, compiled by
Numba. Both are looked at every 0.2 s and compiled again where their hash is new. A call inside a CUDA graph that was
captured before stays as it was captured.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from corey import _cuda
from corey._check import bad_value
from corey.paths import KERNELS

LOOK_S = 0.25  # a little more than the 0.2 s after which the operators look at their sources again


@contextmanager
def copied_sources(device: str | torch.device = "cpu") -> Iterator[Path]:
    """Inside the block the operators run from a copy of the device's sources, whose folder this yields.

    The copy has the hash of the original, so nothing is compiled until it is edited. One block at a time: it holds for
    the whole process.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise bad_value("device", repr(str(device)), "'cpu' or 'cuda[:index]'")
    with tempfile.TemporaryDirectory(prefix="corey-live-") as folder:
        if device.type == "cuda":
            sources, place = [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")], _cuda.sources_in
        else:
            from corey import _cpu  # Numba takes a second to import

            sources, place = [_cpu.SOURCE], _cpu.source_in
        for source in sources:
            shutil.copy(source, folder)
        with place(Path(folder)):
            yield Path(folder)


def edit(path: Path, old: str, new: str) -> None:
    """Replace the one place where `old` stands in a source, and wait until a call would see it.

    Raises ValueError where `old` does not stand there exactly once; the file is then as it was.
    """
    text = path.read_text()
    if text.count(old) != 1:
        raise bad_value("old", f"{text.count(old)} places in {path.name} that read {old!r}", "one")
    path.write_text(text.replace(old, new))
    time.sleep(LOOK_S)
