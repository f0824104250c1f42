// z = H x for every row of x (rows, n), padded with zeros to d = 2^LOG_D columns;
// H[i][j] = (-1)^popcount(i & j) / sqrt(d).
//
// A butterfly over bit b of the column takes every pair of values whose columns differ in that bit alone to its sum and
// its difference; all LOG_D of them make the transform. The arithmetic is float32; 1/sqrt(d) is multiplied in last.
// Where a bit lives decides how its butterfly runs: in the index of a register, an addition; in the lane, a shuffle.
// Which thread adds what depends on T_X, LOG_D and TENSOR_CORES alone, so a row has the same bits in any batch, layout or run.
// A row of 32768 is two blocks' work: H (a, b) is (H (a + b), H (a - b)), so that each reads all of the row, the second of
// them from L2, and transforms half as much. A block for the whole row would fill a multiprocessor, which then either
// moves data or computes; of these, three overlap. Tensor cores make it worth the while: hadamard_on_tensor_cores.cuh.
//
// Macros, from corey/_hadamard_cuda.py:
//   T_X         float, __half or __nv_bfloat16
//   LOG_D       1 to 15
//   LOAD_BYTES  the widest load, up to 16 bytes, at which every row starts and of which it holds a whole number
//   STRIDED     1 if neighbours in a row of x are not neighbours in memory; LOAD_BYTES is one element then
//   LEADING     how many (size, stride) pairs place the rows of x in memory
//   THREADS, ROWS, SHARED_BYTES   of a block
//   TENSOR_CORES  1 for what hadamard_on_tensor_cores.cuh is for

#include "common.cuh"

constexpr int kD = 1 << LOG_D;
constexpr float kScale = (LOG_D % 2 ? 0.70710678118654752f : 1.0f) / (1 << LOG_D / 2);

// Columns are moved in vectors of 16 bytes, or of a whole row where that is shorter.
constexpr int kVector = kD * int(sizeof(T_X)) < 16 ? kD : 16 / int(sizeof(T_X));
constexpr int kPerWord = 4 / int(sizeof(T_X));
constexpr int kWords = kVector / kPerWord;

struct Params {
    const T_X* x;
    T_X* z;  // (rows, d), contiguous
    int64 rows;
    int64 step;  // elements from one column of x to the next
    int64 n;     // columns of x
    int64 ahead;             // how many rows later the one is that a block brings into L2
    int64 sizes[LEADING];    // of the dimensions of x before the last, outermost first
    int64 strides[LEADING];  // in elements
};

// ---- columns in and out of registers --------------------------------------------------------------------------------

__device__ const T_X* row_of_x(const Params& p, int64 row) {
    int64 offset = 0;
#pragma unroll
    for (int i = LEADING - 1; i > 0; --i) {
        offset += row % p.sizes[i] * p.strides[i];
        row /= p.sizes[i];
    }
    return p.x + offset + row * p.strides[0];
}

// The next kVector columns of a row, packed; zero where there are no more than `left`.
__device__ void load_vector(uint32 (&words)[kWords], const T_X* x, int left, int64 step) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) words[word] = 0;
#pragma unroll
    for (int piece = 0; piece < 4 * kWords / LOAD_BYTES; ++piece) {
        const int column = piece * (LOAD_BYTES / int(sizeof(T_X)));
        if (column >= left) continue;
        const T_X* address = x + column * step;
        const int word = piece * LOAD_BYTES / 4;
        if constexpr (LOAD_BYTES == 16) {
            const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(address));
            words[word] = loaded.x;
            words[word + 1] = loaded.y;
            words[word + 2] = loaded.z;
            words[word + 3] = loaded.w;
        } else if constexpr (LOAD_BYTES == 8) {
            const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(address));
            words[word] = loaded.x;
            words[word + 1] = loaded.y;
        } else if constexpr (LOAD_BYTES == 4) {
            words[word] = __ldg(reinterpret_cast<const uint32*>(address));
        } else {
            words[word] |= uint32(__ldg(reinterpret_cast<const uint16*>(address))) << 16 * (piece % 2);
        }
    }
}

