"""What this machine has and what it lacks: `python -m corey.doctor`, or `make doctor`.

Every operator is called on a small input and compared with its reference, on the CPU and on a GPU if there is one.
Where there is none, its CUDA source is compiled all the same. Needs nothing but torch and NumPy to say what is missing.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from corey import _cuda
from corey.entropy import histogram_entropy, histogram_entropy_ref
from corey.hadamard import hadamard_transform
from corey.scan import selective_scan, selective_scan_ref

OK, MISSING, BROKEN = "ok", "missing", "broken"
TOLERANCE = 1e-4  # of the largest value of the reference; float32 stays far below
COMPILE_FOR = "sm_90"  # where there is no GPU to ask


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what was found, and for what is not ok what to do about it."""

    part: str
    name: str
    state: str
    found: str
    advice: str = ""


# ---- what is installed -----------------------------------------------------------------------------------------------

CUDA_EXTRA = 'pip install -e ".[cuda]"'
NOTEBOOKS_EXTRA = 'make env, or pip install -e ".[notebooks]"'
LONGBENCH_EXTRA = 'make env, or pip install -e ".[longbench]"'
STOCK_KERNELS = ("mamba-ssm", "causal-conv1d")
PACKAGES = {  # part: {distribution: (module, advice)}
    "kernels": {
        "cuda-core": ("cuda.core", CUDA_EXTRA),
        "cuda-bindings": ("cuda.bindings", CUDA_EXTRA),
        "numba": ("numba", "pip install numba"),
    },
    "notebooks": {
        "jupyterlab": ("jupyterlab", NOTEBOOKS_EXTRA),
        "papermill": ("papermill", NOTEBOOKS_EXTRA),
        "ipywidgets": ("ipywidgets", NOTEBOOKS_EXTRA),
        "distributed": ("distributed", 'pip install -e ".[batch]"; only the grid runner needs it'),
        "playwright": ("playwright", 'make browser, or pip install -e ".[browser]"; only the browser tests need it'),
    },
    "baselines": {
        "transformers": ("transformers", LONGBENCH_EXTRA),
        "lm-eval": ("lm_eval", LONGBENCH_EXTRA),
        "mamba-ssm": ("mamba_ssm.ops.selective_scan_interface", "conda env create -f environment.yml; needs a GPU"),
        "causal-conv1d": ("causal_conv1d", "conda env create -f environment.yml; needs a GPU"),
    },
}


def package(part: str, name: str) -> Finding:
    """Whether a distribution is installed and its module can be found; a stock kernel is imported, as those fail."""
    module, advice = PACKAGES[part][name]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(part, name, MISSING, "not installed", advice)
    try:
        if name in STOCK_KERNELS:
            importlib.import_module(module)
        elif importlib.util.find_spec(module) is None:
            return Finding(part, name, BROKEN, f"{version}, without the module {module}", advice)
    except Exception as error:  # a foreign extension may raise anything while it loads
        return Finding(part, name, BROKEN, f"{version} does not load: {type(error).__name__}: {_short(error)}", advice)
    return Finding(part, name, OK, version)


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine() -> Iterator[Finding]:
    yield Finding("machine", "Python", OK, f"{platform.python_version()} at {sys.executable}")
    yield Finding("machine", "CPU", OK, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}")
    yield Finding("machine", "torch", OK, torch.__version__)
    driver = _driver_version()
    if torch.version.cuda is None:
        advice = "pip install torch from PyPI, whose Linux wheel is built with CUDA" if driver else ""
        yield Finding("machine", "CUDA", MISSING, "torch is built without it", advice)
    else:
        yield Finding("machine", "CUDA", OK, f"{torch.version.cuda}, which torch is built with")
    if driver is None:
        yield Finding("machine", "driver", MISSING, "no nvidia-smi, so no NVIDIA driver or none in this container")
    else:
        yield Finding("machine", "driver", OK, driver)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu, arch = torch.cuda.get_device_properties(index), _cuda.architecture(index)
            found = f"{gpu.name}, {arch}, {gpu.multi_processor_count} multiprocessors, {gpu.total_memory >> 30} GiB"
            yield Finding("machine", f"cuda:{index}", OK, found)
    else:
        advice = "everything runs on the CPU; for a GPU: a driver, and torch built with CUDA"
        yield Finding("machine", "GPU", MISSING, "torch sees none", advice)


def compiler() -> Iterator[Finding]:
    """NVRTC and where its results are kept."""
    try:
        yield Finding("kernels", "NVRTC", OK, ".".join(map(str, _cuda._nvrtc_version())))
    except RuntimeError as error:
        yield Finding("kernels", "NVRTC", MISSING, _short(error), CUDA_EXTRA)
    try:
        yield Finding("kernels", "CUDA headers", OK, _home(Path(_cuda._cuda_headers())))
    except RuntimeError as error:
        yield Finding("kernels", "CUDA headers", MISSING, _short(error), CUDA_EXTRA)
    folder = _cuda._cache_root() / "kernels"
    place = next(each for each in (folder, *folder.parents) if each.exists())
    if os.access(place, os.W_OK):
        kept = len(list(folder.glob("*.cubin"))) if folder.exists() else 0
        yield Finding("kernels", "cache", OK, f"{_home(folder)}, {kept} compiled kernels")
    else:
        advice = "set COREY_CACHE to a folder of your own, else every process compiles anew"
        yield Finding("kernels", "cache", BROKEN, f"{_home(folder)} cannot be written", advice)


