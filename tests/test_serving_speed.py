"""The end-to-end table: rows of every set at a tiny shape, floors by hand, and what is refused."""

import math
import re
import time

import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", minversion="5.15", reason="the peer is transformers' Mamba")

from corey import mamba, peer, results, serving_policies, serving_speed
from corey.cold_timing import Limits
from corey.kernel_times import kernel_times, parts_of_client, parts_of_prefill
from corey.mamba import MambaConfig
from corey.mamba_session import Session
from corey.mamba_weights import SHAPES, mamba_of, random_tensors
from corey.paths import ROOT
from corey.prefill_floors import prefill_floors
from corey.routing import pytorch_on_cpu
from corey.schedulers import static
from corey.serving_speed import TABLES, Task
from corey.side_by_side import state_dropping_scan

TINY = MambaConfig(d_model=32, n_layer=2, vocab_size=64, d_inner=64, dt_rank=8, d_state=8)
LIMITS = Limits(multiprocessors=132, clock_hz=1.98e9, copy_bytes_per_s=4e12)
FLOPS = 7.5e14
GUARDED = {"guarded-device-hist", "guarded-device-hist, every 8th token and 4th layer"}


@pytest.fixture(scope="module")
def pair():
    tensors = random_tensors(TINY, seed=3)
    tensors |= {name: 20 * x for name, x in tensors.items() if "embeddings" in name}  # logits apart from one another
    return tensors, peer.build_client(TINY, tensors), mamba_of(TINY, tensors, dtype=torch.float32)


def ids_of(tokens, seed=0):
    return serving_speed.prompt(TINY, tokens, seed=seed, device="cpu")


@pytorch_on_cpu()
def test_both_sides_have_the_same_weights(pair):
    tensors, client, model = pair
    assert client.lm_head.weight.data_ptr() == tensors["backbone.embeddings.weight"].data_ptr()
    assert model.layers[1].in_proj.data_ptr() == tensors["backbone.layers.1.mixer.in_proj.weight"].data_ptr()
    ids = ids_of(40)
    want = peer.prefill(client, ids)
    torch.testing.assert_close(Session(model).prefill(ids), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert peer.generate(client, ids, 5) == Session(model).generate(ids, 5)


@pytest.fixture(scope="module")
@pytorch_on_cpu()
def sets(pair):
    return serving_speed.measure(
        [Task("tiny", 150), Task("tiny", 20, 3)], rounds=5, generate_rounds=5, policy_rounds=5, logit_tokens=30, seed=0,
        limits=LIMITS, flops_per_s=FLOPS, shapes={"tiny": TINY}, device="cpu", dtype=torch.float32,
    )  # fmt: skip


def test_every_set_has_its_rows(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(results.paths, "LIVE_RESULTS", tmp_path)
    for name, rows in sets.items():
        results.write_rows(rows, name, parameters={})
    speed = sets["serving_speed"]
    assert list(speed.new_tokens) == [0, 3] and (speed[["latency_us", "peer_us"]] > 0).all(axis=None)
    assert (speed.speedup_low <= speed.speedup).all() and (speed.speedup <= speed.speedup_high).all()
    logits = sets["serving_speed_logits"].iloc[0]
    assert 0 < logits.decided == logits.decided_equal <= 30
    assert sets["serving_speed_bits"].groupby("prompt_tokens").scheduler.size().nunique() == 1
    assert sets["serving_speed_bits"][["logits_bitwise_equal", "tokens_equal"]].all(axis=None)
    assert set(sets["serving_speed_policies"].scheduler) > {"static", "table", *GUARDED}


def test_every_column_is_in_the_data_dictionary(sets):
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "data/README.md").read_text(), re.MULTILINE))
    kernels = {"client", "part", "launches", "time_us", "floor_us", "bound"}
    assert kernels.union(*(rows.columns for rows in sets.values())) <= told


@pytorch_on_cpu()
def test_a_wrong_model_is_not_decided_equal(pair):
    tensors, client, _ = pair
    wrong = tensors | {"backbone.norm_f.weight": -tensors["backbone.norm_f.weight"]}
    row = serving_speed.logits_row(TINY, tensors, client, mamba_of(TINY, wrong, dtype=torch.float32), ids_of(60))
    assert row["decided_equal"] < row["decided"] and row["rms_error"] > 100 * row["peer_rms_error"]


