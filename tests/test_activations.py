"""The hooks against the mixer's own equations, on a small model with random weights."""

import pytest
import torch
from byte_ids import byte_tokens
from transformers import MambaConfig, MambaForCausalLM

from corey.activations import capture_activations, mamba_mixers
from corey.routing import pytorch_on_cpu

TEXT = "The ledger was checked twice before noon; the stamp is scarlet."


@pytest.fixture(scope="module")
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=3, state_size=4, conv_kernel=4, expand=2)
    return MambaForCausalLM(config).eval()


def test_every_layer_is_kept_once_and_in_order(model):
    kept = capture_activations(model, byte_tokens(TEXT))
    assert kept.embeddings.shape == (1, len(TEXT), 32)
    assert [tuple(u.shape) for u in kept.u] == [(1, 64, len(TEXT))] * 3
    assert [tuple(x.shape) for x in kept.x_branch] == [(1, 64, len(TEXT))] * 3
    ids = byte_tokens(TEXT)
    assert torch.equal(kept.embeddings, model.get_input_embeddings()(ids))
    first = model.backbone.layers[0]
    branch = first.mixer.in_proj(first.norm(kept.embeddings))[..., :64].transpose(1, 2)
    assert torch.allclose(kept.x_branch[0], branch, atol=1e-6)


def test_u_is_the_convolved_and_activated_branch_that_the_scan_gets(model):
    kept = capture_activations(model, byte_tokens(TEXT))
    for mixer, branch, u in zip(mamba_mixers(model), kept.x_branch, kept.u):
        convolved = mixer.conv1d(branch)[..., : branch.shape[-1]]
        assert torch.allclose(u, torch.nn.functional.silu(convolved), atol=1e-6)
    assert not torch.allclose(kept.u[0], kept.u[1])


@pytorch_on_cpu()
def test_no_hook_and_no_graph_stays_behind(model):
    before = model(byte_tokens(TEXT)).logits
    kept = capture_activations(model, byte_tokens(TEXT))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(t.requires_grad for t in [kept.embeddings, *kept.u, *kept.x_branch])
    assert torch.equal(model(byte_tokens(TEXT)).logits, before)
    with pytest.raises(IndexError):
        capture_activations(model, torch.full((1, 4), 10_000))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_batch_is_kept_row_by_row(model):
    ids = byte_tokens(TEXT, max_tokens=20).repeat(2, 1)
    ids[1] = ids[1].flip(0)
    both = capture_activations(model, ids)
    second = capture_activations(model, ids[1:])
    assert torch.allclose(both.u[2][1:], second.u[2], atol=1e-5)


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "model", lambda m: capture_activations("mamba", byte_tokens("a"))),
        (ValueError, "model", lambda m: capture_activations(torch.nn.Linear(2, 2), byte_tokens("a"))),
        (TypeError, "token_ids", lambda m: capture_activations(m, [1, 2])),
        (ValueError, "token_ids", lambda m: capture_activations(m, torch.zeros(1, 0, dtype=torch.int64))),
        (ValueError, "token_ids", lambda m: capture_activations(m, torch.zeros(1, 3))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(model, error, name, call):
    with pytest.raises(error, match=rf"^{name}: got"):
        call(model)


def test_training_mode_is_refused(model):
    model.train()
    with pytest.raises(ValueError, match=r"^model: got training mode"):
        capture_activations(model, byte_tokens("a"))
    model.eval()
