// One pass with two lanes a share, where that makes at most one block a multiprocessor. The first WALKERS warps of a block
// only walk, in rounds of T tokens; the others feed them: they stage what is two rounds ahead and finish what is one round
// behind. Rounds lie in a ring of three in shared memory, so that a walk reads into the next round and never stops between.
//
// A share's second lane walks two steps of 4 tokens behind the first one and goes on from what that left among the shares: the
// chain of `Lane::walk`, so the bits are the same. Two steps, so that a step reads nothing from shared memory that it needs itself.
constexpr int RING = 3;

// All threads arrive at its barriers, not one for its warp, which costs no time: racecheck knows no order through __syncwarp.
struct Round : Memory<true> {
  Mbarrier staged;  // those that feed have staged it, and finished what was here before
  Mbarrier left;    // those that walk are in this round, and have left the one before
};

// Behind the ring, in the second of two blocks that share a sequence (scan_in_parts.cuh).
struct alignas(16) Inbox {
  float2 states[THREADS];  // the first block's at `lead`, of every walking lane
  Mbarrier full;           // they are there

  __device__ __forceinline__ float4* tile(int i) { return (float4*)(this + 1) + i * THREADS + threadIdx.x; }  // of a lane
};

__device__ __forceinline__ int onward(int place) { return place + 1 == RING ? 0 : place + 1; }

struct Pair : Lane<true, true> {
  struct Raw { float4 step, in; alignas(16) float B[4][2]; };  // of 4 tokens
  struct Four { float a[4][2], x[4][2]; };                      // what they do to two states
  struct Chain { float4 part; alignas(16) float C[4][2]; };     // shares so far, and what goes on with them
  const float *steps, *Bs, *Cs, *before;
  float* shares;
  Raw raw;      // 8 tokens ahead of the walk
  Chain chain;  // 4 ahead
  Four now;
  float total, factor[STATES];  // of the tile that ends next
  Inbox& inbox;

  __device__ __forceinline__ Pair(const Params& p, const Place& w, Round* ring, Inbox& inbox) : Lane(p, w, ring), inbox(inbox) {}

  // Both lanes begin where the first one does. What the second finds before its turn comes is left behind: in registers when
  // it begins its tile, and in the last place of the ring.
  __device__ __forceinline__ void begin(Round& round, Round& last) {
    write_to(&last, true);
    shares += T - 8;
    use_from(&round, true);
    before = constants()->nothing;
    begin_steps(round);
    chain = load_chain();
  }
  __device__ __forceinline__ void begin_steps(const Round& round) {
    read_from(&round, true);
    raw = load_four();
    now = find_four();
    raw = load_four();
  }

  // No lane goes another way than the others here: branches would cost more than what they leave out.
  __device__ __forceinline__ void walk_round(int t0, Round& round, Round& next, int parity) {  // of `next`
    memory = &round;
    const float* mine_of_steps = memory->step + row_of(mine) + 4 * share;
    write_to(memory, place == 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i == 0) read_from(memory, place == 1);
      if (i == 1) use_from(memory, place == 1);
      if (i == 2) {
        next_tile(place == 1 && t0 % TILE == 0, t0 > w.first);
        write_to(memory, place == 1);
      }
      add_groups(mine_of_steps, i);
      step();
      __syncwarp();
      if (i == 1) round.left.arrive();
    }
#pragma unroll 2
    for (int t = 32; t < T; t += 16) {  // all but 16 tokens at either end
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        step();
        __syncwarp();
      }
    }
    if (PARTS > 1 && t0 == p.lead)  // both lanes have ended the tile before
      send(make_float2(H[0], H[1]), inbox.states + threadIdx.x, inbox.full, 1);
    const bool ends_tile = (t0 + T) % TILE == 0 || t0 + T >= w.end;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      find_factors(i, ends_tile);
      if (i == 2) {
        next.staged.wait(parity);
        read_from(&next, place == 0);
      }
      if (i == 3) use_from(&next, place == 0);
      step();
      __syncwarp();
    }
    next_tile(place == 0 && ends_tile, true);
  }

  __device__ __forceinline__ void end() {
    if (place == 1) {
      step();
      step();
    }
    next_tile(place == 1, true);
#pragma unroll
    for (int i = 0; i < STATES; ++i)
      if (exists(i) && (PARTS == 1 || w.end == p.length)) p.last[row * N + sub * STATES + i] = H[i];
  }

  // Inputs are read two steps before their lane walks them, C and the shares so far one step before.
  __device__ __forceinline__ void read_from(const Memory<true>* memory, bool now) {
    steps = now ? memory->step + row_of(mine) : steps;
    Bs = now ? memory->B + quad(0, sub) : Bs;
  }
  __device__ __forceinline__ void write_to(Memory<true>* memory, bool now) {
    shares = now ? memory->y + share * ROWS + row_of(mine) : shares;
  }
  __device__ __forceinline__ void use_from(const Memory<true>* memory, bool now) {
    before = now ? place == 0 ? constants()->nothing : memory->y + share * ROWS + row_of(mine) : before;
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
    const Chain later = load_chain();
    put_four();
    now = next;
    chain = later;
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
  __device__ __forceinline__ Chain load_chain() {
    Chain of;
    of.part = *(const float4*)before;
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      if (LAYOUT_C != CONSTANT) *(float4*)of.C[j] = *(const float4*)(Cs + quad(j, 0));
    before += 4;
    Cs += quad(4, 0);
    return of;
  }
  __device__ __forceinline__ void put_four() {
    float4 part = chain.part;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s[i] = fmaf(now.a[j][i], s[i], now.x[j][i]);
        h[i] = fmaf(now.a[j][i], h[i], now.x[j][i]);
        (&part.x)[j] = fmaf(h[i], LAYOUT_C == CONSTANT ? fixed_C[i] : chain.C[j][i], (&part.x)[j]);
      }
    *(float4*)shares = part;
    shares += 4;
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
  // What a lane has found of tokens before belongs to the tile that it ends, or to none.
  __device__ __forceinline__ void next_tile(bool now, bool ends_one) {
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
      const float after = carry(factor[i], H[i], s[i]);
      H[i] = now && ends_one ? after : H[i];
      s[i] = now ? 0.f : s[i];
      h[i] = now ? H[i] : h[i];
    }
  }
};

