"""The scheduler ablation: policies and their forms, what is measured of them, and the arithmetic of ratios."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from corey import ablation_policies, ablation_study, client_study
from corey.ablation_policies import (
    ADAPTIVE,
    CONTROL,
    OPERATOR,
    REFERENCE,
    SHUFFLED,
    Recorded,
    all_forms,
    build_policies,
    record,
    scan_inputs,
    split_forms,
)
from corey.ablation_study import judged, overheads, policy_ratios, row_name
from corey.checkpoints import load_checkpoint
from corey.mamba import MambaConfig
from corey.mamba_session import Session
from corey.mamba_weights import random_mamba
from corey.plots import ablation as plots
from corey.schedulers import Scheduler

TINY = MambaConfig(d_model=16, n_layer=5, vocab_size=40, d_inner=32, dt_rank=2)
GPU_TINY = MambaConfig(d_model=64, n_layer=5, vocab_size=40, d_inner=128, dt_rank=4)
ON_DEVICE = {"device-hist", "device-hist-on-the-way", "device-hist-every-4th"}
HOST_READERS = {*ADAPTIVE, "table-always-reads"} - ON_DEVICE


def policies(device_type="cpu"):
    return build_policies([128, 256], stride=4, seed=0, device_type=device_type)


# ---- policies and forms ----------------------------------------------------------------------------------------------


def test_equal_recordings_are_one_policy():
    assert Recorded((128, None)) == Recorded((128, None)) and len({Recorded((128,)), Recorded((128,))}) == 1
    assert [Recorded((128, None))(None, layer=layer) for layer in (0, 1)] == [128, None]


def test_the_matrix_holds_the_published_policies_in_the_published_range():
    here = policies()
    assert {"static-128", "static-256", REFERENCE, CONTROL, OPERATOR, "no-entropy", "random", "table", "shape"} <= set(
        here
    )
    assert set(ADAPTIVE) - set(here) == ON_DEVICE
    assert set(policies("cuda")) - set(here) == ON_DEVICE
    u = torch.zeros(1, 8, 300)
    assert here["hist"](u) == 128 and here["no-entropy"](u) == 1024  # the ends and the middle of 128 to 2048
    assert [here["table"](u[..., :length]) for length in (255, 256)] == [128, 512]


def test_a_recording_has_a_chunk_for_every_layer_and_shuffling_keeps_them():
    inputs = scan_inputs(random_mamba(TINY), torch.zeros(1, 130, dtype=torch.int64))
    assert [tuple(u.shape) for u in inputs] == [(1, 32, 130)] * 5
    chunks = record(lambda u, layer: 128 * (layer + 1), inputs)
    assert chunks == (128, 256, 384, 512, 640)
    dealt = ablation_policies.shuffled(chunks, seed=1)
    assert sorted(dealt(None, layer) for layer in range(5)) == list(chunks)
    assert [dealt(None, layer) for layer in range(5)] != list(chunks)


def watched(name="watched"):
    """A scheduler that says 128 everywhere, and the list of what was asked of it."""
    asked = []

    def statistic(u):
        asked.append("statistic")
        return u.sum()

    return Scheduler(name, "u", "", lambda u, layer: asked.append("decision") or 128, statistic), asked


@pytest.mark.parametrize(
    ("form", "chunks", "asks"),
    [
        ("forced", [512] * 5, ["decision"] * 5),
        ("unread", [512] * 5, ["statistic"] * 5),
        ("replayed", [1, 2, 3, 4, 5], []),
    ],
)
def test_a_form_leaves_out_what_it_says(form, chunks, asks):
    policy, asked = watched()
    each = split_forms(policy, [1, 2, 3, 4, 5])[form]
    assert [each(torch.zeros(1, 2, 3), layer=layer) for layer in range(5)] == chunks
    assert asked == asks


def test_every_fourth_layer_decides_and_takes_its_statistic_there_alone():
    inner, asked = watched("hist")
    policy = ablation_policies._every_fourth(inner)
    assert [policy(torch.zeros(1, 2, 3), layer=layer) for layer in range(6)] == [128, 512, 512, 512, 128, 512]
    unread = split_forms(policy, [])["unread"]
    asked.clear()
    assert [unread(torch.zeros(1, 2, 3), layer=layer) for layer in range(6)] == [512] * 6
    assert asked == ["statistic"] * 2


def test_a_policy_without_a_statistic_has_none_to_leave_unread():
    assert set(split_forms(policies()["table"], [512])) == {"forced", "replayed"}


def test_what_the_convolution_decides_has_no_part_that_could_be_left_out():
    assert set(split_forms(policies("cuda")["device-hist-on-the-way"], [512])) == {"replayed"}


def test_a_graph_holds_no_form_that_the_host_waits_for():
    found = policies("cuda")
    recorded = dict.fromkeys(found, (512,))
    live, graph = (
        all_forms(found, recorded, ["hist", "device-hist", "table"], engine) for engine in ("calls", "graph")
    )
    left_out = {(name, "published") for name in HOST_READERS} | {("hist", "forced")}
    assert set(live) - set(graph) == left_out
    assert {("hist", "unread"), ("hist", "replayed"), ("device-hist", "forced"), ("table", "forced")} <= set(graph)


# ---- measurement -----------------------------------------------------------------------------------------------------


def measure(model, ids, engine):
    return ablation_study.measure(
        model, ids, engine, chunk_sizes=[128, 256], split=["hist", "table"], stride=4, decode_tokens=2, choose_rounds=1,
        rounds=5, seed=0,
    )  # fmt: skip


def check_measured(latency, bits, chunks, engine):
    judge, choose = (latency[latency.block == block] for block in ("judge", "choose"))
    assert set(latency["engine"]) == {engine} and set(choose.scheduler) == {"static-128", "static-256", REFERENCE}
    timed = set(zip(judge.scheduler, judge.form, judge.step))
    assert all(group.name.eq(row_name(REFERENCE)).sum() == 5 for _, group in judge.groupby("group"))
    assert judge[judge.scheduler == "hist"].group.nunique() == 1  # all forms of a policy share their rounds
    assert {(name, "published", "decode") for name in ("oracle", SHUFFLED, OPERATOR, CONTROL)} <= timed
    assert ("hist", "unread", "decode") not in timed  # the null is for whole policies
    assert judge[judge.scheduler != REFERENCE].groupby("name").size().eq(5).all()
    assert bits.logits_bitwise_equal.all() and bits.tokens_equal.dropna().all()
    assert chunks.set_index(["scheduler", "layer"]).chunk_size["oracle"].nunique() == 1
    assert set(chunks.layer) == set(range(5))


def test_all_policies_are_timed_and_none_changes_a_bit():
    latency, bits, chunks = measure(random_mamba(TINY), torch.arange(300)[None] % 40, "calls")
    check_measured(latency, bits, chunks, "calls")
    assert {"forced", "unread", "replayed"} <= set(bits[bits.scheduler == "hist"].form)
    rows = judged(latency, "calls")
    assert set(overheads(rows).part) == {"statistic", "decision", "chunk", "all", "unexplained"}
    assert set(policy_ratios(rows).step) == {"prefill", "decode", "generation"}


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["calls", "graph"])
def test_all_policies_are_timed_on_a_gpu(engine):
    model = random_mamba(GPU_TINY, device="cuda", dtype=torch.bfloat16)
    latency, bits, chunks = measure(model, (torch.arange(700)[None] % 40).cuda(), engine)
    check_measured(latency, bits, chunks, engine)
    assert ("hist" in set(latency[latency.form == "published"].scheduler)) == (engine == "calls")
    assert "device-hist" in set(latency[latency.form == "published"].scheduler)


def test_groups_hold_a_few_forms_and_the_reference_and_keep_a_policy_together():
    forms = {"hist": ["published", "forced", "unread", "replayed"], "a": ["published"], "b": ["published"]}
    forms |= {"table": ["published", "forced", "replayed"], REFERENCE: ["published"]}
    calls = {(name, form, "prefill"): None for name, each in forms.items() for form in each}
    groups = ablation_study._groups(calls | {("a", "published", "decode"): None})
    assert [list(dict.fromkeys(key[0] for key in group)) for group in groups] == [
        [REFERENCE, "hist"], [REFERENCE, "a", "b"], [REFERENCE, "table"],
    ]  # fmt: skip
    assert set().union(*groups) == {*calls, ("a", "published", "decode")}


def test_a_policy_that_changes_a_bit_is_noticed():
    model, ids = random_mamba(TINY), torch.arange(200)[None] % 40
    sessions = [Session(model), Session(model)]
    calls = {}
    for session, name, prompt in zip(sessions, (REFERENCE, "other"), (ids, ids.flip(1))):
        calls[name, "published", "prefill"] = lambda session=session, prompt=prompt: session.prefill(prompt)
        calls[name, "published", "decode"] = lambda session=session: session.decode(8)
    bits = ablation_study.bit_rows(calls, times=1).set_index("scheduler")
    assert bits.logits_bitwise_equal.tolist() == [True, False]
    assert bits.tokens_equal[REFERENCE]


def test_the_oracle_is_the_static_chunk_of_the_least_median():
    times = {"static-128": [5.0, 5, 90], "static-512": [6.0, 6, 6]}
    rows = pd.DataFrame({"scheduler": name, "latency_us": t} for name, each in times.items() for t in each)
    assert ablation_study.fastest_static(rows) == 128


# ---- ratios ----------------------------------------------------------------------------------------------------------


def rows_of(latency, engine="calls", group=0, speed=1.0):
    """Six rounds in which every call takes the given time over `speed`, but for a drift that all of a round share."""
    return pd.DataFrame(
        {
            "name": row_name(*key), "scheduler": key[0], "form": key[1], "step": key[2], "block": "judge",
            "group": group, "engine": engine, "round": index, "latency_us": time / speed * 1.1**index,
        }
        for key, time in latency.items()
        for index in range(6)
    )  # fmt: skip


PLAIN = {(REFERENCE, "published", "prefill"): 100.0, (REFERENCE, "published", "decode"): 300.0}
SPLIT = PLAIN | {
    ("hist", "published", "prefill"): 100 * 1.2 * 1.1 * 0.9,
    ("hist", "published", "decode"): 300.0,
    ("hist", "unread", "prefill"): 120.0,
    ("hist", "forced", "prefill"): 100 * 1.2 * 1.1,
    ("hist", "replayed", "prefill"): 90.0,
    ("table", "published", "prefill"): 95.0,
}


def test_ratios_are_against_the_reference_and_generations_are_sums():
    ratios = policy_ratios(judged(rows_of(SPLIT), "calls")).set_index(["scheduler", "step"]).ratio
    assert ratios["hist", "prefill"] == pytest.approx(1.188)
    assert ratios["hist", "decode"] == pytest.approx(1)
    assert ratios["hist", "generation"] == pytest.approx((118.8 + 300) / 400)
    assert ("table", "generation") not in ratios and REFERENCE not in ratios


def test_policies_of_different_groups_are_compared_through_the_reference_of_each():
    slow = rows_of(PLAIN | {("random", "published", "prefill"): 99.0}, group=1, speed=0.5)
    rows = judged(pd.concat([rows_of(SPLIT), slow]), "calls")
    assert policy_ratios(rows).set_index(["scheduler", "step"]).ratio["random", "prefill"] == pytest.approx(0.99)
    assert ablation_study.faster_than(rows, ["table"], "random") == ["table"]
    assert ablation_study.faster_than(rows, ["random"], "hist") == ["random"]
    assert rows.groupby("name").size().eq(6).all()


def test_a_cost_comes_apart_into_its_factors():
    parts = overheads(judged(rows_of(SPLIT), "calls")).set_index(["scheduler", "part"]).ratio
    assert parts["hist"].to_dict() == pytest.approx(
        {"statistic": 1.2, "decision": 1.1, "chunk": 0.9, "all": 1.188, "unexplained": 1}
    )
    assert parts["table"].to_dict() == pytest.approx({"all": 0.95})


def test_what_the_factors_do_not_explain_is_shown():
    found = overheads(judged(rows_of(SPLIT | {("hist", "published", "prefill"): 237.6}), "calls"))
    assert found.set_index(["scheduler", "part"]).ratio["hist", "unexplained"] == pytest.approx(2)


def test_only_rows_of_the_engine_and_block_are_judged():
    both = pd.concat([rows_of(SPLIT), rows_of({(REFERENCE, "published", "prefill"): 1.0}, "graph")])
    chosen = rows_of({(REFERENCE, "published", "prefill"): 7.0}).assign(block="choose")
    kept = judged(pd.concat([both, chosen]), "calls")
    assert kept[kept.name == row_name(REFERENCE)].latency_us.tolist() == pytest.approx([50 * (1.1**2 + 1.1**3)] * 6)


def test_faster_and_beyond_need_the_whole_interval():
    rows = judged(rows_of(SPLIT), "calls")
    assert ablation_study.faster_than(rows, ["hist", "table", "not measured"], REFERENCE) == ["table"]
    assert ablation_study.faster_than(rows, ["table"], REFERENCE, margin=0.1) == []
    ratios = pd.DataFrame({"low": [0.8, 0.95, 1.2], "high": [0.99, 1.3, 1.4]})
    assert ablation_study.beyond(ratios, 0.1).index.tolist() == [2]


# ---- the client ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corey_mini():
    return load_checkpoint()


def test_the_client_generates_under_every_policy_and_is_left_as_it_was(corey_mini):
    client, tokenizer = corey_mini
    ids = client_study.prompt_ids(tokenizer, 264, 20, seed=0, device="cpu")[0].tolist()
    chosen = {name: policies()[name] for name in (REFERENCE, "hist")}
    rows = client_study.client_rows(client, ids, chosen, with_stock=True, new_tokens=2, rounds=1, seed=0)
    assert set(rows.name) == {REFERENCE, "hist", client_study.HOOK, client_study.STOCK}
    assert not client.get_input_embeddings()._forward_hooks
    without = client_study.client_rows(client, ids, chosen, with_stock=False, new_tokens=1, rounds=1, seed=0)
    assert client_study.STOCK not in set(without.name)


def test_the_passive_hook_reads_prompts_and_no_single_tokens(monkeypatch):
    seen = []
    monkeypatch.setattr(client_study, "histogram_entropy", lambda x, unit: seen.append(x.shape[1]) or torch.zeros(()))
    for tokens in (7, 1):
        client_study._embedding_entropy(None, None, torch.zeros(1, tokens, 4))
    assert seen == [7]


def test_a_prompt_has_the_length_that_was_asked_for(corey_mini):
    tokenizer = corey_mini[1]
    assert client_study.prompt_ids(tokenizer, 264, 1024, seed=0, device="cpu").shape == (1, 1024)
    with pytest.raises(ValueError, match="tokens: got 1000000"):
        client_study.prompt_ids(tokenizer, 264, 1_000_000, seed=0, device="cpu")
    drawn = client_study.prompt_ids(None, 40, 50, seed=3, device="cpu")
    assert drawn.shape == (1, 50) and drawn.max() < 40
    assert torch.equal(drawn, client_study.prompt_ids(None, 40, 50, seed=3, device="cpu"))


def test_random_models_have_one_shape(monkeypatch):
    monkeypatch.setitem(client_study.SHAPES, "tiny", TINY)
    lean, client, tokenizer = client_study.load_models("tiny", "", device="cpu", dtype=torch.float32, seed=0)
    assert tokenizer is None and lean.config == TINY
    mixer = client.backbone.layers[0].mixer
    assert len(client.backbone.layers) == TINY.n_layer
    assert (mixer.intermediate_size, mixer.time_step_rank) == (TINY.d_inner, TINY.dt_rank)
    chosen = {REFERENCE: policies()[REFERENCE]}
    rows = client_study.client_rows(client, [1, 2, 3], chosen, with_stock=False, new_tokens=2, rounds=1, seed=0)
    assert len(rows) == 2


def test_the_published_ratios_are_those_that_are_printed():
    found = client_study.published_ratios().set_index("scheduler")
    assert found.ratio["sampled-hist"] == pytest.approx(932.69 / 891.51, abs=5e-5)
    assert found.low["static-128"] < 1 < found.high["static-128"]  # cannot be told apart
    assert found.low["sampled-hist"] > 1.03
    assert pd.isna(found.low["guarded-sampled-hist"]) and found.ratio["guarded-sampled-hist"] == pytest.approx(1.013)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_the_figures_show_every_policy_once():
    latency = {key: value for key, value in SPLIT.items() if key[1] == "published"}
    latency |= {(name, "published", "prefill"): 101.0 for name in (CONTROL, "static-128", "oracle", "random")}
    ratios = policy_ratios(judged(rows_of(latency), "calls"))
    order = plots.policy_order(ratios.scheduler)
    assert order == ["static-128", CONTROL, "oracle", "table", "random", "hist"]
    prefills = ratios[ratios.step == "prefill"]
    ax = plots.plot_policy_ratios(prefills, CONTROL, order, plt.subplots()[1])
    plots.same_scale([ax], ratios)
    assert [label.get_text() for label in ax.get_yticklabels()] == order[::-1]
    marks = [line for bars in ax.containers for line in [bars.lines[0]]]
    assert sum(len(line.get_xdata()) for line in marks) == len(prefills)
    assert ax.get_xlim()[0] < prefills.ratio.min() and prefills.ratio.max() < ax.get_xlim()[1]
    plt.close("all")


def test_the_split_is_drawn_in_per_cent_beside_the_published_overheads():
    parts, published = overheads(judged(rows_of(SPLIT), "calls")), client_study.published_ratios()
    ax = plots.plot_overheads(parts, published, ["hist", "table"], plt.subplots()[1])
    marks = {bars.get_label(): bars.lines[0].get_xdata().tolist() for bars in ax.containers}
    assert marks["statistic"] == pytest.approx([20]) and marks["chunk"] == pytest.approx([-10])
    assert marks["all, measured"] == pytest.approx([18.8, -5])
    assert marks["published, of a generation"] == pytest.approx([8.83, 0.69])
    plt.close("all")
