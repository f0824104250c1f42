// Selective scan forward (Mamba's S6): h_t = exp(step_t A) h_{t-1} + step_t u_t B_t,  y_t = (<C_t, h_t> + D u_t) silu(z_t).
//
// States run across the lanes. LANES lanes share a channel, each holds STATES of its states in registers and walks the
// tokens in order; all channels of a warp read the same B_t and C_t. The block first turns T tokens of its inputs into fp32
// in shared memory (elementwise, by all threads), then walks them, then gates and stores y.
//
// <C_t, h_t> is the sum of shares, each a chain over the states of one lane. Where that makes too few blocks, one pass has
// two lanes a share, with the same bits: see scan_in_pairs.cuh.
//
// The tile of 128 tokens is the unit of arithmetic. Over a tile a lane computes the local state s, from zero, and the sum
// of the steps; the carry is H' = exp(A sum) H + s, one fused multiply-add, and h starts each tile from H. A chunk is a
// whole number of tiles that one block walks. With one chunk a sequence, `scan_both` does it all in one pass, and with two
// where two blocks share it (scan_in_parts.cuh). With more, chunks run in parallel: `scan_states` finds s and the sum of
// every tile, `scan_carry` links the tiles, and `scan_outputs` walks again from the true states. Every tile does the same
// arithmetic in all of them, so the chunk size, and whether a sequence is split at all, never changes a bit. It changes
// the time: splitting computes every exp twice.
#include "scan_params.cuh"

constexpr int THREADS = WALKERS * 32;                              // those of a block that walk
constexpr int SHARES = N <= 4 ? 1 : N <= 8 ? 2 : N <= 16 ? 4 : 8;  // of <C, h>, each a chain over its states
constexpr int CHAIN = ((N + SHARES - 1) / SHARES + 3) / 4 * 4;     // states of a share, padded
constexpr int SHARERS = LANES / SHARES, STATES = CHAIN / SHARERS;  // lanes a share; states of a lane
constexpr int ROW = SHARES * CHAIN, QUADS = ROW / 4;               // states of a channel, padded; in fours
constexpr bool IN_PAIRS = SHARERS == 2;
static_assert(SHARERS == 1 || IN_PAIRS && N == 2 * LANES);
static_assert(PARTS == 1 || IN_PAIRS && PARTS == 2);                // blocks that share a sequence: see scan_in_parts.cuh
constexpr int ABREAST = 32 / LANES, CHANNELS = WALKERS * ABREAST;  // channels side by side in a warp; a block
constexpr int T = TOKENS, EACH = 8;                                // tokens at a time; elements a thread
constexpr int FEEDERS = CHANNELS * T / EACH;                       // threads that do what is element by element:
static_assert(IN_PAIRS || FEEDERS == THREADS);                     // in pairs others than those that walk

// A multiprocessor's four schedulers get the warps of a block in turn. Where some would have more walking warps than the
// others, they have no feeding warps but idle ones in their place, as far as registers allow.
constexpr int SCHEDULERS = 4, BUSY = IN_PAIRS && WALKERS < 8 ? WALKERS % SCHEDULERS : 0;  // the first ones
constexpr int BLOCK = IN_PAIRS ? THREADS - 32 * BUSY + FEEDERS * SCHEDULERS / (SCHEDULERS - BUSY) : THREADS;
static_assert(BUSY == 0 || FEEDERS / 32 % (SCHEDULERS - BUSY) == 0);
constexpr int BLOCKS = IN_PAIRS ? 1 : N <= 16 ? sizeof(T_U) > 2 ? 3 : 4 : N <= 64 ? 2 : 1;  // a multiprocessor

// Rows of channels in shared memory, padded so that lanes hit different banks, also where neighbours write to two shares.
constexpr int PAD = CHANNELS > 16 ? 4 : 8;  // behind 8 channels
constexpr int ROWS = (CHANNELS * (T + 4) + CHANNELS / 8 * PAD + 31) / 32 * 32 + 16;
__device__ __forceinline__ int row_of(int c) { return c * (T + 4) + c / 8 * PAD; }

constexpr int PROJECTION = T * ROW + T / 2 * 4;  // of B or C

template <bool FIND_Y> struct Memory {
  float B[PROJECTION], C[FIND_Y ? PROJECTION : 4];
  float step[ROWS], in[ROWS];  // [channel][token]; the walks know that `in` follows `step`, and C follows B
  float y[FIND_Y ? SHARES * ROWS : 4];  // shares of <C, h> [share][channel][token]
};

