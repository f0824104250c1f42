// Selective scan forward (Mamba's S6): h_t = exp(step_t A) h_{t-1} + step_t u_t B_t,  y_t = (<C_t, h_t> + D u_t) silu(z_t).
//
// States run across the lanes. LANES lanes share a channel, each holds STATES of its states in registers and walks the
// tokens in order; all channels of a warp read the same B_t and C_t. The block first turns T tokens of
// its inputs into fp32 in shared memory (elementwise, by all threads), then walks them, then gates and stores y.
//
// The tile of 128 tokens is the unit of arithmetic. Over a tile a lane computes the local state s, from zero, and the sum
// of the steps; the carry is H' = exp(A sum) H + s, one fused multiply-add, and h starts each tile from H. A chunk is a
// whole number of tiles that one block walks. With one chunk a sequence, `scan_both` does it all in one pass. With more,
// chunks run in parallel: `scan_states` finds s and the sum of every tile, `scan_carry` links the tiles, and
// `scan_outputs` walks again from the true states. Every tile does the same arithmetic in both, so the chunk size, and
// whether a sequence is split at all, never changes a bit. It changes the time: splitting computes every exp twice.
#include "common.cuh"

constexpr int TILE = 128;
constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int LANES = N <= 4 ? 1 : N <= 8 ? 2 : N <= 16 ? 4 : 8;             // lanes a channel
constexpr int STATES = (N + LANES - 1) / LANES < 4 ? 4 : ((N + LANES - 1) / LANES + 3) / 4 * 4;  // states a lane, padded
constexpr int ROW = LANES * STATES;                                           // states of a channel, padded
constexpr int ABREAST = 32 / LANES, CHANNELS = WARPS * ABREAST;               // channels side by side in a warp; a block
constexpr int EACH = 8, T = EACH * THREADS / CHANNELS;                        // elements a thread, tokens at a time

// Rows of a channel in shared memory, padded so that lanes hit different banks.
constexpr int SW = T + 2, SW_ALL = CHANNELS * SW + CHANNELS;                  // {step, step u}
constexpr int SY = T + 4, SY_ALL = CHANNELS * SY + 2 * CHANNELS;              // a lane's share of <C, h>
__device__ __forceinline__ int sw_row(int c) { return c * SW + c / 8 * 8; }
__device__ __forceinline__ int y_row(int c) { return c * SY + c / 8 * 16; }

constexpr int BLOCKS = N > 64 ? 1 : N > 16 ? 2 : sizeof(T_U) > 2 ? 3 : 4;     // a multiprocessor: what registers allow

// How the elements of a (CHANNELS, T) piece of u, delta, z and y lie in the block's threads: 8 neighbouring tokens or
// channels a thread, or neighbouring threads on neighbouring tokens or channels.
enum { TOKENS_A_THREAD, CHANNELS_A_THREAD, THREADS_ON_TOKENS, THREADS_ON_CHANNELS };
enum { VECTORS_OF_TOKENS, VECTORS_OF_STATES, STRIDED, CONSTANT };             // B and C; CONSTANT: (D, N)

struct Strides { int64 batch, channel, token; };          // of u, delta, z, y, in elements
struct Projection { int64 batch, group, state, token; };  // of B, C; where constant, `token` is the stride of the channel

struct Params {
  const T_U* u; const T_DELTA* delta; const T_Z* z; T_U* y; const T_B* B; const T_C* C;
  const float *A, *D, *bias, *initial; float* last;
  float* tiles;                // (tile, batch, channel, N): s of each tile, then the state before it
  float* sums;                 // (tile, batch, channel)
  const int* device_chunk;
  Strides su, sdelta, sz, sy; Projection sB, sC;
  int64 A_channel, A_state, D_channel, bias_channel, initial_batch, initial_channel, initial_state;
  int batch, channels, length, groups, chunk;
};

struct Place { int b, g, channel, channels, first, end; bool any; };  // first channel, how many; tokens

