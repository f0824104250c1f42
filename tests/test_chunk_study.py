"""The sweep of notebook 03: published tables through the rule, errors of the three forms, where a loop's time goes."""

import numpy as np
import pandas as pd
import pytest
import torch

from corey import chunk_study
from corey.chunk_study import (
    DISTRIBUTIONS,
    MEMORIES,
    best_reset_chunk,
    draw,
    error_rows,
    launch_cost_parts,
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
    summarise,
    sweep,
    triplet_rows,
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
    assert len(rows) == 6 * 12  # three forms at four chunks, less one launch at 64, and the default call
    assert rows[rows.form == "default"].chunk_size.unique() == [500]
    assert rows[rows.form == "default"].n_launches.unique() == [1]
    summary = summarise(rows)
    assert (summary.form.iloc[:3] == ["reset", "one_launch", "carried"]).all() and summary.chunk_size.iloc[0] == 512
    assert (summary.low_us <= summary.median_us).all() and (summary.median_us <= summary.high_us).all()
    assert (summary.n == 6).all()
    made = summary.assign(median_us=100 + 7.0 * summary.n_launches)
    fits = launch_fits(made).set_index("form")
    assert fits.slope_us.tolist() == pytest.approx([7.0, 7.0]) and fits.intercept_us.tolist() == pytest.approx(
        [100.0] * 2
    )


def split_sweep(host_us=30.0, launch_us=3.0, scan_us=25.0, rounds=8):
    """A sweep on a GPU without noise but a drift of the rounds, which differences within rounds take out."""
    rows = []
    for index in range(rounds):
        for form, sizes in (("reset", (512, 128)), ("carried", (512, 128)), ("default", (512,))):
            for size in sizes:
                launches = 512 // size
                replay = scan_us + launch_us * (launches - 1) + index
                row = {"round": index, "chunk_size": size, "n_launches": launches}
                rows.append(row | {"name": f"{form}_graph_{size}", "form": f"{form}_graph", "latency_us": replay})
                rows.append(row | {"name": f"{form}_{size}", "form": form, "latency_us": replay + host_us * launches})
    return pd.DataFrame(rows)


def test_the_time_of_a_loop_is_split_into_scan_cut_and_host():
    parts = launch_cost_parts(split_sweep()).set_index(["form", "chunk_size", "part"])
    assert len(parts) == 2 * 2 * 3
    assert parts.latency_us["reset", 128, "host"] == pytest.approx(120) and parts.n_launches["reset", 128, "host"] == 4
    assert parts.latency_us["carried", 128, "cut"] == pytest.approx(9)
    assert parts.latency_us["carried", 512, "cut"] == 0
    assert parts.latency_us["reset", 512, "scan"] == pytest.approx(25 + 3.5)
    assert (parts.low_us <= parts.latency_us).all() and (parts.latency_us <= parts.high_us).all()
    with pytest.raises(ValueError, match="rows: got no graph replays, want a sweep on a GPU"):
        launch_cost_parts(split_sweep().query("form == 'reset'"))


def test_graph_replays_have_a_launch_cost_line_of_their_own():
    rows = split_sweep(host_us=20.0)
    more = rows[rows.chunk_size == 128].assign(chunk_size=64, n_launches=8, latency_us=lambda x: x.latency_us + 92)
    more["name"] = more.form + "_64"
    fits = launch_fits(summarise(pd.concat([rows, more]))).set_index("form")
    assert list(fits.index) == ["reset", "reset_graph", "carried", "carried_graph"]
    assert fits.slope_us["reset"] == pytest.approx(23) and fits.r_squared["reset"] == pytest.approx(1)


def test_triplets_are_speedups_over_chunk_64():
    rows = triplet_rows(["float32 600", "bfloat16 600"], (1, 4, 3), rounds=5, seed=0, device="cpu")
    assert rows.dtype.tolist() == ["float32"] * 3 + ["bfloat16"] * 3 and rows.chunk_size.tolist() == [256, 512, 600] * 2
    assert (rows.low <= rows.ratio).all() and (rows.ratio <= rows.high).all() and (rows.n == 5).all()
    assert rows[rows.chunk_size == 600].ratio.min() > 1  # ten calls are slower than one


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


def test_regret_of_the_rule_is_against_512_and_against_one_call():
    latency = {"reset_64": 8.0, "reset_512": 2.0, "default_4096": 1.0}
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


@pytest.mark.gpu
def test_a_sweep_on_a_gpu_replays_every_form_and_its_host_shows():
    inputs = published_inputs(1, 256, 1024, 16, seed=0, dtype=torch.float16, device="cuda")
    rows = sweep(inputs, [1024, 512, 128, 64], rounds=6, seed=0)
    assert set(rows.form) == {
        f"{form}{end}" for form in ("reset", "carried", "one_launch", "default") for end in ("", "_graph")
    }
    parts = launch_cost_parts(rows).set_index(["form", "chunk_size", "part"]).latency_us
    assert parts["reset", 64, "host"] > parts["reset", 512, "host"] > 0
    assert parts["carried", 64, "cut"] > 0
    assert len(launch_fits(summarise(rows))) == 4


@pytest.mark.gpu
def test_keeping_the_state_costs_not_a_bit_on_a_gpu():
    rows = error_rows(mamba_inputs(1, 8, 500, 16, step=MEMORIES["long"], seed=3, device="cuda"), [512, 256, 128])
    kept = rows[rows.form != "reset"]
    assert kept.bitwise_equal.all() and (kept.relative_error < 1e-5).all()
