"""Routing corey's scan into transformers' Mamba and FalconMamba: same logits, restored, confined to one model."""

import sys
import threading
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("transformers", minversion="5.15", reason="routing is for transformers")

from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from corey import routing, routing_clients
from corey.generation import greedy_tokens, prefill
from corey.routing import pytorch_on_cpu, route
from corey.scan import selective_scan
from corey.side_by_side import state_dropping_scan

FAMILIES = {"mamba": (MambaConfig, MambaForCausalLM), "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM)}
SEQLEN, LAYERS = 300, 3


def build(family="mamba", seed=0, dtype=torch.float32):
    config, model = FAMILIES[family]
    torch.manual_seed(seed)
    model = model(config(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=LAYERS, eos_token_id=0))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # a state that lasts for hundreds of tokens, so that losing it shows in the logits
            parameter.data -= 5
        if name.endswith("D"):  # less of the direct path, more of the state's
            parameter.data *= 0.1
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def ids():
    return [int(i) for i in torch.randint(1, 64, (SEQLEN,), generator=torch.Generator().manual_seed(1))]


def client(model):
    return sys.modules[type(model.backbone.layers[0].mixer).__module__]


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_logits_are_transformers_own_to_float32_rounding(family, ids):
    model = build(family)
    own, _ = prefill(model, ids)
    with route(model) as routed:
        logits, _ = prefill(model, ids)
    assert routed.calls == LAYERS
    assert own.std() > 0.01  # not a comparison of zeros
    torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-5 * own.abs().max().item())
    # the same input through a scan that drops the state is far outside that tolerance
    with route(model, chunk_size=128, scan=state_dropping_scan):
        dropped, _ = prefill(model, ids)
    assert (dropped - own).abs().max() > 1e-3 * own.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_cache_and_greedy_tokens_do_not_depend_on_the_chunk_by_a_bit(family, ids):
    model = build(family)
    sides = {}
    for chunk_size in (None, 128, 256, 512, 1024):
        with route(model, chunk_size=chunk_size) as routed:
            logits, cache = prefill(model, ids)
            states = [layer.recurrent_states[0].clone() for layer in cache.layers]
            tokens = greedy_tokens(model, ids, max_new_tokens=8, eos_token_id=None)
        assert routed.chunks == [chunk_size] * (2 * LAYERS)
        sides[chunk_size] = (logits, states, tokens)
    logits, states, tokens = sides.pop(None)
    for other_logits, other_states, other_tokens in sides.values():
        assert torch.equal(logits, other_logits)
        assert all(torch.equal(a, b) for a, b in zip(states, other_states))
        assert tokens == other_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_are_routed(dtype, ids):
    exact, _ = prefill(build(), ids)
    model = build(dtype=dtype)
    own, _ = prefill(model, ids)
    with route(model):
        logits, _ = prefill(model, ids)
    rms = lambda x: (x.float() - exact).square().mean().sqrt()  # noqa: E731
    assert rms(logits) < 1.5 * rms(own)


def test_calls_count_scans_and_not_decode_steps(ids):
    model = build()
    with route(model, chunk_size=256) as routed:
        greedy_tokens(model, ids, max_new_tokens=4, eos_token_id=None)
        assert (routed.calls, routed.layers) == (LAYERS, list(range(LAYERS)))
        prefill(model, ids[:5], use_cache=False)
    assert routed.calls == 2 * LAYERS


def test_a_scheduler_sees_each_layers_input_and_its_choice_is_recorded(ids):
    model, seen = build(), []

    def scheduler(u, layer):
        seen.append((tuple(u.shape), layer))
        return 128 * (layer + 1)

    with route(model, chunk_size=scheduler) as routed:
        prefill(model, ids)
    assert seen == [((1, 64, SEQLEN), layer) for layer in range(LAYERS)]
    assert routed.chunks == [128, 256, 384]


