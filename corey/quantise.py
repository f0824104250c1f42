"""Fake-quantised projections of a transformers Mamba model, with and without the Hadamard rotation folded in."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from corey._check import bad_type, bad_value
from corey.activations import mamba_mixers
from corey.hadamard import fake_quantise, fold_into_projection, hadamard_transform

PROJECTIONS = ("in_proj", "out_proj")


class QuantisedLinear(nn.Module):
    """y = Q(x) Q(W)^T + b, or with the rotation Q(Hx) Q(W H^T)^T + b, which without rounding is the same y.

    Q rounds to a symmetric grid with one scale a tensor: weights once, inputs (..., in_features) at every call.
    """

    def __init__(self, linear: nn.Linear, *, weight_bits: int, activation_bits: int, rotate: bool):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise bad_type("linear", linear, "a torch.nn.Linear")
        weight = linear.weight.detach()
        self.register_buffer("weight", fake_quantise(fold_into_projection(weight) if rotate else weight, weight_bits))
        self.bias = linear.bias
        self.activation_bits = activation_bits
        self.rotate = rotate

    def forward(self, x: Tensor) -> Tensor:
        x = hadamard_transform(x) if self.rotate else x
        return nn.functional.linear(fake_quantise(x, self.activation_bits), self.weight, self.bias)


@contextmanager
def quantised(
    model: nn.Module,
    *,
    weight_bits: int,
    activation_bits: int,
    rotate: bool,
    projections: tuple[str, ...] = PROJECTIONS,
) -> Iterator[nn.Module]:
    """Runs `model` with the named projections of every MambaMixer fake-quantised; puts them back on exit."""
    mixers = mamba_mixers(model)
    if not mixers:
        raise bad_value("model", type(model).__name__, "a transformers model with MambaMixer layers")
    if unknown := set(projections) - set(PROJECTIONS):
        raise bad_value("projections", sorted(unknown), f"some of {PROJECTIONS}")
    kept = [(mixer, name, getattr(mixer, name)) for mixer in mixers for name in projections]
    options = {"weight_bits": weight_bits, "activation_bits": activation_bits, "rotate": rotate}
    replaced = [QuantisedLinear(linear, **options) for _, _, linear in kept]
    try:
        for (mixer, name, _), module in zip(kept, replaced):
            setattr(mixer, name, module)
        yield model
    finally:
        for mixer, name, linear in kept:
            setattr(mixer, name, linear)


def relative_error(measured: Tensor, exact: Tensor) -> float:
    """||measured - exact|| / ||exact|| over all entries, in fp64."""
    if measured.shape != exact.shape:
        raise bad_value("measured", f"shape {tuple(measured.shape)}", f"that of exact, {tuple(exact.shape)}")
    return float((measured.double() - exact.double()).norm() / exact.double().norm())
