"""The CUDA scan's source, run on the CPU: right values, the same bits for every chunk, and breaks that are noticed."""

import pytest
import torch
from emulation import edit, emulated  # noqa: F401
from scan_inputs import OPTIONS, in_float64, lay_out, make_inputs, relative_error

from corey import _scan_way
from corey._scan_args import TILE
from corey._scan_cuda import _divisor
from corey.scan import selective_scan_ref

PAIRS = _scan_way.PAIRS
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
CHUNKS = (None, 128, 256, 384, 2**20 * 128, torch.tensor(200, dtype=torch.int32))

CASES = {
    "channel-major": {"batch": 2, "dim": 40, "length": 300},
    "token-major": {"batch": 2, "dim": 40, "length": 300, "layout": "token_major"},
    "bfloat16, whole pieces": {"batch": 2, "dim": 64, "length": 384, "dtype": bf16},
    "float16, whole pieces, token-major": {"batch": 1, "dim": 64, "length": 352, "dtype": f16, "layout": "token_major"},
    "bfloat16, token-major": {"batch": 1, "dim": 72, "length": 400, "dtype": bf16, "layout": "token_major"},
    "float16, half of a projection": {"batch": 1, "dim": 72, "length": 400, "dtype": f16, "layout": "padded_channels"},
    "bfloat16, unaligned rows": {"batch": 2, "dim": 33, "length": 257, "dtype": bf16, "layout": "offset"},
    "no contiguous axis": {"batch": 2, "dim": 36, "length": 300, "layout": "sliced"},
    "5 states, constant B and C": {
        "batch": 1,
        "dim": 33,
        "length": 260,
        "states": 5,
        "B_kind": "constant",
        "C_kind": "constant",
    },
    "64 states, groups": {"batch": 1, "dim": 40, "length": 260, "states": 64, "B_kind": "grouped", "C_kind": "grouped"},
    "one state, forgetful": {"batch": 1, "dim": 130, "length": 129, "states": 1, "memory": "forgetful"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_are_right_and_chunks_never_change_a_bit(case, emulated):  # noqa: F811
    inputs = make_inputs(options=OPTIONS, **case)
    y_64, last_64 = selective_scan_ref(**in_float64(inputs), return_last_state=True)
    y, last = emulated(inputs, None)
    rounding = 0 if y.dtype == f32 else 1.05 * relative_error(y_64.to(y.dtype), y_64)
    assert relative_error(y, y_64) < max(rounding, 1e-6) and relative_error(last, last_64) < 1e-6
    for chunk_size in CHUNKS:
        y_chunked, last_chunked = emulated(inputs, chunk_size)
        assert torch.equal(y_chunked, y) and torch.equal(last_chunked, last)


IN_PAIRS = [
    (0, {"dtype": f32, "length": 288, "memory": "forgetful", "dim": 40}),
    (1, {"dtype": bf16, "length": 392, "B_kind": "grouped", "C_kind": "grouped"}),
    (2, {"dtype": f16, "length": 448, "B_kind": "constant"}),
    (3, {"dtype": bf16, "length": 385, "layout": "token_major", "B_kind": "grouped", "C_kind": "grouped"}),
    (4, {"dtype": f16, "length": 300, "layout": "token_major", "memory": "forgetful"}),
    (5, {"dtype": bf16, "length": 264}),
    (0, {"dtype": bf16, "length": 281}),  # unaligned rows
    (0, {"dtype": bf16, "length": 512, "dim": 36}),  # whole pieces only
    (1, {"dtype": bf16, "length": 448}),
    (3, {"dtype": f16, "length": 320, "dim": 96, "layout": "token_major"}),
]


@pytest.mark.parametrize("size, case", IN_PAIRS, ids=[f"{PAIRS[size]}, {case['length']}" for size, case in IN_PAIRS])
def test_twice_the_lanes_give_the_same_bits(size, case, emulated, monkeypatch):  # noqa: F811
    inputs = make_inputs(options=OPTIONS, **{"batch": 2, "dim": 80} | case)
    for name in ("B", "C") if case.get("layout") == "token_major" else ("C",):
        inputs[name] = lay_out(inputs[name].flatten(0, -3), "token_major").view(inputs[name].shape)
    inputs["u"][..., 260:] = 0  # a forgetful state dies out, towards a zero of either sign
    want = emulated(inputs, 128)
    use_pairs(monkeypatch, PAIRS[size])
    for got, right in zip(emulated(inputs, 2**20 * 128), want):
        assert torch.equal(got, right) and torch.equal(got.signbit(), right.signbit())


def use_pairs(monkeypatch, block):
    """One pass has two lanes a share from here on."""
    monkeypatch.setattr(_scan_way, "pairs_for", lambda *_: block)


PAIR_BREAKS = {
    "a round is overwritten while it is walked": (
        "    ring[now].left.wait(parity);\n    stage(t0 + 2 * T, free);\n",
        "    stage(t0 + 2 * T, free);\n    ring[now].left.wait(parity);\n",
    ),
    "the second lane starts anew": (
        "place == 0 ? constants()->nothing : memory->y",
        "true ? constants()->nothing : memory->y",
    ),
    "the second lane does not wait": ("        step();\n        __syncwarp();\n", "        step();\n"),
    "the second lane keeps what it found too early": (
        "h[i] = now ? H[i] : h[i];",
        "h[i] = now && ends_one ? H[i] : h[i];",
    ),
    "a tile goes on": ("next_tile(place == 1 && t0 % TILE == 0, t0 > w.first);", ";"),
    "a tile before the first": (
        "next_tile(place == 1 && t0 % TILE == 0, t0 > w.first);",
        "next_tile(place == 1 && t0 % TILE == 0, true);",
    ),
    "factors of two tiles": ("if (step == 3 && ends_tile) sum = 0.f;", ""),
    "the last tokens are dropped": ("      step();\n      step();\n", "      step();\n"),
    "the next round is read too early": (
        "if (i == 2) {\n        next.staged.wait(parity);\n        read",
        "if (i == 1) {\n        next.staged.wait(parity);\n        read",
    ),
    "shares and C are read too late": ("if (i == 1) use_from(memory", "if (i == 2) use_from(memory"),
    "the second round is not staged": ("  stage(w.from + T, 1);\n", ""),
    "u of another round": ("us[0] = us[1];", "us[0] = us[2];"),
}


@pytest.mark.parametrize("old, new", PAIR_BREAKS.values(), ids=PAIR_BREAKS)
def test_breaks_of_pairs_are_noticed(old, new, emulated, monkeypatch):  # noqa: F811
    inputs = make_inputs(batch=1, dim=40, length=448, options=OPTIONS)  # whole rounds up to the end
    want = emulated(inputs, 128)
    use_pairs(monkeypatch, PAIRS[1])
    assert all(torch.equal(got, right) for got, right in zip(emulated(inputs, 2**20 * 128), want))
    assert not all(torch.equal(got, right) for got, right in zip(emulated(inputs, 2**20 * 128, edit(old, new)), want))


def in_parts(scan, inputs, monkeypatch, change=None):
    """y and the last state of two blocks a sequence."""
    monkeypatch.setattr(_scan_way, "parts_for", lambda *_: _scan_way.IN_PARTS)
    tiles = -(-inputs["u"].shape[2] // TILE)
    results = scan(inputs, _scan_way.first_part(tiles) * TILE, change)
    monkeypatch.setattr(_scan_way, "parts_for", lambda *_: None)
    return results


PARTS = {
    "channel-major, whole pieces": {"dtype": bf16, "length": 768, "dim": 32},
    "token-major": {"dtype": bf16, "length": 1100, "layout": "token_major", "B_kind": "grouped", "C_kind": "grouped"},
    "float16, constant B": {"dtype": f16, "length": 920, "B_kind": "constant"},
    "float32, forgetful": {"dtype": f32, "length": 1312, "memory": "forgetful"},
    "float32, of long memory": {"dtype": f32, "length": 801, "layout": "token_major", "memory": "long"},
}


@pytest.mark.parametrize("case", PARTS.values(), ids=PARTS)
def test_two_blocks_a_sequence_give_the_same_bits(case, emulated, monkeypatch):  # noqa: F811
    inputs = make_inputs(options=OPTIONS, **{"batch": 2, "dim": 40} | case)
    for got, right in zip(in_parts(emulated, inputs, monkeypatch), emulated(inputs, 128)):
        assert torch.equal(got, right) and torch.equal(got.signbit(), right.signbit())


PART_BREAKS = {
    "the state is read before it has come": ("    lane.inbox.full.wait(0);\n", ""),
    "a round ahead is left too early": (
        "    round.left.arrive();  // and the one before is left\n",
        "    if (t0 == lane.w.from) round.left.arrive();\n    if (t0 + T < lane.w.first) next.left.arrive();\n",
    ),
    "the state is sent a tile late": ("t0 == p.lead)", "t0 == p.lead + TILE)"),
    "the state is sent before its tile has ended": ("t0 == p.lead)", "t0 == p.lead - T)"),
    "the second part starts from nothing": ("    h[0] = H[0];\n", ""),
    "a tile is not linked": (
        "i < (lane.w.first - lane.w.from) / TILE;",
        "i < (lane.w.first - lane.w.from) / TILE - 1;",
    ),
    "a tile goes on": ("      lane.s[0] = lane.s[1] = 0.f;\n", ""),
    "the sum of a tile goes on": ("lane.find_factors(i, ends_tile);", "lane.find_factors(i, false);"),
    "the gate of another token": ("z(p.z, p.sz, w, w.first)", "z(p.z, p.sz, w, w.from)"),
    "the first part's state is the last": ("(PARTS == 1 || w.end == p.length)", "w.end < p.length"),
    "the second part looks ahead from another tile": (
        "w.from = part > 0 ? p.lead : w.first;",
        "w.from = part > 0 ? p.lead + TILE : w.first;",
    ),
}


@pytest.mark.parametrize("old, new", PART_BREAKS.values(), ids=PART_BREAKS)
def test_breaks_of_parts_are_noticed(old, new, emulated, monkeypatch):  # noqa: F811
    inputs = make_inputs(batch=1, dim=16, length=2048, options=OPTIONS)
    monkeypatch.setattr(_scan_way, "LEAD", 0.5)  # so that the second block has to wait for the first one
    want = emulated(inputs, 128)
    assert all(torch.equal(got, right) for got, right in zip(in_parts(emulated, inputs, monkeypatch), want))
    broken = in_parts(emulated, inputs, monkeypatch, edit(old, new))
    assert not all(torch.equal(got, right) for got, right in zip(broken, want))


SKIP_TILES = edit("    chain.load(now, first + 2 * Chain::AHEAD);\n", "")


@pytest.mark.parametrize("change, right", [(None, True), (SKIP_TILES, False)], ids=["as it is", "tiles not loaded"])
def test_many_tiles_are_linked(change, right, emulated):  # noqa: F811
    inputs = make_inputs(batch=1, dim=8, length=128 * 70 + 5, options=OPTIONS)  # linking loads 32 tiles at a time
    y, last = emulated(inputs, 128 * 71, change)
    y_chunked, last_chunked = emulated(inputs, 128, change)
    assert (torch.equal(y_chunked, y) and torch.equal(last_chunked, last)) == right


def test_divisors_divide_all_that_a_grid_counts():
    numbers = [0, 1, 2, 3, 62, 63, 64, 65, 2**16 - 1, 2**16, 10**9, 2**30, 2**31 - 2, 2**31 - 1]
    for by in numbers[1:]:
        same, magic, shift = _divisor(by)
        assert same == by and 0 < magic < 2**32 and shift < 32
        for n in {*numbers, *(by * k + j for k in (1, 2, 7) for j in (-1, 0, 1))}:
            if n < 2**31:
                assert ((n * magic >> 32) + n) % 2**32 >> shift == n // by


PIECE_BREAKS = {
    "the end of a chunk is not fetched": ("(ONE_PASS || t0 < w.end)", "(ONE_PASS || t0 + T < w.end)"),
    "whole pieces are taken for such to the end": ("CHANNELS && t0 + T <= w.end;", "CHANNELS && t0 < w.end;"),
    "B and C are read as if contiguous": ("from[e * st.token]", "from[e]"),
    "one group's channels": ("w.g = digit(p.groups);", "w.g = digit(p.groups) * 0;"),
}


@pytest.mark.parametrize("old, new", PIECE_BREAKS.values(), ids=PIECE_BREAKS)
def test_breaks_of_whole_and_partial_pieces_are_noticed(old, new, emulated):  # noqa: F811
    inputs = make_inputs(batch=1, dim=80, length=300, layout="sliced", B_kind="grouped", C_kind="grouped")
    inputs["B"] = lay_out(inputs["B"].flatten(0, 1), "sliced").unflatten(0, inputs["B"].shape[:2])
    y_64, last_64 = selective_scan_ref(**in_float64(inputs), return_last_state=True)

    def right(y, last):  # NaN, where nothing was written, is not
        return relative_error(y, y_64) < 1e-6 and relative_error(last, last_64) < 1e-6

    assert right(*emulated(inputs, None))
    assert not right(*emulated(inputs, 128, edit(old, new)))


def test_layouts_give_the_same_bits(emulated):  # noqa: F811
    case = {"batch": 2, "dim": 40, "length": 300, "options": OPTIONS}
    want = emulated(make_inputs(**case), None)
    for layout in ("token_major", "offset", "sliced"):
        got = emulated(make_inputs(layout=layout, **case), 128)
        assert all(torch.equal(one, other) for one, other in zip(got, want))


BREAKS = {
    "carry dropped": ("H == 0.f ? s : fmaf(factor, H, s)", "s"),
    "carry stale": ("if (FIND_Y) H[i] = carry(factor_of(A[i], sum), H[i], s[i]);", ""),
    "tail dropped": ("w.end = min(w.first + chunk, p.length);", "w.end = min(w.first + chunk, p.length / 8 * 8);"),
    "last state lost": ("  p.last[i] = chain.H;\n", ""),
    "beyond the end": ("if (!ALL && t0 + t >= w.end) step[e] = 0.f;", ""),
}


@pytest.mark.parametrize("old, new", BREAKS.values(), ids=BREAKS)
def test_a_broken_kernel_is_noticed(old, new, emulated):  # noqa: F811
    inputs = make_inputs(batch=1, dim=24, length=300, options=OPTIONS)
    y_64, last_64 = selective_scan_ref(**in_float64(inputs), return_last_state=True)
    change, wrong = edit(old, new), False
    for chunk_size in (128, 2**20 * 128):
        y, last = emulated(inputs, chunk_size, change)
        wrong |= not (relative_error(y, y_64) < 1e-3 and relative_error(last, last_64) < 1e-3)
    assert wrong