// A thread's vectors of a row: the first at column `first`, each kApart columns after the one before.
template <int kApart, int kCount>
__device__ void load_row(uint32 (&words)[kCount][kWords], const Params& p, int64 row, int first) {
    const bool exists = row < p.rows;
    const int left = exists ? int(p.n) - first : 0;
    const int64 step = STRIDED ? p.step : 1;
    const T_X* x = row_of_x(p, exists ? row : 0) + first * step;
#pragma unroll
    for (int v = 0; v < kCount; ++v) load_vector(words[v], x + v * kApart * step, left - v * kApart, step);
}

__device__ void widen(float* values, const uint32 (&words)[kWords]) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) unpack_word(words[word], values + word * kPerWord, T_X());
}

// Scales, rounds and stores one vector; z is aligned to 16 bytes and so is every row of 16 bytes or more.
__device__ void store_vector(T_X* address, const float* values) {
    uint32 words[kWords];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
        float scaled[kPerWord];
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) scaled[i] = values[word * kPerWord + i] * kScale;
        words[word] = pack_word(scaled, T_X());
    }
    if constexpr (kWords == 4) {
        *reinterpret_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
    } else if constexpr (kWords == 2) {
        *reinterpret_cast<uint2*>(address) = make_uint2(words[0], words[1]);
    } else {
        *reinterpret_cast<uint32*>(address) = words[0];
    }
}

// ---- butterflies ----------------------------------------------------------------------------------------------------

// Over the bits of the register index from kFrom up to, not including, kTo; both powers of two.
template <int kFrom, int kTo, int kCount>
__device__ void register_butterflies(float (&values)[kCount]) {
#pragma unroll
    for (int bit = kFrom; bit < kTo; bit *= 2) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (i & bit) continue;
            const float first = values[i], second = values[i + bit];
            values[i] = first + second;
            values[i + bit] = first - second;
        }
    }
}

// Over all bits of the lane within kLanes. All 32 lanes must take part.
template <int kLanes, int kCount>
__device__ void lane_butterflies(float (&values)[kCount]) {
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) {
        const float sign = threadIdx.x & bit ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            values[i] = fmaf(sign, values[i], __shfl_xor_sync(0xffffffffu, values[i], bit));
        }
    }
}

#if LOG_D < 12

// ---- d up to 2048: a warp, or a part of one, holds a row in registers -----------------------------------------------
//
// Bits of a column, lowest first: within a vector | lane | which vector of the lane. A thread loads all its vectors, of
// one row or of several, before it uses the first, so that enough bytes are on their way.

constexpr int kLanes = kD < 32 * kVector ? kD / kVector : 32;
constexpr int kVectors = kD / (kVector * kLanes);
constexpr int kGroups = THREADS / kLanes;
constexpr int kRows = ROWS / kGroups;
static_assert(kRows * kGroups == ROWS, "every group of lanes takes the same number of rows");

extern "C" __global__ void __launch_bounds__(THREADS) hadamard_transform(const __grid_constant__ Params p) {
    const int lane = threadIdx.x % kLanes;
    const int64 first_row = blockIdx.x * (int64)ROWS + threadIdx.x / kLanes;
    wait_for_earlier_kernels();

    uint32 words[kRows][kVectors][kWords];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        load_row<kLanes * kVector>(words[r], p, first_row + r * kGroups, lane * kVector);
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        float values[kVectors * kVector];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) widen(values + v * kVector, words[r][v]);
        register_butterflies<1, kVector>(values);
        lane_butterflies<kLanes>(values);
        register_butterflies<kVector, kVector * kVectors>(values);

        const int64 row = first_row + r * kGroups;
        if (row >= p.rows) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            store_vector(p.z + row * kD + (v * kLanes + lane) * kVector, values + v * kVector);
        }
    }
}

#elif TENSOR_CORES

#include "hadamard_on_tensor_cores.cuh"

#else

// ---- d from 4096: a block holds a row, or half a row of 32768, 64 columns a thread ------------------------------------
//
// Three passes of register butterflies, with the row laid out anew in shared memory between them. Bits of a column in
// the register index, with q = log2(kVector):
//   pass 1   0 .. q-1 and the top 6-q     as 16-byte loads bring them
//   pass 2   q .. q+5
//   pass 3   0 .. q-1 and q+6 .. 11       as 16-byte stores want them; only bits that no pass has done are left
// Shared memory moves 32 values a clock and so does the shuffle unit: two layouts cost what four shuffle stages cost.

