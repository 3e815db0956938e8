// Gradients of keys and values on tensor cores. For every key j of a KV head, over the rows i of all query heads of its
// group that see it, with what the launch before has left per row (gated_sdpa_backward_problem.cuh):
//
//   P_ij = exp2(s_ij - norm_i)                           dV_j = sum_i P_ij scaled_i
//   dS_ij = P_ij (scaled_i.v_j - change_i) * slope_ij    dK_j = scale * sum_i dS_ij q_i
//
// where slope is the softcap's derivative, 1 - tanh^2, or 1.
//
// A block of four warps owns a tile of 64 keys of one KV head; each warp owns 16 of them and all columns of their
// gradients, which it sums in registers. Everything is computed transposed, keys by rows of queries: so the weights P
// and dS never leave the registers they are computed in, as they are the next product's operand there, and nothing has
// to be summed among warps. The order of the sums is that of the loop: two runs give the same bits.
//
// The block goes through the query heads one after the other, and for each through the tiles of rows that see any of
// its keys. q, scaled and the rows' numbers come through cp.async in two stages: tile t + 1 is under way while t is
// worked on. A turn is
//
//   wait, barrier          tile t has arrived, and all have left tile t - 1, whose stage t + 1 now overwrites
//   issue t + 1
//   v scaled^T, k q^T
//   P, dS                  hidden ones become 0, in tiles only that not every row sees whole
//   dV += P scaled
//   dK += dS q
//
// A warp copies its own rows of k and v only, once, and leaves its results in their place at the end: they leave in
// whole pieces of 16 bytes, and only __syncwarp orders that. Where heads are so wide that the sums for both gradients
// do not fit into the registers, one launch computes dK, another one dV.
//
// What a row holds must not reach a key that it does not see even as 0 times infinity. So tiles that are not seen whole
// are looked through for what is not finite by the threads that copied them, as in the forward; only where there is
// something do the sums take a longer way.
#pragma once

#include "gated_sdpa_backward_problem.cuh"
#include "gated_sdpa_scores.cuh"
#include "gated_sdpa_values.cuh"

namespace nsk::cuda {

enum class Wanted { both, key, value };

template <class T, int kD, int kDv, Wanted kWanted>
struct GatedSdpaKeyTiles {
  static constexpr bool kKey = kWanted != Wanted::value, kValue = kWanted != Wanted::key;
  static constexpr int kWidest = kD < kDv ? kDv : kD, kWidestBytes = kWidest * int(sizeof(T));
  static_assert(kWanted != Wanted::both || kKeyAndValueFit<T, kD, kDv>, "two launches");

  static constexpr int kWarps = kWidestBytes <= 512 ? 4 : kWidestBytes <= 768 ? 2 : 1;
  static constexpr int kThreads = 32 * kWarps, kKeys = 16 * kWarps;
  // Of the queries: as many as leave room for the sums in registers, and for two stages in shared memory.
  static constexpr int kSums = (kKey ? kD : 0) + (kValue ? kDv : 0);
  static constexpr bool kNarrow = kWidestBytes <= 160, kWide = kWidestBytes > (kKey ? 384 : 512);
  static constexpr int kRows = kNarrow ? 64 : kSums > 256 || kWide ? 16 : 32;

  // Shared memory: a warp's rows of k and, for dK, of v, for all warps; then stages of q, scaled and three numbers a
  // row.
  static constexpr int kKeyBytes = Tile<T, kKey ? kD : kWidest>::bytes(16);
  static constexpr int kWarpBytes = kKeyBytes + (kKey ? Tile<T, kDv>::bytes(16) : 0);
  static constexpr int kQueryBytes = Tile<T, kD>::bytes(kRows), kNumbersAt = kQueryBytes + Tile<T, kDv>::bytes(kRows);
  static constexpr int kStageBytes = kNumbersAt + 3 * 4 * kRows;
  // Last, for each stage, whether a warp has found numbers that are not finite: a word a warp.
  static constexpr int kFoundAt = kWarps * kWarpBytes + 2 * kStageBytes;
  static constexpr int kSharedBytes = kFoundAt + FoundByWarps<kWarps>::kBytes;
  static_assert(kSharedBytes <= 101376, "what a block may have on the smallest of devices");
};

template <class T, int kD, int kDv, bool kSoftcap, Mask kMask, Wanted kWanted>
struct GatedSdpaKeyGradients {
  using Tiles = GatedSdpaKeyTiles<T, kD, kDv, kWanted>;
  static constexpr int kRows = Tiles::kRows, kBlocks = kRows / 8;
  using Weights = float[kBlocks][4];  // 16 keys by kRows rows

