"""transformers' Mamba on a CPU where mamba-ssm and causal-conv1d are installed, whose kernels refuse CPU tensors."""

import inspect
import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers", minversion="5.15", reason="the models are transformers'")

from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from corey import client_study, routing, training
from corey.activations import capture_activations
from corey.generation import greedy_tokens, prefill
from corey.routing import pytorch_on_cpu, route

FAMILIES = {"mamba": (MambaConfig, MambaForCausalLM), "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM)}
KERNELS = {  # of transformers: the package's name of it, and the package
    "causal_conv1d_fn": ("causal_conv1d_fn", "causal_conv1d"),
    "causal_conv1d_update": ("causal_conv1d_update", "causal_conv1d"),
    "mamba_inner_fn": ("mamba_inner_fn", "mamba_ssm"),
    "mamba_selective_state_update": ("selective_state_update", "mamba_ssm"),
    "mamba_selective_scan": ("selective_scan_fn", "mamba_ssm"),
}
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(params=FAMILIES)
def model(request):
    config, model = FAMILIES[request.param]
    torch.manual_seed(0)
    return model(config(vocab_size=16, hidden_size=32, state_size=4, num_hidden_layers=2)).eval()


def modeling(model):
    return sys.modules[type(model).__module__]


def install_kernels(model, monkeypatch):
    """What transformers does when it is imported beside both packages, done to the model's module now."""
    for package in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for ours, (name, package) in KERNELS.items():

        def kernel(tensor, *args, name=name, **kwargs):
            raise RuntimeError(f"{name}: a kernel on {tensor.device}")

        setattr(sys.modules[package], name, kernel)
        choose = use_kernel_func_from_hub_with_fallback(name, package)
        monkeypatch.setattr(modeling(model), ours, choose(inspect.unwrap(getattr(modeling(model), ours))))


def functions(model):
    return [getattr(modeling(model), name) for name in KERNELS]


def routed(model):
    with route(model), torch.inference_mode():
        first = model(torch.tensor([IDS]), use_cache=True)
        second = model(torch.tensor([[7]]), cache_params=first.cache_params, use_cache=True)
    return torch.cat([first.logits, second.logits], 1)


def trained(model):
    return training.losses(model.train(), torch.tensor([IDS]), torch.tensor([IDS]) > 3)[0].detach()


COMPUTED = {
    "prefill": lambda model: prefill(model, IDS)[0],
    "decode": lambda model: torch.tensor(greedy_tokens(model, IDS, max_new_tokens=4, eos_token_id=None).top2_gaps),
    "routed": routed,
    "trained": trained,
}


@pytest.mark.parametrize("what", COMPUTED)
def test_installed_kernels_change_no_bit_on_a_cpu(what, model, monkeypatch):
    expected = COMPUTED[what](model)
    install_kernels(model, monkeypatch)
    with pytest.raises(RuntimeError, match="a kernel on cpu"):
        model(torch.tensor([IDS]))
    assert torch.equal(COMPUTED[what](model), expected)


@pytest.mark.parametrize("model", ["mamba"], indirect=True)
def test_activations_are_captured_beside_installed_kernels(model, monkeypatch):
    expected = capture_activations(model, torch.tensor([IDS])).u[-1]
    install_kernels(model, monkeypatch)
    assert torch.equal(capture_activations(model, torch.tensor([IDS])).u[-1], expected)


@pytest.mark.parametrize("name", KERNELS)
def test_a_tensor_elsewhere_still_gets_the_kernel(name, model, monkeypatch):
    install_kernels(model, monkeypatch)
    elsewhere = torch.empty(1, device="meta")
    for block in (pytorch_on_cpu(), route(model)):
        with block, pytest.raises(RuntimeError, match=f"{KERNELS[name][0]}: a kernel on meta"):
            getattr(modeling(model), name)(elsewhere)


def test_transformers_functions_come_back_after_an_error_and_in_any_order(model):
    before = functions(model)
    with pytest.raises(KeyError), pytorch_on_cpu():
        assert not set(functions(model)) & set(before)
        raise KeyError
    assert functions(model) == before
    blocks = [pytorch_on_cpu(), route(model), pytorch_on_cpu()]
    for block in blocks:
        block.__enter__()
    for block in blocks:  # the first one in is the first one out, as two threads may have it
        prefill(model, IDS)
        block.__exit__(None, None, None)
    assert functions(model) == before and routing._replaced == {}


def test_a_route_opened_within_a_block_is_the_one_that_scans(model):
    with pytorch_on_cpu(), route(model) as opened:
        prefill(model, IDS)
    assert opened.calls == 2


def test_transformers_own_scan_is_a_kernel_on_a_gpu_with_the_package_only(monkeypatch):
    monkeypatch.setattr(client_study, "find_spec", lambda name: name)
    assert client_study.stock_is_a_kernel("cuda") and not client_study.stock_is_a_kernel("cpu")
    monkeypatch.setattr(client_study, "find_spec", lambda name: None)
    assert not client_study.stock_is_a_kernel("cuda")
