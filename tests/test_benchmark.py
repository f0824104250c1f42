"""Timing is paired and shuffled, and its intervals say what they should. No test asserts a time."""

import gc

import numpy as np
import pandas as pd
import pytest
import torch

from corey import benchmark


def rounds_of(log_ratios, base=100.0):
    """Rows in which a / b is exp(log_ratio) in each round while both drift together."""
    drift = base * np.exp(np.linspace(0, 2, len(log_ratios)))
    table = {"a": drift * np.exp(log_ratios), "b": drift}
    return pd.DataFrame(
        [(index, 0, name, table[name][index]) for index in range(len(drift)) for name in table],
        columns=["round", "order", "name", "latency_us"],
    )


def test_every_round_calls_every_function_once_in_a_new_order():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    rows = benchmark.paired(functions, rounds=20, warmup=2, seed=3)
    assert calls[6:] == rows["name"].tolist() and len(calls) == 6 + 60
    orders = {tuple(group["name"]) for _, group in rows.groupby("round")}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(orders) > 3
    assert rows.groupby("round")["order"].apply(list).map(lambda order: order == [0, 1, 2]).all()
    assert list(rows.columns) == ["round", "order", "name", "latency_us"] and (rows["latency_us"] > 0).all()


def test_the_order_follows_the_seed():
    names = [
        benchmark.paired({"a": int, "b": int, "c": int}, rounds=30, seed=seed)["name"].tolist() for seed in (1, 1, 2)
    ]
    assert names[0] == names[1] != names[2]


def test_garbage_is_not_collected_inside_a_round_and_is_afterwards():
    seen = []
    benchmark.paired({"a": lambda: seen.append(gc.isenabled())}, rounds=2, warmup=0)
    assert seen == [False, False] and gc.isenabled()

    def broken():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        benchmark.paired({"a": broken}, rounds=1, warmup=0)
    assert gc.isenabled()


def test_the_cache_is_flushed_before_each_call(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark, "_cpu_us", lambda function, scratch: seen.append(scratch.numel()) or 1.0)
    benchmark.paired({"a": int}, rounds=1, warmup=1, flush_bytes=4096)
    benchmark.paired({"a": int}, rounds=1, warmup=0)
    assert seen == [4096, 4096, 0]


def test_the_ratio_is_immune_to_common_drift():
    found = benchmark.ratio_interval(rounds_of(np.full(30, np.log(2.0))), "a", "b")
    assert found == {"ratio": pytest.approx(2), "low": pytest.approx(2), "high": pytest.approx(2), "n": 30}


def test_the_interval_covers_the_true_ratio_at_its_rate(monkeypatch):
    monkeypatch.setattr(benchmark, "RESAMPLES", 500)
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        found = benchmark.ratio_interval(rounds_of(np.log(1.5) + 0.1 * generator.standard_normal(40)), "a", "b")
        inside += found["low"] <= 1.5 <= found["high"]
    assert 88 <= inside <= 100


def test_a_ratio_and_its_inverse_agree():
    rows = rounds_of(0.3 * np.random.default_rng(1).standard_normal(25))
    forward, back = benchmark.ratio_interval(rows, "a", "b"), benchmark.ratio_interval(rows, "b", "a")
    assert forward["ratio"] * back["ratio"] == pytest.approx(1)
    assert forward["low"] * back["high"] == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("shift", "noise", "equivalent"),
    [(0.0, 0.005, True), (0.01, 0.005, True), (0.05, 0.005, False), (-0.05, 0.005, False), (0.0, 0.5, False)],
    ids=["same", "within", "slower", "faster", "too noisy to say"],
)
def test_equivalence_needs_the_whole_interval_within_the_margin(shift, noise, equivalent):
    rows = rounds_of(shift + noise * np.random.default_rng(2).standard_normal(30))
    found = benchmark.equivalent_within(rows, "a", "b", 0.02)
    assert found["equivalent"] is equivalent
    assert found["low"] <= found["ratio"] <= found["high"]


def test_the_launch_fit_recovers_the_published_line():
    counts = np.array([8, 16, 32, 64, 128])
    fit = benchmark.launch_cost_fit(counts, 383 + 46.2 * counts)
    assert fit == {
        "intercept_us": pytest.approx(383),
        "slope_us": pytest.approx(46.2),
        "r_squared": pytest.approx(1),
    }
    table_of_the_paper = [6315, 3299, 1867, 1148, 748]
    fit = benchmark.launch_cost_fit(counts[::-1], table_of_the_paper)
    assert fit["slope_us"] == pytest.approx(46.2, abs=0.1) and fit["r_squared"] > 0.9998


@pytest.mark.parametrize(
    "call",
    [
        lambda: benchmark.paired({}, rounds=1),
        lambda: benchmark.paired({"a": 1}, rounds=1),
        lambda: benchmark.paired({"a": int}, rounds=0),
        lambda: benchmark.paired({"a": int}, rounds=1, warmup=-1),
        lambda: benchmark.paired({"a": int}, rounds=1, flush_bytes=-1),
        lambda: benchmark.paired({"a": int}, rounds=1, device="meta"),
        lambda: benchmark.ratio_interval(rounds_of(np.zeros(9)), "a", "c"),
        lambda: benchmark.ratio_interval(rounds_of(np.zeros(9)), "a", "a"),
        lambda: benchmark.ratio_interval(rounds_of(np.zeros(9)), "a", "b", confidence=95),
        lambda: benchmark.ratio_interval(rounds_of(np.zeros(4)), "a", "b"),
        lambda: benchmark.ratio_interval(rounds_of(np.zeros(9)).iloc[1:], "a", "b"),
        lambda: benchmark.ratio_interval(rounds_of(np.full(9, np.inf)).replace(np.inf, 0), "a", "b"),
        lambda: benchmark.ratio_interval(pd.DataFrame({"name": ["a"]}), "a", "b"),
        lambda: benchmark.equivalent_within(rounds_of(np.zeros(9)), "a", "b", 2),
        lambda: benchmark.launch_cost_fit([1, 2], [1, 2]),
        lambda: benchmark.launch_cost_fit([1, 2, 3], [1, 2]),
        lambda: benchmark.launch_cost_fit([1, 2, 3], [1, 2, float("nan")]),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises((ValueError, TypeError), match=r"got .* want"):
        call()


@pytest.mark.gpu
def test_device_time_is_that_of_the_device_and_a_captured_function_computes():
    x, out = torch.randn(4096, 4096, device="cuda"), torch.empty(4096, 4096, device="cuda")
    replay = benchmark.capture(lambda: torch.mm(x, x, out=out))
    out.zero_()
    replay()
    torch.testing.assert_close(out, x @ x)
    rows = benchmark.paired({"graph": replay, "eager": lambda: torch.mm(x, x, out=out)}, rounds=20, device="cuda")
    assert (rows["latency_us"] > 0).all() and len(rows) == 40