  const GatedSdpaBackward<T>& g;
  const GatedSdpa<T>& p;
  const ScoreScale<kSoftcap, kMask> scale;
  const Shared<unsigned char> mine, stages;  // this warp's keys, and the block's rows
  const FoundByWarps<Tiles::kWarps> found;
  int lane;
  const int batch, head;  // head: of keys and values
  const Rows queries, keys;
  const Position position;

  __device__ __forceinline__ GatedSdpaKeyGradients(const GatedSdpaBackward<T>& problem, Shared<unsigned char> shared,
                                                   int b, int h)
      : g(problem),
        p(problem.forward),
        scale(p),
        mine(shared + int(threadIdx.x) / 32 * Tiles::kWarpBytes),
        stages(shared + Tiles::kWarps * Tiles::kWarpBytes),
        found{as<uint32_t>(shared + Tiles::kFoundAt)},
        lane(int(threadIdx.x) % 32),
        batch(b),
        head(h),
        queries(rows_of(p.cu_seqlens_q, b, p.seqlen_q)),
        keys(rows_of(p.cu_seqlens_k, b, p.seqlen_k)),
        position(PositionMask::make(queries.count, keys.count, p.is_causal, p.bottom_right, p.window_left,
                                    p.window_right)) {}

  __device__ __forceinline__ Shared<unsigned char> stage(int turn) const {
    return stages + turn % 2 * Tiles::kStageBytes;
  }
  __device__ __forceinline__ Shared<unsigned char> values() const { return mine + Tiles::kKeyBytes; }

  using QueryLoader = TileLoader<kRows, kD, Tiles::kThreads, T>;
  using ScaledLoader = TileLoader<kRows, kDv, Tiles::kThreads, T>;
  __device__ __forceinline__ QueryLoader query_loader(int of) const {
    return {p.query + p.query_stride.at(batch, of, queries.first), p.query_stride.row, queries.count,
            opaque(int(threadIdx.x))};
  }
  __device__ __forceinline__ ScaledLoader scaled_loader(int of) const {
    return {g.scaled + g.row_at(batch, of, queries) * kDv, kDv, queries.count, opaque(int(threadIdx.x))};
  }

  __device__ __forceinline__ void load_keys(int key0) const {
    const Global<const T> key = p.key + p.key_stride.at(batch, head, keys.first);
    TileLoader<16, kD, 32, T>(key, p.key_stride.row, keys.count, lane).load(mine, key0);
    if constexpr (Tiles::kKey) {
      const Global<const T> value = p.value + p.value_stride.at(batch, head, keys.first);
      TileLoader<16, kDv, 32, T>(value, p.value_stride.row, keys.count, lane).load(values(), key0);
    }
  }
  __device__ __forceinline__ void load_rows(int turn, int of, int row0) const {
    query_loader(of).load(stage(turn), row0);
    scaled_loader(of).load(stage(turn) + Tiles::kQueryBytes, row0);
    const int64_t at = g.row_at(batch, of, queries);
    load_numbers(g.norm + at, turn, 0, row0);
    if constexpr (Tiles::kKey) load_numbers(g.change + at, turn, 1, row0);
    if constexpr (kMask == Mask::floating) load_numbers(g.norm_low + at, turn, 2, row0);
  }
  // Other threads for each `which`, as far as there are.
  __device__ __forceinline__ void load_numbers(Global<const float> from, int turn, int which, int row0) const {
    const int row = (int(threadIdx.x) + (Tiles::kThreads - which * kRows)) % Tiles::kThreads;
    if (row >= kRows) return;
    const bool inside = row0 + row < queries.count;
    cp_async<4>(numbers(turn, which) + row, inside ? from + (row0 + row) : from, inside ? 4 : 0);
  }
  __device__ __forceinline__ Shared<float> numbers(int turn, int which) const {
    return as<float>(stage(turn) + Tiles::kNumbersAt) + which * kRows;
  }
  // Those of this lane's two rows in block n.
  __device__ __forceinline__ float2 numbers_of(int turn, int which, int n) const {
    return as<const float2>(numbers(turn, which))[4 * n + lane % 4];
  }

