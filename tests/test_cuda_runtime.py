"""corey._cuda: compiling, the disk cache and the shared arithmetic on the CPU; loading and launching on a GPU."""

import ast
import hashlib
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corey import _cuda
from corey.paths import KERNELS

pytest.importorskip("cuda.core", reason='NVRTC is not installed: pip install -e ".[cuda]"')

ADD = """
#include "common.cuh"
struct Params { float* y; float value; int64 length; };
extern "C" __global__ void add(const __grid_constant__ Params p) {
    int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.length) p.y[i] += p.value * SCALE;
}
"""

COUNT = """
struct Params { unsigned int* scratch; unsigned int* y; };
extern "C" __global__ void count(const __grid_constant__ Params p) { p.y[0] = ++p.scratch[0]; }
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A kernels/ directory and a disk cache of the test's own; what is in memory is forgotten before and after."""
    kernels = tmp_path / "sources"
    kernels.mkdir()
    shutil.copy(KERNELS / "common.cuh", kernels)
    (kernels / "add.cu").write_text(ADD)
    (kernels / "count.cu").write_text(COUNT)
    monkeypatch.setattr(_cuda, "KERNELS", kernels)
    monkeypatch.setenv("COREY_CACHE", str(tmp_path / "cache"))
    _cuda.clear()
    yield kernels
    _cuda.clear()


@pytest.fixture
def compilations(sources, monkeypatch):
    """Counts what goes to NVRTC, and does not send it there: the machine code is a hash of what would be compiled."""
    seen = []

    def compile(source, arch, macros, report=False):
        seen.append((source, arch, macros))
        text = "".join(path.read_text() for path in sorted(_cuda.KERNELS.iterdir()))
        return hashlib.sha512(f"{text} {arch} {macros}".encode()).digest(), ""

    monkeypatch.setattr(_cuda, "_compile", compile)
    return seen


def cubin(arch="sm_90", scale=1):
    return _cuda._cubin("add.cu", arch, (("SCALE", scale),))


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "kernels").iterdir())


# ---- compiling -------------------------------------------------------------------------------------------------------


def test_compile_reports_registers_of_the_named_function_only(sources):
    (sources / "two.cu").write_text("""
        struct Params { float* p; int i; };
        extern "C" __global__ void small(const __grid_constant__ Params p) { p.p[0] = p.i; }
        extern "C" __global__ void table(const __grid_constant__ Params p) {
            volatile float a[100];
            for (int i = 0; i < 100; i++) a[i] = p.p[i];
            p.p[0] = a[p.i];
        }
    """)
    small, table = (_cuda.compile_only("two.cu", name, "sm_90") for name in ("small", "table"))
    assert small.cubin[:4] == b"\x7fELF"
    assert 0 < small.registers < 20
    assert small.local_bytes == 0
    assert table.local_bytes == 400


@pytest.mark.parametrize("dtype", ["float", "__half", "__nv_bfloat16"])
def test_common_compiles_for_every_dtype(sources, dtype):
    (sources / "gate.cu").write_text("""
        #include "common.cuh"
        struct Params { const T_X* x; T_X* y; };
        extern "C" __global__ void gate(const __grid_constant__ Params p) {
            using Vec = Vec16<T_X>;
            int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * Vec::SIZE;
            float x[Vec::SIZE];
            Vec::load(p.x + i).unpack(x);
            #pragma unroll
            for (int j = 0; j < Vec::SIZE; j++) x[j] = softplus<T_X>(x[j]) * sigmoid(x[j]);
            Vec::pack(x).store(p.y + i);
            p.y[0] = from_float<T_X>(to_float(p.x[1]));
        }
    """)
    compiled = _cuda.compile_only("gate.cu", "gate", "sm_90", (("T_X", dtype),))
    assert compiled.local_bytes == 0


def test_a_wrong_source_gives_the_compilers_log(sources):
    (sources / "add.cu").write_text('extern "C" __global__ void add() { int x = undeclared; }')
    with pytest.raises(RuntimeError, match=r'(?s)add\.cu for sm_90 with .*identifier "undeclared" is undefined'):
        cubin()


