// A histogram in shared memory, for any kernel that has values in registers. A block uses it so:
//
//     if (threadIdx.x == 0) order = begin(sink, pool);
//     SharedHistogram<32> histogram(table, num_bins);        // all threads; table_words(num_bins), aligned to 16 bytes
//     histogram.clear();  __syncthreads();
//     histogram.add(bins.locate<false, EXACT>(value));       // any thread, any number of times
//     finish(sink, histogram, saw_nan, pool, blocks, order);  // all threads: adds to the counts of the whole grid
//
// and one block computes the entropy and the chunk. Counts are integers, so their order leaves no trace.
#pragma once

#include "common.cuh"

constexpr double SPAN_EPS = 1e-8, SHARE_EPS = 1e-10;  // as published; see corey/entropy.py
constexpr uint32 BIN_ZERO = 0x4b000000u;              // 2^23 as a float: adding it leaves an integer in the low bits

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---- bins -----------------------------------------------------------------------------------------------------------

// How (v - lo) / span is found. What is not EXACT takes fewer instructions, and is for where it was shown to put every
// value into the same bin: TWO_PRODUCTS and ONE_PRODUCT by `agrees`, or the latter by the host (corey/_entropy_cuda.py).
enum Quotient { EXACT, TWO_PRODUCTS, ONE_PRODUCT };

// Bins over [lo, lo + span]. `locate` gives BIN_ZERO + floor(((v - lo) / span) * num_bins), clamped to 0 and num_bins,
// with the bits of fp32 subtraction, IEEE division and multiplication in this order. NaN falls into bin 0.
//
// A division takes 4 instructions here. All is scaled by a power of two that brings the span into [1/2, 1), so that the
// first .SAT, which costs nothing, both clamps and keeps infinities out, and nothing that decides a bin can over- or
// underflow. With 1 / width = inverse + inverse_low the first quotient is within one ulp, hence its remainder is exact
// and one correction by the correctly rounded inverse rounds correctly (Markstein 1990).
struct Bins {
    float scale, shift, width, inverse, inverse_low, count;

    Bins() = default;
    // The host has the same in corey/_entropy_cuda.py, `fixed_bins`.
    __device__ Bins(float lo, float span, int num_bins) {
        int exponent = max(int(__float_as_uint(span) >> 23 & 255), 1);
        scale = __uint_as_float(exponent < 253 ? uint32(253 - exponent) << 23 : 0x400000u >> (exponent - 253));
        shift = __fmul_rn(-scale, lo);
        if (!(fabsf(shift) < infinity())) {  // lo is beyond 2^127 widths: every value is below the range or above it
            scale = 1.0f;
            shift = -lo;
        }
        width = __fmul_rn(span, scale);
        inverse = fminf(__frcp_rn(width), 3.4028235e38f);
        inverse_low = __fmul_rn(__fmaf_rn(-width, inverse, 1.0f), inverse);
        count = float(num_bins);
    }
    // Everything falls into bin 0.
    __device__ static Bins one(int num_bins) {
        Bins bins;
        bins.scale = bins.shift = bins.inverse = bins.inverse_low = 0.0f;
        bins.width = 1.0f;
        bins.count = float(num_bins);
        return bins;
    }

    // BINARY: num_bins is a power of two, so that the multiplication is exact and joins the rounding to an integer.
    template <bool BINARY, Quotient HOW>
    __device__ __forceinline__ uint32 locate(float v) const {
        return bin_at<BINARY, HOW>(__saturatef(__fmaf_rn(v, scale, shift)));  // exact scaling: rounded like v - lo
    }
    template <bool BINARY, Quotient HOW>
    __device__ __forceinline__ uint32 bin_at(float d) const {
        float q = d;
        if (HOW != ONE_PRODUCT) q = __saturatef(__fmaf_rn(d, inverse, __fmul_rn(d, inverse_low)));
        if (HOW == EXACT) q = __saturatef(__fmaf_rn(__fmaf_rn(-q, width, d), inverse, q));
        if (BINARY) return __float_as_uint(__fmaf_rd(q, count, __uint_as_float(BIN_ZERO)));
        return __float_as_uint(__fadd_rd(__fmul_rn(q, count), __uint_as_float(BIN_ZERO)));
    }

    // For ONE_PRODUCT, which has no other use for `count`. Rounded up, as what lies on an edge is above it.
    __device__ Bins with_one_product() const {
        Bins bins = *this;
        bins.count = __fmul_ru(__uint_as_float(__float_as_uint(inverse) + (inverse_low > 0.0f)), count);
        return bins;
    }

