// The query's gradient of gated attention on tensor cores, from what the row-wise launch left (gated_sdpa_rows.cuh):
//
//   s_ij  = scale q_i.k_j;  softcap * tanh(s_ij / softcap);  + mask_ij          over the keys j that row i sees
//   P_ij  = exp2(s_ij - norm_i)                         in units of log2; under a floating mask s - norm - norm_low
//   dS_ij = P_ij (scaled_i.v_j - change_i),  with a softcap times 1 - tanh^2
//   dQ_i  = scale sum_j dS_ij k_j
//
// It goes as the forward does: a block of four warps computes 64 rows of one head, each warp 16 of them and all columns
// of dQ, and keys and values come through cp.async in tiles, two stages of each, with one barrier a turn:
//
//   wait, barrier    tile t has arrived, as far as each thread copied it, and all have left tile t - 1
//   issue t + 1      over tile t - 1
//   s = q k^T        and from it P (1 - tanh^2), in place
//   d = dO v^T       it begins with -change
//   dQ += (P d) k    the same tile of keys, now transposed
//
// Scores and their gradients never leave the registers they are computed in, those of 32 keys at a time. A tile has 64
// keys, or 32, and 16 where heads are so wide that no more fits into 99 KB beside q and dO. These are copied once, and
// taken into registers where there are enough. In the end the warp's rows of q receive dQ, so that it leaves in whole
// pieces of 16 bytes.
//
// What a row does not see must not reach it even as 0 times infinity. A hidden key's P and dS are selected to be -0, by
// which they are known, and no other one is -0. Tiles that are not seen whole are looked through for keys that are not
// finite; only where there are some does the last product take a longer way. Values need none of that: a product of
// theirs has one key and one row, and is selected away with it.
#pragma once

#include "gated_sdpa_backward_problem.cuh"
#include "gated_sdpa_scores.cuh"
#include "gated_sdpa_values.cuh"

namespace nsk::cuda {

template <class T, int kD, int kDv>
struct GatedSdpaDqTiles {
  static constexpr int kWidest = kD < kDv ? kDv : kD, kWidestBytes = kWidest * int(sizeof(T));
  static constexpr int kWarps = kWidestBytes <= 512 ? 4 : kWidestBytes <= 768 ? 2 : 1;
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kKeys = kWidestBytes <= 192 ? 64 : kWidestBytes <= 384 ? 32 : 16;
  static constexpr int kPart = kKeys < 32 ? kKeys : 32;
  // At 64 columns of a half type the registers of q and dO are better spent on a third block.
  static constexpr int kBlocksPerUnit = kWidestBytes <= 128 ? 3 : 2;
  static constexpr bool kRowsInRegisters = kWidestBytes > 128 && kWidestBytes <= 256;

  // Shared memory: for all warps their rows of q, later of dQ, and of dO; then stages of keys and values.
  static constexpr int kQueryBytes = Tile<T, kD>::bytes(16), kWarpBytes = kQueryBytes + Tile<T, kDv>::bytes(16);
  static constexpr int kKeyBytes = Tile<T, kD>::bytes(kKeys), kStageBytes = kKeyBytes + Tile<T, kDv>::bytes(kKeys);
  // Last, for each stage, whether a warp has found keys that are not finite: a word a warp.
  static constexpr int kFoundAt = kWarps * kWarpBytes + 2 * kStageBytes;
  static constexpr int kSharedBytes = kFoundAt + FoundByWarps<kWarps>::kBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
struct GatedSdpaDq {
  using Tiles = GatedSdpaDqTiles<T, kD, kDv>;
  static constexpr int kKeys = Tiles::kKeys, kPart = Tiles::kPart, kBlocks = kPart / 8;
  static constexpr uint32_t kHidden = 0x80000000u;  // the bits of -0

  const GatedSdpaBackward<T>& p;
  const GatedSdpa<T>& f;
  const ScoreScale<kSoftcap, kMask> scale;
  const Shared<unsigned char> mine, stages;  // this warp's rows, and the block's keys and values
  const FoundByWarps<Tiles::kWarps> found;
  const int lane, batch, head;
  const Rows queries, keys;
  const Position position;

  __device__ __forceinline__ GatedSdpaDq(const GatedSdpaBackward<T>& problem, Shared<unsigned char> shared, int b,
                                         int h)
      : p(problem),
        f(problem.forward),
        scale(problem.forward),
        mine(shared + int(threadIdx.x) / 32 * Tiles::kWarpBytes),
        stages(shared + Tiles::kWarps * Tiles::kWarpBytes),
        found{as<uint32_t>(shared + Tiles::kFoundAt)},
        lane(int(threadIdx.x) % 32),
        batch(b),
        head(h),
        queries(rows_of(f.cu_seqlens_q, b, f.seqlen_q)),
        keys(rows_of(f.cu_seqlens_k, b, f.seqlen_k)),
        position(PositionMask::make(queries.count, keys.count, f.is_causal, f.bottom_right, f.window_left,
                                    f.window_right)) {}

