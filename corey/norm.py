"""The residual sum and the root-mean-square norm between two layers of Mamba, in one pass over memory.

h = residual + x                                      float32
y = weight * h / sqrt(mean(h^2) + eps)                over the last dimension, rounded once, to x's dtype
"""

import torch
from torch import Tensor

from corey._check import bad_type, bad_value
from corey._operands import DTYPES, check_dtype, check_operand, check_types, refuse_gradient


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(y, h): the norm of the sum, and the sum, which is the residual of the next layer.

    x: (..., D) in float32, float16 or bfloat16, the last layer's output. residual: as x in float32; zero when None.
    weight: (D,) in x's dtype. eps: a positive number. On CUDA D is at most 8192.

    Both results are contiguous, y in x's dtype and h in float32. Arithmetic is float32 with one rounding at the end, as
    in mamba_ssm's fused norm and transformers' last one; transformers' norm inside a block rounds h and y / weight too.
    A row comes out the same alone and in any batch. On CUDA one launch, which reads rows where they lie if their
    elements are neighbours and the rows evenly spaced, and copies first otherwise.

    Raises TypeError or ValueError naming the argument, and RuntimeError for inputs that require grad while grad is
    enabled, as there is no backward.
    """
    check_types({"x": x, "weight": weight}, {"residual": residual})
    if not isinstance(eps, float):
        raise bad_type("eps", eps, "a float")
    if not 0.0 < eps < float("inf"):
        raise bad_value("eps", eps, "a positive number")
    if torch.is_grad_enabled():
        refuse_gradient("add_rms_norm", {"x": x, "residual": residual, "weight": weight})
    return torch.ops.corey.add_rms_norm(x, residual, weight, eps)


def add_rms_norm_ref(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The equations at the top of this file in plain PyTorch: any device and floating dtype, differentiable.

    Arithmetic and h are float64 when x is, else float32.
    """
    check_types({"x": x, "weight": weight}, {"residual": residual})
    _check(x, residual, weight, dtypes=(*DTYPES, torch.float64), exact=(*DTYPES, torch.float64))
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(work) if residual is None else residual.to(work) + x.to(work)  # (..., D)
    scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    return (h * scale * weight.to(work)).to(x.dtype), h


# ---- the registered operator -----------------------------------------------------------------------------------------

_library = torch.library.Library("corey", "FRAGMENT")  # a reload of this module takes the old registrations with it
torch.library.define(
    "corey::add_rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
    lib=_library,
)


@torch.library.impl("corey::add_rms_norm", "CPU", lib=_library)
def _norm_cpu(x, residual, weight, eps):
    _check(x, residual, weight)
    y, h = add_rms_norm_ref(x, residual, weight, eps)
    if h.data_ptr() == x.data_ptr():  # float32 without a residual: results share no memory with arguments
        h = h.clone()
    return y.contiguous(), h.contiguous()


@torch.library.impl("corey::add_rms_norm", "CUDA", lib=_library)
def _norm_cuda(x, residual, weight, eps):
    from corey import _norm_cuda

    return _norm_cuda.norm(x, residual, weight, eps, _check)


@torch.library.register_fake("corey::add_rms_norm", lib=_library)
def _norm_fake(x, residual, weight, eps):
    _check(x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)


def _check(x, residual, weight, dtypes=DTYPES, exact=(torch.float32,)):
    check_dtype("x", x, dtypes)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise bad_value("x", f"shape {tuple(x.shape)}", "a last dimension of at least 1")
    check_operand("residual", residual, "the shape of x", x.shape, x.device, exact)
    check_operand("weight", weight, "(D,)", x.shape[-1:], x.device, (x.dtype,))
