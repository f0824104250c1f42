"""What is compiled of the CPU scan. Sixteen channels make one vector, tokens run in order, the state is always float32.

Every tensor reaches the kernel as a row of integers (address, dtype code, strides in bytes), so one compiled function
serves every dtype, layout and option, and nothing is copied whole. Values are staged into float32 vectors of 16
channels, 16 tokens at a time, and the recurrence of `corey.scan` is walked token by token with explicit vector
arithmetic: fused multiply-adds are written out, the order of every sum is fixed, and nothing is left for an optimiser
to reorder.

All that is compiled stays in this one file, because Numba's disk cache notices edits only in the file of the kernel.
"""

import operator
import warnings
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 16  # channels in a vector; LLVM splits it where the machine's vectors are shorter
VECTOR = 4 * LANES  # bytes
GROUP_ROWS = 16  # tokens staged at a time; 16 x 16 so that a transpose is square

# Dtype codes; ABSENT marks an option that was not given.
FLOAT32, BFLOAT16, FLOAT16, ABSENT = 0, 1, 2, -1

# Rows of the tensor table, and its columns. LANE and ROW are strides along the two axes of a staged block.
(U, DELTA, Z, OUT, B_IN, C_IN, A_IN, D_IN, BIAS, STATE) = range(10)
(ADDRESS, KIND, BATCH, GROUP, LANE, ROW) = range(6)


class Sizes(NamedTuple):
    """What the kernel needs to know besides the tensors; `channels` counts one group's."""

    groups: int
    channels: int
    length: int
    states: int
    chunk: int
    delta_softplus: bool
    b_is_constant: bool
    c_is_constant: bool


def scratch_bytes(chunk, states):
    """Packed B and C of a chunk; A, the state, constant B and C; seven vectors for each of 16 tokens; room to align."""
    packed_row = -(-states // LANES) * VECTOR
    return 2 * chunk * packed_row + 4 * states * VECTOR + 7 * GROUP_ROWS * VECTOR + VECTOR


# ---- vectors of 16 float32 as a Numba type ---------------------------------------------------------------------------


class Lanes(types.Type):
    def __init__(self):
        super().__init__(name="corey_lanes")


lanes_type = Lanes()
_F32 = ir.FloatType()
_VF32 = ir.VectorType(_F32, LANES)
_VI32 = ir.VectorType(ir.IntType(32), LANES)
_VI16 = ir.VectorType(ir.IntType(16), LANES)
_VF16 = ir.VectorType(ir.HalfType(), LANES)


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _VF32)


def _arithmetic(symbol, emit):
    @type_callable(symbol)
    def typer(context):
        return lambda a, b: lanes_type if isinstance(a, Lanes) and isinstance(b, Lanes) else None

    @lower_builtin(symbol, Lanes, Lanes)
    def lower(context, builder, signature, arguments):
        return emit(builder, *arguments)