  __device__ __forceinline__ Shared<unsigned char> stage(int tile) const {
    return stages + tile % 2 * Tiles::kStageBytes;
  }
  __device__ __forceinline__ int kv_head() const { return head / (f.heads_q / f.heads_kv); }

  using KeyLoader = TileLoader<kKeys, kD, Tiles::kThreads, T>;
  using ValueLoader = TileLoader<kKeys, kDv, Tiles::kThreads, T>;
  __device__ __forceinline__ KeyLoader key_loader() const {
    return {f.key + f.key_stride.at(batch, kv_head(), keys.first), f.key_stride.row, keys.count, int(threadIdx.x)};
  }
  __device__ __forceinline__ ValueLoader value_loader() const {
    return {f.value + f.value_stride.at(batch, kv_head(), keys.first), f.value_stride.row, keys.count,
            int(threadIdx.x)};
  }

  // A negative scale is the query's sign, as in the forward.
  __device__ __forceinline__ uint32_t sign() const { return f.scale < 0 ? kSigns<T> : 0; }

  // The numbers of the lane's two rows. Rows beyond the last have no weights.
  struct RowNumbers {
    float norm[2], low[2], change[2];
  };
  __device__ __forceinline__ RowNumbers row_numbers(int row0) const {
    RowNumbers numbers;
    const int64_t at = p.row_at(batch, head, queries);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      numbers.norm[half] = -minus_infinity(), numbers.low[half] = numbers.change[half] = 0;
      if (row >= queries.count) continue;
      numbers.norm[half] = p.norm[at + row];
      numbers.change[half] = p.change[at + row];
      if constexpr (kMask == Mask::floating) numbers.low[half] = p.norm_low[at + row];
    }
    return numbers;
  }

  // Rows `block_row` .. of the sequence.
  __device__ __forceinline__ void run(int block_row) const {
    const int row0 = block_row + int(threadIdx.x) / 32 * 16;
    const Position::Keys block_first = position.keys(block_row);
    const Position::Keys block_last = position.keys(min(block_row + Tiles::kRows, queries.count) - 1);
    const Position::Keys first = position.keys(row0), last = position.keys(row0 + 15);
    const int begin = block_first.begin / kKeys, end = (block_last.end + kKeys - 1) / kKeys;
    float grad[kD / 8][4] = {};
    if (block_first.begin >= block_last.end) return store(grad, row0);

    const Global<const T> query = f.query + f.query_stride.at(batch, head, queries.first);
    TileLoader<16, kD, 32, T>(query, f.query_stride.row, queries.count, lane).load(mine, row0);
    const Global<const T> dout = p.scaled + p.row_at(batch, head, queries) * kDv;
    TileLoader<16, kDv, 32, T>(dout, kDv, queries.count, lane).load(mine + Tiles::kQueryBytes, row0);
    const KeyLoader key = key_loader();
    const ValueLoader value = value_loader();
    const auto load_keys = [&](int tile) {
      key.load(stage(tile), tile * kKeys);
      value.load(stage(tile) + Tiles::kKeyBytes, tile * kKeys);
    };
    uint32_t q[Tiles::kRowsInRegisters ? Tile<T, kD>::kSteps : 1][4];
    uint32_t d[Tiles::kRowsInRegisters ? Tile<T, kDv>::kSteps : 1][4];
    if constexpr (Tiles::kRowsInRegisters) {
      cp_async_commit();
      load_keys(begin);
      cp_async_wait<0>();  // the keys' group is not committed yet: it goes on
      __syncwarp();
      load_rows<T, kD>(q, mine, sign(), lane);
      load_rows<T, kDv>(d, mine + Tiles::kQueryBytes, 0, lane);
    } else {
      load_keys(begin);
    }
    cp_async_commit();
    const RowNumbers numbers = row_numbers(row0);

    for (int tile = begin; tile < end; ++tile) {
      const bool block_whole = kMask == Mask::none && tile * kKeys >= block_last.begin &&
                               (tile + 1) * kKeys <= block_first.end;
      cp_async_wait<0>();
      if (!block_whole) look_for_infinities(key, tile);
      __syncthreads();
      if (tile + 1 < end) load_keys(tile + 1);
      cp_async_commit();
#pragma unroll 1
      for (int part = 0; part < kKeys; part += kPart) {
        const int lane = sizeof(T) == 4 ? opaque(this->lane) : this->lane;  // as in gated_sdpa_forward
        const int key0 = tile * kKeys + part;
        if (key0 >= last.end || key0 + kPart <= first.begin) continue;
        const Shared<unsigned char> k = stage(tile) + Tile<T, kD>::bytes(part);
        const Shared<unsigned char> v = stage(tile) + Tiles::kKeyBytes + Tile<T, kDv>::bytes(part);

        float s[kBlocks][4] = {};
        if constexpr (Tiles::kRowsInRegisters)
          multiply_tiles<T, kD>(s, q, k, lane);
        else
          multiply_tiles<T, kD>(s, mine, k, sign(), lane);
        const bool whole = kMask == Mask::none && key0 >= last.begin && key0 + kPart <= first.end;
        if (whole)
          weigh<false>(s, numbers, row0, key0);
        else
          weigh<true>(s, numbers, row0, key0);

        float dp[kBlocks][4];
#pragma unroll
        for (auto& block : dp)
#pragma unroll
          for (int e = 0; e < 4; ++e) block[e] = -numbers.change[e / 2];
        if constexpr (Tiles::kRowsInRegisters)
          multiply_tiles<T, kDv>(dp, d, v, lane);
        else
          multiply_tiles<T, kDv>(dp, mine + Tiles::kQueryBytes, v, 0, lane);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float x = s[n][e] * dp[n][e];
            if (whole)
              s[n][e] = x;
            else if (__float_as_uint(s[n][e]) != kHidden)
              s[n][e] = x == 0 ? 0 : x;
          }
        if (!block_whole && !whole && found.any(tile))
          add_seen_values<T, kD>(grad, s, k, lane);
        else
          add_values<T, false, kD>(grad, s, k, lane);
      }
    }
    if constexpr (!Tiles::kRowsInRegisters) __syncwarp();  // all lanes have read the query for the last time
    store(grad, row0);
  }

