// The launch between the two of a split scan (selective_scan.cu): it links the tiles.
using T_U = void;  // of these it gets addresses that it does not use
using T_DELTA = void;
using T_Z = void;
using T_B = void;
using T_C = void;
#include "scan_params.cuh"

// One (batch row, channel, state): s of every tile becomes the state before it.
struct Chain {
  static constexpr int AHEAD = 32;  // tiles that are loaded at a time
  struct Tiles { float s[AHEAD], sum[AHEAD]; };
  const Params& p;
  const int64 i, rows, row;
  const int tiles;
  float A, H;

  __device__ __forceinline__ void load(Tiles& to, int first) const {
    if (first >= tiles) return;
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
      if (first + j < tiles) { to.s[j] = p.tiles[(first + j) * rows * N + i]; to.sum[j] = p.sums[(first + j) * rows + row]; }
  }
  __device__ __forceinline__ void link(const Tiles& of, int first) {
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
      if (first + j < tiles) {
        p.tiles[(first + j) * rows * N + i] = H;
        H = carry(factor_of(A, of.sum[j]), H, of.s[j]);
      }
  }
};

extern "C" __global__ void scan_carry(const __grid_constant__ Params p) {
  const int64 rows = (int64)p.batch.by * p.channels, i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * N) return;
  const int64 row = i / N, b = row / p.channels, channel = row % p.channels;
  const int n = i % N;
  const float A = finite(__fmul_rn(p.A[channel * p.A_channel + n * p.A_state], LOG2E));
  const float H = p.initial ? p.initial[b * p.initial_batch + channel * p.initial_channel + n * p.initial_state] : 0.f;
  Chain chain{p, i, rows, row, (p.length - 1) / TILE + 1, A, H};
  wait_for_earlier_kernels();
  Chain::Tiles now, next;
  chain.load(now, 0);
  for (int first = 0; first < chain.tiles; first += 2 * Chain::AHEAD) {  // what is linked next is on its way meanwhile
    chain.load(next, first + Chain::AHEAD);
    chain.link(now, first);
    chain.load(now, first + 2 * Chain::AHEAD);
    chain.link(next, first + Chain::AHEAD);
  }
  p.last[i] = chain.H;
}
