"""Values of the compiled scan against float64, and what must not change its bits: chunk, split, layout, threads."""

import math
import subprocess
import sys
import threading

import pytest
import torch
from scan_inputs import LAYOUTS, OPTIONS, in_float64, lay_out, make_inputs, relative_error, tokens

from corey import selective_scan, selective_scan_ref
from corey.scan import TILE, scan_carried_ref, scan_reset_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (1, 2, 15, 16, 17, 127, 128, 129, 500, 2049)
MEMORIES = ("long", "forgetful")
# The scan in float32 against float64 stays near 1e-7, and under 1e-6 where states live for hundreds of tokens. A carry
# in half precision comes in at 1e-4, an exponential with an error of 1e-5 at 1e-5.
BOUND = 2e-6


def assert_matches_float64(inputs, bound=BOUND):
    y, state = selective_scan(**inputs, return_last_state=True)
    y_true, state_true = selective_scan_ref(**in_float64(inputs), return_last_state=True)
    assert y.dtype == inputs["u"].dtype and state.dtype == torch.float32
    assert relative_error(y, y_true) < bound
    assert relative_error(state, state_true) < bound


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def run(inputs, **changes):
    return selective_scan(**(inputs | changes), return_last_state=True)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_reference_equals_the_equations_written_out_with_scalars():
    inputs = in_float64(make_inputs(2, 4, 5, 3, memory="forgetful", B_kind="grouped", options=OPTIONS))
    y, last = selective_scan_ref(**inputs, return_last_state=True)
    assert y.dtype == last.dtype == torch.float64
    for b in range(2):
        for d in range(4):
            h = inputs["initial_state"][b, d].tolist()
            for t in range(5):
                step = math.log1p(math.exp(inputs["delta"][b, d, t].item() + inputs["delta_bias"][d].item()))
                u, z = inputs["u"][b, d, t].item(), inputs["z"][b, d, t].item()
                B_t, C_t = inputs["B"][b, d // 2, :, t].tolist(), inputs["C"][b, :, t].tolist()
                A = inputs["A"][d].tolist()
                h = [math.exp(step * A[n]) * h[n] + step * u * B_t[n] for n in range(3)]
                want = sum(h[n] * C_t[n] for n in range(3)) + inputs["D"][d].item() * u
                want *= z / (1 + math.exp(-z))
                assert y[b, d, t].item() == pytest.approx(want, rel=1e-12, abs=1e-14)
            assert last[b, d].tolist() == pytest.approx(h, rel=1e-12)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_float32_stays_at_rounding_error_for_every_length(length, memory):
    assert_matches_float64(make_inputs(length=length, memory=memory))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("states", (1, 3, 4, 16, 17, 64, 256))
def test_float32_stays_at_rounding_error_for_every_number_of_states(states, memory):
    assert_matches_float64(make_inputs(2, 19, 200, states, memory=memory, options=OPTIONS))


@pytest.mark.parametrize("dim", (1, 5, 16, 17, 33, 48))
def test_channels_beyond_a_whole_vector_are_computed(dim):
    assert_matches_float64(make_inputs(3, dim, 150))


@pytest.mark.parametrize(
    "mask", range(16), ids=lambda mask: "+".join(o for i, o in enumerate(OPTIONS) if mask >> i & 1)
)
def test_every_combination_of_options_matches_float64(mask):
    assert_matches_float64(make_inputs(length=140, options=[o for i, o in enumerate(OPTIONS) if mask >> i & 1]))


@pytest.mark.parametrize("groups", (1, 2, 3, 6))
@pytest.mark.parametrize("B_kind", ("variable", "grouped", "constant"))
@pytest.mark.parametrize("C_kind", ("variable", "grouped", "constant"))
def test_every_kind_of_B_and_C_matches_float64(B_kind, C_kind, groups):
    assert_matches_float64(make_inputs(2, 42, 130, B_kind=B_kind, C_kind=C_kind, groups=groups))


def test_delta_without_softplus_is_used_as_it_is():
    inputs = make_inputs(options=("D",))
    assert_matches_float64(inputs | {"delta": inputs["delta"].exp(), "delta_softplus": False})


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
def test_half_precision_loses_no_more_than_rounding_the_exact_result(layout, dtype, memory):
    inputs = make_inputs(2, 32, 700, memory=memory, layout=layout, dtype=dtype)
    y, state = run(inputs)
    y_true, state_true = selective_scan_ref(**in_float64(inputs), return_last_state=True)
    assert relative_error(y, y_true) <= 1.05 * relative_error(y_true.to(dtype), y_true)
    assert relative_error(state, state_true) < BOUND


def test_dtypes_may_differ_between_tensors():
    inputs = make_inputs(length=140)
    mixed = inputs | {"delta": inputs["delta"].bfloat16(), "z": inputs["z"].half(), "B": inputs["B"].half()}
    assert_matches_float64(mixed)


def test_small_integers_give_exactly_the_cumulative_sum():
    generator = torch.Generator().manual_seed(1)
    batch, dim, length, states = 2, 21, 200, 5
    u, B, C = (
        torch.randint(-2, 3, s, generator=generator) for s in [(batch, dim, length)] + 2 * [(batch, states, length)]
    )
    h = (u[:, :, None] * B[:, None]).cumsum(-1)  # (B, D, N, L) int64
    want = (h * C[:, None]).sum(2)
    assert want.abs().max() > 0
    ones = torch.ones(batch, dim, length)
    y, last = selective_scan(u.float(), ones, torch.zeros(dim, states), B.float(), C.float(), return_last_state=True)
    assert torch.equal(y.long(), want) and torch.equal(last.long(), h[..., -1])
    assert torch.equal(y, want.float())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_is_read_exactly_and_rounded_to_nearest_even(dtype):
    # With A = 0, B = C = 1 and one token, y = delta * u: every value passes through a load and a store.
    one = torch.ones(1, 1, 1)

    def product(u, delta):
        return selective_scan(u[None, :, None], delta[None, :, None], torch.zeros(len(u), 1), one, one)[0, :, 0]

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    same = product(every, torch.ones(2**16))
    assert torch.equal(same.isnan(), every.isnan()) and torch.equal(same[~same.isnan()], every[~every.isnan()])

    neighbours = torch.arange(2**15).to(torch.int16).view(dtype)
    neighbours = neighbours[neighbours.isfinite()].double()
    ties = ((neighbours[1:] + neighbours[:-1]) / 2).float()
    for values in (
        ties,
        -ties,
        torch.nextafter(ties, torch.tensor(0.0)),
        torch.nextafter(ties, torch.tensor(math.inf)),
    ):
        assert torch.equal(product(torch.ones(len(values), dtype=dtype), values), values.to(dtype))


# ---- extreme values --------------------------------------------------------------------------------------------------


def test_softplus_is_accurate_from_the_smallest_to_the_largest_step():
    x = torch.cat([torch.linspace(-87, 60, 3000), torch.tensor([-0.0, 0.0, 19.99, 20.0, 20.01, 88.0, 1e4, 1e30])])
    one = torch.ones(1, 1, 1)
    y = selective_scan(
        torch.ones(1, len(x), 1), x[None, :, None], torch.zeros(len(x), 1), one, one, delta_softplus=True
    )
    want = torch.nn.functional.softplus(x.double(), threshold=700)
    assert ((y[0, :, 0].double() - want) / want).abs().max() < 3e-7


def test_decay_is_accurate_from_none_to_underflow():
    x = torch.cat([torch.linspace(-87, 0, 4000), torch.tensor([-1e-6, -1e-3, 1.0, 80.0])])
    one = torch.ones(1, len(x), 1)
    _, last = selective_scan(
        torch.zeros(1, len(x), 1), one, x[:, None], torch.ones(1, 1, 1), torch.ones(1, 1, 1), return_last_state=True,
        initial_state=one,
    )  # fmt: skip
    want = x.double().exp()
    # A log2(e) and its product with the step are each rounded to float32, beside the rounding of the result.
    allowed = 1.5e-7 + 2 * 6e-8 * x.double().abs()
    assert ((last[0, :, 0].double() - want).abs() / want < allowed).all()


def test_gate_is_accurate_at_both_ends():
    z = torch.cat([torch.linspace(-80, 80, 3001), torch.tensor([-1e30, 1e30, -200.0])])
    one = torch.ones(1, 1, 1)
    y = selective_scan(
        torch.ones(1, len(z), 1), one.expand(1, len(z), 1), torch.zeros(len(z), 1), one, one, z=z[None, :, None]
    )
    want = torch.nn.functional.silu(z.double())
    assert torch.allclose(y[0, :, 0].double(), want, rtol=3e-7, atol=1e-30)


def test_zero_step_freezes_the_state_and_huge_decay_resets_it():
    inputs = make_inputs(length=200, options=("initial_state",)) | {"delta_softplus": False}
    _, frozen = run(inputs, delta=torch.zeros_like(inputs["delta"]))
    assert torch.equal(frozen, inputs["initial_state"])
    for decay in (-1e5, -1e30, -math.inf):
        A = torch.full_like(inputs["A"], decay)
        _, last = run(inputs, A=A, delta=torch.ones_like(inputs["delta"]))
        want = inputs["u"][:, :, -1, None] * inputs["B"][:, None, :, -1]
        assert torch.equal(last, want)


def test_very_negative_bias_freezes_the_state():
    inputs = make_inputs(length=200, options=("initial_state", "delta_bias"))
    y, last = run(inputs, delta_bias=torch.full((24,), -1e4))
    assert torch.equal(last, inputs["initial_state"]) and y.isfinite().all()


def test_growing_states_overflow_to_infinity_as_in_float32():
    inputs = make_inputs(1, 16, 80, 1, options=()) | {"delta_softplus": False}
    inputs |= {"A": torch.full((16, 1), 2.0), "delta": torch.ones_like(inputs["delta"])}
    y, last = run(inputs)
    y_ref, last_ref = selective_scan_ref(**inputs, return_last_state=True)
    assert last.isinf().all() and torch.equal(last, last_ref)
    assert torch.equal(y.isinf(), y_ref.isinf()) and not y.isnan().any()


@pytest.mark.parametrize("growth", (89.0, 200.0, 1e5, 1e30, math.inf))
def test_growth_beyond_float32_in_one_step_is_infinite(growth):
    one = torch.ones(1, 1, 1)
    _, last = selective_scan(0 * one, one, one[0] * growth, one, one, initial_state=one, return_last_state=True)
    assert last.item() == math.inf


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", ("u", "delta", "z"))
@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
def test_a_poisoned_token_reaches_only_its_own_channel_and_only_later_tokens(name, value, layout):
    inputs = make_inputs(2, 40, 300, layout=layout)
    y, last = run(inputs)
    poisoned = inputs[name].clone()
    poisoned[1, 18, 133] = value
    y_poisoned, last_poisoned = run(inputs, **{name: poisoned})
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 18, 133:] = True
    assert torch.equal(y[~touched], y_poisoned[~touched])
    assert not torch.equal(y[1, 18, 133:], y_poisoned[1, 18, 133:])
    others = torch.ones(2, 40, dtype=torch.bool)
    others[1, 18] = False
    assert torch.equal(last[others], last_poisoned[others])
    if math.isnan(value):
        assert y_poisoned[1, 18, 133].isnan()
        if name != "z":
            assert y_poisoned[1, 18, 133:].isnan().all() and last_poisoned[1, 18].isnan().all()


