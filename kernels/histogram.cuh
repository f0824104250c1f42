// A histogram in shared memory, for any kernel that has values in registers. A block uses it so:
//
//     SharedHistogram<32> histogram(table, num_bins);        // all threads; table_words(num_bins), aligned to 16 bytes
//     histogram.clear();  __syncthreads();
//     Bins bins(lo, span, num_bins);                         // about 60 instructions: once a thread, or once a block
//     histogram.add(bins.locate<false>(value));              // any thread, any number of times
//     finish(sink, histogram, saw_nan, pool, blocks);        // all threads: adds to the counts of the whole grid
//
// and the last block to finish computes the entropy and the chunk. Counts are integers, so their order leaves no trace.
#pragma once

#include "common.cuh"

constexpr double SPAN_EPS = 1e-8, SHARE_EPS = 1e-10;  // as published; see corey/entropy.py
constexpr uint32 BIN_ZERO = 0x4b000000u;              // 2^23 as a float: adding it leaves an integer in the low bits

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
    __device__ Bins(float lo, float span, int num_bins) {
        int exponent = int(__float_as_uint(span) >> 23 & 255);
        scale = ldexpf(1.0f, 126 - max(exponent, 1));
        shift = __fmul_rn(-scale, lo);
        if (!isfinite(shift)) {  // lo is beyond 2^127 widths: every value is below the range or above it
            scale = 1.0f;
            shift = -lo;
        }
        width = __fmul_rn(span, scale);
        inverse = fminf(__frcp_rn(width), 3.4028235e38f);
        inverse_low = __fmul_rn(__fmaf_rn(-width, inverse, 1.0f), inverse);
        count = float(num_bins);
    }

    // BINARY: num_bins is a power of two, so that the multiplication is exact and joins the rounding to an integer.
    template <bool BINARY>
    __device__ __forceinline__ uint32 locate(float v) const {
        float d = __saturatef(__fmaf_rn(v, scale, shift));  // exact scaling, so rounded like v - lo
        float q = __saturatef(__fmaf_rn(d, inverse, __fmul_rn(d, inverse_low)));
        q = __saturatef(__fmaf_rn(__fmaf_rn(-q, width, d), inverse, q));
        if (BINARY) return __float_as_uint(__fmaf_rd(q, count, __uint_as_float(BIN_ZERO)));
        return __float_as_uint(__fadd_rd(__fmul_rn(q, count), __uint_as_float(BIN_ZERO)));
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

    // Of one bin, the columns `first`, `first` + `step`, ..., `columns` of them (a power of two). Starting at another
    // column in every bin spreads neighbouring threads over the banks.
    __device__ __forceinline__ uint32 sum(int bin, int first, int step, int columns) const {
        uint32 total = 0;
        for (int row = bin; row <= (bin == num_bins - 1 ? num_bins : bin); ++row)
#pragma unroll 8
            for (int i = 0; i < columns; ++i)
                total += table[row * REPLICAS + first + ((i + bin) & (columns - 1)) * step];
        return total;
    }
};

// Where a pooled histogram goes. The host packs it: corey/_entropy_cuda.py, `sink`.
struct Sink {
    uint64* counts;       // [pools][num_bins], zero between launches
    uint32* state;        // [pools][2], zero between launches: blocks that have finished, whether one saw a NaN
    float* entropy;       // [pools], or null
    int* chunk;           // of pool 0, or null
    double inverse_size;  // 1 / (values in a pool + 1e-10)
    double inverse_unit;  // 1 for nats, 1 / ln 2 for bits
    float least[32];      // nats, ascending: the least entropies of the chunks 2 least_chunk, 4 least_chunk, ...
    int steps;            // how many of them
    int least_chunk;
};

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

// Adds the block's counts to the grid's, and in the last of the pool's `blocks` blocks computes what they mean and
// zeroes them for the next launch. All threads of the block call it, after their last `add`; blockDim.x is a multiple
// of 32.
template <int REPLICAS>
__device__ void finish(
    const Sink& sink, const SharedHistogram<REPLICAS>& histogram, bool saw_nan, int64 pool, uint32 blocks) {
    __shared__ double partial[32];
    __shared__ bool last;
    const int num_bins = histogram.num_bins, lane = threadIdx.x & 31;
    uint64* counts = sink.counts + pool * num_bins;
    uint32* state = sink.state + 2 * pool;

    saw_nan = __syncthreads_or(saw_nan);
    constexpr int columns = REPLICAS < 8 ? REPLICAS : 8, parts = REPLICAS / columns;  // `parts` lanes sum a bin
    for (int i = threadIdx.x; i - lane < num_bins * parts; i += blockDim.x) {
        int bin = i / parts, part = i % parts;
        uint32 total = bin < num_bins ? histogram.sum(bin, part * columns, 1, columns) : 0;
        for (int offset = 1; offset < parts; offset *= 2) total += __shfl_xor_sync(~0u, total, offset);
        if (part == 0 && total) atomicAdd(counts + bin, uint64(total));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (saw_nan) atomicOr(state + 1, 1u);
        uint32 finished;  // releases the whole block's additions, which the barrier has ordered before
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(finished) : "l"(state) : "memory");
        last = finished == blocks - 1;
    }
    __syncthreads();
    if (!last) return;

    bool nan_somewhere = __ldcg(state + 1);
    double nats = 0.0;
    for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
        nats += entropy_term(__ldcg(counts + bin), sink.inverse_size);
        counts[bin] = 0;
    }
    for (int offset = 16; offset; offset /= 2) nats += __shfl_xor_sync(~0u, nats, offset);
    if (lane == 0) partial[threadIdx.x / 32] = nats;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    if (lane < 2) state[lane] = 0;
    nats = lane < blockDim.x / 32 ? partial[lane] : 0.0;
    for (int offset = 16; offset; offset /= 2) nats += __shfl_xor_sync(~0u, nats, offset);
    write_outcome(sink, pool, nan_somewhere ? __int_as_float(0x7fffffff) : in_unit(nats, sink.inverse_unit));
}
