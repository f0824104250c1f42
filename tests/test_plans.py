"""corey._plans: which calls are like an earlier one; on a GPU, that a call found again is no other than the first."""

import struct
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from scan_inputs import OPTIONS, make_inputs
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from corey import (
    _conv_cuda,
    _cuda,
    _plans,
    _scan_cuda,
    _scan_way,
    _state_update_cuda,
    conv,
    scan,
    selective_scan,
    state_update,
)
from corey._plans import ABSENT, Plans, alignment

f32, bf16 = torch.float32, torch.bfloat16


class Plan:
    def __init__(self, version=0):
        self.version = version


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # that of CPU tensors
    monkeypatch.setattr(_cuda, "source_version", lambda: 0)
    return Plans()


def tensors(**changes):
    weight = torch.nn.Parameter(torch.randn(6, 4), requires_grad=False)
    given = {"x": torch.randn(2, 6, 8), "weight": weight, "bias": torch.randn(6), "state": ABSENT[0], "gate": ABSENT[1]}
    return [*(given | changes).values()]


def test_torch_has_what_finds_calls_again():
    """Where this fails, calls are right and slower: corey/_plans.py needs another way to compare tensors."""
    assert _plans.TensorGuards is not None and _plans.empty is not None


# ---- what is like ----------------------------------------------------------------------------------------------------


def test_other_tensors_of_the_same_layout_find_the_plan_and_the_layout_of_its_results(plans):
    plan, y = Plan(), torch.empty(2, 8, 6, dtype=bf16).transpose(1, 2)
    assert plans.find("options", tensors()) is None
    plans.keep(plan, (y,), "options", tensors())
    assert plans.find("options", tensors()) == (plan, (((2, 6, 8), (48, 1, 6), bf16),))
    assert plans.find("other options", tensors()) is None