struct Constants {
  float bias[CHANNELS], D[CHANNELS];
  float nothing[IN_PAIRS ? T : 4];  // -0, as x + -0 is x: what comes before a share's first lane
};

extern __shared__ __align__(16) float shared[];  // Constants, then Memory
__device__ __forceinline__ Constants* constants() { return (Constants*)shared; }
template <bool FIND_Y> __device__ __forceinline__ Memory<FIND_Y>* memory_of_block() { return (Memory<FIND_Y>*)(constants() + 1); }

// How the elements of a (CHANNELS, T) piece of u, delta, z and y lie among the threads: 8 neighbouring tokens a thread, two
// runs of 4 neighbouring channels, or neighbouring threads on neighbouring tokens or channels.
enum { TOKENS_A_THREAD, CHANNELS_A_THREAD, THREADS_ON_TOKENS, THREADS_ON_CHANNELS };
constexpr int RUNS = MAP == CHANNELS_A_THREAD ? 2 : 1, RUN = EACH / RUNS;  // at neighbouring tokens
enum { VECTORS_OF_TOKENS, VECTORS_OF_STATES, STRIDED, CONSTANT };             // B and C; CONSTANT: (D, N)

struct Place { int b, g, channel, channels, from, first, end; bool any; };  // first channel, how many; tokens, y from `first` on

// Whether all of a block's channels and of the T tokens from t0 are there. Where WHOLE, that is so for every piece.
__device__ __forceinline__ bool is_whole(const Place& w, int t0) { return WHOLE ? t0 < w.end : w.channels == CHANNELS && t0 + T <= w.end; }
__device__ __forceinline__ bool is_partial(const Place& w, int t0) { return !WHOLE && t0 < w.end && !is_whole(w, t0); }

__device__ __forceinline__ Place locate(const Params& p) {
  Place w;
  const int tiles = (p.length - 1) / TILE + 1;
  const int asked = p.device_chunk ? *p.device_chunk : p.chunk;
  const int chunk = min(max((asked - 1) / TILE + 1, 1), tiles) * TILE;
  const int part = blockIdx.x % PARTS;
  unsigned i = blockIdx.x / PARTS;
  const auto digit = [&](const Divisor& d) {  // the grid counts blocks fastest, then groups, batch rows and chunks
    const unsigned n = i;
    i = n / d;
    return int(n - i * d.by);
  };
  const int block = digit(p.blocks);
  w.g = digit(p.groups);
  w.b = digit(p.batch);
  w.channel = w.g * p.group_channels + block * CHANNELS;
  w.channels = min(CHANNELS, p.group_channels - block * CHANNELS);
  i = i * PARTS + part;
  w.any = (int64)i * chunk < p.length;
  w.first = i * chunk;
  w.end = min(w.first + chunk, p.length);
  w.from = part > 0 ? p.lead : w.first;
  return w;
}

// ---- elements of u, delta, z, y --------------------------------------------------------------------------------------

// The thread's number among those that do what is element by element.
__device__ __forceinline__ int feeder() {
  if (BUSY == 0) return IN_PAIRS ? int(threadIdx.x) - THREADS : threadIdx.x;
  const int warp = threadIdx.x / 32;
  return ((warp - WALKERS) / SCHEDULERS * (SCHEDULERS - BUSY) + warp % SCHEDULERS - BUSY) * 32 + threadIdx.x % 32;
}

__device__ __forceinline__ void element(int e, int& c, int& t) {
  const int i = feeder(), k = e * FEEDERS + i;
  if (MAP == TOKENS_A_THREAD) {  // 8 threads are on two rows, 4 a row: that is how they hit different banks
    c = IN_PAIRS ? i / (T / 4) * 2 + i / 4 % 2 : i / (T / EACH);
    t = (IN_PAIRS ? i / 8 % (T / 32) * 4 + i % 4 : i % (T / EACH)) * EACH + e;
  }
  else if (MAP == CHANNELS_A_THREAD) { c = i % (CHANNELS / RUN) * RUN + e % RUN; t = i / (CHANNELS / RUN) * RUNS + e / RUN; }
  else if (MAP == THREADS_ON_TOKENS) { c = k / T; t = k % T; }
  else { c = k % CHANNELS; t = k / CHANNELS; }
}

