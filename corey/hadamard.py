"""The Walsh-Hadamard rotation, folding it into a projection, and fake quantisation."""

import math

import torch
from torch import Tensor

from corey._check import bad_type, bad_value


def hadamard_transform(x: Tensor) -> Tensor:
    """Rotates the last dimension by the orthonormal Sylvester-Hadamard matrix: z = H x, entries of H are +-1/sqrt(d).

    Args:
        x: (..., n), any leading shape, any strides, any floating dtype. n is padded with zeros to d, the next power
            of two.

    Returns:
        (..., d) in the dtype of `x`, contiguous; the arithmetic is fp64 for fp64 input and fp32 otherwise. All d
        coordinates come back, since cutting them to n would lose energy. H is symmetric and its own inverse, so for
        n = d a second call returns `x`, and the first n coordinates of a second call do so for any n, and the gradient
        of `x` is the transform of the gradient, cut to n. d log2 d additions a row.

    On CUDA, fp32, fp16 and bf16 rows up to d = 32768 take the kernel, which reads `x` where it lies and gives a row the
    same bits alone and in any batch. It is fastest where rows are contiguous and start at multiples of 16 bytes; rows
    whose neighbours are apart in memory are read one value at a time. PyTorch's own operations, one pass over memory
    for each bit of d, compute the rest: other dtypes, wider rows and d = 1.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError, with the install hint, for a CUDA tensor where the
        packages that compile the kernel are missing.
    """
    _check_rows("x", x)
    return torch.ops.corey.hadamard_transform(x)


# ---- the registered operator -----------------------------------------------------------------------------------------

_library = torch.library.Library("corey", "FRAGMENT")  # a reload of this module takes the old registrations with it
torch.library.define(
    "corey::hadamard_transform", "(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,), lib=_library
)


def _transform(x: Tensor) -> Tensor:
    """In PyTorch's operations, on any device."""
    padded = torch.nn.functional.pad(_widened(x), (0, _padding(x.shape[-1])))
    width = padded.shape[-1]
    z = padded
    half = 1
    while half < width:
        pairs = z.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        first, second = pairs.unbind(-2)
        z = torch.stack((first + second, first - second), dim=-2)
        half *= 2
    return (z.reshape(padded.shape) / math.sqrt(width)).to(x.dtype).contiguous()


# As a decorator it leaves None behind.
torch.library.impl("corey::hadamard_transform", "default", _transform, lib=_library)


@torch.library.impl("corey::hadamard_transform", "CUDA", lib=_library)
def _transform_cuda(x: Tensor) -> Tensor:
    from corey import _hadamard_cuda  # `import corey` must not need CUDA

    width = x.shape[-1] + _padding(x.shape[-1])
    return _hadamard_cuda.transform(x, width) if _hadamard_cuda.covers(x, width) else _transform(x)


@torch.library.register_fake("corey::hadamard_transform", lib=_library)
def _transform_fake(x: Tensor) -> Tensor:
    n = int(x.shape[-1])  # a compiled graph is for one n: d is a step function of it
    return x.new_empty((*x.shape[:-1], n + _padding(n)))


def _remember_width(ctx, inputs, output):
    ctx.n = inputs[0].shape[-1]


def _transform_backward(ctx, gradient: Tensor) -> Tensor:
    return torch.ops.corey.hadamard_transform(gradient)[..., : ctx.n]


torch.library.register_autograd(
    "corey::hadamard_transform", _transform_backward, setup_context=_remember_width, lib=_library
)


def fold_into_projection(weight: Tensor) -> Tensor:
    """W' = W H^T, so that W' (H x) = W x: the rotation of the input moves into the weight.

    Args:
        weight: (out_features, n), floating.

    Returns:
        (out_features, d), d the next power of two, in the dtype of `weight`. H is symmetric, so this rotates every row.
    """
    _check_rows("weight", weight)
    if weight.ndim != 2:
        raise bad_value("weight", f"shape {tuple(weight.shape)}", "(out_features, in_features)")
    return hadamard_transform(weight)


def faulty_transform_ref(x: Tensor) -> Tensor:
    """The published routine behind the real-activation result, kept only to show what it measures.

    Two faults. The butterfly holds the two halves of each pair as views and writes the sum into the first half before
    it forms the difference, so the second half becomes ((a + b)/sqrt2 - b)/sqrt2 in place of (a - b)/sqrt2; the map is
    not orthogonal and keeps a share (0.646)^log2(d) of Gaussian energy (a norm ratio of .09 at d = 2048). After zero
    padding it returns only the first n coordinates, which drops more.

    Args:
        x: (..., n), floating.

    Returns:
        (..., n) in the dtype of `x`.
    """
    _check_rows("x", x)
    width = x.shape[-1]
    h = torch.nn.functional.pad(_widened(x), (0, _padding(width))).clone()
    half = 1
    while half < h.shape[-1]:
        pairs = h.view(*x.shape[:-1], h.shape[-1] // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]  # views: the next line changes `first` under the one after
        pairs[..., 0, :] = (first + second) / math.sqrt(2.0)
        pairs[..., 1, :] = (first - second) / math.sqrt(2.0)
        half *= 2
    return h[..., :width].to(x.dtype)


def outlier_fraction(x: Tensor, threshold: float = 6.0) -> float:
    """Share of values further than `threshold` standard deviations from the mean of all values of `x`."""
    _check_rows("x", x)
    if not threshold > 0:
        raise bad_value("threshold", threshold, "a positive number of standard deviations")
    values = _widened(x)
    return float(((values - values.mean()).abs() > threshold * values.std(correction=0)).double().mean())


def fake_quantise(x: Tensor, bits: int, *, dim: int | None = None) -> Tensor:
    """Rounds to a symmetric signed grid of 2^bits - 1 levels and returns the rounded values in real units.

    scale = max|x| / (2^(bits-1) - 1); x_q = scale round(x / scale), halves to even.

    Args:
        x: floating, any shape.
        bits: 2 to 16.
        dim: None takes one scale for the tensor; a dimension takes the maximum along it, so one scale per slice.

    Returns:
        The shape and dtype of `x`. A slice of zeros stays zero.
    """
    if not isinstance(x, Tensor):
        raise bad_type("x", x, "a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"x: got a tensor of {x.dtype}, want a floating dtype")
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise bad_type("bits", bits, "an int")
    if not 2 <= bits <= 16:
        raise bad_value("bits", bits, "2 to 16")
    if dim is not None and not -x.ndim <= dim < x.ndim:
        raise bad_value("dim", dim, f"None or a dimension of a {x.ndim}-dimensional tensor")
    if x.numel() == 0:
        return x.clone()
    values = _widened(x)
    largest = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    scale = largest / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, torch.round(values / scale) * scale, 0.0).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _padding(width: int) -> int:
    return (1 << (width - 1).bit_length()) - width


def _check_rows(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise bad_type(name, x, "a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name}: got a tensor of {x.dtype}, want a floating dtype")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise bad_value(name, f"shape {tuple(x.shape)}", "a last dimension of at least 1")
