"""The lean model under every policy, and beside transformers' own path: equality is measured, and a fault is seen."""

import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", minversion="5.15", reason="the twin is transformers' model")
pytest.importorskip("lm_eval", reason="the prompts are lm-eval's")

import corey.mamba
from corey import policy_equivalence, side_summary
from corey.generation import best_two
from corey.longbench import TASKS, load_rows, official
from corey.mamba import MambaConfig
from corey.mamba_session import Session
from corey.mamba_weights import load_mamba, random_mamba
from corey.own_path import OWN_PATH, own_path_rows, transformers_twin
from corey.policy_equivalence import ON_THE_WAY, PASSIVE, chosen_policies, decode, made_prompts, policy_rows
from corey.training import byte_tokenizer

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SMALL = MambaConfig(d_model=64, n_layer=3, vocab_size=300, d_inner=128, dt_rank=4)
NAMES = ["hist", "sampled-hist", "device-hist", ON_THE_WAY, "guarded-sampled-hist", "table", "shape", "random"]
ROWS = made_prompts(6)
LIMITS = {"protocol": official(), "max_prompt_tokens": 500, "new_tokens": 8}


def measured(model, rows=ROWS, policies=None, **changes):
    policies = policies or chosen_policies([128, 256], NAMES, device_type=model.device.type)
    return pd.DataFrame(policy_rows(model, byte_tokenizer(), rows, policies, **LIMITS | changes))


def test_the_made_prompts_begin_with_the_committed_ones_and_go_on():
    prompts = made_prompts(81)
    for task in TASKS:
        assert [row for each, row in prompts[:80] if each == task] == load_rows("made", task)
    assert len({row["_id"] for _, row in prompts}) == len(prompts) == 81


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_no_policy_changes_a_bit(dtype, device, monkeypatch):
    monkeypatch.setattr(policy_equivalence, "GROUP", 4)  # two groups, the second not full
    model = random_mamba(SMALL, seed=1, device=device, dtype=dtype)
    rows = measured(model)
    assert len(rows) == len(ROWS) * (3 + len(NAMES))
    assert rows.logits_bitwise_equal.all() and rows.state_bitwise_equal.all() and rows.tokens_equal.all()
    assert (rows.new_tokens == 8).all() and (rows.nll_tokens == rows.prompt_tokens - 1).all()
    chunks = rows.groupby("side").distinct_chunks.agg(set)
    assert chunks["static-256"] == {"256"} and chunks[PASSIVE] == {""}
    assert chunks["random"] != {"128"}
    assert (side_summary.perplexities(rows).ratio == 1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_scan_that_depends_on_its_chunk_is_seen_where_it_is_used(device, monkeypatch):
    scan = corey.mamba.selective_scan

    def faulty(u, *args, chunk_size=None, **kwargs):
        y, state = scan(u, *args, chunk_size=chunk_size, **kwargs)
        if isinstance(chunk_size, int) and chunk_size == 256:
            y[..., 300] *= 1.001
            state = state * 1.001
        return y, state

    monkeypatch.setattr(corey.mamba, "selective_scan", faulty)
    model = random_mamba(SMALL, seed=1, device=device)
    policies = chosen_policies([128, 256], [], device_type=device)
    rows = measured(model, policies=policies).set_index("side")
    assert rows.logits_bitwise_equal.groupby("side").all().to_dict() == {
        PASSIVE: True,
        "static-128": True,
        "static-256": False,
    }
    assert not rows.state_bitwise_equal["static-256"].any()
    assert set(rows.logit_first_divergence["static-256"]) == {300}
    assert (rows.logit_max_abs_diff["static-256"] > 0).all()


def test_tokens_are_decoded_from_the_state_that_each_policy_left(monkeypatch):
    scan = corey.mamba.selective_scan

    def forgets(*args, chunk_size=None, **kwargs):  # right outputs, wrong state: only decoding can tell
        y, state = scan(*args, chunk_size=chunk_size, **kwargs)
        return y, torch.full_like(state, 3.0) if chunk_size == 128 else state

    monkeypatch.setattr(corey.mamba, "selective_scan", forgets)
    rows = measured(random_mamba(SMALL, seed=1), policies=chosen_policies([128, 256], [], device_type="cpu"))
    wrong = rows[rows.side == "static-128"]
    assert wrong.logits_bitwise_equal.all() and not wrong.state_bitwise_equal.any()
    assert not wrong.tokens_equal.any() and (wrong.token_first_divergence >= 1).all() and (wrong.top2_gap > 0).all()
    assert rows[rows.side == "static-256"].tokens_equal.all()


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_a_batch_is_decoding_its_rows(device):
    model, ids = (
        random_mamba(SMALL, seed=2, device=device),
        torch.randint(300, (3, 140), generator=torch.Generator().manual_seed(0)),
    )
    state = model.new_state(3)
    with torch.inference_mode():
        logits = model(ids.to(device), state)[:, -1]
    made = decode(model, state, logits, 6)
    assert [list(each.tokens) for each in made] == Session(model, 3).generate(ids.to(device), 6)
    assert all(gap > 0 for each in made for gap in each.top2_gaps)


def test_ties_show_as_gaps_of_zero_and_fall_to_the_first():
    token, gap = best_two(torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 0.5, 1.0, -1.0]], dtype=torch.bfloat16))
    assert (token.tolist(), gap.tolist()) == ([1, 0], [0.0, 2.0])