// COUNT neighbouring elements, kept packed: half the registers for 16-bit types.
template <class X, int COUNT> struct Elements {
  static constexpr int BYTES = COUNT * sizeof(X), PER_WORD = 4 / sizeof(X);
  uint32 words[BYTES / 4];

  __device__ __forceinline__ void load(const X* from) {  // aligned to its size, or to 16 bytes
    if constexpr (BYTES == 4) words[0] = __ldg((const uint32*)from);
    else if constexpr (BYTES == 8) {
      const uint2 two = __ldg((const uint2*)from);
      words[0] = two.x;
      words[1] = two.y;
    } else {
#pragma unroll
      for (int w = 0; w < BYTES / 4; w += 4) {
        const uint4 four = __ldg((const uint4*)(from + w * PER_WORD));
        words[w] = four.x;
        words[w + 1] = four.y;
        words[w + 2] = four.z;
        words[w + 3] = four.w;
      }
    }
  }
  __device__ __forceinline__ void store(X* to) const {
    if constexpr (BYTES == 8) *(uint2*)to = make_uint2(words[0], words[1]);
    else {
#pragma unroll
      for (int w = 0; w < BYTES / 4; w += 4)
        *(uint4*)(to + w * PER_WORD) = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
    }
  }
  __device__ __forceinline__ void gather(const X (&from)[COUNT]) {  // from must be aligned to 4 bytes
#pragma unroll
    for (int w = 0; w < BYTES / 4; ++w) words[w] = *(const uint32*)(from + w * PER_WORD);
  }
  __device__ __forceinline__ void pack(const float (&from)[COUNT]) {
#pragma unroll
    for (int w = 0; w < BYTES / 4; ++w) words[w] = pack_word(from + w * PER_WORD, X());
  }
  __device__ __forceinline__ void unpack(float (&to)[COUNT]) const {
#pragma unroll
    for (int w = 0; w < BYTES / 4; ++w) unpack_word(words[w], to + w * PER_WORD, X());
  }
};

// This thread's elements of one tensor, T tokens after T tokens. Vectors are contiguous, which spares registers.
template <class X, bool VECTOR> struct Walker {
  X* at;  // element 0
  __device__ __forceinline__ Walker(X* x, const Strides& st, const Place& w, int first) {
    int c, t;
    element(0, c, t);
    at = x + w.b * st.batch + (w.channel + c) * st.channel + (first + t) * st.token;
  }
  __device__ __forceinline__ void advance(const Strides& st) { at += T * (VECTOR && MAP == TOKENS_A_THREAD ? 1 : st.token); }
  __device__ __forceinline__ void prefetch_later(const Strides& st) const {  // what is loaded two pieces later
#pragma unroll
    for (int run = 0; run < RUNS; ++run) prefetch(at + (2 * T + run) * st.token);
  }
  static __device__ __forceinline__ int64 step(const Strides& st, int e) {  // from element e to the next
    const int from = RUNS > 1 || FEEDERS % T ? e : 0;  // one distance for all, where that is so, saves registers
    int c0, t0, c, t;
    element(from, c0, t0);
    element(from + 1, c, t);
    return VECTOR && (e + 1) % RUN ? 1 : (c - c0) * st.channel + (t - t0) * st.token;
  }
};

__device__ __forceinline__ bool there(int e, int t0, const Place& w) {
  int c, t;
  element(e, c, t);
  return c < w.channels && t0 + t < w.end;
}
// Whether none is, as the first one is not. In one pass with one lane a share looking costs more than it saves.
__device__ __forceinline__ bool absent(int t0, const Place& w) {
  return IN_PAIRS && (MAP == TOKENS_A_THREAD || MAP == CHANNELS_A_THREAD) && !there(0, t0, w);
}
__device__ __forceinline__ bool whole(int t0, const Place& w) { return there(0, t0, w) && there(EACH - 1, t0, w); }

// ALL: every element of the block is there.
template <bool ALL, class X, bool VECTOR> __device__ __forceinline__ void load(Elements<X, EACH>& to, Walker<const X, VECTOR>& x, const Strides& st, int t0, const Place& w) {
  if (VECTOR && (ALL || whole(t0, w))) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
      Elements<X, RUN> part;
      part.load(x.at + run * st.token);
#pragma unroll
      for (int i = 0; i < part.BYTES / 4; ++i) to.words[run * part.BYTES / 4 + i] = part.words[i];
    }
  } else if (!ALL && absent(t0, w)) {
    to = {};
  } else {
    alignas(16) X elements[EACH];
    const X* from = x.at;
#pragma unroll
    for (int e = 0; e < EACH; from += x.step(st, e++)) elements[e] = ALL || there(e, t0, w) ? *from : from_float<X>(0.f);
    to.gather(elements);
  }
  x.advance(st);
}

