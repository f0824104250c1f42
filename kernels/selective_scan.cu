// Selective scan forward (Mamba's S6): y_t = <C_t, h_t> + D u_t, h_t = exp(step_t A) h_{t-1} + step_t u_t B_t, gated by silu(z).
//
// Time runs across the lanes. A warp owns 8 channels and one tile of 128 tokens; 8 lanes share two channels and each walks
// 16 tokens of both, one state after another:
//
//      lane 0    lane 1   lane 2        lane 7
//      |t 0..15 |t 16..31|t 32..47| ... |t 112..127|     walk from zero; decays a[16] and inputs x[16] stay in registers
//      (P, h)    (P, h)   (P, h)        (P, h)           scan of (decay product, local state) over the lanes, 3 shuffles
//   H ------------------------------------------> H'     carry of the tile: H' = P H + h, always one fused multiply-add
//      walk again from the true state, y += C h          so every exp is computed once
//
// The second walk of one state is fused with the first walk of the next: two independent chains, in the same registers.
//
// The carry enters only through H, so a tile does the same arithmetic whoever hands it H: the same warp, another warp
// of the block (shared memory), or another block (global memory, L2). That is why the chunk size never changes a bit.
// A carry travels as one 8-byte word {state, tag}; the tag says whose carry it is, so no fence or barrier is needed.
//
// A block of 4 warps works on `width` tiles of a chunk at a time (1, 2 or 4) and 32 / width channels, and walks the
// chunk in rounds. Blocks take (chunk, batch row, channel block) items in order of chunk, from a ticket counter when
// chunks depend on one another: the earliest unfinished item is then always held by a running block, so waiting for a
// carry cannot deadlock.
#include "common.cuh"

constexpr int TILE = 128, LANES = 8, STEPS = TILE / LANES;            // lanes a channel, tokens a lane
constexpr int PAIR = 2;                                               // neighbouring channels a lane, for overlap
constexpr int WARPS = 4, THREADS = WARPS * 32, COLUMNS = WARPS * 8;   // a column is one channel of one tile
constexpr int GROUPS = N > 16 ? (N + 7) / 8 : 2, GROUP = (N + GROUPS - 1) / GROUPS;  // states are staged a group at a time
constexpr int HALF = THREADS / 2;                                     // half of the block stages B, half C
enum { TOKENS, CHANNELS, STRIDED, CONSTANT };  // what is contiguous and 16-byte aligned; CONSTANT: B or C is (D, N)

struct Strides { int64 batch, channel, token; };           // of u, delta, z, y, in elements
struct Projection { int64 batch, group, state, token; };   // of B, C; where constant, `token` is the stride of the channel

struct Params {
  const T_U* u; const T_DELTA* delta; const T_Z* z; T_U* y; const T_B* B; const T_C* C;
  const float *A, *D, *bias, *initial; float* last; const int* device_chunk; void* scratch;
  Strides su, sdelta, sz, sy; Projection sB, sC;
  int64 A_channel, A_state, D_channel, bias_channel, initial_batch, initial_channel, initial_state;
  int batch, channels, length, groups, chunk, log_width;
};

struct Scratch { unsigned ticket, done, epoch, unused; };  // then uint64 carry[2][N][batch * channels]