__device__ __forceinline__ Place locate(const Params& p) {
  Place w;
  const int tiles = (p.length - 1) / TILE + 1;
  const int asked = p.device_chunk ? *p.device_chunk : p.chunk;
  const int chunk = min(max((asked - 1) / TILE + 1, 1), tiles) * TILE;
  const int per_group = p.channels / p.groups, blocks = (per_group - 1) / CHANNELS + 1;
  unsigned i = blockIdx.x;
  const int block = i % blocks;
  i /= blocks;
  w.g = i % p.groups;
  i /= p.groups;
  w.b = i % p.batch;
  i /= p.batch;
  w.channel = w.g * per_group + block * CHANNELS;
  w.channels = min(CHANNELS, per_group - block * CHANNELS);
  w.any = (int64)i * chunk < p.length;
  w.first = i * chunk;
  w.end = min(w.first + chunk, p.length);
  return w;
}

// ---- elements of u, delta, z, y --------------------------------------------------------------------------------------

__device__ __forceinline__ void element(int e, int& c, int& t) {
  const int i = threadIdx.x;
  if (MAP == TOKENS_A_THREAD) { c = i / (T / EACH); t = i % (T / EACH) * EACH + e; }
  else if (MAP == CHANNELS_A_THREAD) { t = i / 2 % T; c = (i % 2 + i / (2 * T) * 2) * EACH + e; }  // 32 bytes a token
  else if (MAP == THREADS_ON_TOKENS) { t = (e * THREADS + i) % T; c = (e * THREADS + i) / T; }
  else { c = (e * THREADS + i) % CHANNELS; t = (e * THREADS + i) / CHANNELS; }
}

// Kept packed: half the registers for 16-bit types.
template <class X> struct Elements {
  static constexpr int SIZE = Vec16<X>::SIZE;
  Vec16<X> vectors[EACH / SIZE];

  __device__ __forceinline__ void load(const X* from) {
#pragma unroll
    for (int v = 0; v < EACH / SIZE; ++v) vectors[v] = Vec16<X>::load(from + v * SIZE);
  }
  __device__ __forceinline__ void pack(const X (&from)[EACH]) {  // from must be aligned to 16 bytes
#pragma unroll
    for (int v = 0; v < EACH / SIZE; ++v) vectors[v] = Vec16<X>::load_shared(from + v * SIZE);
  }
  __device__ __forceinline__ void unpack(float (&to)[EACH]) const {
#pragma unroll
    for (int v = 0; v < EACH / SIZE; ++v) {
      float part[SIZE];
      vectors[v].unpack(part);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) to[v * SIZE + i] = part[i];
    }
  }
};

// This thread's elements of one tensor, T tokens after T tokens. Vectors are contiguous, which spares registers.
template <class X, bool VECTOR> struct Walker {
  X* at;  // element 0
  __device__ __forceinline__ Walker(X* x, const Strides& st, const Place& w) {
    int c, t;
    element(0, c, t);
    at = x + w.b * st.batch + (w.channel + c) * st.channel + (w.first + t) * st.token;
  }
  __device__ __forceinline__ void advance(const Strides& st) { at += T * st.token; }
  __device__ __forceinline__ X* element_at(int e, const Strides& st) const {
    if (VECTOR) return at + e;
    int c0, t0, c, t;
    element(0, c0, t0);
    element(e, c, t);
    return at + (c - c0) * st.channel + (t - t0) * st.token;
  }
};

__device__ __forceinline__ bool whole(int t0, const Place& w) {  // are all elements of this thread there
  int c, t;
  element(0, c, t);
  if (MAP == TOKENS_A_THREAD) return c < w.channels && t0 + t + EACH <= w.end;
  return t0 + t < w.end && c + EACH <= w.channels;
}
__device__ __forceinline__ bool there(int e, int t0, const Place& w) {
  int c, t;
  element(e, c, t);
  return c < w.channels && t0 + t < w.end;
}

template <class X, bool VECTOR> __device__ __forceinline__ void load(Elements<X>& to, Walker<const X, VECTOR>& x, const Strides& st, int t0, bool all, const Place& w) {
  if (VECTOR && all) to.load(x.at);
  else {
    alignas(16) X elements[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) elements[e] = there(e, t0, w) ? *x.element_at(e, st) : from_float<X>(0.f);
    to.pack(elements);
  }
  x.advance(st);
}