template <bool ALL> __device__ __forceinline__ void store(Walker<T_U, VECTOR_Y>& y, const float (&out)[EACH], const Strides& st, int t0, const Place& w) {
  if (VECTOR_Y && (ALL || whole(t0, w))) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
      Elements<T_U, RUN> packed;
      packed.pack((const float(&)[RUN])out[run * RUN]);
      packed.store(y.at + run * st.token);
    }
  } else if (ALL || !absent(t0, w)) {
    T_U* to = y.at;
#pragma unroll
    for (int e = 0; e < EACH; to += y.step(st, e++)) if (ALL || there(e, t0, w)) *to = from_float<T_U>(out[e]);
  }
  y.advance(st);
}

// ---- B and C ---------------------------------------------------------------------------------------------------------
// In shared memory as fp32 [token][state], read in quads of 4 states; where lanes hold 2 states, a quad is those of an even
// token and of the next. Every second token is followed by an empty quad, so that threads that write the same states of
// many tokens hit different banks. A thread writes two quads at a time, or halves of four.
__device__ __forceinline__ int quad(int t, int q) { return 4 * (t * QUADS + t / 2 + q); }

template <class X, int LAYOUT> struct Projected {
  static constexpr bool OF_STATES = LAYOUT == VECTORS_OF_STATES;
  static constexpr int VECTORS = OF_STATES ? 1 : 4, LONG = 8 / VECTORS;  // of a piece: two quads
  static constexpr int ALONG = OF_STATES ? (N + LONG - 1) / LONG : T / LONG;     // pieces along its vectors
  static constexpr int PIECES = OF_STATES ? ALONG * T : ALONG * ((N + 3) / 4);
  static constexpr int SHARE = FEEDERS / 2, EACH_THREAD = LAYOUT == CONSTANT ? 0 : (PIECES + SHARE - 1) / SHARE;
  static constexpr bool AHEAD = EACH_THREAD > 0 && EACH_THREAD <= (IN_PAIRS ? 3 : 2);  // loaded a round ahead, into registers
  using Piece = Elements<X, LONG>[VECTORS];
  struct Pieces { Piece at[AHEAD ? EACH_THREAD : 1]; };
  const X *base, *at[AHEAD ? EACH_THREAD : 1];
  const int id;  // counts the threads that work on this projection

  __device__ __forceinline__ Projected(const X* x, const Projection& st, int id, int first) : base(x), id(id) {
#pragma unroll
    for (int k = 0; k < (AHEAD ? EACH_THREAD : 0); ++k) at[k] = address(k * SHARE + id, st, first);
  }
  static __device__ __forceinline__ void start(int i, int& n, int& t) {
    if (OF_STATES) { n = i % ALONG * LONG; t = i / ALONG; }
    else { n = i / ALONG * 4; t = i % ALONG * LONG; }
  }
  __device__ __forceinline__ const X* address(int i, const Projection& st, int t0) const {
    int n, t;
    start(i, n, t);
    return base + n * st.state + (t0 + t) * st.token;
  }
  template <bool ALL> static __device__ __forceinline__ void load_piece(Piece& to, const X* from, const Projection& st, int i, int t0, int end) {
    int n, t;
    start(i, n, t);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v, from += st.state) {
      const bool state = OF_STATES || N % 4 == 0 || n + v < N;
      if (LAYOUT != STRIDED && state && (ALL || t0 + t + (OF_STATES ? 0 : LONG - 1) < end)) to[v].load(from);
      else {
        alignas(16) X elements[LONG];
#pragma unroll
        for (int e = 0; e < LONG; ++e)
          elements[e] = !OF_STATES && state && (ALL || t0 + t + e < end) ? from[e * st.token] : from_float<X>(0.f);
        to[v].gather(elements);
      }
    }
  }
  static __device__ __forceinline__ void put_piece(float* s, const Piece& from, int i) {
    int n, t;
    start(i, n, t);
    float f[VECTORS][LONG];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) from[v].unpack(f[v]);
    if constexpr (STATES == 2) {
      s += quad(t / 2 * 2, n / 2) + t % 2 * 2;
      if constexpr (OF_STATES)
#pragma unroll
        for (int q = 0; q < 4; ++q) *(float2*)(s + 4 * q) = make_float2(f[0][2 * q], f[0][2 * q + 1]);
      else
#pragma unroll
        for (int q = 0; q < 2; ++q) *(float4*)(s + 4 * q) = make_float4(f[2 * q][0], f[2 * q + 1][0], f[2 * q][1], f[2 * q + 1][1]);
    } else {
      s += quad(t, n / 4);
#pragma unroll
      for (int q = 0; q < 2; ++q)  // t is even where the quads are of two tokens: no empty quad lies between
        if constexpr (OF_STATES) *(float4*)(s + 4 * q) = make_float4(f[0][4 * q], f[0][4 * q + 1], f[0][4 * q + 2], f[0][4 * q + 3]);
        else *(float4*)(s + 4 * QUADS * q) = make_float4(f[0][q], f[1][q], f[2][q], f[3][q]);
    }
  }

  template <bool ALL> __device__ __forceinline__ void load(Pieces& to, const Projection& st, int t0, int end) {
    if constexpr (AHEAD)
#pragma unroll
      for (int k = 0; k < EACH_THREAD; ++k) {
        if (PIECES % SHARE == 0 || k * SHARE + id < PIECES) load_piece<ALL>(to.at[k], at[k], st, k * SHARE + id, t0, end);
        at[k] += T * (LAYOUT == VECTORS_OF_TOKENS ? 1 : st.token);
      }
  }
  __device__ __forceinline__ void put(float* s, const Pieces& from, const Projection& st, int t0, int end) {
    if constexpr (AHEAD) {
#pragma unroll
      for (int k = 0; k < EACH_THREAD; ++k)
        if (PIECES % SHARE == 0 || k * SHARE + id < PIECES) put_piece(s, from.at[k], k * SHARE + id);
    } else if constexpr (LAYOUT != CONSTANT) {
      for (int i = id; i < PIECES; i += SHARE) {
        Piece piece;
        load_piece<false>(piece, address(i, st, t0), st, i, t0, end);
        put_piece(s, piece, i);
      }
    }
  }
};