    // Whether `other`, with HOW, agrees with EXACT for values of T around this thread's share of the edges between bins:
    // then, as both grow with d, they agree everywhere. TWO_PRODUCTS always has so far, ONE_PRODUCT nearly always where T
    // has 16 bits: it misplaces a few d, but there are few values, and they have other d.
    template <bool BINARY, Quotient HOW, typename T>
    __device__ bool agrees(const Bins& other) const {
        bool agree = true;
        for (int bin = threadIdx.x + 1; bin < int(count); bin += blockDim.x) {
            const int edge = __float_as_int(__fmul_rn(width, float(bin) / count));
            constexpr int BEFORE = 3, AFTER = 2;
            uint32 differ = 0;
#pragma unroll
            for (int step = -BEFORE; step <= AFTER; ++step) {
                const float d = __int_as_float(edge + step);
                const bool exact = bin_at<BINARY, EXACT>(d) >= BIN_ZERO + bin;
                const bool found = other.bin_at<BINARY, HOW>(d) >= BIN_ZERO + bin;
                differ |= uint32(exact != found) << (step + BEFORE);
                if (step == -BEFORE) agree &= !exact && !found;
                if (step == AFTER) agree &= exact && found;
            }
            for (; differ; differ &= differ - 1) agree &= !reached<T>(__int_as_float(edge + __ffs(differ) - 1 - BEFORE));
        }
        return agree;
    }
    // Whether a value of T has this d. If one has, it is the nearest to where d lies: far closer than the next to it, or
    // so small beside `shift` that the subtraction here is exact.
    template <typename T>
    __device__ bool reached(float d) const {
        const float v = to_float(from_float<T>(__fmul_rn(d - shift, __frcp_rn(scale))));
        return __saturatef(__fmaf_rn(v, scale, shift)) == d || !(fabsf(v) < infinity());
    }
};

// num_bins + 1 rows of REPLICAS counters, a power of two up to 32. Lane l counts in column l % REPLICAS, so at 32 no
// two lanes of a warp ever meet in a bank. The last row, for values at or above the upper end, belongs to the last bin.
template <int REPLICAS>
struct SharedHistogram {
    uint32* table;
    int num_bins;
    uint32 origin;  // shared address at which this lane's column would have row -BIN_ZERO

    __device__ SharedHistogram(uint32* table, int num_bins) : table(table), num_bins(num_bins) {
        uint32 column = uint32(__cvta_generic_to_shared(table)) + (threadIdx.x & (REPLICAS - 1)) * 4;
        // Opaque, or the compiler computes it again for every few values.
        asm volatile("sub.u32 %0, %1, %2;" : "=r"(origin) : "r"(column), "r"(BIN_ZERO * (4 * REPLICAS)));
    }

    __device__ __forceinline__ static int table_words(int num_bins) { return ((num_bins + 1) * REPLICAS + 3) & ~3; }

    __device__ __forceinline__ void clear() const {
        uint4* quads = reinterpret_cast<uint4*>(table);
        for (int i = threadIdx.x; i < table_words(num_bins) / 4; i += blockDim.x) quads[i] = make_uint4(0, 0, 0, 0);
    }

    __device__ __forceinline__ void add(uint32 located) const {
        asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(located * (4 * REPLICAS) + origin) : "memory");
    }
    // 0 or 1 of them: a predicate would become a branch.
    __device__ __forceinline__ void add(uint32 located, uint32 times) const {
        asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(located * (4 * REPLICAS) + origin), "r"(times) : "memory");
    }

    // Of one bin, the columns `first`, `first` + `step`, ..., `columns` of them (a power of two). Starting at another
    // column in every bin spreads neighbouring threads over the banks.
    __device__ __forceinline__ uint32 sum(int bin, int first, int step, int columns) const {
        uint32 total = sum_of_row(bin, first, step, columns);
        return bin == num_bins - 1 ? total + sum_of_row(num_bins, first, step, columns) : total;
    }
    __device__ __forceinline__ uint32 sum_of_row(int row, int first, int step, int columns) const {
        uint32 total = 0;
#pragma unroll 8
        for (int i = 0; i < columns; ++i) total += table[row * REPLICAS + first + ((i + row) & (columns - 1)) * step];
        return total;
    }
};

// ---- values that are not numbers ------------------------------------------------------------------------------------

