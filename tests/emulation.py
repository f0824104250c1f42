"""CUDA kernels compiled for the CPU, so that their logic is tested where there is no GPU."""

import ctypes
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from corey import _cuda, _scan_cuda
from corey.paths import KERNELS
from corey.scan import _outputs

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
HERE = Path(__file__).parent


def without_ptx(file):
    """kernels/`file` with what cuda_on_cpu.h knows in place of PTX."""
    text = (KERNELS / file).read_text()
    for instruction, emulated in _INSTRUCTIONS.get(file, {}).items():
        text, found = re.subn(rf"asm( volatile)?\(.*{re.escape(instruction)}.*\);", emulated, text)
        assert found == 1, instruction
    return text


def edit(old, new):
    """A change of the kernel's source that breaks it."""

    def change(sources):
        (file,) = (file for file, text in sources.items() if old in text)
        assert sources[file].count(old) == 1
        sources[file] = sources[file].replace(old, new)

    return change


def skip_without_compiler():
    if shutil.which("g++") is None or int(subprocess.check_output(["g++", "-dumpversion"]).split(b".")[0]) < 12:
        pytest.skip("g++ 12 or later is not installed, which compiles the kernel for the CPU")


class Emulation:
    """Stands in for `corey._cuda` in an operator's module: real plans, parameters and source, run by cuda_on_cpu.h.

    kernels: what the names of the operator's sources have in common.
    """

    def __init__(self, folder: Path, change, kernels: str):
        self.folder, self.built = folder, {}
        self.sources = {path.name: without_ptx(path.name) for path in KERNELS.glob(f"*{kernels}*")}
        if change:
            change(self.sources)
        self.sources["common.cuh"] = without_ptx("common.cuh")

    def function(self, source, name, device, macros):
        return _Function(self._library(source, name, macros))

    def launch(self, function, grid, threads, shared_bytes, params, *, early):
        function.library.run(bytes(params), grid[0], threads, shared_bytes)

    def source_version(self):
        return 0

    def _library(self, source, name, macros):
        if (name, macros) not in self.built:
            text = _RUN.format(source=source, kernel=name)
            self.built[name, macros] = ctypes.CDLL(str(self.build(text, macros, "-shared", "-fPIC")))
        return self.built[name, macros]

    def build(self, text, macros, *flags):
        """The file that g++ makes of `text`, which includes the sources, in a folder of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for file, source in self.sources.items():
            (folder / file).write_text(re.sub(_SHARED, r"#define \2 ((\1*)shared_memory)", source))
        for empty in ("cuda_bf16.h", "cuda_fp16.h"):
            (folder / empty).write_text("")
        (folder / "run.cpp").write_text(text)
        exact = ["-O1", "-mfma", "-ffp-contract=off", "-fno-strict-aliasing"]
        defines = [f"-D{name}={value}" for name, value in macros]
        command = ["g++", "-std=c++20", "-w", *exact, *flags, *defines, f"-I{folder}", f"-I{HERE}"]
        subprocess.run([*command, "-o", str(folder / "run"), str(folder / "run.cpp")], check=True)
        return folder / "run"


_SHARED = r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];"
_INSTRUCTIONS = {  # in PTX, and in their place
    "common.cuh": {
        "ex2": "y = exp2f(x);",
        "rcp": "y = 1.0f / x;",
        "mbarrier.init.shared": "begin_mbarrier(word, count);",
        "mbarrier.arrive.shared": "arrive_at_mbarrier(word);",
        'mbarrier." TRY_WAIT ".parity': "wait_at_mbarrier(word, parity);",
        "mbarrier.arrive.expect_tx": "expect_at_mbarrier(word, nbytes);",
        "barrier.cluster.arrive": "arrive_at_cluster_barrier();",
        "barrier.cluster.wait": "wait_at_cluster_barrier();",
        "st.async": "send_to_block(value, to, full.word, block);",
        "prefetch": "",
    },
    "hadamard_on_tensor_cores.cuh": {
        'MMA("bf16")': "multiply_add<__nv_bfloat16>(d, plus, minus, b0, b1);",
        'MMA("f16")': "multiply_add<__half>(d, plus, minus, b0, b1);",
        "cp.async.cg": "copy_later(to, from, nbytes);",
        "cp.async.commit_group": "end_group_of_copies();",
        "cp.async.wait_group": "copy_all_but(kLater);",
        "stmatrix": "store_matrices_transposed(to, of);",
    },
}
_RUN = """#include "cuda_on_cpu.h"
#include "{source}"
extern "C" void run(const void* params, unsigned grid, unsigned threads, unsigned nbytes) {{
  Params p;
  memcpy(&p, params, sizeof p);
  run_grid({kernel}, p, grid, threads, nbytes);
}}
"""


class _Function:
    def __init__(self, library):
        self.library = library

    def allow_shared(self, nbytes):
        pass


class _Properties:
    major = 0  # no clusters
    multi_processor_count = 1  # one pass as soon as there are two blocks
    shared_memory_per_block_optin = 0  # no pairs


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    """A function (inputs, chunk_size, change=...) -> y, last state, both written over NaN."""
    skip_without_compiler()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    emulations = {}

    def outputs(u, A):
        y, last = _outputs(u, A)
        return y.fill_(torch.nan), last.fill_(torch.nan)

    def scan(inputs, chunk_size, change=None):
        if change not in emulations:
            folder = tmp_path / f"emulation{len(emulations)}"
            folder.mkdir()
            emulations[change] = Emulation(folder, change, "scan")
        for name in ("function", "launch", "source_version"):
            monkeypatch.setattr(_cuda, name, getattr(emulations[change], name))
        tensors = tuple(inputs.get(name) for name in TENSORS)
        plan = _scan_cuda._plan(*tensors[:8], inputs["delta_softplus"], tensors[8], chunk_size)
        return _scan_cuda._run(plan, tensors, chunk_size, outputs)

    return scan
