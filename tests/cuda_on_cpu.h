// Runs a CUDA kernel on the CPU, for tests of its logic where there is no GPU. Every thread of a block is a fiber that
// runs until it waits at a barrier or, with ON_THREADS, a thread that runs beside the others, for ThreadSanitizer. Clusters
// of PARTS blocks run one after another, last first, and shared memory starts as garbage. It knows what the kernels of the
// scan and hadamard_on_tensor_cores.cuh use: barriers of a block, of a warp and in shared memory, one of a cluster,
// shuffles of whole warps, no atomics, exp2 and 1/x in place of the GPU's, and what a tensor core does.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <atomic>
#include <vector>
#ifdef ON_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
using std::max;
using std::min;

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
template <class T> T __ldg(const T* p) { return *p; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

struct __half { _Float16 x; };
struct __half2 { __half x, y; };
inline float __half2float(__half x) { return (float)x.x; }
inline __half __float2half_rn(float x) { return {(_Float16)x}; }
inline __half __ushort_as_half(unsigned short bits) { __half x; memcpy(&x, &bits, 2); return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

struct __nv_bfloat16 { unsigned short bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  return {(unsigned short)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }

#ifndef PARTS
#define PARTS 1
#endif
constexpr int MOST = 2;  // blocks of a cluster: libraries in one process share these variables, whatever their PARTS is
struct Index { unsigned x, y, z; };
inline Index blockDim, gridDim;
inline char* memories[MOST];  // shared, of the blocks of a cluster
#define shared_memory (memories[blockIdx.x % PARTS])

#ifdef ON_THREADS
inline thread_local Index threadIdx, blockIdx;

struct Barrier {
  std::mutex mutex;
  std::condition_variable next;
  unsigned arrived = 0, round = 0;
  void count(unsigned threads) {
    if (++arrived < threads) return;
    arrived = 0;
    ++round;
    next.notify_all();
  }
  void wait(unsigned threads) {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = round;
    count(threads);
    next.wait(lock, [&] { return round != mine; });
  }
};
#else
struct Fiber { ucontext_t context; Index thread, block; bool done; std::vector<char> stack; };
inline Fiber* running;
inline ucontext_t scheduler;
inline unsigned long passed;  // barriers and ends of threads: there is always a next one, or the block hangs
#define threadIdx (running->thread)
#define blockIdx (running->block)

struct Barrier {
  unsigned arrived = 0, round = 0;
  void arrive(unsigned threads) {
    if (++arrived < threads) return;
    arrived = 0;
    ++round;
    ++passed;
  }
  void wait(unsigned threads) {
    const unsigned mine = round;
    arrive(threads);
    while (round == mine) swapcontext(&running->context, &scheduler);
  }
};
#endif
inline Barrier block_barriers[MOST], warp_barriers[MOST][32];
inline void __syncthreads() { block_barriers[blockIdx.x % PARTS].wait(blockDim.x); }
inline void __syncwarp() { warp_barriers[blockIdx.x % PARTS][threadIdx.x / 32].wait(32); }
template <class X> X value_of(unsigned thread, X mine) {  // in its warp
  static X offered[MOST][1024];
  offered[blockIdx.x % PARTS][threadIdx.x] = mine;
  __syncwarp();
  const X theirs = offered[blockIdx.x % PARTS][thread];
  __syncwarp();
  return theirs;
}
template <class X> X __shfl_sync(unsigned, X mine, int lane) { return value_of(threadIdx.x / 32 * 32 + lane, mine); }
template <class X> X __shfl_xor_sync(unsigned, X mine, int lanes) { return value_of(threadIdx.x ^ lanes, mine); }

// A barrier in shared memory: arrivals that are missing, of how many, in 16 bits each; how often it has opened in 32.
using Word = unsigned long long;
inline void begin_mbarrier(Word& word, Word count) { word = count << 16 | count; }
inline void arrive_at_mbarrier(Word& word) {
  std::atomic_ref shared(word);
  Word before = shared.load(std::memory_order_relaxed), after;
  do {
    after = before - 1;
    if (after % (1 << 16) == 0) after += (1ull << 32) + (after >> 16) % (1 << 16);
  } while (!shared.compare_exchange_weak(before, after, std::memory_order_release, std::memory_order_relaxed));
  if (after >> 32 == before >> 32) return;
#ifdef ON_THREADS
  shared.notify_all();
#else
  ++passed;
#endif
}
inline void wait_at_mbarrier(Word& word, int parity) {
  std::atomic_ref shared(word);
  for (Word seen; ((seen = shared.load(std::memory_order_acquire)) >> 32) % 2 == parity;)
#ifdef ON_THREADS
    shared.wait(seen, std::memory_order_relaxed);
#else
    swapcontext(&running->context, &scheduler);
#endif
}

// A barrier of a cluster that is passed once, and what its blocks send each other: every 8 bytes arrive by themselves.
inline std::atomic<unsigned> in_cluster;
inline void arrive_at_cluster_barrier() {
  if (++in_cluster < PARTS * blockDim.x) return;
#ifdef ON_THREADS
  in_cluster.notify_all();
#else
  ++passed;
#endif
}
inline void wait_at_cluster_barrier() {
  for (unsigned seen; (seen = in_cluster) < PARTS * blockDim.x;)
#ifdef ON_THREADS
    in_cluster.wait(seen);
#else
    swapcontext(&running->context, &scheduler);
#endif
}
inline void expect_at_mbarrier(Word& word, Word nbytes) {
  std::atomic_ref(word) += nbytes / 8;
  arrive_at_mbarrier(word);
}
template <class X> X& in_block(X& x, int block) { return *(X*)((char*)&x - shared_memory + memories[block]); }
inline void send_to_block(float2 value, const float2* to, const Word& word, int block) {
  in_block((float2&)*to, block) = value;
  arrive_at_mbarrier(in_block((Word&)word, block));
}

// d += A (b0, b1) by a warp, as mma.m16n8k16 does, A being (plus, plus; plus, minus). X: of 16 bits.
template <class X> void multiply_add(float* d, unsigned plus, unsigned minus, unsigned b0, unsigned b1) {
  static unsigned A[1024][2], B[1024][2];
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  A[threadIdx.x][0] = plus, A[threadIdx.x][1] = minus;
  B[threadIdx.x][0] = b0, B[threadIdx.x][1] = b1;
  __syncwarp();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      float a[2], b[2];
      unpack_word(A[first + row % 8 * 4 + k % 8 / 2][row / 8 & k / 8], a, X());
      unpack_word(B[first + column * 4 + k % 8 / 2][k / 8], b, X());
      d[i] += a[k % 2] * b[k % 2];
    }
  }
  __syncwarp();
}
// stmatrix of four 8 x 8 matrices, transposed: lane 8 m + i has the address of row i of matrix m.
inline void store_matrices_transposed(void* to, const unsigned (&of)[4]) {
  static unsigned short* rows[1024];
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  rows[threadIdx.x] = (unsigned short*)to;
  __syncwarp();
  for (unsigned matrix = 0; matrix < 4; ++matrix)
    for (unsigned half = 0; half < 2; ++half) rows[first + matrix * 8 + lane % 4 * 2 + half][lane / 4] = of[matrix] >> 16 * half;
  __syncwarp();
}
// Copies that a thread starts and waits for in groups. They happen as late as they may, when it waits.
struct Copy { void* to; const void* from; int nbytes; };
inline std::vector<std::vector<Copy>> groups_of[1024];
inline void copy_later(void* to, const void* from, int nbytes) {
  auto& groups = groups_of[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, nbytes});
}
inline void end_group_of_copies() { groups_of[threadIdx.x].resize(std::max<size_t>(1, groups_of[threadIdx.x].size()) + 1); }
inline void copy_all_but(size_t later) {  // groups that have ended
  auto& groups = groups_of[threadIdx.x];
  while (groups.size() > later + 1) {
    for (const Copy& copy : groups.front()) {
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.nbytes);
    }
    groups.erase(groups.begin());
  }
}