def test_everything_is_restored_after_the_block_and_after_an_error(ids):
    model = build()
    module = client(model)
    before = module.mamba_selective_scan, module.mamba_inner_fn
    mixer = model.backbone.layers[0].mixer

    def broken(u, layer):
        raise KeyError("scheduler")

    with route(model):
        assert module.mamba_selective_scan is not before[0]
    with pytest.raises(KeyError, match="scheduler"), route(model, chunk_size=broken):
        prefill(model, ids)
    assert (module.mamba_selective_scan, module.mamba_inner_fn) == before
    assert not mixer._forward_pre_hooks and not mixer._forward_hooks
    assert routing._running() == [] and routing._replaced == {}


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_inside_a_forward_leaves_no_trace_for_the_next_model(error, ids):
    model, other = build(), build(seed=1)
    expected, _ = prefill(other, ids)

    def broken(u, layer):
        raise error

    if error is KeyError:  # after which the block may go on
        with route(model, chunk_size=broken):
            with pytest.raises(KeyError):
                prefill(model, ids)
            logits, _ = prefill(other, ids)
        assert torch.equal(logits, expected)
    with pytest.raises(error), route(model, chunk_size=broken):
        prefill(model, ids)
    with route(model) as routed:  # torch runs no hook after an interrupt
        logits, _ = prefill(other, ids)
    assert torch.equal(logits, expected)
    assert routed.calls == 0


def test_another_model_of_the_same_class_keeps_transformers_scan(ids):
    model, other = build(), build(seed=1)
    expected, _ = prefill(other, ids)
    with route(model) as routed:
        prefill(model, ids)
        logits, _ = prefill(other, ids)
        prefill(model, ids)
    assert torch.equal(logits, expected)
    assert routed.calls == 2 * LAYERS


def test_two_models_are_routed_at_once_and_left_in_any_order(ids):
    first, second = build(), build(seed=1)
    a, b = route(first, chunk_size=128), route(second, chunk_size=256)
    before = client(first).mamba_selective_scan
    a.__enter__()
    b.__enter__()
    prefill(first, ids)
    a.__exit__(None, None, None)
    prefill(first, ids)
    prefill(second, ids)
    b.__exit__(None, None, None)
    assert (a.chunks, b.chunks) == ([128] * LAYERS, [256] * LAYERS)
    assert client(first).mamba_selective_scan is before


def test_the_innermost_of_nested_routes_decides(ids):
    model = build()
    with route(model, chunk_size=128) as outer:
        prefill(model, ids)
        with route(model, chunk_size=256) as inner:
            prefill(model, ids)
        prefill(model, ids)
    assert (outer.chunks, inner.chunks) == ([128] * (2 * LAYERS), [256] * LAYERS)


def test_a_route_is_not_entered_twice_at_once(ids):
    model = build()
    routed = route(model)
    with routed, pytest.raises(RuntimeError, match="already entered"), routed:
        pass
    with routed:  # one block after the other is fine, and the counts go on
        prefill(model, ids)
    assert routed.calls == LAYERS


def test_threads_do_not_see_each_others_mixers(ids):
    model, other = build(), build(seed=1)
    expected, _ = prefill(other, ids)
    inside, checked, results = threading.Event(), threading.Event(), []

    def wait(u, layer):  # holds the routed model in the middle of its forward
        inside.set()
        assert checked.wait(30)
        return 128

    def run_other():
        assert inside.wait(30)
        results.append(prefill(other, ids)[0])
        checked.set()

    thread = threading.Thread(target=run_other)
    thread.start()
    with route(model, chunk_size=wait):
        prefill(model, ids)
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_training_path_does_not_bypass_the_scan(family, ids, monkeypatch):
    model = build(family).train()
    fused_calls = []
    monkeypatch.setattr(client(model), "mamba_inner_fn", lambda *args, **kwargs: fused_calls.append(1))
    with pytorch_on_cpu(), torch.no_grad():
        model(torch.tensor([ids]))
        assert len(fused_calls) == LAYERS
        with route(model) as routed:
            model(torch.tensor([ids]))
    assert (routed.calls, len(fused_calls)) == (LAYERS, LAYERS)


