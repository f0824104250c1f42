// Entropy of the histogram of a tensor's values. The arithmetic is in histogram.cuh, the definition in corey/entropy.py
//
//   histogram_entropy   counts, in one pass where the bins are given and in two where they span the pool's own range
//   histogram_pools     both passes over many small pools in one launch, 1 to 32 pools a block
//
// A pool is one histogram's values. In the first kernel its values are `rows_outer` x `rows_inner` rows of `inner`
// values. A warp takes a tile of 32 x DEPTH slots of a row at a time, all of whose loads are issued before the first
// value is used: of the 32 warps of a block 64 KiB, or 128 KiB where values are to stay in registers. A slot is 16
// aligned bytes where neighbours in a row are neighbours in memory, else one value; a row's first and last values that
// fill no 16 bytes are read singly.
//
// Its two passes are two halves of every block, and between them all blocks wait for the extremes of all: they
// must be resident together, which a cooperative launch grants. What a warp had loaded last is still in its registers in
// the second half, and that is all of a (1, 4096, 2048) tensor in bf16: it is read once.
//
// Macros, from corey/_entropy_cuda.py: ENTROPY or POOLS (the one kernel to compile), T_X (type of the values), UNIT_STRIDE
// (whether slots are 16 bytes), POWER_OF_TWO (whether num_bins is one), COLUMNS (replicas of a bin in shared memory).
// ENTROPY also has OWN_RANGE (whether bins span the pool's own range, or else are given) and QUICK (1 if ONE_PRODUCT does
// for the bins that are given).
#include "histogram.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / 32;
// On one pool. One warp of each waits for what all have seen, the faster the fewer they can be; Hopper has 144
// multiprocessors at most.
constexpr int MOST_BLOCKS = __CUDA_ARCH__ == 900 ? 160 : 192;
#if defined(ENTROPY) && !OWN_RANGE
constexpr int DEPTH = 4;  // slots in flight a lane
#else
constexpr int DEPTH = 8;  // so many that a lane still holds them when the range is known
#endif
constexpr int VECTOR = UNIT_STRIDE ? 16 / int(sizeof(T_X)) : 1;

// The host packs reciprocal = ceil(2^32 / by), or 0 where by is 1.
struct Divisor {
    uint32 by, reciprocal;
    // For x below 2^16, as are the numbers of warps and pools in the first kernel.
    __device__ __forceinline__ uint32 divide(uint32 x) const { return reciprocal ? __umulhi(x, reciprocal) : x; }
};

struct Params {
    Sink sink;
    const T_X* x;
    uint64* extremes;                         // [pools][blocks a pool], zero between launches; of pools' own ranges
    int64 pool_outer, pool_inner;             // strides of the kept dimensions, in elements
    int64 row_outer, row_inner, step;         // strides of the pooled dimensions
    int64 inner;                              // values in a row
    Divisor pools_inner, rows_inner, tiles;   // pools along the inner kept dimension; tiles in a row
    uint32 pools, rows_outer;
    uint32 skip_outer, skip_inner, skip_tiles;  // the warps of a pool's blocks, written in rows and tiles
    int num_bins;
    int pools_a_block;                        // histogram_pools: a power of two up to COLUMNS
    int own_range;
    int singles;                              // whether any row has values that fill no slot
    Bins bins;                                // unless own_range
};

// ---- values ---------------------------------------------------------------------------------------------------------

// The least and the greatest of what was taken in, NaN after a NaN.
struct Extremes {
    float lo = infinity(), hi = -infinity();

