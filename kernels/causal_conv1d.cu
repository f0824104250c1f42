// Causal depthwise convolution, optionally with SiLU: y[b,d,t] = act(bias[d] + sum_k w[d,k] x[b,d,t - (WIDTH - 1) + k]).
//
// Memory bound, so the kernels are about loads: 8 or 16 bytes each, several in flight a thread, each input fetched once.
//   causal_conv1d_token_major    channels across lanes; a thread owns VECTOR channels and walks tokens, with the last
//                                WIDTH - 1 inputs in registers
//   causal_conv1d_channel_major  tokens across lanes; a thread computes 16 bytes' worth of tokens of a row at a time
//   causal_conv1d_update         one token of decode against a rolling state
// All sum in the same order, the bias first and then the taps from oldest to newest, so they agree bitwise.
//
// Macros: T_X (type of x, y and the states), T_W (of weight and bias), WIDTH (2 to 4), SILU (0 or 1), VECTOR (channels that
// a thread of the token-major kernel owns and moves with one instruction), HISTOGRAM (0, or 1 to count the outputs as
// histogram.cuh does, 2 if the number of bins is a power of two), SAMPLED (1 to count every `stride`-th token alone), COLUMNS
// (of its shared histogram), QUICK (1 if ONE_PRODUCT does for its bins).
#include "common.cuh"
#if HISTOGRAM
#include "histogram.cuh"
#endif

constexpr int PAST = WIDTH - 1;  // tokens of state
constexpr int THREADS = 256, UPDATE_THREADS = 128;
constexpr bool COUNTS_ALL = HISTOGRAM && !SAMPLED;
constexpr int WALKERS = COUNTS_ALL ? 512 : 256;  // threads of the token-major kernel: few blocks where each has a large table
constexpr int STEP = VECTOR * sizeof(T_X) > 8 ? 4 : 8;  // tokens that a thread of the token-major kernel has in flight
// A multiprocessor's blocks of the token-major kernel: as many as registers allow without spills.
constexpr int MIN_BLOCKS = COUNTS_ALL ? 1 : VECTOR == 8 || (SAMPLED && (sizeof(T_X) == 4 || __CUDA_ARCH__ < 900)) ? 2 : 3;

struct Strides {  // in elements
    int64 batch, dim, token;
};

struct Params {
    const T_X* x;
    const T_W* weight;   // (D, WIDTH) packed, aligned to 16 bytes
    const T_W* bias;     // (D,) packed, aligned to 16 bytes, or null
    const T_X* initial;  // (B, D, WIDTH - 1), or null for zeros
    T_X* y;              // packed in the order of the kernel's name
    T_X* last;           // (B, D, WIDTH - 1) packed: the last WIDTH - 1 inputs
    int64 batch, dim, length;
    Strides x_stride, initial_stride;
    int64 segments;  // pieces of a row's tokens, one for a thread (token-major) or for 1 << lanes_log2 (channel-major)
    uint32 blocks;   // of work, for as many thread blocks or fewer
    int lanes_log2;  // threads side by side, over channels (token-major) or over the tokens of a row (channel-major)
    int walk;        // tokens of a segment (token-major): a multiple of STEP, and at most `length` unless that is under 8
    int num_bins;    // 0 where nothing is counted
    int stride;      // between the tokens that are counted
#if HISTOGRAM
    Sink sink;
    Bins bins;
#endif
};

// ---- pieces of memory ------------------------------------------------------------------------------------------------

// COUNT consecutive T, moved by one instruction: 2 to 16 bytes, at an address that is a multiple of as many.
template <int BYTES>
struct Word;
template <>
struct Word<16> { using type = uint4; };
template <>
struct Word<8> { using type = uint2; };
template <>
struct Word<4> { using type = uint32; };
template <>
struct Word<2> { using type = uint16; };

template <typename T, int COUNT>
struct Piece {
    using Raw = typename Word<COUNT * sizeof(T)>::type;
    static constexpr int PER_WORD = 4 / sizeof(T);
    Raw raw;

