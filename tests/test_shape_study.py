"""The map of best chunks: ties are called ties, and the scan's own rule is judged beside them."""

import numpy as np
import pandas as pd
import pytest
import torch

from corey.shape_study import best_chunks, chunk_table, layer_inputs, parse_width, shape_rows


def timed(latency, spread=0.01, rounds=40):
    noise = np.exp(np.random.default_rng(0).normal(0, spread, (rounds, len(latency))))
    return pd.DataFrame(
        {"round": i, "order": 0, "name": str(size), "latency_us": value * factor}
        for i, factors in enumerate(noise)
        for (size, value), factor in zip(latency.items(), factors)
    )


def test_a_chunk_is_tied_unless_it_is_slower_beyond_doubt():
    latency = {128: 130.0, 256: 100.0, 512: 101.0, None: 110.0}
    rows = pd.DataFrame(chunk_table(timed(latency), list(latency))).set_index("chunk_size")
    assert rows.tied.tolist() == [False, True, True, False] and rows.ratio[256.0] == 1
    assert rows.ratio.iloc[0] == pytest.approx(1.3, rel=0.02) and (rows.n == 40).all()
    noisy = pd.DataFrame(chunk_table(timed(latency, spread=0.5), list(latency)))
    assert noisy.tied[0]  # the same difference is no longer beyond doubt


def test_the_map_names_the_fastest_the_ties_and_what_the_rule_costs():
    latency = {128: 130.0, 256: 100.0, 512: 101.0, None: 110.0}
    rows = pd.DataFrame(
        {"batch": 1, "d_inner": 64, "seqlen": 512} | row for row in chunk_table(timed(latency), list(latency))
    )
    best = best_chunks(rows.astype({"chunk_size": "Int64"})).iloc[0]
    assert (best.best_chunk, best.first_tied, best.last_tied) == (256, 256, 512)
    assert best.spread == pytest.approx(1.3, rel=0.02) and best.rule_ratio == pytest.approx(1.1, rel=0.02)
    assert best.rule_low <= best.rule_ratio <= best.rule_high


def shapes(device, dtype=torch.float32):
    sizes = {"d_state": 4, "rounds": 5, "seed": 0, "dtype": dtype, "device": device}
    return shape_rows(["1 x 8", "2x8"], [200, 512], [128, 256, 512], **sizes)


def check_shapes(rows):
    given = rows[rows.chunk_size.notna()].groupby(["batch", "seqlen"]).chunk_size.apply(list)
    assert given[2, 200] == [128, 256] and given[1, 512] == [128, 256, 512]  # the last holds the whole sequence
    assert rows.chunk_size.isna().sum() == 4 and len(best_chunks(rows)) == 4


def test_every_shape_has_every_chunk_below_its_length_the_whole_and_the_rule():
    check_shapes(shapes("cpu"))


@pytest.mark.gpu
def test_the_map_is_drawn_on_a_gpu():
    check_shapes(shapes("cuda", torch.bfloat16))


def test_the_layer_has_all_that_a_mamba_layer_gives_the_scan():
    inputs = layer_inputs(2, 8, 30, 4, seed=0, dtype=torch.bfloat16, device="cpu")
    assert inputs["u"].shape == inputs["z"].shape == (2, 8, 30) and inputs["B"].shape == (2, 4, 30)
    assert inputs["B"].dtype == torch.bfloat16 and inputs["A"].dtype == torch.float32 and (inputs["A"] < 0).all()


def test_a_width_is_batch_by_channels():
    assert parse_width("8 x 2048") == (8, 2048) and parse_width("1x64") == (1, 64)
    for wrong in ("2048", "x 2", "8 x", "a x b"):
        with pytest.raises(ValueError, match="width: got"):
            parse_width(wrong)
