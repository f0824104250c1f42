"""The mixing fit against its published numbers, and majorisation against the mixings it speaks of."""

from itertools import islice

import numpy as np
import pytest
import torch

from corey.cost_model import published_draws
from corey.hadamard import hadamard_transform
from corey.sinkhorn import (
    TEMPERATURE_FACTORS,
    best_factor,
    majorises,
    mixing_error,
    mixing_matrix,
    share_entropy,
    shared_histograms,
)


def test_the_first_length_fits_as_published():
    pairs = [
        shared_histograms(draw.activations, hadamard_transform(torch.from_numpy(draw.activations)).numpy())
        for draw in islice(published_draws(7), 5)
    ]
    errors = [mixing_error(p, q, mixing_matrix(64, best_factor([(p, q)]))) for p, q in pairs]
    assert np.mean(errors) == pytest.approx(0.0698, abs=1e-4)
    assert {best_factor([pair]) for pair in pairs} == {0.25}


@pytest.mark.parametrize("factor", TEMPERATURE_FACTORS)
def test_the_mixing_has_exact_columns_and_nearly_exact_rows(factor):
    mixing = mixing_matrix(64, factor)
    assert np.abs(mixing.sum(axis=0) - 1).max() < 1e-12
    assert np.abs(mixing.sum(axis=1) - 1).max() < 1e-2
    assert (mixing >= 0).all()
    assert (np.diag(mixing) > mixing.sum(axis=0).max() / 64).all()


def test_a_mixed_histogram_is_majorised_and_has_more_entropy():
    rng = np.random.default_rng(0)
    mixing = sum(share * np.eye(16)[rng.permutation(16)] for share in rng.dirichlet(np.ones(5)))
    for p in rng.dirichlet(np.full(16, 0.3), size=20):
        assert majorises(p, mixing @ p) and share_entropy(mixing @ p) >= share_entropy(p)
        assert not majorises(mixing @ p, p)


def test_majorisation_asks_for_more_than_a_higher_entropy():
    p, q = np.array([0.5, 0.45, 0.05]), np.array([0.6, 0.2, 0.2])
    assert share_entropy(q) > share_entropy(p) and not majorises(p, q)
    assert majorises(p, p[::-1])


def test_bad_arguments_are_named():
    for name, arguments in {
        "num_bins": (1, 1.0),
        "temperature_factor": (8, 0.0),
        "sweeps": (8, 1.0, 0),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: got"):
            mixing_matrix(*arguments)
    with pytest.raises(ValueError, match=r"^pairs: got"):
        best_factor([])