__device__ __forceinline__ float min_nan(float a, float b) {  // NaN if either is, unlike fminf
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}
__device__ __forceinline__ float max_nan(float a, float b) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}

// The least and the greatest value in packed words of T, NaN after a NaN: one instruction each for two 16-bit values.
template <typename T>
struct Packed;
template <>
struct Packed<float> {
    float lo = infinity(), hi = -infinity();
    __device__ __forceinline__ void take(uint32 w) {
        lo = min_nan(lo, __uint_as_float(w)), hi = max_nan(hi, __uint_as_float(w));
    }
    __device__ __forceinline__ float least() const { return lo; }
    __device__ __forceinline__ float greatest() const { return hi; }
};
template <typename PAIR, uint32 INFINITIES>
struct PackedPair {
    uint32 lo = INFINITIES, hi = INFINITIES | 0x80008000u;
    __device__ __forceinline__ static PAIR pair(uint32 w) { return reinterpret_cast<const PAIR&>(w); }
    __device__ __forceinline__ static uint32 word(PAIR p) { return reinterpret_cast<const uint32&>(p); }
    __device__ __forceinline__ void take(uint32 w) {
        lo = word(__hmin2_nan(pair(lo), pair(w))), hi = word(__hmax2_nan(pair(hi), pair(w)));
    }
    __device__ __forceinline__ float least() const {
        return min_nan(to_float(PAIR(pair(lo)).x), to_float(PAIR(pair(lo)).y));
    }
    __device__ __forceinline__ float greatest() const {
        return max_nan(to_float(PAIR(pair(hi)).x), to_float(PAIR(pair(hi)).y));
    }
};
template <>
struct Packed<__nv_bfloat16> : PackedPair<__nv_bfloat162, 0x7f807f80u> {};
template <>
struct Packed<__half> : PackedPair<__half2, 0x7c007c00u> {};

// ---- across blocks --------------------------------------------------------------------------------------------------

// Where a pooled histogram goes. The host packs it: corey/_entropy_cuda.py, `sink`.
struct Sink {
    uint64* counts;       // [pools][copies][num_bins], zero between launches
    uint32* begun;        // [pools], zero between launches: blocks that have called `begin`
    float* entropy;       // [pools], or null
    int* chunk;           // of pool 0, or null
    uint64 size;          // values in a pool
    double inverse_size;  // 1 / (size + 1e-10)
    double inverse_unit;  // 1 for nats, 1 / ln 2 for bits
    float least[32];      // nats, ascending: the least entropies of the chunks 2 least_chunk, 4 least_chunk, ...
    int steps;            // how many of them
    int least_chunk;
};

