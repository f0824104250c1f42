"""The published maps against golden values, and every policy behind the one interface."""

import json
import math

import pytest
import torch

from corey.chunk_rules import (
    ChunkRule,
    GuardedRule,
    _least_entropies,
    continuous_tile,
    device_chunk,
    guard,
    powers_of_two,
    shape_chunk,
)
from corey.conv import OutputHistogram
from corey.entropy import histogram_entropy
from corey.schedulers import PUBLISHED_RANGES, SCHEDULERS, fit_oracle, get_scheduler, split_runs

LN256 = math.log(256)
HIGH = [(256, 512, 512, 2048), (256, 256, 256, 1024)]
GOLDEN = {  # entropy -> chunk under each published range, (round, floor)
    0.19: [(32, 64, 128, 256), (32, 32, 128, 128)],
    0.78: [(64, 128, 256, 512), (64, 64, 128, 256)],
    2.27: [(128, 256, 256, 1024), (128, 128, 256, 512)],
    3.00: [(256, 256, 256, 1024), (128, 256, 256, 1024)],
    3.38: [(256, 256, 512, 1024), (128, 256, 256, 1024)],
    3.83: [(256, 512, 512, 2048), (256, 256, 256, 1024)],
    4.02: HIGH,
    4.18: HIGH,
    4.604: HIGH,
    5.5: HIGH,
}
SWEEP = [
    {"batch": 1, "d_inner": 8, "seqlen": 256, "chunk_size": chunk, "run": run, "latency_us": latency}
    for chunk, latencies in {128: [5.0, 9.0, 5.0, 9.0], 256: [6.0, 6.0, 6.0, 6.0]}.items()
    for run, latency in enumerate(latencies)
]