// ---- the passes ------------------------------------------------------------------------------------------------------

// A thread's inputs for T tokens, on their way from memory while it walks the tokens before.
struct Inputs {
  Elements<T_U, EACH> u;
  Elements<T_DELTA, EACH> delta;
  Elements<T_Z, EACH> z;
  Projected<T_B, LAYOUT_B>::Pieces B;
  Projected<T_C, LAYOUT_C>::Pieces C;
};

template <class X, class Y> constexpr bool SAME = false;
template <class X> constexpr bool SAME<X, X> = true;

// What is done for a block's channels element by element: steps and inputs before the walk, y after it.
template <bool FIND_Y> struct Elementwise {
  // Half of the threads stage B and half C. Where these are alike, all run the same code; vectors of states are faster with
  // two, by 2 % of a call.
  static constexpr bool ALIKE = FIND_Y && SAME<T_B, T_C> && LAYOUT_B == LAYOUT_C && LAYOUT_B != VECTORS_OF_STATES;

  const Params& p;
  const Place& w;
  Memory<FIND_Y>* memory;
  Walker<const T_U, VECTOR_U> u;
  Walker<const T_DELTA, VECTOR_DELTA> delta;
  Walker<const T_Z, VECTOR_Z> z;
  Walker<T_U, VECTOR_Y> y;
  const bool stages_B;
  Projected<T_B, LAYOUT_B> B;
  Projected<T_C, LAYOUT_C> C;

  __device__ __forceinline__ Elementwise(const Params& p, const Place& w, Memory<FIND_Y>* memory)
      : p(p), w(w), memory(memory), u(p.u, p.su, w, w.from), delta(p.delta, p.sdelta, w, w.from),
        z(p.z, p.sz, w, w.first), y(p.y, p.sy, w, w.first), stages_B(feeder() < FEEDERS / 2),
        B(start_of(stages_B || !ALIKE ? p.B : (const T_B*)p.C, of_B()), of_B(), feeder() % (FEEDERS / 2), w.from),
        C(start_of(p.C, p.sC), p.sC, feeder() % (FEEDERS / 2), w.from) {}

  template <class X> __device__ __forceinline__ const X* start_of(const X* x, const Projection& st) const {
    return x + w.b * st.batch + w.g * st.group;
  }
  __device__ __forceinline__ const Projection& of_B() const { return stages_B || !ALIKE ? p.sB : p.sC; }  // where alike, or of C

  template <bool ALL> __device__ __forceinline__ void fetch(Inputs& to, int t0) {
    if (IN_PAIRS && ALL && t0 + 3 * T <= w.end) {
      u.prefetch_later(p.su);
      delta.prefetch_later(p.sdelta);
    }
    load<ALL>(to.u, u, p.su, t0, w);
    load<ALL>(to.delta, delta, p.sdelta, t0, w);
    if (FIND_Y && HAS_Z && !IN_PAIRS) load<ALL>(to.z, z, p.sz, t0, w);
    if (ALIKE || stages_B) B.template load<ALL>(to.B, of_B(), t0, w.end);
    else if (FIND_Y) C.template load<ALL>(to.C, p.sC, t0, w.end);
  }

  template <bool ALL> __device__ __forceinline__ void fetch_gate(Inputs& to, int t0) {  // for a `finish` long after `fetch`
    if (ALL && HAS_Z && t0 + 3 * T <= w.end) z.prefetch_later(p.sz);
    if (HAS_Z) load<ALL>(to.z, z, p.sz, t0, w);
  }

  // This thread's elements of rows in shared memory, to and fro.
  static __device__ __forceinline__ void put_rows(float* rows, const float (&from)[EACH]) {
    int c, t;
    element(0, c, t);
    if (MAP == TOKENS_A_THREAD)
#pragma unroll
      for (int e = 0; e < EACH; e += 4) *(float4*)(rows + row_of(c) + t + e) = make_float4(from[e], from[e + 1], from[e + 2], from[e + 3]);
    else if (MAP == CHANNELS_A_THREAD)
#pragma unroll
      for (int e = 0; e < RUN; ++e) *(float2*)(rows + row_of(c + e) + t) = make_float2(from[e], from[RUN + e]);
    else
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        element(e, c, t);
        rows[row_of(c) + t] = from[e];
      }
  }
  static __device__ __forceinline__ void get_rows(float (&to)[EACH], const float* rows) {
    int c, t;
    element(0, c, t);
    if (MAP == TOKENS_A_THREAD)
#pragma unroll
      for (int e = 0; e < EACH; e += 4) *(float4*)(to + e) = *(const float4*)(rows + row_of(c) + t + e);
    else if (MAP == CHANNELS_A_THREAD)
#pragma unroll
      for (int e = 0; e < RUN; ++e) {
        const float2 two = *(const float2*)(rows + row_of(c + e) + t);
        to[e] = two.x;
        to[RUN + e] = two.y;
      }
    else
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        element(e, c, t);
        to[e] = rows[row_of(c) + t];
      }
  }

  template <bool ALL> __device__ __forceinline__ void stage(const Inputs& from, int t0) {  // steps and inputs, B and C
    float step[EACH], in[EACH];
    int c, t;
    from.delta.unpack(step);
    from.u.unpack(in);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      element(e, c, t);
      if (HAS_BIAS) step[e] = __fadd_rn(step[e], constants()->bias[c]);
      if (SOFTPLUS) step[e] = softplus<T_DELTA>(step[e]);
      if (!ALL && t0 + t >= w.end) step[e] = 0.f;  // beyond the end nothing decays and nothing enters
      in[e] = __fmul_rn(step[e], in[e]);
    }
    put_rows(memory->step, step);
    put_rows(memory->in, in);
    if (ALIKE || stages_B) B.put(stages_B ? memory->B : memory->C, from.B, of_B(), t0, w.end);
    else if (FIND_Y) C.put(memory->C, from.C, p.sC, t0, w.end);
  }

  template <bool ALL> __device__ __forceinline__ void finish(const Inputs& from, int t0) {  // sum the shares, skip and gate
    float out[EACH], skip[EACH], gate[EACH];
    int c, t;
#pragma unroll
    for (int l = 0; l < SHARES; ++l) {
      alignas(16) float share[EACH];
      get_rows(share, memory->y + l * ROWS);
#pragma unroll
      for (int e = 0; e < EACH; ++e) out[e] = l ? __fadd_rn(out[e], share[e]) : share[e];
    }
    from.u.unpack(skip);
    from.z.unpack(gate);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      element(e, c, t);
      if (HAS_D) out[e] = fmaf(constants()->D[c], skip[e], out[e]);
      if (HAS_Z) out[e] = __fmul_rn(out[e], __fmul_rn(gate[e], sigmoid(gate[e])));
    }
    store<ALL>(y, out, p.sy, t0, w);
  }
};