  // Keys `block_key` .. of the sequence.
  __device__ __forceinline__ void run(int block_key) {
    const int key0 = block_key + int(threadIdx.x) / 32 * 16;
    const int block_end = min(block_key + Tiles::kKeys, keys.count), key_end = min(key0 + 16, keys.count);
    const int begin = position.queries(block_key, queries.count).begin / kRows;
    const int end = (position.queries(block_end - 1, queries.count).end + kRows - 1) / kRows;
    const int group = p.heads_q / p.heads_kv, tiles = max(end - begin, 0), turns = group * tiles;
    if (turns > 0) {
      load_keys(key0);
      load_rows(0, head * group, begin * kRows);
    }
    cp_async_commit();

    float dk[Tiles::kKey ? kD / 8 : 1][4] = {}, dv[Tiles::kValue ? kDv / 8 : 1][4] = {};
    int of = head * group, tile = begin;
    for (int turn = 0; turn < turns; ++turn) {
      const int row0 = tile * kRows, row_end = row0 + kRows;
      const Position::Keys first = position.keys(row0), last = position.keys(row_end - 1);
      // Keys after the last one may be seen by any: nobody asks for their gradients.
      const bool inside = kMask == Mask::none && row_end <= queries.count;
      const bool block_whole = inside && block_key >= last.begin && block_end <= first.end;
      const bool whole = inside && key0 >= last.begin && key_end <= first.end;
      cp_async_wait<0>();
      if (!block_whole) look_for_infinities(turn, of);
      __syncthreads();
      const int this_head = of;
      if (++tile == end) {
        // In TF32 it is found again: at 256 columns a register for it would be one too many.
        tile = sizeof(T) == 4 ? position.queries(opaque(block_key), queries.count).begin / kRows : begin;
        ++of;
      }
      if (turn + 1 < turns) load_rows(turn + 1, of, tile * kRows);
      cp_async_commit();
      if (key0 >= last.end || key_end <= first.begin) continue;

      const Shared<unsigned char> query = stage(turn), scaled = query + Tiles::kQueryBytes;
      lane = opaque(lane);  // the places that depend on it are computed anew: kept, they would not all fit
      Weights weights = {}, ds = {};
      if constexpr (Tiles::kKey) multiply_tiles<T, kDv>(ds, values(), scaled, 0, lane);
      multiply_tiles<T, kD>(weights, mine, query, p.scale < 0 ? kSigns<T> : 0, lane);
      uint32_t hidden = 0;  // a bit a weight
      if (!whole) hidden = hide(this_head, row0, key0);
      if (whole)
        weigh<false>(weights, ds, hidden, turn, this_head, row0, key0);
      else
        weigh<true>(weights, ds, hidden, turn, this_head, row0, key0);
      const bool selects = !block_whole && !whole && found.any(turn);
      if constexpr (Tiles::kValue) add<kDv>(dv, weights, selects, hidden, scaled);
      if constexpr (Tiles::kKey) add<kD>(dk, ds, selects, hidden, query);
    }

    __syncwarp();  // all lanes have read k and v for the last time
    if constexpr (Tiles::kKey) put<kD>(mine, dk, p.scale);
    if constexpr (Tiles::kValue) put<kDv>(value_results(), dv, 1);
    __syncwarp();
    if constexpr (Tiles::kKey)
      store<kD>(g.grad_key + g.grad_key_stride.at(batch, head, keys.first), g.grad_key_stride.row, mine, key0);
    if constexpr (Tiles::kValue)
      store<kDv>(g.grad_value + g.grad_value_stride.at(batch, head, keys.first), g.grad_value_stride.row,
                 value_results(), key0);
  }
  __device__ __forceinline__ Shared<unsigned char> value_results() const { return Tiles::kKey ? values() : mine; }