def test_a_scan_whose_bits_depend_on_the_chunk_is_seen(pair, monkeypatch):
    def dropping(*args, chunk_size=None, **kwargs):
        return state_dropping_scan(*args, chunk_size=chunk_size or 512, **kwargs)

    monkeypatch.setattr(mamba, "selective_scan", dropping)
    rows = serving_policies.bit_rows(pair[2], ids_of(700), new_tokens=2).set_index("scheduler")
    assert not rows.logits_bitwise_equal["static-128"] and rows.logits_bitwise_equal["table, 512"]


def test_the_share_of_a_policy_is_that_of_the_prefill_with_it(pair, monkeypatch):
    def slow(u, layer):
        time.sleep(0.02)
        return 512

    two = {"static": static(512), "slow": slow}
    monkeypatch.setattr(serving_policies, "priced_policies", lambda chunk_size, device: two)
    rows = serving_policies.price_rows(pair[2], ids_of(40), rounds=5, seed=0)
    rows = rows[rows.chunk_size == 512].set_index("scheduler")
    reference, with_it = rows.latency_us["static"], rows.latency_us["slow"]
    assert with_it > 4e4 and rows.share["slow"] == pytest.approx(1 - reference / with_it, abs=0.1)
    assert math.isnan(rows.share["static"])


@pytest.mark.parametrize("chunk_size", serving_policies.PRICED_AT)
def test_every_priced_policy_answers_with_the_chunk_it_is_priced_at(chunk_size):
    u = 1e-3 * torch.randn(1, 8, 300, generator=torch.Generator().manual_seed(1))  # within one or two bins
    for name, policy in serving_policies.priced_policies(chunk_size).items():
        assert [policy(u, layer) for layer in range(5)] == [chunk_size] * 5, name


ONE_LAYER = ["add_rms_norm", "nvjet_tst_128x256", "causal_conv1d_token_major", "histogram_entropy", "nvjet_splitK_64x8",
             "void cublasLt::splitKreduce_kernel<32>", "sm90_xmma_gemm_bf16", "scan_states", "scan_carry",
             "scan_outputs", "cutlass_80_tensorop"]  # fmt: skip
ITS_PARTS = ["norm", "in_proj", "conv", "statistic", "x_proj", "x_proj", "dt_proj", "scan", "scan", "scan", "out_proj"]


def test_kernels_are_told_apart_by_their_neighbours():
    names = ["indexSelect", *ONE_LAYER, *ONE_LAYER, "CatArrayBatchedCopy", "add_rms_norm", "gemv2T", "argmax"]
    parts = ["other", *ITS_PARTS, *ITS_PARTS, "other", "norm", "lm_head", "other"]
    assert parts_of_prefill(names * 2) == parts * 2
    client = ["nvjet_tst", "void causal_conv1d_channellast_fwd_kernel<>", "void selective_scan_fwd_kernel<>", "copy"]
    assert parts_of_client(client) == ["matrix products", "conv", "scan", "other"]


def test_floors_are_those_counted_by_hand():
    floors = prefill_floors(SHAPES["370m"], 1, 4096, 2, LIMITS, FLOPS)
    assert floors["in_proj"].floor_us == pytest.approx(48 * 2 * 4096 * 4096 * 1024 / 7.5e8)
    assert floors["dt_proj"].floor_us == pytest.approx(48 * 2 * (4096 * 64 + 2048 * 64 + 4096 * 2048) / 4e6)
    assert [floors[part].bound for part in ("in_proj", "x_proj", "dt_proj", "lm_head", "scan")] == [
        "matrix products", "bytes", "bytes", "bytes", "special functions",
    ]  # fmt: skip
    assert floors["norm"].floor_us == pytest.approx(48 * 4096 * 1024 * 12 / 4e6)
    assert floors["conv"].floor_us == pytest.approx(48 * 4096 * 2048 * 4 / 4e6)
    assert floors["scan"].floor_us == pytest.approx(48 * 38.1, rel=3e-3)