// Relaxed: what is read is all that is needed, so nothing else has to be visible with it.
__device__ __forceinline__ uint64 load_relaxed(const uint64* p) {
    uint64 value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
}
__device__ __forceinline__ void store_relaxed(uint64* p, uint64 value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

__device__ __forceinline__ double entropy_term(uint64 count, double inverse_size) {
    double share = double(count) * inverse_size;
    return share > SHARE_EPS ? -share * log(share + SHARE_EPS) : 0.0;
}

// One full bin leaves -1e-10 behind through the epsilons; an entropy is not negative.
__device__ __forceinline__ float in_unit(double nats, double inverse_unit) {
    return float(fmax(nats * inverse_unit, 0.0));
}

// By a whole warp. A NaN takes the least chunk: there is nobody on the device to raise an error to.
__device__ __forceinline__ void write_chunk(const Sink& sink, float entropy) {
    int lane = threadIdx.x & 31;
    int passed = __popc(__ballot_sync(~0u, lane < sink.steps && entropy >= sink.least[lane]));
    if (lane == 0) *sink.chunk = sink.least_chunk << passed;
}

__device__ __forceinline__ void write_outcome(const Sink& sink, int64 pool, float entropy) {
    if (sink.entropy && (threadIdx.x & 31) == 0) sink.entropy[pool] = entropy;
    if (sink.chunk) write_chunk(sink, entropy);
}

// How many of the pool's blocks have begun before this one. Thread 0 calls it once, and needs not wait for the result.
__device__ __forceinline__ uint32 begin(const Sink& sink, int64 pool) { return atomicAdd(sink.begun + pool, 1u); }

// A block that saw a NaN adds this to its count of bin 0.
constexpr uint64 NAN_SEEN = 1ull << 48;

// The sum over a warp of counts, below 2^48, with NAN_SEEN if any lane has it.
__device__ __forceinline__ uint64 sum_of_counts(uint64 count) {
    constexpr uint32 HALF = (1u << 24) - 1;
    const uint64 low = __reduce_add_sync(~0u, uint32(count) & HALF);
    const uint64 high = __reduce_add_sync(~0u, uint32(count >> 24) & HALF);
    return (high << 24) + low + (__any_sync(~0u, count >= NAN_SEEN) ? NAN_SEEN : 0);
}

// Of the first `threads` threads of a block, whole warps.
__device__ __forceinline__ void synchronize_first(int threads) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// Adds the block's counts to the pool's, and in one of its `blocks` blocks computes what they mean and zeroes them for
// the next launch. All threads call it, after their last `add`; `order`, from `begin`, is thread 0's; blockDim.x is a
// multiple of 32. True in the first warps of the block that computed.
//
// The counts themselves tell when all have arrived: their sum is the number of values. So nobody orders memory with
// fences, which would cost two trips to L2. The block that waits for it is the last to have begun: the others are
// running by then, so it never waits for one that might not start. Several copies of the counts keep the blocks' atomics
// from queueing for the same few sectors of L2.
template <int REPLICAS>
__device__ bool finish(
    const Sink& sink, const SharedHistogram<REPLICAS>& histogram, bool saw_nan, int64 pool, uint32 blocks,
    uint32 order) {
    constexpr int COPIES = REPLICAS < 4 ? 1 : REPLICAS / 4;  // so that there are up to 2048 counts
    __shared__ uint64 counts_of_warp[2][32];
    __shared__ double nats_of_warp[32];
    __shared__ bool last;
    const int num_bins = histogram.num_bins, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    uint64* counts = sink.counts + pool * (COPIES * num_bins);
    if (threadIdx.x == 0) last = order == blocks - 1;

    saw_nan = __syncthreads_or(saw_nan);
    uint64* copy = counts + blockIdx.x % COPIES * num_bins;
    constexpr int columns = REPLICAS < 8 ? REPLICAS : 8, parts = REPLICAS / columns;  // `parts` lanes sum a bin
    for (int i = threadIdx.x; i - lane < num_bins * parts; i += blockDim.x) {
        int bin = i / parts, part = i % parts;
        uint32 total = bin < num_bins ? histogram.sum(bin, part * columns, 1, columns) : 0;
        for (int offset = 1; offset < parts; offset *= 2) total += __shfl_xor_sync(~0u, total, offset);
        if (part == 0 && total) atomicAdd(copy + bin, total + (bin == 0 && saw_nan ? NAN_SEEN : 0));
    }
    const int active = min(int(blockDim.x), (num_bins + 31) & ~31);
    if (!last || threadIdx.x >= active) return false;

    auto count_of = [&](int bin) {
        uint64 count = 0;
#pragma unroll
        for (int c = 0; c < COPIES; ++c) count += load_relaxed(counts + c * num_bins + bin);
        return count;
    };
    const int warps = active / 32;
    uint64 count, found;
    int turn = 0;  // while some warps read [turn], others write [1 - turn]
    do {
        count = found = 0;
        for (int bin = threadIdx.x; bin < num_bins; bin += active) found += count = count_of(bin);
        found = sum_of_counts(found);
        if (lane == 0) counts_of_warp[turn][warp] = found;
        synchronize_first(active);
        found = sum_of_counts(lane < warps ? counts_of_warp[turn][lane] : 0);
        turn ^= 1;
    } while (found % NAN_SEEN != sink.size);

    double nats = 0.0;
    for (int bin = threadIdx.x; bin < num_bins; bin += active) {
        if (num_bins > active) count = count_of(bin);  // else it is still here
        nats += entropy_term(count, sink.inverse_size);
        for (int c = 0; c < COPIES; ++c) counts[c * num_bins + bin] = 0;
    }
    if (threadIdx.x == 0) sink.begun[pool] = 0;
    for (int offset = 16; offset; offset /= 2) nats += __shfl_xor_sync(~0u, nats, offset);
    if (lane == 0) nats_of_warp[warp] = nats;
    synchronize_first(active);
    if (warp > 0) return true;
    nats = lane < warps ? nats_of_warp[lane] : 0.0;
    for (int offset = warps > 8 ? 16 : 4; offset; offset /= 2) nats += __shfl_xor_sync(~0u, nats, offset);
    write_outcome(sink, pool, found >= NAN_SEEN ? __int_as_float(0x7fffffff) : in_unit(nats, sink.inverse_unit));
    return true;
}
