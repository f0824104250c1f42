"""Verdicts on whether time depends on data, and on whether entropy predicts a chunk."""

import numpy as np
import pandas as pd
import pytest
import torch

from corey.chunk_study import DISTRIBUTIONS, draw, mamba_inputs, published_inputs
from corey.data_study import (
    best_chunk_rows,
    distribution_ratios,
    distribution_timings,
    fastest_chunk,
    repeatability,
    spearman_permutation,
)


def timings(ratio, spread, rounds=60):
    noise = np.random.default_rng(0).normal(0, spread, (rounds, 6))
    rows = []
    for index, name in enumerate([*DISTRIBUTIONS, "control"]):
        latency = 100 * np.exp(noise[:, index]) * (ratio if name == "sparse2" else 1)
        rows += [{"round": i, "order": index, "name": name, "latency_us": value} for i, value in enumerate(latency)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [
        (1.0, 0.01, (True, False)),
        (1.3, 0.01, (False, True)),
        (0.7, 0.01, (False, True)),
        (1.1, 0.4, (False, False)),
    ],
    ids=["equal", "slower", "faster", "too_noisy"],
)
def test_distributions_are_judged_equivalent_different_or_neither(ratio, spread, verdict):
    row = distribution_ratios(timings(ratio, spread), margin=0.05).set_index("distribution").loc["sparse2"]
    assert (row.equivalent, row.differs) == verdict


def test_spearman_finds_order_and_only_order():
    x = np.arange(12.0)
    rising = spearman_permutation(x, np.exp(x))
    assert rising["rho"] == pytest.approx(1.0) and rising["p_value"] < 0.001 and rising["n"] == 12
    falling = spearman_permutation(x, -(x**3))
    assert falling["rho"] == pytest.approx(-1.0) and falling["p_value"] < 0.001
    unrelated = spearman_permutation(x, [3, 1, 2] * 4)
    assert abs(unrelated["rho"]) < 0.2 and unrelated["p_value"] > 0.3


def test_spearman_of_ties_is_that_of_scipy():
    from scipy import stats

    x, y = [0.1, 0.5, 0.5, 2.0, 3.0, 3.0, 4.0], [128, 128, 256, 256, 512, 128, 512]
    assert spearman_permutation(x, y, resamples=99)["rho"] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_one_best_chunk_for_all_is_no_correlation():
    assert spearman_permutation(range(6), [512] * 6) == {"rho": 0.0, "p_value": 1.0, "n": 6}
    with pytest.raises(ValueError, match="y: got shapes"):
        spearman_permutation(range(6), range(5))
    with pytest.raises(ValueError, match="x: got one value"):
        spearman_permutation([1] * 6, range(6))


def test_the_fastest_chunk_is_that_of_the_medians_and_of_each_half():
    latency = {"128": 3.0, "256": 1.0, "512": 2.0}
    rows = [(i, 0, name, value + 5 * (name == "256") * (i % 2)) for i in range(9) for name, value in latency.items()]
    timed = pd.DataFrame(rows, columns=["round", "order", "name", "latency_us"])
    found = fastest_chunk(timed)
    assert (found["best_chunk"], found["best_chunk_even"], found["best_chunk_odd"]) == (256, 256, 512)
    assert found["spread"] == pytest.approx(3.0)


def test_best_chunks_come_with_the_entropy_of_their_tensor():
    tensors = {name: draw(name, (1, 8, 300), seed=0) for name in ("uniform", "sparse2")}
    rows = best_chunk_rows(mamba_inputs(1, 8, 300, 4, seed=3), tensors, [128, 256], rounds=2, seed=0).set_index(
        "tensor"
    )
    assert set(rows.best_chunk) <= {128, 256}
    assert rows.entropy_nats["uniform"] > 5 > 1 > rows.entropy_nats["sparse2"]


def test_timings_of_the_distributions_have_a_control():
    rows = distribution_timings(mamba_inputs(1, 8, 300, 4, seed=3), 128, rounds=5, seed=0)
    assert set(rows.name) == {*DISTRIBUTIONS, "control"} and len(rows) == 5 * 6


def halves(even, odd):
    return pd.DataFrame({"best_chunk_even": even, "best_chunk_odd": odd})


def test_a_best_chunk_repeats_itself_only_if_the_halves_agree():
    chunks = [128, 256, 512, 128, 512, 256]
    assert repeatability(halves(chunks, chunks))["rho"] == pytest.approx(1)
    same = {"rho": 0.0, "p_value": 1.0, "n": 6}
    assert repeatability(halves([512] * 6, chunks)) == same and repeatability(halves(chunks, [512] * 6)) == same


@pytest.mark.gpu
def test_data_is_timed_as_replays_on_a_gpu():
    inputs = published_inputs(1, 128, 1024, 16, seed=0, dtype=torch.float16, device="cuda")
    rows = distribution_timings(inputs, 512, rounds=20, seed=0)
    ratios = distribution_ratios(rows, 0.3)
    assert ratios.equivalent.all()
    tensors = {name: draw(name, (1, 128, 1024), seed=0).to(inputs["u"]) for name in ("uniform", "sparse2")}
    best = best_chunk_rows(inputs, tensors, [128, 1024], rounds=4, seed=0).set_index("tensor")
    assert best.entropy_nats["uniform"] > 5 > 1 > best.entropy_nats["sparse2"]
