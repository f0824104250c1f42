"""The state update: against float64, against the scan of one token, over options and strides, on CPU and CUDA."""

import itertools

import pytest
import torch
from scan_inputs import make_inputs, relative_error

from corey import selective_scan
from corey.state_update import selective_state_update, selective_state_update_ref

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = ("D", "z", "dt_bias")


def make(batch=3, dim=24, states=16, *, dtype=torch.float32, groups=None, options=OPTIONS, device="cpu", seed=0):
    """Arguments of selective_state_update by name, from those of the scan."""
    kind = "variable" if groups is None else "grouped"
    scan = make_inputs(batch, dim, 1, states, dtype=dtype, B_kind=kind, C_kind=kind, groups=groups or 1, seed=seed)
    state = torch.randn(batch, dim, states, generator=torch.Generator().manual_seed(seed))
    made = {"state": state, "x": scan["u"], "dt": scan["delta"], "A": scan["A"], "B": scan["B"], "C": scan["C"]}
    made |= {name: scan["delta_bias" if name == "dt_bias" else name] for name in options}
    made = {name: value[..., 0] if name in ("x", "dt", "B", "C", "z") else value for name, value in made.items()}
    return {name: value.to(device) for name, value in made.items()}


def strided(x):
    """The same values in a buffer full of NaN, with no axis of stride 1."""
    home = x.new_full([2 * size + 1 for size in x.shape], float("nan"))[tuple(slice(1, None, 2) for _ in x.shape)]
    return home.copy_(x)


