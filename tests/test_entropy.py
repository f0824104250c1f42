"""The estimator against its formula, its published golden values, and its edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corey.entropy import (
    MovingEntropy,
    cheap_proxy,
    histogram_entropy,
    histogram_entropy_ref,
    kurtosis_proxy,
    tier1_entropy,
    variance_proxy,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_evenly_spaced_values_fill_every_bin_and_give_ln_256():
    assert float(histogram_entropy(torch.linspace(0, 1, 1024))) == pytest.approx(5.545177, abs=1e-6)


def test_two_equal_halves_give_ln_2_nats_and_one_bit():
    x = torch.tensor([3.0, -1.0] * 8)
    assert float(histogram_entropy(x)) == pytest.approx(0.693147, abs=1e-6)
    assert float(histogram_entropy(x, unit="bits")) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e30], ids=["zero", "five", "huge"])
def test_a_constant_tensor_has_no_entropy(value):
    assert float(histogram_entropy(torch.full((7,), value))) == 0.0
    assert float(histogram_entropy(torch.full((7,), value), range=(-1, 1))) == 0.0


def test_a_span_below_1e_8_counts_as_constant_as_published():
    assert float(histogram_entropy(torch.tensor([0.0, 0.9e-8]))) == 0.0
    assert float(histogram_entropy(torch.tensor([0.0, 2e-8]))) == pytest.approx(math.log(2))


def test_the_span_carries_the_published_1e_8():
    # over 2.5e-8 the three values are at 0, 0.48 and 0.6: three bins of four; over 1.5e-8 the last two share one
    assert float(histogram_entropy(torch.tensor([0.0, 1.2e-8, 1.5e-8]), 4)) == pytest.approx(math.log(3))


@pytest.mark.parametrize("num_bins", [2, 64, 256, 2048])
@pytest.mark.parametrize("bounds", [None, (-2.0, 3.0)], ids=["own-range", "fixed-range"])
@pytest.mark.parametrize("unit", ["nats", "bits"])
def test_fp32_agrees_with_the_float64_formula(num_bins, bounds, unit):
    x = normal(3, 500, 41)
    expected = histogram_entropy_ref(x.numpy(), num_bins, bounds, unit)
    assert float(histogram_entropy(x, num_bins, bounds, unit)) == pytest.approx(expected, abs=2e-4)


def test_published_values_of_large_normal_and_uniform_samples_come_back():
    rng = np.random.default_rng(0)
    assert float(histogram_entropy(torch.from_numpy(rng.standard_normal(1_000_000)))) == pytest.approx(4.70, abs=0.06)
    assert float(histogram_entropy(torch.from_numpy(rng.random(1_000_000)))) == pytest.approx(math.log(256), abs=2e-4)


def test_more_samples_of_one_distribution_lower_the_entropy():
    # the range of a normal sample grows with its size, so the same bins hold fewer of the values
    draws = {n: torch.stack([histogram_entropy(normal(n, seed=s)) for s in range(20)]).mean() for n in (1000, 100_000)}
    assert float(draws[1000] - draws[100_000]) == pytest.approx(0.17, abs=0.08)


@settings(max_examples=40, deadline=None)
@given(scale=st.floats(0.01, 100.0), shift=st.floats(-50.0, 50.0), seed=st.integers(0, 99))
def test_entropy_ignores_scale_and_shift_and_order(scale, shift, seed):
    x = normal(400, seed=seed).double()
    moved = (scale * x + shift)[torch.randperm(400)]
    assert float(histogram_entropy(moved, 16)) == pytest.approx(float(histogram_entropy(x, 16)), abs=0.03)


def test_one_outlier_lowers_the_entropy_over_the_own_range_and_not_over_a_fixed_one():
    x = normal(100_000)
    spiked = torch.cat([x, torch.tensor([32.0])])
    assert float(histogram_entropy(spiked)) < float(histogram_entropy(x)) - 1.0
    fixed = {"range": (-4.0, 4.0)}
    assert float(histogram_entropy(spiked, **fixed)) == pytest.approx(float(histogram_entropy(x, **fixed)), abs=1e-3)


def test_values_outside_a_fixed_range_fall_into_the_end_bins():
    x = torch.tensor([-math.inf, 0.1, 9.0, 2.0, math.inf, 1.0])  # 1.0 is the upper end itself
    shares = torch.tensor([1.0, 1.0, 4.0]) / 6
    assert float(histogram_entropy(x, 10, (0.0, 1.0))) == pytest.approx(float(-(shares * shares.log()).sum()), abs=1e-6)


@pytest.mark.parametrize(
    ("dim", "pools"),
    [
        (0, lambda x: [[x[:, j, k] for k in range(5)] for j in range(4)]),
        (-1, lambda x: [[x[i, j] for j in range(4)] for i in range(60)]),
        ((0, 2), lambda x: [x[:, j] for j in range(4)]),
        ((0, 1, 2), lambda x: x),
    ],
    ids=["first", "last", "channels", "all"],
)
def test_pooling_over_dimensions_equals_one_histogram_a_slice(dim, pools):
    def each(values):
        return [each(v) for v in values] if isinstance(values, list) else float(histogram_entropy(values, 8))

    x = normal(60, 4, 5)
    expected = torch.tensor(each(pools(x)))
    assert torch.equal(histogram_entropy(x, 8, dim=dim), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_floating_dtype_gives_fp32(dtype):
    x = normal(512).to(dtype)
    result = histogram_entropy(x)
    assert result.dtype == torch.float32 and result.shape == ()
    assert float(result) == float(histogram_entropy(x.float()))


def test_strides_do_not_change_the_entropy():
    x = normal(6, 7, 40)
    assert torch.equal(histogram_entropy(x.transpose(1, 2)), histogram_entropy(x))
    assert torch.equal(histogram_entropy(x[..., ::8]), histogram_entropy(x[..., ::8].contiguous()))


def test_empty_pools_give_zero():
    assert float(histogram_entropy(torch.empty(0))) == 0.0
    assert histogram_entropy(torch.empty(3, 0), dim=1).tolist() == [0.0, 0.0, 0.0]
    assert histogram_entropy(torch.empty(0, 3), dim=1).shape == (0,)
    assert histogram_entropy_ref(np.empty(0)) == tier1_entropy(np.empty(0)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_without_a_finite_range_are_refused(bad):
    with pytest.raises(ValueError, match="x:"):
        histogram_entropy(torch.tensor([0.0, 1.0, bad]))


def test_nan_is_refused_under_a_fixed_range_too():
    with pytest.raises(ValueError, match="x:"):
        histogram_entropy(torch.tensor([0.0, math.nan]), range=(0, 1))


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "x", {"x": [1.0, 2.0]}),
        (TypeError, "x", {"x": torch.arange(4)}),
        (TypeError, "num_bins", {"num_bins": 16.0}),
        (ValueError, "num_bins", {"num_bins": 1}),
        (TypeError, "range", {"range": 4.0}),
        (ValueError, "range", {"range": (1.0, 1.0)}),
        (ValueError, "range", {"range": (2.0, 1.0)}),
        (ValueError, "range", {"range": (0.0, math.inf)}),
        (ValueError, "range", {"range": (0.0, 1.0, 2.0)}),
        (ValueError, "unit", {"unit": "log2"}),
        (ValueError, "dim", {"dim": 2}),
        (ValueError, "dim", {"dim": (0, -2)}),
        (ValueError, "dim", {"dim": ()}),
        (TypeError, "dim", {"dim": 0.0}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_named(error, name, arguments):
    with pytest.raises(error, match=rf"^{name}: got"):
        histogram_entropy(**{"x": torch.rand(3, 4), **arguments})


def test_the_gaussian_values_of_the_proxies_are_the_closed_forms():
    x = normal(400_000)
    assert float(cheap_proxy(x)) == pytest.approx(math.sqrt(2 / math.pi) * math.log(256), rel=5e-3)
    assert float(variance_proxy(x)) == pytest.approx(math.log(256) / (1 + math.sqrt(2 / math.pi)), rel=5e-3)
    assert float(kurtosis_proxy(x)) < 0.03
    assert float(cheap_proxy(x, 16)) == pytest.approx(float(cheap_proxy(x)) / 2, rel=1e-6)


def test_the_kurtosis_proxy_runs_against_the_entropy():
    light, heavy = normal(50_000), normal(50_000) ** 3
    assert float(histogram_entropy(heavy)) < float(histogram_entropy(light))
    assert float(kurtosis_proxy(heavy)) > float(kurtosis_proxy(light)) + 2.0


def test_a_shared_moving_average_mixes_its_streams():
    # the first synthetic draw of the paper: .4503 before the rotation, .7848 after it
    shared = MovingEntropy()
    assert shared.update(0.45033) == pytest.approx(0.4503, abs=1e-4)
    assert shared.update(0.78476) == pytest.approx(0.5005, abs=1e-4)
    with pytest.raises(ValueError, match="decay"):
        MovingEntropy(1.0)


def test_the_tier_1_estimator_widens_the_range_and_normalises():
    rng = np.random.default_rng(0)
    # 64 bins over a range widened by a tenth: a uniform sample fills 64 / 1.1 of them
    assert tier1_entropy(rng.random(1_000_000)) == pytest.approx(math.log(64 / 1.1) / math.log(64), abs=2e-3)
    assert tier1_entropy(np.full(10, 3.0)) == 0.0
    assert tier1_entropy(np.array([0.0, 1.0])) == pytest.approx(math.log(2) / math.log(64))


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [{}, {"range": (-4.0, 4.0)}, {"dim": 1}], ids=["own", "fixed", "by-token"])
def test_cuda_agrees_with_the_cpu_and_never_waits_for_the_device(arguments):
    x = normal(2, 64, 300)
    on_device = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = histogram_entropy(on_device, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), histogram_entropy(x, **arguments))


@pytest.mark.gpu
def test_cuda_gives_nan_where_the_cpu_raises():
    x = torch.tensor([[0.0, math.nan], [0.0, 1.0]]).cuda()
    assert histogram_entropy(x, dim=1).isnan().tolist() == [True, False]
    assert histogram_entropy(x, range=(0.0, 1.0), dim=1).isnan().tolist() == [True, False]
