"""The CUDA transform: how rows are addressed, on any machine; and on a GPU, its results against float64."""

import pytest
import torch

from corey import _hadamard_cuda
from corey.hadamard import fold_into_projection, hadamard_transform

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


# ---- addressing, without a GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "dimensions"),
    [
        (lambda x: x, 1),
        (lambda x: x[:, :, :, :3], 1),
        (lambda x: x[:, 1:3], 2),
        (lambda x: x[:, :, ::2], 1),
        (lambda x: x[:, 1:3, ::2], 2),
        (lambda x: x.transpose(0, 1), 3),
        (lambda x: x[:1, 1:2], 1),
        (lambda x: x[0, 0, 0], 1),
        (lambda x: x[:, :1].expand(-1, 4, -1, -1), 3),
    ],
)
def test_rows_are_found_by_the_fewest_sizes_and_strides(view, dimensions):
    x = view(torch.arange(3 * 4 * 6 * 5).reshape(3, 4, 6, 5))
    pairs = _hadamard_cuda.collapse(x.shape[:-1], x.stride()[:-1])
    assert len(pairs) == dimensions
    sizes, strides = zip(*pairs)
    rows = x.as_strided((*sizes, x.shape[-1]), (*strides, x.stride(-1)))
    assert torch.equal(rows.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))


@pytest.mark.parametrize(
    ("address", "n", "strides", "itemsize", "load_bytes"),
    [
        (512, 2048, [2048], 2, 16),
        (512, 2048, [0], 2, 16),
        (512, 1500, [1500], 2, 8),
        (512, 1500, [1504], 2, 8),
        (512, 1501, [1501], 2, 2),
        (514, 2048, [2048], 2, 2),
        (516, 2048, [2048], 4, 4),
        (512, 2, [2], 2, 4),
        (512, 64, [64, 4], 4, 16),
        (512, 64, [64, 3], 4, 4),
    ],
)
def test_loads_are_as_wide_as_rows_are_aligned(address, n, strides, itemsize, load_bytes):
    assert _hadamard_cuda.widest_load(address, n, strides, itemsize) == load_bytes


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_width_has_a_block_that_fits(itemsize):
    for width in [2**k for k in range(1, 16)]:
        threads, rows, shared_bytes, blocks = _hadamard_cuda.plan(itemsize, width)
        columns = rows * width // blocks // threads
        assert columns * threads * blocks == rows * width and columns <= 64
        assert threads % 32 == 0 and threads <= 256 and shared_bytes <= 99 * 1024
    assert _hadamard_cuda.plan(2, 32768, tensor_cores=True).shared_bytes <= 227 * 1024


# ---- results, on a GPU -----------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu


def assert_is_the_transform(x: torch.Tensor) -> None:
    """fp32 to 1e-6 in relative L2, the half types as well as rounding the float64 result."""
    z = hadamard_transform(x)
    exact = hadamard_transform(x.cpu().double())
    assert z.dtype == x.dtype and z.shape == exact.shape and z.is_contiguous()
    error = (z.cpu().double() - exact).norm()
    rounding = (exact.to(x.dtype).double() - exact).norm()
    assert error <= (1e-6 * exact.norm() if x.dtype == torch.float32 else 1.05 * rounding)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_width", range(16))
def test_every_width(log_width, dtype):
    assert_is_the_transform(normal(37, 1 << log_width, dtype=dtype, device="cuda"))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 100, 1001, 1500, 5000, 20001, 20008, 32767])
def test_other_widths_are_padded_with_zeros(n, dtype):
    assert_is_the_transform(normal(9, n, dtype=dtype, device="cuda"))