def scan_input(batch=2, d_inner=8, seqlen=256, seed=0) -> torch.Tensor:
    return torch.randn(batch, d_inner, seqlen, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entropy_nats", GOLDEN)
@pytest.mark.parametrize("rounding", ["round", "floor"])
def test_the_map_gives_the_published_chunks(entropy_nats, rounding):
    chunks = tuple(ChunkRule(*bounds, rounding)(entropy_nats) for bounds in PUBLISHED_RANGES.values())
    assert chunks == GOLDEN[entropy_nats][rounding == "floor"]


@pytest.mark.parametrize(
    ("preset", "boundaries"),
    [
        ("kernel_legacy", [0.221, 0.976, 2.484, 5.501]),
        ("kernel", [0.154, 0.676, 1.722, 3.813]),
        ("routed", [0.766, 3.38]),
        ("ablation", [0.154, 0.676, 1.722, 3.813]),
    ],
)
def test_the_map_changes_at_the_published_entropies(preset, boundaries):
    rule = ChunkRule(*PUBLISHED_RANGES[preset])
    for boundary in boundaries:
        assert rule(boundary + 0.002) == 2 * rule(boundary - 0.002)
    assert rule(0.0) == rule.c_min and rule(50.0) == rule.c_max


def test_the_map_is_monotone_in_entropy_by_construction():
    for bounds in PUBLISHED_RANGES.values():
        chunks = [ChunkRule(*bounds)(h / 100) for h in range(800)]
        assert chunks == sorted(chunks)


def test_the_floor_reaches_the_top_only_at_full_scale():
    rule = ChunkRule(128, 512, 5.0, "floor")
    assert (rule(4.999), rule(5.0)) == (256, 512)


@pytest.mark.parametrize("bounds", [*PUBLISHED_RANGES.values(), (1, 2**30, 3.0), (128, 128, 5.0), (128, 512, 1e300)])
@pytest.mark.parametrize("rounding", ["round", "floor"])
def test_the_device_compares_with_the_very_entropies_at_which_the_map_changes(bounds, rounding):
    rule = ChunkRule(*bounds, rounding)
    least = _least_entropies(rule)
    assert len(least) == (rule.c_max // rule.c_min).bit_length() - 1 and list(least) == sorted(least)
    for doublings, entropy in enumerate(least, start=1):
        before = torch.nextafter(torch.tensor(entropy), torch.tensor(0.0))
        assert rule(float(before)) < rule.c_min << doublings
        assert math.isinf(entropy) or rule(entropy) >= rule.c_min << doublings


def test_the_chunk_of_a_device_is_the_chunk_of_the_rule():
    for bounds in PUBLISHED_RANGES.values():
        rule = ChunkRule(*bounds)
        for power in range(1, 30, 2):
            u = scan_input() ** power
            chunk = device_chunk(u, rule)
            assert (chunk.dtype, chunk.shape) == (torch.int32, ())
            assert int(chunk) == rule(float(histogram_entropy(u)))
            assert int(device_chunk(u, rule, 64, (-1.0, 1.0))) == rule(float(histogram_entropy(u, 64, (-1.0, 1.0))))


def test_device_hist_is_hist_on_the_cpu_and_may_bin_over_a_fixed_range():
    u = scan_input() ** 9
    assert get_scheduler("device-hist", c_max=2048)(u) == get_scheduler("hist", c_max=2048)(u)
    fixed = get_scheduler("device-hist", range=(-1.0, 1.0), c_max=2048)
    assert fixed.statistic(u) == histogram_entropy(u, range=(-1.0, 1.0))
    assert fixed(u) == ChunkRule(128, 2048, math.log(256))(float(fixed.statistic(u)))


def test_device_hist_may_sample_tokens_and_layers():
    u = scan_input() ** 9
    light = get_scheduler("device-hist", range=(-1.0, 1.0), stride=4, every=3, otherwise=256, c_max=2048)
    assert light.statistic(u) == histogram_entropy(u[..., ::4], range=(-1.0, 1.0))
    decided = ChunkRule(128, 2048, math.log(256))(float(light.statistic(u)))
    assert [light(u, layer=layer) for layer in range(7)] == [decided, 256, 256, decided, 256, 256, decided]
    assert light(u) == decided and (light.every, light.on_the_way.stride) == (3, 4)


@pytest.mark.parametrize("rounding", ["round", "floor"])
@pytest.mark.parametrize(
    ("bounds", "guarding"),
    [
        ((128, 512), {}),
        ((128, 2048), {}),
        ((32, 4096), {"delta": 3.0}),
        ((64, 256), {"fallback": 256}),
        ((128, 1024), {"fallback": 128, "delta": 3}),
        ((128, 2048), {"delta": 0.0}),
        ((128, 512), {"fallback": 4096}),
    ],
)
def test_the_guarded_map_is_the_guard_of_the_map_on_the_host_and_on_the_device(bounds, guarding, rounding):
    rule, guarded = ChunkRule(*bounds, 5.0, rounding), GuardedRule(*bounds, 5.0, rounding, **guarding)
    least = _least_entropies(guarded)
    for entropy in [float(torch.tensor(step / 500)) for step in range(3000)]:  # fp32 numbers of nats
        want = guard(rule(entropy), **guarding)
        assert guarded(entropy) == want
        assert guarded.c_min << sum(entropy >= each for each in least) == want


@pytest.mark.parametrize("c_max", [512, 2048])
def test_guarded_device_hist_is_guarded_hist_on_the_cpu(c_max):
    device, host = (get_scheduler(name, c_max=c_max) for name in ("guarded-device-hist", "guarded-hist"))
    found = set()
    for power in (1, 3, 5, 9, 15, 29):
        u = scan_input() ** power
        assert type(device(u)) is int and device(u) == host(u) == int(device_chunk(u, GuardedRule(128, c_max, LN256)))
        found.add(device(u))
    assert found == {128, 512} | {c_max}


def test_guarded_device_hist_hands_every_parameter_on():
    u = scan_input() ** 9
    given = {"num_bins": 64, "range": (-1.0, 1.0), "c_min": 256, "c_max": 4096, "h_ref": 3.0, "rounding": "floor"}
    light = {"stride": 4, "every": 3, "otherwise": 256}
    scheduler = get_scheduler("guarded-device-hist", **given, **light, fallback=1024, delta=1.5)
    rule = GuardedRule(256, 4096, 3.0, "floor", 1024, 1.5)
    assert scheduler.on_the_way == OutputHistogram((-1.0, 1.0), 64, rule, 4) and scheduler.every == 3
    assert scheduler.statistic(u) == histogram_entropy(u[..., ::4], 64, (-1.0, 1.0))
    decided = rule(float(scheduler.statistic(u)))
    assert [scheduler(u, layer=layer) for layer in range(5)] == [decided, 256, 256, decided, 256] and decided != 256
    assert get_scheduler("guarded-device-hist").on_the_way is None


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, (-4.0, 4.0)], ids=["own", "fixed"])
@pytest.mark.parametrize(
    ("name", "rule"),
    [("device-hist", ChunkRule(128, 2048, LN256)), ("guarded-device-hist", GuardedRule(128, 2048, LN256))],
    ids=["plain", "guarded"],
)
def test_device_hist_leaves_the_chunk_on_the_device_without_waiting(name, rule, bounds):
    u, scheduler = (scan_input() ** 3).cuda(), get_scheduler(name, range=bounds, c_max=2048)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunk = scheduler(u, layer=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (chunk.dtype, chunk.shape, chunk.device) == (torch.int32, (), u.device)
    assert int(chunk) == rule(float(scheduler.statistic(u)))


def test_the_continuous_tile_gives_the_published_288():
    assert continuous_tile(4.1809) == 288
    assert (continuous_tile(0.0), continuous_tile(8.0), continuous_tile(9.0)) == (64, 512, 512)


@pytest.mark.parametrize(("chosen", "kept"), [(1024, 512), (256, 512), (512, 512), (128, 128), (2048, 2048)])
def test_the_guard_keeps_only_choices_two_octaves_away(chosen, kept):
    assert guard(chosen) == kept


@pytest.mark.parametrize(("c_min", "c_max", "chunk"), [(128, 512, 256), (128, 2048, 1024), (32, 512, 256)])
def test_no_entropy_takes_the_middle_of_the_range(c_min, c_max, chunk):
    assert get_scheduler("no-entropy", c_min=c_min, c_max=c_max)(scan_input()) == chunk


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "oracle"])
def test_every_policy_answers_with_a_power_of_two_and_says_what_it_reads(name):
    scheduler = get_scheduler(name)
    chunk = scheduler(scan_input(), layer=3)
    assert chunk in powers_of_two(128, 2048)
    assert scheduler.reads and scheduler.cost and scheduler.name.startswith(name)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "oracle"])
