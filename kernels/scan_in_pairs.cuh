// One pass with two lanes a share, where that makes at most one block a multiprocessor. The first WALKERS warps of a block
// only walk, in rounds of T tokens; the others feed them: they stage what is two rounds ahead and finish what is one round
// behind. Rounds lie in a ring of three in shared memory, so that a walk reads into the next round and never stops between.
//
// A share's second lane walks 4 tokens behind the first one and goes on from what that left among the shares: the chain of
// `Lane::walk`, so the bits are the same.
constexpr int RING = 3;

__device__ __forceinline__ void meet() { wait_at_barrier(1, BLOCK); }  // of walkers and feeders, between rounds
__device__ __forceinline__ void leave_round() { arrive_at_barrier(2, BLOCK); }  // nobody walks the round before any more,
__device__ __forceinline__ void wait_until_left() { wait_at_barrier(2, BLOCK); }  // so its place is free
__device__ __forceinline__ void second_is_staged() { arrive_at_barrier(3, BLOCK); }  // the second round of all
__device__ __forceinline__ void wait_for_second() { wait_at_barrier(3, BLOCK); }

struct Pair : Lane<true, true> {
  struct Raw { float4 step, in; alignas(16) float B[4][2]; };  // of 4 tokens
  struct Four { float a[4][2], x[4][2]; };                      // what they do to two states
  const float *steps, *Bs, *Cs, *before;
  float* shares;
  Raw raw;     // 8 tokens ahead of the walk
  Four now;
  float total, factor[STATES];  // of the tile that ends next

  __device__ __forceinline__ Pair(const Params& p, const Place& w, Memory<true>* memory) : Lane(p, w, memory) {}

  // The second lane takes one step more, at first one that changes nothing and leaves its outputs where nobody reads them.
  __device__ __forceinline__ void begin(Memory<true>* ring) {
    write_to(ring + RING - 1, true);
    shares += T - 4;
    Cs = ring->C;
    read_from(ring, true);
    raw = load_four();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      now.a[k / 2][k % 2] = 1.f;
      now.x[k / 2][k % 2] = -0.f;
    }
    if (place == 0) {
      now = find_four();
      raw = load_four();
    }
  }

  // No lane goes another way than the others here: branches would cost more than what they leave out.
  __device__ __forceinline__ void walk_round(int t0, const Memory<true>* next) {
    const float* mine_of_steps = memory->step + row_of(mine) + 4 * share;
    write_to(memory, place == 0);
    step();
    end_tile(place == 1 && t0 > w.first && t0 % TILE == 0);
    write_to(memory, place == 1);
    add_groups(mine_of_steps, 0);
    __syncwarp();
    leave_round();
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      add_groups(mine_of_steps, i);
      step();
      __syncwarp();
    }
#pragma unroll 2
    for (int t = 32; t < T; t += 16) {  // all but 16 tokens at either end
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        step();
        __syncwarp();
      }
    }
    if (t0 == w.first) wait_for_second();
    const bool ends_tile = (t0 + T) % TILE == 0 || t0 + T >= w.end;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      find_factors(i, ends_tile);
      if (i >= 2) read_from(next, place == i - 2);
      step();
      __syncwarp();
    }
    end_tile(place == 0 && ends_tile);
  }

  __device__ __forceinline__ void end() {
    if (place == 1) put_four();
    end_tile(place == 1);
#pragma unroll
    for (int i = 0; i < STATES; ++i)
      if (exists(i)) p.last[row * N + sub * STATES + i] = H[i];
  }

 private:
  __device__ __forceinline__ void read_from(const Memory<true>* memory, bool now) {
    steps = now ? memory->step + row_of(mine) : steps;
    Bs = now ? memory->B + quad(0, sub) : Bs;
  }
  __device__ __forceinline__ void write_to(Memory<true>* memory, bool now) {
    shares = now ? memory->y + share * ROWS + row_of(mine) : shares;
    before = now ? place == 0 ? constants()->nothing : shares : before;
    Cs = now ? memory->C + quad(0, sub) : Cs;
  }

  __device__ __forceinline__ void add_groups(const float* steps, int quarter) {  // of a round
#pragma unroll
    for (int t = 0; t < T; t += 4 * SHARES)
      if (4 * t / T == quarter) add_group(steps + t);
  }
  __device__ __forceinline__ void step() {  // 4 tokens, while the exps of the next 4 and the reads of those after are on their way
    const Four next = find_four();
    raw = load_four();
    put_four();
    now = next;
  }
  __device__ __forceinline__ Raw load_four() {
    Raw of;
    of.step = *(const float4*)steps;
    of.in = *(const float4*)(steps + ROWS);
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      if (LAYOUT_B != CONSTANT) *(float4*)of.B[j] = *(const float4*)(Bs + quad(j, 0));
    steps += 4;
    Bs += quad(4, 0);
    return of;
  }
  __device__ __forceinline__ Four find_four() const {
    Four of;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        of.a[j][i] = ex2(__fmul_rn(A[i], (&raw.step.x)[j]));
        of.x[j][i] = __fmul_rn((&raw.in.x)[j], LAYOUT_B == CONSTANT ? fixed_B[i] : raw.B[j][i]);
      }
    return of;
  }
  __device__ __forceinline__ void put_four() {
    float4 part = *(const float4*)before;
    alignas(16) float C[4][2];
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      if (LAYOUT_C != CONSTANT) *(float4*)C[j] = *(const float4*)(Cs + quad(j, 0));
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s[i] = fmaf(now.a[j][i], s[i], now.x[j][i]);
        h[i] = fmaf(now.a[j][i], h[i], now.x[j][i]);
        (&part.x)[j] = fmaf(h[i], LAYOUT_C == CONSTANT ? fixed_C[i] : C[j][i], (&part.x)[j]);
      }
    *(float4*)shares = part;
    before += 4;
    shares += 4;
    Cs += quad(4, 0);
  }

  // Found by all lanes together, one step after the other, before the first one's tile ends.
  __device__ __forceinline__ void find_factors(int step, bool ends_tile) {
    if (step == 0) total = add_lanes_of(sum, 16 / SHARERS);
    if (step == 1) total = add_lanes_of(total, 1);
    if (step == 2)
#pragma unroll
      for (int i = 0; i < STATES; ++i) factor[i] = factor_of(A[i], total);
    if (step == 3 && ends_tile) sum = 0.f;
  }
  __device__ __forceinline__ void end_tile(bool now) {
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
      const float after = carry(factor[i], H[i], s[i]);
      H[i] = now ? after : H[i];
      s[i] = now ? 0.f : s[i];
      h[i] = now ? H[i] : h[i];
    }
  }
};

