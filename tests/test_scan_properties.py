"""Properties that hold for any inputs, sought with hypothesis over shapes, layouts, dtypes and options."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_inputs import LAYOUTS, OPTIONS, in_float64, make_inputs, relative_error, tokens

from corey import selective_scan, selective_scan_ref
from corey.scan import TILE

KINDS = ("variable", "grouped", "constant")
any_inputs = st.builds(
    lambda groups, channels, **rest: make_inputs(dim=groups * channels, groups=groups, **rest),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.integers(1, 20),
    length=st.integers(1, 300),
    states=st.integers(1, 24),
    memory=st.sampled_from(("long", "forgetful")),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    B_kind=st.sampled_from(KINDS),
    C_kind=st.sampled_from(KINDS),
    options=st.sets(st.sampled_from(OPTIONS)).map(sorted),
    seed=st.integers(0, 2**20),
)
gate = settings(max_examples=100, derandomize=True, deadline=None)


def run(inputs, **changes):
    return selective_scan(**(inputs | changes), return_last_state=True)


def same_bits(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@gate
@given(any_inputs, st.integers(1, 40))
def test_any_chunk_size_gives_the_same_bits(inputs, tiles):
    assert same_bits(run(inputs, chunk_size=tiles * TILE), run(inputs))


@gate
@given(any_inputs, st.data())
def test_any_split_at_a_tile_resumes_to_the_same_bits(inputs, data):
    length = inputs["u"].shape[-1]
    split = TILE * data.draw(st.integers(0, length // TILE))
    y, last = run(inputs)
    y_first, state = run(tokens(inputs, 0, split))
    y_second, state = run(tokens(inputs, split, length), initial_state=state)
    assert same_bits((torch.cat([y_first, y_second], -1), state), (y, last))


@gate
@given(any_inputs, st.data())
def test_what_comes_later_never_changes_what_came_before(inputs, data):
    length = inputs["u"].shape[-1]
    cut = data.draw(st.integers(0, length))
    y, _ = run(inputs)
    for name in ("u", "delta", "z"):
        if name in inputs:
            inputs[name] = inputs[name].clone()
            inputs[name][..., cut:] = float("nan")
    y_cut, _ = run(inputs)
    assert torch.equal(y[..., :cut], y_cut[..., :cut])
    assert y_cut[..., cut:].isnan().all()


@gate
@given(any_inputs, st.randoms(use_true_random=False))
def test_batch_rows_and_channels_may_be_permuted(inputs, random):
    batch, dim, _ = inputs["u"].shape
    rows, channels = list(range(batch)), list(range(dim))
    random.shuffle(rows)
    grouped = any(inputs[name].dim() == 4 for name in ("B", "C"))
    if not grouped:
        random.shuffle(channels)
    y, last = run(inputs)
    moved = {name: inputs[name][rows][:, channels] for name in ("u", "delta", "z", "initial_state") if name in inputs}
    moved |= {name: inputs[name][channels] for name in ("A", "D", "delta_bias") if name in inputs}
    moved |= {name: inputs[name][channels if inputs[name].dim() == 2 else rows] for name in ("B", "C")}
    assert same_bits(run(inputs, **moved), (y[rows][:, channels], last[rows][:, channels]))


@gate
@given(any_inputs, st.integers(-8, 8))
def test_scaling_u_by_a_power_of_two_scales_the_float32_output_exactly(inputs, power):
    inputs = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    inputs.pop("initial_state", None)
    y, last = run(inputs)
    scaled = run(inputs, u=inputs["u"] * 2.0**power)
    assert same_bits(scaled, (y * 2.0**power, last * 2.0**power))


@settings(gate, max_examples=40)
@given(any_inputs)
def test_any_inputs_match_float64(inputs):
    y, last = run(inputs)
    y_true, last_true = selective_scan_ref(**in_float64(inputs), return_last_state=True)
    rounding = relative_error(y_true.to(y.dtype), y_true)
    assert relative_error(y, y_true) <= 2e-6 + 1.05 * rounding
    assert relative_error(last, last_true) < 2e-6
