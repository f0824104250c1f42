"""The scan as two public implementations compute it on a CPU, to be timed beside `corey.scan.selective_scan`.

Both take the arguments of `selective_scan` with B and C of shape (B, N, L), from a zero state, and return y (B, D, L).
Neither is needed by anything but a comparison of speed.
"""

import inspect

import torch
import torch.nn.functional as F

from corey._check import bad_value


def scan_minimal(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The way of mamba-minimal: discretise all tokens into (B, L, D, N) tensors, then step through them in Python.

    u, delta, z: (B, D, L). A: (D, N). B, C: (B, N, L). D, delta_bias: (D,). Returns (B, D, L).
    """
    _check_variable(B, C)
    u, step, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))  # (B, L, D) and (B, L, N)
    if delta_bias is not None:
        step = step + delta_bias
    if delta_softplus:
        step = F.softplus(step)
    decay = torch.exp(torch.einsum("bld,dn->bldn", step, A))
    drive = torch.einsum("bld,bln,bld->bldn", step, B, u)

    state = torch.zeros_like(decay[:, 0])  # (B, D, N)
    y = []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + drive[:, t]
        y.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    y = torch.stack(y, dim=1)  # (B, L, D)

    if D is not None:
        y = y + u * D
    y = y.transpose(1, 2)
    return y if z is None else y * F.silu(z)


def scan_transformers(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The PyTorch path of transformers' Mamba (5.15 and later), whichever kernels happen to be installed.

    u, delta, z: (B, D, L). A: (D, N). B, C: (B, N, L). D, delta_bias: (D,). Returns (B, D, L); for half-precision
    inputs in float32, with the state rounded to the dtype of u before its product with C.
    """
    from transformers.models.mamba import modeling_mamba

    _check_variable(B, C)
    pytorch_path = inspect.unwrap(modeling_mamba.mamba_selective_scan)
    return pytorch_path(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)


def _check_variable(B, C):
    for name, value in (("B", B), ("C", C)):
        if value.dim() != 3:
            raise bad_value(name, f"{value.dim()} dimensions", "3: (B, N, L), all that this implementation takes")