def test_unknown_names_are_named(sources):
    with pytest.raises(ValueError, match="name: got 'subtract'"):
        _cuda.compile_only("add.cu", "subtract", "sm_90", (("SCALE", 1),))
    for compile in (
        lambda: _cuda.compile_only("none.cu", "add", "sm_90", ()),
        lambda: _cuda._cubin("none.cu", "sm_90", ()),
    ):
        with pytest.raises(ValueError, match=r"source: got 'none\.cu'"):
            compile()


@pytest.mark.parametrize("package", ["cuda.core", "cuda.bindings", "cuda.pathfinder"])
def test_a_missing_package_gives_the_install_hint(sources, monkeypatch, package):
    for name in list(sys.modules):
        if name == package or name.startswith(package + "."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=re.escape('pip install -e ".[cuda]"')):
        cubin()


def test_import_corey_needs_none_of_nvidias_packages():
    code = "import sys; sys.modules['cuda'] = None; import corey, corey._cuda"
    subprocess.run([sys.executable, "-c", code], cwd=KERNELS.parent, check=True)


# ---- the disk cache --------------------------------------------------------------------------------------------------


def test_a_variant_is_compiled_once_and_read_afterwards(compilations, tmp_path):
    first = cubin()
    assert cubin() == first
    assert len(compilations) == 1
    assert len(entries(tmp_path)) == 1
    assert (tmp_path / "cache" / "kernels").stat().st_mode & 0o777 == 0o700