    __device__ __forceinline__ void load(const T* p) { raw = __ldg(reinterpret_cast<const Raw*>(p)); }
    __device__ __forceinline__ void unpack(float* out) const {
        if constexpr (sizeof(Raw) == 2) {
            out[0] = to_float(reinterpret_cast<const T&>(raw));
        } else {
#pragma unroll
            for (int i = 0; i < COUNT / PER_WORD; ++i) {
                unpack_word(reinterpret_cast<const uint32*>(&raw)[i], out + i * PER_WORD, T());
            }
        }
    }
    __device__ __forceinline__ void pack(const float* in) {
        if constexpr (sizeof(Raw) == 2) {
            reinterpret_cast<T&>(raw) = from_float<T>(in[0]);
        } else {
#pragma unroll
            for (int i = 0; i < COUNT / PER_WORD; ++i) {
                reinterpret_cast<uint32*>(&raw)[i] = pack_word(in + i * PER_WORD, T());
            }
        }
    }
    __device__ __forceinline__ void store(T* p) const {
        if constexpr (sizeof(Raw) == 16) {  // spelled out, or the compiler stores word by word
            asm volatile(
                "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
                : "memory");
        } else {
            __builtin_assume(__isGlobal(p));
            *reinterpret_cast<Raw*>(p) = raw;
        }
    }
};

extern __shared__ uint4 shared[];  // the statistic's table

// Counts the outputs, or does nothing. All threads of a block make one, begin it and finish it.
struct Statistic {
#if HISTOGRAM
    SharedHistogram<COLUMNS> histogram;
    const Bins& bins;
    Packed<T_X> seen;
    bool saw_nan = false;
    uint32 order = 0;

    __device__ __forceinline__ Statistic(const Params& p)
        : histogram(reinterpret_cast<uint32*>(shared), p.num_bins), bins(p.bins) {
        histogram.clear();
        __syncthreads();
    }
    __device__ __forceinline__ void begin(const Params& p) {
        if (threadIdx.x == 0) order = ::begin(p.sink, 0);
    }
    __device__ __forceinline__ uint32 bin(float v) const {
        return bins.locate<HISTOGRAM == 2, QUICK ? ONE_PRODUCT : EXACT>(v);
    }
    __device__ __forceinline__ void take(float v) {
        saw_nan |= v != v;
        histogram.add(bin(v));
    }
    // `times` is 1 or 0; a NaN is noticed either way.
    template <int COUNT>
    __device__ __forceinline__ void take(const Piece<T_X, COUNT>& piece, uint32 times) {
        float values[COUNT];
        piece.unpack(values);
        if constexpr (COUNT * sizeof(T_X) < 4) {
            seen.take(piece.raw * 0x10001u);
        } else {
#pragma unroll
            for (int i = 0; i < int(COUNT * sizeof(T_X) / 4); ++i)
                seen.take(reinterpret_cast<const uint32*>(&piece.raw)[i]);
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) histogram.add(bin(values[i]), times);
    }
    __device__ __forceinline__ void finish(const Params& p) {
        ::finish(p.sink, histogram, saw_nan || isnan(seen.greatest()), 0, gridDim.x, order);
    }
#else
    __device__ __forceinline__ Statistic(const Params&) {}
    __device__ __forceinline__ void begin(const Params&) {}
    __device__ __forceinline__ void take(float) {}
    template <int COUNT>
    __device__ __forceinline__ void take(const Piece<T_X, COUNT>&, uint32) {}
    __device__ __forceinline__ void finish(const Params&) {}
#endif
};

// Parameters of VECTOR consecutive channels, COUNT / VECTOR each.
template <int COUNT>
__device__ __forceinline__ void load_parameters(float* out, const T_W* p) {
    constexpr int ALIGNED = COUNT & -COUNT, PART = ALIGNED * sizeof(T_W) > 16 ? 16 / sizeof(T_W) : ALIGNED;
#pragma unroll
    for (int i = 0; i < COUNT; i += PART) {
        Piece<T_W, PART> piece;
        piece.load(p + i);
        piece.unpack(out + i);
    }
}

// One channel's input at token t, which may lie before the sequence or, as zero, outside of what is stored.
struct Row {
    const T_X* x;
    const T_X* initial;  // null for zeros
    int64 x_token, initial_token, length;

    __device__ __forceinline__ Row(const Params& p, int64 b, int64 d)
        : x(p.x + b * p.x_stride.batch + d * p.x_stride.dim),
          initial(p.initial ? p.initial + b * p.initial_stride.batch + d * p.initial_stride.dim : nullptr),
          x_token(p.x_stride.token), initial_token(p.initial_stride.token), length(p.length) {}

    __device__ __forceinline__ T_X at(int64 t) const {
        if (t >= 0 && t < length) return x[t * x_token];
        if (t < 0 && t >= -PAST && initial) return initial[(t + PAST) * initial_token];
        return from_float<T_X>(0.0f);
    }
};