// A lane's states of its channel.
template <bool FIND_S, bool FIND_Y> struct Lane {
  const Params& p;
  const Place& w;
  Memory<FIND_Y>* memory;
  const int share, place, sub, mine;  // which share, which of its lanes, so which states; which channel of the block
  const int64 rows, channel, row;
  float A[STATES], h[STATES], s[STATES], H[STATES], sum;
  float fixed_B[STATES], fixed_C[STATES];  // where constant

  __device__ __forceinline__ bool exists(int i) const { return (WHOLE || mine < w.channels) && (ROW == N || sub * STATES + i < N); }

  // Bit 0 of a lane's number is bit 0 of its share, the next ones are its channel's. So neighbours read the same steps, and
  // lanes 2 apart the same B: either makes one wavefront of a half-warp's 16-byte reads, which are two otherwise.
  __device__ __forceinline__ Lane(const Params& p, const Place& w, Memory<FIND_Y>* memory)
      : p(p), w(w), memory(memory), share(SHARES == 1 ? 0 : threadIdx.x % 2 + threadIdx.x % 32 / (2 * ABREAST) * 2 % SHARES),
        place(threadIdx.x % 32 / (32 / SHARERS)), sub(share * SHARERS + place),
        mine(threadIdx.x / 32 * ABREAST + (SHARES == 1 ? threadIdx.x % 32 : threadIdx.x % 32 / 2 % ABREAST)),
        rows((int64)p.batch.by * p.channels), channel(w.channel + mine), row(w.b * (int64)p.channels + channel), sum(0.f) {
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
      const int n = sub * STATES + i;
      A[i] = exists(i) ? finite(__fmul_rn(p.A[channel * p.A_channel + n * p.A_state], LOG2E)) : 0.f;
      if (LAYOUT_B == CONSTANT) fixed_B[i] = exists(i) ? to_float(p.B[channel * p.sB.token + n * p.sB.state]) : 0.f;
      if (LAYOUT_C == CONSTANT) fixed_C[i] = exists(i) ? to_float(p.C[channel * p.sC.token + n * p.sC.state]) : 0.f;
      const bool starts = FIND_S && FIND_Y && p.initial && exists(i);
      H[i] = starts ? p.initial[w.b * p.initial_batch + channel * p.initial_channel + n * p.initial_state] : 0.f;
      s[i] = 0.f;
      h[i] = H[i];
    }
  }

  __device__ __forceinline__ void begin_tile(int t0) {  // from the states that scan_carry found
    const float* from = p.tiles + (t0 / TILE * rows + row) * N + sub * STATES;
#pragma unroll
    for (int i = 0; i < STATES; ++i) h[i] = exists(i) ? from[i] : 0.f;
  }

  __device__ __forceinline__ void walk() {
    const float *steps = memory->step + row_of(mine), *Bs = memory->B + quad(0, sub * STATES / 4);
    float* shares = memory->y + share * ROWS + row_of(mine);
#pragma unroll (FIND_S && FIND_Y ? 1 : 2)
    for (int t = 0; t < T; t += 4, steps += 4, Bs += quad(4, 0), shares += 4) {
      const float4 step_4 = *(const float4*)steps, in_4 = *(const float4*)(steps + ROWS);
      float part[4];
#pragma unroll
      for (int q = 0; q < STATES; q += 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* at = Bs + quad(j, q / 4);
          float4 b, c;
          if (LAYOUT_B != CONSTANT) b = *(const float4*)at;
          if (FIND_Y && LAYOUT_C != CONSTANT) c = *(const float4*)(at + PROJECTION);
#pragma unroll
          for (int i = q; i < q + 4; ++i) {
            const float a = ex2(__fmul_rn(A[i], (&step_4.x)[j]));
            float x = __fmul_rn((&in_4.x)[j], LAYOUT_B == CONSTANT ? fixed_B[i] : (&b.x)[i - q]);
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
      if (FIND_Y) *(float4*)shares = make_float4(part[0], part[1], part[2], part[3]);
    }
    if (FIND_S)
#pragma unroll
      for (int t = 4 * share; t < T; t += 4 * SHARES) add_group(memory->step + row_of(mine) + t);
  }

  // Lanes share the work of summing the steps: each has every SHARES-th group of 4 tokens.
  __device__ __forceinline__ void add_group(const float* steps) {
    const float4 four = *(const float4*)steps;
    sum = __fadd_rn(sum, __fadd_rn(__fadd_rn(four.x, four.y), __fadd_rn(four.z, four.w)));
  }
  // Sums of lanes that many apart.
  static __device__ __forceinline__ float add_lanes_of(float sum, int apart) { return __fadd_rn(sum, __shfl_xor_sync(~0u, sum, apart)); }
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int lanes = 16 / SHARERS; lanes > ABREAST; lanes /= 2) sum = add_lanes_of(sum, lanes);
    if (SHARES > 1) sum = add_lanes_of(sum, 1);
  }

  __device__ __forceinline__ void end_tile(int t0) {
    add_lanes();
    const int64 to = (FIND_Y ? 0 : t0 / TILE * rows) + row;
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
      if (FIND_Y) H[i] = carry(factor_of(A[i], sum), H[i], s[i]);
      if (FIND_Y && t0 + T >= p.length && exists(i)) p.last[to * N + sub * STATES + i] = H[i];
      if (!FIND_Y && exists(i)) p.tiles[to * N + sub * STATES + i] = s[i];
      s[i] = 0.f;
      h[i] = H[i];
    }
    if (!FIND_Y && sub == 0 && exists(0)) p.sums[to] = sum;
    sum = 0.f;
  }
};