@pytest.mark.parametrize(
    "name, other",
    {
        "shape": ("x", torch.randn(2, 6, 9)),
        "strides": ("x", torch.randn(2, 8, 6).transpose(1, 2)),
        "dimensions": ("bias", torch.randn(6, 1)),
        "dtype": ("x", torch.randn(2, 6, 8).to(bf16)),
        "device": ("x", torch.empty(2, 6, 8, device="meta")),
        "type": ("weight", torch.randn(6, 4)),
        "gradient": ("bias", torch.randn(6, requires_grad=True)),
        "negative": ("x", torch._neg_view(torch.randn(2, 6, 8))),
        "sparse": ("bias", torch.randn(6).to_sparse()),
        "absent": ("bias", ABSENT[2]),
        "present": ("state", torch.randn(0)),
        "none": ("bias", None),
        "number": ("bias", 3.0),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_differs_finds_nothing(name, other, plans):
    plans.keep(Plan(), (), "options", tensors())
    assert plans.find("options", tensors()) is not None
    assert plans.find("options", tensors(**{name: other})) is None


def test_several_layouts_are_kept_under_the_same_options(plans):
    kept = [Plan() for _ in range(3)]
    cases = [tensors(), tensors(x=torch.randn(2, 8, 6).transpose(1, 2)), tensors(bias=ABSENT[2])]
    for plan, case in zip(kept, cases):
        plans.keep(plan, (), "options", case)
    assert [plans.find("options", case)[0] for case in cases] == kept


def test_alignment_is_part_of_the_options():
    assert alignment(16, 0, 512) == 0
    assert alignment(16, 8, 512) != 0
    assert len({alignment(8, 16), alignment(16, 8), alignment(8, 8), alignment(4, 12), alignment(8, 4)}) == 5


def test_a_tensor_that_comes_twice_is_not_kept(plans):
    x = torch.randn(3)
    plans.keep(Plan(), (), "options", (x, x))
    assert not plans._kept


# ---- what is never found ---------------------------------------------------------------------------------------------


def test_a_changed_source_finds_nothing_and_its_new_plan_is_found(plans, monkeypatch):
    plans.keep(Plan(version=0), (), "options", tensors())
    monkeypatch.setattr(_cuda, "source_version", lambda: 1)
    assert plans.find("options", tensors()) is None
    new = Plan(version=1)
    plans.keep(new, (), "options", tensors())
    assert plans.find("options", tensors())[0] is new


def test_a_device_that_is_not_current_finds_nothing(plans, monkeypatch):
    plans.keep(Plan(), (), "options", tensors())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    assert plans.find("options", tensors()) is None


def test_a_gradient_finds_nothing(plans):
    wants = tensors(bias=torch.randn(6, requires_grad=True))
    with torch.no_grad():
        plans.keep(Plan(), (), "options", wants)
        assert plans.find("options", wants) is not None
    assert plans.find("options", wants) is None


def test_new_memory_that_torch_fills_finds_nothing(plans):
    plans.keep(Plan(), (), "options", tensors())
    torch.use_deterministic_algorithms(True)
    try:
        assert plans.find("options", tensors()) is None
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_plan_is_made_once_and_again_for_a_changed_source(plans, monkeypatch):
    made = []

    def make():
        made.append(Plan(_cuda.source_version()))
        return made[-1]

    x = torch.randn(3)
    assert plans.known((1,), (x, None)) is None
    assert plans.get((1,), (x, None), make) is plans.get((1,), (torch.randn(3), None), make) is made[0]
    assert plans.known((1,), (x, None)) is made[0]
    assert plans.known((1,), (x, x)) is plans.known((1,), (x, 3.0)) is plans.known((2,), (x, None)) is None
    monkeypatch.setattr(_cuda, "source_version", lambda: 1)
    assert plans.known((1,), (x, None)) is None
    assert plans.get((1,), (x, None), make) is made[1]


# ---- the operators ---------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """What is launched, on CPU tensors: kernels by name, in the place of functions, and all that they are given."""
    seen = []

    class Function:
        def __init__(self, source, name, device, macros):
            self.name = name

        def allow_shared(self, nbytes):
            pass

    class Properties:
        major = 0  # no clusters
        multi_processor_count = 1
        shared_memory_per_block_optin = 0

    def launch(function, grid, threads, shared_bytes, params, **how):
        seen.append([function.name, grid, threads, shared_bytes, bytes(params), how])

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(_cuda, "function", Function)
    monkeypatch.setattr(_cuda, "launch", launch)
    monkeypatch.setattr(_cuda, "source_version", lambda: 0)
    for module, name in ((_scan_cuda, "_plans"), (_conv_cuda, "_plans"), (_conv_cuda, "_update_plans")):
        monkeypatch.setattr(module, name, Plans())
    monkeypatch.setattr(_state_update_cuda, "_plans", Plans())
    return seen


def scan_calls(missing):
    inputs = make_inputs(2, 6, 70, options=[option for option in OPTIONS if option not in missing])
    given = [inputs.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    given += [True, inputs.get("initial_state"), None, scan._outputs]
    return _scan_cuda, _scan_cuda.scan, _scan_cuda.scan_again, given


def conv_calls(missing):
    given = [torch.randn(2, 6, 70), torch.randn(6, 4), torch.randn(6), True, torch.randn(2, 6, 3)]
    given = [None if name in missing else x for name, x in zip(("x", "weight", "bias", "silu", "initial_state"), given)]

    def first(*given):
        return _conv_cuda.convolve(*given, conv._check, conv._outputs)

    return _conv_cuda, first, partial(_conv_cuda.convolve_again, outputs=conv._outputs), given


def conv_update_calls(missing):
    given = [torch.randn(2, 6), torch.randn(2, 6, 3), torch.randn(6, 4), None if missing else torch.randn(6), True]
    return _conv_cuda, partial(_conv_cuda.update, check=conv._check_update), _conv_cuda.update_again, given


def state_update_calls(missing):
    inputs = make_inputs(2, 6, 1, options=[option for option in OPTIONS if option not in missing])
    given = [torch.randn(2, 6, 16), inputs["u"][..., 0], inputs["delta"][..., 0], inputs["A"]]
    given += [inputs["B"][..., 0], inputs["C"][..., 0], inputs.get("D")]
    given += [inputs["z"][..., 0] if "z" in inputs else None, inputs.get("delta_bias"), True]
    first = partial(_state_update_cuda.update, check=state_update._check)
    return _state_update_cuda, first, _state_update_cuda.update_again, given


CALLS = {scan_calls: OPTIONS, conv_calls: ("bias", "initial_state"), conv_update_calls: ("bias",)}
CALLS |= {state_update_calls: ("D", "z", "delta_bias")}


@pytest.mark.parametrize(
    "make, missing",
    [
        (make, missing)
        for make, names in CALLS.items()
        for missing in dict.fromkeys(((), *((name,) for name in names), names))
    ],
    ids=lambda value: value.__name__ if callable(value) else "without " + ", ".join(value),
)
def test_a_call_found_again_launches_what_the_first_did(make, missing, launches, monkeypatch):
    module, first, again, given = make(missing)
    monkeypatch.setattr(module, "empty", torch._C._dynamo.guards._empty_strided_cpu)
    assert again(*given) is None
    held = [first(*given), again(*given)]
    monkeypatch.setattr(Plans, "known", lambda *_: pytest.fail("not found again"))
    held.append(again(*given))
    held = [results if isinstance(results, tuple) else (results,) for results in held]
    assert len({tuple((x.shape, x.stride(), x.dtype) for x in results) for results in held}) == 1
    for i, results in enumerate(held):  # which lie elsewhere each time
        for x in results:
            assert launches[i][4].count(struct.pack("=Q", x.data_ptr())) == 1
            launches[i][4] = launches[i][4].replace(struct.pack("=Q", x.data_ptr()), b"a result")
    assert launches[0] == launches[1] == launches[2] and len(launches) == 3


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def warm():
    """Inputs whose calls are found again, and what they give."""
    from scan_gpu import gpu_inputs, run

    inputs = gpu_inputs(2, 40, 300, dtype=bf16, options=OPTIONS)
    for _ in range(3):
        want = run(inputs)
    return inputs, want


@pytest.fixture
def found(monkeypatch):
    """Counts the calls that are found again."""
    find, count = Plans.find, []

    def counted(self, options, tensors):
        result = find(self, options, tensors)
        count.append(1) if result is not None else None
        return result

    monkeypatch.setattr(Plans, "find", counted)
    return count


@pytest.mark.gpu
@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cuda"), nullcontext))
def test_a_call_is_found_again_and_gives_the_same_bits(context, warm, found):
    from scan_gpu import assert_same_bits, run

    inputs, want = warm
    with context():
        run(inputs)
        del found[:]
        for _ in range(3):
            got = run(inputs)
            assert_same_bits(got, want)
            assert [x.stride() for x in got] == [x.stride() for x in want]
    assert len(found) == 3


@pytest.mark.gpu
def test_a_call_is_found_again_inside_a_capture(warm, found):
    from scan_gpu import assert_same_bits, run

    inputs, want = warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(inputs)
    assert len(found) == 1
    for x in got:
        x.fill_(float("nan"))
    graph.replay()
    assert_same_bits(got, want)


@pytest.mark.gpu
def test_modes_see_a_call_that_would_be_found_again(warm, found):
    inputs, _ = warm
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for mode in (Dispatch, Function):
        del seen[:]
        with mode():
            selective_scan(**inputs)
        assert any("selective_scan" in name for name in seen)
    assert not found


@pytest.mark.gpu
def test_a_changed_source_is_noticed_by_a_call_that_would_be_found_again(warm, found):
    from scan_gpu import assert_same_bits, run

    inputs, want = warm
    _cuda.clear()
    assert_same_bits(run(inputs), want)
    assert not found


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"))
def test_a_call_that_would_be_found_again_is_refused_for_another_tensor(name, warm):
    inputs, _ = warm
    for wrong in (inputs[name].cpu(), inputs[name].double(), inputs[name].clone().requires_grad_(), 1.0):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{name}: "):
            selective_scan(**inputs | {name: wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("change", ({"delta_softplus": 1}, {"chunk_size": 128.0}, {"chunk_size": True}), ids=str)
def test_a_call_that_would_be_found_again_is_refused_for_an_equal_option(change, warm):
    inputs, _ = warm
    for _ in range(3):
        selective_scan(**inputs, chunk_size=128)
    with pytest.raises(TypeError, match=f"^{next(iter(change))}: "):
        selective_scan(**inputs | {"chunk_size": 128} | change)


PAIRS = _scan_way.PAIRS[1]


@pytest.mark.parametrize(
    "blocks, tiles, chunk_size, layout, pairs, way",
    [
        (64, 32, None, "channel_major", PAIRS, (32, PAIRS)),
        (64, 32, None, "channel_major", None, (1, None)),  # split
        (64, 2, None, "token_major", None, (2, None)),  # too short to be split
        (40, 32, None, "channel_major", PAIRS, (1, None)),  # of 1280 channels
        (46, 32, None, "channel_major", PAIRS, (32, PAIRS)),
        (46, 32, None, "token_major", PAIRS, (1, None)),
        (46, 16, None, "token_major", PAIRS, (16, PAIRS)),  # the shorter, the more three launches cost
        (48, 32, None, "channel_major", _scan_way.PAIRS[0], (32, _scan_way.PAIRS[0])),
        (33, 32, None, "channel_major", _scan_way.PAIRS[0], (1, None)),
        (4, 5, None, "channel_major", PAIRS, (5, PAIRS)),
        (512, 32, None, "channel_major", None, (32, None)),  # enough blocks with one lane a share
        (64, 512, 384, "channel_major", PAIRS, (3, None)),
        (64, 512, 512 * 128, "channel_major", PAIRS, (512, PAIRS)),
        (64, 512, torch.tensor(128, dtype=torch.int32), "channel_major", PAIRS, (512, None)),
    ],
)
def test_a_scan_is_one_pass_or_split_by_the_blocks_that_it_makes(blocks, tiles, chunk_size, layout, pairs, way):
    assert _scan_way.way(blocks, tiles, 132, chunk_size, layout, pairs, None) == way


@pytest.mark.parametrize(
    "channels, tiles, chunk_size, layout, way",
    [
        (1024, 32, None, "channel_major", (20, _scan_way.IN_PARTS)),
        (1024, 8, None, "token_major", (5, _scan_way.IN_PARTS)),
        (1024, 5, None, "channel_major", (5, PAIRS)),
        (512, 16, None, "channel_major", (10, _scan_way.IN_PARTS)),
        (768, 32, None, "channel_major", (1, None)),
        (512, 32, None, "channel_major", (1, None)),  # enough multiprocessors to find states that are found twice
        (1024, 32, 20 * 128, "channel_major", (20, _scan_way.IN_PARTS)),  # what None stands for
        (1024, 32, 19 * 128, "channel_major", (19, None)),
        (1024, 32, 32 * 128, "channel_major", (32, PAIRS)),
        (1024, 32, torch.tensor(2560, dtype=torch.int32), "channel_major", (32, None)),
    ],
)
def test_two_blocks_share_a_sequence_where_that_is_the_fastest(channels, tiles, chunk_size, layout, way):
    parts = _scan_way.IN_PARTS
    assert _scan_way.way(channels // 32, tiles, 132, chunk_size, layout, PAIRS, parts) == way


def test_the_second_part_looks_ahead_over_tiles_of_the_first():
    for tiles in range(_scan_way.SHORT + 1, 400):
        assert 0 < _scan_way.lead(tiles) < _scan_way.first_part(tiles) < tiles <= 2 * _scan_way.first_part(tiles)


class H200:
    major = 9
    multi_processor_count = 132
    shared_memory_per_block_optin = 227 << 10


class A100:
    major = 8
    multi_processor_count = 108
    shared_memory_per_block_optin = 163 << 10


@pytest.mark.parametrize(
    "gpu, shape, dtype, walkers_and_tokens",
    [
        (H200, (1, 1536, 4096), torch.bfloat16, (3, 64)),
        (H200, (1, 1520, 4096), torch.bfloat16, (4, 64)),  # not blocks of 12 channels
        (H200, (1, 2048, 4096), torch.bfloat16, (4, 64)),
        (H200, (1, 3072, 4096), torch.float16, (6, 64)),
        (H200, (2, 2048, 4096), torch.float32, (8, 64)),
        (H200, (1, 3072, 4096), torch.float32, (8, 64)),  # registers
        (H200, (1, 5120, 4096), torch.bfloat16, (10, 64)),
        (H200, (1, 5120, 4096), torch.float32, None),  # too few registers
        (H200, (1, 6144, 4096), torch.bfloat16, (12, 32)),
        (H200, (8, 2048, 4096), torch.bfloat16, None),  # more than a block a multiprocessor
        (H200, (1, 2048, 4097), torch.bfloat16, None),  # no whole vectors
        (H200, (1, 2048, 40), torch.bfloat16, (4, 64)),  # rounds that are more than half full
        (H200, (1, 2048, 16), torch.bfloat16, None),
        (A100, (1, 1536, 4096), torch.bfloat16, (4, 64)),  # of what it can hold
        (A100, (1, 3072, 4096), torch.bfloat16, (12, 32)),
    ],
)
def test_blocks_in_pairs_are_the_smallest_that_give_a_multiprocessor_one(gpu, shape, dtype, walkers_and_tokens):
    block = _scan_way.pairs_for(torch.empty(shape, dtype=dtype, device="meta"), 1, gpu)
    assert (block and (block.walkers, block.tokens)) == walkers_and_tokens


@pytest.mark.parametrize(
    "gpu, shape, dtype, can",
    [
        (H200, (1, 1024, 4096), torch.bfloat16, True),
        (H200, (1, 1056, 4096), torch.float32, True),
        (H200, (1, 1072, 4096), torch.bfloat16, False),  # more than half of the multiprocessors
        (H200, (1, 1024, 640), torch.bfloat16, False),  # too short
        (H200, (1, 1024, 4097), torch.bfloat16, False),  # no whole vectors
        (H200, (1, 1024, 16384), torch.bfloat16, True),
        (H200, (1, 1024, 32768), torch.bfloat16, False),  # more tiles than fit into shared memory
        (A100, (1, 768, 4096), torch.bfloat16, False),  # has no clusters
    ],
)
def test_two_blocks_can_share_a_sequence(gpu, shape, dtype, can):
    block = _scan_way.parts_for(torch.empty(shape, dtype=dtype, device="meta"), 1, gpu)
    assert block == (_scan_way.IN_PARTS if can else None)
