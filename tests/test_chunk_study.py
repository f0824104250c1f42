"""The helpers of notebook 03: published tables through the rule, errors of the three forms, the permutation test."""

import numpy as np
import pandas as pd
import pytest
import torch

from corey import chunk_study
from corey.chunk_study import (
    DISTRIBUTIONS,
    MEMORIES,
    best_chunk_rows,
    best_reset_chunk,
    distribution_ratios,
    draw,
    error_rows,
    fastest_chunk,
    launch_fits,
    legal_forms,
    mamba_inputs,
    num_launches,
    published_inputs,
    published_launch_fits,
    replay_href,
    replay_perturbation,
    replay_triplet,
    rule_regrets,
    spearman_permutation,
    summarise,
    sweep,
)
from corey.entropy import histogram_entropy


def small_inputs(memory="long", seqlen=500):
    return mamba_inputs(1, 8, seqlen, 4, step=MEMORIES[memory], seed=3)


@pytest.mark.parametrize(
    ("device", "intercept_ms", "slope_us", "r_squared"),
    [
        ("RTX 3070, fp16, L = 4096", 0.383, 46.2, 0.99987),
        ("H800, fp16, L = 4096", 0.015, 35.7, 0.999999),
        ("H800, bf16, L = 4096", 0.003, 36.5, 0.99996),
        ("H800, fp16, L = 8192", 0.028, 35.3, 0.99999),
    ],
)
def test_a_line_in_launches_explains_the_published_tables(device, intercept_ms, slope_us, r_squared):
    fit = published_launch_fits().set_index("device").loc[device]
    assert fit.intercept_us / 1e3 == pytest.approx(intercept_ms, abs=5.1e-4)
    assert fit.slope_us == pytest.approx(slope_us, abs=0.051)
    assert fit.r_squared == pytest.approx(r_squared, abs=6e-6)


def test_href_table_is_the_rule_and_a_lookup():
    rows = replay_href()
    assert len(rows) == 8
    assert (rows.replayed_chunk == rows.chunk_size).all()
    assert (rows.replayed_ms == rows.latency_ms).all()


def test_triplet_ratios_belong_to_the_legacy_ceiling():
    rows = replay_triplet().set_index(["gpu", "dtype", "seqlen"])
    assert (rows.chunk_legacy == 256).all() and (rows.chunk_log_k == 512).all()
    h800 = rows.loc["H800"].legacy_over_static_64
    assert [round(value, 3) for value in h800] == [4.035, 3.915, 3.898]
    assert [round(value, 2) for value in rows.loc["H800"].log_k_over_static_64] == [7.76, 7.67, 7.76]
    assert rows.loc["H800"].legacy_over_static_512.between(1.90, 2.0).all()
    assert round(rows.loc[("RTX 4050", "fp16", 4096)].legacy_over_static_64, 2) == 3.03


def test_perturbation_table_follows_from_seeded_draws():
    entropies = {name: float(histogram_entropy(draw(name, (1, 128, 4096), seed=42))) for name in DISTRIBUTIONS}
    rows = replay_perturbation(entropies)
    assert list(rows.distribution) == list(DISTRIBUTIONS)
    assert (rows.replayed_legacy == rows.chunk_legacy).all()
    assert (rows.replayed_log_k == rows.chunk_log_k).all()
    assert (rows.measured_nats - rows.entropy_nats).abs().max() < 0.25


def test_draws_depend_on_the_seed_alone():
    for name in DISTRIBUTIONS:
        assert torch.equal(draw(name, (3, 50), seed=1), draw(name, (3, 50), seed=1))
        assert not torch.equal(draw(name, (3, 50), seed=1), draw(name, (3, 50), seed=2))
    with pytest.raises(ValueError, match=r"distribution: got 'cauchy', want one of uniform"):
        draw("cauchy", (3, 50), seed=1)


@pytest.mark.parametrize(
    ("name", "mean_abs", "zeros"),
    [
        ("uniform", 0.5, 0),
        ("normal", 0.798, 0),
        ("laplace", 1.0, 0),
        ("sparse10", 0.0798, 0.9),
        ("sparse2", 0.0798, 0.98),
    ],
)
def test_draws_have_their_distribution(name, mean_abs, zeros):
    values = draw(name, (1, 100, 2000), seed=0)
    assert float(values.abs().mean()) == pytest.approx(mean_abs, rel=0.05)
    assert float((values == 0).double().mean()) == pytest.approx(zeros, abs=0.005)
    assert name == "uniform" or abs(float(values.mean())) < 0.02


def test_published_inputs_are_stable_and_seeded():
    first, again = (published_inputs(1, 4, 32, 3, seed=5, dtype=torch.float16) for _ in range(2))
    assert first["u"].dtype == first["delta"].dtype == torch.float16
    assert first["B"].shape == first["C"].shape == first["A"].shape == (4, 3)
    assert (first["A"] < 0).all()
    assert all(torch.equal(first[name], again[name]) for name in ("u", "delta", "A", "B", "C", "D"))


