"""Histogram entropy on CUDA: the same counts as on CPU for any layout, and everything left on the device."""

import itertools
import math

import numpy as np
import pytest
import torch

from corey import _entropy_cuda
from corey.entropy import entropy_chunk, histogram_entropy
from corey.schedulers import PUBLISHED_RANGES, ChunkRule, device_chunk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIXED = (-4.0, 4.0)
NAN, INF = math.nan, math.inf


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VIEWS = {
    "one value": normal(1),
    "scalar": normal(1)[0],
    "few": normal(37),
    "dense": normal(1, 192, 500),
    "dense, odd size": normal(3, 67, 501),
    "token-major": normal(2, 500, 64).transpose(1, 2),
    "permuted": normal(4, 90, 100).permute(2, 0, 1),
    "every 8th token": normal(1, 96, 4000)[..., ::8],
    "every 8th token, token-major": normal(1, 4000, 96).transpose(1, 2)[..., ::8],
    "tokens from 3": normal(2, 64, 700)[..., 3:603],
    "channels from 1": normal(2, 300, 130).transpose(1, 2)[:, 1:100],
    "a slice of all": normal(3, 70, 400)[1:, 5:60, 7:390],
    "repeated rows": normal(1, 300).expand(200, 300),
    "repeated columns": normal(300, 1).expand(300, 200),
    "offset by one": normal(40001)[1:],
    "four strides": normal(5, 6, 7, 8, 30)[:, 1:, ::2, 1:, ::3],
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_strides_handed_to_the_kernels_reach_every_value_of_its_pool_once(view):
    x = VIEWS[view]
    for pooled in {tuple(range(x.ndim)), tuple(range(x.ndim))[:1], tuple(range(x.ndim))[-1:]}:
        steps = _entropy_cuda._View.of(x, pooled)
        if steps is None:
            continue
        offsets = np.zeros(1, np.int64)
        for size, stride in steps.kept + steps.rows:
            offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
        kept = [d for d in range(x.ndim) if d not in pooled]
        by_pool = x.permute((*kept, *pooled)).reshape(math.prod(steps.kept_shape), -1).numpy()
        reached = x.untyped_storage()
        values = torch.tensor([], dtype=x.dtype).set_(reached, 0, (len(reached) // 4,)).numpy()
        found = values[x.storage_offset() + offsets].reshape(by_pool.shape)
        assert np.array_equal(np.sort(found, axis=1), np.sort(by_pool, axis=1))


def test_values_that_lie_densely_are_one_row_and_a_slice_is_rows():
    assert _entropy_cuda._View.of(VIEWS["permuted"], (0, 1, 2)).rows == [(1, 0), (1, 0), (36000, 1)]
    assert _entropy_cuda._View.of(VIEWS["a slice of all"], (0, 1, 2)).rows == [(2, 28000), (55, 400), (383, 1)]
    assert _entropy_cuda._View.of(VIEWS["repeated rows"], (0, 1)).rows[1:] == [(200, 0), (300, 1)]
    assert _entropy_cuda._View.of(VIEWS["four strides"], (0, 1, 2, 3, 4)) is None


@pytest.mark.parametrize("num_bins", [2, 3, 255, 256, 257, 1000, 8192])
def test_the_table_fits_a_block_without_asking_for_more_shared_memory(num_bins):
    columns = _entropy_cuda.columns(num_bins)
    assert columns in (1, 2, 4, 8, 16, 32) and (columns == 32) == (num_bins <= 256)
    assert (num_bins + 1) * columns * 4 <= _entropy_cuda.table_bytes(num_bins, columns) <= 33 * 1024
    assert _entropy_cuda.copies(num_bins) * num_bins <= max(2048, num_bins)


RANGES = [FIXED, (-0.25, 4.0), (0.0, 0.3), (-3.0, 3.0), (-1e-3, 1e-3), (5.0, 6.0), (-6e4, 6e4), (1.0, 1.0 + 1e-6)]


@pytest.mark.parametrize("bounds", RANGES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_bins", [100, 256])
def test_bins_from_one_product_are_those_from_the_division(num_bins, dtype, bounds):
    packed, quick = _entropy_cuda.fixed_bins(*bounds, num_bins, dtype)
    scale, shift, width, inverse, inverse_low, count = np.frombuffer(packed, np.float32)
    assert count == num_bins
    if not quick:
        assert 0.5 <= width < 1
        assert packed == _entropy_cuda.fixed_bins(*bounds, num_bins, None)[0]
        assert abs(float(width) * (float(inverse) + float(inverse_low)) - 1) < 2e-14
        return
    if dtype == torch.float32:
        values = np.float32(bounds[0]) + np.linspace(-0.1, 1.1, 100_001, dtype=np.float32) * np.float32(
            bounds[1] - bounds[0]
        )
    else:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float().numpy()
        values = values[~np.isnan(values)]
    with np.errstate(all="ignore"):
        above = values - np.float32(bounds[0])
        exact = np.floor(above / np.float32(bounds[1] - bounds[0]) * count).clip(0, count)
        found = np.floor(_entropy_cuda.fma(values, scale, shift).clip(0, 1) * count)
    assert np.array_equal(found, exact)


def test_most_ranges_need_one_product_and_whole_powers_of_two_always_do():
    assert all(_entropy_cuda.fixed_bins(-4.0, 4.0, 256, dtype)[1] for dtype in DTYPES)
    assert not _entropy_cuda.fixed_bins(-4.0, 3.0, 256, torch.float32)[1]
    ranges = [(lo / 7, lo / 7 + width / 3) for lo in range(-20, 5, 4) for width in range(1, 20, 3)]
    assert sum(_entropy_cuda.fixed_bins(*ends, 256, torch.bfloat16)[1] for ends in ranges) > 0.9 * len(ranges)


@pytest.mark.parametrize("by", [1, 2, 3, 7, 100, 4224, 65535, 65536, 10**9])
def test_the_reciprocal_divides_numbers_below_2_16(by):
    _, reciprocal = _entropy_cuda._divisor(by)
    for x in (0, 1, by - 1, by, by + 1, 2 * by, 3 * by - 1, 65535):
        if x < 65536:
            assert (x * reciprocal >> 32 if reciprocal else x) == x // by


def test_the_operators_are_registered_soundly():
    x = normal(2, 6, 50)
    for arguments in [(x, 16, None, 1.0, [0, 1, 2]), (x.bfloat16(), 256, [-1.0, 1.0], 2.0, [1])]:
        torch.library.opcheck(torch.ops.corey.histogram_entropy, arguments)
    torch.library.opcheck(torch.ops.corey.entropy_chunk, (x, 16, None, [0.5, 1.0], 128))


def test_gradients_are_not_asked_for():
    x = normal(100).requires_grad_()
    assert not histogram_entropy(x).requires_grad
    assert not entropy_chunk(x, 256, None, (1.0,), 128).requires_grad


@pytest.mark.parametrize("least", [(1.0,) * 33, (1.0,) * 24], ids=["too many", "beyond int32"])
def test_a_chunk_that_does_not_fit_is_refused(least):
    with pytest.raises(ValueError, match="least: got"):
        entropy_chunk(normal(4), 256, None, least, 128)


# ---- on the device ---------------------------------------------------------------------------------------------------


def on_device(x: torch.Tensor) -> torch.Tensor:
    """With the same strides and the same place in its storage."""
    storage = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage()).cuda()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "dtype"), [*itertools.product((3, 50_000, 1_000_001), DTYPES), (20_000_001, torch.bfloat16)], ids=str
)
def test_any_size_gives_the_bits_of_the_cpu(size, dtype):
    """Up to more than the registers of a GPU hold; now and then with other kernels between."""
    x = (normal(size) ** 3).to(dtype)
    for bounds in (None, FIXED, (-0.3, 0.8)):
        expected = histogram_entropy(x, range=bounds)
        found = []
        for values in (x.cuda(), x.cuda().flip(0), x.cuda() * 1):
            found += [histogram_entropy(values, range=bounds), histogram_entropy(values[: size // 2 + 1], range=bounds)]
        assert all(torch.equal(each.cpu(), expected) for each in found[::2])
        assert torch.equal(found[1].cpu(), histogram_entropy(x[: size // 2 + 1], range=bounds))


@pytest.mark.gpu
def test_blocks_that_wait_for_each_other_all_start_whatever_else_runs():
    x = [normal(1_000_000, seed=s).cuda() for s in range(8)]
    expected = [histogram_entropy(v) for v in x]
    streams = [torch.cuda.Stream() for _ in x]
    torch.cuda.synchronize()
    found = []
    for _ in range(30):
        for stream, v in zip(streams, x):
            with torch.cuda.stream(stream):
                found.append(histogram_entropy(v))
                v.mul_(1)  # a kernel of another kind between two of them
    torch.cuda.synchronize()
    assert all(torch.equal(each, e) for each, e in zip(found, expected * 30))


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, FIXED], ids=["own", "fixed"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_layout_gives_the_bits_of_the_cpu(view, bounds):
    x = VIEWS[view]
    for pooled in {None, *range(x.ndim)}:
        assert torch.equal(
            histogram_entropy(on_device(x), range=bounds, dim=pooled).cpu(),
            histogram_entropy(x, range=bounds, dim=pooled),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("num_bins", [2, 3, 100, 256, 257, 2048, 8192, 10_000])
@pytest.mark.parametrize("bounds", [None, FIXED, (0.0, 0.3)], ids=str)
def test_every_dtype_and_number_of_bins_gives_the_bits_of_the_cpu(dtype, num_bins, bounds):
    # heavy-tailed, with many zeros, and on a lattice whose points meet the edges of bins
    for x in (normal(70_001) ** 5, normal(70_001) * (normal(70_001, seed=1) > 1.5), (normal(70_001) * 8).round() / 8):
        x = x.to(dtype)
        assert torch.equal(
            histogram_entropy(x.cuda(), num_bins, bounds, "bits").cpu(), histogram_entropy(x, num_bins, bounds, "bits")
        )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 64, 4096), (3, 2048, 70), (8, 16, 40_000), (70_000, 2, 3), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("bounds", [None, FIXED], ids=["own", "fixed"])
def test_pools_large_and_small_few_and_many(shape, dim, bounds):
    for x in (normal(*shape).bfloat16(), normal(shape[0], shape[2], shape[1]).bfloat16().transpose(1, 2)):
        found = histogram_entropy(x.cuda(), 64, bounds, dim=dim)
        assert torch.equal(found.cpu(), histogram_entropy(x, 64, bounds, dim=dim))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [300, 300_000])
def test_ranges_without_a_width(size):
    for values in ([5.0, 5.0], [0.0, 0.9e-8], [0.0, 2e-8], [-1e30, -1e30]):
        x = torch.tensor(values).repeat(size)
        assert torch.equal(histogram_entropy(x.cuda()).cpu(), histogram_entropy(x))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [300, 300_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(size, dtype):
    x = normal(size).to(dtype)
    x[5], x[-5] = INF, -INF
    assert histogram_entropy(x.cuda()).isnan()
    assert torch.equal(histogram_entropy(x.cuda(), range=FIXED).cpu(), histogram_entropy(x, range=FIXED))
    x[size // 2] = NAN
    assert histogram_entropy(x.cuda()).isnan() and histogram_entropy(x.cuda(), range=FIXED).isnan()
    assert torch.equal(histogram_entropy(x[:5].cuda()).cpu(), histogram_entropy(x[:5]))  # nothing is left behind
    assert not histogram_entropy(x[6:100].cuda(), range=FIXED).isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PUBLISHED_RANGES)
@pytest.mark.parametrize("rounding", ["round", "floor"])
@pytest.mark.parametrize("bounds", [None, FIXED], ids=["own", "fixed"])
def test_the_chunk_is_what_the_rule_says_of_the_entropy(preset, rounding, bounds):
    rule = ChunkRule(*PUBLISHED_RANGES[preset], rounding)
    for sparsity in torch.linspace(-3.0, 3.0, 13):
        for size in (2000, 100_000):
            x = (normal(size) * (normal(size, seed=1) > sparsity)).bfloat16().cuda()
            chunk = device_chunk(x, rule, range=bounds)
            assert (chunk.shape, chunk.dtype, chunk.device) == ((), torch.int32, x.device)
            assert int(chunk) == rule(float(histogram_entropy(x, range=bounds)))


@pytest.mark.gpu
def test_a_nan_takes_the_least_chunk_and_an_empty_tensor_too():
    rule = ChunkRule(128, 2048, 1.0)
    x = normal(50_000).cuda()
    assert int(device_chunk(x, rule)) == 2048
    x[3] = NAN
    assert int(device_chunk(x, rule)) == int(device_chunk(x, rule, range=FIXED)) == 128
    assert int(device_chunk(x[:0], rule)) == 128


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, FIXED], ids=["own", "fixed"])
def test_a_graph_replays_on_new_values_and_the_host_never_waits(bounds):
    rule = ChunkRule(128, 2048, math.log(256))
    x, tokens = normal(1, 128, 2000).cuda(), normal(1, 128, 2000).cuda()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = histogram_entropy(x, range=bounds)
            chunk = device_chunk(x, rule, range=bounds)
            by_token = histogram_entropy(tokens[..., ::8], range=bounds, dim=1)
            again = histogram_entropy(x, range=bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed in range(5):
        x.copy_(normal(1, 128, 2000, seed=seed) ** (2 * seed + 1))
        tokens.copy_(x)
        eager = histogram_entropy(x, range=bounds)  # between replays, on another stream
        graph.replay()
        assert torch.equal(found, eager) and torch.equal(again, eager)
        assert int(chunk) == rule(float(eager))
        assert torch.equal(by_token, histogram_entropy(tokens[..., ::8], range=bounds, dim=1))


@pytest.mark.gpu
def test_streams_do_not_meet():
    x = [normal(400_000, seed=s).cuda() for s in range(4)]
    expected = [histogram_entropy(v) for v in x]
    streams = [torch.cuda.Stream() for _ in x]
    torch.cuda.synchronize()
    found = [[] for _ in x]
    for _ in range(50):
        for stream, v, results in zip(streams, x, found):
            with torch.cuda.stream(stream):
                results.append(histogram_entropy(v))
    torch.cuda.synchronize()
    assert all(torch.equal(result, e) for results, e in zip(found, expected) for result in results)


@pytest.mark.gpu
def test_runs_repeat_bit_for_bit():
    x = (normal(3, 500, 700) ** 3).bfloat16().cuda()
    for arguments in ({}, {"range": FIXED}, {"dim": 1}, {"dim": (0, 2)}):
        first = histogram_entropy(x, **arguments)
        assert all(torch.equal(histogram_entropy(x, **arguments), first) for _ in range(100))


@pytest.mark.gpu
def test_a_compiled_function_keeps_its_bits():
    def two(x):
        return histogram_entropy(x * 2), histogram_entropy(x, 64, FIXED, dim=1)

    x = normal(2, 64, 300).cuda()
    for found, expected in zip(torch.compile(two, fullgraph=True)(x), two(x)):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_the_operators_are_registered_soundly_on_cuda():
    x = normal(2, 64, 300).cuda()
    for arguments in [(x, 16, None, 1.0, [0, 1, 2]), (x.bfloat16(), 256, [-1.0, 1.0], 2.0, [1])]:
        torch.library.opcheck(torch.ops.corey.histogram_entropy, arguments)
    torch.library.opcheck(torch.ops.corey.entropy_chunk, (x, 16, None, [0.5, 1.0], 128))


@pytest.mark.gpu
def test_offsets_beyond_2_31_values():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows = torch.empty(3, 2**30 + 24, dtype=torch.bfloat16, device="cuda")
    tail = rows[:, -50_001:]
    values = normal(3, 50_001).bfloat16()
    tail.copy_(values)
    for arguments in ({}, {"range": FIXED}, {"dim": 1}):
        assert torch.equal(histogram_entropy(tail, **arguments).cpu(), histogram_entropy(values, **arguments))
    rows.zero_()[0, 0] = 1.0
    assert float(histogram_entropy(rows)) < 1e-6  # one of 3.2e9 values in another bin
