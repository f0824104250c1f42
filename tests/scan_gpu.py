"""What the tests of the CUDA scan share: inputs laid out on the GPU, a call, and equality of bits."""

import torch
from scan_inputs import lay_out, make_inputs

from corey import selective_scan

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROWS = ("u", "delta", "z")


def gpu_inputs(*shape, layout="channel_major", **how):
    """`make_inputs` on the GPU. A further layout, "expanded", repeats tokens or channels with a stride of 0."""
    inputs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in make_inputs(*shape, **how).items()}
    return inputs | {name: _laid_out(name, inputs[name], layout) for name in _ROWS if name in inputs}


def _laid_out(name, x, layout):
    if layout != "expanded":
        return lay_out(x, layout)  # on the GPU: moving a view there would pack it
    if 0 in x.shape:
        return x
    # A step that is the same for all tokens would round the same way at every one, and no fp32 state survives that.
    one = {"u": x[:, :, :1], "delta": x[:, :1], "z": x[:1]}[name]
    return one.expand(x.shape)


def run(inputs, **changes):
    """y and the last state."""
    return selective_scan(**(inputs | changes), return_last_state=True)


def device_chunk(tokens):
    return torch.tensor(tokens, dtype=torch.int32, device="cuda")


def bits(x):
    return x.contiguous().view(_BITS[x.element_size()])


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


class Differences:
    """Counts results that differ in a bit, on the device: thousands of comparisons cost one synchronisation."""

    def __init__(self):
        self.count = torch.zeros((), dtype=torch.int64, device="cuda")

    def add(self, got, want):
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            self.count += (bits(a) != bits(b)).any()

    def __int__(self):
        return int(self.count)