__device__ __forceinline__ void store(Walker<T_U, VECTOR_Y>& y, const float (&out)[EACH], const Strides& st, int t0, const Place& w) {
  alignas(16) T_U elements[EACH];
#pragma unroll
  for (int v = 0; v < EACH; v += Vec16<T_U>::SIZE) {
    float part[Vec16<T_U>::SIZE];
#pragma unroll
    for (int i = 0; i < Vec16<T_U>::SIZE; ++i) part[i] = out[v + i];
    Vec16<T_U>::pack(part).store(elements + v);
  }
  if (VECTOR_Y && whole(t0, w)) {
#pragma unroll
    for (int v = 0; v < EACH; v += Vec16<T_U>::SIZE) Vec16<T_U>::load_shared(elements + v).store(y.at + v);
  } else {
#pragma unroll
    for (int e = 0; e < EACH; ++e) if (there(e, t0, w)) *y.element_at(e, st) = elements[e];
  }
  y.advance(st);
}

// ---- B and C ---------------------------------------------------------------------------------------------------------
// In shared memory as fp32 [token][state]: a lane reads 4 of its states of one token at a time. Within a row the groups of
// 4 states are permuted by the token, so that threads that write one state of many tokens hit different banks.
__device__ __forceinline__ int cell(int t, int n) { return t * ROW + (n ^ (t / 8 * 4 & (ROW - 1))); }

template <class X, int LAYOUT> struct Projected {
  static constexpr bool FAST = LAYOUT < STRIDED;
  static constexpr int PIECES = LAYOUT == VECTORS_OF_TOKENS ? N * (T / 8) : T * (N / 8);  // of 8 elements
  static constexpr int SHARE = THREADS / 2, EACH_THREAD = FAST ? (PIECES + SHARE - 1) / SHARE : 1;
  static constexpr bool AHEAD = FAST && EACH_THREAD <= 2;  // loaded a round ahead, into registers
  Elements<X> piece[AHEAD ? EACH_THREAD : 1];

  static __device__ __forceinline__ void start(int i, int& n, int& t) {
    if (LAYOUT == VECTORS_OF_TOKENS) { n = i / (T / 8); t = i % (T / 8) * 8; }
    else { t = i / (N / 8); n = i % (N / 8) * 8; }
  }
  static __device__ __forceinline__ void load_piece(Elements<X>& to, const X* x, const Projection& st, int i, int t0, int end) {
    int n, t;
    start(i, n, t);
    const X* from = x + n * st.state + (t0 + t) * st.token;
    if (LAYOUT == VECTORS_OF_TOKENS ? t0 + t + 8 <= end : t0 + t < end) to.load(from);
    else {
      alignas(16) X elements[8];
#pragma unroll
      for (int e = 0; e < 8; ++e)
        elements[e] = LAYOUT == VECTORS_OF_TOKENS && t0 + t + e < end ? from[e] : from_float<X>(0.f);
      to.pack(elements);
    }
  }
  static __device__ __forceinline__ void put_piece(float* s, const Elements<X>& from, int i) {
    int n, t;
    start(i, n, t);
    float f[8];
    from.unpack(f);
    if (LAYOUT == VECTORS_OF_TOKENS) {
      float* to = s + cell(t, n);  // all 8 tokens are permuted alike
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e * ROW] = f[e];
    } else {
      *(float4*)(s + cell(t, n)) = make_float4(f[0], f[1], f[2], f[3]);
      *(float4*)(s + cell(t, n + 4)) = make_float4(f[4], f[5], f[6], f[7]);
    }
  }

  // `id` counts the threads that work on this projection.
  __device__ __forceinline__ void load(const X* x, const Projection& st, int id, int t0, int end) {
    if constexpr (AHEAD)
#pragma unroll
      for (int k = 0; k < EACH_THREAD; ++k)
        if (PIECES % SHARE == 0 || k * SHARE + id < PIECES) load_piece(piece[k], x, st, k * SHARE + id, t0, end);
  }
  __device__ __forceinline__ void put(float* s, const X* x, const Projection& st, int id, int t0, int end) {
    if constexpr (AHEAD) {
#pragma unroll
      for (int k = 0; k < EACH_THREAD; ++k)
        if (PIECES % SHARE == 0 || k * SHARE + id < PIECES) put_piece(s, piece[k], k * SHARE + id);
    } else if constexpr (FAST) {
      for (int i = id; i < PIECES; i += SHARE) {
        load_piece(piece[0], x, st, i, t0, end);
        put_piece(s, piece[0], i);
      }
    } else if constexpr (LAYOUT == STRIDED) {
      for (int i = id; i < T * N; i += SHARE) {
        const bool by_state = st.state < st.token;
        const int n = by_state ? i % N : i / T, t = by_state ? i / N : i % T;
        s[cell(t, n)] = t0 + t < end ? to_float(x[n * st.state + (t0 + t) * st.token]) : 0.f;
      }
    }
  }
};

