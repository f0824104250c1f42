"""The cost of a decision: every policy in every step that applies to it, against a scan with nothing to decide."""

import pandas as pd
import pytest
import torch

from corey.chunk_study import published_inputs
from corey.decision_study import decision_costs, decision_rows, measured_policies, scan_alone_us
from corey.schedulers import SCHEDULERS

READS_NOTHING = {"static", "no-entropy", "random", "table", "shape"}


def test_policies_that_cost_what_another_costs_stay_out():
    here = measured_policies("cpu")
    assert READS_NOTHING | {"hist", "token-hist", "cheap-proxy", "table-always-reads"} <= set(here)
    assert not any(name.startswith(("guarded", "device")) or name == "oracle" for name in here)
    assert set(measured_policies("cuda")) - set(here) == {name for name in SCHEDULERS if name.startswith("device-")}


def check_rows(rows, device_type):
    steps = rows.groupby("scheduler").step.agg(set)
    assert set(steps.index) == set(measured_policies(device_type))
    for name in set(steps.index) - {"device-hist"}:
        assert ("statistic" in steps[name]) == (name not in READS_NOTHING)
    assert all({"decision", "decision and scan"} <= found for found in steps)
    costs = decision_costs(rows)
    assert costs.scheduler.iloc[0] == "static" and costs.scheduler.tolist() == sorted(
        costs.scheduler, key=list(SCHEDULERS).index
    )
    assert (costs.low_us <= costs.median_us).all() and (costs.median_us <= costs.high_us).all()
    assert costs.slowdown.notna().sum() == len(steps) - 1
    assert scan_alone_us(costs) > 0


def test_every_policy_is_timed_in_every_step_that_it_has():
    check_rows(decision_rows(published_inputs(1, 8, 300, 4, seed=0), rounds=5, seed=0), "cpu")


@pytest.mark.gpu
def test_the_decision_on_the_device_fits_in_a_graph():
    inputs = published_inputs(1, 256, 1024, 16, seed=0, dtype=torch.float16, device="cuda")
    rows = decision_rows(inputs, rounds=6, seed=0)
    check_rows(rows, "cuda")
    assert set(rows[rows.step == "captured"].scheduler) == {"static", "device-hist"}


def test_the_slowdown_is_against_the_static_policy():
    latency = {"static decision and scan": 10.0, "static captured": 8.0, "hist decision and scan": 25.0}
    rows = pd.DataFrame(
        {"round": i, "name": name, "latency_us": value, "scheduler": name.split()[0], "step": name.split(" ", 1)[1]}
        for i in range(6)
        for name, value in latency.items()
    )
    costs = decision_costs(rows).set_index(["scheduler", "step"])
    assert costs.slowdown["hist", "decision and scan"] == pytest.approx(2.5)
    assert scan_alone_us(costs.reset_index()) == 8