    __device__ __forceinline__ void take(float v) { lo = min_nan(lo, v), hi = max_nan(hi, v); }
    __device__ __forceinline__ void take(const Extremes& other) {
        lo = min_nan(lo, other.lo), hi = max_nan(hi, other.hi);
    }
    // Over the lanes whose number differs in bits from `first` up.
    __device__ __forceinline__ void across_lanes(int first) {
        for (int offset = first; offset < 32; offset *= 2)
            take({__shfl_xor_sync(~0u, lo, offset), __shfl_xor_sync(~0u, hi, offset)});
    }
    // Over a warp, in two instructions. A NaN is only in `hi` afterwards: ordered as an integer it is the greatest.
    __device__ __forceinline__ void across_warp() {
        lo = of_key(__reduce_min_sync(~0u, key(lo)));
        hi = of_key(__reduce_max_sync(~0u, key(hi)));
    }
    // Integers in the order of the floats, and their own inverse. NaNs here have no sign: min.NaN and max.NaN make them.
    __device__ __forceinline__ static int key(float v) {
        int bits = __float_as_int(v);
        return bits ^ (bits >> 31 & 0x7fffffff);
    }
    __device__ __forceinline__ static float of_key(int key) {
        return __int_as_float(key ^ (key >> 31 & 0x7fffffff));
    }

    // Packed, and never 0: the mask is a NaN that does not occur.
    static constexpr uint32 MASK = 0x7f9abcdeu;
    __device__ __forceinline__ uint64 pack() const {
        return uint64(__float_as_uint(hi) ^ MASK) << 32 | (__float_as_uint(lo) ^ MASK);
    }
    __device__ __forceinline__ static Extremes unpack(uint64 word) {
        return {__uint_as_float(uint32(word) ^ MASK), __uint_as_float(uint32(word >> 32) ^ MASK)};
    }
};

// ---- slots ----------------------------------------------------------------------------------------------------------

template <int SIZE>
struct Slot {  // 16 bytes
    Vec16<T_X> raw;
    __device__ __forceinline__ void load(const T_X* p) { raw = Vec16<T_X>::load(p); }
    __device__ __forceinline__ void unpack(float (&out)[SIZE]) const { raw.unpack(out); }
    __device__ __forceinline__ void into(Packed<T_X>& packed) const {
        packed.take(raw.words.x), packed.take(raw.words.y), packed.take(raw.words.z), packed.take(raw.words.w);
    }
};
template <>
struct Slot<1> {  // one value, twice in a word
    T_X raw;
    __device__ __forceinline__ void load(const T_X* p) { raw = __ldg(p); }
    __device__ __forceinline__ void unpack(float (&out)[1]) const { out[0] = to_float(raw); }
    __device__ __forceinline__ void into(Packed<T_X>& packed) const {
        if constexpr (sizeof(T_X) == 4) packed.take(reinterpret_cast<const uint32&>(raw));
        else packed.take(reinterpret_cast<const uint16&>(raw) * 0x10001u);
    }
};

// What a warp takes at a time.
struct Tile {
    uint32 outer, inner, tile;  // row and place in the row
    int present = 0;            // how many of this lane's slots lie in the row
    Slot<VECTOR> slots[DEPTH];