// An infinite rate must not meet a step of zero.
__device__ __forceinline__ float finite(float A) { return fminf(fmaxf(A, -3.4e38f), 3.4e38f); }

// The state after a tile. A growing state (A > 0) may have an infinite factor, which must not meet a zero state.
__device__ __forceinline__ float carry(float A, float sum, float H, float s) {
  return H == 0.f ? s : fmaf(ex2(__fmul_rn(A, sum)), H, s);
}

// ---- the passes ------------------------------------------------------------------------------------------------------

template <bool FIND_S, bool FIND_Y> __device__ __forceinline__ void pass(const Params& p) {
  extern __shared__ __align__(16) float memory[];
  float* next_float = memory;
  auto take = [&](int floats) { float* here = next_float; next_float += floats; return here; };
  float2* s_sw = (float2*)take(2 * SW_ALL);                // {step, step u} [channel][token]
  float* s_B = take(T * ROW);
  float* s_bias = take(CHANNELS);
  float* s_C = take(FIND_Y ? T * ROW : 0);
  float* s_D = take(FIND_Y ? CHANNELS : 0);
  float* s_y = take(FIND_Y ? LANES * SY_ALL : 0);          // each lane's share of <C, h> [lane][channel][token]
  const Place w = locate(p);
  if (!w.any) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int sub = lane / ABREAST, mine = warp * ABREAST + lane % ABREAST;  // this lane's states, its channel of the block
  const int64 rows = (int64)p.batch * p.channels, channel = w.channel + mine, row = w.b * (int64)p.channels + channel;
  auto exists = [&](int i) { return mine < w.channels && (ROW == N || sub * STATES + i < N); };

  Walker<const T_U, VECTOR_U> u(p.u, p.su, w);
  Walker<const T_DELTA, VECTOR_DELTA> delta(p.delta, p.sdelta, w);
  Walker<const T_Z, VECTOR_Z> z(p.z, p.sz, w);
  Walker<T_U, VECTOR_Y> y(p.y, p.sy, w);
  const T_B* B = p.B + (LAYOUT_B == CONSTANT ? 0 : w.b * p.sB.batch + w.g * p.sB.group);
  const T_C* C = p.C + (LAYOUT_C == CONSTANT ? 0 : w.b * p.sC.batch + w.g * p.sC.group);

  Elements<T_U> next_u;
  Elements<T_DELTA> next_delta;
  Elements<T_Z> next_z;
  Projected<T_B, LAYOUT_B> next_B;
  Projected<T_C, LAYOUT_C> next_C;
  const bool stages_B = threadIdx.x < THREADS / 2;
  const int id = threadIdx.x % (THREADS / 2);
  auto fetch = [&](int t0) {
    const bool all = whole(t0, w);
    load(next_u, u, p.su, t0, all, w);
    load(next_delta, delta, p.sdelta, t0, all, w);
    if (HAS_Z && FIND_Y) load(next_z, z, p.sz, t0, all, w);
    if (stages_B) next_B.load(B, p.sB, id, t0, w.end);
    else if (FIND_Y) next_C.load(C, p.sC, id, t0, w.end);
  };

  fetch(w.first);

  float A[STATES], h[STATES], s[STATES], H[STATES], sum = 0.f;
  float fixed_B[STATES], fixed_C[STATES];  // where constant
#pragma unroll
  for (int i = 0; i < STATES; ++i) {
    const int n = sub * STATES + i;
    A[i] = exists(i) ? finite(__fmul_rn(p.A[channel * p.A_channel + n * p.A_state], LOG2E)) : 0.f;
    if (LAYOUT_B == CONSTANT) fixed_B[i] = exists(i) ? to_float(B[channel * p.sB.token + n * p.sB.state]) : 0.f;
    if (LAYOUT_C == CONSTANT) fixed_C[i] = exists(i) ? to_float(C[channel * p.sC.token + n * p.sC.state]) : 0.f;
    const bool starts = FIND_S && FIND_Y && p.initial && exists(i);
    H[i] = starts ? p.initial[w.b * p.initial_batch + channel * p.initial_channel + n * p.initial_state] : 0.f;
    s[i] = 0.f;
    h[i] = H[i];
  }
  for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
    s_bias[c] = HAS_BIAS && c < w.channels ? p.bias[(w.channel + c) * p.bias_channel] : 0.f;
    if (FIND_Y) s_D[c] = HAS_D && c < w.channels ? p.D[(w.channel + c) * p.D_channel] : 0.f;
  }
  if (ROW > N)  // padded states read what nobody writes: it must be finite
    for (int i = threadIdx.x; i < T * ROW; i += THREADS) {
      s_B[i] = 0.f;
      if (FIND_Y) s_C[i] = 0.f;
    }
  __syncthreads();

