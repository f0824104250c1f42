// Residual sum and root-mean-square norm of rows, a block a row, one pass over memory.
//
//   h = residual + x;  y = weight h / sqrt(mean(h^2) + eps)          h in float32, y rounded once
//
// Bound by reading x and residual and writing y and h, 12 bytes an element in bfloat16. A thread keeps 8 neighbouring
// elements in registers between the sum of squares and the product, so a row is read once and has at most 8192 columns.
// What a thread holds and the order of the sum depend on D alone: a row gets the same bits alone, in any batch and at
// any alignment.
//
// Macros: D (columns), WIDE (1 where D is a multiple of 8 and every row starts at a multiple of 16 bytes), RESIDUAL (0:
// there is none), T_X (of x, weight and y).
#include "common.cuh"

constexpr int VECTOR = 8, WARPS = (D + 32 * VECTOR - 1) / (32 * VECTOR), THREADS = 32 * WARPS;

struct Params {
    const T_X* x;
    const float* residual;
    const T_X* weight;  // (D,) packed
    T_X* y;             // rows packed, as those of h
    float* h;
    int64 x_row, residual_row;  // strides, in elements
    float eps;
};

template <typename T>
__device__ __forceinline__ void load(float (&out)[VECTOR], const T* row, int column) {
#if WIDE
    constexpr int SIZE = Vec16<T>::SIZE;
#pragma unroll
    for (int i = 0; i < VECTOR; i += SIZE) {
        float part[SIZE];
        Vec16<T>::load(row + column + i).unpack(part);
#pragma unroll
        for (int j = 0; j < SIZE; ++j) out[i + j] = part[j];
    }
#else
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] = column + i < D ? to_float(row[column + i]) : 0.0f;
#endif
}

template <typename T>
__device__ __forceinline__ void store(T* row, int column, const float (&in)[VECTOR]) {
#if WIDE
    constexpr int SIZE = Vec16<T>::SIZE;
#pragma unroll
    for (int i = 0; i < VECTOR; i += SIZE) {
        float part[SIZE];
#pragma unroll
        for (int j = 0; j < SIZE; ++j) part[j] = in[i + j];
        Vec16<T>::pack(part).store(row + column + i);
    }
#else
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        if (column + i < D) row[column + i] = from_float<T>(in[i]);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_rms_norm(const __grid_constant__ Params p) {
    __shared__ float of_warps[WARPS];
    int64 row = blockIdx.x;
    int column = int(threadIdx.x) * VECTOR;
    bool held = column < D;
    float h[VECTOR] = {}, weight[VECTOR] = {}, squares = 0.0f;
    if (held) {
        load(h, p.x + row * p.x_row, column);
        load(weight, p.weight, column);  // now, as nothing hides its latency after the barrier
#if RESIDUAL
        float residual[VECTOR];
        load(residual, p.residual + row * p.residual_row, column);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) h[i] = __fadd_rn(residual[i], h[i]);
#endif
        store(p.h + row * D, column, h);
    }
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) squares = __fmaf_rn(h[i], h[i], squares);

#pragma unroll
    for (int offset = 16; offset; offset /= 2) squares = __fadd_rn(squares, __shfl_xor_sync(~0u, squares, offset));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) squares = __fadd_rn(squares, of_warps[warp]);
    float scale = rsqrtf(__fadd_rn(__fdiv_rn(squares, float(D)), p.eps));

    if (held) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) h[i] = __fmul_rn(__fmul_rn(h[i], scale), weight[i]);
        store(p.y + row * D, column, h);
    }
}
