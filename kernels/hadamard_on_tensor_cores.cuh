// Rows of 32768 values of 16 bits, on compute capability 9.0 and later: a block holds a row, 64 columns a thread, and takes
// one row after another.
//
// Tensor cores do the first butterflies: values of 16 bits times 1 or -1 are exact, and their sums are float32. A product of
// the transform of 16 columns does four bits, two of them in the lane; adding and subtracting two products does another.
// What is left fits into two passes with one layout in shared memory between them, where additions alone take three passes.
//
//   bits of a column  | 0    1   2   3   4   5   6   7   8  9  10  11 .. 14
//   as loaded         | word r   r   l0  l1  l3  l4  l2  v  v  v   warp       r: word of a vector, v: vector, l: lane
//   after products    | l2   i1  i2  l3  l4  l0  l1  i0  i3 i4 i5  warp       i: index of a register
//   pass 2            | l2   l3  l4  l0  l1  i0  i1  w0  w1 w2 w3  i2 .. i5   w: warp
//
// Pass 1 does all bits but 5, 6 and 11 to 14, pass 2 does those. Its result, in 16 bits, has bits 0 to 2 in the lane: that
// is what stmatrix transposes, so that stores are of 16 bytes.
#pragma once

constexpr int kColumns = 64, kVectors = kColumns / kVector;
constexpr int kApart = 256;  // columns from one vector of a thread to its next
constexpr int kWarps = THREADS / 32;
static_assert(sizeof(T_X) == 2 && LOG_D == 15 && THREADS * kColumns == kD && ROWS == 1, "what the layouts are for");

struct Shared {
    float exchange[kD];
    uint4 input[kVectors * THREADS];
    uint4 staging[kWarps][128];
    Mbarrier read;  // all have read what the exchange held
};
static_assert(SHARED_BYTES == (sizeof(Shared) + 15) / 16 * 16, "the host allocates it");

// ---- instructions ---------------------------------------------------------------------------------------------------

// d += A (b0, b1), of which A is the transform of 16 columns without its scale, negated where the arguments are swapped.
#define MMA(TYPE) "mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %4, %4, %5}, {%6, %7}, {%0, %1, %2, %3};"
__device__ __forceinline__ void add_product(float* d, uint32 plus, uint32 minus, uint32 b0, uint32 b1, __nv_bfloat16) {
    asm volatile(MMA("bf16") : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(plus), "r"(minus), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void add_product(float* d, uint32 plus, uint32 minus, uint32 b0, uint32 b1, __half) {
    asm volatile(MMA("f16") : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(plus), "r"(minus), "r"(b0), "r"(b1));
}

// A lane's part of A, two entries: row lane / 4, column lane % 4 * 2 and the next.
__device__ __forceinline__ uint32 signs(int lane) {
    const uint32 even = __popc(lane / 8 & lane & 3) & 1, odd = even ^ (lane / 4 & 1);
    const float ones[] = {1.0f, 1.0f};
    return pack_word(ones, T_X()) | even << 15 | odd << 31;
}

// 16 bytes, or as many zeros.
__device__ __forceinline__ void copy_async(uint4* to, const T_X* from, int nbytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32(__cvta_generic_to_shared(to))), "l"(from), "r"(nbytes) : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLater> __device__ __forceinline__ void wait_for_copies() {  // all but the last kLater groups
    asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}
__device__ __forceinline__ void store_transposed(void* to, const uint32 (&of)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(uint32(__cvta_generic_to_shared(to))), "r"(of[0]), "r"(of[1]), "r"(of[2]), "r"(of[3]) : "memory");
}

// ---- columns in -----------------------------------------------------------------------------------------------------
// A thread's vectors of a row lie THREADS apart in shared memory. It copies those that it reads itself, so needs no barrier.

__device__ __forceinline__ void copy_row(uint4* to, const Params& p, int64 row, int first) {
    const T_X* x = row_of_x(p, row);
    const int left = int(p.n) - first;
    x += left > 0 ? first : 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const bool exists = left > v * kApart;
        copy_async(to + v * THREADS, exists ? x + v * kApart : x, exists ? 16 : 0);
    }
}

