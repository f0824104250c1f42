"""The CUDA scan as a registered operator: opcheck, torch.compile, and what it refuses."""

import pytest
import torch
from scan_gpu import assert_same_bits, device_chunk, gpu_inputs, run
from scan_inputs import LAYOUTS, OPTIONS

from corey import selective_scan

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("variable", "grouped", "constant")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")

SMALL = {"batch": 2, "dim": 6, "length": 40, "states": 3, "groups": 2}
SAMPLES = {
    f"{layout} {dtype}": {"layout": layout, "dtype": dtype} for layout in (*LAYOUTS, "expanded") for dtype in DTYPES
}
SAMPLES |= {
    "options " + "+".join(chosen): {"options": chosen}
    for chosen in ([option for i, option in enumerate(OPTIONS) if mask >> i & 1] for mask in range(16))
}
SAMPLES |= {f"B {B} C {C}": {"B_kind": B, "C_kind": C} for B in KINDS for C in KINDS}
SAMPLES |= {f"{length} tokens": {"length": length} for length in (0, 1, 128, 129, 300)}
SAMPLES |= {f"{states} states": {"states": states} for states in (1, 16, 17, 64)}
SAMPLES |= {"one channel": {"dim": 1, "groups": 1}, "one row": {"batch": 1}, "no rows": {"batch": 0}}
SAMPLES |= {f"chunk {chunk}": {"length": 300, "chunk": chunk} for chunk in (128, 256, 1280)}
SAMPLES |= {
    f"chunk on the device, {dtype}, {layout}": {"length": 300, "chunk": "device", "dtype": dtype, "layout": layout}
    for dtype in DTYPES
    for layout in ("channel_major", "token_major")
}
assert len(SAMPLES) >= 60


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_opcheck_passes(sample):
    sample = SMALL | sample
    chunk = sample.pop("chunk", None)
    inputs = gpu_inputs(**sample)
    chunks = (None, device_chunk(128)) if chunk == "device" else (chunk, None)
    torch.library.opcheck(torch.ops.corey.selective_scan.default, [*(inputs.get(name) for name in NAMES), *chunks])


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
def test_compiles_as_one_graph_with_the_same_bits(layout, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(lambda **k: selective_scan(**k, return_last_state=True), fullgraph=True, dynamic=dynamic)
    for length in (129, 1100):
        inputs = gpu_inputs(length=length, options=OPTIONS, layout=layout)
        want = run(inputs)
        for chunk_size in (None, 128, device_chunk(256)):
            got = compiled(**inputs, chunk_size=chunk_size)
            assert_same_bits(got, want)
            assert got[0].stride() == want[0].stride()


def test_compiles_between_other_operations():
    torch.compiler.reset()

    def layer(inputs):
        y = selective_scan(**(inputs | {"u": inputs["u"] * 2}), chunk_size=128)
        return y + 1

    inputs = gpu_inputs(2, 40, 1000, layout="token_major")
    want = run(inputs, u=inputs["u"] * 2)[0] + 1
    got = torch.compile(layer, fullgraph=True)(inputs)
    assert torch.equal(got, want) and got.stride() == want.stride()


def test_compiles_into_the_graphs_of_inductor():
    torch.compiler.reset()
    compiled = torch.compile(lambda **k: selective_scan(**k, chunk_size=128), fullgraph=True, mode="reduce-overhead")
    inputs = gpu_inputs(1, 64, 20_000)
    for seed in range(6):
        inputs["u"].normal_(generator=torch.Generator("cuda").manual_seed(seed))
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(**inputs).clone(), run(inputs)[0])


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("u", "A", "z", "initial_state"))
def test_inputs_that_require_grad_are_refused_by_name(name):
    inputs = gpu_inputs(options=OPTIONS)
    want = run(inputs)
    inputs[name] = inputs[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^{name}: .*no_grad"):
        selective_scan(**inputs)
    with torch.no_grad():
        assert_same_bits(run(inputs), want)


@pytest.mark.parametrize("name", ("delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"))
def test_a_tensor_left_on_the_cpu_is_refused_by_name(name):
    inputs = gpu_inputs(options=OPTIONS)
    run(inputs)
    with pytest.raises(ValueError, match=rf"^{name}: .*cpu"):
        run(inputs, **{name: inputs[name].cpu()})


@pytest.mark.parametrize(
    "chunk_size",
    (0, 100, -128, True, 128.0, torch.tensor(128), torch.tensor(128, dtype=torch.int32)),
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_bad_chunk_sizes_are_refused_by_name(chunk_size):
    with pytest.raises((TypeError, ValueError), match=r"^chunk_size: "):
        run(gpu_inputs(), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("value", "dtype"), ((128, torch.int64), (128.0, torch.float32), ([128], torch.int32)), ids=str
)
def test_bad_chunk_sizes_on_the_device_are_refused_by_name(value, dtype):
    with pytest.raises((TypeError, ValueError), match=r"^chunk_size: "):
        run(gpu_inputs(), chunk_size=torch.tensor(value, dtype=dtype, device="cuda"))
