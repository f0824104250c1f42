"""The Hadamard transform on tensor cores, its source run on the CPU: right values, and breaks that are noticed."""

from contextlib import nullcontext

import pytest
import torch
from emulation import Emulation, edit, skip_without_compiler

from corey import _hadamard_cuda
from corey.hadamard import hadamard_transform

WIDTH = _hadamard_cuda.WIDEST


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    """The transform of CPU tensors by the kernel on two multiprocessors, over NaN; `change` edits its source."""
    skip_without_compiler()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, shape: x.new_full(shape, torch.nan))
    monkeypatch.setattr(_hadamard_cuda, "on_tensor_cores", lambda *_: True)
    monkeypatch.setattr(_hadamard_cuda, "_multiprocessors", lambda device: 2)

    def transform(x, change=None):
        monkeypatch.setattr(_hadamard_cuda, "_cuda", Emulation(tmp_path, change, "hadamard"))
        _hadamard_cuda._function.cache_clear()
        return _hadamard_cuda.transform(x, WIDTH)

    yield transform
    _hadamard_cuda._function.cache_clear()


def excess(z, x):
    """The error over that of rounding the float64 result."""
    exact = hadamard_transform(x.double())
    return ((z.double() - exact).norm() / (exact.to(z.dtype).double() - exact).norm()).item()


ROWS = {  # on two blocks
    "of 16 bytes": lambda x: x,
    "padded with zeros": lambda x: x[:, :30_000],
    "of 8 bytes": lambda x: x[:3, 4:],
    "of 2 bytes, padded": lambda x: x[:3, 1:30_000],
    "apart in memory": lambda x: x[:1].T.contiguous().T.expand(3, -1),
    "one row": lambda x: x[:1],
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows, dtype, emulated):
    x = ROWS[rows](torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert excess(emulated(x), x) < 1.001


BREAKS = {
    "nobody waits for the first row": ("wait_for_copies<1>();", ""),
    "nobody waits for other rows": ("wait_for_copies<0>();", ""),
    "nobody waits until the exchange was read": ("if (i % 4 == 0) shared.read.wait(done % 2);", ""),
    "no barrier between the passes": ("        __syncthreads();\n\n        if (COPIES", "        if (COPIES"),
    "a sign": ("half ? minus : plus", "plus"),
    "what lies beyond a row": ("exists ? 16 : 0", "16"),
    "the third row is not asked for": ("COPIES && done > 0 &&", "COPIES && done > 9 &&"),
    "a scale": ("-kScale, third", "kScale, third"),
}


@pytest.mark.parametrize("old, new", BREAKS.values(), ids=BREAKS)
def test_breaks_are_noticed(old, new, emulated):
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()[:, :32_000]
    assert not excess(emulated(x, edit(old, new)), x) < 1.001