// ---- small pieces ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint64 load_carry(const uint64* p) {
  uint64 v;
  asm volatile("ld.relaxed.gpu.b64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ void store_carry(uint64* p, float state, unsigned tag) {
  asm volatile("st.relaxed.gpu.b64 [%0], %1;" :: "l"(p), "l"((uint64)tag << 32 | __float_as_uint(state)));
}
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {  // 16 bytes, zeros after `bytes`
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::
               "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ int clamp(int x, int high) { return min(max(x, 0), high); }

// One step of the scan over the lanes of a channel, which are 4 apart; lanes with nobody to their left stay as they are.
template <int OFF> __device__ __forceinline__ void combine(float& P, float& h) {
  asm("{ .reg .pred left; .reg .f32 hb, Pb;\n"
      "shfl.sync.up.b32 hb|left, %1, %2, 0, -1;\n"
      "shfl.sync.up.b32 Pb, %0, %2, 0, -1;\n"
      "@left fma.rn.f32 %1, %0, hb, %1;\n"
      "@left mul.rn.f32 %0, %0, Pb; }" : "+f"(P), "+f"(h) : "n"(4 * OFF));
}

// ---- which piece of work ---------------------------------------------------------------------------------------------

struct Split {  // the same for every block
  int chunk, chunks, log_width, blocks;  // tokens, chunks a sequence, log2 tiles side by side, blocks a group
  unsigned items;
  __device__ int width() const { return 1 << log_width; }
  __device__ int span() const { return COLUMNS >> log_width; }  // channels a block
};

struct Place {  // one item: a chunk of some channels of one batch row; pointers are at its first token and channel
  unsigned item;
  int chunk, b, channel, channels, t0, t_end;
  const T_U* u; const T_DELTA* delta; const T_Z* z; T_U* y; const T_B* B; const T_C* C;
};

__device__ Split split(const Params& p) {
  Split s;
  const int tiles = (p.length + TILE - 1) / TILE;
  const int asked = p.device_chunk ? *p.device_chunk : p.chunk;
  const int per_chunk = min(max((asked - 1) / TILE + 1, 1), tiles);
  s.chunk = per_chunk * TILE;
  s.chunks = (tiles - 1) / per_chunk + 1;
  s.log_width = min(p.log_width, per_chunk >= 4 ? 2 : per_chunk >= 2 ? 1 : 0);
  s.blocks = (p.channels / p.groups - 1) / s.span() + 1;
  s.items = (unsigned)s.chunks * p.batch * p.groups * s.blocks;
  return s;
}

template <class T> __device__ __forceinline__ T* at(T* x, const Strides& st, const Place& w) {
  return x + w.b * st.batch + w.channel * st.channel + w.t0 * st.token;
}

__device__ void locate(Place& w, const Params& p, const Split& s, unsigned item) {
  w.item = item;
  if (item >= s.items) return;
  const int per_group = p.channels / p.groups;
  const int block = item % s.blocks;
  item /= s.blocks;
  const int g = item % p.groups;
  item /= p.groups;
  w.b = item % p.batch;
  w.chunk = item / p.batch;
  w.channel = g * per_group + block * s.span();
  w.channels = min(s.span(), per_group - block * s.span());
  w.t0 = w.chunk * s.chunk;
  w.t_end = min(w.t0 + s.chunk, p.length);
  w.u = at(p.u, p.su, w);
  w.delta = at(p.delta, p.sdelta, w);
  w.z = at(p.z, p.sz, w);
  w.y = at(p.y, p.sy, w);
  w.B = p.B + w.b * p.sB.batch + g * p.sB.group + (LAYOUT_B == CONSTANT ? w.channel : w.t0) * p.sB.token;
  w.C = p.C + w.b * p.sC.batch + g * p.sC.group + (LAYOUT_C == CONSTANT ? w.channel : w.t0) * p.sC.token;
}

// ---- tiles of u, delta, z and y --------------------------------------------------------------------------------------
// In shared memory as [column][token] where tokens are contiguous, else as [tile][token][channel]; 16 bytes apart after
// every row or every 16 tokens, so that lanes hit different banks.

struct Round { int first, tokens, channels, log_span; };  // of the item: first token, how many follow; real channels

template <class T, int LAYOUT> struct Tile {
  static constexpr int VECTOR = 16 / sizeof(T), ROW = TILE + VECTOR, BYTES = COLUMNS * ROW * sizeof(T);
  static constexpr int EACH = COLUMNS * TILE / VECTOR / THREADS;  // vectors a thread copies

  static __device__ __forceinline__ int cell(int log_span, int token) {
    return (token << log_span) + token / STEPS * VECTOR;
  }
  // The k-th vector of this thread: token and channel within the round, and its place in shared memory.
  static __device__ __forceinline__ void vector(int k, int log_span, int& token, int& c, int& place) {
    const unsigned i = k * THREADS + threadIdx.x;
    if (LAYOUT == TOKENS) {
      const unsigned column = i / (TILE / VECTOR), v = i % (TILE / VECTOR) * VECTOR;
      c = column & ((1 << log_span) - 1);
      token = (column >> log_span) * TILE + v;
      place = column * ROW + v;
    } else {
      c = i * VECTOR & ((1 << log_span) - 1);
      token = i * VECTOR >> log_span;
      place = cell(log_span, token) + c;
    }
  }
  // The k-th element of this thread where nothing is contiguous: neighbours in memory go to neighbouring threads.
  static __device__ __forceinline__ void element(int i, const Strides& st, int log_span, int& token, int& c) {
    const int tokens = TILE * COLUMNS >> log_span;
    const bool by_channel = st.channel < st.token;
    c = by_channel ? i & ((1 << log_span) - 1) : i / tokens;
    token = by_channel ? i >> log_span : i % tokens;
  }
  // From the round's first token and the block's first channel. Where something is contiguous this fits 31 bits: the
  // host has checked it.
  static __device__ __forceinline__ auto offset(const Strides& st, int token, int c) {
    if constexpr (LAYOUT == TOKENS) return c * (int)st.channel + token;
    else if constexpr (LAYOUT == CHANNELS) return token * (int)st.token + c;
    else return c * st.channel + token * st.token;
  }
  static __device__ __forceinline__ int valid(const Round& r, int token, int c) {  // elements of a vector that exist
    if (LAYOUT == TOKENS) return c < r.channels ? clamp(r.tokens - token, VECTOR) : 0;
    return token < r.tokens ? clamp(r.channels - c, VECTOR) : 0;
  }
  static __device__ __forceinline__ bool whole(const Round& r) {
    return r.channels == 1 << r.log_span && r.tokens >= TILE * COLUMNS >> r.log_span;
  }

  static __device__ __forceinline__ void fetch(T* shared, const T* item, const Strides& st, const Round& r) {
    const T* x = item + r.first * st.token;
    int token, c, place;
    if constexpr (LAYOUT == STRIDED) {
      for (int i = threadIdx.x; i < COLUMNS * TILE; i += THREADS) {
        element(i, st, r.log_span, token, c);
        shared[cell(r.log_span, token) + c] = token < r.tokens && c < r.channels ? x[offset(st, token, c)] : from_float<T>(0.f);
      }
    } else if (whole(r)) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        vector(k, r.log_span, token, c, place);
        copy_async(shared + place, x + offset(st, token, c), 16);
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < EACH; ++k) {
        vector(k, r.log_span, token, c, place);
        const int n = valid(r, token, c);
        copy_async(shared + place, n ? x + offset(st, token, c) : x, n * (int)sizeof(T));
      }
    }
  }

  // The 16 tokens of two neighbouring columns that belong to one lane.
  static __device__ __forceinline__ void read(float (&to)[PAIR][STEPS], const T* shared, int log_span, int column, int sub) {
    if constexpr (LAYOUT == TOKENS) {
#pragma unroll
      for (int r = 0; r < PAIR; ++r)
#pragma unroll
        for (int v = 0; v < STEPS; v += VECTOR) {
          float f[VECTOR];
          Vec16<T>::load_shared(shared + (column + r) * ROW + sub * STEPS + v).unpack(f);
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) to[r][v + i] = f[i];
        }
    } else {
      const T* from = shared + cell(log_span, (column >> log_span) * TILE + sub * STEPS) + (column & ((1 << log_span) - 1));
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        struct alignas(2 * sizeof(T)) Both { T x[PAIR]; };
        const Both both = *(const Both*)(from + (i << log_span));
        to[0][i] = to_float(both.x[0]);
        to[1][i] = to_float(both.x[1]);
      }
    }
  }

  static __device__ __forceinline__ void write(T* item, T* shared, const float (&out)[PAIR][STEPS], const Strides& st, const Round& r, int column, int sub) {
    T* y = item + r.first * st.token;
    if constexpr (LAYOUT == TOKENS) {
#pragma unroll
      for (int k = 0; k < PAIR; ++k)
#pragma unroll
        for (int v = 0; v < STEPS; v += VECTOR) {
          float f[VECTOR];
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) f[i] = out[k][v + i];
          Vec16<T>::pack(f).store(shared + (column + k) * ROW + sub * STEPS + v);
        }
    } else {
      T* to = shared + cell(r.log_span, (column >> r.log_span) * TILE + sub * STEPS) + (column & ((1 << r.log_span) - 1));
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        struct alignas(2 * sizeof(T)) Both { T x[PAIR]; };
        *(Both*)(to + (i << r.log_span)) = Both{from_float<T>(out[0][i]), from_float<T>(out[1][i])};
      }
    }
    __syncthreads();
    int token, c, place;
    if constexpr (LAYOUT == STRIDED) {
      for (int i = threadIdx.x; i < COLUMNS * TILE; i += THREADS) {
        element(i, st, r.log_span, token, c);
        if (token < r.tokens && c < r.channels) y[offset(st, token, c)] = shared[cell(r.log_span, token) + c];
      }
    } else if (whole(r)) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        vector(k, r.log_span, token, c, place);
        *(uint4*)(y + offset(st, token, c)) = *(const uint4*)(shared + place);
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < EACH; ++k) {
        vector(k, r.log_span, token, c, place);
        const int n = valid(r, token, c);
        T* to = y + offset(st, token, c);
        if (n == VECTOR) *(uint4*)to = *(const uint4*)(shared + place);
        else for (int e = 0; e < n; ++e) to[e] = shared[place + e];
      }
    }
  }
};

