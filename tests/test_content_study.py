"""Contents of one shape: a difference in time or in the best chunk is found where one was made, and only there."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from corey.content_study import AGAIN, content_gains, content_ratios, measure_contents
from corey.mamba import MambaConfig
from corey.mamba_weights import random_mamba
from corey.plots import regimes as plots

TINY = MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_inner=32, dt_rank=2, d_state=4)
KINDS = ["tables_csv", "repetition_policy", "random_bytes"]


def made(latency, spread=0.005, rounds=40):
    """Rows of contents whose latency by chunk is given; the rest of the contents take those of the tables."""
    noise = np.random.default_rng(0)
    return pd.DataFrame(
        {"round": i, "content": content, "chunk_size": size, "latency_us": value * np.exp(noise.normal(0, spread))}
        for i in range(rounds)
        for content in (*KINDS, AGAIN)
        for size, value in latency.get(content, latency["tables_csv"]).items()
    )


def gains(rows):
    table = content_gains(rows, KINDS)
    return {row.part if row.content == "all" else (row.content, row.part): row for row in table.itertuples()}


def test_contents_that_take_the_same_time_are_equivalent_and_have_nothing_to_choose():
    rows = made({"tables_csv": {128: 110.0, 512: 100.0}})
    ratios = content_ratios(rows, KINDS, 0.02)
    assert ratios.content.tolist() == [AGAIN, "repetition_policy", "random_bytes"]
    assert ratios.equivalent.all() and not ratios.differs.any()
    found = gains(rows)
    assert found["tables_csv", "chunk"].gain_percent == pytest.approx(10, abs=1)
    beyond, knowing = found["tables_csv", "beyond the others"], found["knowing the content"]
    assert beyond.low_percent < 0 < beyond.high_percent and abs(beyond.gain_percent) < 1
    assert abs(knowing.gain_percent) < 0.2


def test_a_content_that_is_slower_differs():
    rows = made({"tables_csv": {128: 110.0, 512: 100.0}, "random_bytes": {128: 121.0, 512: 110.0}})
    ratios = content_ratios(rows, KINDS, 0.02).set_index("content")
    assert ratios.differs.to_dict() == {AGAIN: False, "repetition_policy": False, "random_bytes": True}
    assert ratios.ratio["random_bytes"] == pytest.approx(1.1, rel=0.01)


def test_a_best_chunk_of_its_own_is_worth_knowing():
    rows = made({"tables_csv": {128: 106.0, 512: 100.0}, "random_bytes": {128: 100.0, 512: 104.0}})
    knowing = gains(rows)["knowing the content"]
    assert knowing.gain_percent == pytest.approx(1, abs=0.2) and knowing.low_percent > 0.5


def test_tables_that_gain_more_are_seen_to():
    rows = made({"tables_csv": {128: 106.0, 512: 100.0}, **{kind: {128: 101.0, 512: 100.0} for kind in KINDS[1:]}})
    beyond = gains(rows)["tables_csv", "beyond the others"]
    assert beyond.gain_percent == pytest.approx(100 * (1.06 / 1.01 - 1), abs=0.5) and beyond.low_percent > 3


def check_contents(model):
    latency, contents = measure_contents(model, KINDS, 2, 300, [128, 256, 2048], rounds=5, seed=0)
    assert set(latency.content) == {*KINDS, AGAIN} == set(contents.content)
    assert set(latency.chunk_size) == {128, 256, 384} and len(latency) == 5 * 4 * 3  # 384 is the whole prompt
    assert contents.entropy_nats.between(0, np.log(256)).all() and contents.entropy_nats.nunique() == 4


def test_every_content_is_timed_at_every_chunk():
    check_contents(random_mamba(TINY, seed=0))


@pytest.mark.gpu
def test_contents_are_timed_as_replays_on_a_gpu():
    check_contents(random_mamba(TINY, seed=0, device="cuda", dtype=torch.bfloat16))


def test_the_figures_name_every_content():
    rows = made({"tables_csv": {128: 110.0, 512: 100.0}})
    left, right = plt.subplots(1, 2)[1]
    plots.plot_contents(content_ratios(rows, KINDS, 0.02), "tables_csv", 0.02, left)
    plots.plot_gains(content_gains(rows, KINDS), "tables_csv", 6.2, right)
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "tables csv again", "repetition policy", "random bytes",
    ]  # fmt: skip
    assert [label.get_text() for label in right.get_yticklabels()][-2:] == [
        "tables csv, beyond the others", "knowing the content",
    ]  # fmt: skip
    assert right.get_xlim()[1] > 6.2
    plt.close("all")