def test_tables_show_what_the_rows_say():
    speed = {"model": "370m", "prompt_tokens": 4096, "new_tokens": 0, "latency_us": 11_900.0, "peer_us": 55_000.0}
    speed |= {"speedup": 4.62, "speedup_low": 4.5, "speedup_high": 4.7}
    speed |= {"peer_peak_allocated_bytes": 2.0**30, "peak_allocated_bytes": 2.0**29}
    assert serving_speed.markdown(pd.DataFrame([speed])).endswith(
        "| prefill 4096 tokens, 370m | 55.0 | 11.90 | 4.6 [4.5, 4.7] | 1.00, 0.50 |"
    )
    policies = [{"chunk_size": 512, "scheduler": "static", "latency_us": 11_900.0}]
    policies.append(
        {
            "chunk_size": 512,
            "scheduler": "table",
            "latency_us": 11_901.0,
            "share": 1e-4,
            "share_low": -1e-4,
            "share_high": 2e-4,
        }
    )
    assert serving_speed.policies_markdown(pd.DataFrame(policies)).endswith(
        "| 512 | table | 11.901 | 0.01 [-0.01, 0.02] |"
    )
    kernels = [
        {"client": "corey", "part": "conv", "launches": 48, "time_us": 750.0, "floor_us": 375.0, "bound": "bytes"}
    ]
    kernels.append({"client": "corey", "part": "other", "launches": 3, "time_us": 50.0})
    assert serving_speed.kernels_markdown(pd.DataFrame(kernels)).splitlines()[2:] == [
        "| corey | conv | 48 | 0.750 | 0.375 | bytes | 2.0 |",
        "| corey | other | 3 | 0.050 |  | |  |",
        "| corey | all | 51 | 0.800 | 0.375 | | |",
    ]


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_shows_the_committed_rows(name):
    readme = (ROOT / "README.md").read_text()
    written = re.search(rf"<!-- {name}: [^>]* -->\n(.*?)\n<!-- /{name} -->", readme, re.DOTALL).group(1)
    committed = name in results.names("committed")
    assert written == (
        TABLES[name](results.read_rows(name, "committed")) if committed else "No rows are committed yet."
    )


def test_without_a_gpu_or_the_peer_nothing_is_measured_and_the_reason_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert serving_speed.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peer, "PACKAGES", {"no_such_package": "no-such-package"})
    assert serving_speed.main([]) == 1
    assert "no-such-package: got none that can be imported" in capsys.readouterr().err


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_profile_of_a_prefill_has_every_part():
    model = mamba_of(TINY, random_tensors(TINY, device="cuda", dtype=torch.bfloat16), dtype=torch.bfloat16)
    session, ids = Session(model, graphs=False), ids_of(300).cuda()
    session.prefill(ids)
    times = kernel_times(lambda: session.prefill(ids))
    launches = times.assign(part=parts_of_prefill(times.name)).groupby("part").size()
    assert {"norm", "in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj", "lm_head", "other"} == set(
        launches.index
    )
    assert launches["norm"] == TINY.n_layer + 1 and launches["conv"] == TINY.n_layer
    assert (launches[["in_proj", "x_proj", "dt_proj", "out_proj"]] >= TINY.n_layer).all()  # more where one is split
    assert (times.time_us > 0).all()


@pytest.mark.gpu
def test_the_peer_runs_its_own_kernels_and_agrees():
    for package in peer.PACKAGES:
        pytest.importorskip(package, reason="the peer's kernels are not importable here")
    tensors = random_tensors(TINY, device="cuda", dtype=torch.bfloat16)
    client, model = peer.build_client(TINY, tensors), mamba_of(TINY, tensors, dtype=torch.bfloat16)
    ids = ids_of(300).cuda()
    peer.check_kernels(client, ids)
    row = serving_speed.logits_row(TINY, tensors, client, model, ids)
    assert 0 < row["decided"] == row["decided_equal"] and row["rms_error"] < 1.5 * row["peer_rms_error"]
    rows = serving_speed.kernel_rows(client, model, ids, LIMITS, FLOPS).set_index(["client", "part"])
    assert rows.launches["transformers", "scan"] == TINY.n_layer


@pytest.mark.gpu
def test_captured_policies_have_the_bits_of_the_reference():
    model = mamba_of(TINY, random_tensors(TINY, device="cuda", dtype=torch.bfloat16), dtype=torch.bfloat16)
    rows = serving_policies.bit_rows(model, ids_of(700).cuda(), new_tokens=4)
    assert rows[["logits_bitwise_equal", "tokens_equal"]].all(axis=None)
    assert len(serving_policies.price_rows(model, ids_of(700).cuda(), rounds=5, seed=0)) == 20