    __device__ __forceinline__ Tile(const Params& p) {
        uint32 warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;  // neighbours in different blocks: even loads
        uint32 row = p.tiles.divide(warp);
        tile = warp - row * p.tiles.by;
        outer = p.rows_inner.divide(row);
        inner = row - outer * p.rows_inner.by;
    }
    __device__ __forceinline__ bool valid(const Params& p) const { return outer < p.rows_outer; }
    __device__ __forceinline__ void next(const Params& p) {
        tile += p.skip_tiles;
        bool carry = tile >= p.tiles.by;
        tile -= carry ? p.tiles.by : 0;
        inner += p.skip_inner + carry;
        carry = inner >= p.rows_inner.by;
        inner -= carry ? p.rows_inner.by : 0;
        outer += p.skip_outer + carry;
    }
    __device__ __forceinline__ void previous(const Params& p) {
        bool borrow = tile < p.skip_tiles;
        tile += (borrow ? p.tiles.by : 0) - p.skip_tiles;
        const uint32 skip = p.skip_inner + borrow;
        borrow = inner < skip;
        inner += (borrow ? p.rows_inner.by : 0) - skip;
        outer -= p.skip_outer + borrow;
    }
    __device__ __forceinline__ const T_X* row(const Params& p, const T_X* pool) const {
        return pool + outer * p.row_outer + inner * p.row_inner;
    }
    // Values of the row before the first slot.
    __device__ __forceinline__ static int head(const Params& p, const T_X* row) {
        if (!UNIT_STRIDE) return 0;
        return int(min(int64(-(reinterpret_cast<uint64>(row) / sizeof(T_X)) & (VECTOR - 1)), p.inner));
    }
    __device__ __forceinline__ void load(const Params& p, const T_X* pool) {
        load(p, pool, [] {});
    }
    // Calls use() after the loads, in one stretch of code with them where all slots lie in the row: then it waits for
    // one load at a time, elsewhere for all of them.
    template <typename Use>
    __device__ __forceinline__ void load(const Params& p, const T_X* pool, Use use) {
        const T_X* at = row(p, pool);
        const int first = head(p, at), lane = threadIdx.x & 31;
        const int64 start = int64(tile) * (32 * DEPTH), slots_left = (p.inner - first) / VECTOR - start;
        const int64 step = UNIT_STRIDE ? VECTOR : p.step;
        at += first + (start + lane) * step;
        if (slots_left >= 32 * DEPTH) {
            present = DEPTH;
#pragma unroll
            for (int k = 0; k < DEPTH; ++k) slots[k].load(at + 32 * k * step);
            return use();
        }
        if (slots_left > 0) {  // the row's last slot stands in for absent ones, so that no load waits
            const int left = int(slots_left) - lane;
            present = (left + 31) >> 5;
#pragma unroll
            for (int k = 0; k < DEPTH; ++k) slots[k].load(at + min(32 * k, left - 1) * step);
        } else {
            present = 0;
#pragma unroll
            for (int k = 0; k < DEPTH; ++k) slots[k] = {};
        }
        use();
    }
    // Calls use(value) for the values that fill no slot: of the row's start in its first tile, of its end in its last.
    template <typename Use>
    __device__ __forceinline__ void for_each_single(const Params& p, const T_X* pool, Use use) const {
        if (!UNIT_STRIDE || !p.singles) return;
        const T_X* at = row(p, pool);
        const int first = head(p, at), rest = int((p.inner - first) % VECTOR), lane = threadIdx.x & 31;
        const bool before = tile == 0 && lane < first, after = tile == p.tiles.by - 1 && lane >= 16 && lane < 16 + rest;
        if (before || after) use(to_float(__ldg(at + (before ? lane : p.inner - rest + (lane - 16)))));
    }
};

__device__ __forceinline__ const T_X* pool_start(const Params& p, uint32 outer, uint32 inner) {
    return p.x + outer * p.pool_outer + inner * p.pool_inner;
}

__device__ __forceinline__ const T_X* pool_of_block(const Params& p) {
    uint32 outer = p.pools_inner.divide(blockIdx.y);
    return pool_start(p, outer, blockIdx.y - outer * p.pools_inner.by);
}

// ---- ranges ---------------------------------------------------------------------------------------------------------

enum Kind { ORDINARY, CONSTANT, INVALID };

// The bins over a pool's own range. The published code forms the span in float64 and divides in fp32.
struct OwnBins {
    Bins bins;
    Kind kind;

    OwnBins() = default;
    __device__ __forceinline__ OwnBins(const Extremes& found, int num_bins) {
        double span = double(found.hi) - double(found.lo);
        float widened = float(span + SPAN_EPS);
        kind = !isfinite(widened) ? INVALID : span < SPAN_EPS ? CONSTANT : ORDINARY;
        bins = kind == ORDINARY ? Bins(found.lo, widened, num_bins) : Bins::one(num_bins);
    }
};

// ---- few large pools ------------------------------------------------------------------------------------------------

// What a warp has seen of a pool.
struct Seen {
    Packed<T_X> slots;
    Extremes singles;

    __device__ __forceinline__ void take(const Params& p, const T_X* pool, const Tile& tile) {
#pragma unroll
        for (int k = 0; k < DEPTH; ++k)
            if (k < tile.present) tile.slots[k].into(slots);
        tile.for_each_single(p, pool, [&](float v) { singles.take(v); });
    }
    // Tells all blocks of the pool what this one has seen. By all threads.
    __device__ __forceinline__ void publish(const Params& p) {
        __shared__ uint64 of_warp[WARPS];
        singles.take({slots.least(), slots.greatest()});
        singles.across_warp();
        if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x / 32] = singles.pack();
        __syncthreads();
        if (threadIdx.x >= 32) return;
        singles = Extremes::unpack(of_warp[threadIdx.x]);
        singles.across_warp();
        if (threadIdx.x == 0) store_relaxed(p.extremes + blockIdx.y * gridDim.x + blockIdx.x, singles.pack());
    }
};

