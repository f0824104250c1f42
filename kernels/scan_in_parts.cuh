// One pass in pairs whose sequences are walked in two parts, where half of the multiprocessors would have no block otherwise.
//
// Two blocks are a cluster. The first one walks the first chunk. The second one lacks the state that its chunk starts from, so
// meanwhile it looks ahead over the end of the first chunk: from the tile at `lead` on it finds s and the factors of every tile,
// as the first launch of a split does. When the first block has come to `lead` it sends its state there, and the second one
// links its tiles and walks its chunk. Only exps between `lead` and the second chunk are computed twice.

// A lane that looks ahead. Neither one of a pair lags, as there are no shares.
struct Ahead {
  Pair& lane;

  __device__ __forceinline__ void walk_round(int t0, Round& round, Round& next, int parity) {  // of `next`
    const float* mine_of_steps = round.step + row_of(lane.mine) + 4 * lane.share;
    const bool ends_tile = (t0 + T) % TILE == 0;
    round.left.arrive();  // and the one before is left
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      lane.add_groups(mine_of_steps, i);
      step();
    }
#pragma unroll 2  // more is slower (README.md)
    for (int t = 32; t < T; t += 4) step();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      lane.find_factors(i, ends_tile);
      if (i == 2) {
        next.staged.wait(parity);
        lane.read_from(&next, true);
      }
      step();
    }
    if (ends_tile) {
      *lane.inbox.tile((t0 - lane.w.from) / TILE) = make_float4(lane.factor[0], lane.factor[1], lane.s[0], lane.s[1]);
      lane.s[0] = lane.s[1] = 0.f;
    }
  }

  __device__ __forceinline__ void link() {
    lane.inbox.full.wait(0);
    const float2 at_lead = lane.inbox.states[threadIdx.x];
    float *h = lane.h, *H = lane.H;
    H[0] = at_lead.x;
    H[1] = at_lead.y;
#pragma unroll 4
    for (int i = 0; i < (lane.w.first - lane.w.from) / TILE; ++i) {
      const float4 tile = *lane.inbox.tile(i);
      H[0] = carry(tile.x, H[0], tile.z);
      H[1] = carry(tile.y, H[1], tile.w);
    }
    h[0] = H[0];
    h[1] = H[1];
  }

  __device__ __forceinline__ void step() {
    const Pair::Four next = lane.find_four(), &now = lane.now;
    lane.raw = lane.load_four();
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) lane.s[i] = fmaf(now.a[j][i], lane.s[i], now.x[j][i]);
    lane.now = next;
  }
};
