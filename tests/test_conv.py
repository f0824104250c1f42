"""The causal convolution: against float64, over layouts and options, by pieces and token by token, on CPU and CUDA."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import LAYOUTS, lay_out, relative_error

from corey.chunk_rules import ChunkRule, device_chunk
from corey.conv import OutputHistogram, causal_conv1d, causal_conv1d_ref, causal_conv1d_update
from corey.entropy import histogram_entropy

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RULE = ChunkRule(128, 2048, math.log(256))


def make(batch=2, dim=12, length=37, width=4, *, dtype=torch.float32, layout="channel_major", device="cpu", seed=0):
    """x, weight, bias, initial_state as keyword arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    return {
        "x": lay_out(normal(batch, dim, length), layout),
        "weight": normal(dim, width),
        "bias": normal(dim),
        "initial_state": normal(batch, dim, width - 1),
    }


def truth(inputs, activation):
    """y in float64 and the exact last state."""
    exact = {name: value if value is None else value.double() for name, value in inputs.items()}
    return causal_conv1d_ref(**exact, activation=activation, return_last_state=True)


def assert_true(inputs, activation, y, last_state):
    expected, state = truth(inputs, activation)
    assert torch.equal(last_state.double(), state)
    assert y.dtype == inputs["x"].dtype and y.shape == inputs["x"].shape
    error = (y.double() - expected).norm()
    if y.dtype == torch.float32:
        assert error <= 1e-6 * expected.norm()
    else:
        assert error <= 1.05 * (expected.to(y.dtype).double() - expected).norm() + 1e-6 * expected.norm()


def run(inputs, activation="silu", **options):
    return causal_conv1d(**inputs, activation=activation, return_last_state=True, **options)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_reference_is_the_padded_grouped_convolution():
    inputs = {name: value.double() for name, value in make().items()}
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    expected = F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=12)[..., :37])
    assert torch.allclose(causal_conv1d_ref(x, weight, bias, "silu"), expected, rtol=1e-12)
    carried = F.conv1d(torch.cat([inputs["initial_state"], x], -1), weight[:, None], bias, groups=12)
    assert torch.allclose(causal_conv1d_ref(**inputs), carried, rtol=1e-12)