#include "scan_in_parts.cuh"

// Where a walk is in the ring.
struct Where {
  Round* ring;
  int now = 0, parity = 0;

  template <class Walker> __device__ __forceinline__ void walk_round(Walker& walker, int t0) {
    Round& round = ring[now];
    now = onward(now);
    parity ^= now == 0;
    walker.walk_round(t0, round, ring[now], parity);
  }
};

__device__ __forceinline__ void walk_in_pairs(const Params& p, const Place& w, Round* ring, Inbox& inbox) {
  Pair lane(p, w, ring, inbox);
  Where at{ring};
  int t0 = w.from;
  if (PARTS > 1) wait_for_cluster();
  ring->staged.wait(0);
  if (PARTS > 1 && t0 < w.first) {
    Ahead ahead{lane};
    lane.begin_steps(*ring);
#pragma unroll 1
    for (; t0 < w.first; t0 += T) at.walk_round(ahead, t0);
    ahead.link();
  }
  lane.begin(ring[at.now], ring[(at.now ? at.now : RING) - 1]);
#pragma unroll 1
  for (; t0 < w.end; t0 += T) at.walk_round(lane, t0);
  lane.end();
  ring[at.now].left.arrive();
}

__device__ __forceinline__ void feed_pairs(const Params& p, const Place& w, Round* ring) {
  Elementwise<true> elementwise(p, w, ring);
  Inputs coming, gates;
  Elements<T_U, EACH> us[3];  // of rounds staged and not finished: reading u again for that would take longer
  const auto fetch = [&](int t0) {
    if (is_whole(w, t0)) elementwise.template fetch<true>(coming, t0);
    else if (is_partial(w, t0)) elementwise.template fetch<false>(coming, t0);
  };
  const auto stage = [&](int t0, int place) {
    elementwise.memory = ring + place;
    if (is_whole(w, t0)) elementwise.template stage<true>(coming, t0);
    else if (is_partial(w, t0)) elementwise.template stage<false>(coming, t0);
    gates.u = us[0];  // of three rounds before
    us[0] = us[1];
    us[1] = us[2];
    us[2] = coming.u;
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

  fetch(w.from);
  stage(w.from, 0);
  ring[0].staged.arrive();
  fetch(w.from + T);
  stage(w.from + T, 1);
  ring[1].staged.arrive();
  fetch(w.from + 2 * T);
  if (PARTS > 1) wait_for_cluster();  // they send nothing, but racecheck does not end unless all threads wait
  int t0 = w.from, now = 0, parity = 0;
  int free = RING - 1;  // where the round before t0 lies, and the one two ahead of t0 will
#pragma unroll 1
  for (; t0 < w.end; t0 += T) {
    ring[now].left.wait(parity);
    stage(t0 + 2 * T, free);
    fetch(t0 + 3 * T);
    if (t0 > w.first) finish(t0 - T, free);  // its outputs are still there
    ring[free].staged.arrive();
    if (PARTS == 1 || t0 >= w.first) fetch_gate(t0);
    free = onward(free);
    now = onward(now);
    parity ^= now == 0;
  }
  ring[now].left.wait(parity);
  gates.u = us[0];
  finish(t0 - T, free);
}

__device__ __forceinline__ void pass_in_pairs(const Params& p) {
  wait_for_earlier_kernels();
  const Place w = locate(p);
  Round* ring = (Round*)memory_of_block<true>();
  Inbox& inbox = *(Inbox*)(ring + RING);
  fill_constants(p, w);
  if (threadIdx.x < RING) {
    ring[threadIdx.x].staged.begin(FEEDERS);
    ring[threadIdx.x].left.begin(THREADS);
  }
  if (PARTS > 1 && threadIdx.x == 0) inbox.full.begin(1);
  __syncthreads();
  if (PARTS > 1) {
    if (threadIdx.x == 0) inbox.full.expect(sizeof inbox.states);
    arrive_at_cluster();
  }
  // From another lane, so that the compiler knows that whole warps go one way: else it would keep a second copy of the code
  // for those that do not.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < WALKERS) walk_in_pairs(p, w, ring, inbox);
  else if (warp % SCHEDULERS >= BUSY) feed_pairs(p, w, ring);
}