constexpr int kHalves = LOG_D == 15 ? 2 : 1;  // of a row, each a block's
constexpr int kLogPart = LOG_D - (kHalves - 1), kPart = 1 << kLogPart;
constexpr int kColumns = 64;
constexpr int kVectors = kColumns / kVector;
static_assert(THREADS * kColumns == kPart && ROWS == 1, "a thread has 64 columns");

// Where a column lies in shared memory, in floats. The gaps keep every access free of bank conflicts: in pass 2 a warp
// reads kVector neighbours at distances of 64 kVector, and with eight columns to a vector the vectors of eight lanes
// are 32 bytes apart in passes 1 and 3. Additive in disjoint bits of the column, so that one register holds the
// thread's address and the rest are immediate offsets.
__device__ constexpr int place(int column) {
    return column + kVector * (column / (64 * kVector)) + (kVector == 8 ? 4 * (column / 32) : 0);
}
static_assert(SHARED_BYTES == 4 * place(kPart), "the host allocates what place() needs");

// How many blocks a multiprocessor shall hold; 0 leaves registers to the compiler. At 16384 columns shared memory has
// room for three, and in the half types 80 registers a thread do, but on Blackwell they would spill.
constexpr int kBlocks = kLogPart == 14 && sizeof(T_X) == 2 && __CUDA_ARCH__ < 1000 ? 3 : 0;

extern "C" __global__ void __launch_bounds__(THREADS, kBlocks) hadamard_transform(const __grid_constant__ Params p) {
    extern __shared__ float4 shared4[];
    float* shared = reinterpret_cast<float*>(shared4);
    const int t = threadIdx.x;
    float* const pass1 = shared + place(t * kVector);
    float* const pass2 = shared + place(t % kVector + t / kVector * (64 * kVector));
    const int column3 = t % 64 * kVector + t / 64 * 4096;
    float* const pass3 = shared + place(column3);
    const int64 row = blockIdx.x / kHalves;
    const int half = blockIdx.x % kHalves;
    wait_for_earlier_kernels();

    float values[kColumns];
    constexpr int kTogether = kVectors / kHalves;  // of a half's vectors are loaded at a time: more would not fit
#pragma unroll
    for (int first = 0; first < kVectors; first += kTogether) {
        uint32 words[kHalves][kTogether][kWords];
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
            load_row<kPart / kVectors>(words[h], p, row, h * kPart + first * (kPart / kVectors) + t * kVector);
        }
#pragma unroll
        for (int v = 0; v < kTogether; ++v) {
            float* const of_vector = values + (first + v) * kVector;
            widen(of_vector, words[0][v]);
            if (kHalves == 1) continue;
            float others[kVector];
            widen(others, words[kHalves - 1][v]);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                of_vector[i] = fmaf(half == 0 ? 1.0f : -1.0f, others[i], of_vector[i]);
            }
        }
    }

    if (kHalves == 1 && !STRIDED && row + p.ahead < p.rows) {  // memory is busy then while blocks compute
#pragma unroll
        for (int i = 0; i < kColumns; i += 128 / int(sizeof(T_X))) {
            const int column = t * kColumns + i;
            if (column < p.n) prefetch(row_of_x(p, row + p.ahead) + column);
        }
    }

    register_butterflies<1, kColumns>(values);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            const float* four = values + v * kVector + i;
            *reinterpret_cast<float4*>(pass1 + place(v * THREADS * kVector) + i) =
                make_float4(four[0], four[1], four[2], four[3]);
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kColumns; ++r) values[r] = pass2[place(r * kVector)];
    register_butterflies<1, kColumns>(values);
#pragma unroll
    for (int r = 0; r < kColumns; ++r) pass2[place(r * kVector)] = values[r];
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            float* four = values + v * kVector + i;
            const float4 loaded = *reinterpret_cast<const float4*>(pass3 + place(v * 64 * kVector) + i);
            four[0] = loaded.x;
            four[1] = loaded.y;
            four[2] = loaded.z;
            four[3] = loaded.w;
        }
    }
    register_butterflies<kVector, (kVector << (kLogPart - 12))>(values);
    T_X* const z = p.z + blockIdx.x * (int64)kPart + column3;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) store_vector(z + v * 64 * kVector, values + v * kVector);
}

#endif