@pytest.mark.parametrize("seqlen", [0, 1, 7])
def test_every_policy_takes_empty_and_short_inputs(name, seqlen):
    assert get_scheduler(name)(torch.ones(1, 4, seqlen)) >= 128


def test_the_policies_of_values_see_the_statistic_they_name():
    u = scan_input(seqlen=300)
    assert get_scheduler("hist").statistic(u) == histogram_entropy(u)
    assert get_scheduler("sampled-hist", stride=4).statistic(u) == histogram_entropy(u[..., ::4])
    tokens = torch.stack([histogram_entropy(u[b, :, t]) for b in range(2) for t in range(0, 300, 8)])
    assert get_scheduler("token-hist").statistic(u) == pytest.approx(float(tokens.mean()), abs=1e-6)


def test_values_move_the_histogram_policy_and_the_range_reaches_the_map():
    spread, narrow = torch.rand(1, 8, 4096), torch.zeros(1, 8, 4096)
    assert [get_scheduler("hist")(u) for u in (spread, narrow)] == [512, 128]
    assert [get_scheduler("hist", c_max=2048)(u) for u in (spread, narrow)] == [2048, 128]
    assert get_scheduler("hist", h_ref=8.0)(scan_input()) == 256
    assert get_scheduler("hist", rounding="floor")(scan_input(seqlen=4096)) == 256