__device__ __forceinline__ void store_last(const Params& p, const Row& row, int64 channel) {
#pragma unroll 1
    for (int j = 0; j < PAST; ++j) p.last[channel * PAST + j] = row.at(p.length - PAST + j);
}

// in: the inputs under the taps, oldest first, `stride` floats apart
__device__ __forceinline__ float convolve(const float* w, float bias, const float* in, int stride) {
    float sum = bias;
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) sum = __fmaf_rn(w[k], in[k * stride], sum);
    return SILU ? __fmul_rn(sum, sigmoid(sum)) : sum;
}

// ---- token-major -----------------------------------------------------------------------------------------------------

// Opaque to the compiler, which would otherwise keep the address of every token of a step in registers.
template <typename T>
__device__ __forceinline__ void advance(T*& p, int64 elements) {
    p += elements;
    asm volatile("" : "+l"(p));
}

// The outputs of VECTOR channels from `channel` on, for `tokens` tokens from `begin` on, of batch row b; at the end
// of a row also the state after it, whose inputs are in registers by then. The first
// `uncounted` of them are not counted, as another thread has them too or as they are not among the sampled.
__device__ __forceinline__ void walk(
    const Params& p, int64 b, int64 channel, int64 begin, int tokens, int uncounted, Statistic& statistic) {
    const T_X* x = p.x + b * p.x_stride.batch + channel * p.x_stride.dim + begin * p.x_stride.token;
    T_X* y = p.y + (b * p.length + begin) * p.dim + channel;
    T_X* last = begin + tokens == p.length ? p.last + (b * p.dim + channel) * PAST : nullptr;
    // All that is read first is on its way before any of it is waited for.
    Piece<T_X, VECTOR> ring[STEP], before[PAST] = {};
    auto load = [&](Piece<T_X, VECTOR>& piece) {
        piece.load(x);
        advance(x, p.x_stride.token);
    };
    const bool whole = tokens % STEP == 0;  // else a row shorter than any walk
    const T_X* first = x;
    if (whole) {
#pragma unroll
        for (int s = 0; s < STEP; ++s) load(ring[s]);
    }
#pragma unroll
    for (int j = 0; j < PAST; ++j) {
        if (begin + j >= PAST) {
            before[j].load(first + (j - PAST) * p.x_stride.token);
        } else if (p.initial) {
            const T_X* initial = p.initial + b * p.initial_stride.batch + channel * p.initial_stride.dim;
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                reinterpret_cast<T_X*>(&before[j].raw)[i] =
                    initial[i * p.initial_stride.dim + (begin + j) * p.initial_stride.token];
            }
        }
    }
    float w[VECTOR * WIDTH], bias[VECTOR] = {};
    load_parameters<VECTOR * WIDTH>(w, p.weight + channel * WIDTH);
    if (p.bias) load_parameters<VECTOR>(bias, p.bias + channel);
    float in[WIDTH * VECTOR];  // under the taps, oldest first
#pragma unroll
    for (int j = 0; j < PAST; ++j) before[j].unpack(in + j * VECTOR);

    auto output = [&](const Piece<T_X, VECTOR>& now) {
        now.unpack(in + PAST * VECTOR);
        float out[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) out[i] = convolve(w + i * WIDTH, bias[i], in + i, VECTOR);
        Piece<T_X, VECTOR> rounded;
        rounded.pack(out);
        rounded.store(y);
        advance(y, p.dim);
        if (!SAMPLED) {
            statistic.take(rounded, --uncounted < 0);
        } else if (--uncounted < 0) {
            statistic.take(rounded, 1);
            uncounted = p.stride - 1;
        }
#pragma unroll
        for (int i = 0; i < PAST * VECTOR; ++i) in[i] = in[i + VECTOR];
    };

    if (!whole) {
#pragma unroll 1
        for (int i = 0; i < tokens; ++i) {
            Piece<T_X, VECTOR> now;
            load(now);
            output(now);
        }
    } else {
#pragma unroll 1
        for (int left = tokens; left > 0; left -= STEP) {
#pragma unroll
            for (int s = 0; s < STEP; ++s) {
                output(ring[s]);
                if (left > STEP) load(ring[s]);
            }
        }
    }

    if (!last) return;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
#pragma unroll
        for (int j = 0; j < PAST; ++j) last[i * PAST + j] = from_float<T_X>(in[j * VECTOR + i]);
    }
}

