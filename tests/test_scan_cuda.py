"""Values of the CUDA scan against a float64 truth, over shapes, layouts, dtypes, options and kinds of memory."""

import itertools
import math

import pytest
import torch
from scan_gpu import assert_same_bits, device_chunk, gpu_inputs, run
from scan_inputs import LAYOUTS, OPTIONS, in_float64, lay_out, relative_error
from scan_truth import scan_truth

from corey import selective_scan, selective_scan_ref

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATES = (1, 4, 8, 16, 64, 128)
LENGTHS = (1, 2, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 4097, 129, 2049, 4097)  # the hard ones twice
GROUPS = {5: 5, 17: 1, 24: 3, 33: 3, 40: 4, 66: 2, 96: 6, 130: 2}  # channels: a number of groups that divides them
KINDS = ("variable", "grouped", "constant")
MEMORIES = ("long", "forgetful", "frozen", "cumulative", "wide")
CHUNKS = (None, 128, 384, 1024, "device")
BOUND = 1e-5  # relative L2 of fp32 arithmetic; sums over thousands of tokens stay under 3e-6
ROUNDING = 1.05  # half-precision output may be this much worse than the truth rounded


def assert_true(inputs, y, state):
    y_true, state_true = scan_truth(**inputs)
    size, error = y_true.norm(), (y.double() - y_true).norm()
    assert y.dtype == inputs["u"].dtype and state.dtype == torch.float32
    if y.dtype == torch.float32:
        assert error <= BOUND * size, f"y: {error / size:.2e}"
    else:
        rounding = (y_true.to(y.dtype).double() - y_true).norm()
        # What fp32 arithmetic leaves shows only where the exact values happen to need no rounding.
        assert error <= ROUNDING * rounding + 1e-6 * size, f"y: {error / size:.3e}, rounding {rounding / size:.3e}"
    size, error = state_true.norm(), (state.double() - state_true).norm()
    assert error <= BOUND * size, f"state: {error / size:.2e}"


def matches(inputs, **changes):
    assert_true(inputs, *run(inputs, **changes))


# ---- the truth itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ((), OPTIONS, ("z", "initial_state"), ("D", "delta_bias")), ids="+".join)
@pytest.mark.parametrize("B_kind", KINDS)
@pytest.mark.parametrize("C_kind", KINDS)
def test_the_truth_is_the_reference_in_float64(B_kind, C_kind, options):
    for softplus in (False, True):
        inputs = gpu_inputs(2, 6, 33, 5, B_kind=B_kind, C_kind=C_kind, groups=3, options=options)
        inputs["delta_softplus"] = softplus
        y, state = scan_truth(**inputs)
        y_ref, state_ref = selective_scan_ref(**in_float64(inputs), return_last_state=True)
        assert y.dtype == state.dtype == torch.float64
        assert torch.allclose(y, y_ref, rtol=1e-11, atol=1e-13) and torch.allclose(state, state_ref, rtol=1e-11)


# ---- the sweep -------------------------------------------------------------------------------------------------------

# Four configurations for every number of states and dtype. A configuration is a compiled variant or two, since rows of
# odd length are not aligned, so what costs nothing to vary (length, size, memory, chunk) varies inside it.
SWEEP = list(itertools.product(STATES, DTYPES, range(4)))
assert len(SWEEP) * len(LENGTHS) >= 1000


