"""One prompt through several scans of one model, and what the rows are summed up to."""

import math

import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", minversion="5.15", reason="the sides run a transformers model")
pytest.importorskip("lm_eval", reason="the scores are lm-eval's")

from transformers import MambaConfig, MambaForCausalLM

from corey import side_summary
from corey.generation import greedy_tokens
from corey.longbench import official, published
from corey.routing import pytorch_on_cpu, route
from corey.side_by_side import Side, compare_sides, run_side, state_dropping_scan
from corey.training import byte_tokenizer

ROW = {"input": "Where is it?", "context": "It is in the mill. " * 30, "answers": ["the mill"], "_id": "r1"}
LIMITS = {"protocol": official(), "max_prompt_tokens": 100, "max_new_tokens": 1}
PASSIVE = Side("passive")
SIDES = [
    PASSIVE,
    Side("routed", lambda u, layer: 128 * (1 + layer)),
    Side("fixed", 256, answers=False),
    Side("transformers", scan=None),
    Side("dropped", 128, state_dropping_scan),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=264, hidden_size=32, state_size=8, num_hidden_layers=2, eos_token_id=256)
    model = MambaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # a long memory
            parameter.data -= 5
    return model


@pytest.fixture(scope="module")
def rows(model):
    arguments = {"max_prompt_tokens": 400, "max_new_tokens": 6}
    measured = []
    for protocol in (official(), published()):
        for row_id in ("r1", "r2"):
            row = {**ROW, "_id": row_id, "input": f"Where is {row_id}?"}
            measured += compare_sides(model, byte_tokenizer(), "qasper", row, SIDES, protocol=protocol, **arguments)
    return pd.DataFrame(measured)


def test_each_side_gives_one_row_a_prompt_with_its_chunks(rows):
    assert list(rows.side) == [side.name for side in SIDES] * 4
    chunks = rows.groupby("side").chunks.agg(set).to_dict()
    assert chunks == {
        "passive": {"None None"},
        "routed": {"128 256"},
        "fixed": {"256 256"},
        "transformers": {""},
        "dropped": {"128 128"},
    }
    assert set(rows[rows.protocol == "official"].prompt_tokens) == {400}
    assert rows.truncated.all()


def test_routed_sides_are_equal_and_the_others_are_not(rows):
    by_side = rows.groupby("side")
    assert by_side.logits_bitwise_equal.all().to_dict() == {
        "passive": True,
        "routed": True,
        "fixed": True,
        "transformers": False,
        "dropped": False,
    }
    assert by_side.logit_max_abs_diff.max()["transformers"] < 1e-4 < by_side.logit_max_abs_diff.min()["dropped"]
    # the first tile has no earlier state to drop
    assert set(rows[rows.side == "dropped"].logit_first_divergence) == {128}
    assert rows[rows.side == "routed"].tokens_equal.all()
    assert rows[rows.side == "fixed"].tokens_equal.isna().all()


def test_perplexity_is_that_of_the_whole_text_in_one_forward(model):
    prompt, reference = [int(i) for i in torch.randint(0, 256, (300,))], list(b" the mill")
    run = run_side(model, prompt, reference, PASSIVE, max_new_tokens=5, eos_token_id=None)
    with pytorch_on_cpu(), torch.inference_mode():
        loss = model(torch.tensor([prompt + reference]), labels=torch.tensor([prompt + reference])).loss.item()
    assert run.nll_tokens == 308
    assert run.nll_nats / run.nll_tokens == pytest.approx(loss, rel=1e-6)
    # scoring the reference did not advance the cache that decoding starts from
    with route(model):
        assert run.generation == greedy_tokens(model, prompt, max_new_tokens=5, eos_token_id=None)


def test_the_summaries_count_what_the_rows_say(rows):
    agreement = side_summary.agreement(rows).set_index(["side", "measure"])
    assert agreement.loc[("routed", "logits_bitwise_equal"), ["value", "n"]].tolist() == [1.0, 4]
    assert agreement.loc[("dropped", "logits_bitwise_equal"), "value"] == 0.0
    assert ("fixed", "tokens_equal") not in agreement.index
    assert "passive" not in agreement.index.get_level_values("side")
    perplexities = side_summary.perplexities(rows).set_index(["protocol", "side"])
    assert perplexities.loc[("official", "routed"), "max_ratio_deviation"] == 0.0
    assert perplexities.loc[("official", "dropped"), "max_ratio_deviation"] > 0.0
    assert ("official", "transformers") not in perplexities.index
    passive = rows[(rows.side == "passive") & (rows.protocol == "official")]
    expected = math.exp(passive.nll_nats.sum() / passive.nll_tokens.sum())
    assert perplexities.loc[("official", "passive"), "perplexity"] == pytest.approx(expected)


def test_score_deltas_pair_the_prompts_and_keep_the_largest():
    frame = pd.DataFrame(
        [
            {"protocol": "official", "task": task, "row_id": row, "side": side, "score": score}
            for side, values in {"passive": (0.5, 1.0, 0.2), "routed": (0.5, 0.9, 0.4)}.items()
            for task, row, score in zip(("qasper", "qasper", "gov_report"), "abc", values)
        ]
    ).sample(frac=1, random_state=0)
    frame = pd.concat([frame[frame.side == "passive"], frame[frame.side == "routed"]])
    deltas = side_summary.score_deltas(frame).set_index("task")
    assert deltas.loc["qasper", ["value", "max_abs", "n"]].tolist() == pytest.approx([-5, 10, 2])
    assert deltas.loc["all", ["value", "max_abs", "n"]].tolist() == pytest.approx([10 / 3, 20, 3])
    scores = side_summary.scores(frame).set_index(["side", "task"])
    assert scores.loc[("passive", "all"), "value"] == pytest.approx(100 * 1.7 / 3)


@pytest.mark.parametrize(
    "call, name",
    [
        pytest.param(lambda m: compare_sides(m, byte_tokenizer(), "qasper", ROW, [], **LIMITS), "sides", id="no_side"),
        pytest.param(
            lambda m: compare_sides(m, byte_tokenizer(), "qasper", ROW, [SIDES[2]], **LIMITS), "sides", id="no_decoding"
        ),
        pytest.param(
            lambda m: run_side(m, [1], [2], "passive", max_new_tokens=1, eos_token_id=None), "side", id="side_name"
        ),
        pytest.param(
            lambda m: run_side(m, [1], [], PASSIVE, max_new_tokens=1, eos_token_id=None),
            "reference_ids",
            id="reference",
        ),
        pytest.param(
            lambda m: run_side(m, [], [2], PASSIVE, max_new_tokens=1, eos_token_id=None), "token_ids", id="empty_prompt"
        ),
        pytest.param(
            lambda m: run_side(m, [264], [2], PASSIVE, max_new_tokens=1, eos_token_id=None),
            "token_ids",
            id="vocabulary",
        ),
        pytest.param(
            lambda m: run_side(m, [1], [2], PASSIVE, max_new_tokens=0, eos_token_id=None), "max_new_tokens", id="no_new"
        ),
        pytest.param(lambda m: side_summary.agreement([]), "rows", id="rows_list"),
        pytest.param(lambda m: side_summary.scores(pd.DataFrame({"side": ["a"]})), "rows", id="columns"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, name, model):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got"):
        call(model)