__device__ __forceinline__ void fill_constants(const Params& p, const Place& w) {
  if (const int c = threadIdx.x; c < CHANNELS) {
    constants()->bias[c] = HAS_BIAS && c < w.channels ? p.bias[(w.channel + c) * p.bias_channel] : 0.f;
    constants()->D[c] = HAS_D && c < w.channels ? p.D[(w.channel + c) * p.D_channel] : 0.f;
  }
  if (IN_PAIRS && threadIdx.x < T) constants()->nothing[threadIdx.x] = -0.f;
}

template <bool FIND_S, bool FIND_Y> __device__ __forceinline__ void pass(const Params& p) {
  Memory<FIND_Y>* memory = memory_of_block<FIND_Y>();
  if (FIND_S) wait_for_earlier_kernels();
  const Place w = locate(p);
  if (!w.any) return;
  Elementwise<FIND_Y> elementwise(p, w, memory);
  constexpr bool ONE_PASS = FIND_S && FIND_Y;
  const auto fetch = [&](Inputs& to, int t0) {
    if (is_whole(w, t0)) elementwise.template fetch<true>(to, t0);
    else if (!WHOLE && (ONE_PASS || t0 < w.end)) elementwise.template fetch<false>(to, t0);  // loads nothing there, but compiles better
  };
  Inputs now;
  fetch(now, w.first);
  Lane<FIND_S, FIND_Y> lane(p, w, memory);
  fill_constants(p, w);
  if (ROW > N)  // padded states read what nobody writes: it must be finite
    for (int i = threadIdx.x; i < PROJECTION; i += THREADS) {
      memory->B[i] = 0.f;
      if (FIND_Y) memory->C[i] = 0.f;
    }
  __syncthreads();
  if (!FIND_S) wait_for_earlier_kernels();  // for the states before the tiles: all that was read so far was there before them

#pragma unroll 1
  for (int t0 = w.first; t0 < w.end; t0 += T) {
    const bool all = is_whole(w, t0);
    if (!FIND_S && t0 % TILE == 0) lane.begin_tile(t0);
    if (WHOLE || all) elementwise.template stage<true>(now, t0);
    else elementwise.template stage<false>(now, t0);
    __syncthreads();
    Inputs next;
    fetch(next, t0 + T);
    lane.walk();
    if (FIND_S && ((t0 + T) % TILE == 0 || t0 + T >= w.end)) lane.end_tile(t0);
    __syncthreads();
    if (FIND_Y) {
      if (WHOLE || all) elementwise.template finish<true>(now, t0);
      else elementwise.template finish<false>(now, t0);
    }
    now = next;
  }
}

#include "scan_in_pairs.cuh"

#if SPLIT
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS + (MAP == TOKENS_A_THREAD ? 2 : 1)) void scan_states(const __grid_constant__ Params p) {
  pass<true, false>(p);
}
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void scan_outputs(const __grid_constant__ Params p) { pass<false, true>(p); }
#else
#if PARTS > 1
#define CLUSTER __cluster_dims__(PARTS, 1, 1)
#else
#define CLUSTER
#endif
extern "C" __global__ CLUSTER __launch_bounds__(BLOCK, BLOCKS) void scan_both(const __grid_constant__ Params p) {
  if constexpr (IN_PAIRS) pass_in_pairs(p);
  else pass<true, true>(p);
}
#endif
