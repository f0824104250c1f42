"""Timings of the operators beside the scan: entropy, Hadamard transform, convolution and single tokens of decode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from corey.cold_timing import COLD_BYTES, MAX_SETS, Limits, num_sets, ratio, rotated, time_calls

STATES = 16
DTYPE = torch.bfloat16
SHORT_CALLS = 64  # in a graph, of operators that take microseconds
BOUNDS = (-4.0, 4.0)  # of the fixed range


@dataclass(frozen=True)
class Operator:
    """One line of the table: calls on inputs that are cold in L2 or, where the sets are too small for that, warm."""

    name: str
    variant: str
    shape: str
    calls: list[Callable]
    nbytes: int  # read and written a call
    cold: bool = True


def operators(tokens: int = 4096, dim: int = 2048, *, device="cuda") -> list[Operator]:
    """The operators beside the scan on a (1, tokens, dim) tensor, and on single tokens of dim channels.

    The first line is a copy of that tensor. tokens * dim is a multiple of 32768.
    """
    from corey.conv import OutputHistogram, causal_conv1d, causal_conv1d_update
    from corey.entropy import histogram_entropy
    from corey.hadamard import hadamard_transform

    width = 4
    size = tokens * dim * DTYPE.itemsize
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=DTYPE):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    xs = [normal(1, tokens, dim) for _ in range(num_sets(size))]
    weight, bias, counted = normal(dim, width), normal(dim), OutputHistogram(BOUNDS)

    def convolve(x, **more):
        return causal_conv1d(x, weight, bias, "silu", **more)

    def line(name, variant, function, sets, nbytes, shape=f"(1, {tokens}, {dim})"):
        return Operator(name, variant, shape, rotated(function, sets, SHORT_CALLS), nbytes)

    found = [
        line("copy", "device", torch.clone, xs, 2 * size),
        line("entropy", "own range", histogram_entropy, xs, size),
        line("entropy", "fixed range", lambda x: histogram_entropy(x, range=BOUNDS), xs, size),
        line("conv", "token-major", lambda x: convolve(x.transpose(1, 2)), xs, 2 * size),
        line("conv", "token-major, histogram", lambda x: convolve(x.transpose(1, 2), histogram=counted), xs, 2 * size),
        line(
            "conv", "channel-major", convolve, [x.view(1, dim, tokens) for x in xs], 2 * size, f"(1, {dim}, {tokens})"
        ),
    ]
    for order in (512, 2048, 4096, 16384, 32768):
        views = [x.view(-1, order) for x in xs]
        shape = str(tuple(views[0].shape))
        found.append(line("hadamard", f"last dimension {order}", hadamard_transform, views, 2 * size, shape))
    for batch in (1, 64):
        found.append(_state_update(batch, dim, normal))
        steps = [(normal(batch, dim), normal(batch, dim, width - 1)) for _ in range(MAX_SETS)]
        calls = rotated(lambda step: causal_conv1d_update(*step, weight, bias, "silu"), steps, SHORT_CALLS)
        moved = batch * dim * (2 * (width - 1) + 2) * DTYPE.itemsize + (weight.nbytes + bias.nbytes)
        found.append(
            Operator("conv update", "one token", f"({batch}, {dim})", calls, moved, moved * MAX_SETS > COLD_BYTES)
        )
    return found


def _state_update(batch: int, dim: int, normal: Callable) -> Operator:
    from corey.state_update import selective_state_update

    A = -torch.arange(1.0, STATES + 1, device=normal(1).device).repeat(dim, 1)
    D, dt_bias = normal(dim, dtype=torch.float32), normal(dim, dtype=torch.float32)

    def step(each):
        return selective_state_update(*each[:3], A, *each[3:5], D=D, z=each[5], dt_bias=dt_bias, dt_softplus=True)

    def inputs():
        rows = [normal(batch, dim) for _ in range(3)]
        state = normal(batch, dim, STATES, dtype=torch.float32)
        return state, rows[0], rows[1], normal(batch, STATES), normal(batch, STATES), rows[2]

    sets = [inputs() for _ in range(MAX_SETS)]
    moved = batch * dim * (2 * 4 * STATES + 4 * DTYPE.itemsize) + A.nbytes
    shape = f"({batch}, {dim}, {STATES})"
    return Operator(
        "state update", "one token", shape, rotated(step, sets, SHORT_CALLS), moved, moved * MAX_SETS > COLD_BYTES
    )


def operator_rows(found: Sequence[Operator], limits: Limits, *, rounds: int, seed: int, device="cuda") -> list[dict]:
    """One row an operator: its time, the floor of its bytes at the rate of a copy, and the speed of a copy over it.

    copy_share is the time of a copy of the large tensor over that of the operator, with its 95 % interval, for those
    that move as many bytes as the copy does.
    """
    labels = [f"{each.name}, {each.variant}, {each.shape}" for each in found]
    times = time_calls(
        {label: each.calls for label, each in zip(labels, found)}, rounds=rounds, seed=seed, device=device
    )
    copy, copied = labels[0], found[0].nbytes
    rows = []
    for label, each in zip(labels, found):
        latency = times[times.name == label].latency_us.median()
        row = {"operator": each.name, "variant": each.variant, "shape": each.shape, "dtype": str(DTYPE)}
        row |= {"latency_us": latency, "floor_us": each.nbytes / limits.copy_bytes_per_s * 1e6}
        compared = each.nbytes == copied and label != copy
        row |= ratio(times, copy if compared else "", label, "copy_share")
        rows.append(row | {"cold_cache": each.cold, "n_rounds": rounds, "device": str(device)})
    return rows