def test_metrics_are_those_of_the_answer_up_to_its_end():
    model = load_mamba()
    policies = chosen_policies([128], ["hist"], device_type="cpu")
    rows = measured(model, rows=ROWS[:2], policies=policies, max_prompt_tokens=4096, new_tokens=64)
    assert (rows.score > 0.99).all()  # corey-mini knows these answers, and 64 tokens go on after them
    assert side_summary.score_deltas(rows).max_abs.max() == 0
    assert "score" not in measured(model, rows=ROWS[:1], policies=policies, scored=False)


@pytest.mark.parametrize("device", DEVICES)
def test_the_twin_computes_what_the_lean_model_computes(device):
    model = random_mamba(SMALL, seed=3, device=device)
    twin = transformers_twin(model)
    assert twin.backbone.layers[0].mixer.in_proj.weight.data_ptr() == model.layers[0].in_proj.data_ptr()
    rows = pd.DataFrame(own_path_rows(model, twin, byte_tokenizer(), ROWS[:3], **LIMITS))
    own = rows[rows.side == OWN_PATH]
    assert not own.logits_bitwise_equal.any()  # another order of sums
    assert own.logit_max_abs_diff.max() < 1e-5 and own.tokens_equal.all()
    assert rows[rows.side == PASSIVE].logits_bitwise_equal.all()
    assert side_summary.perplexities(rows).ratio.sub(1).abs().max() < 1e-6


def test_in_half_precision_the_recurrence_of_the_twin_keeps_float32_weights():
    model = random_mamba(SMALL, seed=3, dtype=torch.bfloat16)
    mixer = transformers_twin(model).backbone.layers[0].mixer
    assert {name: getattr(mixer, name).dtype for name in ("A_log", "D")} == dict.fromkeys(("A_log", "D"), torch.float32)
    assert mixer.dt_proj.bias.dtype == torch.float32 and mixer.in_proj.weight.dtype == torch.bfloat16
    own = pd.DataFrame(own_path_rows(model, transformers_twin(model), byte_tokenizer(), ROWS[:1], **LIMITS)).iloc[1]
    assert 0 < own.logit_max_abs_diff < 0.5


@pytest.mark.parametrize(
    "call, name",
    [
        pytest.param(lambda m: measured(m, policies={"hist": len}), "policies", id="no_passive"),
        pytest.param(lambda m: measured(m, new_tokens=0), "new_tokens", id="no_token"),
        pytest.param(lambda m: chosen_policies([128], ["fast"], device_type="cpu"), "names", id="policy"),
        pytest.param(lambda m: made_prompts(0), "count", id="no_prompt"),
        pytest.param(lambda m: made_prompts(2.0), "count", id="half_a_prompt"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, name):
    with pytest.raises((TypeError, ValueError), match=name):
        call(random_mamba(SMALL))
