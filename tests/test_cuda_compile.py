"""Every tuned kernel compiles for every architecture the project names, on a machine without a GPU, and none spills."""

import functools
import importlib

import pytest

from corey import _cuda

pytest.importorskip("cuda.core", reason='NVRTC is not installed: pip install -e ".[cuda]"')

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
MODULES = [
    "corey._scan_variants",
    "corey._entropy_cuda",
    "corey._hadamard_cuda",
    "corey._conv_cuda",
    "corey._state_update_cuda",
    "corey._norm_cuda",
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_tuned_kernels_compile_without_spills(module, arch, monkeypatch):
    monkeypatch.setattr(_cuda, "_compile", functools.cache(_cuda._compile))  # kernels of one source share a compile
    module = importlib.import_module(module)
    tuned = module.TUNED
    if arch == "sm_90":
        tuned = tuned + getattr(module, "TUNED_ON_HOPPER", [])
    if int(arch[3:]) >= 90:
        tuned = tuned + getattr(module, "TUNED_FROM_HOPPER", [])
    assert tuned
    spills = {}
    for source, name, macros in tuned:
        compiled = _cuda.compile_only(source, name, arch, macros)
        if compiled.local_bytes:
            spills[name, macros] = f"{compiled.registers} registers, {compiled.local_bytes} bytes of local memory"
    assert not spills
