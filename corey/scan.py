"""The selective scan of Mamba (S6): the operator, its sequential reference, and two host loops to compare it with.

For every batch row b, channel d and token t, with N states a channel (Gu and Dao 2023, algorithm 2; B discretised by
the first-order rule that Mamba implementations use):

    step = softplus(delta[b, d, t] + delta_bias[d])
    h    = exp(step * A[d]) * h + step * u[b, d, t] * B[b, :, t]         h: N numbers
    y    = (sum_n h[n] * C[b, n, t] + D[d] * u[b, d, t]) * silu(z[b, d, t])

The tile of 128 tokens is the unit of arithmetic, the chunk is the unit of scheduling: a chunk is a whole number of
tiles that one worker walks before it hands the float32 state on. Chunk size changes time and never a bit of the output.
"""

import torch
import torch.nn.functional as F

from corey import _scan_cuda
from corey._check import bad_value
from corey._operands import refuse_gradient
from corey._plans import is_eager
from corey._scan_args import TILE, check_chunk_size, check_tensors, check_types

__all__ = ["TILE", "scan_carried_ref", "scan_reset_ref", "selective_scan", "selective_scan_ref"]


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    chunk_size=None,
):
    """Mamba's selective scan; takes what mamba_ssm's `selective_scan_fn` takes, in the same order.

    u, delta, z: (B, D, L) in float32, float16 or bfloat16, any strides. Token-major views, `x.transpose(1, 2)` of a
        (B, L, D) tensor, take about as long as channel-major ones and are never copied.
    A: (D, N) float32, N from 1 to 256. D, delta_bias: (D,) float32. Mamba's A is negative; where A > 0 makes a state
        outgrow float32, it is infinite on the CPU and infinite or NaN on CUDA.
    B, C: (B, N, L), or (B, G, N, L) where G divides D, or (D, N) constants, in the dtypes allowed for u. The dtypes of
        u, delta, z, B and C may differ; arithmetic and state are float32 throughout.
    delta_softplus: apply softplus to delta + delta_bias.
    initial_state: (B, D, N) float32 state before the first token; zero when None.
    chunk_size: tokens, a positive multiple of TILE, or None to let shape and layout decide. On CUDA also a 0-dim int32
        tensor on u's device, read there and rounded up to whole tiles, so that a choice made on the device needs no
        synchronisation and may change between replays of a CUDA graph. Never changes the result.

    Returns y (B, D, L) in u's dtype, laid out token-major if u is (its channel stride is smaller than its token stride)
    and channel-major otherwise; with `return_last_state` also the state after the last token, (B, D, N) float32.

    Raises TypeError or ValueError naming the argument; RuntimeError for inputs that require grad while grad is enabled,
    as there is no backward yet, and on CUDA, with the install hint, where NVIDIA's packages are missing.
    """
    if isinstance(return_last_state, bool) and is_eager(u):
        found = _scan_cuda.scan_again(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size, _outputs
        )
        if found is not None:
            return found if return_last_state else found[0]
    tensors = _named(u, delta, A, B, C, D, z, delta_bias, initial_state)
    check_types(tensors, delta_softplus, return_last_state)
    if u.device.type not in ("cpu", "cuda", "meta"):
        raise bad_value("u", f"a tensor on {u.device}", "one on the CPU or a CUDA device")
    if chunk_size is not None:
        check_chunk_size(chunk_size, multiple_of=TILE, device=u.device)
    if torch.is_grad_enabled():
        refuse_gradient("selective_scan", tensors)
    chunk, device_chunk = (None, chunk_size) if isinstance(chunk_size, torch.Tensor) else (chunk_size, None)
    y, last_state = torch.ops.corey.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk, device_chunk
    )
    return (y, last_state) if return_last_state else y


# ---- the registered operator -----------------------------------------------------------------------------------------

_library = torch.library.Library("corey", "FRAGMENT")  # a reload of this module takes the old registrations with it
torch.library.define(
    "corey::selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? initial_state, SymInt? chunk_size, Tensor? device_chunk=None) -> (Tensor, Tensor)",
    # The layout of y follows the layout of u, so a compiler must not change the latter.
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
    lib=_library,
)


def _outputs(u, A):
    """y and the last state, fresh and not yet written. y follows the layout of u."""
    batch, dim, length = u.shape
    if 0 < u.stride(1) < u.stride(2):
        y = u.new_empty(batch, length, dim).transpose(1, 2)
    else:
        y = u.new_empty(batch, dim, length)
    return y, A.new_empty(batch, dim, A.shape[1])


def _check(u, delta, A, B, C, D, z, delta_bias, initial_state, chunk_size, device_chunk):
    check_tensors(u, delta, A, B, C, D, z, delta_bias, initial_state)
    for chunk in (chunk_size, device_chunk):
        if chunk is not None:
            check_chunk_size(chunk, multiple_of=TILE, device=u.device)