extern "C" __global__ void __launch_bounds__(WALKERS, MIN_BLOCKS)
causal_conv1d_token_major(const __grid_constant__ Params p) {
    Statistic statistic(p);
    int lane = threadIdx.x & ((1 << p.lanes_log2) - 1), walker = threadIdx.x >> p.lanes_log2;
    uint32 columns = uint32((p.dim + (VECTOR << p.lanes_log2) - 1) / (VECTOR << p.lanes_log2));
#pragma unroll 1
    for (uint32 block = blockIdx.x; block < p.blocks; block += gridDim.x) {
        int64 channel = (int64(block % columns) << p.lanes_log2 | lane) * VECTOR;
        int64 segment = int64(block / columns) * (WALKERS >> p.lanes_log2) + walker;  // counted through the batch
        int64 b = segment / p.segments;
        if (block == blockIdx.x) {  // the first: the table is clear and the divisions are done by then
            wait_for_earlier_kernels();
            statistic.begin(p);
        }
        if (b >= p.batch || channel >= p.dim) continue;
        // A row's last segment starts earlier where it would end too late, so every walk is whole and needs one loop.
        int64 wanted = (segment - b * p.segments) * p.walk;
        int tokens = int(min(p.length, int64(p.walk)));
        int64 begin = min(wanted, p.length - tokens);
        int64 counted = SAMPLED ? (wanted + p.stride - 1) / p.stride * p.stride : wanted;
        walk(p, b, channel, begin, tokens, int(counted - begin), statistic);
        if (!HISTOGRAM) break;
    }
    statistic.finish(p);
}

// ---- channel-major ---------------------------------------------------------------------------------------------------
// A row is cut into vectors where y is aligned to 16 bytes, so the first and the last vector may be partly outside.

constexpr int FULL = 16 / sizeof(T_X);  // elements of a vector
constexpr int BEFORE = 4;               // elements loaded in front of it: PAST rounded up to what one load takes

// out: the outputs from token t on, `whole` if all of them are within the row
__device__ __forceinline__ void store(const Params& p, T_X* y, int64 t, bool whole, float* out, Statistic& statistic) {
    Piece<T_X, FULL> rounded;
    rounded.pack(out);
    if (HISTOGRAM) rounded.unpack(out);
    if (whole) rounded.store(y + t);
    if (whole && !SAMPLED) statistic.take(rounded, 1);
    if (whole && !SAMPLED) return;
    int64 counted = SAMPLED ? (max(t, int64(0)) + p.stride - 1) / p.stride * p.stride : max(t, int64(0));
#pragma unroll
    for (int e = 0; e < FULL; ++e) {
        if (t + e < 0 || t + e >= p.length) continue;
        if (!whole) y[t + e] = from_float<T_X>(out[e]);
        if (t + e != counted) continue;
        statistic.take(out[e]);
        counted += SAMPLED ? p.stride : 1;
    }
}

constexpr int VECTORS = 4;  // a thread

// This thread's vectors of a segment of one channel's tokens. Most instructions beside the arithmetic are about where
// they lie, so positions are counted in 32 bits from the first vector.
__device__ __forceinline__ void convolve_segment(
    const Params& p, int64 channel, int64 segment, Statistic& statistic) {
    int64 b = channel / p.dim, d = channel - b * p.dim;
    int lanes = 1 << p.lanes_log2;
    Row row(p, b, d);
    T_X* y = p.y + channel * p.length;
    int outside = int(reinterpret_cast<uint64>(y) / sizeof(T_X) % FULL);  // elements of the first vector before y
    bool aligned = p.x_stride.token == 1 && (reinterpret_cast<uint64>(row.x) - reinterpret_cast<uint64>(y)) % 16 == 0;
    int64 first = (segment * VECTORS * lanes + (threadIdx.x & (lanes - 1))) * FULL - outside;
    int hop = lanes * FULL;
    int past = int(min(first, int64(BEFORE))), left = int(min(p.length - first, int64(VECTORS * THREADS * FULL)));
    // Whole vectors of x with BEFORE elements before them, or at the very start of a row.
    auto whole = [&](int v) {
        int t = past + v * hop;
        return aligned && (t >= BEFORE || t == 0) && v * hop + FULL <= left;
    };

    if (!HISTOGRAM) wait_for_earlier_kernels();  // with one segment a block, all of the above is done meanwhile
    const T_X* x = row.x + first;
    Piece<T_X, FULL> now[VECTORS];
    Piece<T_X, BEFORE> before[VECTORS] = {};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        if (whole(v)) {
            now[v].load(x + v * hop);
            if (past + v * hop > 0) before[v].load(x + v * hop - BEFORE);
        }
    }

    float w[WIDTH];
    load_parameters<WIDTH>(w, p.weight + d * WIDTH);
    float bias = p.bias ? to_float(p.bias[d]) : 0.0f;

    float in[BEFORE + FULL], out[FULL];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        if (!whole(v)) continue;
        before[v].unpack(in);
        now[v].unpack(in + BEFORE);
        if (v == 0 && past == 0 && row.initial) {
#pragma unroll
            for (int j = 0; j < PAST; ++j) in[BEFORE - PAST + j] = to_float(row.at(j - PAST));
        }
