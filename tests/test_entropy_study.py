"""The rows of notebook 01: published bin table, prefixes of a causal model, and the summaries over them."""

import math

import pandas as pd
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from corey.activations import capture_activations
from corey.entropy import histogram_entropy
from corey.entropy_study import (
    bin_rows,
    dominant_share,
    draw,
    mean_rows,
    outlier_rows,
    prompt_rows,
    prompts,
    sample_count_rows,
    spread_between,
)
from corey.training import byte_tokenizer


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4, conv_kernel=4, expand=2)
    return MambaForCausalLM(config).eval(), byte_tokenizer()


def test_the_bin_table_comes_back():
    rows = bin_rows({"normal": draw("normal", 1_000_000, 20260417)}, [16, 256, 2048]).set_index("num_bins")
    assert rows.share_of_ceiling.tolist() == pytest.approx([0.707, 0.851, 0.892], abs=4e-3)
    assert rows.chunk_log_k.tolist() == [512, 512, 512] and rows.chunk_legacy.tolist() == [128, 256, 512]


def test_every_prefix_of_a_prompt_has_the_entropy_of_a_prompt_cut_there(small):
    model, tokenizer = small
    rows = prompt_rows(model, tokenizer, "made", rows_per_task=1, max_tokens=90, prefixes=[40, 200])
    assert sorted(rows.tokens.unique()) == [40, 90] and rows[rows.whole].tokens.unique() == [90]
    assert len(rows) == 4 * 2 * 3  # tasks, lengths, embedding and two layers
    task, _, ids = next(prompts(tokenizer, "made", rows_per_task=1, max_tokens=90))
    short = capture_activations(model, ids[:, :40])
    row = rows[(rows.task == task) & (rows.tokens == 40)].set_index(["signal", "layer"])
    assert row.entropy_nats["scan input", 1] == pytest.approx(float(histogram_entropy(short.u[1])), abs=2e-3)
    assert row.entropy_nats["embedding", -1] == pytest.approx(float(histogram_entropy(short.embeddings)), abs=1e-6)
    assert (rows.entropy_bits * math.log(2) - rows.entropy_nats).abs().max() < 1e-12
    assert set(rows.chunk_routed) <= {128, 256, 512}


def test_the_bias_rows_hold_both_ranges_on_the_same_samples():
    rows = sample_count_rows([100, 1000], draws=3, seed=5)
    assert len(rows) == 2 * 2 * 3 * 2
    own = rows[(rows["range"] == "own") & (rows.distribution == "normal") & (rows.num_values == 1000)]
    assert own.entropy_nats.iloc[2] == float(histogram_entropy(draw("normal", 1000, 7)))


def test_an_outlier_replaces_one_value_and_none_is_moved_at_zero():
    rows = outlier_rows([0.0, 32.0], num_values=1000, draws=2, seed=1)
    plain = rows[(rows["range"] == "own") & (rows.outlier_deviations == 0)].entropy_nats
    assert plain.iloc[0] == float(histogram_entropy(draw("normal", 1000, 1)))
    assert rows[(rows["range"] == "own") & (rows.outlier_deviations == 32)].entropy_nats.max() < plain.min() - 1


def test_the_summaries_are_what_they_say():
    table = pd.DataFrame(
        {"group": ["a", "a", "b", "b"], "value": [1.0, 3.0, 11.0, 13.0], "chunk": [128, 128, 128, 256]}
    )
    means = mean_rows(table, ["group"], "value").set_index("group")
    assert means["mean"].tolist() == [2.0, 12.0] and (means.low <= means["mean"]).all()
    assert dominant_share(table.chunk) == 0.75
    assert spread_between(table.value, table.group) == pytest.approx(100 / 104)
    with pytest.raises(ValueError, match=r"^distribution: got"):
        draw("cauchy", 10, 0)


@pytest.mark.gpu
def test_a_gpu_reads_the_entropies_that_a_cpu_reads(small):
    model, tokenizer = small
    options = {"rows_per_task": 1, "max_tokens": 300, "prefixes": [128]}
    cpu = prompt_rows(model, tokenizer, "made", **options)
    try:
        gpu = prompt_rows(model.cuda(), tokenizer, "made", **options, device="cuda")
    finally:
        model.cpu()
    assert (cpu.entropy_nats - gpu.entropy_nats).abs().max() < 5e-3  # values near an edge may change their bin
    assert cpu.drop(columns=["entropy_nats", "entropy_bits"]).equals(gpu.drop(columns=["entropy_nats", "entropy_bits"]))


@pytest.mark.gpu
def test_a_gpu_bins_the_synthetic_draws_as_a_cpu_does():
    for measure in (
        lambda device: sample_count_rows([1000, 20_000], draws=2, seed=5, device=device),
        lambda device: outlier_rows([0.0, 32.0], num_values=1000, draws=2, seed=1, device=device),
        lambda device: bin_rows({"normal": draw("normal", 50_000, 0).to(device)}, [16, 2048]),
    ):
        assert (measure("cpu").entropy_nats - measure("cuda").entropy_nats).abs().max() < 1e-3