def test_a_poisoned_B_reaches_all_channels_of_its_group_and_no_others():
    inputs = make_inputs(2, 40, 300, B_kind="grouped", C_kind="grouped", groups=2)
    y, _ = run(inputs)
    B = inputs["B"].clone()
    B[1, 1, 3, 133] = math.nan
    y_poisoned, _ = run(inputs, B=B)
    assert y_poisoned[1, 20:, 133:].isnan().all()
    y_poisoned[1, 20:, 133:] = y[1, 20:, 133:]
    assert torch.equal(y, y_poisoned)


# ---- bits ------------------------------------------------------------------------------------------------------------

SHAPES = [
    (b, d, length, n)
    for b, d in ((1, 16), (2, 20), (3, 5))
    for length in (1, 127, 128, 129, 1100, 2500)
    for n in (1, 16)
]
CHUNKS = [TILE * k for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64)] + [2**40 * TILE]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_chunk_size_never_changes_a_bit(shape, dtype):
    inputs = make_inputs(*shape, dtype=dtype, layout="token_major" if shape[1] == 16 else "channel_major")
    want = run(inputs)
    assert want[0].abs().sum() > 0
    for chunk_size in CHUNKS:
        assert_same_bits(run(inputs, chunk_size=chunk_size), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", (0, 128, 256, 640, 700))
def test_split_and_resume_through_the_state_is_bitwise_equal(split, dtype):
    inputs = make_inputs(2, 24, 700, dtype=dtype, options=OPTIONS)
    y, last = run(inputs)
    y_first, state = run(tokens(inputs, 0, split))
    y_second, state = run(tokens(inputs, split, 700), initial_state=state)
    assert_same_bits((torch.cat([y_first, y_second], -1), state), (y, last))


@pytest.mark.parametrize("chunk_size", (1, 50, 128, 384, 500, 1000))
def test_host_loop_that_carries_the_state_is_the_scan(chunk_size):
    inputs = make_inputs(length=500, options=OPTIONS)
    got = scan_carried_ref(**inputs, return_last_state=True, chunk_size=chunk_size)
    if chunk_size % TILE == 0 or chunk_size >= 500:
        assert_same_bits(got, run(inputs))
    else:
        assert relative_error(got[0], run(inputs)[0]) < BOUND


def test_host_loop_that_resets_the_state_is_another_function():
    inputs = make_inputs(length=512)
    y, last = run(inputs)
    y_reset, last_reset = scan_reset_ref(**inputs, return_last_state=True, chunk_size=128)
    assert relative_error(y_reset, y) > 1e-2 and relative_error(last_reset, last) > 1e-2
    assert torch.equal(y_reset[..., :128], y[..., :128])
    assert_same_bits(scan_reset_ref(**inputs, return_last_state=True, chunk_size=512), (y, last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_row_is_bitwise_what_it_is_alone(dtype):
    inputs = make_inputs(4, 20, 200, dtype=dtype, options=OPTIONS, B_kind="grouped", C_kind="grouped")
    y, last = run(inputs)
    by_row = ("u", "delta", "z", "B", "C", "initial_state")
    for b in range(4):
        alone = run(inputs, **{name: inputs[name][b : b + 1] for name in by_row})
        assert_same_bits(alone, (y[b : b + 1], last[b : b + 1]))


def test_a_channel_is_bitwise_what_it_is_alone_whatever_its_place_in_a_vector():
    inputs = make_inputs(1, 40, 200, options=OPTIONS)
    y, last = run(inputs)
    for d in (0, 7, 15, 16, 39):
        own = {name: inputs[name][:, d : d + 1] for name in ("u", "delta", "z", "initial_state")}
        own |= {name: inputs[name][d : d + 1] for name in ("A", "D", "delta_bias")}
        assert_same_bits(run(inputs, **own), (y[:, d : d + 1], last[:, d : d + 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_never_changes_a_bit_and_views_are_left_alone(layout, dtype):
    plain = make_inputs(2, 40, 203, dtype=dtype)
    want = run(plain)
    laid_out = {name: lay_out(plain[name], layout) for name in ("u", "delta", "z")}
    before = [x.clone() for x in laid_out.values()]
    assert_same_bits(run(plain, **laid_out), want)
    assert all(torch.equal(x, old) for x, old in zip(laid_out.values(), before, strict=True))


def test_layouts_of_weights_and_projections_never_change_a_bit():
    plain = make_inputs(2, 40, 203, options=OPTIONS)
    want = run(plain)
    strange = {name: plain[name].t().contiguous().t() for name in ("A",)}
    strange |= {name: lay_out(plain[name], "token_major") for name in ("B", "initial_state")}
    strange |= {"C": lay_out(plain["C"], "sliced"), "D": plain["D"].repeat_interleave(3)[::3]}
    assert_same_bits(run(plain, **strange), want)


def test_expanded_tensors_equal_their_copies_bitwise():
    inputs = make_inputs(2, 40, 150)
    for name, view in (
        ("u", inputs["u"][:1, :1].expand(2, 40, 150)),
        ("delta", inputs["delta"][:, :, :1].expand(2, 40, 150)),
        ("B", inputs["B"][:1, :, :1].expand(2, 16, 150)),
        ("A", inputs["A"][:1].expand(40, 16)),
        ("D", inputs["D"][:1].expand(40)),
    ):
        assert 0 in view.stride()
        assert_same_bits(run(inputs, **{name: view}), run(inputs, **{name: view.contiguous()}))


def test_groups_of_one_equal_no_groups_bitwise():
    inputs = make_inputs()
    grouped = {name: inputs[name][:, None].expand(-1, 3, -1, -1) for name in ("B", "C")}
    assert_same_bits(run(inputs, **grouped), run(inputs))


def test_repeats_and_thread_counts_never_change_a_bit():
    inputs = make_inputs(2, 100, 400, layout="token_major")  # large enough to be shared between threads
    want = run(inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for _ in range(20):
                assert_same_bits(run(inputs), want)
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_threads_do_not_disturb_each_other():
    cases = [make_inputs(2, 100, 400, seed=seed) for seed in range(4)]
    want = [run(inputs) for inputs in cases]
    wrong = []

    def work(inputs, expected):
        for _ in range(10):
            y, last = run(inputs)
            if not (torch.equal(y, expected[0]) and torch.equal(last, expected[1])):
                wrong.append(inputs)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cases, want, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---- shapes and layouts of the result --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 5), (2, 0, 5), (0, 0, 0)], ids=str)
def test_empty_inputs_give_empty_outputs_and_keep_the_state(shape):
    batch, dim, length = shape
    for options in ((), OPTIONS):
        inputs = make_inputs(batch, dim, length, 4, options=options)
        y, last = run(inputs)
        assert y.shape == shape and last.shape == (batch, dim, 4)
        assert torch.equal(last, inputs.get("initial_state", torch.zeros(batch, dim, 4)))
        y_ref, last_ref = selective_scan_ref(**inputs, return_last_state=True)
        assert y_ref.shape == y.shape and torch.equal(last_ref, last)


def test_output_keeps_the_layout_of_u_and_aliases_nothing():
    for layout, stride in (("channel_major", (24 * 300, 300, 1)), ("token_major", (24 * 300, 1, 24))):
        inputs = make_inputs(layout=layout, options=OPTIONS)
        y, last = run(inputs)
        assert y.stride() == stride and last.is_contiguous()
        assert last.data_ptr() != inputs["initial_state"].data_ptr()


def test_initial_state_is_not_written_to():
    inputs = make_inputs(options=OPTIONS)
    before = inputs["initial_state"].clone()
    run(inputs)
    assert torch.equal(inputs["initial_state"], before)


def test_every_element_of_the_output_is_written():
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        for length, dim in ((1, 1), (17, 33), (129, 16)):
            assert run(make_inputs(2, dim, length, layout="token_major"))[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_return_last_state_only_y_comes_back():
    inputs = make_inputs()
    assert torch.equal(selective_scan(**inputs), run(inputs)[0])
    assert torch.equal(selective_scan_ref(**inputs), selective_scan_ref(**inputs, return_last_state=True)[0])
    assert torch.equal(scan_reset_ref(**inputs, chunk_size=300), run(inputs)[0])


# ---- the registered operator -----------------------------------------------------------------------------------------


def _sample(**changes):
    inputs = make_inputs(**({"batch": 2, "dim": 6, "length": 40, "states": 3, "groups": 2} | changes))
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
    return [inputs.get(name) for name in names] + [None]


SAMPLES = {layout: _sample(layout=layout) for layout in LAYOUTS}
SAMPLES |= {f"{dtype}": _sample(dtype=dtype) for dtype in DTYPES[1:]}
SAMPLES |= {"no options": _sample(options=()), "all options": _sample(options=OPTIONS)}
SAMPLES |= {f"only {name}": _sample(options=(name,)) for name in OPTIONS}
SAMPLES |= {
    "grouped": _sample(B_kind="grouped", C_kind="grouped"),
    "constant": _sample(B_kind="constant", C_kind="constant"),
}
SAMPLES |= {"no tokens": _sample(length=0), "one token": _sample(length=1), "one channel": _sample(dim=1)}
SAMPLES |= {"one row": _sample(batch=1), "one state": _sample(states=1), "no rows": _sample(batch=0)}
SAMPLES["expanded"] = [_sample()[0][:1, :1].expand(2, 6, 40), *_sample()[1:]]
SAMPLES["chunk"] = [*_sample()[:-1], 256]


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_opcheck_passes(sample):
    torch.library.opcheck(torch.ops.corey.selective_scan.default, sample)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_as_one_graph_with_the_same_bits(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(lambda **k: selective_scan(**k, return_last_state=True), fullgraph=True, dynamic=dynamic)
    for length in (40, 129):
        inputs = make_inputs(length=length, options=OPTIONS, layout="token_major")
        for chunk_size in (None, 128, 256):
            got = compiled(**inputs, chunk_size=chunk_size)
            assert_same_bits(got, run(inputs))
            assert got[0].stride() == run(inputs)[0].stride()


def test_meta_tensors_go_through_the_fake_kernel():
    inputs = {
        k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in make_inputs(layout="token_major").items()
    }
    y, last = run(inputs)
    assert y.device.type == last.device.type == "meta" and y.stride() == (24 * 300, 1, 24) and last.shape == (2, 24, 16)


@pytest.mark.parametrize("name", ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"))
def test_inputs_that_require_grad_are_refused_by_name_and_by_the_operator(name):
    inputs = make_inputs(options=OPTIONS)
    want = run(inputs)
    inputs[name] = inputs[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^{name}: .*no_grad.*selective_scan_ref"):
        selective_scan(**inputs)
    positional = [inputs[n] for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")]
    with pytest.raises(RuntimeError, match=rf"^{name}: "):
        torch.ops.corey.selective_scan(*positional, inputs["initial_state"], None)
    with torch.no_grad():
        assert_same_bits(run(inputs), want)
    y = selective_scan_ref(**inputs)
    assert torch.autograd.grad(y.sum(), inputs[name])[0].abs().sum() > 0


def test_importing_corey_needs_neither_numba_nor_a_compiler():
    code = "import sys, corey; sys.exit('numba' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this platform has no fork")
def test_a_forked_child_can_scan():
    code = (
        "import os, torch, sys; from scan_inputs import make_inputs; from corey import selective_scan\n"
        "torch.set_num_threads(2); inputs = make_inputs(2, 100, 400); y = selective_scan(**inputs)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(int((selective_scan(**inputs).numpy() != y.numpy()).any()))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=__file__.rsplit("/", 1)[0], timeout=60).returncode == 0
