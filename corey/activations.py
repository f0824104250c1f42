"""What flows through a transformers Mamba model, caught by forward hooks: embeddings, branch inputs and scan inputs."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corey._check import bad_type, bad_value
from corey.routing import pytorch_on_cpu


@dataclass(frozen=True)
class Activations:
    """One prefill. Lists have one tensor a layer, in layer order, in the dtype and on the device of the model.

    embeddings: (B, L, d_model), the model's input embeddings.
    x_branch: (B, D, L) each, the half of in_proj's output that enters the convolution.
    u: (B, D, L) each, after convolution and SiLU: the input of x_proj and of the scan.
    """

    embeddings: Tensor
    x_branch: list[Tensor]
    u: list[Tensor]


@pytorch_on_cpu()
def capture_activations(model: nn.Module, token_ids: Tensor) -> Activations:
    """Runs one forward pass without a cache and keeps what `Activations` lists.

    Args:
        model: a transformers MambaForCausalLM or MambaModel in eval mode.
        token_ids: (B, L) int64 on the model's device, without padding.

    The hooks are gone again when this returns, also after an error. In memory this keeps 2 B D L numbers a layer.
    """
    _check_inputs(model, token_ids)
    embeddings: list[Tensor] = []
    x_branch: list[Tensor] = []
    u: list[Tensor] = []
    with ExitStack() as hooks:
        handle = model.get_input_embeddings().register_forward_hook(
            lambda m, args, out: embeddings.append(out.detach())
        )
        hooks.callback(handle.remove)
        for mixer in mamba_mixers(model):
            half = mixer.intermediate_size
            hooks.callback(mixer.in_proj.register_forward_hook(_keep_output(x_branch, half)).remove)
            hooks.callback(mixer.x_proj.register_forward_pre_hook(_keep_input(u)).remove)
        with torch.no_grad():
            model(input_ids=token_ids, use_cache=False)
    return Activations(embeddings[0], x_branch, u)


def mamba_mixers(model: nn.Module) -> list[nn.Module]:
    """The MambaMixer of every layer, in order."""
    return list(_mixers(model))


def _mixers(model: nn.Module) -> Iterator[nn.Module]:
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return (module for module in model.modules() if isinstance(module, MambaMixer))


def _keep_output(store: list[Tensor], half: int):
    return lambda module, args, out: store.append(out.detach()[..., :half].transpose(1, 2))  # (B, D, L)


def _keep_input(store: list[Tensor]):
    return lambda module, args: store.append(args[0].detach().transpose(1, 2))  # (B, D, L)


def _check_inputs(model: object, token_ids: object) -> None:
    if not isinstance(model, nn.Module):
        raise bad_type("model", model, "a transformers Mamba model")
    if not mamba_mixers(model):
        raise bad_value("model", type(model).__name__, "a transformers model with MambaMixer layers")
    if model.training:
        raise bad_value("model", "training mode", "model.eval(), since a fused training path skips the hooked modules")
    if not isinstance(token_ids, Tensor):
        raise bad_type("token_ids", token_ids, "a torch.Tensor")
    if token_ids.ndim != 2 or token_ids.numel() == 0 or token_ids.dtype != torch.int64:
        raise bad_value("token_ids", f"{token_ids.dtype} {tuple(token_ids.shape)}", "int64 (B, L), not empty")
