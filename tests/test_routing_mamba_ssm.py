"""Routing corey's scan into mamba_ssm: same logits, restored, confined to one model. For machines that have it."""

import pytest
import torch

pytest.importorskip("mamba_ssm", reason="mamba_ssm, with its extension selective_scan_cuda, is not importable here")

from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules import mamba_simple

from corey import routing, routing_clients
from corey.routing import route
from corey.scan import selective_scan, selective_scan_ref

pytestmark = pytest.mark.gpu

SEQLEN, LAYERS, DEVICE = 300, 3, "cuda"
PLAIN = {"rms_norm": False, "fused_add_norm": False}  # norms that torch computes, in any dtype and on a CPU


def build(seed=0, dtype=torch.float32, **config):
    torch.manual_seed(seed)
    model = MambaLMHeadModel(MambaConfig(d_model=64, n_layer=LAYERS, vocab_size=64, **config), device=DEVICE)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # a state that lasts for hundreds of tokens, so that losing it shows in the logits
            parameter.data -= 5
        if name.endswith("D"):  # less of the direct path, more of the state's
            parameter.data *= 0.1
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 64, (1, SEQLEN), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@torch.inference_mode()
def logits_of(model, ids):
    return model(ids).logits[0].float()


@torch.inference_mode()
def generated(model, ids, new_tokens=8):
    """Greedy tokens, and the logits (new_tokens, V) that they were taken from."""
    length = ids.shape[1] + new_tokens
    output = model.generate(ids, max_length=length, cg=False, return_dict_in_generate=True, output_scores=True)
    return output.sequences[0].tolist(), torch.cat(output.scores).float()


def mixers(model):
    return [layer.mixer for layer in model.backbone.layers]


@pytest.mark.parametrize("use_fast_path", [True, False])
def test_routed_logits_are_mamba_ssms_own_to_float32_rounding(use_fast_path, ids):
    model = build(ssm_cfg={"use_fast_path": use_fast_path})
    own = logits_of(model, ids)
    with route(model) as routed:
        logits = logits_of(model, ids)
    assert (routed.calls, routed.layers) == (LAYERS, list(range(LAYERS)))
    assert own.std() > 0.01  # not a comparison of zeros
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())


def test_routed_logits_are_those_of_float64(ids, monkeypatch):
    model = build(**PLAIN)
    with route(model):
        logits = logits_of(model, ids)
    exact = build(**PLAIN)
    exact.load_state_dict(model.state_dict())
    exact = exact.cpu().double()
    monkeypatch.setattr(mamba_simple, "causal_conv1d_fn", None)  # the mixer then takes torch's convolution

    def scan(*args, chunk_size=None, **kwargs):
        return selective_scan_ref(*args, **kwargs)

    with torch.inference_mode(), route(exact, scan=scan) as routed:
        truth = exact(ids.cpu()).logits[0]
    assert routed.calls == LAYERS and truth.dtype == torch.float64
    error = (logits.cpu() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 3e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_float32_than_mamba_ssms_own(dtype, ids):
    exact = logits_of(build(), ids)
    model = build(dtype=dtype)
    own = logits_of(model, ids)
    with route(model):
        logits = logits_of(model, ids)
    rms = lambda x: (x - exact).square().mean().sqrt()  # noqa: E731
    assert 0 < rms(logits) < 1.5 * rms(own)


def test_logits_and_greedy_tokens_do_not_depend_on_the_chunk_by_a_bit(ids):
    model = build(dtype=torch.bfloat16)
    sides = {}
    for chunk_size in (None, 128, 256, 512, 1024):
        with route(model, chunk_size=chunk_size) as routed:
            sides[chunk_size] = (logits_of(model, ids), *generated(model, ids))
        assert routed.chunks == [chunk_size] * (2 * LAYERS)  # a forward and a prompt; decode steps hold no scan
    logits, tokens, scores = sides.pop(None)
    for others in sides.values():
        assert torch.equal(logits, others[0]) and tokens == others[1] and torch.equal(scores, others[2])


def test_generation_goes_on_from_the_scans_last_state(ids):
    model = build()
    tokens, own = generated(model, ids)
    with route(model) as routed:
        routed_tokens, logits = generated(model, ids)
    assert routed.calls == LAYERS and routed_tokens == tokens
    scale = own.abs().max().item()
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4 * scale)

    def forgetful(*args, **kwargs):
        y, state = selective_scan(*args, **kwargs)
        return y, torch.zeros_like(state)

    with route(model, scan=forgetful):  # the prompt's own logits are right, those of the steps after it are not
        _, forgotten = generated(model, ids)
    assert torch.equal(forgotten[0], logits[0])
    assert (forgotten[1:] - logits[1:]).abs().amax() > 1e-3 * scale


def test_a_scheduler_sees_each_layers_input(ids):
    model, seen = build(), []

    def scheduler(u, layer):
        seen.append((tuple(u.shape), layer))
        return 128 * (layer + 1)

    with route(model, chunk_size=scheduler) as routed:
        logits_of(model, ids)
    assert seen == [((1, 128, SEQLEN), layer) for layer in range(LAYERS)]
    assert routed.chunks == [128, 256, 384]


def test_everything_is_restored_after_the_block_and_after_an_error(ids):
    model = build()
    before = mamba_simple.selective_scan_fn

    def broken(u, layer):
        raise KeyError("scheduler")

    with route(model):
        assert mamba_simple.selective_scan_fn is not before
        assert not any(mixer.use_fast_path for mixer in mixers(model))
    with pytest.raises(KeyError, match="scheduler"), route(model, chunk_size=broken):
        logits_of(model, ids)
    assert mamba_simple.selective_scan_fn is before
    assert all(mixer.use_fast_path for mixer in mixers(model))
    assert not any(mixer._forward_pre_hooks or mixer._forward_hooks for mixer in mixers(model))
    assert routing._running() == [] and routing._replaced == {}


def test_nested_routes_and_another_model_keep_to_themselves(ids):
    model, other = build(), build(seed=1)
    expected = logits_of(other, ids)
    with route(model, chunk_size=128) as outer:
        with route(model, chunk_size=256) as inner:
            logits_of(model, ids)
        logits_of(model, ids)
        assert torch.equal(logits_of(other, ids), expected)
    assert (outer.chunks, inner.chunks) == ([128] * LAYERS, [256] * LAYERS)
    assert all(mixer.use_fast_path for mixer in mixers(model))


def test_a_mixer_that_takes_the_fused_path_all_the_same_is_reported(ids):
    model = build()
    with pytest.raises(RuntimeError, match=r"mamba_ssm \d.* bypassed"), route(model):
        mixers(model)[1].use_fast_path = True
        logits_of(model, ids)


def test_mamba_2_is_refused_by_its_name():
    model = MambaLMHeadModel(
        MambaConfig(d_model=256, n_layer=1, vocab_size=64, ssm_cfg={"layer": "Mamba2"}), device=DEVICE
    )
    with pytest.raises(TypeError, match="model: got MambaLMHeadModel with layers of class Mamba2, whose scan"):
        route(model)


@pytest.mark.parametrize("installed", ["1.2.2", "2.2.6", "2.4.0"])
def test_an_unknown_version_is_refused_with_both_versions(installed, monkeypatch):
    monkeypatch.setattr(routing_clients, "version", lambda package: installed)
    with pytest.raises(RuntimeError, match=rf"mamba_ssm: got {installed}, want >=2\.3,<2\.4"):
        route(build())
