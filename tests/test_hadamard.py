"""The rotation against scipy's matrix, its bounds as properties, and the faulty routine against its golden values."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corey.cost_model import published_draws
from corey.entropy import histogram_entropy, tier1_entropy
from corey.hadamard import fake_quantise, fold_into_projection, hadamard_transform, outlier_fraction
from corey.hadamard import faulty_transform_ref as faulty

vectors = st.lists(st.floats(-1e3, 1e3).map(lambda value: round(value, 6)), min_size=1, max_size=70)


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix(width: int) -> torch.Tensor:
    return torch.from_numpy(scipy.linalg.hadamard(width) / math.sqrt(width))


@pytest.mark.parametrize("width", [1, 2, 8, 64, 256])
def test_the_transform_is_scipys_matrix(width):
    x = normal(3, 2, width)
    assert torch.allclose(hadamard_transform(x), x @ matrix(width).T, atol=1e-12)


@pytest.mark.parametrize(("width", "padded"), [(3, 4), (5, 8), (192, 256), (257, 512)])
def test_other_widths_are_padded_with_zeros_and_lose_nothing(width, padded):
    x = normal(4, width)
    z = hadamard_transform(x)
    assert z.shape == (4, padded)
    assert torch.allclose(z, x @ matrix(padded)[:width], atol=1e-12)
    assert torch.allclose(hadamard_transform(z), torch.nn.functional.pad(x, (0, padded - width)), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_floating_dtype_comes_back_as_itself(dtype):
    x = normal(5, 128).to(dtype)
    z = hadamard_transform(x)
    exact = x.double() @ matrix(128)
    one_rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    arithmetic = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * (exact.abs() + 1)
    assert z.dtype == dtype
    assert ((z.double() - exact).abs() <= one_rounding + arithmetic).all()


def test_half_precision_input_does_not_overflow_on_the_way():
    x = torch.full((4096,), 60000.0, dtype=torch.float16)
    x[::2] *= -1.0  # the sum of any half alone is beyond fp16; only coordinate 1 is not zero, and it is too
    z = hadamard_transform(x / 64)
    assert torch.isfinite(z).all() and z.abs().argmax() == 1


@settings(max_examples=60, deadline=None)
@given(values=vectors)
def test_the_rotation_keeps_norms_and_undoes_itself(values):
    x = torch.tensor(values, dtype=torch.float64)
    z = hadamard_transform(x)
    scale = float(x.norm()) + 1e-300
    assert float(z.norm()) == pytest.approx(float(x.norm()), rel=1e-12)
    assert float((hadamard_transform(z)[: len(values)] - x).abs().max()) <= 1e-12 * scale


@settings(max_examples=60, deadline=None)
@given(values=vectors)
def test_no_coordinate_exceeds_the_1_norm_over_the_root_of_the_padded_width(values):
    x = torch.tensor(values, dtype=torch.float64)
    z = hadamard_transform(x)
    assert float(z.abs().max()) <= float(x.abs().sum()) / math.sqrt(z.numel()) * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(width=st.sampled_from([1, 2, 16, 256]), place=st.integers(0, 255), height=st.floats(-1e4, 1e4))
def test_a_single_spike_spreads_to_every_coordinate_alike(width, place, height):
    x = torch.zeros(width, dtype=torch.float64)
    x[place % width] = height
    assert torch.allclose(hadamard_transform(x).abs(), torch.full_like(x, abs(height) / math.sqrt(width)), rtol=1e-12)


def test_a_common_mean_collapses_into_the_first_coordinate_and_meets_the_bound():
    z = hadamard_transform(torch.full((64,), 3.0, dtype=torch.float64))
    assert float(z[0]) == pytest.approx(3.0 * 8) and float(z[1:].abs().max()) < 1e-12


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.5, 8.0))
def test_overflow_is_at_most_as_frequent_as_a_large_1_norm(seed, threshold):
    x = normal(64, 32, seed=seed) ** 3
    overflow = (hadamard_transform(x).abs().amax(-1) > threshold).double().mean()
    assert overflow <= (x.abs().sum(-1) > math.sqrt(32) * threshold).double().mean()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 12), steps=st.integers(1, 6))
def test_doubly_stochastic_mixing_never_lowers_entropy(seed, size, steps):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(size, generator=generator, dtype=torch.float64) ** 4
    p = p / p.sum()
    shares = torch.rand(steps, generator=generator, dtype=torch.float64)
    permutations = [torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)] for _ in shares]
    mixing = sum(share * permutation for share, permutation in zip(shares / shares.sum(), permutations))
    assert float(torch.special.entr(mixing @ p).sum()) >= float(torch.special.entr(p).sum()) - 1e-12


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 8), (1,), (0, 4), (64,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_operator_passes_torchs_checks(shape, dtype):
    torch.library.opcheck(torch.ops.corey.hadamard_transform, (normal(*shape, dtype=dtype).requires_grad_(),))


def test_the_rotation_is_differentiable_twice_and_its_gradient_is_itself():
    x, weights = normal(3, 5).requires_grad_(), normal(3, 8, seed=1)
    assert torch.autograd.gradcheck(hadamard_transform, (x,)) and torch.autograd.gradgradcheck(hadamard_transform, (x,))
    (gradient,) = torch.autograd.grad((hadamard_transform(x) * weights).sum(), x)
    assert torch.equal(gradient, hadamard_transform(weights)[:, :5])


def test_it_compiles_without_a_graph_break():
    compiled = torch.compile(lambda x: hadamard_transform(2 * x) + 1, fullgraph=True, backend="aot_eager")
    for x in (normal(4, 6), normal(6, 4).T, normal(7)):
        assert torch.equal(compiled(x), hadamard_transform(2 * x) + 1)


def test_any_view_gives_what_its_copy_gives_in_a_contiguous_result():
    x = normal(4, 6, 5)
    for view in (x.transpose(0, 2), x[:, ::2, 1:], x[..., :1].expand(-1, -1, 3), x[..., :1].transpose(0, 1)):
        z = hadamard_transform(view)
        assert z.is_contiguous() and torch.equal(z, hadamard_transform(view.contiguous()))


@pytest.mark.parametrize("width", [64, 192])
def test_folding_the_rotation_into_a_projection_changes_nothing(width):
    weight, x = normal(96, width), normal(50, width, seed=1)
    folded = fold_into_projection(weight)
    assert float((hadamard_transform(x) @ folded.T - x @ weight.T).abs().max()) < 1e-12


def test_the_first_synthetic_draw_gains_what_the_reference_gains():
    draw = next(published_draws(7))
    rotated = hadamard_transform(torch.from_numpy(draw.activations)).numpy()
    gain = tier1_entropy(rotated) - tier1_entropy(draw.activations)
    assert gain == pytest.approx(0.3344, abs=1e-4)
    assert outlier_fraction(torch.from_numpy(draw.activations)) == pytest.approx(0.000641, abs=1e-6)
    assert outlier_fraction(torch.from_numpy(rotated)) == 0.0


@pytest.mark.parametrize("width", [8, 64, 256, 1024, 2048])
def test_the_faulty_routine_loses_the_norm_it_is_known_to_lose(width):
    golden = {8: 0.516, 64: 0.293, 256: 0.180, 1024: 0.114, 2048: 0.091}[width]
    x = normal(400, width)
    # each stage maps (a, b) to ((a + b) / sqrt2, a / 2 + (1/2 - 1/sqrt2) b), which keeps (1 + .25 + .0429) / 2
    expected = 0.64645 ** (math.log2(width) / 2)
    ratio = float(faulty(x).norm() / x.norm())
    assert ratio == pytest.approx(expected, rel=0.03)
    assert ratio == pytest.approx(golden, rel=0.10)
    assert float(hadamard_transform(x).norm() / x.norm()) == pytest.approx(1.0, abs=1e-12)


def test_the_faulty_routine_overwrites_what_it_still_needs():
    a, b = 3.0, 5.0
    top = (a + b) / math.sqrt(2)
    assert faulty(torch.tensor([a, b])).tolist() == pytest.approx([top, (top - b) / math.sqrt(2)])


def test_the_faulty_routine_drops_the_padding_and_leaves_its_input_alone():
    x = normal(2, 192)
    kept = x.clone()
    assert faulty(x).shape == (2, 192) and torch.equal(x, kept)


DISTRIBUTIONS = {  # name -> (sample, published gain of the faulty routine, of the correct one), nats at d = 2048
    "gaussian": (lambda x: x, -2.06, 0.02),
    "laplace": (lambda x: x.sign() * -torch.log(torch.special.erfc(x.abs() / math.sqrt(2))), -1.43, 0.57),
    "8 channels x50": (lambda x: torch.cat([50 * x[:, :8], x[:, 8:]], 1), 1.74, 3.32),
    "mean 3": (lambda x: x + 3.0, -3.15, -2.51),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_signs_and_sizes_of_the_gains_by_distribution_come_back(name):
    make, faulty_gain, correct_gain = DISTRIBUTIONS[name]
    x = make(normal(64, 2048))
    before = float(histogram_entropy(x, 64))
    # a gain rests on the extremes of one sample, so it moves by a few tenths from draw to draw
    assert float(histogram_entropy(hadamard_transform(x), 64)) - before == pytest.approx(correct_gain, abs=0.35)
    assert float(histogram_entropy(faulty(x), 64)) - before == pytest.approx(faulty_gain, abs=0.5)


def test_quantisation_has_the_symmetric_grid_and_its_error_bound():
    x = normal(16, 64)
    for bits in (4, 8):
        levels = 2 ** (bits - 1) - 1
        step = float(x.abs().max()) / levels
        quantised = fake_quantise(x, bits)
        assert float((quantised - x).abs().max()) <= step / 2 * (1 + 1e-12)
        grid = quantised / step
        assert torch.allclose(grid, grid.round(), atol=1e-9) and int(grid.abs().max().round()) == levels
        assert torch.allclose(fake_quantise(quantised, bits), quantised, atol=1e-12)
        assert torch.equal(fake_quantise(-x, bits), -quantised)


def test_a_dimension_gives_one_scale_a_slice():
    x = torch.tensor([[1.0, 0.31], [100.0, 31.0]])
    assert torch.allclose(fake_quantise(x, 4, dim=1), torch.stack([fake_quantise(row, 4) for row in x]))
    assert float(fake_quantise(x, 4)[0].abs().max()) == 0.0  # one scale for all rounds the first row away


def test_zeros_and_nothing_survive_quantisation():
    assert torch.equal(fake_quantise(torch.zeros(3), 8), torch.zeros(3))
    assert fake_quantise(torch.empty(0, 3), 8).shape == (0, 3)
    assert fake_quantise(torch.ones(2, dtype=torch.float16), 8).dtype == torch.float16


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "x", lambda: hadamard_transform([1.0])),
        (TypeError, "x", lambda: hadamard_transform(torch.arange(4))),
        (ValueError, "x", lambda: hadamard_transform(torch.tensor(1.0))),
        (ValueError, "x", lambda: faulty(torch.empty(3, 0))),
        (ValueError, "weight", lambda: fold_into_projection(torch.rand(4))),
        (ValueError, "bits", lambda: fake_quantise(torch.rand(4), 1)),
        (TypeError, "bits", lambda: fake_quantise(torch.rand(4), 8.0)),
        (ValueError, "dim", lambda: fake_quantise(torch.rand(4), 8, dim=1)),
        (ValueError, "threshold", lambda: outlier_fraction(torch.rand(4), -1.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(error, name, call):
    with pytest.raises(error, match=rf"^{name}: got"):
        call()