def check(inputs, dt_softplus=True):
    """Runs the update, compares it with the float64 equations, and returns y."""
    exact = {name: value.double() for name, value in inputs.items()}
    expected, expected_state = selective_state_update_ref(**exact, dt_softplus=dt_softplus)
    y = selective_state_update(**inputs, dt_softplus=dt_softplus)
    assert y.shape == inputs["x"].shape and y.dtype == inputs["x"].dtype and y.is_contiguous()
    assert relative_error(inputs["state"], expected_state) < 1e-6
    bound = 1e-6 if y.dtype == torch.float32 else 1.05 * relative_error(expected.to(y.dtype), expected) + 1e-6
    assert relative_error(y, expected) < bound
    return y


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("states", (1, 3, 4, 8, 12, 16, 24, 64, 100, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, states, device):
    for seed, (batch, dim) in enumerate(((1, 5), (4, 33), (7, 130))):
        check(make(batch, dim, states, dtype=dtype, device=device, seed=seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", (None, 1, 3, 24))
def test_options_groups_and_strides(groups, device):
    subsets = itertools.chain.from_iterable(itertools.combinations(OPTIONS, size) for size in range(4))
    for options, softplus, spread in itertools.product(subsets, (False, True), (False, True)):
        inputs = make(groups=groups, options=options, device=device)
        check({name: strided(value) for name, value in inputs.items()} if spread else inputs, softplus)


@pytest.mark.parametrize("device", DEVICES)
def test_every_input_may_have_its_own_dtype(device):
    inputs = make(device=device)
    for shift, name in enumerate(("x", "dt", "B", "C", "D", "z", "dt_bias")):
        inputs[name] = inputs[name].to(DTYPES[shift % 3])
    check(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_sizes_that_fill_the_device(dtype):
    for shape in ((64, 2048, 16), (64, 5120, 16), (2, 2048, 16), (33, 1000, 16), (70000, 8, 4), (1, 70000, 16)):
        check(make(*shape, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("device", DEVICES)
def test_agrees_with_the_scan_of_one_token(device):
    inputs = make(device=device)
    state = inputs["state"].clone()
    token = {name: inputs[name][..., None] for name in ("x", "dt", "B", "C", "z")}
    scanned, last_state = selective_scan(
        *(token[name] if name in token else inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")),
        delta_softplus=True,
        return_last_state=True,
        initial_state=state,
    )
    y = selective_state_update(**inputs, dt_softplus=True)
    assert relative_error(y, scanned[..., 0]) < 1e-6 and relative_error(inputs["state"], last_state) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_softplus_is_accurate_for_very_negative_steps(device):
    inputs = make(options=("dt_bias",), device=device)
    inputs["state"].zero_()
    inputs["dt_bias"] -= 15.0
    check(inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ((0, 24), (3, 0)))
def test_empty(shape, device):
    assert selective_state_update(**make(*shape, device=device)).shape == shape


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_in_its_channel(device):
    inputs = make(device=device)
    clean = {name: value.clone() for name, value in inputs.items()}
    expected = selective_state_update(**clean, dt_softplus=True)
    inputs["x"][1, 7] = float("nan")
    y = selective_state_update(**inputs, dt_softplus=True)
    assert y[1, 7].isnan() and inputs["state"][1, 7].isnan().all()
    y[1, 7], inputs["state"][1, 7] = expected[1, 7], clean["state"][1, 7]
    assert torch.equal(y, expected) and torch.equal(inputs["state"], clean["state"])


# ---- the operator ----------------------------------------------------------------------------------------------------


def sample(inputs):
    names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    return (*(inputs.get(name) for name in names), True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", ((), OPTIONS))
def test_opcheck(options, device):
    for groups, dtype in itertools.product((None, 2), DTYPES):
        inputs = make(groups=groups, dtype=dtype, options=options, device=device)
        torch.library.opcheck(torch.ops.corey.selective_state_update, sample(inputs))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    inputs, others = make(device=device), make(device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(lambda **a: selective_state_update(**a, dt_softplus=True), fullgraph=True, backend=backend)
    assert torch.equal(compiled(**inputs), selective_state_update(**others, dt_softplus=True))
    assert torch.equal(inputs["state"], others["state"])


@pytest.mark.gpu
def test_graph_replays_move_the_state_on():
    inputs = make(4, 256, 16, dtype=torch.bfloat16, device="cuda")
    eager = {name: value.clone() for name, value in inputs.items()}
    for _ in range(2):
        selective_state_update(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_state_update(**inputs)
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        expected = selective_state_update(**eager)
    assert torch.equal(y, expected) and torch.equal(inputs["state"], eager["state"])


@pytest.mark.parametrize("name", ("x", "A", "D"))
def test_gradient_is_refused(name):
    inputs = make()
    inputs[name] = inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^{name}: requires grad"):
        selective_state_update(**inputs)
    with torch.no_grad():
        selective_state_update(**inputs)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


BAD = {
    "x a float": ("x", TypeError, 1.0),
    "x of rank 3": ("x", ValueError, normal(3, 24, 1)),
    "x float64": ("x", ValueError, normal(3, 24, dtype=torch.float64)),
    "state of another batch": ("state", ValueError, normal(4, 24, 16)),
    "state bfloat16": ("state", ValueError, normal(3, 24, 16, dtype=torch.bfloat16)),
    "state expanded": ("state", ValueError, normal(1, 24, 16).expand(3, 24, 16)),
    "state on another device": ("state", ValueError, normal(3, 24, 16).to("meta")),
    "dt per head": ("dt", ValueError, normal(3, 1)),
    "A of rank 1": ("A", ValueError, normal(24)),
    "A half": ("A", ValueError, normal(24, 16, dtype=torch.float16)),
    "A with 257 states": ("A", ValueError, normal(24, 257)),
    "B of rank 1": ("B", ValueError, normal(16)),
    "B of other states": ("B", ValueError, normal(3, 15)),
    "B with groups that do not divide": ("B", ValueError, normal(3, 5, 16)),
    "C of another batch": ("C", ValueError, normal(1, 16)),
    "D of another dim": ("D", ValueError, normal(1)),
    "z integer": ("z", ValueError, torch.ones(3, 24, dtype=torch.int64)),
    "dt_bias a list": ("dt_bias", TypeError, [0.0]),
    "dt_softplus an int": ("dt_softplus", TypeError, 1),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_argument_is_refused_by_name(case):
    name, exception, value = case
    with pytest.raises(exception, match=rf"^{name}: got "):
        selective_state_update(**make() | {name: value})


def test_B_and_C_of_different_groups_are_refused():
    with pytest.raises(ValueError, match=r"^C: got 3 groups, want the 2 groups of B$"):
        selective_state_update(**make() | {"B": normal(3, 2, 16), "C": normal(3, 3, 16)})
