"""An edit of a kernel is live at the next call, nothing is compiled for nothing, and operators can be reloaded."""

import subprocess
import sys
import time

import pytest
import torch

from corey import _cpu, _cuda, live, selective_scan
from corey.paths import KERNELS, ROOT
from corey.quickstart import SHORTER_SOFTPLUS, long_memory_inputs

INPUTS = long_memory_inputs(32, 256)


def scan(device="cpu"):
    return selective_scan(**{name: x.to(device) for name, x in INPUTS.items()}, delta_softplus=True).cpu()


def live_on(device):
    """Whether an edit of a copy is seen, and its undoing, and nothing of it is left behind."""
    name, old, new = SHORTER_SOFTPLUS[device]
    truth = scan(device)
    with live.copied_sources(device) as sources:
        assert torch.equal(scan(device), truth)
        live.edit(sources / name, old, new)
        error = ((scan(device) - truth).norm() / truth.norm()).item()
        live.edit(sources / name, new, old)
        assert torch.equal(scan(device), truth)
        live.edit(sources / name, old, new)
    assert torch.equal(scan(device), truth)
    assert 1e-3 < error < 2e-2  # log(1 + e) and e are half a per cent apart at e = 0.01


def test_an_edit_of_the_cpu_kernel_is_live_and_its_undoing_too():
    live_on("cpu")


@pytest.mark.gpu
def test_an_edit_of_a_cuda_kernel_is_live_and_its_undoing_too():
    live_on("cuda")


def test_a_source_that_does_not_run_raises_at_every_call_until_it_is_mended():
    truth = scan()
    with live.copied_sources() as sources:
        path = sources / _cpu.SOURCE.name
        live.edit(path, "LANES = 16", "LANES = 16 / 0")
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                scan()
        live.edit(path, "LANES = 16 / 0", "LANES = 16")
        assert torch.equal(scan(), truth)


def test_a_copy_has_the_hash_of_its_original_so_that_nothing_is_compiled():
    scan()
    known = _cpu.kernel
    with live.copied_sources():
        scan()
        assert _cpu.kernel is known


def test_a_call_looks_at_the_source_no_more_often_than_five_times_a_second(monkeypatch):
    scan()
    monkeypatch.setattr(_cpu, "_looked", time.monotonic() + 60)
    monkeypatch.setattr(_cpu, "SOURCE", None)  # whoever looks, fails
    scan()


def test_the_edit_of_the_cuda_source_compiles_without_a_gpu_and_changes_the_machine_code():
    pytest.importorskip("cuda.core", reason='NVRTC is not installed: pip install -e ".[cuda]"')
    from corey._scan_variants import TUNED

    (source, kernel, macros), (name, old, new) = TUNED[0], SHORTER_SOFTPLUS["cuda"]
    first = _cuda.source_version()
    with live.copied_sources("cuda") as sources:
        before = _cuda.compile_only(source, kernel, "sm_90", macros).cubin
        copied = _cuda.source_version()
        live.edit(sources / name, old, new)
        assert len({first, copied, _cuda.source_version()}) == 3  # what plans are kept by
        assert _cuda.compile_only(source, kernel, "sm_90", macros).cubin != before
    assert _cuda.KERNELS == KERNELS
    assert _cuda.compile_only(source, kernel, "sm_90", macros).cubin == before


@pytest.mark.parametrize("old", ["no such line", "splat"])
def test_a_text_that_does_not_stand_there_once_is_refused(tmp_path, old):
    path = tmp_path / "kernel.py"
    path.write_text("splat(1) + splat(2)")
    with pytest.raises(ValueError, match=r"^old: got \d places in kernel.py"):
        live.edit(path, old, "x")
    assert path.read_text() == "splat(1) + splat(2)"


def test_a_device_without_kernels_is_refused():
    with pytest.raises(ValueError, match="device: got 'meta'"), live.copied_sources("meta"):
        pass


RELOAD = """
import importlib
import torch
from corey import conv, entropy, hadamard, norm, scan, state_update
from corey.quickstart import long_memory_inputs
inputs = long_memory_inputs(32, 256)
truth = scan.selective_scan(**inputs, delta_softplus=True)
for module in (conv, entropy, hadamard, norm, scan, state_update) * 2:
    importlib.reload(module)
assert torch.equal(scan.selective_scan(**inputs, delta_softplus=True), truth)
u, delta, A, B, C, bias = inputs.values()
torch.library.opcheck(torch.ops.corey.selective_scan.default, (u, delta, A, B, C, None, None, bias, True, None, None))
inputs["u"].requires_grad_()
try:
    scan.selective_scan(**inputs, delta_softplus=True)
    raise SystemExit("a gradient was not refused")
except RuntimeError:
    pass
"""


def test_every_module_with_an_operator_can_be_reloaded():
    done = subprocess.run([sys.executable, "-c", RELOAD], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