// Where rows cannot be read in vectors of 16 bytes.
__device__ __forceinline__ void read_row(uint4* to, const Params& p, int64 row, int first) {
    const int64 step = STRIDED ? p.step : 1;
    const T_X* x = row_of_x(p, row) + first * step;
#pragma unroll 1
    for (int v = 0; v < kVectors; ++v, x += kApart * step) {
        uint32 words[kWords];
        load_vector(words, x, int(p.n) - first - v * kApart, step);
        to[v * THREADS] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// ---- the transform --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void butterfly(float& a, float& b) {
    const float first = a, second = b;
    a = first + second;
    b = first - second;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) hadamard_transform(const __grid_constant__ Params p) {
    extern __shared__ float4 shared4[];
    Shared& shared = *reinterpret_cast<Shared*>(shared4);
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int column = warp * 2048 + lane % 4 * 8 + lane / 8 * 32 + lane / 4 % 2 * 128;
    float* const pass1 = shared.exchange + warp * 128 + lane;
    const float* const pass2 =
        shared.exchange + warp * 2048 + lane % 2 * 8 + lane / 2 % 2 * 16 + lane / 4 % 2 * 4 + lane / 8 * 32;
    char* const staging = reinterpret_cast<char*>(shared.staging[warp]);
    char* const matrices =
        staging + lane % 2 * 64 + lane / 2 % 2 * 16 + lane / 4 % 2 * 32 + lane / 8 % 2 * 128 + lane / 16 * 256;
    const uint32 plus = signs(lane), minus = plus ^ 0x80008000u;
    if (t == 0) shared.read.begin(THREADS);
    __syncthreads();
    wait_for_earlier_kernels();

    // The first row comes into the room of the exchange and the second into that of `input`, at once. Every other one is
    // asked for when the one before it is in registers.
    constexpr bool COPIES = LOAD_BYTES == 16;
    int64 row = blockIdx.x;
    if (COPIES) {
        copy_row(reinterpret_cast<uint4*>(shared.exchange) + t, p, row, column);
        end_copies();
        if (row + gridDim.x < p.rows) copy_row(shared.input + t, p, row + gridDim.x, column);
        end_copies();
    }
#pragma unroll 1
    for (int done = 0; row < p.rows; ++done, row += gridDim.x) {
        const uint4* input = shared.input + t;
        if (!COPIES) {
            read_row(shared.input + t, p, row, column);
        } else if (done == 0) {
            wait_for_copies<1>();
            input = reinterpret_cast<const uint4*>(shared.exchange) + t;
        } else {
            wait_for_copies<0>();
        }
        uint4 vectors[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) vectors[v] = input[v * THREADS];
        if (done == 0) shared.read.arrive();

        float values[kColumns];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* const d = values + 8 * v + 4 * half;
                d[0] = d[1] = d[2] = d[3] = 0.0f;
                add_product(d, plus, minus, vectors[v].x, vectors[v].y, T_X());
                add_product(d, half ? minus : plus, half ? plus : minus, vectors[v].z, vectors[v].w, T_X());
            }
        }
        register_butterflies<1, 2>(values);
        register_butterflies<8, 16>(values);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            // Waiting again costs little and keeps these stores between the additions, where they hide.
            if (i % 4 == 0) shared.read.wait(done % 2);
            butterfly(values[i], values[i + 32]);
            butterfly(values[i + 16], values[i + 48]);
            butterfly(values[i], values[i + 16]);
            butterfly(values[i + 32], values[i + 48]);
#pragma unroll
            for (int r = i; r < kColumns; r += 16) pass1[r / 2 % 4 * 32 + r % 2 * 2048 + r / 8 * 4096] = values[r];
        }
        __syncthreads();

        if (COPIES && done > 0 && row + gridDim.x < p.rows) {
            copy_row(shared.input + t, p, row + gridDim.x, column);
            end_copies();
        }
#pragma unroll
        for (int q = 0; q < kColumns; q += 4) {
            const float4 loaded = *reinterpret_cast<const float4*>(pass2 + q * 32);
            values[q] = loaded.x;
            values[q + 1] = loaded.y;
            values[q + 2] = loaded.z;
            values[q + 3] = loaded.w;
        }
        shared.read.arrive();
        register_butterflies<1, 16>(values);
        T_X* const z = p.z + row * kD + warp * 128 + lane % 16 * 8 + lane / 16 * 2048;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32 packed[4][4];
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                float finished[4][2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float* const of = values + half * 8 + i + j;
                    butterfly(of[0], of[32]);
                    butterfly(of[16], of[48]);
                    const float first = of[0] * kScale, third = of[32] * kScale;
                    finished[0][j] = fmaf(of[16], kScale, first);
                    finished[1][j] = fmaf(of[16], -kScale, first);
                    finished[2][j] = fmaf(of[48], kScale, third);
                    finished[3][j] = fmaf(of[48], -kScale, third);
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) packed[k][i / 2] = pack_word(finished[k], T_X());
            }
            if (half == 1 || done > 0) __syncwarp();  // what lies there has been read
#pragma unroll
            for (int k = 0; k < 4; ++k) store_transposed(matrices + k * 512, packed[k]);
            __syncwarp();
#pragma unroll
            for (int k = 0; k < 4; ++k)
                *reinterpret_cast<uint4*>(z + half * 4096 + k * 8192) =
                    *reinterpret_cast<const uint4*>(staging + k * 512 + lane * 16);
        }
    }
}