  // Which of 16 keys and kRows rows do not see each other, by position and a boolean mask. As in the forward, masks are
  // not read where position hides.
  __device__ __forceinline__ uint32_t hide(int of, int row0, int key0) const {
    const int first_row = row0 + lane % 4 * 2;
    int64_t mask_at = mask_of(of, row0, key0);
    int begin[2], end[2];  // of the rows that see this lane's two keys, counted from its first one
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = key0 + lane / 4 + 8 * half;
      const Position::Keys seeing = position.queries(key, queries.count);
      begin[half] = seeing.begin - first_row, end[half] = key < keys.count ? seeing.end - first_row : 0;
    }
    uint32_t hidden = 0;
    // A loop: all places of the mask at once would take more registers than there are.
#pragma unroll kMask == Mask::boolean ? kBlocks / 2 : kBlocks
    for (int n = 0; n < kBlocks; ++n, mask_at += 8 * p.mask_stride.row) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * n + e % 2;
        bool hides = row < begin[e / 2] || row >= end[e / 2];
        if constexpr (kMask == Mask::boolean) {
          if (!hides) {
            const int64_t at = mask_at + p.mask_stride.row * (e % 2) + p.mask_stride_key * (e / 2 * 8);
            const unsigned char sees = p.mask.data[at];
            hides = !sees;
          }
        }
        hidden |= uint32_t(hides) << (4 * n + e);
      }
    }
    return hidden;
  }

  // Where the mask has this lane's first row and key.
  __device__ __forceinline__ int64_t mask_of(int of, int row0, int key0) const {
    return p.mask_stride.at(batch, of, row0 + lane % 4 * 2) + p.mask_stride_key * (key0 + lane / 4);
  }

  // From products q.k to P, and from scaled.v to dS, element by element: nothing but the two is there for all of them.
  // Both are 0 where key and row do not see each other; a floating mask's -inf join the bits of `hidden`.
  template <bool kHides>
  __device__ __forceinline__ void weigh(Weights& s, Weights& ds, uint32_t& hidden, int turn, int of, int row0,
                                        int key0) const {
    int64_t mask_at = mask_of(of, row0, key0);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n, mask_at += 8 * p.mask_stride.row) {
      const float2 norms = numbers_of(turn, 0, n);
      float2 changes{0, 0}, lows{0, 0};
      if constexpr (Tiles::kKey) changes = numbers_of(turn, 1, n);
      if constexpr (kMask == Mask::floating) lows = numbers_of(turn, 2, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float norm = e % 2 ? norms.y : norms.x, change = e % 2 ? changes.y : changes.x;
        float x = s[n][e], slope = 1;
        if constexpr (kSoftcap) {
          const float t = tanh_by_exp2(x * scale.products);
          x = t * scale.cap, slope = 1.0f - t * t;
        } else {
          x = scale.apply(x);
        }
        bool hides = kHides && (hidden >> (4 * n + e) & 1);
        if constexpr (kMask == Mask::floating) {
          if (!hides) {
            const float bias = p.mask[mask_at + p.mask_stride.row * (e % 2) + p.mask_stride_key * (e / 2 * 8)];
            hides = bias == minus_infinity();
            hidden |= uint32_t(hides) << (4 * n + e);
            x += bias * kLog2e;
          }
        }
        x = x * scale.softmax - norm;
        if constexpr (kMask == Mask::floating) x -= e % 2 ? lows.y : lows.x;  // the norm is in two parts
        const float weight = exp2_approx(x);
        s[n][e] = hides ? 0 : weight;
        if constexpr (Tiles::kKey) ds[n][e] = hides ? 0 : weight * (ds[n][e] - change) * slope;
      }
    }
  }

  template <int kColumns>
  __device__ __forceinline__ void add(float (&to)[kColumns / 8][4], const Weights& weights, bool selects,
                                      uint32_t hidden, Shared<unsigned char> rows) const {
    if (selects)
      add_seen_values<T, kColumns>(to, weights, hidden, rows, lane);
    else
      add_values<T, false, kColumns>(to, weights, rows, lane);
  }

  // Before the barrier each thread looks through what it copied, after it all know what all have found.
  __device__ __forceinline__ void look_for_infinities(int turn, int of) const {
    const auto bad = [](uint4 piece) { return not_finite<T>(piece); };
    bool mine = false;
    if constexpr (Tiles::kKey) mine |= query_loader(of).any(stage(turn), bad);
    if constexpr (Tiles::kValue) mine |= scaled_loader(of).any(stage(turn) + Tiles::kQueryBytes, bad);
    found.leave(turn, mine);
  }

  // Rounded sums into a tile, and from there into the gradient.
  template <int kColumns>
  __device__ __forceinline__ void put(Shared<unsigned char> tile, const float (&sums)[kColumns / 8][4],
                                      float factor) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const Shared<Pair<T>> pair = as<Pair<T>>(tile + Tile<T, kColumns>::pair_at(lane / 4 + 8 * half, n, lane));
        pair[0] = pack_pair<T>(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
      }
  }
  template <int kColumns>
  __device__ __forceinline__ void store(Global<T> to, int64_t stride, Shared<unsigned char> tile, int key0) const {
    constexpr int kPieces = Tile<T, kColumns>::kPieces;
#pragma unroll
    for (int i = 0; i < 16 * kPieces / 32; ++i) {
      const int index = i * 32 + lane, row = index / kPieces, piece = index % kPieces;
      if (key0 + row >= keys.count) continue;
      const uint4 value = as<const uint4>(tile + Tile<T, kColumns>::at(row, piece))[0];
      as<uint4>(to + (key0 + row) * stride)[piece] = value;
    }
  }
};

