"""One pass in pairs under ThreadSanitizer, a CPU thread for each of CUDA's: barriers order all that a block shares."""

import struct
import subprocess

import pytest
import torch
from emulation import TENSORS, Emulation, _Function, _Properties, skip_without_compiler
from scan_inputs import OPTIONS, make_inputs
from test_scan_emulated import edit

from corey import _cuda, _scan_cuda, _scan_way
from corey._scan_args import TILE
from corey.scan import _outputs

bf16 = torch.bfloat16
POINTERS = 14  # that the kernel's parameters begin with
PROGRAM = """
#include "cuda_on_cpu.h"
#include <string>
#include "{source}"
static char* load(const char* name) {{
  FILE* file = fopen(name, "rb");
  if (!file) return nullptr;
  fseek(file, 0, SEEK_END);
  const long size = ftell(file);
  rewind(file);
  char* bytes = (char*)aligned_alloc(128, (size + 128) / 128 * 128);
  fread(bytes, 1, size, file);
  return bytes;
}}
int main(int, char** sizes) {{
  Params p;
  memcpy(&p, load("params"), sizeof p);
  for (int i = 0; i < {pointers}; ++i)
    if (char* bytes = load(std::to_string(i).c_str())) ((char**)&p)[i] += (size_t)bytes;
  run_grid({kernel}, p, atoi(sizes[1]), atoi(sizes[2]), atoi(sizes[3]));
}}
"""


class Programs(Emulation):
    """Kernels are programs, which run on copies of the tensors; `reports` is what was found in them."""

    def __init__(self, folder, change, tensors):
        super().__init__(folder, change, "scan")
        self.storages, self.reports = [x.untyped_storage() for x in tensors if x is not None], ""

    def function(self, source, name, device, macros):
        text = PROGRAM.format(source=source, kernel=name, pointers=POINTERS)
        return _Function(self.build(text, macros, "-g", "-DON_THREADS", "-pthread", "-fsanitize=thread"))

    def launch(self, function, grid, threads, shared_bytes, params, *, early):
        folder = function.library.parent
        pointers = list(struct.unpack_from(f"{POINTERS}Q", params))
        for i, address in enumerate(pointers):
            for storage in self.storages:
                if 0 <= address - storage.data_ptr() < storage.nbytes():
                    (folder / str(i)).write_bytes(bytes(storage))
                    pointers[i] -= storage.data_ptr()  # the program adds where its copy is
                    break
        (folder / "params").write_bytes(struct.pack(f"{POINTERS}Q", *pointers) + params[8 * POINTERS :])
        sizes = map(str, (grid[0], threads, shared_bytes))
        done = subprocess.run([function.library, *sizes], cwd=folder, stderr=subprocess.PIPE, text=True, timeout=300)
        if "FATAL: ThreadSanitizer" in done.stderr:
            pytest.skip(f"ThreadSanitizer does not run here: {done.stderr.strip().splitlines()[0]}")
        assert done.returncode in (0, 66), f"exit status {done.returncode}, where races make it 66: {done.stderr}"
        self.reports += done.stderr


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """A function (inputs, block, change=None): what ThreadSanitizer says of one pass, or two parts, with that block."""
    skip_without_compiler()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)

    def run(inputs, block, change=None):
        parts = block and block.parts > 1
        monkeypatch.setattr(_scan_way, "parts_for" if parts else "pairs_for", lambda *_: block)
        chunk = _scan_way.first_part(-(-inputs["u"].shape[2] // TILE)) if parts else 2**20
        tensors = tuple(inputs.get(name) for name in TENSORS)
        y, last = _outputs(inputs["u"], inputs["A"])
        programs = Programs(tmp_path, change, (*tensors, y, last))
        for name in ("function", "launch", "source_version"):
            monkeypatch.setattr(_cuda, name, getattr(programs, name))
        plan = _scan_cuda._plan(*tensors[:8], inputs["delta_softplus"], tensors[8], chunk * TILE)
        _scan_cuda._run(plan, tensors, None, lambda *_: (y, last))
        return programs.reports

    return run


CASES = [
    (0, {"dim": 24, "length": 320}),  # whole pieces
    (1, {"dim": 20, "length": 200, "layout": "token_major"}),
    (2, {"dim": 24, "length": 260}),
    (4, {"dim": 40, "length": 300, "layout": "token_major"}),
    (5, {"dim": 48, "length": 128}),
    (None, {"dim": 33, "length": 200}),
]
PARTS = [{"dim": 16, "length": 768}, {"dim": 12, "length": 800, "layout": "token_major"}]


@pytest.mark.parametrize("size, case", CASES, ids=[str(case) for _, case in CASES])
def test_threads_of_a_block_do_not_race(size, case, reports):
    inputs = make_inputs(batch=1, dtype=bf16, options=OPTIONS, **case)
    assert reports(inputs, None if size is None else _scan_way.PAIRS[size]) == ""


@pytest.mark.parametrize("case", PARTS, ids=str)
def test_threads_of_two_blocks_do_not_race(case, reports):
    assert reports(make_inputs(batch=1, dtype=bf16, options=OPTIONS, **case), _scan_way.IN_PARTS) == ""


BREAKS = {
    "a round is overwritten while it is walked": (
        "    ring[now].left.wait(parity);\n    stage(t0 + 2 * T, free);\n",
        "    stage(t0 + 2 * T, free);\n    ring[now].left.wait(parity);\n",
    ),
    "a round is walked before it is staged": ("        next.staged.wait(parity);\n        read", "        read"),
    "outputs are read before the walk has left": (
        "  ring[now].left.wait(parity);\n  gates",
        "  gates",
    ),
    "what is finished is overwritten": (
        "    fetch(t0 + 3 * T);\n    if (t0 > w.first) finish(t0 - T, free);  // its outputs are still there\n"
        "    ring[free].staged.arrive();\n",
        "    fetch(t0 + 3 * T);\n    ring[free].staged.arrive();\n    if (t0 > w.first) finish(t0 - T, free);\n",
    ),
    "the second lane does not wait": ("        step();\n        __syncwarp();\n", "        step();\n"),
}


@pytest.mark.parametrize("old, new", BREAKS.values(), ids=BREAKS)
def test_a_missing_barrier_is_noticed(old, new, reports):
    inputs = make_inputs(batch=1, dim=40, length=300, dtype=bf16, layout="token_major", options=OPTIONS)
    assert "data race" in reports(inputs, _scan_way.PAIRS[4], edit(old, new))
