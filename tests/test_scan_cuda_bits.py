"""What must not change a bit of the CUDA scan: chunk, split, layout, neighbours, repetition, streams and graphs."""

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from scan_gpu import Differences, assert_same_bits, device_chunk, gpu_inputs, run
from scan_inputs import LAYOUTS, OPTIONS, lay_out, tokens

from corey import _scan_cuda, _scan_way
from corey.scan import TILE

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (*size, length, states)
    for size in ((1, 16), (2, 20), (3, 5), (1, 130), (2, 64))
    for length in (1, 127, 128, 129, 1100, 2500, 4096, 6000)
    for states in (1, 8, 16, 17, 64)
]
CHUNKS = [TILE * k for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 20, 32, 64)] + [2**40 * TILE]
LONG = ((1, 8, 65_536, 16), (1, 256, 16_384, 16), (2, 40, 30_001, 16), (1, 2048, 4097, 16))
assert len(SHAPES) >= 200 and len(CHUNKS) >= 16


# ---- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", range(10))
def test_chunk_size_never_changes_a_bit(part, dtype):
    differences = Differences()
    for i, shape in list(enumerate(SHAPES))[part::10]:
        inputs = gpu_inputs(*shape, dtype=dtype, layout="token_major" if i // 5 % 2 else "channel_major")
        want = run(inputs)
        assert want[0].abs().sum() > 0
        for chunk_size in CHUNKS:
            differences.add(run(inputs, chunk_size=chunk_size), want)
    assert int(differences) == 0


@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LONG, ids=lambda shape: "x".join(map(str, shape)))
def test_chunk_size_never_changes_a_bit_of_long_or_wide_sequences(shape, dtype, layout):
    inputs = gpu_inputs(*shape, dtype=dtype, layout=layout, options=OPTIONS)
    want, differences = run(inputs, chunk_size=2**40 * TILE), Differences()
    for chunk_size in (None, *CHUNKS, device_chunk(128), device_chunk(640)):
        differences.add(run(inputs, chunk_size=chunk_size), want)
    assert int(differences) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chunk_size_on_the_device_is_as_good_as_an_int_and_rounded_up_to_tiles(dtype):
    differences = Differences()
    for length in (1, 300, 5000):
        inputs = gpu_inputs(2, 40, length, dtype=dtype)
        want = run(inputs)
        for chunk_size in (1, 100, 128, 129, 1024, 2**31 - 1):
            differences.add(run(inputs, chunk_size=device_chunk(chunk_size)), want)
    assert int(differences) == 0