// Places of tiles of keys: as row_tiles, of the keys.
template <int kKeys, class T>
__host__ __device__ inline int key_tiles(const GatedSdpa<T>& p) {
  return p.cu_seqlens_k ? p.seqlen_k / kKeys + p.batch : (p.seqlen_k + kKeys - 1) / kKeys;
}
template <int kKeys, class T>
__host__ __device__ inline int64_t gated_sdpa_key_blocks(const GatedSdpa<T>& p) {
  return int64_t(key_tiles<kKeys>(p)) * p.heads_kv * (p.cu_seqlens_k ? 1 : p.batch);
}

// A grid of gated_sdpa_key_blocks(...) blocks, with Tiles::kSharedBytes of dynamic shared memory. Neighbouring blocks
// are of one head and share its rows; the first keys, which most rows see under a causal mask, come first.
// To the bound of one block: else the compiler may settle for fewer registers, and spill.
template <class T, int kD, int kDv, bool kSoftcap, Mask kMask, Wanted kWanted>
__global__ void __launch_bounds__(GatedSdpaKeyTiles<T, kD, kDv, kWanted>::kThreads, 1)
    gated_sdpa_dkdv(const __grid_constant__ GatedSdpaBackward<T> g) {
  using Tiles = GatedSdpaKeyTiles<T, kD, kDv, kWanted>;
  NSK_DYNAMIC_SHARED(shared);
  const GatedSdpa<T>& p = g.forward;
  const int tiles = key_tiles<Tiles::kKeys>(p), of = int(blockIdx.x) / tiles, place = int(blockIdx.x) % tiles;
  const RowTile tile = p.cu_seqlens_k ? packed_tile<Tiles::kKeys>(p.cu_seqlens_k, p.batch, p.seqlen_k, of, place)
                                      : RowTile{of / p.heads_kv, of % p.heads_kv, place * Tiles::kKeys};
  GatedSdpaKeyGradients<T, kD, kDv, kSoftcap, kMask, kWanted> block(g, shared, tile.batch, tile.head);
  if (tile.row < block.keys.count) block.run(tile.row);
}

}  // namespace nsk::cuda