#ifdef ON_THREADS
template <class Params> void run_grid(void (*kernel)(const Params), const Params& params, unsigned grid, unsigned threads, size_t shared) {
  gridDim = {grid, 1, 1};
  blockDim = {threads, 1, 1};
  for (char*& memory : memories) memory = (char*)aligned_alloc(128, (shared + 128) / 128 * 128);
  for (unsigned first = grid; first > 0;) {
    first -= PARTS;
    for (char* memory : memories) memset(memory, 0xab, shared);
    in_cluster = 0;
    std::vector<std::thread> running;
    for (unsigned t = 0; t < PARTS * threads; ++t)
      running.emplace_back([&, t] {
        threadIdx = {t % threads, 0, 0};
        blockIdx = {first + t / threads, 0, 0};
        kernel(params);
      });
    for (auto& thread : running) thread.join();
  }
  for (char* memory : memories) free(memory);
}
#else
template <class Params> void run_grid(void (*kernel)(const Params), const Params& params, unsigned grid, unsigned threads, size_t shared) {
  static const Params* argument;
  static void (*entry)(const Params);
  argument = &params;
  entry = kernel;
  gridDim = {grid, 1, 1};
  blockDim = {threads, 1, 1};
  std::vector<Fiber> fibers(PARTS * threads);
  for (auto& fiber : fibers) fiber.stack.resize(1 << 17);
  for (char*& memory : memories) memory = (char*)aligned_alloc(128, (shared + 128) / 128 * 128);
  for (unsigned first = grid; first > 0;) {
    first -= PARTS;
    for (char* memory : memories) memset(memory, 0xab, shared);
    for (unsigned t = 0; t < fibers.size(); ++t) {
      Fiber& fiber = fibers[t];
      fiber.thread = {t % threads, 0, 0};
      fiber.block = {first + t / threads, 0, 0};
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, +[] { entry(*argument); running->done = true; }, 0);
    }
    std::fill(std::begin(block_barriers), std::end(block_barriers), Barrier{});
    for (auto& of_block : warp_barriers) std::fill(std::begin(of_block), std::end(of_block), Barrier{});
    for (auto& groups : groups_of) groups.clear();  // those that nobody has waited for
    in_cluster = 0;
    unsigned long before = -1;
    // Who relies on an order is noticed: in every other block the last warp comes first, and each goes as far as it can alone.
    const bool odd = first / PARTS % 2;
    for (unsigned left = fibers.size(); left > 0;) {
      const bool waits = passed == before;  // all that could run has run in the last turn
      before = passed;
      for (unsigned warp = 0; warp < fibers.size(); warp += 32) {
        unsigned long seen;
        do {
          seen = passed;
          for (unsigned t = warp; t < warp + 32; ++t) {
            Fiber& fiber = fibers[odd ? fibers.size() - 1 - t : t];
            if (fiber.done) continue;
            running = &fiber;
            swapcontext(&scheduler, &fiber.context);
            left -= fiber.done;
            passed += fiber.done;
          }
        } while (odd && passed != seen);
      }
      if (waits && passed == before) { fprintf(stderr, "threads wait at a barrier that others do not reach\n"); abort(); }
    }
  }
  for (char* memory : memories) free(memory);
}
#endif