// ---- a group of states of B or C -------------------------------------------------------------------------------------
// Raw: [tile][state][token] where tokens are contiguous, [tile][token][8 states] where states are. Staged as fp32, once
// for all channels of the block, in the order in which lanes read: [tile][state][B, C][quad of tokens][lane][4 tokens].
// The 4 channels of a warp read the same 128 bytes at a time. `id` counts the threads that stage this projection.

constexpr int STATE = 2 * TILE;  // floats of one state of one tile: B, then C

template <class T, int LAYOUT> struct Staging {
  static constexpr int VECTOR = 16 / sizeof(T), RAW_TILE = TILE * 8;
  static constexpr int RAW_BYTES = LAYOUT < STRIDED ? RAW_TILE * sizeof(T) : 0;
  static constexpr bool BY_TOKEN = LAYOUT == TOKENS;

  static __device__ __forceinline__ void fetch(T* raw, const T* item, const Projection& st, const Round& r, int width, int group, unsigned id) {
    if constexpr (LAYOUT < STRIDED) {
      constexpr int ACROSS = (BY_TOKEN ? TILE : 8) / VECTOR, DOWN = BY_TOKEN ? GROUP : TILE;
      const T* x = item + r.first * st.token + group * GROUP * st.state;
      const int further = BY_TOKEN ? TILE : TILE * (int)st.token;
      const bool whole = r.tokens >= width * TILE && (group + 1) * GROUP <= N && (BY_TOKEN || GROUP == 8);
#pragma unroll
      for (int k = 0; k < (DOWN * ACROSS + HALF - 1) / HALF; ++k) {
        const unsigned i = k * HALF + id;
        const int v = i % ACROSS * VECTOR, row = i / ACROSS;
        if (DOWN * ACROSS % HALF && row >= DOWN) break;
        const T* from = x + (BY_TOKEN ? row * (int)st.state + v : row * (int)st.token + v);
        T* to = raw + row * (BY_TOKEN ? TILE : 8) + v;
        if (whole) {
#pragma unroll 1
          for (int left = width; left; --left, from += further, to += RAW_TILE) copy_async(to, from, 16);
        } else {
          const int n = group * GROUP + (BY_TOKEN ? row : v), token = BY_TOKEN ? v : row;
#pragma unroll 1
          for (int tile = 0; tile < width; ++tile, from += further, to += RAW_TILE) {
            const int left = r.tokens - tile * TILE - token;
            const int valid = BY_TOKEN ? (n < N ? clamp(left, VECTOR) : 0) : (left > 0 ? clamp(N - n, VECTOR) : 0);
            copy_async(to, valid ? from : item, valid * (int)sizeof(T));
          }
        }
      }
    }
  }

  static __device__ __forceinline__ int cell(int n, int token) {
    return n * STATE + (token % STEPS / 4 * LANES + token / STEPS) * 4 + token % 4;
  }

  static __device__ __forceinline__ void load8(float (&f)[8], const T* from) {
#pragma unroll
    for (int v = 0; v < 8 / VECTOR; ++v) {
      float part[VECTOR];
      Vec16<T>::load_shared(from + v * VECTOR).unpack(part);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) f[v * VECTOR + i] = part[i];
    }
  }

  static __device__ __forceinline__ void stage(float* to, const T* raw, const T* x, const Projection& st, const Round& r, int width, int group, unsigned id) {
    if constexpr (LAYOUT == TOKENS) {
#pragma unroll
      for (int k = 0; k < TILE / HALF; ++k) {
        const int t = id % (TILE / 8) * 8, n = k * (HALF / (TILE / 8)) + id / (TILE / 8);
        if (GROUP % (HALF / (TILE / 8)) && n >= GROUP) break;
        const T* from = raw + n * TILE + t;
        float* at = to + cell(n, t);
#pragma unroll 1
        for (int left = width; left; --left, from += RAW_TILE, at += GROUP * STATE) {
          float f[8];
          load8(f, from);
          *(float4*)at = make_float4(f[0], f[1], f[2], f[3]);
          *(float4*)(at + LANES * 4) = make_float4(f[4], f[5], f[6], f[7]);
        }
      }
    } else if constexpr (LAYOUT == CHANNELS) {
#pragma unroll
      for (int k = 0; k < TILE / HALF; ++k) {
        const unsigned i = k * HALF + id;
        const int t = i % 32 / 4 * STEPS + i / 32 * 4 + i % 4;  // a warp writes to 32 different banks
        const T* from = raw + t * 8;
        float* at = to + cell(0, t);
#pragma unroll 1
        for (int left = width; left; --left, from += RAW_TILE, at += GROUP * STATE) {
          float f[8];
          load8(f, from);
#pragma unroll
          for (int n = 0; n < GROUP; ++n) at[n * STATE] = f[n];
        }
      }
    } else if constexpr (LAYOUT == STRIDED) {
      for (int i = id; i < width * GROUP * TILE; i += HALF) {
        const int n = i / TILE % GROUP, k = i / TILE / GROUP, token = k * TILE + i % TILE;
        float value = 0.f;
        if (group * GROUP + n < N && token < r.tokens) value = to_float(x[(group * GROUP + n) * st.state + (r.first + token) * st.token]);
        to[k * GROUP * STATE + cell(n, token % TILE)] = value;
      }
    }
  }
};

