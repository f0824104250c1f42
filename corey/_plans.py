"""Plans of CUDA calls: what a call's launches need but the addresses, made once and found by what it depends on.

Most calls are like an earlier one, and then finding the plan is most of what the host does. To read shape, strides,
dtype and device of nine tensors takes Python longer than all else together, so torch's guards compare them with those
of the earlier call, in C++; results come from Inductor's allocation, in half the time of torch.empty_strided. Neither
is public: where one is missing, nothing is kept, and calls are as right and slower.
"""

import torch

from corey import _cuda

try:
    from torch._C._dynamo.guards import TensorGuards
    from torch._C._dynamo.guards import _empty_strided_cuda as empty  # (shape, strides, dtype), on the current device
except ImportError:
    TensorGuards = empty = None

_MOST, _MOST_LAYOUTS = 4096, 8  # a server meets ever new lengths


class _Absent(torch.Tensor):
    """A type that no argument has."""


# In the place of None, since guards compare tensors. Several, since guards refuse a tensor that comes twice.
ABSENT = tuple(torch.empty(0).as_subclass(_Absent) for _ in range(5))
_PLAIN = (torch.Tensor, torch.nn.Parameter, _Absent)


def is_eager(x):
    """Whether x is on a GPU and nobody else is to see a call with it: no compiler, tracer, mode or transform."""
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and x.is_cuda
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
    )


def alignment(a, b, c=0, d=0, e=0, f=0, g=0, h=0, i=0, j=0):
    """0 where all addresses are multiples of 16, as they nearly always are; else what each is beyond one."""
    odd = (a | b | c | d | e | f | g | h | i | j) & 15
    return odd and tuple(address & 15 for address in (a, b, c, d, e, f, g, h, i, j))


class Plans:
    """Those of one operator. A plan has a `version`, that of the sources, and holds while this is the current one."""

    def __init__(self):
        self._made = {}
        self._kept = {}

    def clear(self):
        self._made.clear()
        self._kept.clear()

    def get(self, options, tensors, make):
        """The plan for these options and tensors (or None in their place), from `make`, which checks them, if new."""
        key = _key(options, tensors)
        plan = self._made.get(key)
        if plan is None or plan.version != _cuda.source_version():
            if len(self._made) >= _MOST:
                self._made.clear()
            plan = self._made[key] = make()
        return plan

    def known(self, options, tensors):
        """The plan that `get` would not make, or None, also where a gradient is wanted or arguments are no tensors."""
        try:
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None):
                return None
            plan = self._made.get(_key(options, tensors))
        except (AttributeError, TypeError, RuntimeError):
            return None
        return None if plan is None or plan.version != _cuda.source_version() else plan

    def find(self, options, tensors):
        """The plan kept for equal options and like tensors, and what `empty` needs for each result; else None.

        Like are tensors of the same types, shapes, strides, dtypes and device. None too where the call needs more than
        a launch on the current device: a source has changed, a gradient is wanted, or torch is to fill new memory.
        """
        for alike, wants_grad, device, plan, results in self._kept.get(options, ()):
            if alike(*tensors):
                if (
                    plan.version != _cuda.source_version()
                    or device != torch._C._cuda_getDevice()
                    or (wants_grad and torch.is_grad_enabled())
                    or torch._C._get_deterministic_algorithms()
                ):
                    return None
                return plan, results
        return None

    def keep(self, plan, results, options, tensors):
        """Lets `find` have the plan of this call, whose results these are. The tensors' device is current."""
        if TensorGuards is None or any(type(x) not in _PLAIN for x in tensors):
            return
        alike = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        if torch._C._get_deterministic_algorithms() or not alike(*tensors):  # never alike: a tensor that comes twice
            return
        if len(self._kept) >= _MOST:
            self._kept.clear()
        wants_grad = any(x.requires_grad for x in tensors)
        made = tuple((tuple(x.shape), x.stride(), x.dtype) for x in results)
        kept = (alike, wants_grad, tensors[0].get_device(), plan, made)
        self._kept[options] = (kept, *self._kept.get(options, ()))[:_MOST_LAYOUTS]


def _key(options, tensors):
    return (*options, *[x if x is None else _layout(x) for x in tensors])


def _layout(x):
    return x.shape, x.stride(), x.dtype, x.data_ptr() & 15, x.get_device()