def test_a_guarded_policy_still_pays_for_its_statistic():
    scheduler = get_scheduler("guarded-hist", c_max=2048)
    assert (scheduler(torch.rand(1, 8, 4096)), scheduler(scan_input())) == (2048, 512) or scheduler(
        scan_input()
    ) == 2048
    assert scheduler.statistic is not None and scheduler.reads == get_scheduler("hist").reads


def test_the_kurtosis_policy_gives_heavy_tails_the_larger_chunk():
    heavy = scan_input(seqlen=4096) ** 5
    assert get_scheduler("kurtosis-proxy")(heavy) == 512 and get_scheduler("kurtosis-proxy")(scan_input()) == 128


def test_random_draws_repeat_from_their_seed_and_cover_the_range():
    first, again, other = (get_scheduler("random", c_max=2048, seed=s) for s in (0, 0, 1))
    draws = [first(scan_input(1, 1, 1)) for _ in range(100)]
    assert draws == [again(scan_input(1, 1, 1)) for _ in range(100)]
    assert draws != [other(scan_input(1, 1, 1)) for _ in range(100)]
    assert set(draws) == {128, 256, 512, 1024, 2048}


def test_the_oracle_takes_the_lowest_mean_of_its_shape():
    assert fit_oracle(SWEEP) == {(1, 8, 256): 256}
    assert get_scheduler("oracle", sweep=SWEEP)(scan_input(1)) == 256
    with pytest.raises(ValueError, match="u: got shape"):
        get_scheduler("oracle", sweep=SWEEP)(scan_input(1, 8, 255))
    with pytest.raises(ValueError, match="sweep"):
        fit_oracle([])


def test_an_oracle_is_chosen_and_judged_on_different_runs():
    fit, judge = split_runs(SWEEP, seed=3)
    assert {r["run"] for r in fit} & {r["run"] for r in judge} == set()
    assert len(fit) == len(judge) == len(SWEEP) // 2
    with pytest.raises(ValueError, match="sweep"):
        split_runs([row for row in SWEEP if row["run"] == 0])


RULES = {
    "default_chunk": 512,
    "rules": [
        {"name": "short", "chunk": 128, "min_seq_len": 16, "max_seq_len": 256},
        {"chunk": 256, "min_layer_idx": 2, "max_layer_idx": 3, "min_seq_len": 1000},
        {"chunk": 1024, "min_entropy": 5.0, "min_seq_len": 1000},
    ],
}


@pytest.mark.parametrize(
    ("seqlen", "layer", "chunk"),
    [
        (15, None, 512),
        (16, None, 128),
        (256, None, 128),
        (257, None, 512),
        (1000, 2, 256),
        (1000, 3, 256),
        (1000, 4, 512),
        (1000, None, 512),
    ],
)
@pytest.mark.parametrize("name", ["table", "table-always-reads"])
def test_a_table_takes_the_first_rule_whose_inclusive_bounds_hold(name, seqlen, layer, chunk):
    assert get_scheduler(name, rules=RULES)(torch.zeros(1, 4, seqlen), layer=layer) == chunk


def test_a_table_rule_on_entropy_reads_the_values(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(RULES))
    scheduler = get_scheduler("table", rules=path)
    assert scheduler(torch.rand(1, 4, 4096)) == 1024
    assert scheduler(torch.zeros(1, 4, 4096)) == 512


def test_a_table_evaluates_the_histogram_only_where_a_rule_asks_for_it():
    # NaN values raise in the histogram, so they show whether it was evaluated.
    short, long = torch.full((1, 4, 64), math.nan), torch.full((1, 4, 1000), math.nan)
    assert get_scheduler("table", rules=RULES)(short) == 128
    assert get_scheduler("table", rules=RULES)(long, layer=2) == 256
    assert get_scheduler("table")(long) == 512
    for name, u, layer in (("table", long, 4), ("table-always-reads", short, None)):
        with pytest.raises(ValueError, match="x:"):
            get_scheduler(name, rules=RULES)(u, layer=layer)