def test_a_mixer_that_bypasses_its_scan_function_is_reported(ids, monkeypatch):
    model = build()
    monkeypatch.setattr(
        type(model.backbone.layers[0].mixer), "forward", lambda self, hidden_states, **kwargs: hidden_states
    )
    with pytest.raises(RuntimeError, match="bypassed"), route(model):
        prefill(model, ids, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_fed_in_pieces_gives_the_logits_of_the_whole(family, ids):
    model = build(family)

    def in_pieces(*ends):
        cache, logits = None, []
        with torch.inference_mode():
            for start, end in zip((0, *ends), (*ends, SEQLEN)):
                output = model(torch.tensor([ids[start:end]]), cache_params=cache, use_cache=True)
                cache = output.cache_params
                logits.append(output.logits[0])
        return torch.cat(logits)

    with route(model, chunk_size=128) as routed:
        whole, _ = prefill(model, ids)
        pieces = in_pieces(100, 101, 230)
    scale = whole.abs().max().item()
    assert routed.calls == LAYERS * (1 + 3)  # the piece of one token is a decode step
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5 * scale)
    with pytorch_on_cpu():  # transformers by itself answers too, with the state of the earlier pieces dropped
        assert (in_pieces(100, 101, 230) - whole).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("installed", ["4.57.1", "5.14.1", "5.15.0.dev0", "6.0.0"])
def test_an_unknown_version_of_transformers_is_refused_with_both_versions(installed, monkeypatch):
    monkeypatch.setattr(routing_clients, "version", lambda package: installed)
    with pytest.raises(RuntimeError, match=rf"transformers: got {installed}, want >=5\.15,<6"):
        route(build())


def test_a_scan_function_with_other_parameters_is_refused(monkeypatch):
    model = build()

    def renamed(hidden_states, dt, A, B, C, D=None, gate=None):
        raise AssertionError

    monkeypatch.setattr(client(model), "mamba_selective_scan", renamed)
    with pytest.raises(RuntimeError, match=rf"no parameter z, .*transformers {version('transformers')}"):
        route(model)
    monkeypatch.delattr(client(model), "mamba_selective_scan")
    with pytest.raises(RuntimeError, match="mamba_selective_scan: got nothing"):
        route(model)


BAD_ARGUMENTS = {
    "no_module": ("mamba", {}, TypeError, "model"),
    "no_mixers": (torch.nn.Linear(2, 2), {}, TypeError, "model: got Linear"),
    "chunk_100": (None, {"chunk_size": 100}, ValueError, "chunk_size: got 100"),
    "chunk_0": (None, {"chunk_size": 0}, ValueError, "chunk_size: got 0"),
    "chunk_negative": (None, {"chunk_size": -128}, ValueError, "chunk_size"),
    "chunk_true": (None, {"chunk_size": True}, TypeError, "chunk_size: got bool"),
    "chunk_float": (None, {"chunk_size": 256.0}, TypeError, "chunk_size: got float"),
    "scan_name": (None, {"scan": "reset"}, TypeError, "scan: got str"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(case):
    model, arguments, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        route(build() if model is None else model, **arguments)


def test_a_model_of_mamba_2_is_refused_by_its_mixers_name():
    config = Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=1, num_hidden_layers=1, vocab_size=8
    )
    with pytest.raises(
        TypeError, match=r"model: got Mamba2ForCausalLM with layers of class Mamba2Mixer, .* MambaMixer"
    ):
        route(Mamba2ForCausalLM(config))


def test_a_schedulers_illegal_chunk_is_refused_by_the_scan(ids):
    with pytest.raises(ValueError, match="chunk_size: got 100"), route(build(), chunk_size=lambda u, layer: 100):
        prefill(build(), ids)  # another model: not routed, no error
        prefill_routed = build()
        with route(prefill_routed, chunk_size=lambda u, layer: 100):
            prefill(prefill_routed, ids)


def test_the_default_scan_is_coreys():
    assert route(build())._scan is selective_scan
