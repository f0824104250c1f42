"""The residual sum and norm: against float64 and transformers, over dtypes and strides, on CPU, CUDA and emulated."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import skip_without_compiler, without_ptx
from scan_inputs import relative_error

from corey import _cuda, _norm_cuda
from corey.norm import _check, add_rms_norm, add_rms_norm_ref
from corey.paths import KERNELS

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 7, 8, 64, 100, 256, 768, 1024, 2560)


def make(*shape, dtype=torch.float32, residual=True, device="cpu", seed=0):
    """Arguments of add_rms_norm by name."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(shape, generator=generator), 1 + 0.1 * torch.randn(shape[-1], generator=generator)
    sum_before = 3 * torch.randn(shape, generator=generator) if residual else None
    inputs = {"x": x.to(dtype), "residual": sum_before, "weight": weight.to(dtype)}
    return {name: value if value is None else value.to(device) for name, value in inputs.items()}


def in_float64(inputs):
    return {name: value if value is None else value.double() for name, value in inputs.items()}


def check(inputs, norm=add_rms_norm):
    """Runs the norm, compares it with the float64 equations, and returns y and h."""
    exact, exact_sum = add_rms_norm_ref(**in_float64(inputs))
    y, h = norm(**inputs)
    x = inputs["x"]
    assert y.shape == h.shape == x.shape and y.is_contiguous() and h.is_contiguous()
    assert y.dtype == x.dtype and h.dtype == torch.float32
    bound = 1e-6 if y.dtype == torch.float32 else 1.05 * relative_error(exact.to(y.dtype), exact) + 1e-6
    assert relative_error(y, exact) < bound and relative_error(h, exact_sum) < 1e-7
    return y, h


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", (False, True), ids=("first", "further"))
def test_values(residual, dtype, device):
    for width in WIDTHS:
        for rows in ((), (1,), (3, 5)):
            check(make(*rows, width, dtype=dtype, residual=residual, device=device, seed=width))


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device):
    inputs = make(4, 6, 64, dtype=torch.bfloat16, device=device)
    want = add_rms_norm(**inputs)
    wide = inputs["x"].new_full((4, 6, 200), float("nan"))
    crossed = inputs["x"].new_empty(6, 4, 64).transpose(0, 1)
    for x in (wide[:, :, 3:67], wide[:, :, 128:192], wide[..., 1:129:2], crossed):
        y, h = check(inputs | {"x": x.copy_(inputs["x"])})
        assert torch.equal(y, want[0]) and torch.equal(h, want[1])
    for rows in (inputs["x"][:1].expand(4, 6, 64), inputs["x"][:, :1].expand(4, 6, 64), inputs["x"][:, -1:]):
        shape = {"residual": inputs["residual"][:, : rows.shape[1]]}
        y, h = check(inputs | {"x": rows} | shape)
        packed = add_rms_norm(rows.contiguous(), shape["residual"].contiguous(), inputs["weight"])
        assert torch.equal(y, packed[0]) and torch.equal(h, packed[1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_the_same_alone_and_in_a_batch(device):
    inputs = make(70, 1024, dtype=torch.bfloat16, device=device)
    y, h = add_rms_norm(**inputs)
    for i in (0, 1, 69):
        alone = add_rms_norm(inputs["x"][i : i + 1], inputs["residual"][i : i + 1], inputs["weight"])
        assert torch.equal(alone[0][0], y[i]) and torch.equal(alone[1][0], h[i])


def test_in_float32_the_bits_are_those_of_transformers():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    inputs = make(3, 5, 96)
    norm = modeling.MambaRMSNorm(96, eps=1e-5)
    norm.weight.data.copy_(inputs["weight"])
    y, h = add_rms_norm(**inputs)
    assert torch.equal(h, inputs["residual"] + inputs["x"])
    assert torch.equal(y, norm(h))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ((0, 8), (3, 0, 8)))
def test_no_rows(shape, device):
    y, h = add_rms_norm(**make(*shape, device=device))
    assert y.shape == h.shape == shape


@pytest.mark.parametrize("device", DEVICES)
def test_results_share_no_memory_with_arguments(device):
    for residual in (False, True):
        inputs = make(3, 8, residual=residual, device=device)
        before = {name: value if value is None else value.clone() for name, value in inputs.items()}
        for result in add_rms_norm(**inputs):
            result.fill_(7.0)
        assert all(value is None or torch.equal(value, before[name]) for name, value in inputs.items())


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_in_its_row(device):
    inputs = make(3, 64, device=device)
    clean = add_rms_norm(**inputs)[0]
    inputs["x"][1, 7] = float("nan")
    y = add_rms_norm(**inputs)[0]
    assert y[1].isnan().all() and torch.equal(y[::2], clean[::2])


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", (False, True))
def test_opcheck(residual, device):
    for dtype in DTYPES:
        inputs = make(2, 3, 40, dtype=dtype, residual=residual, device=device)
        torch.library.opcheck(torch.ops.corey.add_rms_norm, (*inputs.values(), 1e-5))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    inputs = make(2, 3, 40, device=device)
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(**inputs), add_rms_norm(**inputs)))


