"""Checks of one tensor argument, shared by the operators; every refusal names the argument."""

import torch

from corey._check import bad_type, bad_value

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPP_TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def check_types(required, optional):
    """Both map names to arguments: strided tensors, and the optional ones may be None."""
    for name, value in (*required.items(), *optional.items()):
        if value is None and name in optional:
            continue
        if not isinstance(value, torch.Tensor):
            raise bad_type(name, value, "a torch.Tensor or None" if name in optional else "a torch.Tensor")
        if value.layout != torch.strided:
            raise bad_value(name, f"a tensor of layout {value.layout}", "a dense (strided) tensor")


def check_dtype(name, value, dtypes=DTYPES):
    if value.dtype not in dtypes:
        raise bad_value(name, str(value.dtype), "one of " + ", ".join(str(dtype) for dtype in dtypes))


def check_operand(name, value, axes, sizes, device, dtypes=DTYPES):
    """None, or a tensor of this shape, on this device. `axes` names what `sizes` counts, e.g. "(B, D)"."""
    if value is None:
        return
    if value.device != device:
        raise bad_value(name, f"a tensor on {value.device}", f"one on {device}, where x is")
    check_dtype(name, value, dtypes)
    if tuple(value.shape) != tuple(sizes):
        raise bad_value(name, f"shape {tuple(value.shape)}", f"{axes} = {tuple(sizes)}")


def check_writable(name, value):
    """An updated tensor has one place in memory for every element."""
    if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride())):
        raise bad_value(name, f"an expanded tensor of strides {value.stride()}", "a place of its own for every element")


def refuse_gradient(operator, tensors):
    """There is no backward, and output that silently forgets its inputs would train a wrong model."""
    asking = [name for name, value in tensors.items() if value is not None and value.requires_grad]
    if asking:
        raise RuntimeError(
            f"{asking[0]}: requires grad, and {operator} has no backward in this version; call it under "
            f"torch.no_grad(), or use {operator}_ref, which autograd differentiates"
        )