#pragma unroll
        for (int e = 0; e < FULL; ++e) out[e] = convolve(w, bias, in + BEFORE - PAST + e, 1);
        store(p, y, first + v * hop, true, out, statistic);
    }

    bool remains = left <= (VECTORS - 1) * hop + FULL;  // the end of the row
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) remains |= !whole(v);
    if (!remains) return;
    // The ragged ends of a row, and all of it where x is strided or aligned otherwise than y.
#pragma unroll 1
    for (int v = 0; v < VECTORS; ++v) {
        int64 t = first + v * hop;
        if (t >= p.length) break;
        if (!whole(v)) {
#pragma unroll
            for (int e = 0; e < BEFORE + FULL; ++e) in[e] = to_float(row.at(t - BEFORE + e));
#pragma unroll
            for (int e = 0; e < FULL; ++e) out[e] = convolve(w, bias, in + BEFORE - PAST + e, 1);
            store(p, y, t, t >= 0 && t + FULL <= p.length, out, statistic);
        }
        if (t + FULL >= p.length) store_last(p, row, channel);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, HISTOGRAM || __CUDA_ARCH__ >= 1000 ? 3 : 4)
causal_conv1d_channel_major(const __grid_constant__ Params p) {
    Statistic statistic(p);
    if (HISTOGRAM) wait_for_earlier_kernels();
    statistic.begin(p);
#pragma unroll 1
    for (uint32 block = blockIdx.x; block < p.blocks; block += gridDim.x) {
        int64 segment = int64(block) * (THREADS >> p.lanes_log2) + (threadIdx.x >> p.lanes_log2);
        int64 channel = p.segments == 1 ? segment : segment / p.segments;  // counted through the batch, as segments are
        if (channel < p.batch * p.dim) convolve_segment(p, channel, segment - channel * p.segments, statistic);
        if (!HISTOGRAM) break;
    }
    statistic.finish(p);
}

// ---- one token -------------------------------------------------------------------------------------------------------

struct UpdateParams {
    const T_X* x;       // (B, D)
    T_X* state;         // (B, D, state_length): the last inputs, oldest first; shifted by one
    const T_W* weight;  // (D, WIDTH) packed
    const T_W* bias;    // (D,) packed, or null
    T_X* y;             // (B, D) packed
    int64 batch, dim, state_length;
    int64 x_batch, x_dim;
    Strides state_stride;
};

extern "C" __global__ void __launch_bounds__(UPDATE_THREADS)
causal_conv1d_update(const __grid_constant__ UpdateParams p) {
    wait_for_earlier_kernels();
    int64 channel = int64(blockIdx.x) * blockDim.x + threadIdx.x;  // counted through the batch
    int64 b = channel / p.dim, d = channel - b * p.dim;
    if (b >= p.batch) return;
    T_X* state = p.state + b * p.state_stride.batch + d * p.state_stride.dim;
    int64 older = p.state_length - PAST;  // inputs that only wait to be shifted out

    T_X raw[WIDTH];
    float in[WIDTH], w[WIDTH];
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
        raw[k] = k < PAST ? state[(older + k) * p.state_stride.token] : p.x[b * p.x_batch + d * p.x_dim];
        in[k] = to_float(raw[k]);
        w[k] = to_float(p.weight[d * WIDTH + k]);
    }
    p.y[channel] = from_float<T_X>(convolve(w, p.bias ? to_float(p.bias[d]) : 0.0f, in, 1));
    for (int64 j = 0; j < older; ++j) state[j * p.state_stride.token] = state[(j + 1) * p.state_stride.token];
#pragma unroll
    for (int k = 0; k < PAST; ++k) state[(older + k) * p.state_stride.token] = raw[k + 1];
}
