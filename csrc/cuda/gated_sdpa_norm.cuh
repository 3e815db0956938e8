// What a floating mask makes of a row's normalisation, in two parts, of which a backward pass has
//
//   P_ij = exp2(s_ij - norm_i - low_i),   norm_i = max_j s_ij,   low_i = log2 sum_j exp2(s_ij - norm_i)
//
// with the scores s in units of log2, their mask included. A mask may lift or lower all scores of a row so far that the
// row's lse, one float, has lost the sum: at 1e38 neighbouring floats are 1e31 apart.
//
// The tiles, stages and turns are those of gated_sdpa_forward, without values: a block of four warps takes 64 rows of
// one head, each warp 16 of them, and tiles of keys come through cp.async in two stages.
#pragma once

#include "gated_sdpa_backward_problem.cuh"
#include "gated_sdpa_scores.cuh"
#include "tile.cuh"

namespace nsk::cuda {

template <class T, int kD>
struct GatedSdpaNormTiles {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kBytes = kD * int(sizeof(T)), kKeys = kBytes <= 256 ? 64 : kBytes <= 768 ? 32 : 16;
  static constexpr bool kQueryInRegisters = kBytes <= 256;

  // Shared memory: a warp's rows of the query, for all warps; then two stages of keys.
  static constexpr int kWarpBytes = Tile<T, kD>::bytes(16), kStageBytes = Tile<T, kD>::bytes(kKeys);
  static constexpr int kSharedBytes = kWarps * kWarpBytes + 2 * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

// A grid of gated_sdpa_blocks<kRows>(p.forward) blocks, with Tiles::kSharedBytes of dynamic shared memory.
template <class T, int kD, bool kSoftcap>
__global__ void __launch_bounds__(GatedSdpaNormTiles<T, kD>::kThreads, 2)
    gated_sdpa_norm(const __grid_constant__ GatedSdpaBackward<T> backward) {
  using Tiles = GatedSdpaNormTiles<T, kD>;
  constexpr int kKeys = Tiles::kKeys, kBlocks = kKeys / 8;
  NSK_DYNAMIC_SHARED(shared);
  const GatedSdpa<T>& p = backward.forward;
  const RowTile tile_of_rows = row_tile<Tiles::kRows>(p);
  const int batch = tile_of_rows.batch, head = tile_of_rows.head, block_row = tile_of_rows.row;
  const Rows queries = rows_of(p.cu_seqlens_q, batch, p.seqlen_q), keys = rows_of(p.cu_seqlens_k, batch, p.seqlen_k);
  if (block_row >= queries.count) return;
  const int this_lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, row0 = block_row + 16 * warp;
  const Position position(PositionMask::make(queries.count, keys.count, p.is_causal, p.bottom_right, p.window_left,
                                             p.window_right));
  const ScoreScale<kSoftcap, Mask::floating> scale(p);

  const Position::Keys block_first = position.keys(block_row);
  const Position::Keys block_last = position.keys(min(block_row + Tiles::kRows, queries.count) - 1);
  const Position::Keys first = position.keys(row0), last = position.keys(row0 + 15);
  const int begin = block_first.begin / kKeys;
  const int end = block_first.begin < block_last.end ? (block_last.end + kKeys - 1) / kKeys : begin;

  const Shared<unsigned char> mine = shared + warp * Tiles::kWarpBytes;
  const Shared<unsigned char> stages = shared + Tiles::kWarps * Tiles::kWarpBytes;
  const auto stage = [&](int tile) { return stages + tile % 2 * Tiles::kStageBytes; };
  TileLoader<16, kD, 32, T>(p.query + p.query_stride.at(batch, head, queries.first), p.query_stride.row, queries.count,
                            this_lane)
      .load(mine, row0);
  const TileLoader<kKeys, kD, Tiles::kThreads, T> key(
      p.key + p.key_stride.at(batch, head / (p.heads_q / p.heads_kv), keys.first), p.key_stride.row, keys.count,
      int(threadIdx.x));
  if (begin < end) key.load(stage(begin), begin * kKeys);
  cp_async_commit();

  // A negative scale is the query's sign, as in gated_sdpa_forward.
  const uint32_t sign = p.scale < 0 ? kSigns<T> : 0;
  uint32_t q[Tiles::kQueryInRegisters ? Tile<T, kD>::kSteps : 1][4];
  OnlineSoftmax softmax;
  unsigned sees = 0;
  for (int tile = begin; tile < end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < end) key.load(stage(tile + 1), (tile + 1) * kKeys);
    cp_async_commit();
    if constexpr (Tiles::kQueryInRegisters) {
      if (tile == begin) load_rows<T, kD>(q, mine, sign, this_lane);
    }
    const int lane = opaque(this_lane);  // as in gated_sdpa_forward
    const int key0 = tile * kKeys;
    if (key0 >= last.end || key0 + kKeys <= first.begin) continue;

    float s[kBlocks][4] = {};
    if constexpr (Tiles::kQueryInRegisters)
      multiply_tiles<T, kD>(s, q, stage(tile), lane);
    else
      multiply_tiles<T, kD>(s, mine, stage(tile), sign, lane);
#pragma unroll
    for (auto& block : s)
#pragma unroll
      for (float& score : block) score = scale.apply(score);
    sees |= hide<Mask::floating>(s, p, position, batch, head, row0, queries.count, key0, lane);
    float correction[2];
    softmax.template weigh<false>(s, scale.softmax, correction);
  }
  softmax.finish();

  // With a norm of +inf every weight is 0. A row that sees only scores of -inf keeps -inf, which makes them NaN.
  const int64_t at = backward.row_at(batch, head, queries);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + this_lane / 4 + 8 * half;
    const unsigned of_lanes = __ballot_sync(0xffffffffu, (sees >> half & 1) != 0);
    const bool alive = (of_lanes >> (this_lane / 4 * 4) & 15) != 0;
    if (this_lane % 4 != 0 || row >= queries.count) continue;
    backward.norm[at + row] = alive ? softmax.top[half] : -minus_infinity();
    backward.norm_low[at + row] = alive ? log2_approx(softmax.sum[half]) : 0.0f;
  }
}

}  // namespace nsk::cuda
