// Shared by all kernels: types, conversions, 16-byte loads and stores, and the functions of the scan's arithmetic.
// NVRTC compiles this, without host headers. Rounding is spelled out (__fmaf_rn, __fmul_rn) where the bits must not
// depend on what the compiler fuses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

constexpr float LOG2E = 1.4426950408889634f;

// ---- conversions: to float is exact, from float rounds to nearest even ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// ---- 16 bytes of T: one load or store instruction, unpacked in registers ----

// One 32-bit word holds one float or two 16-bit numbers, the lower address in the lower half.
__device__ __forceinline__ void unpack_word(uint32 word, float* out, float) { out[0] = __uint_as_float(word); }
__device__ __forceinline__ void unpack_word(uint32 word, float* out, __nv_bfloat16) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(uint32 word, float* out, __half) {
    out[0] = __half2float(__ushort_as_half(uint16(word & 0xffffu)));
    out[1] = __half2float(__ushort_as_half(uint16(word >> 16)));
}

__device__ __forceinline__ uint32 pack_word(const float* in, float) { return __float_as_uint(in[0]); }
__device__ __forceinline__ uint32 pack_word(const float* in, __nv_bfloat16) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
    return reinterpret_cast<const uint32&>(pair);
}
__device__ __forceinline__ uint32 pack_word(const float* in, __half) {
    __half2 pair = __floats2half2_rn(in[0], in[1]);
    return reinterpret_cast<const uint32&>(pair);
}

template <typename T>
struct Vec16 {
    static constexpr int SIZE = 16 / sizeof(T);  // elements
    static constexpr int PER_WORD = 4 / sizeof(T);

    uint4 words;

    // p must be a multiple of 16 bytes. `load` goes through the read-only path: nobody may write there during the kernel.
    __device__ __forceinline__ static Vec16 load(const T* p) { return {__ldg(reinterpret_cast<const uint4*>(p))}; }
    __device__ __forceinline__ static Vec16 load_shared(const T* p) { return {*reinterpret_cast<const uint4*>(p)}; }
    __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = words; }

    __device__ __forceinline__ void unpack(float (&out)[SIZE]) const {
        unpack_word(words.x, out + 0 * PER_WORD, T());
        unpack_word(words.y, out + 1 * PER_WORD, T());
        unpack_word(words.z, out + 2 * PER_WORD, T());
        unpack_word(words.w, out + 3 * PER_WORD, T());
    }

    __device__ __forceinline__ static Vec16 pack(const float (&in)[SIZE]) {
        return {make_uint4(
            pack_word(in + 0 * PER_WORD, T()), pack_word(in + 1 * PER_WORD, T()), pack_word(in + 2 * PER_WORD, T()),
            pack_word(in + 3 * PER_WORD, T()))};
    }
};

// ---- launches ----

// A launch may begin before the kernel ahead of it on its stream has ended (corey/_cuda.py, `launch`). Nothing that another
// kernel writes may be read before this call, and nothing written; every block must make it. The next kernel may begin
// in the same way as soon as every block has got here.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    let_next_kernel_begin();
}

// ---- warps with different work ----

// A warp that waits leaves the scheduler to others.
#if __CUDA_ARCH__ >= 900
#define TRY_WAIT "try_wait"
#define SLEEP ""
#else
#define TRY_WAIT "test_wait"
#define SLEEP "@!open nanosleep.u32 32;\n"
#endif

// A barrier in shared memory that opens whenever `count` threads have arrived. Who arrives does not wait for it to open.
struct Mbarrier {
    uint64 word;

    __device__ __forceinline__ void begin(int count) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(uint32(__cvta_generic_to_shared(&word))), "r"(count) : "memory");
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(uint32(__cvta_generic_to_shared(&word))) : "memory");
    }
    // By one thread, which arrives: it opens when what others `send` here makes so many bytes, too.
    __device__ __forceinline__ void expect(int nbytes) {
        asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;}" ::"r"(uint32(__cvta_generic_to_shared(&word))), "r"(nbytes) : "memory");
    }
    // By whole warps, until it has opened for the first time where parity is 0, then the second where it is 1, and so on.
    __device__ __forceinline__ void wait(int parity) {
        asm volatile("{.reg .pred open;\nAGAIN:\nmbarrier." TRY_WAIT ".parity.shared.b64 open, [%0], %1;\n" SLEEP "@!open bra.uni AGAIN;\n}" ::"r"(uint32(__cvta_generic_to_shared(&word))), "r"(parity) : "memory");
    }
};

// ---- clusters of blocks, on compute capability 9.0 and later ----

// By all threads, when their block's Mbarriers have begun: from then on others of the cluster may send to it.
__device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
// By whole warps, before they send anything.
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// To another block's shared memory, where `to` and `full` lie as here. Who has waited at its `full` can read it.
__device__ __forceinline__ void send(float2 value, const float2* to, const Mbarrier& full, int block) {
    asm volatile("{.reg .b32 to, full;\nmapa.shared::cluster.u32 to, %0, %4;\nmapa.shared::cluster.u32 full, %1, %4;\nst.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%2, %3}, [full];}" ::"r"(uint32(__cvta_generic_to_shared(to))), "r"(uint32(__cvta_generic_to_shared(&full.word))), "f"(value.x), "f"(value.y), "r"(block) : "memory");
}

__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// ---- functions ----

// 2^x on the special function unit: relative error below 2^-22, subnormal results are 0.
__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x on the special function unit: 1 ulp, subnormal results are 0, so 1 / inf and 1 / 2^127 are too.
__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log(1 + e) / e for e in [0, 1]: minimax in relative error with a constant term of exactly 1. It is for steps of type X:
// in 16 bits they are rounded by more than 1e-4 of themselves, so 1.5e-6 will do, else 3.3e-8.
template <typename X>
__device__ __forceinline__ float log1p_over(float e) {
    float p;
    if constexpr (sizeof(X) == 2) {
        p = 1.4588338322937489e-2f;
        p = __fmaf_rn(p, e, -6.785126030445099e-2f);
        p = __fmaf_rn(p, e, 1.5102776885032654e-1f);
        p = __fmaf_rn(p, e, -2.3611347377300262e-1f);
        p = __fmaf_rn(p, e, 3.3140426874160767e-1f);
        p = __fmaf_rn(p, e, -4.999074637889862e-1f);
    } else {
        p = 5.365422461181879e-3f;
        p = __fmaf_rn(p, e, -3.0068300664424896e-2f);
        p = __fmaf_rn(p, e, 7.920882850885391e-2f);
        p = __fmaf_rn(p, e, -1.3754187524318695e-1f);
        p = __fmaf_rn(p, e, 1.915384829044342e-1f);
        p = __fmaf_rn(p, e, -2.4857217073440552e-1f);
        p = __fmaf_rn(p, e, 3.3321329951286316e-1f);
        p = __fmaf_rn(p, e, -4.9999648332595825e-1f);
    }
    return __fmaf_rn(p, e, 1.0f);
}

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), accurate in relative error for very negative x too.
template <typename X>
__device__ __forceinline__ float softplus(float x) {
    float e = ex2(__fmul_rn(fabsf(x), -LOG2E));
    return __fmaf_rn(e, log1p_over<X>(e), fmaxf(x, 0.0f));
}

// 1 / (1 + exp(-x)): 0 for very negative x, so x * sigmoid(x) is then -0 and not NaN.
__device__ __forceinline__ float sigmoid(float x) { return rcp(__fadd_rn(1.0f, ex2(__fmul_rn(x, -LOG2E)))); }
