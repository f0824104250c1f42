"""What notebook 04 measures of a checkpoint and of random weights, and what its tables and figure say of the rows."""

import json
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest

pytest.importorskip("transformers", minversion="5.15", reason="the twin is transformers' model")
pytest.importorskip("lm_eval", reason="the prompts are lm-eval's")

from corey import equivalence_study, mamba_weights
from corey.equivalence_study import largest_deviations, measure, policy_agreement, random_subjects, twin_summary
from corey.mamba import MambaConfig
from corey.own_path import OWN_PATH
from corey.plots import equivalence as plots
from corey.policy_equivalence import chosen_policies
from corey.samples import make_row

SMALL = MambaConfig(d_model=64, n_layer=2, vocab_size=300, d_inner=128, dt_rank=4)
LIMITS = {"new_tokens": 4, "twin_rows": 1, "twin_prompt_tokens": 64}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longbench")
    for task, made in (("qasper", "article_qa"), ("gov_report", "report_summary")):
        rows = [make_row(made, seed, 1500) for seed in range(2)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return equivalence_study.rows_in_turn(folder, ["qasper", "gov_report"], 2)


def subjects(texts, device, monkeypatch, shape="small"):
    monkeypatch.setitem(mamba_weights.SHAPES, "small", SMALL)
    return random_subjects(shape, ["bfloat16", "float32"], texts, 300, seed=4, device=device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_weights_read_the_bytes_of_real_rows_in_every_dtype(texts, device, monkeypatch):
    assert [task for task, _ in texts] == ["qasper", "gov_report"] * 2
    policies = chosen_policies([128, 256], ["hist", "device-hist", "device-hist on the way"], device_type=device)
    tables = [measure(subject, policies, **LIMITS) for subject in subjects(texts, device, monkeypatch)]
    by_policy, by_twin = (pd.concat(each, ignore_index=True) for each in zip(*tables))
    assert len(by_policy) == 2 * 4 * len(policies) and len(by_twin) == 2 * 1 * 2
    assert set(by_policy.prompt_tokens) == {300} and set(by_twin.prompt_tokens) == {64}
    assert by_policy.logits_bitwise_equal.all() and by_policy.tokens_equal.all()
    every = largest_deviations(by_policy)
    assert every.dtype.tolist() == ["bfloat16", "float32"] and (every.prompts == 4).all()
    assert (every.logit_max_abs_diff == 0).all() and (every.perplexity_ratio_deviation == 0).all()
    assert every.score_delta_points.isna().all()  # metrics of random weights are not taken
    twins = twin_summary(by_twin).set_index("dtype")
    assert 0 < twins.logit_max_abs_diff["float32"] < 1e-4 < twins.logit_max_abs_diff["bfloat16"]


def test_no_shape_is_no_subject(texts, monkeypatch):
    assert list(subjects(texts, "cpu", monkeypatch, shape="")) == []


def policy_rows(equal, score):
    common = {"protocol": "official", "task": "qasper", "nll_tokens": 10, "logit_max_abs_diff": 0.0}
    for index, (same, points) in enumerate(zip(equal, score)):
        told = {"row_id": f"r{index}", "model": "m", "dtype": "float32", **common}
        yield told | {
            "side": "passive",
            "logits_bitwise_equal": True,
            "tokens_equal": True,
            "nll_nats": 20.0,
            "score": 1.0,
        }
        yield told | {
            "side": "hist", "logits_bitwise_equal": same, "tokens_equal": same, "nll_nats": 20.0 + (not same),
            "score": points, "logit_max_abs_diff": 0.0 if same else 0.5,
        }  # fmt: skip


def twin_rows(firsts):
    for index, first in enumerate(firsts):
        told = {"row_id": f"r{index}", "protocol": "official", "task": "qasper", "model": "m", "dtype": "float32"}
        told |= {"prompt_tokens": 9, "nll_tokens": 8, "nll_nats": 16.0, "argmax_agreement": 1.0, "new_tokens": 64}
        yield told | {"side": "passive", "logit_max_abs_diff": 0.0, "tokens_equal": True}
        yield told | {
            "side": OWN_PATH, "logit_max_abs_diff": 1e-3 * (index + 1), "tokens_equal": first is None,
            "token_first_divergence": first, "top2_gap": None if first is None else 1e-4 * first,
        }  # fmt: skip


def test_the_tables_say_what_the_rows_say():
    found = largest_deviations(pd.DataFrame(policy_rows([True, False, True], [1.0, 0.75, 1.0]))).iloc[0]
    assert (found.prompts, found.logit_max_abs_diff, found.score_delta_points) == (3, 0.5, 25.0)
    assert found.perplexity_ratio_deviation == pytest.approx(math.exp(0.1) - 1)
    twin = twin_summary(pd.DataFrame(twin_rows([None, 40, 7]))).iloc[0]
    assert (twin.prompts, twin.parted, twin.earliest, twin.tokens) == (3, 2, 7, 9)
    assert (twin.logit_max_abs_diff, twin.top2_gap_max) == pytest.approx((3e-3, 4e-3))
    assert twin.perplexity_ratio == 1


def test_the_figure_shows_each_policy_and_every_prompt_of_the_twin():
    agreement = policy_agreement(pd.DataFrame(policy_rows([True, False, True, True], [1.0] * 4)))
    twins = pd.DataFrame(twin_rows([None, 40, 7]))
    fig = plots.draw_policies(agreement, twins[twins.side == OWN_PATH])
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["hist"]
    assert fig.axes[0].containers[0].lines[0].get_xdata() == [0.75]
    assert sorted(fig.axes[2].lines[0].get_ydata()) == [7, 40, 64]
    assert fig.axes[2].get_yticklabels()[-1].get_text() == "never"
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["m, float32 (4 prompts)"]
    plt.close(fig)