@pytest.mark.gpu
def test_graph_replay():
    inputs = make(3, 1024, dtype=torch.bfloat16, device="cuda")
    add_rms_norm(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = add_rms_norm(**inputs)
    inputs["x"].copy_(make(3, 1024, dtype=torch.bfloat16, seed=1)["x"])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, add_rms_norm(**inputs)))


@pytest.mark.gpu
def test_more_columns_than_a_block_holds_are_refused():
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 8193\), want at most 8192 columns"):
        add_rms_norm(**make(2, 8193, device="cuda"))


@pytest.mark.parametrize("name", ("x", "residual", "weight"))
def test_gradient_is_refused(name):
    inputs = make(3, 8)
    inputs[name] = inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^{name}: requires grad"):
        add_rms_norm(**inputs)
    with torch.no_grad():
        add_rms_norm(**inputs)
    add_rms_norm_ref(**inputs)[0].sum().backward()
    assert inputs[name].grad is not None


BAD = {
    "x a list": ("x", TypeError, [1.0]),
    "x 0-dim": ("x", ValueError, torch.tensor(1.0)),
    "x without columns": ("x", ValueError, torch.zeros(3, 0)),
    "x float64": ("x", ValueError, torch.zeros(3, 8, dtype=torch.float64)),
    "residual bfloat16": ("residual", ValueError, torch.zeros(3, 8, dtype=torch.bfloat16)),
    "residual of another shape": ("residual", ValueError, torch.zeros(2, 8)),
    "residual on another device": ("residual", ValueError, torch.zeros(3, 8, device="meta")),
    "weight of another width": ("weight", ValueError, torch.ones(7)),
    "weight of another dtype": ("weight", ValueError, torch.ones(8, dtype=torch.float16)),
    "weight missing": ("weight", TypeError, None),
    "eps an int": ("eps", TypeError, 1),
    "eps zero": ("eps", ValueError, 0.0),
    "eps nan": ("eps", ValueError, float("nan")),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_argument_is_refused_by_name(case):
    name, exception, value = case
    with pytest.raises(exception, match=rf"^{name}: got "):
        add_rms_norm(**make(3, 8) | {name: value})


# ---- kernels/rms_norm.cu, compiled for the CPU -----------------------------------------------------------------------

_RUN = """
#define __shared__ static
#include "cuda_on_cpu.h"
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#include "kernel.cu"
extern "C" void run(const void* params, unsigned grid, unsigned threads) {
  Params p;
  memcpy(&p, params, sizeof p);
  run_grid(add_rms_norm, p, grid, threads, 0);
}
"""


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    """add_rms_norm by the kernel's source and its real plan, on CPU tensors; `change` edits the source."""
    skip_without_compiler()
    built, change = {}, []

    def function(source, name, device, macros):
        key = (macros, *change)
        if key not in built:
            folder = tmp_path / str(len(built))
            folder.mkdir()
            text = (KERNELS / source).read_text()
            for old, new in change:
                assert text.count(old) == 1
                text = text.replace(old, new)
            (folder / "kernel.cu").write_text(text)
            (folder / "common.cuh").write_text(without_ptx("common.cuh"))
            for empty in ("cuda_bf16.h", "cuda_fp16.h"):
                (folder / empty).write_text("")
            (folder / "run.cpp").write_text(_RUN)
            flags = "-std=c++20 -O1 -mfma -ffp-contract=off -fno-strict-aliasing -shared -fPIC -w".split()
            includes = [f"-I{folder}", f"-I{Path(__file__).parent}"]
            defines = [f"-D{macro}={value}" for macro, value in macros]
            command = ["g++", *flags, *defines, *includes, "-o", str(folder / "run.so"), str(folder / "run.cpp")]
            subprocess.run(command, check=True)
            built[key] = ctypes.CDLL(str(folder / "run.so"))
        return built[key]

    def launch(library, grid, threads, shared_bytes, params):
        library.run(params, grid[0], threads)

    def norm(x, residual, weight, eps=1e-5, change_source=()):
        change[:] = change_source
        monkeypatch.setattr(_norm_cuda, "_plans", {})
        return _norm_cuda.norm(x, residual, weight, eps, _check)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(_cuda, "function", function)
    monkeypatch.setattr(_cuda, "launch", launch)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_gives_the_values(dtype, emulated):
    for width in (1, 7, 64, 100, 768, 1000):
        for residual in (False, True):
            check(make(2, 3, width, dtype=dtype, residual=residual, seed=width), emulated)


def test_the_kernel_gives_the_same_bits_at_every_alignment_and_spacing_of_rows(emulated):
    inputs = make(4, 6, 64, dtype=torch.bfloat16)
    want = emulated(**inputs)
    wide = inputs["x"].new_full((4, 6, 200), float("nan"))
    for x in (wide[:, :, 3:67], wide[:, :, 128:192], wide[..., 1:129:2]):
        got = emulated(**inputs | {"x": x.copy_(inputs["x"])})
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    first = inputs["x"][:, :1].expand(4, 6, 64)  # rows that lie on one another, and are not evenly spaced
    assert torch.equal(emulated(**inputs | {"x": first})[0], emulated(**inputs | {"x": first.contiguous()})[0])
    last = {"x": inputs["x"][:, -1:], "residual": inputs["residual"][:, -1:]}
    assert torch.equal(emulated(**inputs | last)[0], want[0][:, -1:])


BREAKS = {
    "residual dropped": ("h[i] = __fadd_rn(residual[i], h[i]);", ""),
    "one warp's sum": ("for (int warp = 0; warp < WARPS; ++warp)", "for (int warp = 0; warp < 1; ++warp)"),
    "half a warp's sum": ("int offset = 16;", "int offset = 8;"),
    "weight dropped": ("__fmul_rn(__fmul_rn(h[i], scale), weight[i])", "__fmul_rn(h[i], scale)"),
    "eps dropped": ("__fadd_rn(__fdiv_rn(squares, float(D)), p.eps)", "__fdiv_rn(squares, float(D))"),
}


@pytest.mark.parametrize("change", BREAKS.values(), ids=BREAKS)
def test_a_broken_kernel_is_noticed(change, emulated):
    inputs = make(2, 520)
    inputs = inputs | {"x": inputs["x"] * 1e-3, "residual": inputs["residual"] * 1e-3}  # so that eps matters
    check(inputs, emulated)
    with pytest.raises(AssertionError):
        check(inputs, lambda **arguments: emulated(**arguments, change_source=(change,)))
