"""The causal depthwise convolution in front of Mamba's scan: prefill, and one token of decode against a cached state.

    y[b, d, t] = act(bias[d] + sum_k weight[d, k] x[b, d, t - (W - 1) + k])    k = 0 .. W - 1, act the identity or SiLU

Inputs before the first token come from the state, or are zero. The state is the last W - 1 inputs, oldest first.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from corey import _conv_cuda
from corey._check import bad_type, bad_value
from corey._operands import DTYPES, check_dtype, check_operand, check_types, check_writable, refuse_gradient
from corey._plans import is_eager
from corey.chunk_rules import ChunkRule, _least_entropies
from corey.entropy import histogram_entropy

WIDTHS = (2, 3, 4)


@dataclass(frozen=True)
class OutputHistogram:
    """Asks `causal_conv1d` for the histogram entropy of its output on the way.

    range: the fixed ends (lo, hi) of the bins. num_bins: at least 2. rule: picks a chunk from the entropy, or None.
    stride: counts every `stride`-th token from the first on, y[..., ::stride].
    """

    range: tuple[float, float]
    num_bins: int = 256
    rule: ChunkRule | None = None
    stride: int = 1
    least: tuple[float, ...] = field(
        init=False, repr=False, compare=False
    )  # entropies at which the rule's chunk doubles

    def __post_init__(self):
        if not isinstance(self.num_bins, int) or isinstance(self.num_bins, bool):
            raise bad_type("num_bins", self.num_bins, "an int")
        if self.num_bins < 2:
            raise bad_value("num_bins", self.num_bins, "at least 2")
        if not isinstance(self.range, tuple | list):
            raise bad_type("range", self.range, "a pair (lo, hi)")
        ends = tuple(self.range)
        if len(ends) != 2 or not all(math.isfinite(end) for end in ends) or not ends[0] < ends[1]:
            raise bad_value("range", self.range, "a pair (lo, hi) of finite numbers with lo < hi")
        if self.rule is not None and not isinstance(self.rule, ChunkRule):
            raise bad_type("rule", self.rule, "a corey.chunk_rules.ChunkRule or None")
        if not isinstance(self.stride, int) or isinstance(self.stride, bool):
            raise bad_type("stride", self.stride, "an int")
        if not 1 <= self.stride < 2**31:
            raise bad_value("stride", self.stride, "from 1 to 2^31 - 1 tokens")
        object.__setattr__(self, "least", () if self.rule is None else _least_entropies(self.rule))


class OutputStatistic(NamedTuple):
    """Both on the device of the output."""

    entropy_nats: torch.Tensor  # 0-dim fp32
    chunk_size: torch.Tensor | None  # 0-dim int32, in tokens; None without a rule


def causal_conv1d(
    x,
    weight,
    bias=None,
    activation=None,
    *,
    initial_state=None,
    return_last_state=False,
    histogram=None,
):
    """Causal depthwise convolution of width 2 to 4, optionally with SiLU; names as in the causal_conv1d package.

    x: (B, D, L) in float32, float16 or bfloat16, any strides. Token-major views, `x.transpose(1, 2)` of a (B, L, D)
        tensor, are as fast as channel-major ones and never copied.
    weight: (D, W), bias: (D,), of one dtype, which may be another than x's. Arithmetic is float32.
    activation: None, "silu" or its other name "swish".
    initial_state: (B, D, W - 1) in x's dtype, the inputs before the first token; zero when None.
    histogram: an `OutputHistogram`; the statistic of the output as rounded to x's dtype, equal to
        `histogram_entropy(y, num_bins, range)`. On CUDA the same launch counts it, and nothing synchronises.

    Returns y (B, D, L) in x's dtype, laid out token-major if x is (its channel stride is smaller than its token stride)
    and channel-major otherwise; with `return_last_state` then the last W - 1 inputs, (B, D, W - 1), ready for
    `causal_conv1d_update`; with `histogram` then an `OutputStatistic`. On CUDA every layout gives the same bits, and so
    does the update token by token.

    Raises TypeError or ValueError naming the argument, and RuntimeError for inputs that require grad while grad is
    enabled, as there is no backward.
    """
    silu = _check_activation(activation)
    if histogram is None and isinstance(return_last_state, bool) and is_eager(x):
        found = _conv_cuda.convolve_again(x, weight, bias, silu, initial_state, _outputs)
        if found is not None:
            return found if return_last_state else found[0]
    check_types({"x": x, "weight": weight}, {"bias": bias, "initial_state": initial_state})
    if not isinstance(return_last_state, bool):
        raise bad_type("return_last_state", return_last_state, "a bool")
    if torch.is_grad_enabled():
        refuse_gradient("causal_conv1d", {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state})
    if histogram is None:
        y, last_state = torch.ops.corey.causal_conv1d(x, weight, bias, silu, initial_state)
        return (y, last_state) if return_last_state else y
    y, last_state, statistic = _with_statistic(x, weight, bias, silu, initial_state, histogram)
    return (y, last_state, statistic) if return_last_state else (y, statistic)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    """The convolution of one more token, whose state is updated in place; as in the causal_conv1d package.

    x: (B, D), one token, in float32, float16 or bfloat16. weight, bias, activation as in `causal_conv1d`.
    conv_state: (B, D, S) in x's dtype with S >= W - 1, the last S inputs, oldest first. Rolls by one: the oldest input
        leaves and x enters.

    Returns y (B, D) in x's dtype. Raises as `causal_conv1d` does.
    """
    silu = _check_activation(activation)
    if is_eager(x):
        y = _conv_cuda.update_again(x, conv_state, weight, bias, silu)
        if y is not None:
            return y
    check_types({"x": x, "conv_state": conv_state, "weight": weight}, {"bias": bias})
    if torch.is_grad_enabled():
        refuse_gradient("causal_conv1d", {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias})
    return torch.ops.corey.causal_conv1d_update(x, conv_state, weight, bias, silu)


def causal_conv1d_ref(x, weight, bias=None, activation=None, *, initial_state=None, return_last_state=False):
    """The equation at the top of this file in plain PyTorch: any device and floating dtype, differentiable.

    Arguments and results are those of `causal_conv1d`. Arithmetic is float64 when x is, else float32.
    """
    check_types({"x": x, "weight": weight}, {"bias": bias, "initial_state": initial_state})
    silu = _check_activation(activation)
    _check(x, weight, bias, initial_state, dtypes=(*DTYPES, torch.float64))
    y, last_state = _reference(x, weight, bias, silu, initial_state)
    return (y, last_state) if return_last_state else y


def _reference(x, weight, bias, silu, initial_state):
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, dim, length = x.shape
    width = weight.shape[1]
    before = x.new_zeros(batch, dim, width - 1) if initial_state is None else initial_state
    inputs = torch.cat([before, x], dim=-1)  # (B, D, W - 1 + L)
    w = weight.to(work)
    y = x.new_zeros(batch, dim, length, dtype=work)
    if bias is not None:
        y = y + bias.to(work)[:, None]
    for k in range(width):
        y = y + w[:, k, None] * inputs[..., k : k + length].to(work)
    return (F.silu(y) if silu else y).to(x.dtype), inputs[..., length:].clone()


# ---- the registered operators ----------------------------------------------------------------------------------------

# The layout of y follows the layout of x, so a compiler must not change the latter.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state"

_library = torch.library.Library("corey", "FRAGMENT")  # a reload of this module takes the old registrations with it
torch.library.define("corey::causal_conv1d", f"({_INPUTS}) -> (Tensor, Tensor)", tags=_TAGS, lib=_library)
# Returns y, the last state, the entropy in nats of y[..., ::stride] and the chunk; `least` and `least_chunk` as in
# corey.entropy_chunk.
torch.library.define(
    "corey::causal_conv1d_entropy",
    f"({_INPUTS}, int num_bins, float lo, float hi, int stride, float[] least, int least_chunk) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
    lib=_library,
)
torch.library.define(
    "corey::causal_conv1d_update",
    "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    tags=_TAGS,
    lib=_library,
)


def _outputs(x, weight):
    """y and the last state, not yet written."""
    batch, dim, length = x.shape
    if 0 < x.stride(1) < x.stride(2):
        y = x.new_empty(batch, length, dim).transpose(1, 2)
    else:
        y = x.new_empty(batch, dim, length)
    return y, x.new_empty(batch, dim, weight.shape[1] - 1)


def _on_cpu(x, weight, bias, silu, initial_state):
    _check(x, weight, bias, initial_state)
    y, last_state = _outputs(x, weight)
    computed, state = _reference(x, weight, bias, silu, initial_state)
    return y.copy_(computed), last_state.copy_(state)


torch.library.impl("corey::causal_conv1d", "CPU", _on_cpu, lib=_library)


@torch.library.impl("corey::causal_conv1d", "CUDA", lib=_library)
def _conv_on_cuda(x, weight, bias, silu, initial_state):
    return _conv_cuda.convolve(x, weight, bias, silu, initial_state, _check, _outputs)


@torch.library.register_fake("corey::causal_conv1d", lib=_library)
def _conv_fake(x, weight, bias, silu, initial_state):
    _check(x, weight, bias, initial_state)
    return _outputs(x, weight)


@torch.library.impl("corey::causal_conv1d_entropy", "CPU", lib=_library)
def _conv_entropy_cpu(x, weight, bias, silu, initial_state, num_bins, lo, hi, stride, least, least_chunk):
    y, last_state = _on_cpu(x, weight, bias, silu, initial_state)
    return y, last_state, *_statistic(y[..., ::stride], num_bins, lo, hi, least, least_chunk)


@torch.library.impl("corey::causal_conv1d_entropy", "CUDA", lib=_library)
def _conv_entropy_cuda(x, weight, bias, silu, initial_state, num_bins, lo, hi, stride, least, least_chunk):
    if x.numel() == 0 or num_bins > _conv_cuda.MAX_BINS:
        y, last_state = _conv_cuda.convolve(x, weight, bias, silu, initial_state, _check, _outputs)
        return y, last_state, *_statistic(y[..., ::stride], num_bins, lo, hi, least, least_chunk)
    counting = (num_bins, lo, hi, stride, tuple(least), least_chunk)
    return _conv_cuda.convolve(x, weight, bias, silu, initial_state, _check, _outputs, counting)


@torch.library.register_fake("corey::causal_conv1d_entropy", lib=_library)
def _conv_entropy_fake(x, weight, bias, silu, initial_state, num_bins, lo, hi, stride, least, least_chunk):
    _check(x, weight, bias, initial_state)
    return *_outputs(x, weight), x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.int32)


def _statistic(y, num_bins, lo, hi, least, least_chunk):
    entropy = histogram_entropy(y, num_bins, (lo, hi))
    reached = (entropy >= torch.tensor(least, dtype=torch.float32, device=y.device)).sum()
    return entropy, (least_chunk * 2**reached).to(torch.int32)


@torch.library.impl("corey::causal_conv1d_update", "CPU", lib=_library)
def _update_cpu(x, conv_state, weight, bias, silu):
    _check_update(x, conv_state, weight, bias)
    width = weight.shape[1]
    inputs = torch.cat([conv_state, x[..., None]], dim=-1)  # (B, D, S + 1)
    conv_state.copy_(inputs[..., 1:])
    recent = inputs[..., -width:]
    return _reference(recent[..., -1:], weight, bias, silu, recent[..., :-1])[0][..., 0].contiguous()


@torch.library.impl("corey::causal_conv1d_update", "CUDA", lib=_library)
def _update_cuda(x, conv_state, weight, bias, silu):
    return _conv_cuda.update(x, conv_state, weight, bias, silu, _check_update)


@torch.library.register_fake("corey::causal_conv1d_update", lib=_library)
def _update_fake(x, conv_state, weight, bias, silu):
    _check_update(x, conv_state, weight, bias)
    return x.new_empty(x.shape)


def _refuse_backward(ctx, inputs, output):
    """Reached only when grad is enabled and an input requires it: refuse in the forward, not later in the backward."""
    x, weight, bias, _, initial_state, *_ = inputs
    refuse_gradient("causal_conv1d", {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state})


def _no_backward(ctx, *gradients):
    raise RuntimeError("causal_conv1d has no backward in this version")


for _name in ("causal_conv1d", "causal_conv1d_entropy"):
    torch.library.register_autograd(f"corey::{_name}", _no_backward, setup_context=_refuse_backward, lib=_library)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_activation(activation):
    if activation not in (None, "silu", "swish"):
        raise bad_value("activation", repr(activation), "None, 'silu' or 'swish'")
    return activation is not None


def _check_weights(weight, bias, dim, device, dtypes):
    if weight.dim() != 2:
        raise bad_value("weight", f"{weight.dim()} dimensions", "2: (D, W)")
    if weight.shape[1] not in WIDTHS:
        raise bad_value("weight", f"width {weight.shape[1]}", "2 to 4")
    check_operand("weight", weight, "(D, W)", (dim, weight.shape[1]), device, dtypes)
    check_operand("bias", bias, "(D,)", (dim,), device, (weight.dtype,))


def _check(x, weight, bias, initial_state, dtypes=DTYPES):
    check_dtype("x", x, dtypes)
    if x.dim() != 3:
        raise bad_value("x", f"{x.dim()} dimensions", "3: (B, D, L)")
    batch, dim, _ = x.shape
    _check_weights(weight, bias, dim, x.device, dtypes)
    sizes = (batch, dim, weight.shape[1] - 1)
    check_operand("initial_state", initial_state, "(B, D, W - 1)", sizes, x.device, (x.dtype,))


def _check_update(x, conv_state, weight, bias):
    check_dtype("x", x)
    if x.dim() != 2:
        raise bad_value("x", f"{x.dim()} dimensions", "2: (B, D)")
    _check_weights(weight, bias, x.shape[1], x.device, DTYPES)
    if conv_state.dim() != 3:
        raise bad_value("conv_state", f"{conv_state.dim()} dimensions", "3: (B, D, S)")
    held = conv_state.shape[2]
    if held < weight.shape[1] - 1:
        raise bad_value("conv_state", f"{held} inputs", f"at least the W - 1 = {weight.shape[1] - 1} under the taps")
    check_operand("conv_state", conv_state, "(B, D, S)", (*x.shape, held), x.device, (x.dtype,))
    check_writable("conv_state", conv_state)


def _with_statistic(x, weight, bias, silu, initial_state, histogram):
    if not isinstance(histogram, OutputHistogram):
        raise bad_type("histogram", histogram, "an OutputHistogram or None")
    lo, hi = histogram.range
    rule = histogram.rule
    least_chunk = 1 if rule is None else rule.c_min
    y, last_state, entropy, chunk = torch.ops.corey.causal_conv1d_entropy(
        x, weight, bias, silu, initial_state, histogram.num_bins, lo, hi, histogram.stride, histogram.least, least_chunk
    )
    return y, last_state, OutputStatistic(entropy, None if rule is None else chunk)