def test_source_headers_macros_and_architecture_are_in_the_key(compilations, sources):
    seen = {cubin(), cubin(arch="sm_80"), cubin(scale=2)}
    for name in ("add.cu", "common.cuh"):
        path = sources / name
        path.write_text(path.read_text() + "\n// edited")
        seen.add(cubin())
    assert len(seen) == len(compilations) == 5
    (sources / "count.cu").write_text("// another source is in no key of add.cu")
    cubin()
    assert len(compilations) == 5


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "appended", "misplaced"])
def test_a_damaged_entry_is_rebuilt(compilations, tmp_path, damage):
    sound = cubin()
    (path,) = entries(tmp_path)
    entry = path.read_bytes()
    if damage == "misplaced":
        cubin(scale=2)
        (other,) = set(entries(tmp_path)) - {path}
        shutil.copy(other, path)
    else:
        flipped = bytearray(entry)
        flipped[len(entry) // 2] ^= 1
        path.write_bytes({"truncated": entry[:-7], "empty": b"", "flipped": flipped, "appended": entry + b"x"}[damage])
    before = len(compilations)
    assert cubin() == sound
    assert len(compilations) == before + 1
    assert path.read_bytes() == entry
    assert cubin() == sound
    assert len(compilations) == before + 1


def test_a_source_saved_during_the_compilation_is_not_kept_under_the_old_key(compilations, sources, tmp_path):
    compile = _cuda._compile

    def edit_meanwhile(source, arch, macros, report=False):
        (sources / "add.cu").write_text(ADD + "// edited meanwhile")
        return compile(source, arch, macros)

    _cuda._compile = edit_meanwhile  # `compilations` puts the original back
    cubin()
    assert entries(tmp_path) == []


def test_without_a_usable_directory_kernels_are_compiled_in_memory_with_one_warning(
    compilations, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COREY_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set COREY_CACHE"):
        first = cubin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cubin() == first
    assert len(compilations) == 2


def test_a_directory_of_another_user_is_not_read(compilations, tmp_path, monkeypatch):
    cubin()
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        cubin()
    assert len(compilations) == 2


def test_a_directory_open_to_others_is_closed(compilations, tmp_path):
    cubin()
    directory = tmp_path / "cache" / "kernels"
    directory.chmod(0o777)
    cubin()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert len(compilations) == 1


def test_a_full_disk_costs_the_entry_and_not_the_kernel(compilations, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert cubin()
    assert entries(tmp_path) == []


def test_the_cache_follows_xdg_cache_home(compilations, tmp_path, monkeypatch):
    monkeypatch.delenv("COREY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cubin()
    assert len(list((tmp_path / "xdg" / "corey" / "kernels").iterdir())) == 1


def test_readers_and_writers_of_one_entry_do_not_disturb_each_other(compilations, tmp_path):
    """A stand-in for several processes: threads without the lock that `function` holds."""
    expected = cubin()
    (path,) = entries(tmp_path)
    wrong = []

    def work():
        for _ in range(200):
            _cuda._write_entry(path, expected)
            if _cuda._read_entry(path) != expected:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert entries(tmp_path) == [path]


def test_no_two_modules_share_a_scratch():
    """Each lays it out differently, and what one leaves there would mislead the other without an error."""
    owners = {}
    for path in sorted((KERNELS.parent / "corey").glob("_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "_cuda.scratch":
                named = [*node.args[2:], *(keyword.value for keyword in node.keywords)]
                owner = ast.literal_eval(named[0]) if named else ""
                assert owners.setdefault(owner, path.name) == path.name


def test_source_version_follows_edits_and_clear(sources):
    def look():
        _cuda._looked = float("-inf")
        return _cuda.source_version()

    first = look()
    assert look() == first
    (sources / "add.cu").write_text(ADD + "// edited")
    second = look()
    assert second != first
    assert look() == second
    _cuda.clear()
    assert look() != second


# ---- shared arithmetic -----------------------------------------------------------------------------------------------


def log1p_coefficients():
    """The coefficients of log1p_over in kernels/common.cuh, highest power first: for 16 bits and for float32."""
    text = (KERNELS / "common.cuh").read_text()
    body = text[text.index("float log1p_over") :]
    halves, singles, last = body[: body.index("\n}")].replace("} else {", "return").split("return")
    numbers = [re.findall(r"(-?\d[\d.]*(?:e-?\d+)?)f\b", part + last) for part in (halves, singles)]
    return [np.array([float(x) for x in each], dtype=np.float32) for each in numbers]


@pytest.mark.parametrize(("bits", "error", "rounded"), [(16, 1.5e-6, 1.6e-6), (32, 4e-8, 1.2e-7)])
def test_log1p_polynomials_are_accurate_enough_for_their_steps(bits, error, rounded):
    coefficients = log1p_coefficients()[bits // 32]
    assert len(coefficients) == {16: 7, 32: 9}[bits]
    e = np.linspace(0, 1, 1_000_001, dtype=np.float32)[1:]
    exact = np.log1p(e.astype(np.float64)) / e

    assert np.abs(np.polyval(coefficients.astype(np.float64), e.astype(np.float64)) / exact - 1).max() < error

    p = np.full_like(e, coefficients[0])
    for c in coefficients[1:]:  # a float32 product is exact in float64, so this is one fused multiply-add
        p = (p.astype(np.float64) * e + np.float64(c)).astype(np.float32)
    assert np.abs(p / exact - 1).max() < rounded
    assert coefficients[-1] == 1  # so softplus(x) is exp(x) for very negative x


@pytest.mark.gpu
def test_softplus_and_sigmoid(sources):
    (sources / "gate.cu").write_text("""
        #include "common.cuh"
        struct Params { const float* x; float* y; int64 length; };
        extern "C" __global__ void gate(const __grid_constant__ Params p) {
            int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
            if (i >= p.length) return;
            p.y[i] = softplus<float>(p.x[i]);
            p.y[i + p.length] = sigmoid(p.x[i]);
        }
    """)
    special = torch.tensor([0.0, -0.0, -1e3, 1e3, -1e30, 1e30, math.inf, math.nan])
    x = torch.cat([special, torch.linspace(-85, 85, 1_000_001)]).cuda()
    y = torch.full((2, len(x)), 7.0, device="cuda")
    function = _cuda.function("gate.cu", "gate", 0)
    params = struct.pack("PPq", x.data_ptr(), y.data_ptr(), len(x))
    _cuda.launch(function, (len(x) // 128 + 1, 1, 1), 128, 0, params)

    softplus, sigmoid = y[:, :8].cpu()
    want = torch.tensor([math.log(2), math.log(2), 0, 1e3, 0, 1e30, math.inf, math.nan])
    torch.testing.assert_close(softplus, want, equal_nan=True, rtol=3e-7, atol=0)
    want = torch.tensor([0.5, 0.5, 0, 1, 0, 1, 1, math.nan])
    torch.testing.assert_close(sigmoid, want, equal_nan=True, rtol=3e-7, atol=0)

    x, (softplus, sigmoid) = x[8:].double(), y[:, 8:].double()
    tolerance = 5e-7 + 8e-8 * x.abs()  # the argument of ex2 is rounded to float32
    exact = torch.where(x > 0, x, 0) + torch.log1p(torch.exp(-x.abs()))
    assert ((softplus / exact - 1).abs() < tolerance).all()
    assert ((sigmoid / torch.sigmoid(x) - 1).abs() < tolerance).all()


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def add(y, value, scale=1):
    function = _cuda.function("add.cu", "add", y.device.index, (("SCALE", scale),))
    blocks = (y.numel() + 127) // 128
    _cuda.launch(function, (blocks, 1, 1), 128, 0, struct.pack("PfxxxxQ", y.data_ptr(), value, y.numel()))


def count(y):
    device = y.device.index
    function = _cuda.function("count.cu", "count", device)
    scratch = _cuda.scratch(device, 4)
    _cuda.launch(function, (1, 1, 1), 1, 0, struct.pack("PP", scratch.data_ptr(), y.data_ptr()))


@pytest.fixture
def fresh_scratch(monkeypatch):
    monkeypatch.setattr(_cuda, "_scratch", {})


@pytest.mark.gpu
def test_launch_runs_on_every_device(sources):
    for device in range(torch.cuda.device_count()):
        with torch.cuda.device(device):
            y = torch.arange(1000.0, device="cuda")
            add(y, 2.0, scale=3)
            assert torch.equal(y.cpu(), torch.arange(1000.0) + 6)


@pytest.mark.gpu
def test_function_is_kept_until_its_source_changes(sources):
    macros = (("SCALE", 1),)
    first = _cuda.function("add.cu", "add", 0, macros)
    assert _cuda.function("add.cu", "add", 0, macros) is first
    assert first.local_bytes == 0
    assert first.param_bytes == 24
    assert first.blocks_per_sm(first.max_threads, 0) >= 1
    (sources / "add.cu").write_text(ADD.replace("+=", "-="))
    y = torch.zeros(10, device="cuda")
    add(y, 1.0)
    assert y.tolist() == [-1] * 10


@pytest.mark.gpu
def test_launch_runs_on_the_current_stream(sources):
    y = torch.zeros(1 << 20, device="cuda")
    add(y, 0.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        add(y, 1.0)
    done_early = stream.query()
    torch.cuda.synchronize()
    assert not done_early
    assert y.min() == 1


@pytest.mark.gpu
def test_launch_from_a_new_thread(sources):
    y = torch.zeros(100, device="cuda")
    add(y, 1.0)
    thread = threading.Thread(target=add, args=(y, 1.0))
    thread.start()
    thread.join()
    assert y.min() == 2


@pytest.mark.gpu
def test_wrong_launches_are_refused(sources):
    function = _cuda.function("add.cu", "add", 0, (("SCALE", 1),))
    with pytest.raises(ValueError, match="params: got 8 bytes, want the 24 bytes that add takes"):
        _cuda.launch(function, (1, 1, 1), 128, 0, bytes(8))
    with pytest.raises(RuntimeError, match=r"launch of add on cuda:0, grid \(1, 1, 1\), 4096 threads.*INVALID_VALUE"):
        _cuda.launch(function, (1, 1, 1), 4096, 0, bytes(24))


def test_a_plan_that_needs_less_shared_memory_takes_none_from_the_others(monkeypatch):
    asked = []
    driver = SimpleNamespace(
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8),
        cuFuncSetAttribute=lambda handle, attribute, nbytes: (asked.append(nbytes) or 0,),
    )
    monkeypatch.setattr(_cuda, "_driver", lambda: driver)
    function = object.__new__(_cuda.Function)
    function.handle, function.allowed = None, 0
    for nbytes in (100_000, 60_000, 100_000, 120_000):
        function.allow_shared(nbytes)
    assert asked == [100_000, 120_000]


@pytest.mark.gpu
def test_shared_memory_above_the_default_limit(sources):
    function = _cuda.function("add.cu", "add", 0, (("SCALE", 1),))
    with pytest.raises(RuntimeError, match="INVALID_VALUE"):
        _cuda.launch(function, (1, 1, 1), 128, 64 << 10, struct.pack("PfxxxxQ", 0, 0, 0))
    function.allow_shared(64 << 10)
    function.allow_shared(50 << 10)
    _cuda.launch(function, (1, 1, 1), 128, 64 << 10, struct.pack("PfxxxxQ", 0, 0, 0))
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_eager_scratch_persists_on_its_stream_and_grows_from_zero(sources, fresh_scratch):
    y = torch.zeros(1, dtype=torch.int32, device="cuda")
    count(y)
    count(y)
    assert y.item() == 2
    with torch.cuda.stream(torch.cuda.Stream()):
        count(y)
        assert y.item() == 1
    large = _cuda.scratch(0, 1 << 20)
    assert large.numel() >= 1 << 20
    assert large.count_nonzero() == 0
    count(y)
    assert y.item() == 1


@pytest.mark.gpu
def test_owners_have_a_scratch_each(sources, fresh_scratch):
    one, two = _cuda.scratch(0, 100), _cuda.scratch(0, 100, "two")
    assert one.data_ptr() != two.data_ptr()
    assert _cuda.scratch(0, 100, "two").data_ptr() == two.data_ptr()


@pytest.mark.gpu
def test_first_use_of_a_kernel_inside_a_capture(sources, fresh_scratch):
    y = torch.zeros(100, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(y, 1.0)
    graph.replay()
    graph.replay()
    assert y.min() == 2


@pytest.mark.gpu
def test_captured_scratch_starts_from_zero_at_every_replay(sources, fresh_scratch):
    eager, one, two, other = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(4))
    count(eager)
    graph, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count(one)
        filler = torch.full((1024,), 7, dtype=torch.uint8, device="cuda")  # must not get the scratch's memory
        count(two)
        del filler
    with torch.cuda.graph(second, pool=graph.pool()):
        count(other)
    for _ in range(3):
        graph.replay()
        count(eager)
        second.replay()
    assert (one.item(), two.item(), other.item(), eager.item()) == (1, 2, 1, 4)


@pytest.mark.gpu
def test_captured_scratch_grows_inside_the_capture(sources, fresh_scratch):
    one, two = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count(one)
        assert _cuda.scratch(0, 1 << 20).numel() >= 1 << 20
        count(two)
    graph.replay()
    graph.replay()
    assert (one.item(), two.item()) == (1, 1)


@torch.library.custom_op("corey_test::count", mutates_args=())
def count_op(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(1, dtype=torch.int32, device=x.device)
    count(y)
    return y


@count_op.register_fake
def _(x):
    return x.new_empty(1, dtype=torch.int32)


@pytest.mark.gpu
def test_scratch_under_inductors_cuda_graphs(sources, fresh_scratch):
    """mode="reduce-overhead" raises when memory of its pool stays alive after a run."""
    function = torch.compile(lambda x: count_op(x + 1) + count_op(x + 2), mode="reduce-overhead", fullgraph=True)
    x = torch.zeros(8, device="cuda")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert function(x).item() >= 2


@pytest.mark.gpu
def test_a_launch_costs_the_host_a_few_microseconds(sources):
    y = torch.zeros(1, device="cuda")
    function = _cuda.function("add.cu", "add", 0, (("SCALE", 1),))
    params = struct.pack("PfxxxxQ", y.data_ptr(), 0.0, 1)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            _cuda.launch(function, (1, 1, 1), 128, 0, params)
        best = min(best, (time.perf_counter() - start) / 100)
        torch.cuda.synchronize()
    assert best < 10e-6  # loose, as a busy host is no failure