# ---- operators -------------------------------------------------------------------------------------------------------


def _scan(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    u, delta = torch.randn(2, 1, 32, 200).unbind()
    A, B, C = -torch.rand(32, 16), torch.randn(1, 16, 200), torch.randn(1, 16, 200)
    inputs = (u, delta, A, B, C)
    return selective_scan(*_on(device, inputs), delta_softplus=True), selective_scan_ref(*inputs, delta_softplus=True)


def _entropy(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(10_000)
    return histogram_entropy(x.to(device)), torch.tensor(histogram_entropy_ref(x.numpy()))


def _hadamard(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 256)
    return hadamard_transform(hadamard_transform(x.to(device))), x  # its own inverse


def _conv(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    from corey.conv import causal_conv1d, causal_conv1d_ref

    inputs = (torch.randn(1, 32, 200), torch.randn(32, 4), torch.randn(32))
    return causal_conv1d(*_on(device, inputs)), causal_conv1d_ref(*inputs)


def _state_update(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    from corey.state_update import selective_state_update, selective_state_update_ref

    inputs = (torch.randn(2, 32, 16), torch.randn(2, 32), torch.randn(2, 32))
    inputs += (-torch.rand(32, 16), torch.randn(2, 16), torch.randn(2, 16))
    expected = selective_state_update_ref(*inputs)[0]
    return selective_state_update(*_on(device, inputs)), expected


def _norm(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    from corey.norm import add_rms_norm, add_rms_norm_ref

    inputs = (torch.randn(4, 256), torch.randn(4, 256), torch.rand(256))
    return add_rms_norm(*_on(device, inputs))[0], add_rms_norm_ref(*inputs)[0]


OPERATORS: dict[str, tuple[Callable, str]] = {  # name: (result and reference on a device, module of its CUDA variants)
    "selective_scan": (_scan, "corey._scan_variants"),
    "histogram_entropy": (_entropy, "corey._entropy_cuda"),
    "hadamard_transform": (_hadamard, "corey._hadamard_cuda"),
    "causal_conv1d": (_conv, "corey._conv_cuda"),
    "selective_state_update": (_state_update, "corey._state_update_cuda"),
    "add_rms_norm": (_norm, "corey._norm_cuda"),
}


def operator(name: str, device: str) -> Finding:
    """A call on "cpu" or "cuda" against the reference, or on "nvrtc" the compilation of one CUDA variant."""
    pair, module = OPERATORS[name]
    where = f"{name}, {'CUDA source' if device == 'nvrtc' else device}"
    try:
        if device == "nvrtc":
            source, kernel, macros = importlib.import_module(module).TUNED[0]
            _cuda.compile_only(source, kernel, COMPILE_FOR, macros)
            return Finding("operators", where, OK, f"{source} compiles for {COMPILE_FOR}; there is no GPU to run it on")
        torch.manual_seed(0)
        found, expected = pair(device)
        error = ((found.cpu() - expected).abs().max() / expected.abs().max()).item()
    except Exception as error:  # whatever it is, it is the finding
        state = MISSING if "pip install" in str(error) or isinstance(error, ModuleNotFoundError) else BROKEN
        advice = CUDA_EXTRA if device != "cpu" else 'pip install -e "."'
        return Finding("operators", where, state, f"{type(error).__name__}: {_short(error)}", advice)
    if not error <= TOLERANCE:
        return Finding("operators", where, BROKEN, f"off by {error:.1e} of its reference", "please report this")
    found = f"within {error:.0e} of its reference" if error else "equal to its reference"
    return Finding("operators", where, OK, found)


# ---- the report ------------------------------------------------------------------------------------------------------


def examine() -> Iterator[Finding]:
    """Everything, in the order in which it is printed. Takes some seconds, most of them for compilers."""
    yield from machine()
    yield from (package("kernels", name) for name in PACKAGES["kernels"])
    yield from compiler()
    for device in ("cpu", "cuda" if torch.cuda.is_available() else "nvrtc"):
        yield from (operator(name, device) for name in OPERATORS)
    for part in ("notebooks", "baselines"):
        yield from (package(part, name) for name in PACKAGES[part])


def main() -> int:
    """Prints what was found, a line each; 1 where something that is installed does not work, else 0."""
    part, broken, absent = "", 0, 0
    for each in examine():
        if each.part != part:
            part = each.part
            print(f"\n{part}")
        print(f"  {each.state:8}{each.name:36}{each.found}")
        if each.advice:
            print(f"  {'':8}{'':36}-> {each.advice}")
        broken, absent = broken + (each.state == BROKEN), absent + (each.state == MISSING)
    print(f"\n{broken} broken, {absent} missing. On a CPU `make figures` needs no driver, GPU or stock kernel.")
    return 1 if broken else 0


def _on(device: str, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [x.clone().to(device) for x in tensors]


def _driver_version() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return ", ".join(sorted(set(done.stdout.split()))) if done.returncode == 0 else None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _home(path: Path) -> str:
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