def configuration(index):
    mask = index * 7 % 16
    return {
        "layout": (*LAYOUTS, "expanded")[index % 6],
        "B_kind": KINDS[index // 2 % 3],
        "C_kind": KINDS[(index // 6 + index) % 3],
        "options": [option for i, option in enumerate(OPTIONS) if mask >> i & 1],
    }


def remember(inputs, memory):
    """The inputs with another decay. Softplus stays on, so a step of zero comes from a hugely negative delta."""
    A, delta = inputs["A"], inputs["delta"]
    if memory == "frozen":
        return inputs | {"delta": torch.full_like(delta, -1e4)}
    if memory == "cumulative":
        return inputs | {"A": torch.zeros_like(A)}
    if memory == "wide":  # from no decay at all to decay within a token
        # Not between the two, where 1 - decay is a few units in the last place of 1: those roundings add up, token by
        # token, in any fp32 scan.
        rates = 10 ** torch.linspace(-2, 5, A.numel(), device=A.device)
        rates[::10] = 0.0
        return inputs | {"A": -rates[torch.randperm(A.numel(), device=A.device)].view_as(A)}
    return inputs


@pytest.mark.parametrize("index", range(len(SWEEP)), ids=["-".join(map(str, each)) for each in SWEEP].__getitem__)
def test_float64_is_matched_over_lengths_sizes_memories_and_chunks(index):
    states, dtype, _ = SWEEP[index]
    torch.manual_seed(index)
    for i, length in enumerate(LENGTHS):
        dim = list(GROUPS)[(index + 3 * i) % len(GROUPS)]
        memory = MEMORIES[(index + i) % len(MEMORIES)]
        chunk = CHUNKS[(index // 5 + i) % len(CHUNKS)]
        inputs = gpu_inputs(
            1 + (index + i) % 3,
            dim,
            length,
            states,
            groups=GROUPS[dim],
            memory="forgetful" if memory == "forgetful" else "long",
            dtype=dtype,
            seed=index * len(LENGTHS) + i,
            **configuration(index),
        )
        inputs = remember(inputs, memory)
        try:
            matches(inputs, chunk_size=device_chunk(256) if chunk == "device" else chunk)
        except AssertionError as error:
            raise AssertionError(
                f"L={length} D={dim} {memory} chunk {chunk} {configuration(index)}: {error}"
            ) from error


# ---- options, layouts and dtypes one at a time -----------------------------------------------------------------------


@pytest.mark.parametrize("softplus", (False, True))
@pytest.mark.parametrize(
    "mask", range(16), ids=lambda mask: "+".join(o for i, o in enumerate(OPTIONS) if mask >> i & 1)
)
def test_every_combination_of_options_matches_float64(mask, softplus):
    inputs = gpu_inputs(2, 24, 140, options=[o for i, o in enumerate(OPTIONS) if mask >> i & 1])
    if not softplus:
        inputs |= {"delta": 0.01 * inputs["delta"].exp(), "delta_softplus": False}
    if not softplus and "delta_bias" in inputs:
        inputs["delta_bias"] = 0.01 * inputs["delta_bias"].exp()
    matches(inputs)


@pytest.mark.parametrize("states", (2, 3, 5, 15, 17, 24, 100, 255, 256))
def test_other_numbers_of_states_match_float64(states):
    matches(gpu_inputs(2, 19, 200, states, options=OPTIONS))


@pytest.mark.parametrize("groups", (1, 2, 3, 6, 42))
@pytest.mark.parametrize("B_kind", ("variable", "grouped"))
def test_groups_match_float64_with_projections_in_any_layout(B_kind, groups):
    inputs = gpu_inputs(2, 42, 130, B_kind=B_kind, C_kind="grouped", groups=groups)
    matches(inputs)
    token_major = inputs["C"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # (B, L, G, N) in memory
    assert_same_bits(run(inputs, C=token_major), run(inputs))


def test_dtypes_may_differ_between_tensors():
    inputs = gpu_inputs(length=140)
    matches(inputs | {"delta": inputs["delta"].bfloat16(), "z": inputs["z"].half(), "B": inputs["B"].half()})
    matches(inputs | {"u": inputs["u"].bfloat16(), "C": inputs["C"].bfloat16()})


def test_delta_of_zero_freezes_the_state_and_huge_decay_resets_it():
    inputs = gpu_inputs(length=200, options=("initial_state",)) | {"delta_softplus": False}
    _, frozen = run(inputs, delta=torch.zeros_like(inputs["delta"]))
    assert torch.equal(frozen, inputs["initial_state"])
    for decay in (-1e5, -1e30, -math.inf):
        A = torch.full_like(inputs["A"], decay)
        _, last = run(inputs, A=A, delta=torch.ones_like(inputs["delta"]))
        assert torch.equal(last, inputs["u"][:, :, -1, None] * inputs["B"][:, None, :, -1])


def test_an_impulse_fades_over_twenty_thousand_tokens_as_in_float64():
    inputs = gpu_inputs(1, 20, 20_000, options=()) | {"delta_softplus": False}
    u = torch.zeros_like(inputs["u"])
    u[..., 0] = 1e4
    inputs |= {"u": u, "delta": 1e-3 * (0.5 + torch.rand_like(u)), "A": -0.01 - 0.5 * torch.rand_like(inputs["A"])}
    y, state = run(inputs)
    assert_true(inputs, y, state)
    # The tail is the whole answer here, and each of 20 000 decays is rounded.
    assert relative_error(y[..., -1000:], scan_truth(**inputs)[0][..., -1000:]) < 2 * BOUND


@pytest.mark.parametrize(("batch", "dim", "length"), ((70_001, 3, 5), (2, 70_001, 130), (1, 65_536, 1)), ids=str)
def test_batches_and_channels_beyond_65535(batch, dim, length):
    matches(gpu_inputs(batch, dim, length, 4, options=OPTIONS, groups=1), chunk_size=128)


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 5), (2, 0, 5), (0, 0, 0)], ids=str)
def test_empty_inputs_give_empty_outputs_and_keep_the_state(shape):
    batch, dim, length = shape
    for options in ((), OPTIONS):
        inputs = gpu_inputs(batch, dim, length, 4, options=options)
        y, last = run(inputs)
        assert y.shape == shape and y.is_cuda and last.shape == (batch, dim, 4)
        assert torch.equal(last, inputs.get("initial_state", torch.zeros(batch, dim, 4, device="cuda")))


# ---- exact arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
@pytest.mark.parametrize("length", (1, 17, 128, 129, 2049, 4097))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_give_exactly_the_cumulative_sum(dtype, length, layout):
    generator = torch.Generator().manual_seed(length)
    for batch, dim, states in ((2, 21, 5), (1, 40, 16), (1, 7, 64)):
        shapes = [(batch, dim, length)] + 2 * [(batch, states, length)] + [(batch, dim, states), (dim,)]
        whole = [torch.randint(-2, 3, shape, generator=generator).cuda() for shape in shapes]
        u, B, C, start, D = whole
        h = (u[:, :, None] * B[:, None]).cumsum(-1) + start[..., None]  # (B, D, N, L) int64
        want = (h * C[:, None]).sum(2) + D[:, None] * u
        u, B, C = (x.to(dtype) for x in (u, B, C))
        y, last = selective_scan(
            lay_out(u, layout),
            torch.ones_like(u),
            torch.zeros(dim, states, device="cuda"),
            B,
            C,
            D.float(),
            return_last_state=True,
            initial_state=start.float(),
            chunk_size=256,
        )
        assert torch.equal(last.long(), h[..., -1]) and torch.equal(last, h[..., -1].float())
        assert torch.equal(y, want.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_is_read_exactly_and_rounded_to_nearest_even(dtype):
    # With A = 0, B = C = 1 and one token, y = delta * u: every value passes through a load and a store.
    one = torch.ones(1, 1, 1, device="cuda")

    def product(u, delta):
        A = torch.zeros(len(u), 1, device="cuda")
        return selective_scan(u[None, :, None].cuda(), delta[None, :, None].cuda(), A, one, one)[0, :, 0].cpu()

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
    x = torch.cat(
        [torch.linspace(-85, 60, 3000), torch.tensor([-0.0, 0.0, 19.99, 20.0, 20.01, 88.0, 1e4, 1e30])]
    ).cuda()
    one = torch.ones(1, 1, 1, device="cuda")
    u = torch.ones(1, len(x), 1, device="cuda")
    y = selective_scan(u, x[None, :, None], torch.zeros(len(x), 1).cuda(), one, one, delta_softplus=True)
    want = torch.nn.functional.softplus(x.double(), threshold=700)
    error = ((y[0, :, 0].double() - want) / want).abs()
    # Far below any step a model takes, the rounding of x log2(e) shows.
    assert error[x > -20].max() < 1e-6 and error.max() < 5e-6


def test_decay_is_accurate_from_none_to_underflow():
    x = torch.cat([torch.linspace(-85, 0, 4000), torch.tensor([-1e-6, -1e-3, 1.0, 80.0])]).cuda()
    one = torch.ones(1, len(x), 1, device="cuda")
    _, last = selective_scan(
        torch.zeros_like(one), one, x[:, None], one[:, :1], one[:, :1], return_last_state=True, initial_state=one
    )
    want = x.double().exp()
    # The hardware's exp2 is good to 2^-22; A log2(e) and its product with the step are each rounded to float32.
    allowed = 3e-7 + 2 * 6e-8 * x.double().abs()
    assert ((last[0, :, 0].double() - want).abs() / want < allowed).all()


def test_gate_is_accurate_at_both_ends():
    z = torch.cat([torch.linspace(-80, 80, 3001), torch.tensor([-1e30, 1e30, -200.0])]).cuda()
    one = torch.ones(1, len(z), 1, device="cuda")
    y = selective_scan(one, one, torch.zeros(len(z), 1).cuda(), one[:, :1], one[:, :1], z=z[None, :, None])
    want = torch.nn.functional.silu(z.double())
    assert torch.allclose(y[0, :, 0].double(), want, rtol=5e-6, atol=1e-30)


@pytest.mark.parametrize("growth", (89.0, 200.0, 1e5, 1e30, math.inf))
def test_growth_beyond_float32_in_one_step_is_not_finite(growth):
    one = torch.ones(1, 1, 1, device="cuda")
    _, last = selective_scan(0 * one, one, one[0] * growth, one, one, initial_state=one, return_last_state=True)
    assert not math.isfinite(last.item())


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", ("u", "delta", "z"))
@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
def test_a_poisoned_token_reaches_only_its_own_channel_and_only_later_tokens(name, value, layout):
    inputs = gpu_inputs(2, 40, 700, layout=layout)
    for chunk_size in (None, 128):
        y, last = run(inputs, chunk_size=chunk_size)
        poisoned = inputs[name].clone()
        poisoned[1, 18, 333] = value
        y_poisoned, last_poisoned = run(inputs, chunk_size=chunk_size, **{name: poisoned})
        touched = torch.zeros_like(y, dtype=torch.bool)
        touched[1, 18, 333:] = True
        assert torch.equal(y[~touched], y_poisoned[~touched])
        assert not torch.equal(y[1, 18, 333:], y_poisoned[1, 18, 333:])
        others = torch.ones(2, 40, dtype=torch.bool, device="cuda")
        others[1, 18] = False
        assert torch.equal(last[others], last_poisoned[others])
        if math.isnan(value):
            assert y_poisoned[1, 18, 333].isnan()
            if name != "z":
                assert y_poisoned[1, 18, 333:].isnan().all() and last_poisoned[1, 18].isnan().all()


def test_a_poisoned_B_reaches_all_channels_of_its_group_and_no_others():
    inputs = gpu_inputs(2, 40, 700, B_kind="grouped", C_kind="grouped", groups=2)
    y, _ = run(inputs, chunk_size=128)
    B = inputs["B"].clone()
    B[1, 1, 3, 333] = math.nan
    y_poisoned, _ = run(inputs, B=B, chunk_size=128)
    assert y_poisoned[1, 20:, 333:].isnan().all()
    y_poisoned[1, 20:, 333:] = y[1, 20:, 333:]
    assert torch.equal(y, y_poisoned)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
def test_every_element_of_the_outputs_is_written(layout):
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        for length, dim in ((1, 1), (17, 33), (129, 16), (1000, 40), (2049, 130)):
            for options in ((), OPTIONS):
                y, last = run(gpu_inputs(2, dim, length, layout=layout, options=options), chunk_size=256)
                assert y.isfinite().all() and last.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", (*LAYOUTS, "expanded"))
def test_inputs_are_left_alone(layout):
    inputs = gpu_inputs(2, 40, 203, layout=layout, options=OPTIONS)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    y, last = run(inputs, chunk_size=128)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    starts = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, torch.Tensor)}
    assert {y.untyped_storage().data_ptr(), last.untyped_storage().data_ptr()}.isdisjoint(starts)


def test_output_keeps_the_layout_of_u():
    for layout, stride in (("channel_major", (24 * 300, 300, 1)), ("token_major", (24 * 300, 1, 24))):
        y, last = run(gpu_inputs(layout=layout, options=OPTIONS))
        assert y.stride() == stride and last.is_contiguous()


# One case whose last batch row and one whose last tokens start more than 2^31 elements into u, delta, z and y.
@pytest.mark.parametrize(
    ("layout", "shape"), (("channel_major", (3, 16_384, 43_712)), ("token_major", (1, 32_768, 65_600))), ids=str
)
def test_offsets_beyond_2_to_the_31(layout, shape):
    free = torch.cuda.mem_get_info()[0]
    if free < 20e9:
        pytest.skip(f"needs 20 GB of GPU memory, {free / 1e9:.0f} GB are free")
    batch, dim, length = shape
    assert math.prod(shape) > 2**31
    torch.manual_seed(0)
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    if layout == "channel_major":
        x = torch.empty(batch, dim, length, **half).normal_()
    else:
        x = torch.empty(batch, length, dim, **half).normal_().transpose(1, 2)
    B, C = torch.randn(2, batch, 16, length, **half)
    weights = {"A": -torch.rand(dim, 16, device="cuda"), "delta_bias": torch.full((dim,), -4.6, device="cuda")}
    y, last = run({"u": x, "delta": x, "z": x, "B": B, "C": C, "delta_softplus": True} | weights)
    for b, first in ((0, 0), (batch - 1, dim - 48)):
        own = slice(first, first + 48)
        rows = x[b : b + 1, own].contiguous()
        alone = {"u": rows, "delta": rows, "z": rows, "B": B[b : b + 1], "C": C[b : b + 1], "delta_softplus": True}
        alone |= {name: weight[own] for name, weight in weights.items()}
        assert_same_bits(run(alone), (y[b : b + 1, own], last[b : b + 1, own]))
    assert y[-1, -1, -1].isfinite() and y[-1, -1, -1000:].abs().sum() > 0
