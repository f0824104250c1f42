"""What selective_scan accepts, checked in one place for the operator, its fake kernel and the reference."""

import torch

from corey import _operands
from corey._check import bad_type, bad_value

TILE = 128  # tokens: the unit of arithmetic; a chunk is a whole number of tiles
MAX_STATES = 256
COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REFERENCE_DTYPES = (*COMPILED_DTYPES, torch.float64)

_OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def check_types(tensors, delta_softplus, return_last_state):
    """Tensors are strided tensors and flags are bools. `tensors` maps argument names to values."""
    optional = {name: tensors[name] for name in _OPTIONAL}
    _operands.check_types({name: x for name, x in tensors.items() if name not in optional}, optional)
    for name, value in (("delta_softplus", delta_softplus), ("return_last_state", return_last_state)):
        if not isinstance(value, bool):
            raise bad_type(name, value, "a bool")


def check_chunk_size(chunk_size, *, multiple_of, device=None):
    """A positive int, a multiple of `multiple_of` tokens; for a CUDA `device` also a 0-dim int32 tensor on it."""
    if isinstance(chunk_size, torch.Tensor):
        if device is None or device.type != "cuda":
            raise TypeError(
                f"chunk_size: got a tensor on {chunk_size.device}, want an int or None; a choice kept on the device is "
                "for scans on CUDA"
            )
        if chunk_size.device != device or chunk_size.dtype != torch.int32 or chunk_size.dim() != 0:
            got = f"a {chunk_size.dtype} tensor of shape {tuple(chunk_size.shape)} on {chunk_size.device}"
            raise bad_value("chunk_size", got, f"an int, None or a 0-dim torch.int32 tensor on {device}")
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | torch.SymInt):
        raise bad_type("chunk_size", chunk_size, "an int")
    if chunk_size <= 0 or chunk_size % multiple_of != 0:
        tile = f"a positive multiple of the {multiple_of}-token tile"
        raise bad_value("chunk_size", chunk_size, tile if multiple_of > 1 else "a positive number of tokens")


def _check_tensor(name, value, want, sizes, dtypes, device):
    """One tensor's device, dtype and shape. `want` names the axes and `sizes` gives their lengths."""
    if value.device != device:
        raise bad_value(name, f"a tensor on {value.device}", f"one on {device}, where u is")
    if value.dtype.is_complex:
        raise bad_value(name, str(value.dtype), "a real dtype: the complex scan of S4 is not supported")
    if value.dtype not in dtypes:
        raise bad_value(name, str(value.dtype), "one of " + ", ".join(str(dtype) for dtype in dtypes))
    if tuple(value.shape) != tuple(sizes):
        raise bad_value(name, f"shape {tuple(value.shape)}", f"{want} = {tuple(sizes)}")


def _check_projection(name, value, batch, dim, length, states, dtypes, device):
    """B or C: (B, N, L), (B, G, N, L) with D a multiple of G, or constant (D, N)."""
    if value.dim() == 2:
        want, sizes = "(D, N)", (dim, states)
    elif value.dim() == 3:
        want, sizes = "(B, N, L)", (batch, states, length)
    elif value.dim() == 4:
        want, sizes = "(B, G, N, L)", (batch, value.shape[1], states, length)
    else:
        raise bad_value(name, f"{value.dim()} dimensions", "(B, N, L), (B, G, N, L) or (D, N)")
    _check_tensor(name, value, want, sizes, dtypes, device)
    if value.dim() == 4 and (value.shape[1] == 0 or dim % value.shape[1] != 0):
        raise bad_value(name, f"{value.shape[1]} groups", f"a number of groups that divides the {dim} channels of u")


def check_tensors(u, delta, A, B, C, D, z, delta_bias, initial_state, *, reference=False):
    """Devices, dtypes and shapes of all tensors, against u and A.

    The compiled kernels take A, D, delta_bias and initial_state in float32, as mamba_ssm does. With `reference`,
    float64 is allowed and these may be of any floating dtype.
    """
    dtypes = REFERENCE_DTYPES if reference else COMPILED_DTYPES
    weights = REFERENCE_DTYPES if reference else (torch.float32,)
    device = u.device
    if u.dtype.is_complex:
        raise bad_value("u", str(u.dtype), "a real dtype")
    if u.dtype not in dtypes:
        hint = "" if reference else " (selective_scan_ref also computes in torch.float64)"
        raise bad_value("u", str(u.dtype), "one of " + ", ".join(str(dtype) for dtype in dtypes) + hint)
    if u.dim() != 3:
        raise bad_value("u", f"{u.dim()} dimensions", "3: (B, D, L)")
    if A.dim() != 2:
        raise bad_value("A", f"{A.dim()} dimensions", "2: (D, N)")
    batch, dim, length = u.shape
    states = A.shape[1]
    if not 1 <= states <= MAX_STATES:
        raise bad_value("A", f"{states} states", f"1 to {MAX_STATES}")
    _check_tensor("delta", delta, "(B, D, L)", (batch, dim, length), dtypes, device)
    _check_tensor("A", A, "(D, N)", (dim, states), weights, device)
    _check_projection("B", B, batch, dim, length, states, dtypes, device)
    _check_projection("C", C, batch, dim, length, states, dtypes, device)
    if B.dim() == 4 and C.dim() == 4 and B.shape[1] != C.shape[1]:
        raise bad_value("C", f"{C.shape[1]} groups", f"the {B.shape[1]} groups of B")
    if D is not None:
        _check_tensor("D", D, "(D,)", (dim,), weights, device)
    if z is not None:
        _check_tensor("z", z, "(B, D, L)", (batch, dim, length), dtypes, device)
    if delta_bias is not None:
        _check_tensor("delta_bias", delta_bias, "(D,)", (dim,), weights, device)
    if initial_state is not None:
        _check_tensor("initial_state", initial_state, "(B, D, N)", (batch, dim, states), weights, device)
