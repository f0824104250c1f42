"""Made inputs for the scan's tests: two kinds of memory, every layout, dtype, grouping and option."""

import torch

LAYOUTS = ("channel_major", "token_major", "sliced", "padded_channels", "offset")
OPTIONS = ("D", "z", "delta_bias", "initial_state")


def make_inputs(
    batch=2,
    dim=24,
    length=300,
    states=16,
    *,
    memory="long",
    layout="channel_major",
    dtype=torch.float32,
    B_kind="variable",
    C_kind="variable",
    groups=2,
    options=("D", "z", "delta_bias"),
    seed=0,
):
    """Keyword arguments of selective_scan.

    memory: "forgetful" draws steps around 0.7 with A = -1..-N, so that a state lasts a few tokens and hides a lost
    carry; "long" draws steps around 0.01 with A in (-1, 0), so that it lasts hundreds.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def projection(kind):
        if kind == "constant":
            return normal(dim, states).to(dtype)
        if kind == "grouped":
            return normal(batch, groups, states, length).to(dtype)
        return normal(batch, states, length).to(dtype)

    if memory == "forgetful":
        A = -torch.arange(1.0, states + 1).repeat(dim, 1)
        delta = normal(batch, dim, length)
        bias = 0.1 * normal(dim)
    else:
        A = -torch.rand(dim, states, generator=generator)
        delta = 0.3 * normal(batch, dim, length) - (0.0 if "delta_bias" in options else 4.6)
        bias = 0.3 * normal(dim) - 4.6

    made = {
        "u": lay_out(normal(batch, dim, length).to(dtype), layout),
        "delta": lay_out(delta.to(dtype), layout),
        "A": A,
        "B": projection(B_kind),
        "C": projection(C_kind),
        "delta_softplus": True,
    }
    extra = {
        "D": normal(dim),
        "z": lay_out(normal(batch, dim, length).to(dtype), layout),
        "delta_bias": bias,
        "initial_state": normal(batch, dim, states),
    }
    return made | {name: extra[name] for name in options}


def lay_out(x, layout):
    """The same values in another memory layout. All but the first two lie inside a buffer filled with NaN."""
    batch, dim, length = x.shape
    if layout == "channel_major":
        return x.contiguous()
    if layout == "token_major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # no axis has stride 1
        home = x.new_full((batch, 2 * dim, 3 * length), float("nan"))[:, 1::2, 2::3]
    elif layout == "padded_channels":  # one half of a wider token-major projection, as in_proj(x).chunk(2) makes it
        home = x.new_full((batch, length, 2 * dim), float("nan"))[:, :, dim:].transpose(1, 2)
    else:  # a channel-major view that starts in the middle of its storage and of a vector
        home = x.new_full((batch, dim, length + 5), float("nan"))[:, :, 5:]
    home.copy_(x)
    return home


def in_float64(inputs):
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def tokens(inputs, first, last):
    """The inputs of tokens first to last - 1."""
    part = dict(inputs)
    for name in ("u", "delta", "z", "B", "C"):
        if name in part and part[name].dim() > 2:
            part[name] = part[name][..., first:last]
    return part
