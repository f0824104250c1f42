"""A small matrix of every CUDA operator, to run under compute-sanitizer from the repository root:

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 python tests/sanitize.py [part]

Tools: memcheck, racecheck, initcheck, synccheck. Failed API calls are left out, as NVIDIA's bindings ask older drivers
for newer functions. part: scan, clusters, entropy, hadamard, conv, update, norm or all of these (default).
Shapes are tiny: a tool slows kernels down 10 to 100 times.
Every allocation is a cudaMalloc of its own, so that a step beyond a tensor is a step beyond an allocation.
"""

import os
import sys
import time

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path[:0] = [".", "tests"]

import torch  # noqa: E402
from scan_gpu import device_chunk, gpu_inputs, run  # noqa: E402
from scan_inputs import OPTIONS  # noqa: E402

from corey import _scan_cuda, _scan_way  # noqa: E402
from corey._scan_args import TILE  # noqa: E402

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
calls = 0


def finite(*tensors):
    global calls
    calls += 1
    for x in tensors:
        assert x.isfinite().all(), tuple(x.shape)


def scan():
    cases = [
        # shape, layout, dtype, B, C, options, chunks
        ((1, 40, 300, 16), "channel_major", bf16, "variable", "variable", OPTIONS, (None, 128, "device")),
        ((1, 480, 256, 16), "channel_major", bf16, "variable", "variable", ("z", "D"), (128, 256)),  # whole pieces
        ((2, 24, 256, 16), "channel_major", f32, "grouped", "grouped", OPTIONS, (128, 256)),
        ((1, 40, 300, 16), "token_major", bf16, "variable", "variable", OPTIONS, (None, 128)),
        ((2, 17, 129, 16), "token_major", f16, "variable", "constant", ("z",), (128,)),
        ((1, 33, 1030, 16), "padded_channels", bf16, "variable", "variable", ("z", "delta_bias"), (128, 512, 1152)),
        ((1, 9, 260, 5), "sliced", f32, "constant", "variable", (), (128,)),
        ((1, 5, 17, 1), "offset", bf16, "variable", "variable", ("D",), (None,)),
        ((1, 16, 257, 64), "channel_major", bf16, "variable", "variable", ("initial_state",), (128, "device")),
        ((1, 8, 1, 16), "token_major", f32, "variable", "variable", ("z", "D"), (None,)),
        ((3, 130, 640, 16), "token_major", bf16, "variable", "variable", ("z", "D"), (128, 256)),
    ]
    find_pairs = _scan_way.pairs_for
    for shape, layout, dtype, B, C, options, chunks in cases:
        inputs = gpu_inputs(*shape, layout=layout, dtype=dtype, B_kind=B, C_kind=C, groups=1, options=options)
        # one pass with two lanes a share, with one, and with two in large blocks
        for pairs in (find_pairs, lambda *_: None, lambda *_: _scan_way.PAIRS[-2]):
            _scan_way.pairs_for = pairs
            _scan_cuda._plans.clear()
            for chunk in chunks:
                finite(*run(inputs, chunk_size=device_chunk(256) if chunk == "device" else chunk))


def clusters():
    """Two blocks a sequence, where the GPU has clusters of blocks."""
    if torch.cuda.get_device_capability()[0] < 9:
        return
    _scan_way.parts_for = lambda *_: _scan_way.IN_PARTS
    _scan_cuda._plans.clear()
    for layout, dtype in (("channel_major", bf16), ("token_major", f32)):
        inputs = gpu_inputs(2, 40, 1100, layout=layout, dtype=dtype, options=OPTIONS)
        finite(*run(inputs, chunk_size=_scan_way.first_part(9) * TILE))


def entropy():
    from corey.entropy import histogram_entropy

    for shape, dtype in (((1, 300, 70), bf16), ((3, 5, 7), f32), ((100_003,), f16)):
        x = torch.randn(shape, device="cuda").to(dtype)
        for bounds in (None, (-3.0, 3.0)):
            for bins in (256, 20):
                finite(histogram_entropy(x, bins, range=bounds))
    x = torch.randn(4, 33, 65, device="cuda", dtype=bf16)
    finite(
        histogram_entropy(x[:, ::2, 1::3]),
        histogram_entropy(x, dim=-1),
        histogram_entropy(x.transpose(1, 2), dim=(0, 1)),
    )


def hadamard():
    from corey.hadamard import hadamard_transform

    for rows, order, dtype in (
        (3, 1, f32),
        (5, 2, f32),
        (7, 60, bf16),
        (3, 512, f16),
        (5, 2048, bf16),
        (2, 5000, f32),
        (2, 32768, bf16),
    ):
        x = torch.randn(rows, order, device="cuda").to(dtype)
        finite(hadamard_transform(x), hadamard_transform(torch.cat([x, x], 1)[:, order:]))


def conv():
    from corey.conv import OutputHistogram, causal_conv1d, causal_conv1d_update

    for width in (2, 3, 4):
        for dim, length, dtype in ((24, 130, bf16), (17, 33, f32), (64, 300, f16), (3, 1, bf16)):
            weight, bias = torch.randn(dim, width, device="cuda").to(dtype), torch.randn(dim, device="cuda").to(dtype)
            state = torch.randn(2, dim, width - 1, device="cuda").to(dtype)
            x = torch.randn(2, dim, length, device="cuda").to(dtype)
            for each in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
                finite(*causal_conv1d(each, weight, bias, "silu", initial_state=state, return_last_state=True))
                y, statistic = causal_conv1d(each, weight, None, histogram=OutputHistogram((-4.0, 4.0)))
                finite(y, statistic.entropy_nats)
            finite(causal_conv1d_update(x[..., 0].contiguous(), state, weight, bias, "silu"), state)


def update():
    from corey.state_update import selective_state_update

    for batch, dim, states, dtype in ((1, 40, 16, bf16), (3, 17, 5, f32), (2, 64, 64, f16), (4, 9, 256, bf16)):
        state = torch.randn(batch, dim, states, device="cuda")
        x, dt, z = torch.randn(3, batch, dim, device="cuda").to(dtype)
        B, C = torch.randn(2, batch, states, device="cuda").to(dtype)
        A, D = -torch.rand(dim, states, device="cuda"), torch.randn(dim, device="cuda")
        finite(selective_state_update(state, x, dt, A, B, C, D, z, D, True), state)
        finite(selective_state_update(state, x, dt.abs(), A, B, C), state)


def norm():
    from corey.norm import add_rms_norm

    for width in (1, 60, 64, 768, 8192):
        for dtype in (bf16, f32):
            x, weight = torch.randn(3, width, device="cuda").to(dtype), torch.ones(width, device="cuda").to(dtype)
            _, residual = add_rms_norm(x, None, weight)
            finite(*add_rms_norm(x, residual, weight), *add_rms_norm(x[-1:], residual[-1:], weight))


def main():
    parts = (scan, clusters, entropy, hadamard, conv, update, norm)
    asked = sys.argv[1] if len(sys.argv) > 1 else "all"
    for part in parts:
        name = part.__name__
        if asked not in (name, "all"):
            continue
        start = time.time()
        try:
            part()
        except ImportError as error:
            print(f"{name}: not importable: {error}")
            continue
        torch.cuda.synchronize()
        print(f"{name}: ok after {time.time() - start:.1f} s, {calls} calls so far", flush=True)


main()