#ifdef ENTROPY
constexpr bool BINARY = POWER_OF_TWO;
constexpr Quotient QUICKLY = BINARY && sizeof(T_X) == 2 ? ONE_PRODUCT : TWO_PRODUCTS;  // in bins found here
using Histogram = SharedHistogram<COLUMNS>;

__device__ __forceinline__ Bins quick_of(const Bins& bins) {
    return QUICKLY == ONE_PRODUCT ? bins.with_one_product() : bins;
}

template <Quotient HOW>
__device__ __forceinline__ void count(
    const Params& p, const T_X* pool, const Tile& tile, const Bins& bins, const Histogram& histogram) {
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
        if (k >= tile.present) continue;
        float values[VECTOR];
        tile.slots[k].unpack(values);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) histogram.add(bins.locate<BINARY, HOW>(values[i]));
    }
    tile.for_each_single(p, pool, [&](float v) { histogram.add(bins.locate<BINARY, HOW>(v)); });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) histogram_entropy(const __grid_constant__ Params p) {
    extern __shared__ uint4 memory[];
    const T_X* pool = pool_of_block(p);
    Tile tile(p);
    Histogram histogram(reinterpret_cast<uint32*>(memory), p.num_bins);
    histogram.clear();
    __syncthreads();
    wait_for_earlier_kernels();
    __shared__ uint32 order;  // not in a register: there is none to spare

#if !OWN_RANGE
    Seen seen;
    for (; tile.valid(p); tile.next(p))
        tile.load(p, pool, [&] {
            count<QUICK ? ONE_PRODUCT : EXACT>(p, pool, tile, p.bins, histogram);
            seen.take(p, pool, tile);
        });
    if (threadIdx.x == 0) order = begin(p.sink, blockIdx.y);  // its warp waits for the answer, the others count
    finish(
        p.sink, histogram, isnan(seen.slots.greatest()) || isnan(seen.singles.hi), blockIdx.y, gridDim.x, order);
#else
    if (tile.valid(p)) tile.load(p, pool);
    if (threadIdx.x == 0) order = begin(p.sink, blockIdx.y);
    Seen seen;
    int tiles = 0;
    for (; tile.valid(p); tile.next(p)) {
        if (tiles++ > 0) tile.load(p, pool);
        seen.take(p, pool, tile);
    }
    seen.publish(p);
    __shared__ OwnBins shared_bins;
    if (threadIdx.x < 32) {  // the last block's word stands in for absent ones
        const uint64* words = p.extremes + blockIdx.y * gridDim.x;
        Extremes extremes;
        bool all;
        do {
            all = true;
            extremes = {};
#pragma unroll
            for (int i = 0; i < MOST_BLOCKS / 32; ++i) {
                const uint64 found = load_relaxed(words + min(i * 32 + threadIdx.x, gridDim.x - 1));
                all &= found != 0;
                extremes.take(Extremes::unpack(found));
            }
        } while (!all);
        extremes.across_warp();
        const OwnBins own(extremes, p.num_bins);
        if (threadIdx.x == 0) shared_bins = own;
    }
    __syncthreads();
    const Bins bins = shared_bins.bins, quick_bins = quick_of(bins);
    const bool quick = __syncthreads_and(bins.agrees<BINARY, QUICKLY, T_X>(quick_bins));

    auto count_tile = [&] {
        if (quick) count<QUICKLY>(p, pool, tile, quick_bins, histogram);
        else count<EXACT>(p, pool, tile, bins, histogram);
    };
    // The last tile first, as it is still in registers, and those before it in L2, where the first may no longer be.
    for (bool loaded = true; tiles > 0; --tiles, loaded = false) {
        tile.previous(p);
        if (!loaded) tile.load(p, pool);
        count_tile();
    }
    const bool invalid = shared_bins.kind == INVALID;
    if (finish(p.sink, histogram, invalid, blockIdx.y, gridDim.x, order) && threadIdx.x < 32)
        for (int i = threadIdx.x; i < gridDim.x; i += 32) p.extremes[blockIdx.y * gridDim.x + i] = 0;
#endif
}
#endif