#pragma unroll 1
  for (int t0 = w.first; t0 < w.end; t0 += T) {
    if (!FIND_S && t0 % TILE == 0) {  // the states before this tile, from scan_carry
      const float* from = p.tiles + (t0 / TILE * rows + row) * N + sub * STATES;
#pragma unroll
      for (int i = 0; i < STATES; ++i) h[i] = exists(i) ? from[i] : 0.f;
    }

    const Elements<T_U> u_now = next_u;
    const Elements<T_Z> z_now = next_z;
    {  // elementwise: steps and inputs
      float step[EACH], in[EACH];
      int c, t;
      next_delta.unpack(step);
      u_now.unpack(in);
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        element(e, c, t);
        if (HAS_BIAS) step[e] = __fadd_rn(step[e], s_bias[c]);
        if (SOFTPLUS) step[e] = softplus(step[e]);
      }
      if (t0 + T > w.end) {  // beyond the end nothing decays and nothing enters
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          element(e, c, t);
          if (t0 + t >= w.end) step[e] = 0.f;
        }
      }
#pragma unroll
      for (int e = 0; e < EACH; ++e) in[e] = __fmul_rn(step[e], in[e]);
      element(0, c, t);
      if (MAP == TOKENS_A_THREAD) {
#pragma unroll
        for (int e = 0; e < EACH; e += 2) *(float4*)(s_sw + sw_row(c) + t + e) = make_float4(step[e], in[e], step[e + 1], in[e + 1]);
      } else {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          element(e, c, t);
          s_sw[sw_row(c) + t] = make_float2(step[e], in[e]);
        }
      }
    }
    if (stages_B) next_B.put(s_B, B, p.sB, id, t0, w.end);
    else if (FIND_Y) next_C.put(s_C, C, p.sC, id, t0, w.end);
    __syncthreads();

    if (t0 + T < w.end) fetch(t0 + T);  // arrives while these tokens are walked

