"""Comparisons of logits, tokens, metrics and perplexities, and the intervals around them."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="the intervals are scipy's")

from corey.equivalence import (
    agreement_interval,
    compare_logits,
    compare_tokens,
    mean_interval,
    mean_of_perplexities,
    paired_delta,
    perplexity,
    sequence_nll,
)


@pytest.fixture
def logits():
    return torch.randn(1, 10, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_last_bit_is_seen_and_placed(dtype, logits):
    a = logits.to(dtype)
    b = a.clone()
    assert compare_logits(a, b).bitwise_equal
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    b.view(bits)[0, 6, 3] ^= 1
    found = compare_logits(a, b)
    step = (a[0, 6, 3].double() - b[0, 6, 3].double()).abs().item()
    assert not found.bitwise_equal
    assert found.first_divergence == 6
    assert found.max_abs_diff == step > 0
    assert found.rms_diff == pytest.approx(step / math.sqrt(70))
    assert found.differing_fraction == pytest.approx(1 / 70)


def test_bits_decide_for_zeros_and_nans(logits):
    zeros = torch.zeros(2, 3)
    assert not compare_logits(zeros, -zeros).bitwise_equal
    assert compare_logits(zeros, -zeros).max_abs_diff == 0.0
    logits[0, 2, 1] = math.nan
    assert compare_logits(logits, logits.clone()).bitwise_equal
    assert math.isnan(compare_logits(logits, torch.zeros_like(logits)).max_abs_diff)


def test_views_are_compared_by_value_and_the_earliest_row_of_a_batch_counts():
    a = torch.randn(7, 10).T  # (L, V), not contiguous
    assert compare_logits(a, a.contiguous()).bitwise_equal
    batch = torch.zeros(2, 5, 3)
    other = batch.clone()
    other[0, 4], other[1, 2] = 1, 1
    assert compare_logits(batch, other).first_divergence == 2


@pytest.mark.parametrize(
    "a, b, equal, agreement, first",
    [
        pytest.param([1, 2, 3], [1, 2, 3], True, 1.0, None, id="equal"),
        pytest.param([1, 2, 3], [1, 9, 3], False, 2 / 3, 1, id="middle"),
        pytest.param([1, 2, 3], [1, 2], False, 2 / 3, 2, id="shorter"),
        pytest.param([], [5], False, 0.0, 0, id="empty_against_one"),
        pytest.param((), [], True, 1.0, None, id="both_empty"),
    ],
)
def test_tokens_agree_over_the_longer_sequence(a, b, equal, agreement, first):
    found = compare_tokens(a, b)
    assert (found.equal, found.agreement, found.first_divergence) == (equal, pytest.approx(agreement), first)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    nll, count = sequence_nll(torch.zeros(5, 11), torch.tensor([0, 3, 10, 2, 1]))
    assert count == 4
    assert perplexity([nll], [count]) == pytest.approx(11)


def test_the_nll_is_of_the_next_token():
    logits = torch.zeros(3, 4)
    logits[0, 2] = logits[1, 1] = 50.0
    assert sequence_nll(logits, torch.tensor([0, 2, 1]))[0] == pytest.approx(0.0, abs=1e-12)


def test_perplexity_weights_tokens_and_the_published_mean_does_not():
    # one token of perplexity 100 beside 99 tokens of perplexity 2
    nll, count = [math.log(100), 99 * math.log(2)], [1, 99]
    assert perplexity(nll, count) == pytest.approx(math.exp((math.log(100) + 99 * math.log(2)) / 100))
    assert mean_of_perplexities(nll, count) == pytest.approx(51)


def test_the_mean_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        found = mean_interval(rng.exponential(size=30), seed=seed)
        covered += found.low <= 1.0 <= found.high
        assert found.low < found.value < found.high
    assert 50 <= covered <= 60


def test_a_paired_delta_is_of_the_pairs():
    before = np.linspace(0, 100, 20)  # spread that an unpaired interval would not see through
    found = paired_delta(before, before + np.tile([0.9, 1.1], 10))
    assert found.value == pytest.approx(1.0)
    assert 0.9 < found.low < 1.0 < found.high < 1.1
    assert paired_delta([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == mean_interval([0.0, 0.0, 0.0])


def test_values_without_spread_have_no_width_and_one_value_has_no_interval():
    assert mean_interval([0.5] * 4).low == mean_interval([0.5] * 4).high == 0.5
    assert math.isnan(mean_interval([0.5]).low)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(1).normal(size=20)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_agreement_of_all_keeps_its_uncertainty():
    found = agreement_interval(80, 80)
    z2 = 1.959963984540054**2  # Wilson at p = 1: low = n / (n + z^2)
    assert (found.value, found.high) == (1.0, pytest.approx(1.0))
    assert found.low == pytest.approx(80 / (80 + z2))
    half = agreement_interval(40, 80)
    assert half.low == pytest.approx(1 - half.high)


BAD_CALLS = {
    "logits_list": (lambda: compare_logits([1.0], torch.zeros(1, 1)), "a"),
    "logits_int": (lambda: compare_logits(torch.zeros(1, 1).int(), torch.zeros(1, 1).int()), "a"),
    "logits_float8": (lambda: compare_logits(*[torch.zeros(1, 1).to(torch.float8_e4m3fn)] * 2), "a"),
    "logits_vector": (lambda: compare_logits(torch.zeros(3), torch.zeros(3)), "a"),
    "logits_empty": (lambda: compare_logits(torch.zeros(0, 3), torch.zeros(0, 3)), "a"),
    "logits_shapes": (lambda: compare_logits(torch.zeros(2, 3), torch.zeros(3, 2)), "b"),
    "logits_dtypes": (lambda: compare_logits(torch.zeros(2, 3), torch.zeros(2, 3).double()), "b"),
    "tokens_text": (lambda: compare_tokens("abc", [1]), "a"),
    "tokens_float": (lambda: compare_tokens([1], [1.0]), "b"),
    "tokens_tensor": (lambda: compare_tokens([1], torch.ones(1)), "b"),
    "nll_ints": (lambda: sequence_nll(torch.zeros(2, 3).int(), torch.tensor([0, 1])), "logits"),
    "nll_one_token": (lambda: sequence_nll(torch.zeros(1, 3), torch.tensor([0])), "tokens"),
    "nll_lengths": (lambda: sequence_nll(torch.zeros(3, 3), torch.tensor([0, 1])), "tokens"),
    "nll_vocabulary": (lambda: sequence_nll(torch.zeros(2, 3), torch.tensor([0, 3])), "tokens"),
    "nll_float_tokens": (lambda: sequence_nll(torch.zeros(2, 3), torch.zeros(2)), "tokens"),
    "ppl_lengths": (lambda: perplexity([1.0, 2.0], [1]), "num_tokens"),
    "ppl_no_tokens": (lambda: perplexity([1.0], [0]), "num_tokens"),
    "ppl_empty": (lambda: mean_of_perplexities([], []), "nll_nats"),
    "mean_nan": (lambda: mean_interval([1.0, math.nan]), "values"),
    "mean_matrix": (lambda: mean_interval([[1.0, 2.0]]), "values"),
    "confidence_95": (lambda: mean_interval([1.0, 2.0], confidence=95), "confidence"),
    "delta_lengths": (lambda: paired_delta([1.0], [1.0, 2.0]), "after"),
    "agreement_above_n": (lambda: agreement_interval(3, 2), "num_equal"),
    "agreement_of_none": (lambda: agreement_interval(0, 0), "num_equal"),
    "agreement_float": (lambda: agreement_interval(1.0, 2), "num_equal"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_refused_by_name(case):
    call, name = BAD_CALLS[case]
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got"):
        call()
