"""Rules are timed as they decide and as recorded, and regret is what a made table of times says it is."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from corey import regime_study
from corey.mamba import MambaConfig
from corey.mamba_weights import random_mamba
from corey.plots import regimes as plots
from corey.published import read_published
from corey.regime_study import (
    ALL,
    ONE_STATIC,
    OPERATOR,
    build_rules,
    first_layers,
    measure_regime,
    measure_regimes,
    published_regrets,
    regret_rows,
    resampled_medians,
)
from corey.regimes import Regime

TINY = MambaConfig(d_model=16, n_layer=3, vocab_size=256, d_inner=32, dt_rank=2, d_state=4)
CHUNKS = [128, 256, 512]


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_the_rules_are_static_chunks_and_those_of_the_ablation():
    here, gpu = (build_rules([512, 128], kind, seed=0) for kind in ("cpu", "cuda"))
    assert list(here)[:3] == ["static-128", "static-512", OPERATOR] and here[OPERATOR] is None
    assert {"shape", "table", "random", "hist", "sampled-hist", "guarded-hist"} <= set(here)
    assert set(gpu) - set(here) == {"device-hist"}


def test_first_layers_are_a_model_of_their_own():
    model = random_mamba(TINY, seed=0)
    ids = Regime("short_chat", 1, 20).prompts(seed=0)
    short = first_layers(model, 2)
    assert short.config.n_layer == 2 and len(short.new_state(1).ssm) == 2 and short(ids).shape == (1, 20, 256)
    assert not torch.equal(short(ids), model(ids)) and torch.equal(first_layers(model, 9)(ids), model(ids))


def check_regime(latency, choices, engines):
    choices = choices.set_index("scheduler")
    assert choices.bitwise_equal.all() and set(latency.engine) == engines
    chosen, judged = (latency[latency.block == block] for block in ("choose", "judge"))
    timed = judged[judged.engine == "calls"].groupby("step").scheduler.agg(set)
    assert timed["live"] == {name for name in choices.index if regime_study.decides(name)}
    assert timed["recorded"] == set(choices.timed_as)
    assert set(chosen.scheduler) == {name for name in timed["recorded"] if name.startswith("static-")}
    assert set(chosen.step) == {"recorded"} and set(chosen.engine) == engines
    assert (latency.groupby(["block", "engine", "step", "scheduler"])["round"].nunique() == 5).all()
    return choices


def test_every_rule_is_timed_as_it_decides_and_every_choice_once():
    rules = build_rules(CHUNKS, "cpu", seed=0)
    model = random_mamba(TINY, seed=0)
    latency, choices = measure_regime(model, Regime("code_repo", 2, 300), rules, rounds=5, seed=0)
    found = check_regime(latency, choices, {"calls"})
    assert found.chunks["static-256"] == "256 256 256" and found.chunks[OPERATOR] == "None None None"
    assert found.chunks["table"] == "512 512 512" and found.timed_as["table"] == "static-512"
    assert found.reads_values["hist"] and not found.reads_values["table"] and not found.reads_values[OPERATOR]
    assert 0 < found.statistic_nats["hist"] < np.log(256) and np.isnan(found.statistic_nats["shape"])
    assert (latency.regime == "code_repo").all() and (latency.seqlen == 300).all() and (latency.batch == 2).all()


def test_a_chunk_longer_than_the_prompt_is_the_whole_prompt():
    rules = build_rules(CHUNKS, "cpu", seed=0)
    _, choices = measure_regime(random_mamba(TINY, seed=0), Regime("short_chat", 1, 40), rules, rounds=5, seed=0)
    timed_as = choices.set_index("scheduler").timed_as
    assert timed_as[OPERATOR] == OPERATOR and set(timed_as.drop(OPERATOR)) == {"static-128"}


@pytest.mark.gpu
def test_on_a_gpu_what_does_not_wait_is_timed_in_a_graph_as_well():
    rules = build_rules([*CHUNKS, 1024, 2048], "cuda", seed=0)
    model = random_mamba(TINY, seed=0, device="cuda", dtype=torch.bfloat16)
    latency, choices = measure_regime(model, Regime("code_repo", 2, 3000), rules, rounds=5, seed=0)
    check_regime(latency, choices, {"calls", "graph"})
    in_graph = latency[latency.engine == "graph"].groupby("step").scheduler.agg(set)
    assert in_graph["live"] == {"device-hist"} and in_graph["recorded"] == set(choices.timed_as)
    totals = regret_rows(latency, choices).query("engine == 'graph' and part == 'total' and regime != 'all'")
    assert {"table", "device-hist", OPERATOR} <= set(totals.scheduler) and "hist" not in set(totals.scheduler)


class WrongBits(regime_study.Session):
    """A session whose logits change where a rule, and not a recording, decides."""

    def prefill(self, token_ids, *, chunk_policy=None):
        logits = super().prefill(token_ids, chunk_policy=chunk_policy)
        return logits + (getattr(chunk_policy, "name", "") == "hist")


def test_a_rule_that_changes_a_bit_is_noticed(monkeypatch):
    monkeypatch.setattr(regime_study, "Session", WrongBits)
    rules = build_rules(CHUNKS, "cpu", seed=0)
    _, choices = measure_regime(random_mamba(TINY, seed=0), Regime("short_chat", 1, 40), rules, rounds=5, seed=0)
    assert choices[~choices.bitwise_equal.astype(bool)].scheduler.tolist() == ["hist"]


def test_rounds_and_kinds_are_checked():
    model, rules = random_mamba(TINY, seed=0), build_rules(CHUNKS, "cpu", seed=0)
    regimes = [Regime("short_chat", 1, 20), Regime("code_repo", 1, 20)]
    with pytest.raises(ValueError, match="rounds: got 1 numbers"):
        measure_regimes(model, regimes, rules, rounds=[5], seed=0)
    with pytest.raises(ValueError, match="regimes: got"):
        measure_regimes(model, regimes[:1] * 2, rules, rounds=[5, 5], seed=0)
    latency, choices = measure_regimes(model, regimes, rules, rounds=[5, 6], seed=0)
    assert latency.groupby("regime")["round"].nunique().to_dict() == {"short_chat": 5, "code_repo": 6}
    assert list(choices.regime.unique()) == ["short_chat", "code_repo"]


# ---- regret ----------------------------------------------------------------------------------------------------------

TIMES = {  # regime: (step, rule): latency
    "short": {("recorded", "static-128"): 100, ("recorded", "static-512"): 110, ("live", "hist"): 165},
    "long": {("recorded", "static-128"): 260, ("recorded", "static-512"): 200, ("live", "hist"): 220},
}
REGRETS = {  # of these times: hist chooses 512
    ("short", "static-128", "total"): 0,
    ("short", "static-512", "choice"): 10,
    ("short", "hist", "choice"): 10,
    ("short", "hist", "deciding"): 50,
    ("short", "hist", "total"): 65,
    ("long", "static-128", "choice"): 30,
    ("long", "hist", "deciding"): 10,
    ("long", "hist", "total"): 10,
    (ALL, "hist", "choice"): 100 * (1.1**0.5 - 1),
    (ALL, "hist", "total"): 100 * ((1.65 * 1.1) ** 0.5 - 1),
    (ALL, ONE_STATIC, "choice"): 100 * (1.1**0.5 - 1),
}


def made(*, spread=0.0, rounds=20, engine="calls"):
    noise = np.random.default_rng(0)
    latency = pd.DataFrame(
        {"block": block, "round": i, "step": step, "scheduler": name, "regime": regime, "engine": engine}
        | {"latency_us": value * np.exp(noise.normal(0, spread)), "batch": 1, "seqlen": 64}
        for regime, forms in TIMES.items()
        for block in ("choose", "judge")
        for i in range(rounds)
        for (step, name), value in forms.items()
        if block == "judge" or name.startswith("static-")
    )
    rules = {"static-128": "static-128", "static-512": "static-512", OPERATOR: "static-512", "hist": "static-512"}
    choices = pd.DataFrame(
        {"regime": regime, "scheduler": name, "timed_as": timed, "reads_values": name == "hist"}
        for regime in TIMES
        for name, timed in rules.items()
    )
    return latency, choices


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_regret_is_taken_apart_into_choice_and_deciding(spread):
    rows = regret_rows(*made(spread=spread)).set_index(["regime", "scheduler", "part"])
    for key, percent in REGRETS.items():
        assert rows.regret_percent[key] == pytest.approx(percent, abs=150 * spread + 1e-9), key
    assert (rows.low_percent <= rows.regret_percent).all() and (rows.regret_percent <= rows.high_percent).all()
    assert (rows.n == 20).all() and rows.loc[ALL].seqlen.isna().all() and (rows.loc["long"].seqlen == 64).all()


def test_what_waits_for_the_host_has_no_total_in_a_graph():
    latency, choices = made(engine="graph")
    rows = regret_rows(latency[latency.step == "recorded"], choices)
    assert set(rows[rows.scheduler == "hist"].part) == {"choice"}
    assert set(rows[rows.scheduler == "static-128"].part) == {"choice", "total"}


def test_the_oracle_is_judged_on_rounds_that_did_not_choose_it():
    latency, choices = made()
    lucky = (latency.block == "choose") & (latency.regime == "long") & (latency.scheduler == "static-128")
    rows = regret_rows(latency.assign(latency_us=latency.latency_us.where(~lucky, 150)), choices)
    found = rows.set_index(["regime", "scheduler", "part"]).regret_percent
    assert found["long", "static-128", "choice"] == 0  # as chosen, though it takes 260 where it is judged
    assert found["long", "static-512", "choice"] == pytest.approx(100 * (200 / 260 - 1))


def test_the_first_of_the_draws_is_the_estimate():
    draws = resampled_medians(np.array([1.0, 5.0, 2.0, 6.0, 30.0]), np.random.default_rng(0))
    assert draws[0] == 5 and len(draws) == regime_study.RESAMPLES + 1 and set(draws[1:]) == {1, 2, 5, 6, 30}


def test_by_the_published_table_an_oracle_has_little_to_win():
    over = published_regrets(read_published("mixed_regime")).over_oracle_percent
    assert over["static-512"] == pytest.approx(0.14, abs=0.005) and over["table"] < 0.005 and over["oracle"] == 0


# ---- figures ---------------------------------------------------------------------------------------------------------


def regrets_of_both_engines():
    latency, choices = made(spread=0.02)
    graph = latency[latency.step == "recorded"].assign(engine="graph")
    return regret_rows(pd.concat([latency, graph]), choices)


def drawn(ax):
    return {bars.get_label(): list(bars.lines[0].get_xdata()) for bars in ax.containers}


def test_a_rule_keeps_its_line_and_totals_are_of_rules_that_decide():
    rows = regrets_of_both_engines()
    rules = ["static-128", "static-512", OPERATOR, "hist", "device-hist", ONE_STATIC]
    ax = plots.plot_regrets(rows[rows.regime == "short"], rules, plt.subplots()[1])
    assert [label.get_text() for label in ax.get_yticklabels()] == rules
    found = drawn(ax)
    assert len(found["the choice alone"]) == 5 and len(found["with deciding, launched by the host"]) == 1
    plt.close("all")


def test_every_regime_has_its_axes_and_its_shape_in_the_title():
    rows = regrets_of_both_engines().astype({"batch": float, "seqlen": float})  # as they come back from a file
    axes = plt.subplots(1, 2, squeeze=False)[1]
    plots.plot_each_regime(rows, ["static-128", "static-512", OPERATOR, "hist", ONE_STATIC], axes)
    assert [ax.get_title(loc="center") for ax in axes[0]] == ["short, 1 × 64", "long, 1 × 64"]
    plt.close("all")


def test_the_average_has_a_dot_for_every_regime_and_one_legend_for_all_machines():
    rows = regrets_of_both_engines()
    fig, axes = plt.subplots(1, 2)
    for ax in axes:
        plots.plot_average(rows, ["static-128", "static-512", OPERATOR, "hist", ONE_STATIC], ax)
    assert len(axes[0].lines[0].get_xdata()) == 2 * 5
    plots.shared_legend(fig, axes)
    assert len(fig.legends[0].get_texts()) == 3
    plt.close("all")
