"""Tier 1: the published tables to their printed digits, and what is left of them without method names."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from corey.cost_model import (
    METHODS,
    PUBLISHED_CHAINS,
    SEQLENS,
    Layer,
    Limits,
    Operator,
    Weights,
    estimate,
    fixed_groups,
    greedy_groups,
    grid_rows,
    launch_counts,
    method_rows,
    published_cases,
    published_draws,
    published_limits,
    score,
    threshold_rows,
    tile_rows,
    tile_size,
)
from corey.published import read_published

# Published means are taken over values already rounded to four digits, so the last digit may differ by one.
FOUR_DIGITS = 1.01e-4
TWO_DIGITS = 0.51e-2


@pytest.fixture(scope="module")
def cases():
    return published_cases(seed=7)


@pytest.fixture(scope="module")
def methods(cases):
    return pd.DataFrame(method_rows(cases))


@pytest.fixture(scope="module")
def nameless(cases):
    return pd.DataFrame(method_rows(cases, name_terms=False))


def fp16_means(rows, column="latency_ms"):
    return rows[rows.precision == "fp16"].groupby(["bucket", "method"])[column].mean().unstack()


def assert_agrees(rows, published, keys, columns, tolerance):
    """Every published cell against the mean of our rows with the same keys."""
    means = rows.groupby(keys)[columns].mean()
    expected = published.set_index(keys)[columns]
    assert len(expected) > 0
    found = means.loc[expected.index]
    assert ((found - expected).abs() <= tolerance).all(axis=None), (found - expected).abs().max()


def test_draws_come_in_length_then_repeat_order_from_one_stream():
    draws = published_draws()
    first, second = next(draws), next(draws)
    assert (first.seqlen, first.repeat, second.seqlen, second.repeat) == (1024, 0, 1024, 1)
    assert first.activations.shape == (512, 192)
    assert first.weight.shape == (256, 192)
    rng = np.random.default_rng(7)
    gaussian, tails = rng.standard_normal((512, 192)), rng.standard_t(3, size=(512, 192))
    np.testing.assert_allclose(first.activations, gaussian + 0.525 * tails, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(first.weight, rng.standard_normal((256, 192)))


def test_draws_refuse_a_seed_that_is_no_count_before_drawing():
    with pytest.raises(ValueError, match="seed: got -1, want"):
        published_draws(-1)
    with pytest.raises(TypeError, match="seed: got float"):
        published_draws(7.0)


def test_the_first_draw_gives_the_published_statistics(cases):
    first, layer = cases[0], cases[0].layer
    assert (first.seqlen, first.repeat) == (1024, 0)
    assert round(layer.entropy_gain, 4) == 0.3344
    assert (round(first.entropy_before_average, 4), round(layer.entropy_after, 4)) == (0.4503, 0.5005)
    assert (round(layer.outliers_before, 6), layer.outliers_after) == (0.000641, 0.0)


def test_the_first_draw_gives_the_published_latencies_and_groups(cases, methods):
    first = methods[(methods.seqlen == 1024) & (methods.repeat == 0) & (methods.precision == "fp16")]
    latency = first.set_index("method").latency_ms.round(4).to_dict()
    assert latency == {
        "none": 48.0064,
        "static": 39.1462,
        "ours": 35.3590,
        "arithmetic": 47.1664,
        "matched": 36.3380,
    }
    threshold, _ = cases[0].plans["matched"]
    assert threshold == 0.25
    ours = greedy_groups(cases[0].chain, cases[0].limits)
    assert [len(group) for group in ours] == [3, 4]
    assert [round(score(group, cases[0].chain), 4) for group in ours] == [0.7964, 1.0356]


@pytest.mark.parametrize("length_index", range(7), ids=[f"L{seqlen}" for seqlen in SEQLENS])
def test_entropy_gain_per_length_matches_the_published_mean(cases, length_index):
    gains = [case.layer.entropy_gain for case in cases if case.seqlen == SEQLENS[length_index]]
    published = [0.3837, 0.3860, 0.4037, 0.4016, 0.4474, 0.4377, 0.4664][length_index]
    assert len(gains) == 5
    assert round(float(np.mean(gains)), 4) == pytest.approx(published, abs=FOUR_DIGITS)


def test_bucket_table_matches_in_all_precisions_and_columns(methods):
    published = read_published("tier1_buckets")
    columns = [name for name in published if name not in ("bucket", "precision", "method", "source")]
    assert len(published) == 36 and len(columns) == 8
    assert_agrees(methods, published, ["bucket", "precision", "method"], columns, FOUR_DIGITS)


def test_threshold_sweep_matches(cases):
    rows = pd.DataFrame(threshold_rows(cases, (0.45, 0.52, 0.60)))
    fp16 = rows[rows.precision == "fp16"]
    assert_agrees(fp16, read_published("tier1_thresholds"), ["tau", "bucket"], ["latency_ms", "mean_depth"], TWO_DIGITS)
    over_draws = rows[rows.precision == "w4a8"].groupby(["tau", "bucket"])[
        ["latency_ms", "mean_depth", "quality_proxy"]
    ]
    over_buckets = over_draws.mean().reset_index()
    published = read_published("tier1_tau_w4a8")
    assert_agrees(over_buckets, published, ["tau"], ["latency_ms", "mean_depth"], TWO_DIGITS)
    assert_agrees(over_buckets, published, ["tau"], ["quality_proxy"], FOUR_DIGITS)


def test_weight_grid_matches_and_the_default_cell_is_best_in_one_bucket_of_four(cases):
    rows = pd.DataFrame(grid_rows(cases))
    assert_agrees(
        rows, read_published("tier1_grid"), ["alpha", "beta", "bucket"], ["latency_ms", "mean_depth"], TWO_DIGITS
    )
    latency = rows.groupby(["bucket", "alpha", "beta"]).latency_ms.mean()
    best = latency.groupby("bucket").min()
    default = latency.xs((0.45, 0.35), level=("alpha", "beta"))
    assert (default <= best + 1e-9).sum() == 1


def test_ablations_match(cases, methods):
    published = read_published("tier1_ablations").set_index("bucket")
    latency = fp16_means(methods).loc[published.index]
    for column, found, tolerance in (
        ("ours_ms", latency.ours, TWO_DIGITS),
        ("arithmetic_ms", latency.arithmetic, TWO_DIGITS),
        ("arithmetic_minus_ours_ms", latency.arithmetic - latency.ours, TWO_DIGITS),
        ("matched_ms", latency.matched, TWO_DIGITS),
        ("matched_minus_ours_ms", latency.matched - latency.ours, 6e-4),
        ("matched_tau", fp16_means(methods, "tau").matched, 1e-9),
        ("matched_quality_proxy", fp16_means(methods, "quality_proxy").matched, FOUR_DIGITS),
    ):
        assert (found - published[column]).abs().max() <= tolerance, column


def test_tile_trace_matches(cases):
    rows = pd.DataFrame(tile_rows(cases))
    published = read_published("tier1_tiles").set_index(["bucket", "method"])
    groups = rows.groupby(["bucket", "method"])
    tiles = groups.tiles.sum()
    found = pd.DataFrame(
        {
            "group_latency_ms": groups.group_latency_ms.mean(),
            "tile_tokens": (rows.tile_tokens * rows.tiles).groupby([rows.bucket, rows.method]).sum() / tiles,
            "tile_latency_ms": groups.group_latency_ms.sum() / tiles,
        }
    ).loc[published.index]
    for column, tolerance in (("group_latency_ms", 6e-4), ("tile_tokens", 0.051), ("tile_latency_ms", 6e-4)):
        wanted = published[column].dropna()
        assert len(wanted) >= 8
        assert (found[column] - wanted).abs().max() <= tolerance, column


def test_launch_sweep_matches_and_loses_to_static_fusion_on_long_chains():
    rows = pd.DataFrame([launch_counts(*chain) for chain in PUBLISHED_CHAINS])
    published = read_published("fused_kernel_launches").drop(columns="source")
    merged = rows.merge(published, on=list(rows.columns))
    assert len(merged) == len(published) == len(rows) == 11
    long_chains = rows[rows.num_operators >= 32]
    assert (long_chains.launches_ours > long_chains.launches_static).all()


def test_without_names_the_gain_over_depth_matched_arithmetic_is_gone(methods, nameless):
    named = fp16_means(methods)
    assert (named.matched - named.ours).min() > 1.1
    plain = fp16_means(nameless)
    assert (plain.matched - plain.ours).max() < 1e-9


def test_without_names_equal_groups_cost_the_same(cases, nameless):
    fp16 = nameless[nameless.precision == "fp16"].pivot(index=["seqlen", "repeat"], columns="method")
    same = fp16["depths"].ours == fp16["depths"].matched
    assert (len(cases), int(same.sum())) == (35, 31)
    latency = fp16["latency_ms"]
    np.testing.assert_array_equal(latency.ours[same], latency.matched[same])
    assert (latency.ours[~same] > latency.matched[~same]).all()


@pytest.mark.parametrize("seed", [12, 13])
def test_without_names_entropy_wins_only_where_arithmetic_fuses_less(seed):
    rows = pd.DataFrame(method_rows(published_cases(seed), name_terms=False))
    fp16 = rows[rows.precision == "fp16"].pivot(index=["seqlen", "repeat"], columns="method")
    wins = fp16.latency_ms.ours < fp16.latency_ms.matched - 1e-9
    assert wins.any()
    np.testing.assert_array_equal(wins, fp16.mean_depth.matched < fp16.mean_depth.ours)


@pytest.mark.parametrize("method", METHODS)
def test_without_names_the_name_changes_nothing(cases, method):
    groups = cases[7].plans["ours"][1]
    reference = estimate(groups, cases[7].layer, "ours", "w4a8", name_terms=False)
    assert estimate(groups, cases[7].layer, method, "w4a8", name_terms=False) == reference


def test_with_names_ours_is_faster_than_anything_on_the_same_groups(cases):
    groups = cases[7].plans["ours"][1]
    latency = {method: estimate(groups, cases[7].layer, method)["latency_ms"] for method in METHODS}
    assert all(latency["ours"] < value for method, value in latency.items() if method != "ours")
    assert latency["arithmetic"] == latency["matched"]


def test_static_groups_shrink_where_they_do_not_fit():
    chain = tuple(Operator(f"op{i}", 0.5, 1.0, 1.0, registers, 1, 0.9) for i, registers in enumerate([5, 5, 5, 9, 2]))
    groups = fixed_groups(chain, Limits(registers=11, shared_memory=99, occupancy=0.5))
    assert [[op.name for op in group] for group in groups] == [["op0", "op1"], ["op2"], ["op3", "op4"]]


@pytest.mark.parametrize(
    "limits",
    [
        Limits(registers=127, shared_memory=999, occupancy=0.0),
        Limits(registers=999, shared_memory=47, occupancy=0.0),
        Limits(registers=999, shared_memory=999, occupancy=0.80),
    ],
    ids=["registers", "shared_memory", "occupancy"],
)
def test_each_limit_alone_keeps_the_scan_out_of_the_first_group(cases, limits):
    eager = greedy_groups(cases[0].chain, replace(published_limits(1024), registers=999, shared_memory=999), tau=-9.0)
    assert len(eager) == 1
    groups = greedy_groups(cases[0].chain, limits, tau=-9.0)
    assert [op.name for op in groups[0]] == ["input_norm", "gate_projection"]


def test_score_of_a_single_operator_is_the_weighted_sum_of_its_ranks():
    low = Operator("low", 0.1, 1.0, 10.0, 1, 1, 0.9)
    high = Operator("high", 0.9, 3.0, 30.0, 1, 1, 0.9)
    weights = Weights(0.5, 0.25, 0.125)
    assert score((low,), (low, high), weights) == 0.0
    assert score((high,), (low, high), weights) == 0.5 + 0.25 - 0.125


@pytest.mark.parametrize(("entropy", "tokens"), [(0.0, 64), (1.0, 512), (0.70, 384), (-3.0, 64), (7.0, 512)])
def test_tile_size_is_a_multiple_of_32_between_64_and_512(entropy, tokens):
    assert tile_size(entropy) == tokens


def test_latency_is_the_formula_for_one_group():
    group = (Operator("only", 0.5, 3.0, 20.0, 1, 1, 0.9),)
    found = estimate([group], published_layer(seqlen=1024), "arithmetic")
    assert found["latency_ms"] == pytest.approx(0.012 * 20 * 10 * 0.96 + 0.007 * 3 * 10 + 0.16, rel=1e-12)
    assert found["dram_bytes_per_token"] == pytest.approx(20 * 10 * 0.96, rel=1e-12)
    assert found["tokens_per_s"] == pytest.approx(1024 / found["latency_ms"] * 1e3, rel=1e-12)


def test_unknown_names_are_refused_with_the_known_ones(cases):
    groups = cases[0].plans["none"][1]
    with pytest.raises(ValueError, match=r"method: got 'corey', want one of none, static"):
        estimate(groups, cases[0].layer, "corey")
    with pytest.raises(ValueError, match=r"precision: got 'int4', want one of fp16"):
        estimate(groups, cases[0].layer, "ours", "int4")
    with pytest.raises(ValueError, match="chain: got no operators"):
        greedy_groups((), cases[0].limits)


def test_published_tables_are_refused_by_unknown_names():
    with pytest.raises(ValueError, match="name: got 'tier2'"):
        read_published("tier2")
    assert "source" in read_published("chunk_sweep").columns


def published_layer(seqlen):
    return Layer(seqlen, entropy_gain=0.4, entropy_after=0.5, outliers_before=0.001, outliers_after=0.0)
