"""One token of the selective scan, for decode: every channel's state moves on and gives an output.

For every batch row and channel d, with N states a channel:

    step = softplus(dt + dt_bias)
    h    = exp(step * A[d]) * h + step * x * B                         h: N numbers, updated in place
    y    = (sum_n h[n] * C[n] + D[d] * x) * silu(z)
"""

import torch
import torch.nn.functional as F

from corey import _state_update_cuda
from corey._check import bad_type, bad_value
from corey._operands import DTYPES, check_dtype, check_operand, check_types, check_writable, refuse_gradient
from corey._plans import is_eager

MAX_STATES = 256


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """Takes what mamba_ssm's function of this name takes for one head, in the same order.

    state: (B, D, N) float32, N from 1 to 256, any strides; updated in place.
    x, dt, z: (B, D). A: (D, N) float32. B, C: (B, N), or (B, G, N) where G divides D. D, dt_bias: (D,).
        All but state and A in float32, float16 or bfloat16, each in its own; arithmetic is float32.
    dt_softplus: apply softplus to dt + dt_bias.

    Returns y (B, D) in x's dtype. State and y agree with `selective_scan` of length 1 to float32 rounding, not bitwise:
    the scan sums over the states in another order. One launch on CUDA, bound by reading and writing the state.

    Raises TypeError or ValueError naming the argument, and RuntimeError for inputs that require grad while grad is
    enabled, as there is no backward.
    """
    if isinstance(dt_softplus, bool) and is_eager(x):
        y = _state_update_cuda.update_again(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        if y is not None:
            return y
    required, optional = _named(state, x, dt, A, B, C, D, z, dt_bias)
    check_types(required, optional)
    if not isinstance(dt_softplus, bool):
        raise bad_type("dt_softplus", dt_softplus, "a bool")
    if torch.is_grad_enabled():
        refuse_gradient("selective_state_update", required | optional)
    return torch.ops.corey.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """The equations at the top of this file in plain PyTorch; returns (y, new state) and changes nothing.

    Arguments as in `selective_state_update`, on any device and differentiable. Arithmetic and the new state are float64
    when x is, else float32; the tensors may be of any floating dtype.
    """
    required, optional = _named(state, x, dt, A, B, C, D, z, dt_bias)
    check_types(required, optional)
    dtypes = (*DTYPES, torch.float64)
    _check(state, x, dt, A, B, C, D, z, dt_bias, dtypes=dtypes, exact=dtypes)
    return _reference(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _reference(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, step = x.to(work), dt.to(work)  # (B, D)
    if dt_bias is not None:
        step = step + dt_bias.to(work)
    if dt_softplus:
        step = F.softplus(step)
    h = torch.exp(step[..., None] * A.to(work)) * state.to(work)  # (B, D, N)
    h = h + (step * u)[..., None] * _of_channels(B.to(work), x.shape[1])
    y = (h * _of_channels(C.to(work), x.shape[1])).sum(-1)
    if D is not None:
        y = y + D.to(work) * u
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(x.dtype), h


def _of_channels(projection, dim):
    """B or C, (B, N) or (B, G, N), ready to broadcast against (B, D, N)."""
    if projection.dim() == 2:
        return projection[:, None]
    return projection.repeat_interleave(dim // projection.shape[1], dim=1)


# ---- the registered operator -----------------------------------------------------------------------------------------

_library = torch.library.Library("corey", "FRAGMENT")  # a reload of this module takes the old registrations with it
torch.library.define(
    "corey::selective_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
    lib=_library,
)


@torch.library.impl("corey::selective_state_update", "CPU", lib=_library)
def _update_cpu(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    y, new_state = _reference(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    state.copy_(new_state)
    return y.contiguous()


@torch.library.impl("corey::selective_state_update", "CUDA", lib=_library)
def _update_cuda(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return _state_update_cuda.update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, _check)


@torch.library.register_fake("corey::selective_state_update", lib=_library)
def _update_fake(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    return x.new_empty(x.shape)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _named(state, x, dt, A, B, C, D, z, dt_bias):
    return {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C}, {"D": D, "z": z, "dt_bias": dt_bias}


def _check(state, x, dt, A, B, C, D, z, dt_bias, dtypes=DTYPES, exact=(torch.float32,)):
    check_dtype("x", x, dtypes)
    if x.dim() != 2:
        raise bad_value("x", f"{x.dim()} dimensions", "2: (B, D)")
    if A.dim() != 2:
        raise bad_value("A", f"{A.dim()} dimensions", "2: (D, N)")
    batch, dim = x.shape
    states = A.shape[1]
    if not 1 <= states <= MAX_STATES:
        raise bad_value("A", f"{states} states", f"1 to {MAX_STATES}")
    check_operand("A", A, "(D, N)", (dim, states), x.device, exact)
    check_operand("state", state, "(B, D, N)", (batch, dim, states), x.device, exact)
    check_writable("state", state)
    check_operand("dt", dt, "(B, D)", (batch, dim), x.device, dtypes)
    for name, projection in (("B", B), ("C", C)):
        if projection.dim() == 3:
            groups = projection.shape[1]
            check_operand(name, projection, "(B, G, N)", (batch, groups, states), x.device, dtypes)
            if groups == 0 or dim % groups != 0:
                raise bad_value(name, f"{groups} groups", f"a number of groups that divides the {dim} channels of x")
        elif projection.dim() == 2:
            check_operand(name, projection, "(B, N)", (batch, states), x.device, dtypes)
        else:
            raise bad_value(name, f"{projection.dim()} dimensions", "(B, N) or (B, G, N)")
    if B.dim() == 3 and C.dim() == 3 and B.shape[1] != C.shape[1]:
        raise bad_value("C", f"{C.shape[1]} groups", f"the {B.shape[1]} groups of B")
    check_operand("D", D, "(D,)", (dim,), x.device, dtypes)
    check_operand("z", z, "(B, D)", (batch, dim), x.device, dtypes)
    check_operand("dt_bias", dt_bias, "(D,)", (dim,), x.device, dtypes)