_arithmetic(operator.add, lambda builder, a, b: builder.fadd(a, b))
_arithmetic(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_arithmetic(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_arithmetic(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


def _every_lane(builder, scalar):
    one = builder.insert_element(ir.Constant(_VF32, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(_VI32, [0] * LANES))


def _integers(value, like=_VI32):
    return ir.Constant(like, [value] * LANES)


def _at(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


@intrinsic
def splat(typing, x):
    return lanes_type(types.float32), lambda context, builder, signature, args: _every_lane(builder, args[0])


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, rounded once."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(_VF32, [_VF32] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), args)

    return lanes_type(a, b, c), emit


@intrinsic
def at_least(typing, x, low):
    """max(x, low) that keeps a NaN in x."""

    def emit(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", *args), args[1], args[0])

    return lanes_type(x, low), emit


@intrinsic
def at_most(typing, x, high):
    """min(x, high) that keeps a NaN in x."""

    def emit(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", *args), args[1], args[0])

    return lanes_type(x, high), emit


@intrinsic
def negative_magnitude(typing, x):
    """-|x|."""

    def emit(context, builder, signature, args):
        bits = builder.or_(builder.bitcast(args[0], _VI32), _integers(0x80000000))
        return builder.bitcast(bits, _VF32)

    return lanes_type(x), emit


@intrinsic
def low_bits_as_exponent(typing, x):
    """2**(k - 127) for the low eight bits k of x's own bit pattern: 0 for k = 0, infinity for k = 255."""

    def emit(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.bitcast(args[0], _VI32), _integers(23)), _VF32)

    return lanes_type(x), emit


@intrinsic
def load(typing, address):
    def emit(context, builder, signature, args):
        return builder.load(_at(builder, args[0], _VF32), align=4)

    return lanes_type(types.int64), emit


@intrinsic
def load_bfloat16(typing, address):
    def emit(context, builder, signature, args):
        half = builder.zext(builder.load(_at(builder, args[0], _VI16), align=2), _VI32)
        return builder.bitcast(builder.shl(half, _integers(16)), _VF32)

    return lanes_type(types.int64), emit


@intrinsic
def load_float16(typing, address):
    def emit(context, builder, signature, args):
        return builder.fpext(builder.load(_at(builder, args[0], _VF16), align=2), _VF32)

    return lanes_type(types.int64), emit


@intrinsic
def store(typing, address, x):
    def emit(context, builder, signature, args):
        builder.store(args[1], _at(builder, args[0], _VF32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, x), emit


@intrinsic
def store_bfloat16(typing, address, x):
    """Round to nearest, ties to even; NaN stays NaN."""

    def emit(context, builder, signature, args):
        bits = builder.bitcast(args[1], _VI32)
        odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _integers(0x7FFF))), _integers(16))
        is_nan = builder.fcmp_unordered("uno", args[1], args[1])
        half = builder.trunc(builder.select(is_nan, _integers(0x7FC0), rounded), _VI16)
        builder.store(half, _at(builder, args[0], _VI16), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, x), emit


@intrinsic
def store_float16(typing, address, x):
    def emit(context, builder, signature, args):
        builder.store(builder.fptrunc(args[1], _VF16), _at(builder, args[0], _VF16), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, x), emit


@intrinsic
def load_everywhere(typing, address):
    """One float32 in all lanes."""

    def emit(context, builder, signature, args):
        return _every_lane(builder, builder.load(_at(builder, args[0], _F32), align=4))

    return lanes_type(types.int64), emit


def _copier(bits):
    @intrinsic
    def copy(typing, target, source):
        def emit(context, builder, signature, args):
            element = builder.load(_at(builder, args[1], ir.IntType(bits)), align=bits // 8)
            builder.store(element, _at(builder, args[0], ir.IntType(bits)), align=bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return copy


copy_four_bytes = _copier(32)
copy_two_bytes = _copier(16)


@intrinsic
def transpose(typing, target, target_stride, source):
    """Write the 16 x 16 float32 block at `source`, rows 64 bytes apart, transposed to `target`."""

    def emit(context, builder, signature, args):
        def row_address(base, row, stride):
            return builder.add(base, builder.mul(ir.Constant(ir.IntType(64), row), stride))

        dense = ir.Constant(ir.IntType(64), VECTOR)
        rows = [builder.load(_at(builder, row_address(args[2], i, dense), _VF32), align=4) for i in range(LANES)]
        for step in (1, 2, 4, 8):  # swap the off-diagonal halves of ever larger squares
            keep = ir.Constant(_VI32, [j if not j & step else LANES + (j ^ step) for j in range(LANES)])
            swap = ir.Constant(_VI32, [j | step if not j & step else LANES + j for j in range(LANES)])
            for i in range(LANES):
                if not i & step:
                    a, b = rows[i], rows[i | step]
                    rows[i], rows[i | step] = builder.shuffle_vector(a, b, keep), builder.shuffle_vector(a, b, swap)
        for i, row in enumerate(rows):
            builder.store(row, _at(builder, row_address(args[0], i, args[1]), _VF32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


# ---- elementary functions --------------------------------------------------------------------------------------------

_f = np.float32
ZERO, ONE, TWO = _f(0), _f(1), _f(2)
# Adding 1.5 * 2**23 rounds to an integer; the extra 127 leaves the biased exponent in the low bits of the sum.
ROUNDER = _f(1.5 * 2**23 + 127)
LOWEST, HIGHEST = _f(-127), _f(128)  # exponents of 0 and of infinity
LOG2_E, LOG2_E_REST = _f(1.4426950408889634), _f(1.4426950408889634 - float(_f(1.4426950408889634)))
LOWEST_E, HIGHEST_E = _f(-127 * 0.6931471805599453), _f(128 * 0.6931471805599453)
# 2**f = 1 + f * (E1 + f * (...)) on [-1/2, 1/2], relative error 2e-9 before rounding; exactly 1 at f = 0.
E1, E2, E3 = _f(0.6931471824645996), _f(0.24022647738456726), _f(0.055503323674201965)
E4, E5, E6 = _f(0.00961843691766262), _f(0.0013398875016719103), _f(0.00015353361959569156)
# atanh(s) / s = 1 + v * (S1 + v * (...)) with v = s**2 on [0, 1/9], relative error 1e-10 before rounding.
S1, S2, S3 = _f(0.3333333730697632), _f(0.19999438524246216), _f(0.14308442175388336)
S4, S5 = _f(0.10713829100131989), _f(0.12150467187166214)

_compiled = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_compiled
def _two_to_fraction(f):
    p = fma(splat(E6), f, splat(E5))
    p = fma(p, f, splat(E4))
    p = fma(p, f, splat(E3))
    p = fma(p, f, splat(E2))
    p = fma(p, f, splat(E1))
    return fma(p, f, splat(ONE))


@_compiled
def exp2(x):
    """2**x; below 2**-126.5 it is 0, from 2**127.5 on it is infinity."""
    x = at_most(at_least(x, splat(LOWEST)), splat(HIGHEST))
    shifted = x + splat(ROUNDER)
    return _two_to_fraction(x - (shifted - splat(ROUNDER))) * low_bits_as_exponent(shifted)


@_compiled
def exp(x):
    """e**x with log2(e) in two parts, so that the relative error stays at rounding for every x."""
    x = at_most(at_least(x, splat(LOWEST_E)), splat(HIGHEST_E))
    shifted = fma(x, splat(LOG2_E), splat(ROUNDER))
    whole = shifted - splat(ROUNDER)
    fraction = fma(x, splat(LOG2_E_REST), fma(x, splat(LOG2_E), splat(ZERO) - whole))
    return _two_to_fraction(fraction) * low_bits_as_exponent(shifted)


@_compiled
def softplus(x):
    """log(1 + e**x) = max(x, 0) + log1p(e**-|x|), and log1p(e) = 2 atanh(e / (2 + e)): accurate where e is tiny too."""
    e = exp(negative_magnitude(x))
    s = e / (splat(TWO) + e)
    v = s * s
    p = fma(splat(S5), v, splat(S4))
    p = fma(p, v, splat(S3))
    p = fma(p, v, splat(S2))
    p = fma(p, v, splat(S1))
    twice = s + s
    return at_least(x, splat(ZERO)) + fma(twice * v, p, twice)


@_compiled
def silu(x):
    return x / (splat(ONE) + exp(splat(ZERO) - x))


# ---- staging: any dtype and stride in, float32 vectors of 16 lanes out, and back ------------------------------------


@_compiled
def _load_as(address, kind):
    if kind == FLOAT32:
        return load(address)
    if kind == BFLOAT16:
        return load_bfloat16(address)
    return load_float16(address)


@_compiled
def _store_as(address, x, kind):
    if kind == FLOAT32:
        store(address, x)
    elif kind == BFLOAT16:
        store_bfloat16(address, x)
    else:
        store_float16(address, x)


@_compiled
def _copy_element(target, source, size):
    if size == 4:
        copy_four_bytes(target, source)
    else:
        copy_two_bytes(target, source)


@_compiled
def _read(r, batch, group, lane, row, lanes, rows, target, target_stride, spare):
    """Read rows x lanes elements of tensor r as float32 vectors, one a row, 0 in lanes past `lanes`.

    `spare` holds 16 vectors.
    """
    kind, lane_stride, row_stride = r[KIND], r[LANE], r[ROW]
    source = r[ADDRESS] + batch * r[BATCH] + group * r[GROUP] + lane * lane_stride + row * row_stride
    size = 4 if kind == FLOAT32 else 2
    done = 0
    if lanes == LANES and lane_stride == size:
        for i in range(rows):
            store(target + i * target_stride, _load_as(source + i * row_stride, kind))
        done = rows
    elif lanes == LANES and row_stride == size:
        while done + GROUP_ROWS <= rows:
            for i in range(LANES):
                store(spare + i * VECTOR, _load_as(source + i * lane_stride + done * row_stride, kind))
            transpose(target + done * target_stride, target_stride, spare)
            done += GROUP_ROWS
    for i in range(done, rows):
        store(spare, splat(ZERO))
        for j in range(lanes):
            _copy_element(spare + j * size, source + i * row_stride + j * lane_stride, size)
        store(target + i * target_stride, _load_as(spare, kind))


@_compiled
def _write(r, batch, lane, row, lanes, rows, source, spare):
    """The way back: vectors 64 bytes apart to rows x lanes elements of tensor r."""
    kind, lane_stride, row_stride = r[KIND], r[LANE], r[ROW]
    target = r[ADDRESS] + batch * r[BATCH] + lane * lane_stride + row * row_stride
    size = 4 if kind == FLOAT32 else 2
    done = 0
    if lanes == LANES and lane_stride == size:
        for i in range(rows):
            _store_as(target + i * row_stride, load(source + i * VECTOR), kind)
        done = rows
    elif lanes == LANES and row_stride == size:
        while done + GROUP_ROWS <= rows:
            transpose(spare, VECTOR, source + done * VECTOR)
            for i in range(LANES):
                _store_as(target + i * lane_stride + done * row_stride, load(spare + i * VECTOR), kind)
            done += GROUP_ROWS
    for i in range(done, rows):
        _store_as(spare, load(source + i * VECTOR), kind)
        for j in range(lanes):
            _copy_element(target + i * row_stride + j * lane_stride, spare + j * size, size)


# ---- the scan --------------------------------------------------------------------------------------------------------


@_compiled
def _discretise(r, batch, channel, token, lanes, rows, bias, delta_softplus, u, delta, delta_u, spare):
    """The step delta, through bias and softplus, and delta * u, from tensor r and the u already read."""
    _read(r, batch, 0, channel, token, lanes, rows, delta, VECTOR, spare)
    for i in range(rows):
        step = load(delta + i * VECTOR) + bias
        if delta_softplus:
            step = softplus(step)
        store(delta + i * VECTOR, step)
        store(delta_u + i * VECTOR, step * load(u + i * VECTOR))


@_compiled
def _walk(rows, states, delta, delta_u, decay, state, b, b_is_constant, c, c_is_constant, packed_row, y):
    """h = 2**(delta A log2 e) h + (delta u) B and y = sum_n C h for `rows` tokens of 16 channels, h in place."""
    for i in range(rows):
        step = load(delta + i * VECTOR)
        drive = load(delta_u + i * VECTOR)
        total = splat(ZERO)
        for n in range(states):
            b_n = load(b + n * VECTOR) if b_is_constant else load_everywhere(b + i * packed_row + n * 4)
            c_n = load(c + n * VECTOR) if c_is_constant else load_everywhere(c + i * packed_row + n * 4)
            h = fma(exp2(step * load(decay + n * VECTOR)), load(state + n * VECTOR), drive * b_n)
            store(state + n * VECTOR, h)
            total = fma(h, c_n, total)
        store(y + i * VECTOR, total)


@_compiled
def _pack(r, batch, group, start, rows, states, packed, packed_row, spare):
    """B or C of `rows` tokens as float32 (token, state) with padded rows: read once a chunk, for all of a group."""
    for n in range(0, states, LANES):
        _read(r, batch, group, n, start, min(LANES, states - n), rows, packed + n * 4, packed_row, spare)


def _kept_on_disk(function):
    """Compile on the first call and keep the result in Numba's cache, so that the next process starts in a moment."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError as error:  # neither this directory nor the user's cache directory can be written
        warnings.warn(f"{error}; every process compiles the scan anew unless NUMBA_CACHE_DIR is writable", stacklevel=2)
        return njit(nogil=True, error_model="numpy")(function)


@_kept_on_disk
def scan_blocks(table, sizes, scratch, first, last):
    """Scan channel blocks first to last - 1, chunk after chunk; states wait in the `last_state` tensor between chunks.

    Blocks are numbered batch first, then group, then 16-channel block in the group, and never reach over a group, so
    that all lanes of a vector share B and C. `scratch` is the address of `scratch_bytes` bytes.
    """
    groups, channels, length, states, chunk, delta_softplus, b_is_constant, c_is_constant = sizes
    has_skip, has_bias, has_z = table[D_IN, KIND] != ABSENT, table[BIAS, KIND] != ABSENT, table[Z, KIND] != ABSENT
    blocks_in_group = (channels + LANES - 1) // LANES

    packed_row = (states + LANES - 1) // LANES * VECTOR
    packed_b = (scratch + VECTOR - 1) // VECTOR * VECTOR
    packed_c = packed_b + chunk * packed_row
    decay = packed_c + chunk * packed_row
    state = decay + states * VECTOR
    constant_b = state + states * VECTOR
    constant_c = constant_b + states * VECTOR
    spare = constant_c + states * VECTOR
    delta = spare + GROUP_ROWS * VECTOR
    u = delta + GROUP_ROWS * VECTOR
    delta_u = u + GROUP_ROWS * VECTOR
    z = delta_u + GROUP_ROWS * VECTOR
    y = z + GROUP_ROWS * VECTOR
    weight = y + GROUP_ROWS * VECTOR

    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        packed_for = -1
        for block in range(first, last):
            batch_and_group = block // blocks_in_group
            batch, group = batch_and_group // groups, batch_and_group % groups
            channel_in_group = block % blocks_in_group * LANES
            channel = group * channels + channel_in_group
            lanes = min(LANES, channels - channel_in_group)

            if packed_for != batch_and_group:
                packed_for = batch_and_group
                if not b_is_constant:
                    _pack(table[B_IN], batch, group, start, stop - start, states, packed_b, packed_row, spare)
                if not c_is_constant:
                    _pack(table[C_IN], batch, group, start, stop - start, states, packed_c, packed_row, spare)

            _read(table[STATE], batch, 0, channel, 0, lanes, states, state, VECTOR, spare)
            _read(table[A_IN], 0, 0, channel, 0, lanes, states, decay, VECTOR, spare)
            for n in range(states):
                store(decay + n * VECTOR, load(decay + n * VECTOR) * splat(LOG2_E))
            if b_is_constant:
                _read(table[B_IN], 0, 0, channel, 0, lanes, states, constant_b, VECTOR, spare)
            if c_is_constant:
                _read(table[C_IN], 0, 0, channel, 0, lanes, states, constant_c, VECTOR, spare)
            bias = skip = splat(ZERO)
            if has_bias:
                _read(table[BIAS], 0, 0, channel, 0, lanes, 1, weight, VECTOR, spare)
                bias = load(weight)
            if has_skip:
                _read(table[D_IN], 0, 0, channel, 0, lanes, 1, weight, VECTOR, spare)
                skip = load(weight)

            for token in range(start, stop, GROUP_ROWS):
                rows = min(GROUP_ROWS, stop - token)
                _read(table[U], batch, 0, channel, token, lanes, rows, u, VECTOR, spare)
                _discretise(
                    table[DELTA], batch, channel, token, lanes, rows, bias, delta_softplus, u, delta, delta_u, spare
                )
                packed = (token - start) * packed_row
                b = constant_b if b_is_constant else packed_b + packed
                c = constant_c if c_is_constant else packed_c + packed
                _walk(rows, states, delta, delta_u, decay, state, b, b_is_constant, c, c_is_constant, packed_row, y)
                if has_skip:
                    for i in range(rows):
                        store(y + i * VECTOR, fma(skip, load(u + i * VECTOR), load(y + i * VECTOR)))
                if has_z:
                    _read(table[Z], batch, 0, channel, token, lanes, rows, z, VECTOR, spare)
                    for i in range(rows):
                        store(y + i * VECTOR, load(y + i * VECTOR) * silu(load(z + i * VECTOR)))
                _write(table[OUT], batch, channel, token, lanes, rows, y, spare)

            _write(table[STATE], batch, channel, 0, lanes, states, state, spare)
