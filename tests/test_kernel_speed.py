"""The speed table: floors as counted by hand, times and ratios of known durations, and the rows of every part."""

import math
import time

import pandas as pd
import pytest
import torch

from corey import cold_timing, kernel_speed, operator_speed, paths, results
from corey.cold_timing import Limits
from corey.scan import selective_scan_ref

H200 = Limits(multiprocessors=132, clock_hz=1.98e9, copy_bytes_per_s=4.3e12)
RESOURCES = {"registers": 128, "spilled_bytes": 0, "shared_bytes": 50_000, "blocks": 132, "blocks_per_sm": 2}


@pytest.mark.parametrize(
    ("shape", "mufu_us"), [((1, 2048, 4096), 38.1), ((8, 5120, 2048), 381), ((1, 1024, 4096), 19.1)]
)
def test_the_floors_are_those_counted_by_hand(shape, mufu_us):
    floors = kernel_speed.scan_floors(*shape, 16, 2, H200)
    steps = math.prod(shape)
    assert floors["mufu_floor_us"] == pytest.approx(mufu_us, rel=3e-3)
    assert floors["issue_floor_us"] == pytest.approx(steps * 113 / 128 / (132 * 1980), rel=1e-6)
    assert (
        steps * 8 / 4.3e6 < floors["hbm_floor_us"] < 1.03 * steps * 8 / 4.3e6
    )  # four tensors of two bytes, and little more


def test_sets_are_larger_than_the_cache_together_and_at_least_two():
    assert cold_timing.num_sets(10**9) == 2
    assert cold_timing.num_sets(30 * 10**6) * 30e6 > cold_timing.COLD_BYTES
    assert cold_timing.num_sets(1000) == cold_timing.MAX_SETS


def test_calls_rotate_over_the_sets():
    seen = []
    for call in cold_timing.rotated(seen.append, ["a", "b", "c"], 5):
        call()
    assert seen == ["a", "b", "c"] * 2


def test_a_time_is_that_of_one_call_and_a_ratio_that_of_two_names(monkeypatch):
    now = [0]  # ns of a clock that only the calls move
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])

    def call_of(microseconds):
        return lambda: now.__setitem__(0, now[0] + 1000 * microseconds)

    calls = {"short": [call_of(2)] * 3, "long": [call_of(6)]}
    times = cold_timing.time_calls(calls, rounds=7, seed=0, device="cpu")
    assert times[times.name == "short"].latency_us.eq(2).all() and times[times.name == "long"].latency_us.eq(6).all()
    found = cold_timing.ratio(times, "long", "short", "speedup")
    assert found["speedup_low"] == found["speedup"] == found["speedup_high"] == pytest.approx(3)
    assert all(math.isnan(x) for x in cold_timing.ratio(times, "absent", "short", "speedup").values())


def test_inputs_of_both_layouts_hold_the_same_values():
    layouts = kernel_speed.scan_inputs(2, 64, 33, seed=1, device="cpu")
    assert layouts["channel_major"].keys() == layouts["token_major"].keys()
    for name in ("u", "delta", "z", "B", "C"):
        channel_major, token_major = layouts["channel_major"][name], layouts["token_major"][name]
        assert torch.equal(channel_major, token_major) and channel_major.is_contiguous()
        assert token_major.stride(-2) == 1 < token_major.stride(-1)


def stand_in(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """The signature and results of mamba-ssm's forward."""
    gated = selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return [u, A, gated]


@pytest.mark.parametrize("stock", (stand_in, None))
def test_a_shape_gives_a_row_for_each_layout(stock, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_speed, "scan_resources", lambda inputs: RESOURCES)
    monkeypatch.setattr(cold_timing, "MAX_SETS", 2)
    monkeypatch.setattr(paths, "LIVE_RESULTS", tmp_path)
    rows = kernel_speed.scan_rows((1, 16, 40), H200, stock, rounds=5, seed=0, device="cpu")
    assert [row["layout"] for row in rows] == ["channel_major", "token_major"]
    results.write_rows(rows, "kernel_speed_scan", parameters={})
    channel_major, token_major = pd.DataFrame(rows).itertuples()
    kernel_speed.print_scan(pd.DataFrame(rows))
    assert channel_major.copies_us == 0 and channel_major.registers == 128
    if stock is None:
        assert math.isnan(channel_major.speedup) and math.isnan(token_major.copies_us)
        return
    assert channel_major.relative_error < 1e-2
    assert channel_major.speedup == channel_major.kernel_speedup
    assert token_major.speedup > token_major.kernel_speedup and token_major.copies_us > 0
    assert token_major.speedup_low <= token_major.speedup <= token_major.speedup_high
    assert token_major.stock_us == channel_major.stock_us
    assert channel_major.over_floor == pytest.approx(channel_major.latency_us / channel_major.mufu_floor_us)


def test_every_operator_gives_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(operator_speed, "MAX_SETS", 2)
    monkeypatch.setattr(cold_timing, "MAX_SETS", 2)
    monkeypatch.setattr(operator_speed, "SHORT_CALLS", 2)
    monkeypatch.setattr(paths, "LIVE_RESULTS", tmp_path)
    found = operator_speed.operators(64, 512, device="cpu")
    rows = operator_speed.operator_rows(found, H200, rounds=5, seed=0, device="cpu")
    results.write_rows(rows, "kernel_speed_operators", parameters={})
    assert {row["operator"] for row in rows} >= {"copy", "entropy", "hadamard", "conv", "conv update", "state update"}
    assert len({(row["operator"], row["variant"], row["shape"]) for row in rows}) == len(rows)
    share = {row["operator"]: row["copy_share"] for row in rows}
    assert share["hadamard"] > 0 and math.isnan(share["copy"]) and math.isnan(share["entropy"])
    copy = rows[0]
    assert copy["floor_us"] == pytest.approx(2 * 64 * 512 * 2 / 4.3e6)


def test_without_a_gpu_nothing_is_measured_and_the_reason_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_speed.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_times_of_a_scan_and_of_the_host_on_this_gpu():
    limits = cold_timing.measure_limits(rounds=5)
    rows = kernel_speed.scan_rows((1, 512, 1024), limits, None, rounds=5, seed=0)
    assert all(row["over_floor"] > 0.9 and row["registers"] > 16 for row in rows)
    host = kernel_speed.host_rows(None, repeats=3)
    assert all(row["latency_us"] > 0 for row in host) and len(host) == 6