// ---- the kernel ------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS, 2) void selective_scan(const __grid_constant__ Params p) {
  using U = Tile<T_U, LAYOUT_U>; using Delta = Tile<T_DELTA, LAYOUT_DELTA>; using Z = Tile<T_Z, LAYOUT_Z>; using Y = Tile<T_U, LAYOUT_Y>;
  using StageB = Staging<T_B, LAYOUT_B>; using StageC = Staging<T_C, LAYOUT_C>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Place s_place[2];
  __shared__ uint64 s_idle;  // the carry into channels that do not exist
  const int lane = threadIdx.x % 32, sub = lane / 4, column = threadIdx.x / 32 * 8 + lane % 4 * PAIR;
  const Split s = split(p);
  const int width = s.width(), log_span = 5 - s.log_width;
  const int tile = column >> log_span, channel = column & ((1 << log_span) - 1);  // this lane's first, within the block

  unsigned char* next_byte = memory;
  auto take = [&](int bytes) { unsigned char* here = next_byte; next_byte += bytes; return here; };
  const int room = 1 << p.log_width;
  T_U* s_u = (T_U*)take(U::BYTES);
  T_DELTA* s_delta = (T_DELTA*)take(Delta::BYTES);
  T_Z* s_z = (T_Z*)take(HAS_Z ? Z::BYTES : 0);
  T_U* s_y = (T_U*)take(Y::BYTES);
  T_B* raw_B = (T_B*)take(room * StageB::RAW_BYTES);
  T_C* raw_C = (T_C*)take(room * StageC::RAW_BYTES);
  float* s_BC = (float*)take(room * GROUP * STATE * 4);
  float* s_A = (float*)take(N * COLUMNS * 4);  // and two more where B or C is constant
  float* constant_B = (float*)take(LAYOUT_B == CONSTANT ? N * COLUMNS * 4 : 0);
  float* constant_C = (float*)take(LAYOUT_C == CONSTANT ? N * COLUMNS * 4 : 0);
  float* s_D = (float*)take(COLUMNS * 4);
  float* s_bias = (float*)take(COLUMNS * 4);
  uint64* s_carry = (uint64*)take(N * COLUMNS * 8);  // [state][column]: the carry out of that column's tile

  Scratch* scratch = (Scratch*)p.scratch;
  const bool chained = s.chunks > 1;
  const unsigned epoch = chained ? *(volatile unsigned*)&scratch->epoch : 0;
  unsigned sequence = 1;  // tag of the carry into the first tile of this round; never 0, never used twice in a block
  for (int i = threadIdx.x; i < N * COLUMNS; i += THREADS) s_carry[i] = 0;

  auto round_of = [&](const Place& w, int t) { return Round{t - w.t0, w.t_end - t, w.channels, log_span}; };
  auto fetch_tokens = [&](const Place& w, const Round& r) {
    U::fetch(s_u, w.u, p.su, r);
    Delta::fetch(s_delta, w.delta, p.sdelta, r);
  };
  auto fetch_states = [&](const Place& w, const Round& r, int group) {
    if (threadIdx.x < HALF) StageB::fetch(raw_B, w.B, p.sB, r, width, group, threadIdx.x);
    else StageC::fetch(raw_C, w.C, p.sC, r, width, group, threadIdx.x - HALF);
  };

  if (threadIdx.x == 0) locate(s_place[0], p, s, chained ? atomicAdd(&scratch->ticket, 1u) : blockIdx.x);
  __syncthreads();
  int current = 0, t = s_place[0].t0;
  if (s_place[0].item < s.items) {
    const Round r = round_of(s_place[0], t);
    fetch_tokens(s_place[0], r);
    fetch_states(s_place[0], r, 0);
  }

  while (s_place[current].item < s.items) {
    const Place& w = s_place[current];
    const Round r = round_of(w, t);
    const bool first_round = r.first == 0, last_round = r.tokens <= width * TILE;
    const bool busy = (channel & ~7) < r.channels && tile * TILE < r.tokens;  // has this warp any channel and token
    const bool exists = channel < r.channels, both = channel + 1 < r.channels;
    float step[PAIR][STEPS], wu[PAIR][STEPS], out[PAIR][STEPS], total[PAIR];
    unsigned ticket;

#pragma unroll 1
    for (int group = 0; group < GROUPS; ++group) {
      copy_wait();
      __syncthreads();
      if (threadIdx.x < HALF) StageB::stage(s_BC, raw_B, w.B, p.sB, r, width, group, threadIdx.x);
      else StageC::stage(s_BC + TILE, raw_C, w.C, p.sC, r, width, group, threadIdx.x - HALF);
      if (group == 0) {
        if (first_round) {
          if (threadIdx.x == 0) {
            ticket = chained ? atomicAdd(&scratch->ticket, 1u) : w.item + gridDim.x;
            s_idle = (uint64)(epoch + w.chunk) << 32;
          }
          if (threadIdx.x < COLUMNS) {
            const int c = threadIdx.x & ((1 << log_span) - 1);
            s_D[threadIdx.x] = HAS_D && c < w.channels ? p.D[(w.channel + c) * p.D_channel] : 0.f;
            s_bias[threadIdx.x] = HAS_BIAS && c < w.channels ? p.bias[(w.channel + c) * p.bias_channel] : 0.f;
          }
          for (int i = threadIdx.x; i < N * COLUMNS; i += THREADS) {
            const int n = i / COLUMNS, c = i % COLUMNS & ((1 << log_span) - 1);
            const int64 d = w.channel + c;
            const bool there = c < w.channels;
            s_A[i] = there ? __fmul_rn(p.A[d * p.A_channel + n * p.A_state], LOG2E) : 0.f;
            if (LAYOUT_B == CONSTANT) constant_B[i] = there ? to_float(w.B[c * p.sB.token + n * p.sB.state]) : 0.f;
            if (LAYOUT_C == CONSTANT) constant_C[i] = there ? to_float(w.C[c * p.sC.token + n * p.sC.state]) : 0.f;
            if (w.chunk == 0 && i % COLUMNS >> log_span == width - 1) {
              const float h = there && p.initial ? p.initial[w.b * p.initial_batch + d * p.initial_channel + n * p.initial_state] : 0.f;
              s_carry[i] = (uint64)sequence << 32 | __float_as_uint(h);
            }
          }
          if (HAS_D || HAS_BIAS) __syncthreads();
        }
        U::read(out, s_u, log_span, column, sub);
        Delta::read(step, s_delta, log_span, column, sub);
#pragma unroll
        for (int k = 0; k < PAIR; ++k) {
          const float bias = s_bias[column + k], D = s_D[column + k];
#pragma unroll
          for (int i = 0; i < STEPS; ++i) {
            if (HAS_BIAS) step[k][i] = __fadd_rn(step[k][i], bias);
            if (SOFTPLUS) step[k][i] = softplus(step[k][i]);
          }
          const int left = (k ? both : exists) ? r.tokens - tile * TILE - sub * STEPS : 0;
          if (left < STEPS) {  // beyond the end nothing decays and nothing enters
#pragma unroll
            for (int i = 0; i < STEPS; ++i) if (i >= left) step[k][i] = out[k][i] = 0.f;
          }
          total[k] = 0.f;
#pragma unroll
          for (int i = 0; i < STEPS; ++i) {
            total[k] = __fadd_rn(total[k], step[k][i]);
            wu[k][i] = __fmul_rn(step[k][i], out[k][i]);
            out[k][i] = HAS_D ? __fmul_rn(D, out[k][i]) : 0.f;
          }
        }
      }
      __syncthreads();

      // What comes next arrives while this group is computed.
      if (HAS_Z && group == 0) Z::fetch(s_z, w.z, p.sz, r);
      if (group + 1 < GROUPS) fetch_states(w, r, group + 1);
      else {
        const Place& next = s_place[last_round ? current ^ 1 : current];
        if (next.item < s.items) {
          const Round following = round_of(next, last_round ? next.t0 : t + width * TILE);
          fetch_tokens(next, following);
          fetch_states(next, following, 0);
        }
      }

      const int count = N % GROUP ? min(GROUP, N - group * GROUP) : GROUP;
      if (busy && count > 0) {
        const uint64* from = s_carry + ((tile == 0 ? width - 1 : tile - 1) << log_span) + channel;
        uint64* to = s_carry + column;
        int64 from_stride = COLUMNS, to_stride = COLUMNS;
        int from_second = 1;                               // where the second channel's carry lies from the first's
        bool gives = sub == LANES - 1, gives_second = gives;
        unsigned want = sequence + tile, give = want + 1;
        if (chained) {
          const int64 rows = (int64)p.batch * p.channels;
          uint64* chain = (uint64*)(scratch + 1) + (int64)w.b * p.channels + w.channel + channel;
          if (w.chunk > 0 && first_round && tile == 0) {
            from = exists ? chain + ((w.chunk - 1) & 1) * N * rows : &s_idle;
            from_stride = exists ? rows : 0;
            from_second = both;
            want = epoch + w.chunk;
          }
          if (w.chunk + 1 < s.chunks && (tile + 1) * TILE >= r.tokens) {
            to = chain + (w.chunk & 1) * N * rows;
            to_stride = rows;
            gives &= exists;
            gives_second &= both;
            give = epoch + w.chunk + 1;
          }
        }
        from += group * GROUP * from_stride;
        to += group * GROUP * to_stride;
        const float* A = s_A + group * GROUP * COLUMNS + column;
        const float4* BC = (const float4*)(s_BC + tile * GROUP * STATE) + sub;
        const float* fixed_B = constant_B + group * GROUP * COLUMNS + column;
        const float* fixed_C = constant_C + group * GROUP * COLUMNS + column;

        float a[PAIR][STEPS], x[PAIR][STEPS], P[PAIR], h[PAIR];
        struct Carry { uint64 first, second; };
        auto load = [&] { return Carry{load_carry(from), load_carry(from + from_second)}; };
        // First walk over 4 tokens of state n: decays, inputs, local state.
        auto enter = [&](int n, int j, float (&h)[PAIR]) {
          float4 B;
          if (LAYOUT_B != CONSTANT) B = BC[n * (STATE / 4) + j * LANES];
#pragma unroll
          for (int i = 4 * j; i < 4 * j + 4; ++i)
#pragma unroll
            for (int k = 0; k < PAIR; ++k) {
              const float b = LAYOUT_B == CONSTANT ? fixed_B[n * COLUMNS + k] : (&B.x)[i - 4 * j];
              a[k][i] = ex2(__fmul_rn(A[n * COLUMNS + k], step[k][i]));
              x[k][i] = __fmul_rn(wu[k][i], b);
              h[k] = i ? fmaf(a[k][i], h[k], x[k][i]) : x[k][i];
            }
        };
        // Second walk over 4 tokens of state n, from the true state.
        auto leave = [&](int n, int j) {
          float4 C;
          if (LAYOUT_C != CONSTANT) C = BC[n * (STATE / 4) + TILE / 4 + j * LANES];
#pragma unroll
          for (int i = 4 * j; i < 4 * j + 4; ++i)
#pragma unroll
            for (int k = 0; k < PAIR; ++k) {
              const float c = LAYOUT_C == CONSTANT ? fixed_C[n * COLUMNS + k] : (&C.x)[i - 4 * j];
              h[k] = fmaf(a[k][i], h[k], x[k][i]);
              out[k][i] = fmaf(h[k], c, out[k][i]);
            }
        };
        // From the local state after the lane's tokens to the true one before them; hands the tile's carry on.
        auto carry_over = [&](Carry carry) {
#pragma unroll
          for (int k = 0; k < PAIR; ++k) combine<1>(P[k], h[k]);
#pragma unroll
          for (int k = 0; k < PAIR; ++k) combine<2>(P[k], h[k]);
#pragma unroll
          for (int k = 0; k < PAIR; ++k) combine<4>(P[k], h[k]);
          while (!__all_sync(~0u, (unsigned)(carry.first >> 32) == want && (unsigned)(carry.second >> 32) == want)) carry = load();
          const float H[PAIR] = {__uint_as_float((unsigned)carry.first), __uint_as_float((unsigned)carry.second)};
          const float after[PAIR] = {fmaf(P[0], H[0], h[0]), fmaf(P[1], H[1], h[1])};
          if (gives) store_carry(to, after[0], give);
          if (gives_second) store_carry(to + 1, after[1], give);
#pragma unroll
          for (int k = 0; k < PAIR; ++k) {
            h[k] = __shfl_up_sync(~0u, after[k], 4);
            if (sub == 0) h[k] = H[k];
          }
          from += from_stride;
          to += to_stride;
        };
        auto decay = [&](int n) {
          P[0] = ex2(__fmul_rn(A[n * COLUMNS], total[0]));
          P[1] = ex2(__fmul_rn(A[n * COLUMNS + 1], total[1]));
        };

#pragma unroll 1
        for (int n = 0; n < count; ++n) {
          const Carry carry = load();
          decay(n);
#pragma unroll
          for (int j = 0; j < STEPS / 4; ++j) enter(n, j, h);
          carry_over(carry);
#pragma unroll
          for (int j = 0; j < STEPS / 4; ++j) leave(n, j);
        }
      }
      if (first_round && group == 0 && threadIdx.x == 0) locate(s_place[current ^ 1], p, s, ticket);
    }

    if (HAS_Z) {
      float z[PAIR][STEPS];
      Z::read(z, s_z, log_span, column, sub);
#pragma unroll
      for (int k = 0; k < PAIR; ++k)
#pragma unroll
        for (int i = 0; i < STEPS; ++i) out[k][i] = __fmul_rn(out[k][i], __fmul_rn(z[k][i], sigmoid(z[k][i])));
    }
    Y::write(w.y, s_y, out, p.sy, r, column, sub);

    if (last_round && w.chunk + 1 == s.chunks) {  // the carry out of the last tile is the last state
      const int final = (r.tokens - 1) / TILE;    // Y::write has synchronised the block
      for (int i = threadIdx.x; i < N * r.channels; i += THREADS) {
        const int n = i % N, c = i / N;
        const uint64 carry = s_carry[n * COLUMNS + (final << log_span) + c];
        p.last[((int64)w.b * p.channels + w.channel + c) * N + n] = __uint_as_float((unsigned)carry);
      }
    }
    sequence += width + last_round;  // after a chunk's end the next item starts from a carry of its own
    t += width * TILE;
    if (last_round) {
      current ^= 1;
      t = s_place[current].t0;
    }
  }

  if (chained && threadIdx.x == 0) {  // the last block to leave readies the scratch for the next launch
    __threadfence();
    if (atomicAdd(&scratch->done, 1u) == gridDim.x - 1) {
      scratch->ticket = scratch->done = 0;
      scratch->epoch = epoch + s.chunks + 1;
    }
  }
}