@pytest.mark.parametrize("chunk_size", (0, -7, -(2**31)))
def test_a_nonsensical_chunk_size_on_the_device_cannot_hang_or_change_the_result(chunk_size):
    inputs = gpu_inputs(2, 40, 3000)
    assert_same_bits(run(inputs, chunk_size=device_chunk(chunk_size)), run(inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_in_pairs_or_not_gives_the_same_bits(dtype, layout, monkeypatch):
    differences = Differences()
    for shape in ((1, 16, 1), (2, 34, 31), (1, 130, 288), (3, 40, 1057), (1, 480, 384), (1, 4096, 352)):
        for how in ({}, {"memory": "forgetful", "B_kind": "constant", "C_kind": "grouped", "options": OPTIONS}):
            inputs = gpu_inputs(*shape, dtype=dtype, layout=layout, **how)
            want = run(inputs, chunk_size=TILE)
            for pairs in (*_scan_way.PAIRS, None):
                monkeypatch.setattr(_scan_way, "pairs_for", lambda *_, pairs=pairs: pairs)
                _scan_cuda._plans.clear()
                differences.add(run(inputs, chunk_size=2**40 * TILE), want)
    _scan_cuda._plans.clear()
    assert int(differences) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_blocks_a_sequence_give_the_same_bits(dtype, layout, monkeypatch):
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no clusters of blocks, which are new on compute capability 9.0")
    monkeypatch.setattr(_scan_way, "parts_for", lambda *_: _scan_way.IN_PARTS)
    differences = Differences()
    for shape in ((1, 16, 641), (2, 34, 768), (1, 130, 1057), (3, 40, 2048), (1, 1024, 4096), (1, 20, 19000)):
        for how in ({}, {"memory": "forgetful", "B_kind": "constant", "C_kind": "grouped", "options": OPTIONS}):
            inputs = gpu_inputs(*shape, dtype=dtype, layout=layout, **how)
            _scan_cuda._plans.clear()
            parts = run(inputs, chunk_size=_scan_way.first_part(-(-shape[2] // TILE)) * TILE)
            differences.add(parts, run(inputs, chunk_size=TILE))
    _scan_cuda._plans.clear()
    assert int(differences) == 0


def test_two_blocks_a_sequence_of_any_length_after_any_other():
    """The longer a sequence, the more shared memory the same kernel takes."""
    made = {length: gpu_inputs(1, 1024, length, dtype=torch.bfloat16) for length in (1024, 4096, 2048)}
    want = {length: run(inputs, chunk_size=TILE) for length, inputs in made.items()}
    for length in (4096, 1024, 4096, 2048, 1024, 4096):
        assert_same_bits(run(made[length]), want[length])


# ---- splits, rows and channels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", (0, 128, 256, 640, 1280, 1400))
def test_split_and_resume_through_the_state_is_bitwise_equal(split, dtype, layout):
    inputs = gpu_inputs(2, 24, 1400, dtype=dtype, layout=layout, options=OPTIONS)
    y, last = run(inputs)
    y_first, state = run(tokens(inputs, 0, split), chunk_size=128)
    y_second, state = run(tokens(inputs, split, 1400), initial_state=state)
    assert_same_bits((torch.cat([y_first, y_second], -1), state), (y, last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_row_is_bitwise_what_it_is_alone(dtype):
    inputs = gpu_inputs(4, 20, 1000, dtype=dtype, options=OPTIONS, B_kind="grouped", C_kind="grouped")
    y, last = run(inputs)
    by_row = ("u", "delta", "z", "B", "C", "initial_state")
    for b in range(4):
        alone = run(inputs, **{name: inputs[name][b : b + 1] for name in by_row})
        assert_same_bits(alone, (y[b : b + 1], last[b : b + 1]))


def test_a_row_of_a_batch_that_fills_the_gpu_is_bitwise_what_it_is_alone():
    inputs = gpu_inputs(64, 512, 512, dtype=torch.bfloat16)
    y, last = run(inputs)
    for b in (0, 33, 63):
        alone = run(inputs, **{name: inputs[name][b : b + 1] for name in ("u", "delta", "z", "B", "C")})
        assert_same_bits(alone, (y[b : b + 1], last[b : b + 1]))


def test_a_channel_is_bitwise_what_it_is_alone_whatever_its_place_in_a_block():
    inputs = gpu_inputs(1, 70, 1000, options=OPTIONS)
    y, last = run(inputs)
    for d in (0, 7, 15, 16, 31, 32, 69):
        own = {name: inputs[name][:, d : d + 1] for name in ("u", "delta", "z", "initial_state")}
        own |= {name: inputs[name][d : d + 1] for name in ("A", "D", "delta_bias")}
        assert_same_bits(run(inputs, **own), (y[:, d : d + 1], last[:, d : d + 1]))


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_never_changes_a_bit(layout, dtype):
    for length in (203, 1024):
        plain = gpu_inputs(2, 40, length, dtype=dtype)
        laid_out = {name: lay_out(plain[name], layout) for name in ("u", "delta", "z")}
        assert_same_bits(run(plain, **laid_out, chunk_size=256), run(plain))


def test_layouts_of_weights_and_projections_never_change_a_bit():
    plain = gpu_inputs(2, 40, 256, options=OPTIONS)
    want = run(plain)
    strange = {"A": plain["A"].t().contiguous().t(), "D": plain["D"].repeat_interleave(3)[::3]}
    strange["delta_bias"] = plain["delta_bias"].expand(2, 40).contiguous()[1]
    strange["initial_state"] = lay_out(plain["initial_state"], "token_major")
    for B, C in itertools.product(LAYOUTS, ("token_major", "sliced")):
        changed = {"B": lay_out(plain["B"], B), "C": lay_out(plain["C"], C)}
        assert_same_bits(run(plain, **strange, **changed), want)


def test_expanded_tensors_equal_their_copies_bitwise():
    inputs = gpu_inputs(2, 40, 150)
    for name, view in (
        ("u", inputs["u"][:1, :1].expand(2, 40, 150)),
        ("delta", inputs["delta"][:, :, :1].expand(2, 40, 150)),
        ("B", inputs["B"][:1, :, :1].expand(2, 16, 150)),
        ("C", inputs["C"][:1].expand(2, 16, 150)),
        ("A", inputs["A"][:1].expand(40, 16)),
        ("D", inputs["D"][:1].expand(40)),
    ):
        assert 0 in view.stride()
        assert_same_bits(run(inputs, **{name: view}), run(inputs, **{name: view.contiguous()}))


def test_groups_of_one_equal_no_groups_bitwise():
    inputs = gpu_inputs()
    grouped = {name: inputs[name][:, None].expand(-1, 3, -1, -1) for name in ("B", "C")}
    assert_same_bits(run(inputs, **grouped), run(inputs))


# ---- repetition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
@pytest.mark.parametrize("shape", ((2, 100, 400, 16), (1, 2048, 2048, 16), (1, 64, 20_000, 16)), ids=str)
def test_a_hundred_repeats_are_bitwise_equal(shape, layout, dtype):
    inputs = gpu_inputs(*shape, dtype=dtype, layout=layout)
    want, differences = run(inputs), Differences()
    for i in range(100):
        differences.add(run(inputs, chunk_size=(None, 128, 1024)[i % 3]), want)
    assert int(differences) == 0


def test_scans_of_different_sizes_behind_one_another_do_not_disturb_each_other():
    cases = [
        (gpu_inputs(*shape, seed=i, options=OPTIONS), chunk_size)
        for i, (shape, chunk_size) in enumerate(
            itertools.product(((1, 16, 4000, 16), (2, 300, 1000, 16), (1, 1000, 3000, 4)), (128, 512, None))
        )
    ]
    want = [run(inputs, chunk_size=2**40 * TILE) for inputs, _ in cases]
    generator, differences = torch.Generator().manual_seed(0), Differences()
    for i in torch.randint(len(cases), (300,), generator=generator).tolist():
        inputs, chunk_size = cases[i]
        differences.add(run(inputs, chunk_size=chunk_size), want[i])
    assert int(differences) == 0


def test_calls_from_several_threads_do_not_disturb_each_other():
    cases = [gpu_inputs(2, 100, 2000, seed=seed) for seed in range(4)]
    want = [run(inputs) for inputs in cases]
    torch.cuda.synchronize()
    wrong = []

    def work(inputs, expected, stream):
        differences = 0
        with torch.cuda.stream(stream):
            for _ in range(25):
                y, last = run(inputs, chunk_size=128)
                differences += not (torch.equal(y, expected[0]) and torch.equal(last, expected[1]))
        wrong.append(differences)

    streams = [torch.cuda.default_stream(), torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    workers = [threading.Thread(target=work, args=each) for each in zip(cases, want, streams, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == [0, 0, 0, 0]


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_side_stream_gives_the_same_bits_in_its_own_order():
    inputs = gpu_inputs(2, 100, 3000)
    later = gpu_inputs(2, 100, 3000, seed=1)["u"]
    want = run(inputs, u=later)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some 25 ms, so that a launch on another stream would read the old values
        inputs["u"].copy_(later)
        got = run(inputs, chunk_size=128)
    side.synchronize()
    assert_same_bits(got, want)


_THREE_STREAMS = """
import torch
from scan_gpu import Differences, gpu_inputs, run
shapes = ((1, 64, 65_536, 16), (1, 2048, 8192, 16), (1, 300, 30_001, 16))
cases = [gpu_inputs(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(shapes)]
want = [run(inputs, chunk_size=2**40 * 128) for inputs in cases]
busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
streams = [torch.cuda.Stream() for _ in cases]
filler = torch.cuda.Stream()
torch.cuda.synchronize()
counts = []
for inputs, expected, stream in zip(cases, want, streams):
    with torch.cuda.stream(stream):
        counts.append(Differences())
for i in range(100):
    if i % 2:  # blocks of other kernels come and go on the multiprocessors meanwhile
        with torch.cuda.stream(filler):
            busy @ busy
    for inputs, expected, stream, count in zip(cases, want, streams, counts):
        with torch.cuda.stream(stream):
            count.add(run(inputs, chunk_size=(128, 256, None)[i % 3]), expected)
torch.cuda.synchronize()
print("differences", [int(count) for count in counts])
"""


def test_streams_that_scan_at_the_same_time_neither_deadlock_nor_disturb_each_other():
    # In a process of its own, since a deadlock on the GPU can only be ended with the process.
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    command = [sys.executable, "-c", _THREE_STREAMS]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "differences [0, 0, 0]"


# ---- graphs ----------------------------------------------------------------------------------------------------------


def captured(function):
    """The graph of a call, and its outputs, which every replay writes anew."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def renew(inputs, seed):
    """Other values in the same tensors."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for name in ("u", "z", "B"):
        inputs[name].normal_(generator=generator)


@pytest.mark.parametrize("chunk_size", (None, 128, 1024, "device"))
@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
@pytest.mark.parametrize("length", (300, 8192))
def test_a_replayed_graph_equals_eager_and_follows_its_inputs(length, layout, chunk_size):
    inputs = gpu_inputs(2, 72, length, layout=layout, dtype=torch.bfloat16, options=OPTIONS)
    chunk = device_chunk(128) if chunk_size == "device" else chunk_size
    graph, outputs = captured(lambda: run(inputs, chunk_size=chunk))
    for seed in range(3):
        renew(inputs, seed)
        want = run(inputs)
        for _ in range(10):
            graph.replay()
            assert_same_bits(outputs, want)


def test_a_chunk_size_on_the_device_may_change_between_replays():
    inputs, chunk = gpu_inputs(1, 100, 20_000), device_chunk(128)
    graph, outputs = captured(lambda: run(inputs, chunk_size=chunk))
    want = run(inputs)
    for tokens_a_chunk in (128, 4096, 256, 2**31 - 1, 640, 1):
        chunk.fill_(tokens_a_chunk)
        for x in outputs:
            x.fill_(float("nan"))
        graph.replay()
        assert_same_bits(outputs, want)


def test_several_scans_in_one_graph_follow_one_another():
    first, other = gpu_inputs(2, 72, 3000, options=OPTIONS), gpu_inputs(1, 500, 700, seed=1)

    def three():
        y, state = run(first, chunk_size=128)
        return *run(first, u=y, initial_state=state, chunk_size=256), *run(other, chunk_size=128)

    graph, outputs = captured(three)
    for seed in range(3):
        renew(first, seed)
        want = three()
        for _ in range(10):
            graph.replay()
        assert_same_bits(outputs, want)


def test_two_graphs_replayed_on_two_streams_do_not_disturb_each_other():
    cases = [gpu_inputs(1, 64, 30_000, seed=0), gpu_inputs(1, 500, 9_000, seed=1)]
    want = [run(inputs) for inputs in cases]
    graphs = [captured(lambda inputs=inputs: run(inputs, chunk_size=128)) for inputs in cases]
    streams, differences = [torch.cuda.Stream() for _ in cases], [Differences() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, outputs), expected, count in zip(streams, graphs, want, differences, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                count.add(outputs, expected)
    torch.cuda.synchronize()
    assert [int(count) for count in differences] == [0, 0]


def test_a_graph_and_eager_calls_on_other_streams_do_not_disturb_each_other():
    inputs, eager = gpu_inputs(1, 64, 30_000), gpu_inputs(1, 300, 9_000, seed=1)
    want, want_eager = run(inputs), run(eager)
    graph, outputs = captured(lambda: run(inputs, chunk_size=128))
    side, replayed, called = torch.cuda.Stream(), Differences(), Differences()
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.replay()
            replayed.add(outputs, want)
        called.add(run(eager, chunk_size=128), want_eager)
    torch.cuda.synchronize()
    assert (int(replayed), int(called)) == (0, 0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; torch sees fewer on this machine")
def test_tensors_of_a_device_that_is_not_current():
    inputs = gpu_inputs(2, 40, 3000, options=OPTIONS)
    elsewhere = {name: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    got = run(elsewhere, chunk_size=128)
    assert all(x.device == torch.device("cuda:1") for x in got)
    assert_same_bits([x.cpu() for x in got], [x.cpu() for x in run(inputs)])
