"""The doctor tells what works from what is missing and from what is there and broken, and says what to do."""

import importlib
import importlib.metadata
import subprocess
import sys

import pytest
import torch

from corey import _cuda, doctor
from corey.paths import ROOT


def test_on_this_machine_nothing_that_is_installed_is_broken(capsys):
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for line in ("torch", "CUDA", "driver", "NVRTC", "cache", "jupyterlab", "mamba-ssm", *doctor.OPERATORS):
        assert line in printed
    assert "0 broken" in printed


@pytest.mark.gpu
def test_every_operator_works_on_a_gpu():
    assert [each for name in doctor.OPERATORS if (each := doctor.operator(name, "cuda")).state != doctor.OK] == []


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_an_operator_that_is_wrong_is_broken_and_so_is_the_exit_status(monkeypatch, capsys, wrong):
    monkeypatch.setitem(
        doctor.OPERATORS,
        "selective_scan",
        (lambda device: (torch.full((3,), wrong), torch.ones(3)), "corey._scan_variants"),
    )
    found = doctor.operator("selective_scan", "cpu")
    assert found.state == doctor.BROKEN and "reference" in found.found
    monkeypatch.setattr(doctor, "examine", lambda: iter([found]))
    assert doctor.main() == 1
    assert "1 broken" in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_is_broken(monkeypatch):
    pytest.importorskip("cuda.core", reason='NVRTC is not installed: pip install -e ".[cuda]"')

    def fail(*arguments):
        raise RuntimeError("hadamard.cu for sm_90: error: expected a declaration")

    monkeypatch.setattr(_cuda, "compile_only", fail)
    found = doctor.operator("hadamard_transform", "nvrtc")
    assert found.state == doctor.BROKEN and "expected a declaration" in found.found


def test_without_the_cuda_packages_the_compiler_is_missing_and_the_command_is_named(monkeypatch):
    for module in ("cuda.bindings", "cuda.core", "cuda.pathfinder"):
        monkeypatch.setitem(sys.modules, module, None)
    for each in [*doctor.compiler(), doctor.operator("add_rms_norm", "nvrtc")]:
        if each.name != "cache":
            assert (each.state, each.advice) == (doctor.MISSING, doctor.CUDA_EXTRA)


def test_a_package_that_is_not_installed_is_missing_with_advice(monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES["baselines"], "no-such-package", ("no_such_package", "pip install it"))
    found = doctor.package("baselines", "no-such-package")
    assert (found.state, found.advice) == (doctor.MISSING, "pip install it")


def test_a_stock_kernel_that_does_not_load_is_broken(monkeypatch):
    def fail(module):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.3.1")
    monkeypatch.setattr(importlib, "import_module", fail)
    found = doctor.package("baselines", "mamba-ssm")
    assert found.state == doctor.BROKEN and "undefined symbol" in found.found


def test_a_cache_that_cannot_be_written_is_broken(monkeypatch, tmp_path):
    monkeypatch.setenv("COREY_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    cache = next(each for each in doctor.compiler() if each.name == "cache")
    assert cache.state == doctor.BROKEN and "COREY_CACHE" in cache.advice


def test_the_doctor_needs_torch_and_numpy_only():
    absent = "numba pandas scipy matplotlib papermill transformers cuda".split()
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); from corey import doctor; sys.exit(doctor.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "missing selective_scan, cpu" in done.stdout
    assert "ModuleNotFoundError" in done.stdout and done.stderr == ""