@pytest.mark.parametrize(
    "rules",
    [
        {"rules": []},
        {"default_chunk": 512, "rules": [{"chunk": 128, "max_length": 3}]},
        {"default_chunk": 512, "rules": [{"chunk": 0}]},
        {"default_chunk": 0, "rules": []},
    ],
    ids=["no default", "unknown bound", "no tokens", "default of none"],
)
def test_a_malformed_table_is_refused_when_it_is_built(rules):
    with pytest.raises(ValueError, match=r"rules|chunk"):
        get_scheduler("table", rules=rules)


def test_the_shape_rule_cuts_only_as_fine_as_the_processors_need():
    assert shape_chunk(64, 2048, 8192, 132) == 2048  # more than enough rows of work already
    assert shape_chunk(1, 64, 8192, 132) == 512  # 64 * 16 pieces >= 4 * 132, 64 * 8 are not
    assert shape_chunk(1, 8, 256, 132) == 128
    chunks = [shape_chunk(1, d, 8192, 132) for d in (1, 16, 64, 256, 1024, 4096)]
    assert chunks == sorted(chunks)


def test_the_shape_policy_reads_no_value():
    u = scan_input(1, 64, 8192)
    scheduler = get_scheduler("shape", processors=132)
    assert scheduler(u) == scheduler(torch.full_like(u, math.nan)) == 512


@pytest.mark.parametrize(
    ("error", "name", "build"),
    [
        (ValueError, "name", lambda: get_scheduler("entropy")),
        (ValueError, "c_min", lambda: ChunkRule(100, 512, 8.0)),
        (TypeError, "c_max", lambda: ChunkRule(128, 512.0, 8.0)),
        (ValueError, "c_max", lambda: ChunkRule(512, 128, 8.0)),
        (ValueError, "h_ref", lambda: ChunkRule(128, 512, 0.0)),
        (ValueError, "rounding", lambda: ChunkRule(128, 512, 8.0, "ceil")),
        (ValueError, "entropy_nats", lambda: ChunkRule(128, 512, 8.0)(math.nan)),
        (ValueError, "entropy_nats", lambda: ChunkRule(128, 512, 8.0)(-0.1)),
        (ValueError, "entropy_nats", lambda: continuous_tile(-1.0)),
        (ValueError, "chunk_size", lambda: get_scheduler("static", chunk_size=0)),
        (ValueError, "stride", lambda: get_scheduler("sampled-hist", stride=0)),
        (ValueError, "num_bins", lambda: get_scheduler("hist", num_bins=1)),
        (ValueError, "fallback", lambda: get_scheduler("guarded-hist", fallback=0)),
        (ValueError, "c_min", lambda: GuardedRule(256, 2048, 5.0)),
        (ValueError, "c_max", lambda: GuardedRule(128, 1024, 5.0)),
        (ValueError, "fallback", lambda: GuardedRule(64, 2048, 5.0, fallback=300)),
        (ValueError, "delta", lambda: GuardedRule(128, 512, 5.0, delta=math.nan)),
        (ValueError, "delta", lambda: guard(128, delta=-1.0)),
        (ValueError, "c_max", lambda: get_scheduler("guarded-device-hist", c_max=1024)),
        (ValueError, "stride", lambda: get_scheduler("guarded-device-hist", stride=0)),
        (ValueError, "every", lambda: get_scheduler("device-hist", every=0)),
        (ValueError, "every", lambda: get_scheduler("guarded-device-hist", every=0)),
        (TypeError, "otherwise", lambda: get_scheduler("guarded-device-hist", otherwise=None)),
        (ValueError, "processors", lambda: get_scheduler("shape", processors=0)),
        (TypeError, "u", lambda: get_scheduler("static")([1.0])),
        (ValueError, "u", lambda: get_scheduler("static")(torch.rand(8, 256))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(error, name, build):
    with pytest.raises(error, match=rf"{name}: got"):
        build()