VIEWS = {
    "one row": lambda x: x[0, 0, 0],
    "unaligned": lambda x: x[..., 1:],
    "every other row": lambda x: x[:, :, ::2],
    "sliced and swapped": lambda x: x.transpose(0, 1)[1:, :, 2:5, :500],
    "channels first": lambda x: x.transpose(-1, -2),
    "expanded": lambda x: x[:, :1, :, :].expand(-1, 5, -1, -1),
    "one value everywhere": lambda x: x[..., :1].expand(-1, -1, -1, 640),
    "dimensions in disorder": lambda x: x.unflatten(3, (2, 2, 2, 75)).permute(3, 0, 4, 2, 5, 1, 6)[..., :70],
    "no rows": lambda x: x[:0],
}


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_any_view_is_read_where_it_lies(view, dtype):
    x = VIEWS[view](normal(3, 4, 6, 600, dtype=dtype, device="cuda"))
    assert_is_the_transform(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    z = hadamard_transform(x)
    assert torch.cuda.max_memory_allocated() - before <= z.numel() * z.element_size() + 512


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 64, 512, 2048, 4096, 16384, 32768])
def test_a_row_has_the_same_bits_alone_in_a_batch_unaligned_and_every_time(width, dtype):
    x = normal(300, width, dtype=dtype, device="cuda")
    z = hadamard_transform(x)
    assert all(torch.equal(hadamard_transform(x), z) for _ in range(20))
    assert torch.equal(hadamard_transform(x[7]), z[7])
    assert torch.equal(hadamard_transform(x[5:8]), z[5:8])
    unaligned = torch.empty(x.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(x).copy_(x)
    assert torch.equal(hadamard_transform(unaligned), z)
    assert torch.equal(hadamard_transform(x.T.contiguous().T), z)


@gpu
@pytest.mark.parametrize("width", [64, 2048, 8192, 32768])
def test_every_coordinate_is_written_and_a_nan_stays_in_its_row(width):
    x = normal(150, width, device="cuda")
    poison = torch.full_like(x, float("nan"))
    del poison  # its memory is the next result's
    assert torch.isfinite(hadamard_transform(x)).all()
    x[3, 5] = float("nan")
    finite = torch.isfinite(hadamard_transform(x))
    assert not finite[3].any() and finite[:3].all() and finite[4:].all()


@gpu
def test_float64_and_wider_rows_take_pytorchs_operations():
    x = normal(3, 200, device="cuda").double()
    assert torch.allclose(hadamard_transform(x).cpu(), hadamard_transform(x.cpu()), atol=1e-12)
    wide = normal(2, 40000, device="cuda")
    assert hadamard_transform(wide).shape == (2, 65536)
    assert torch.allclose(hadamard_transform(wide).cpu(), hadamard_transform(wide.cpu()), atol=1e-5)


@gpu
def test_a_graph_replays_the_transform_on_a_side_stream():
    x = normal(64, 32768, dtype=torch.bfloat16, device="cuda")
    other = x.flip(0)
    expected = hadamard_transform(x), hadamard_transform(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = hadamard_transform(x)
    graph.replay()
    assert torch.equal(z, expected[0])
    x.copy_(other)
    graph.replay()
    assert torch.equal(z, expected[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_side = hadamard_transform(x)
    stream.synchronize()
    assert torch.equal(on_side, expected[1])


@gpu
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 2048), (7,), (0, 4), (2, 5000)])
def test_the_operator_passes_torchs_checks_and_compiles(shape):
    x = normal(*shape, device="cuda").requires_grad_()
    torch.library.opcheck(torch.ops.corey.hadamard_transform, (x,))
    compiled = torch.compile(lambda x: hadamard_transform(2 * x) + 1, fullgraph=True)
    assert torch.equal(compiled(x), hadamard_transform(2 * x) + 1)


@gpu
def test_the_gradient_is_the_transform_of_the_gradient():
    x = normal(4, 1500, device="cuda").requires_grad_()
    weights = normal(4, 2048, seed=1, device="cuda")
    (gradient,) = torch.autograd.grad((hadamard_transform(x) * weights).sum(), x)
    assert torch.equal(gradient, hadamard_transform(weights)[:, :1500])
    (of_sum,) = torch.autograd.grad(hadamard_transform(x).sum(), x)  # autograd hands on a gradient of stride 0
    assert torch.allclose(of_sum, hadamard_transform(torch.ones_like(weights))[:, :1500])


@gpu
def test_folding_on_the_gpu_is_folding():
    weight = normal(96, 192, device="cuda")
    assert torch.allclose(fold_into_projection(weight).cpu(), fold_into_projection(weight.cpu()), atol=1e-5)


@gpu
def test_offsets_beyond_2_to_the_31():
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free memory")
    distance = 2**31 + 8
    x = torch.empty(distance + 32768, dtype=torch.bfloat16, device="cuda").as_strided((2, 32768), (distance, 1))
    x.copy_(normal(2, 32768, dtype=torch.bfloat16))
    z = hadamard_transform(x)
    assert_is_the_transform(x)
    many = hadamard_transform(x[1].expand(2**16 + 3, 32768))
    assert torch.equal(many[-1], z[1]) and torch.equal(many[2**16], z[1]) and torch.equal(many[0], z[1])