#pragma unroll (FIND_S && FIND_Y ? 1 : 2)
    for (int t = 0; t < T; t += 4) {
      const float4 first = *(const float4*)(s_sw + sw_row(mine) + t), second = *(const float4*)(s_sw + sw_row(mine) + t + 2);
      const float step[4] = {first.x, first.z, second.x, second.z}, in[4] = {first.y, first.w, second.y, second.w};
      float part[4];
#pragma unroll
      for (int q = 0; q < STATES; q += 4) {
        const float *B_4 = s_B + cell(t, sub * STATES + q), *C_4 = s_C + cell(t, sub * STATES + q);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float4 b, c;
          if (LAYOUT_B != CONSTANT) b = *(const float4*)(B_4 + j * ROW);
          if (FIND_Y && LAYOUT_C != CONSTANT) c = *(const float4*)(C_4 + j * ROW);
          if (FIND_S && q == 0) sum = __fadd_rn(sum, step[j]);
#pragma unroll
          for (int i = q; i < q + 4; ++i) {
            const float a = ex2(__fmul_rn(A[i], step[j]));
            float x = __fmul_rn(in[j], LAYOUT_B == CONSTANT ? fixed_B[i] : (&b.x)[i - q]);
            if (ROW > N && sub * STATES + i >= N) x = 0.f;  // also where the input is infinite
            if (FIND_S) s[i] = fmaf(a, s[i], x);
            if (FIND_Y) {
              const float C_i = LAYOUT_C == CONSTANT ? fixed_C[i] : (&c.x)[i - q];
              h[i] = fmaf(a, h[i], x);
              part[j] = i ? fmaf(h[i], C_i, part[j]) : __fmul_rn(h[i], C_i);
            }
          }
        }
      }
      if (FIND_Y) *(float4*)(s_y + sub * SY_ALL + y_row(mine) + t) = make_float4(part[0], part[1], part[2], part[3]);
    }

    if (FIND_S && ((t0 + T) % TILE == 0 || t0 + T >= w.end)) {  // the tile's end
      const int64 to = (FIND_Y ? 0 : t0 / TILE * rows) + row;
#pragma unroll
      for (int i = 0; i < STATES; ++i) {
        if (FIND_Y) H[i] = carry(A[i], sum, H[i], s[i]);
        if (FIND_Y && t0 + T >= p.length && exists(i)) p.last[to * N + sub * STATES + i] = H[i];
        if (!FIND_Y && exists(i)) p.tiles[to * N + sub * STATES + i] = s[i];
        s[i] = 0.f;
        h[i] = H[i];
      }
      if (!FIND_Y && sub == 0 && exists(0)) p.sums[to] = sum;
      sum = 0.f;
    }
    __syncthreads();

    if (FIND_Y) {  // elementwise: sum over lanes, skip and gate
      float out[EACH];
      int c, t;
      if (MAP == TOKENS_A_THREAD) {
        element(0, c, t);
#pragma unroll
        for (int e = 0; e < EACH; e += 4) {
          float4 v = *(const float4*)(s_y + y_row(c) + t + e);
#pragma unroll
          for (int l = 1; l < LANES; ++l) {
            const float4 more = *(const float4*)(s_y + l * SY_ALL + y_row(c) + t + e);
            v.x = __fadd_rn(v.x, more.x);
            v.y = __fadd_rn(v.y, more.y);
            v.z = __fadd_rn(v.z, more.z);
            v.w = __fadd_rn(v.w, more.w);
          }
          out[e] = v.x;
          out[e + 1] = v.y;
          out[e + 2] = v.z;
          out[e + 3] = v.w;
        }
      } else {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          element(e, c, t);
          out[e] = s_y[y_row(c) + t];
#pragma unroll
          for (int l = 1; l < LANES; ++l) out[e] = __fadd_rn(out[e], s_y[l * SY_ALL + y_row(c) + t]);
        }
      }
      float skip[EACH], gate[EACH];
      u_now.unpack(skip);
      z_now.unpack(gate);
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        element(e, c, t);
        if (HAS_D) out[e] = fmaf(s_D[c], skip[e], out[e]);
        if (HAS_Z) out[e] = __fmul_rn(out[e], __fmul_rn(gate[e], sigmoid(gate[e])));
      }
      store(y, out, p.sy, t0, w);
    }
  }
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void scan_both(const __grid_constant__ Params p) { pass<true, true>(p); }
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS + 2) void scan_states(const __grid_constant__ Params p) { pass<true, false>(p); }
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void scan_outputs(const __grid_constant__ Params p) { pass<false, true>(p); }

// One thread a (batch row, channel, state): s of every tile becomes the state before it.
extern "C" __global__ void scan_carry(const __grid_constant__ Params p) {
  const int64 rows = (int64)p.batch * p.channels, i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * N) return;
  const int64 row = i / N, b = row / p.channels, channel = row % p.channels;
  const int n = i % N, tiles = (p.length - 1) / TILE + 1;
  const float A = finite(__fmul_rn(p.A[channel * p.A_channel + n * p.A_state], LOG2E));
  float H = p.initial ? p.initial[b * p.initial_batch + channel * p.initial_channel + n * p.initial_state] : 0.f;
  constexpr int AHEAD = 16;
  float s[AHEAD], sum[AHEAD];
  for (int k = 0; k < tiles; k += AHEAD) {
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
      if (k + j < tiles) { s[j] = p.tiles[(k + j) * rows * N + i]; sum[j] = p.sums[(k + j) * rows + row]; }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
      if (k + j < tiles) {
        p.tiles[(k + j) * rows * N + i] = H;
        H = carry(A, sum[j], H, s[j]);
      }
  }
  p.last[i] = H;
}
