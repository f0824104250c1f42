// What all kernels of the selective scan share: their parameters, and how a tile's state follows from the state before it.
#pragma once

#include "common.cuh"

constexpr int TILE = 128;

struct Strides { int64 batch, channel, token; };          // of u, delta, z, y, in elements
struct Projection { int64 batch, group, state, token; };  // of B, C; where constant, `token` is the stride of the channel

struct Divisor { unsigned by, magic, shift; };             // n / by without a division, for n < 2^31
__device__ __forceinline__ unsigned operator/(unsigned n, const Divisor& d) { return (__umulhi(n, d.magic) + n) >> d.shift; }

struct Params {
  const T_U* u; const T_DELTA* delta; const T_Z* z; T_U* y; const T_B* B; const T_C* C;
  const float *A, *D, *bias, *initial; float* last;
  float* tiles;                // (tile, batch, channel, N): s of each tile, then the state before it
  float* sums;                 // (tile, batch, channel)
  const int* device_chunk;
  Strides su, sdelta, sz, sy; Projection sB, sC;
  int64 A_channel, A_state, D_channel, bias_channel, initial_batch, initial_channel, initial_state;
  Divisor blocks, groups, batch;  // blocks of channels a group
  int channels, group_channels, length, chunk;
  int lead;                    // in two parts: the token from which the second looks ahead
};

// An infinite rate must not meet a step of zero.
__device__ __forceinline__ float finite(float A) { return fminf(fmaxf(A, -3.4e38f), 3.4e38f); }

// The state after a tile, whose factor is exp(A sum). A growing state (A > 0) may have an infinite one, which must not
// meet a zero state. Zeros get the sign +, as tokens beyond the end may or may not have been added to a state of -0.
__device__ __forceinline__ float factor_of(float A, float sum) { return ex2(__fmul_rn(A, sum)); }
__device__ __forceinline__ float carry(float factor, float H, float s) {
  return __fadd_rn(H == 0.f ? s : fmaf(factor, H, s), 0.f);
}