// ---- many small pools -----------------------------------------------------------------------------------------------

#ifdef POOLS
// A thread's share of the `size` values of the pool that starts at `pool`, which it has in common with every
// pools_a_block-th thread.
template <typename Use>
__device__ __forceinline__ void for_each_value(const Params& p, const T_X* pool, uint32 size, Use use) {
    const uint32 inner = uint32(p.inner), step = blockDim.x / p.pools_a_block;
    for (uint32 first = threadIdx.x / p.pools_a_block; first < size; first += DEPTH * step) {
        T_X values[DEPTH];
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            uint32 i = first + k * step;
            if (i >= size) continue;
            int64 offset = p.rows_inner.by == 1 ? i * p.step : i / inner * p.row_inner + i % inner * p.step;
            values[k] = __ldg(pool + offset);
        }
#pragma unroll
        for (int k = 0; k < DEPTH; ++k)
            if (first + k * step < size) use(to_float(values[k]));
    }
}

// Neighbouring lanes take neighbouring pools, `members` of them, so that reading across pools is coalesced where values
// of a pool lie far apart; a pool's columns of the shared table are those congruent to its number.
extern "C" __global__ void __launch_bounds__(THREADS, 1) histogram_pools(const __grid_constant__ Params p) {
    extern __shared__ uint4 memory[];
    __shared__ double partial[WARPS][32];
    __shared__ bool nan_in[32];
    float2(*of_warp)[32] = reinterpret_cast<float2(*)[32]>(partial);  // used before it
    const uint32 members = p.pools_a_block, member = threadIdx.x & (members - 1), index = blockIdx.x * members + member;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool live = index < p.pools;
    const T_X* pool = live ? pool_start(p, index / p.pools_inner.by, index % p.pools_inner.by) : p.x;
    wait_for_earlier_kernels();
    const uint32 size = live ? p.rows_inner.by * uint32(p.inner) : 0;

    SharedHistogram<COLUMNS> histogram(reinterpret_cast<uint32*>(memory), p.num_bins);
    histogram.clear();
    if (threadIdx.x < 32) nan_in[threadIdx.x] = false;
    Bins bins = p.bins;
    Kind kind = ORDINARY;
    if (p.own_range) {
        Extremes found;
        for_each_value(p, pool, size, [&](float v) { found.take(v); });
        found.across_lanes(members);
        of_warp[warp][lane] = make_float2(found.lo, found.hi);
        __syncthreads();
        for (int w = 0; w < warps; ++w) found.take({of_warp[w][member].x, of_warp[w][member].y});
        OwnBins own(found, p.num_bins);
        bins = own.bins, kind = own.kind;
    }
    __syncthreads();
    bool saw_nan = false;
    for_each_value(p, pool, size, [&](float v) {
        saw_nan |= isnan(v);
        histogram.add(bins.locate<POWER_OF_TWO, EXACT>(v));
    });
    if (saw_nan || kind == INVALID) nan_in[member] = true;
    __syncthreads();

    double nats = 0.0;
    for (uint32 i = threadIdx.x; i < p.num_bins * members; i += blockDim.x)
        nats += entropy_term(histogram.sum(i / members, member, members, COLUMNS / members), p.sink.inverse_size);
    for (int offset = members; offset < 32; offset *= 2) nats += __shfl_xor_sync(~0u, nats, offset);
    partial[warp][lane] = nats;
    __syncthreads();
    if (warp > 0) return;
    nats = 0.0;
    for (int w = 0; w < warps; ++w) nats += partial[w][member];
    float entropy = nan_in[member] ? __int_as_float(0x7fffffff) : in_unit(nats, p.sink.inverse_unit);
    if (kind == CONSTANT) entropy = 0.0f;
    if (p.sink.chunk) write_chunk(p.sink, entropy);
    if (p.sink.entropy && live && lane < members) p.sink.entropy[index] = entropy;
}
#endif
