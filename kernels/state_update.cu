// One token of the selective scan, for decode: the state of every channel moves on and gives an output, in one launch.
//
//   step = softplus(dt + dt_bias);  h[n] = exp(step A[n]) h[n] + step x B[n];  y = (sum_n h[n] C[n] + D x) silu(z)
//
// Bound by reading and writing the float32 state. LANES neighbouring lanes share a channel and hold 8 states each (one
// lane where N is at most 8); a thread does this for ROWS batch rows, a divisor of B, whose loads are in flight together
// and which share A, D and dt_bias.
//
// Macros: STATES (N), ROWS, SOFTPLUS (0 or 1), VECTOR (1 where 4 states of state, A, B and C are one aligned access), and
// the types T_X (of x and y), T_DT, T_B, T_C, T_D, T_Z and T_BIAS.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int LANES = STATES > 128 ? 32 : STATES > 64 ? 16 : STATES > 32 ? 8 : STATES > 16 ? 4 : STATES > 8 ? 2 : 1;
constexpr int HELD = STATES > 4 ? 8 : 4;   // states a lane
constexpr int CHANNELS = THREADS / LANES;  // a block

struct Params {
    float* state;  // (B, D, N), updated
    const T_X* x;  // (B, D)
    const T_DT* dt;
    const float* A;  // (D, N)
    const T_B* B;    // (B, G, N)
    const T_C* C;
    const T_D* D;           // (D,), or null
    const T_Z* z;           // (B, D), or null
    const T_BIAS* dt_bias;  // (D,), or null
    T_X* y;                 // (B, D) packed
    int64 batch, dim, channels_a_group;
    int64 state_batch, state_dim, state_n;  // strides, in elements
    int64 x_batch, x_dim, dt_batch, dt_dim, A_dim, A_n;
    int64 B_batch, B_group, B_n, C_batch, C_group, C_n;
    int64 D_dim, z_batch, z_dim, dt_bias_dim;
};

// A lane's states of one row, zero from STATES on. `from` is where state `n` lies, a multiple of 4.
template <typename T>
__device__ __forceinline__ void load_states(float (&out)[HELD], const T* from, int64 stride, int n) {
#pragma unroll
    for (int i = 0; i < HELD; i += 4) {
        if (VECTOR && n + i >= STATES) {
            out[i] = out[i + 1] = out[i + 2] = out[i + 3] = 0.0f;
        } else if constexpr (!VECTOR) {
#pragma unroll
            for (int j = i; j < i + 4; ++j) out[j] = n + j < STATES ? to_float(from[j * stride]) : 0.0f;
        } else if constexpr (sizeof(T) == 4) {
            float4 quad = *reinterpret_cast<const float4*>(from + i);
            out[i] = quad.x, out[i + 1] = quad.y, out[i + 2] = quad.z, out[i + 3] = quad.w;
        } else {
            uint2 words = *reinterpret_cast<const uint2*>(from + i);
            unpack_word(words.x, out + i, T());
            unpack_word(words.y, out + i + 2, T());
        }
    }
}

__device__ __forceinline__ void store_states(float* to, int64 stride, int n, const float (&in)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; i += 4) {
        if constexpr (!VECTOR) {
#pragma unroll
            for (int j = i; j < i + 4; ++j) {
                if (n + j < STATES) to[j * stride] = in[j];
            }
        } else if (n + i < STATES) {
            *reinterpret_cast<uint4*>(to + i) = make_uint4(
                __float_as_uint(in[i]), __float_as_uint(in[i + 1]), __float_as_uint(in[i + 2]), __float_as_uint(in[i + 3]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
selective_state_update(const __grid_constant__ Params p) {
    int n = threadIdx.x % LANES * HELD;  // this lane's first state
    uint32 columns = uint32((p.dim + CHANNELS - 1) / CHANNELS);
    int64 wanted = int64(blockIdx.x % columns) * CHANNELS + threadIdx.x / LANES;
    int64 d = min(wanted, p.dim - 1);  // lanes without a channel stay for the shuffles
    int64 group = d / p.channels_a_group;
    int64 first = int64(blockIdx.x / columns) * ROWS;

    float* state = p.state + first * p.state_batch + d * p.state_dim + n * p.state_n;
    const T_B* B_row = p.B + first * p.B_batch + group * p.B_group + n * p.B_n;
    const T_C* C_row = p.C + first * p.C_batch + group * p.C_group + n * p.C_n;
    const T_X* x_row = p.x + first * p.x_batch + d * p.x_dim;
    const T_DT* dt_row = p.dt + first * p.dt_batch + d * p.dt_dim;
    const T_Z* z_row = p.z ? p.z + first * p.z_batch + d * p.z_dim : nullptr;
    float h[ROWS][HELD], B[ROWS][HELD], C[ROWS][HELD], x[ROWS], step[ROWS], z[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        load_states(h[r], static_cast<const float*>(state) + r * p.state_batch, p.state_n, n);
        load_states(B[r], B_row + r * p.B_batch, p.B_n, n);
        load_states(C[r], C_row + r * p.C_batch, p.C_n, n);
        x[r] = to_float(x_row[r * p.x_batch]);
        step[r] = to_float(dt_row[r * p.dt_batch]);
        if (z_row) z[r] = to_float(z_row[r * p.z_batch]);
    }
    float A[HELD];
    load_states(A, p.A + d * p.A_dim + n * p.A_n, p.A_n, n);
#pragma unroll
    for (int i = 0; i < HELD; ++i) A[i] = __fmul_rn(A[i], LOG2E);
    float D = p.D ? to_float(p.D[d * p.D_dim]) : 0.0f;
    float bias = p.dt_bias ? to_float(p.dt_bias[d * p.dt_bias_dim]) : 0.0f;

    T_X* y_row = p.y + first * p.dim + d;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float delta = __fadd_rn(step[r], bias);
        if (SOFTPLUS) delta = softplus<T_DT>(delta);
        float input = __fmul_rn(delta, x[r]), y = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            if (LANES * HELD > STATES && n + i >= STATES) break;
            h[r][i] = __fmaf_rn(ex2(__fmul_rn(delta, A[i])), h[r][i], __fmul_rn(input, B[r][i]));
            y = __fmaf_rn(h[r][i], C[r][i], y);
        }
#pragma unroll
        for (int offset = LANES / 2; offset; offset /= 2) y += __shfl_xor_sync(~0u, y, offset);
        if (p.D) y = __fmaf_rn(D, x[r], y);
        if (z_row) y = __fmul_rn(y, __fmul_rn(z[r], sigmoid(z[r])));
        if (wanted < p.dim) {
            store_states(state + r * p.state_batch, p.state_n, n, h[r]);
            if (n == 0) y_row[r * p.dim] = from_float<T_X>(y);
        }
    }
}
