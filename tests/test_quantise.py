"""Quantised projections: exact where nothing is rounded, coarser with fewer bits, and gone after the block."""

import pytest
import torch
from byte_ids import byte_tokens
from transformers import MambaConfig, MambaForCausalLM

from corey.hadamard import fake_quantise
from corey.quantise import QuantisedLinear, quantised, relative_error
from corey.routing import pytorch_on_cpu

IDS = byte_tokens("The carrier for entry nine is Falcon.")


@pytest.fixture(scope="module")
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4, conv_kernel=4, expand=2)
    return MambaForCausalLM(config).eval()


@pytorch_on_cpu()
def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("rotate", [False, True])
def test_fine_grids_leave_the_logits_and_coarse_ones_move_them(model, rotate):
    exact = logits(model)
    errors = {}
    for weight_bits, activation_bits in ((16, 16), (8, 8), (4, 8)):
        with quantised(model, weight_bits=weight_bits, activation_bits=activation_bits, rotate=rotate):
            errors[weight_bits] = relative_error(logits(model), exact)
    assert errors[16] < 1e-3 < errors[8] < errors[4]


def test_the_model_is_itself_again_after_the_block_and_after_an_error(model):
    exact = logits(model)
    with pytest.raises(RuntimeError), quantised(model, weight_bits=4, activation_bits=8, rotate=True):
        assert not torch.equal(logits(model), exact)
        raise RuntimeError
    assert torch.equal(logits(model), exact)


def test_only_the_named_projections_are_replaced(model):
    with quantised(model, weight_bits=4, activation_bits=8, rotate=False, projections=("out_proj",)):
        mixer = model.backbone.layers[0].mixer
        assert isinstance(mixer.out_proj, QuantisedLinear) and isinstance(mixer.in_proj, torch.nn.Linear)


def test_a_rotated_outlier_channel_costs_less():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=generator)
    x[:, 5] *= 100.0
    linear = torch.nn.Linear(128, 96)
    with torch.no_grad():
        linear.weight[:, 5] *= 0.01  # so that the output does not consist of the outlier
        errors = [
            relative_error(QuantisedLinear(linear, weight_bits=8, activation_bits=8, rotate=r)(x), linear(x))
            for r in (False, True)
        ]
    assert errors[1] < errors[0] / 2


def test_the_unrotated_layer_is_the_plain_formula():
    x, linear = torch.rand(3, 8), torch.nn.Linear(8, 4)
    expected = fake_quantise(x, 8) @ fake_quantise(linear.weight, 4).T + linear.bias
    assert torch.allclose(QuantisedLinear(linear, weight_bits=4, activation_bits=8, rotate=False)(x), expected)


def test_bad_arguments_are_named(model):
    options = {"weight_bits": 8, "activation_bits": 8, "rotate": False}
    with pytest.raises(ValueError, match=r"^model: got"), quantised(torch.nn.Linear(2, 2), **options):
        pass
    with pytest.raises(ValueError, match=r"^projections: got"), quantised(model, projections=("x_proj",), **options):
        pass
    with pytest.raises(ValueError, match=r"^bits: got"), quantised(model, **(options | {"weight_bits": 1})):
        pass
    with pytest.raises(TypeError, match=r"^linear: got"):
        QuantisedLinear(torch.nn.Conv1d(1, 1, 1), **options)
    with pytest.raises(ValueError, match=r"^measured: got"):
        relative_error(torch.rand(2), torch.rand(3))