__device__ __forceinline__ int onward(int place) { return place + 1 == RING ? 0 : place + 1; }

__device__ __forceinline__ void walk_in_pairs(const Params& p, const Place& w, Memory<true>* ring) {
  Pair lane(p, w, ring);
  meet();
  meet();
  lane.begin(ring);
  int t0 = w.first;
#pragma unroll 1
  for (int now = 0; t0 < w.end; t0 += T) {
    lane.memory = ring + now;
    now = onward(now);
    lane.walk_round(t0, ring + now);
    meet();
  }
  lane.end();
  meet();
}

__device__ __forceinline__ void feed_pairs(const Params& p, const Place& w, Memory<true>* ring) {
  Elementwise<true> elementwise(p, w, ring);
  Inputs coming, gates;
  const auto fetch = [&](int t0) {
    if (is_whole(w, t0)) elementwise.template fetch<true>(coming, t0);
    else if (is_partial(w, t0)) elementwise.template fetch<false>(coming, t0);
  };
  const auto stage = [&](int t0, int place) {
    elementwise.memory = ring + place;
    if (is_whole(w, t0)) elementwise.template stage<true>(coming, t0);
    else if (is_partial(w, t0)) elementwise.template stage<false>(coming, t0);
  };
  const auto fetch_gate = [&](int t0) {  // this and `finish` of tokens that are there
    if (WHOLE || is_whole(w, t0)) elementwise.template fetch_gate<true>(gates, t0);
    else elementwise.template fetch_gate<false>(gates, t0);
  };
  const auto finish = [&](int t0, int place) {
    elementwise.memory = ring + place;
    if (WHOLE || is_whole(w, t0)) elementwise.template finish<true>(gates, t0);
    else elementwise.template finish<false>(gates, t0);
  };

  fetch(w.first);
  meet();
  stage(w.first, 0);
  fetch(w.first + T);
  meet();
  stage(w.first + T, 1);
  second_is_staged();
  fetch(w.first + 2 * T);
  int free = 2, t0 = w.first;  // where the round before t0 lies, and the one two ahead of t0 will
#pragma unroll 1
  for (; t0 < w.end; t0 += T) {
    wait_until_left();
    stage(t0 + 2 * T, free);
    fetch(t0 + 3 * T);
    if (t0 > w.first) finish(t0 - T, free);  // its outputs are still there
    fetch_gate(t0);
    free = onward(free);
    meet();
  }
  meet();
  finish(t0 - T, free);
}

__device__ __forceinline__ void pass_in_pairs(const Params& p) {
  wait_for_earlier_kernels();
  const Place w = locate(p);
  fill_constants(p, w);
  if (threadIdx.x < THREADS) walk_in_pairs(p, w, memory_of_block<true>());
  else feed_pairs(p, w, memory_of_block<true>());
}