def test_reference_is_differentiable():
    inputs = {name: value.double().requires_grad_() for name, value in make(1, 2, 5, 3).items()}
    assert torch.autograd.gradcheck(
        lambda *a: causal_conv1d_ref(*a[:3], "silu", initial_state=a[3]), tuple(inputs.values())
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", (2, 3, 4))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_state(dtype, layout, width, device):
    for length, without in itertools.product((1, 2, 7, 16, 37, 300), ((), ("bias",), ("initial_state",))):
        inputs = make(length=length, width=width, dtype=dtype, layout=layout, device=device)
        inputs |= dict.fromkeys(without)
        for activation in (None, "silu"):
            assert_true(inputs, activation, *run(inputs, activation))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_over_shapes(dtype, layout):
    for seed, (batch, dim, length) in enumerate(
        itertools.product((1, 3), (1, 4, 33, 130, 1000), (127, 128, 2047, 2049, 4097))
    ):
        inputs = make(batch, dim, length, 2 + seed % 3, dtype=dtype, layout=layout, device="cuda", seed=seed)
        assert_true(inputs, "silu", *run(inputs))


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_another_dtype_and_any_strides(device):
    inputs = make(dtype=torch.bfloat16, device=device)
    inputs["weight"] = torch.randn(4, 12, device=device).t()
    inputs["bias"] = torch.randn(36, device=device)[1::3]
    inputs["initial_state"] = lay_out(inputs["initial_state"], "sliced")
    assert_true(inputs, "swish", *run(inputs, "swish"))


@pytest.mark.parametrize("device", DEVICES)
def test_an_expanded_input(device):
    inputs = make(device=device)
    inputs["x"] = inputs["x"][:1, :1].expand(2, 12, 37)
    assert_true(inputs, None, *run(inputs, None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_is_laid_out_as_x(layout, device):
    y = causal_conv1d(make(layout=layout, device=device)["x"], torch.randn(12, 4, device=device))
    assert (y.transpose(1, 2) if layout in ("token_major", "padded_channels") else y).is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ((2, 12, 0), (0, 12, 5), (2, 0, 5)))
def test_empty(shape, device):
    inputs = make(*shape, device=device)
    y, last_state = run(inputs)
    assert y.shape == shape
    assert shape[2] or torch.equal(last_state, inputs["initial_state"])
    inputs["initial_state"] = None
    assert not run(inputs)[1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
def test_pieces_and_single_tokens_give_the_bits_of_the_whole(layout, device):
    inputs = make(length=53, dtype=torch.bfloat16, layout=layout, device=device)
    y, last_state = run(inputs)
    state, pieces = inputs["initial_state"], []
    for first, end in itertools.pairwise((0, 1, 3, 17, 18, 40, 53)):
        piece, state = run(inputs | {"x": inputs["x"][..., first:end], "initial_state": state})
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, -1), y) and torch.equal(state, last_state)

    conv_state = inputs["initial_state"].clone()
    tokens = [
        causal_conv1d_update(x, conv_state, inputs["weight"], inputs["bias"], "silu") for x in inputs["x"].unbind(-1)
    ]
    assert torch.equal(torch.stack(tokens, -1), y) and torch.equal(conv_state, last_state)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("held", (2, 3, 5, 9))
def test_update_rolls_states_of_any_length_and_strides(held, device):
    inputs = make(length=20, width=3, device=device)
    home = torch.zeros(12, held, 2, device=device)
    conv_state = home.permute(2, 0, 1)
    conv_state[..., -2:] = inputs["initial_state"]
    for x in inputs["x"].unbind(-1):
        causal_conv1d_update(x, conv_state, inputs["weight"])
    whole = torch.cat([inputs["initial_state"], inputs["x"]], -1)
    assert torch.equal(conv_state, whole[..., -held:])


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_channel_and_never_goes_back_in_time(device):
    for layout in ("channel_major", "token_major"):
        inputs = make(dim=8, length=300, layout=layout, device=device)
        clean, _ = run(inputs)
        inputs["x"][1, 3, 100] = math.nan
        y, _ = run(inputs)
        assert y[1, 3, 100:104].isnan().all()
        y[1, 3, 100:104] = clean[1, 3, 100:104]
        assert torch.equal(y, clean)


# ---- the statistic of the output -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_bins", (2, 7, 256, 1000, 10000))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_entropy_is_that_of_the_output(layout, num_bins, device):
    for dtype, ends in itertools.product(DTYPES, ((-0.25, 4.0), (-1e-3, 1e-3), (5.0, 6.0))):
        inputs = make(3, 40, 333, dtype=dtype, layout=layout, device=device)
        y, last_state, statistic = run(inputs, histogram=OutputHistogram(ends, num_bins, RULE))
        plain, plain_state = run(inputs)
        assert torch.equal(y, plain) and torch.equal(last_state, plain_state)
        assert torch.equal(statistic.entropy_nats, histogram_entropy(y, num_bins, ends))
        assert torch.equal(statistic.chunk_size, device_chunk(y, RULE, num_bins, ends))
        assert statistic.chunk_size.item() == RULE(statistic.entropy_nats.item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", (2, 5, 8, 37, 400, 2**31 - 1))
def test_fused_entropy_of_every_strideth_token(stride, layout, device):
    for dtype, length, num_bins in itertools.product(DTYPES, (1, 7, 333, 1000), (7, 256)):
        inputs = make(3, 40, length, dtype=dtype, layout=layout, device=device)
        y, last_state, statistic = run(inputs, histogram=OutputHistogram((-0.25, 4.0), num_bins, RULE, stride))
        plain, plain_state = run(inputs)
        assert torch.equal(y, plain) and torch.equal(last_state, plain_state)
        assert torch.equal(statistic.entropy_nats, histogram_entropy(y[..., ::stride], num_bins, (-0.25, 4.0)))
        assert statistic.chunk_size.item() == RULE(statistic.entropy_nats.item())


@pytest.mark.parametrize("device", DEVICES)
def test_entropy_without_a_rule_and_of_nothing(device):
    inputs = make(device=device)
    _, statistic = causal_conv1d(**inputs, histogram=OutputHistogram((-1.0, 1.0)))
    assert statistic.entropy_nats.shape == () and statistic.chunk_size is None
    inputs["x"] = inputs["x"][..., :0]
    _, statistic = causal_conv1d(**inputs, histogram=OutputHistogram((-1.0, 1.0), rule=RULE))
    assert statistic.entropy_nats.item() == 0.0 and statistic.chunk_size.item() == 128


@pytest.mark.gpu
def test_nan_on_the_device_gives_nan_and_the_least_chunk():
    inputs = make(length=5000, device="cuda")
    inputs["x"][1, 3, 1234] = math.nan
    for _ in range(2):
        _, statistic = causal_conv1d(**inputs, histogram=OutputHistogram((-1.0, 1.0), rule=RULE))
        assert statistic.entropy_nats.isnan() and statistic.chunk_size.item() == 128
    inputs["x"][1, 3, 1234] = 0.0
    y, statistic = causal_conv1d(**inputs, histogram=OutputHistogram((-1.0, 1.0)))
    assert torch.equal(statistic.entropy_nats, histogram_entropy(y, 256, (-1.0, 1.0)))


# ---- the operators ---------------------------------------------------------------------------------------------------


def samples(device):
    for layout, dtype in itertools.product(("channel_major", "token_major", "sliced"), DTYPES):
        inputs = make(dtype=dtype, layout=layout, device=device)
        yield inputs["x"], inputs["weight"], inputs["bias"], True, inputs["initial_state"]
        yield inputs["x"], inputs["weight"], None, False, None


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for sample in samples(device):
        torch.library.opcheck(torch.ops.corey.causal_conv1d, sample)
        counting = (256, -1.0, 1.0, 8, (2.0, 4.0), 128)
        torch.library.opcheck(torch.ops.corey.causal_conv1d_entropy, (*sample, *counting))
        x, weight, bias, silu, _ = sample
        token = (x[..., 0], x[..., 1:5].clone(), weight, bias, silu)
        torch.library.opcheck(torch.ops.corey.causal_conv1d_update, token)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    inputs = make(layout="token_major", device=device)
    histogram = OutputHistogram((-1.0, 1.0), rule=RULE)

    def step(x, weight, bias, initial_state):
        y, state, statistic = causal_conv1d(
            x, weight, bias, "silu", initial_state=initial_state, return_last_state=True, histogram=histogram
        )
        return y, state, *statistic, causal_conv1d_update(y[..., -1].contiguous(), state, weight)

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for got, expected in zip(compiled(**inputs), step(**inputs)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ("x", "weight", "bias", "initial_state"))
def test_gradient_is_refused(name):
    inputs = make()
    inputs[name] = inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^{name}: requires grad"):
        causal_conv1d(**inputs)
    sample = (inputs["x"], inputs["weight"], inputs["bias"], True, inputs["initial_state"])
    with pytest.raises(RuntimeError, match=rf"^{name}: requires grad"):
        torch.ops.corey.causal_conv1d(*sample)
    with torch.no_grad():
        causal_conv1d(**inputs)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


BAD = {
    "x an array": ("x", TypeError, [1.0]),
    "x of rank 2": ("x", ValueError, normal(12, 37)),
    "x float64": ("x", ValueError, normal(2, 12, 37, dtype=torch.float64)),
    "x sparse": ("x", ValueError, normal(2, 12, 37).to_sparse()),
    "weight of rank 3": ("weight", ValueError, normal(12, 1, 4)),
    "weight of width 5": ("weight", ValueError, normal(12, 5)),
    "weight of width 1": ("weight", ValueError, normal(12, 1)),
    "weight of another dim": ("weight", ValueError, normal(13, 4)),
    "weight integer": ("weight", ValueError, torch.ones(12, 4, dtype=torch.int32)),
    "weight on another device": ("weight", ValueError, normal(12, 4).to("meta")),
    "bias a float": ("bias", TypeError, 0.0),
    "bias of another dim": ("bias", ValueError, normal(1)),
    "bias of another dtype": ("bias", ValueError, normal(12, dtype=torch.bfloat16)),
    "initial_state transposed": ("initial_state", ValueError, normal(2, 3, 12)),
    "initial_state too long": ("initial_state", ValueError, normal(2, 12, 4)),
    "initial_state of another dtype": ("initial_state", ValueError, normal(2, 12, 3, dtype=torch.float16)),
    "activation relu": ("activation", ValueError, "relu"),
    "activation True": ("activation", ValueError, True),
    "return_last_state an int": ("return_last_state", TypeError, 1),
    "histogram a tuple": ("histogram", TypeError, (-1.0, 1.0)),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_argument_is_refused_by_name(case):
    name, exception, value = case
    with pytest.raises(exception, match=rf"^{name}: got "):
        causal_conv1d(**make() | {name: value})


BAD_UPDATE = {
    "x of rank 3": ("x", normal(2, 12, 1)),
    "conv_state of rank 2": ("conv_state", normal(2, 12)),
    "conv_state too short": ("conv_state", normal(2, 12, 2)),
    "conv_state of another batch": ("conv_state", normal(3, 12, 3)),
    "conv_state of another dtype": ("conv_state", normal(2, 12, 3, dtype=torch.bfloat16)),
    "conv_state expanded": ("conv_state", normal(1, 12, 3).expand(2, 12, 3)),
    "weight of width 5": ("weight", normal(12, 5)),
}


@pytest.mark.parametrize("case", BAD_UPDATE.values(), ids=BAD_UPDATE.keys())
def test_bad_argument_of_the_update_is_refused_by_name(case):
    name, value = case
    good = {"x": normal(2, 12), "conv_state": normal(2, 12, 3), "weight": normal(12, 4)}
    with pytest.raises(ValueError, match=rf"^{name}: got "):
        causal_conv1d_update(**good | {name: value})


@pytest.mark.parametrize(
    ("name", "arguments"),
    (
        ("range", ((1.0, 1.0),)),
        ("range", ((0.0, math.inf),)),
        ("range", (None,)),
        ("num_bins", ((0.0, 1.0), 1)),
        ("num_bins", ((0.0, 1.0), 2.0)),
        ("rule", ((0.0, 1.0), 256, 512)),
        ("stride", ((0.0, 1.0), 256, None, 0)),
        ("stride", ((0.0, 1.0), 256, None, True)),
    ),
)
def test_bad_histogram_is_refused_by_name(name, arguments):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: got "):
        OutputHistogram(*arguments)


# ---- on the device ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ("channel_major", "token_major"))
def test_graph_replays_on_new_values(layout):
    inputs = make(2, 64, 500, dtype=torch.bfloat16, layout=layout, device="cuda")
    histogram = OutputHistogram((-0.25, 4.0), rule=RULE)
    conv_state = inputs["initial_state"].clone()

    def step():
        return *run(inputs, histogram=histogram), causal_conv1d_update(
            inputs["x"][..., 0], conv_state, inputs["weight"]
        )

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, state, statistic, token = step()
    for seed in range(3):
        for name, value in make(2, 64, 500, dtype=torch.bfloat16, device="cuda", seed=seed).items():
            inputs[name].copy_(value)
        conv_state.copy_(inputs["initial_state"])
        graph.replay()
        captured = [
            y.clone(),
            state.clone(),
            *(value.clone() for value in statistic),
            token.clone(),
            conv_state.clone(),
        ]
        conv_state.copy_(inputs["initial_state"])
        expected_y, expected_state, expected_statistic, expected_token = step()
        expected = [expected_y, expected_state, *expected_statistic, expected_token, conv_state]
        assert all(torch.equal(*pair) for pair in zip(captured, expected))


@pytest.mark.gpu
def test_side_streams_do_not_share_counts():
    inputs = make(2, 256, 4000, dtype=torch.bfloat16, device="cuda")
    histogram = OutputHistogram((-0.25, 4.0))
    expected = causal_conv1d(**inputs, histogram=histogram)[1].entropy_nats
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            found.append(causal_conv1d(**inputs, histogram=histogram)[1].entropy_nats)
    torch.cuda.synchronize()
    assert all(torch.equal(entropy, expected) for entropy in found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ((70000, 1, 5), (1, 70001, 9), (2, 3, 200003), (66000, 8, 16)))
def test_long_axes(shape):
    for layout in ("channel_major", "token_major"):
        inputs = make(*shape, dtype=torch.bfloat16, layout=layout, device="cuda")
        assert_true(inputs, "silu", *run(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("token_major", (False, True))
def test_offsets_beyond_2_to_the_31(token_major):
    batch, dim, length = 3, 1024, 786432  # 2.4e9 elements, 4.8 GB
    shape = (batch, length, dim) if token_major else (batch, dim, length)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    x = x.transpose(1, 2) if token_major else x
    weight = torch.randn(dim, 4, device="cuda", dtype=torch.bfloat16)
    y, state = causal_conv1d(x, weight, None, "silu", return_last_state=True)
    tail = causal_conv1d(x[2:, :, -300:], weight, None, "silu", initial_state=x[2:, :, -303:-300])
    assert torch.equal(y[2:, :, -300:], tail) and torch.equal(state, x[..., -3:])
    assert relative_error(tail, truth({"x": x[2:, :, -303:], "weight": weight}, "silu")[0][..., 3:]) < 3e-3


@pytest.mark.gpu
def test_layouts_and_repeats_give_the_same_bits():
    inputs = make(2, 136, 1111, dtype=torch.float32, device="cuda")
    y, _ = run(inputs)
    for layout in LAYOUTS:
        for _ in range(10):
            assert torch.equal(run(inputs | {"x": lay_out(inputs["x"], layout)})[0], y)