@torch.library.impl("corey::selective_scan", "CPU", lib=_library)
def _scan_cpu(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size, device_chunk=None):
    from corey import _cpu  # Numba takes a second to import; `import corey` must not pay for it

    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, chunk_size, device_chunk)
    y, state = _outputs(u, A)
    state.zero_() if initial_state is None else state.copy_(initial_state)
    _cpu.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, y, state, chunk_size, TILE)
    return y, state


@torch.library.impl("corey::selective_scan", "CUDA", lib=_library)
def _scan_on_cuda(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size, device_chunk=None):
    chunk = chunk_size if device_chunk is None else device_chunk
    return _scan_cuda.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk, _outputs)


@torch.library.register_fake("corey::selective_scan", lib=_library)
def _scan_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, chunk_size, device_chunk=None):
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, chunk_size, device_chunk)
    return _outputs(u, A)


def _refuse_backward(ctx, inputs, output):
    """Reached only when grad is enabled and an input requires it: refuse in the forward, not later in the backward."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "chunk_size")
    refuse_gradient("selective_scan", {name: x for name, x in zip(names, inputs) if isinstance(x, torch.Tensor)})


def _no_backward(ctx, *gradients):
    raise RuntimeError("selective_scan has no backward in this version")


torch.library.register_autograd("corey::selective_scan", _no_backward, setup_context=_refuse_backward, lib=_library)


# ---- references ------------------------------------------------------------------------------------------------------


def selective_scan_ref(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
):
    """The sequential truth: the equations at the top of this file, one token at a time, in plain PyTorch.

    Arguments and results are those of `selective_scan`, on any device and differentiable. All arithmetic and the state
    are float64 when u is, else float32; the other tensors may be of any floating dtype.
    """
    check_types(_named(u, delta, A, B, C, D, z, delta_bias, initial_state), delta_softplus, return_last_state)
    check_tensors(u, delta, A, B, C, D, z, delta_bias, initial_state, reference=True)
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, dim, length = u.shape

    x = u.to(work)  # (B, D, L)
    step = delta.to(work) if delta_bias is None else delta.to(work) + delta_bias.to(work)[:, None]  # (B, D, L)
    if delta_softplus:
        step = F.softplus(step)
    A, B, C = A.to(work), B.to(work), C.to(work)

    h = x.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state.to(work)  # (B, D, N)
    y = []
    for t in range(length):
        B_t, C_t = _at_token(B, t, dim), _at_token(C, t, dim)  # (B or 1, D or 1, N)
        step_t = step[:, :, t, None]  # (B, D, 1)
        h = torch.exp(step_t * A) * h + step_t * x[:, :, t, None] * B_t
        y.append((h * C_t).sum(-1))  # (B, D)
    y = torch.stack(y, dim=-1) if y else x.new_zeros(batch, dim, 0)

    if D is not None:
        y = y + D.to(work)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(u.dtype)
    return (y, h.clone()) if return_last_state else y


def _at_token(projection, t, dim):
    """B or C of one token, ready to broadcast against (B, D, N)."""
    if projection.dim() == 2:
        return projection[None]  # (1, D, N)
    if projection.dim() == 3:
        return projection[:, None, :, t]  # (B, 1, N)
    return projection[..., t].repeat_interleave(dim // projection.shape[1], dim=1)  # (B, G, N) -> (B, D, N)


def scan_reset_ref(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, *, chunk_size
):
    """The paper's chunking: one selective_scan call for each slice of chunk_size tokens, every one from a zero state.

    This drops the recurrence at every boundary, so it is another function than the scan; it exists for comparison.
    Arguments as in `selective_scan`; chunk_size is any positive int, since every slice is a call of its own.
    """
    return _host_loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, None, chunk_size, False)


def scan_carried_ref(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    chunk_size,
):
    """The same host loop with the state carried from slice to slice: as many launches, but the right function.

    Bitwise equal to one call when chunk_size is a multiple of TILE.
    """
    return _host_loop(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state, chunk_size, True
    )


def _host_loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, state, chunk_size, carry):
    check_types(_named(u, delta, A, B, C, D, z, delta_bias, state), delta_softplus, return_last_state)
    check_tensors(u, delta, A, B, C, D, z, delta_bias, state)
    check_chunk_size(chunk_size, multiple_of=1)

    def tokens(x, start):
        return x if x is None or x.dim() == 2 else x[..., start : start + chunk_size]

    slices = []
    for start in range(0, max(u.shape[2], 1), chunk_size):
        y, state = selective_scan(
            *(tokens(x, start) for x in (u, delta)),
            A,
            *(tokens(x, start) for x in (B, C)),
            D,
            tokens(z, start),
            delta_bias,
            delta_softplus,
            return_last_state=True,
            initial_state=state if carry else None,
        )
        slices.append(y)
    y = torch.cat(slices, dim=-1)
    return (y, state) if return_last_state else y


def _named(u, delta, A, B, C, D, z, delta_bias, initial_state):
    return {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
    }