  // From products q.k to P, with a softcap P (1 - tanh^2); of keys that a row does not see to -0.
  template <bool kSelects>
  __device__ __forceinline__ void weigh(float (&s)[kBlocks][4], const RowNumbers& numbers, int row0, int key0) const {
    float slope[kSoftcap ? kBlocks : 1][4];
    if constexpr (kSoftcap) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float t = tanh_by_exp2(s[n][e] * scale.products);
          s[n][e] = scale.cap * t, slope[n][e] = max(1.0f - t * t, 0.0f);
        }
    } else if constexpr (kMask == Mask::floating) {
#pragma unroll
      for (auto& block : s)
#pragma unroll
        for (float& score : block) score = scale.apply(score);
    }
    if constexpr (kSelects) {
      // A key that is seen but infinitely far away is not a hidden one: what it holds is felt.
#pragma unroll
      for (auto& block : s)
#pragma unroll
        for (float& score : block) score = score == minus_infinity() ? kLowest : score;
      hide<kMask>(s, f, position, batch, head, row0, queries.count, key0, opaque(lane));
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float weight = exp2_approx(kMask == Mask::floating ? s[n][e] - numbers.norm[e / 2] - numbers.low[e / 2]
                                                           : s[n][e] * scale.softmax - numbers.norm[e / 2]);
        if constexpr (kSoftcap) weight *= slope[n][e];
        s[n][e] = kSelects && s[n][e] == minus_infinity() ? -0.0f : weight;
      }
  }

  // Before the barrier each thread looks through the keys that it copied, after it all know what all have found.
  __device__ __forceinline__ void look_for_infinities(const KeyLoader& key, int tile) const {
    const bool mine = key.any(stage(tile), [](uint4 piece) { return not_finite<T>(piece); });
    found.leave(tile, mine);
  }

  // Over the warp's rows of q, which nobody reads any more.
  __device__ __forceinline__ void store(const float (&grad)[kD / 8][4], int row0) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        const Shared<Pair<T>> pair = as<Pair<T>>(mine + Tile<T, kD>::pair_at(lane / 4 + 8 * half, n, lane));
        pair[0] = pack_pair<T>(grad[n][2 * half] * f.scale, grad[n][2 * half + 1] * f.scale);
      }
    __syncwarp();
    const Global<T> to = p.grad_query + p.grad_query_stride.at(batch, head, queries.first);
    constexpr int kPieces = Tile<T, kD>::kPieces;
    // The places are those of the query's copies: where registers are short they are computed again.
    const int first = Tiles::kRowsInRegisters ? lane : opaque(lane);
#pragma unroll
    for (int i = 0; i < 16 * kPieces / 32; ++i) {
      const int index = i * 32 + first, row = index / kPieces, piece = index % kPieces;
      if (row0 + row >= queries.count) continue;
      const uint4 value = as<const uint4>(mine + Tile<T, kD>::at(row, piece))[0];
      as<uint4>(to + (row0 + row) * p.grad_query_stride.row)[piece] = value;
    }
  }
};

// A grid of gated_sdpa_blocks<Tiles::kRows>(...) blocks, with Tiles::kSharedBytes of dynamic shared memory.
template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
__global__ void
    __launch_bounds__(GatedSdpaDqTiles<T, kD, kDv>::kThreads, GatedSdpaDqTiles<T, kD, kDv>::kBlocksPerUnit)
        gated_sdpa_dq(const __grid_constant__ GatedSdpaBackward<T> p) {
  using Tiles = GatedSdpaDqTiles<T, kD, kDv>;
  NSK_DYNAMIC_SHARED(shared);
  const RowTile tile = row_tile<Tiles::kRows>(p.forward);
  const GatedSdpaDq<T, kD, kDv, kSoftcap, kMask> block(p, shared, tile.batch, tile.head);
  if (tile.row < block.queries.count) block.run(tile.row);
}

}  // namespace nsk::cuda