def test_only_whole_tiles_go_into_the_scan_and_the_largest_chunk_comes_first():
    forms = legal_forms([32, 128, 512])
    assert forms[0] == ("reset", 512)
    assert ("one_launch", 32) not in forms and ("reset", 32) in forms and ("one_launch", 128) in forms
    assert (num_launches("reset", 128, 500), num_launches("one_launch", 128, 500), num_launches("reset", 512, 500)) == (
        4,
        1,
        1,
    )


@pytest.mark.parametrize("memory", MEMORIES)
def test_dropping_the_state_costs_accuracy_and_keeping_it_costs_not_a_bit(memory):
    rows = error_rows(small_inputs(memory), [512, 256, 128, 32])
    kept = rows[(rows.form != "reset") & (rows.chunk_size % 128 == 0)]
    assert len(kept) == 6
    assert kept.bitwise_equal.all() and (kept.relative_error < 2e-6).all()
    reset = rows[rows.form == "reset"].set_index("chunk_size").relative_error
    assert reset[512] < 2e-6  # longer than the sequence: one call
    assert reset[32] > reset[128] > reset[256] > 1e-3
    assert not rows[(rows.form == "reset") & (rows.chunk_size < 500)].bitwise_equal.any()


def test_long_memory_loses_more_than_short():
    error = {
        memory: error_rows(small_inputs(memory), [128]).set_index("form").relative_error["reset"] for memory in MEMORIES
    }
    assert error["long"] > 5 * error["forgetful"]


def test_a_sweep_has_every_form_and_its_launches_fit_a_line():
    rows = sweep(small_inputs(), [512, 256, 128, 64], rounds=6, seed=0)
    assert len(rows) == 6 * 11
    summary = summarise(rows)
    assert (summary.form.iloc[:3] == ["reset", "one_launch", "carried"]).all() and summary.chunk_size.iloc[0] == 512
    assert (summary.low_us <= summary.median_us).all() and (summary.median_us <= summary.high_us).all()
    assert (summary.n == 6).all()
    made = summary.assign(median_us=100 + 7.0 * summary.n_launches)
    fits = launch_fits(made).set_index("form")
    assert fits.slope_us.tolist() == pytest.approx([7.0, 7.0]) and fits.intercept_us.tolist() == pytest.approx(
        [100.0] * 2
    )


def test_the_best_chunk_of_the_loop_is_the_largest_that_none_beats_beyond_doubt():
    noise = np.random.default_rng(1).normal(0, 0.05, (40, 4))
    latency = {64: 3.0, 256: 1.0, 512: 1.03, 1024: 0.5}
    rows = pd.DataFrame(
        {"round": i, "name": f"reset_{size}", "form": "reset", "chunk_size": size, "latency_us": value * np.exp(shift)}
        for i, shifts in enumerate(noise)
        for (size, value), shift in zip(latency.items(), shifts)
    )
    assert best_reset_chunk(rows, 512) == 512
    assert best_reset_chunk(rows, 1024) == 1024
    slower = rows.assign(latency_us=rows.latency_us.where(rows.chunk_size != 512, 1.3 * rows.latency_us))
    assert best_reset_chunk(slower, 512) == 256


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
    rows = best_chunk_rows(small_inputs(seqlen=300), tensors, [128, 256], rounds=2, seed=0).set_index("tensor")
    assert set(rows.best_chunk) <= {128, 256}
    assert rows.entropy_nats["uniform"] > 5 > 1 > rows.entropy_nats["sparse2"]


def test_regret_of_the_rule_is_against_512_and_against_one_call():
    latency = {"reset_64": 8.0, "reset_512": 2.0, "reset_4096": 1.0}
    rows = [(i, 0, name, value) for i in range(6) for name, value in latency.items()]
    timed = pd.DataFrame(rows, columns=["round", "order", "name", "latency_us"])
    found = rule_regrets(timed, {"normal": 4.7, "sparse2": 0.19}, unsliced=4096).set_index("distribution")
    assert found.chunk_size.to_dict() == {"normal": 512, "sparse2": 64}
    assert found.over_512.tolist() == pytest.approx([1.0, 4.0]) and found.over_unsliced.tolist() == pytest.approx(
        [2.0, 8.0]
    )


def test_unknown_forms_and_steps_are_refused():
    with pytest.raises(ValueError, match=r"form: got 'tiled', want one of reset"):
        chunk_study.scan_form("tiled", small_inputs(), 128)
    with pytest.raises(ValueError, match="step: got 0"):
        mamba_inputs(1, 8, 16, 4, step=0, seed=0)
