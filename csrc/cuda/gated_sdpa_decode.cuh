// Forward of gated attention for few queries over many keys: the keys are split into parts, one a block, and a second
// kernel joins the parts. With the scores s_ij of gated_sdpa_forward, in units of log2,
//
//   top_i = max_j s_ij,   sum_i = sum_j exp2(s_ij - top_i),   out_i = sum_j exp2(s_ij - top_i) v_j
//
// over the keys j of a part that row i sees, and over all parts
//
//   out_i = sigmoid(gate_i) * sum_part w out_i / (sum_part w sum_i + exp2(sink - top)),   w = exp2(top_i - top).
//
// The queries of all heads that share a KV head lie in one tile of 16 rows, so that keys and values are read once for
// all of them: row r is query r % Sq of the group's head r / Sq. Where there are more than 16 such rows there are more
// tiles, whose blocks are neighbours and find the keys in the second-level cache.
//
// What takes time is to read keys and values. So every warp of a block works on its own: it takes each kWarps-th tile
// of 16 keys (32 where heads are narrow) of its block's part, through cp.async in two stages that no other warp
// touches. A turn is as in gated_sdpa_forward, with __syncwarp for its barrier. Warps meet twice, when the query has
// arrived, which they share, and at the end, when each has left out, top and sum in place of its stages: then all
// threads join those, in order of the warps, and write the part's.
//
// Parts are of the keys that position lets some row of the tile see, so that a window leaves none of them without work.
// A part that sees nothing of a row has top = -inf and sum = 0 there, and its out is not written; one that sees only
// scores of -inf has sum = 1, by which the row is told from one that sees nothing.
#pragma once

#include "gated_sdpa_scores.cuh"
#include "gated_sdpa_values.cuh"

namespace nsk::cuda {

// Dense calls only. The scratch is dense: [part, batch, head, row, Dv] and [part, batch, head, row]; part_out begins at
// a multiple of 16 bytes.
template <class T>
struct GatedSdpaDecode {
  GatedSdpa<T> forward;
  int parts;
  Global<float> part_out, part_top, part_sum;

  // Rows that share a KV head, and tiles of them.
  __host__ __device__ int group_rows() const { return forward.heads_q / forward.heads_kv * forward.seqlen_q; }
  __host__ __device__ int row_tiles() const { return (group_rows() + 15) / 16; }
  __host__ __device__ int64_t rows() const { return int64_t(forward.batch) * forward.heads_q * forward.seqlen_q; }
  // Blocks in the grid.
  __host__ __device__ int64_t blocks() const {
    return int64_t(forward.batch) * forward.heads_kv * row_tiles() * parts;
  }
  __device__ __forceinline__ int64_t row_at(int batch, int head, int row) const {
    return (int64_t(batch) * forward.heads_q + head) * forward.seqlen_q + row;
  }
};

template <class T, int kD, int kDv>
struct GatedSdpaDecodeTiles {
  static constexpr int kWidest = kD < kDv ? kDv : kD, kWidestBytes = kWidest * int(sizeof(T));
  static constexpr int kWarps = kWidestBytes <= 256 ? 4 : kWidestBytes <= 512 ? 2 : 1;
  static constexpr int kThreads = 32 * kWarps, kRows = 16;
  static constexpr int kKeys = kWidestBytes <= 128 ? 32 : 16;
  static constexpr bool kQueryInRegisters = kWidestBytes <= 256;

  // Shared memory: the query's tile, then two stages of keys and values for each warp.
  static constexpr int kQueryBytes = Tile<T, kD>::bytes(kRows), kKeyBytes = Tile<T, kD>::bytes(kKeys);
  static constexpr int kStageBytes = kKeyBytes + Tile<T, kDv>::bytes(kKeys), kWarpBytes = 2 * kStageBytes;
  static constexpr int kSharedBytes = kQueryBytes + kWarps * kWarpBytes;

  // What a warp leaves in place of its stages: rows of out, of which eight begin in different banks; tops; sums.
  static constexpr int kOutRow = kDv + 8, kTopAt = kRows * kOutRow, kSumAt = kTopAt + kRows;
  static_assert(4 * (kSumAt + kRows) <= kWarpBytes);
};

template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
struct GatedSdpaDecodeBlock {
  using Tiles = GatedSdpaDecodeTiles<T, kD, kDv>;
  static constexpr int kKeys = Tiles::kKeys, kBlocks = kKeys / 8, kWarps = Tiles::kWarps;

  const GatedSdpaDecode<T>& decode;
  const GatedSdpa<T>& p;
  const ScoreScale<kSoftcap, kMask> scale;
  const Shared<unsigned char> query, mine;  // the block's, and this warp's stages
  const int lane, warp, batch, kv_head, row0, part;
  const Position position;

  __device__ __forceinline__ GatedSdpaDecodeBlock(const GatedSdpaDecode<T>& problem, Shared<unsigned char> shared,
                                                  int b, int h, int tile, int of_keys)
      : decode(problem),
        p(problem.forward),
        scale(problem.forward),
        query(shared),
        mine(shared + Tiles::kQueryBytes + int(threadIdx.x) / 32 * Tiles::kWarpBytes),
        lane(int(threadIdx.x) % 32),
        warp(int(threadIdx.x) / 32),
        batch(b),
        kv_head(h),
        row0(tile * Tiles::kRows),
        part(of_keys),
        position(PositionMask::make(p.seqlen_q, p.seqlen_k, p.is_causal, p.bottom_right, p.window_left,
                                    p.window_right)) {}

  struct Row {
    int head, query;
    bool exists;
  };
  __device__ __forceinline__ Row row(int r) const {
    const int group = p.heads_q / p.heads_kv, of_group = min(row0 + r, decode.group_rows() - 1);
    return {kv_head * group + of_group / p.seqlen_q, of_group % p.seqlen_q, row0 + r < decode.group_rows()};
  }

  __device__ __forceinline__ void load_query_tile() const {
    constexpr int kPieces = Tile<T, kD>::kPieces;
#pragma unroll
    for (int i = 0; i < (Tiles::kRows * kPieces + Tiles::kThreads - 1) / Tiles::kThreads; ++i) {
      const int index = i * Tiles::kThreads + int(threadIdx.x), r = index / kPieces, piece = index % kPieces;
      if (r >= Tiles::kRows) break;
      const Row from = row(r);
      const int64_t at = p.query_stride.at(batch, from.head, from.query) + Tile<T, kD>::kOfPiece * piece;
      cp_async<16>(query + Tile<T, kD>::at(r, piece), p.query + at, from.exists ? 16 : 0);
    }
  }

  // A negative scale is the query's sign, as in gated_sdpa_forward.
  __device__ __forceinline__ uint32_t sign() const { return p.scale < 0 ? kSigns<T> : 0; }

  __device__ __forceinline__ void run() const {
    // The rows' queries lie in one interval, or, with several heads, may be any.
    const int last_row = min(row0 + Tiles::kRows, decode.group_rows()) - 1;
    const bool one_head = row0 / p.seqlen_q == last_row / p.seqlen_q;
    const Position::Keys first = position.keys(one_head ? row0 % p.seqlen_q : 0);
    const Position::Keys last = position.keys(one_head ? last_row % p.seqlen_q : p.seqlen_q - 1);
    const int tiles_begin = first.begin / kKeys;
    const int tiles = first.begin < last.end ? (last.end + kKeys - 1) / kKeys - tiles_begin : 0;
    const int share = (tiles + decode.parts - 1) / decode.parts;
    const int begin = tiles_begin + min(part * share, tiles), end = tiles_begin + min((part + 1) * share, tiles);

    const TileLoader<kKeys, kD, 32, T> key(p.key + p.key_stride.at(batch, kv_head, 0), p.key_stride.row, p.seqlen_k,
                                           lane);
    const TileLoader<kKeys, kDv, 32, T> value(p.value + p.value_stride.at(batch, kv_head, 0), p.value_stride.row,
                                              p.seqlen_k, lane);
    const auto load_keys = [&](Shared<unsigned char> stage, int tile) {
      key.load(stage, tile * kKeys);
      value.load(stage + Tiles::kKeyBytes, tile * kKeys);
    };
    load_query_tile();
    cp_async_commit();
    if (begin + warp < end) load_keys(mine, begin + warp);
    cp_async_commit();
    cp_async_wait<1>();  // the query's group
    __syncthreads();
    uint32_t q[Tiles::kQueryInRegisters ? Tile<T, kD>::kSteps : 1][4];
    if constexpr (Tiles::kQueryInRegisters) load_rows<T, kD>(q, query, sign(), lane);

    const Row rows[2] = {row(lane / 4), row(lane / 4 + 8)};
    float out[kDv / 8][4] = {};
    OnlineSoftmax softmax;
    bool sees[2] = {};
    int turn = 0;
    for (int tile = begin + warp; tile < end; tile += kWarps, turn ^= 1) {
      const Shared<unsigned char> stage = mine + turn * Tiles::kStageBytes, values = stage + Tiles::kKeyBytes;
      const int lane = sizeof(T) == 4 ? opaque(this->lane) : this->lane;  // as in gated_sdpa_forward
      const int key0 = tile * kKeys;
      const bool whole = kMask == Mask::none && key0 >= last.begin && key0 + kKeys <= first.end;
      cp_async_wait<0>();
      bool infinities = false;  // among the values that this lane copied
      if (!whole) infinities = value.any(values, [](uint4 piece) { return not_finite<T>(piece); });
      __syncwarp();
      if (tile + kWarps < end) load_keys(mine + (turn ^ 1) * Tiles::kStageBytes, tile + kWarps);
      cp_async_commit();

      float s[kBlocks][4] = {};
      if constexpr (Tiles::kQueryInRegisters)
        multiply_tiles<T, kD>(s, q, stage, lane);
      else
        multiply_tiles<T, kD>(s, query, stage, sign(), lane);
      if constexpr (kSoftcap || kMask == Mask::floating) {
#pragma unroll
        for (auto& block : s)
#pragma unroll
          for (float& score : block) score = scale.apply(score);
      }

      float correction[2];
      if (whole) {
        sees[0] = sees[1] = true;
        softmax.template weigh<false>(s, scale.softmax, correction);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          sees[half] |= hide_in_row<kMask>(s, half, p, position, batch, rows[half].head, rows[half].query,
                                           rows[half].exists ? p.seqlen_q : 0, key0, lane);
        softmax.template weigh<true>(s, scale.softmax, correction);
      }
#pragma unroll
      for (auto& block : out)
#pragma unroll
        for (int e = 0; e < 4; ++e) block[e] *= correction[e / 2];
      if (!whole && __any_sync(0xffffffffu, infinities))
        add_seen_values<T, kDv>(out, s, values, lane);
      else
        add_values<T, false, kDv>(out, s, values, lane);
    }
    softmax.finish();
    leave(out, softmax, sees);
    __syncthreads();
    join();
  }

  // This warp's out, tops and sums, in place of its stages.
  __device__ __forceinline__ void leave(const float (&out)[kDv / 8][4], const OnlineSoftmax& softmax,
                                        const bool (&sees)[2]) const {
    __syncwarp();  // all lanes have read the last of the stages
    const Shared<float> left = as<float>(mine);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = lane / 4 + 8 * half;
      const bool any = (__ballot_sync(0xffffffffu, sees[half]) >> (lane / 4 * 4) & 15) != 0;
      if (lane % 4 == 0) {
        left[Tiles::kTopAt + r] = scale.top(softmax.top[half]);
        left[Tiles::kSumAt + r] = any && softmax.sum[half] == 0 ? 1.0f : softmax.sum[half];
      }
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n)
        as<float2>(left + (r * Tiles::kOutRow + 8 * n))[lane % 4] = {out[n][2 * half], out[n][2 * half + 1]};
    }
  }

  // Of all warps. A thread takes four columns of a row.
  __device__ __forceinline__ void join() const {
    const Shared<float> left = as<float>(query + Tiles::kQueryBytes);
    constexpr int kPieces = kDv / 4, kNext = Tiles::kWarpBytes / 4;
#pragma unroll 1
    for (int index = int(threadIdx.x); index < Tiles::kRows * kPieces; index += Tiles::kThreads) {
      const int r = index / kPieces, piece = index % kPieces;
      const Row to = row(r);
      if (!to.exists) break;
      float tops[kWarps], top = minus_infinity(), sum = 0;
      float4 out = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        tops[w] = left[w * kNext + Tiles::kTopAt + r];
        top = max(top, tops[w]);
      }
      const bool only_minus_infinity = top == minus_infinity();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = only_minus_infinity ? 1.0f : exp2_approx(tops[w] - top);
        const float4 of_warp = as<const float4>(left + (w * kNext + r * Tiles::kOutRow))[piece];
        sum += weight * left[w * kNext + Tiles::kSumAt + r];
        out.x += weight * of_warp.x, out.y += weight * of_warp.y;
        out.z += weight * of_warp.z, out.w += weight * of_warp.w;
      }
      const int64_t at = part * decode.rows() + decode.row_at(batch, to.head, to.query);
      if (piece == 0) decode.part_top[at] = top, decode.part_sum[at] = sum;
      if (sum != 0) as<float4>(decode.part_out + at * kDv)[piece] = out;
    }
  }
};

// A grid of GatedSdpaDecode::blocks() blocks, with Tiles::kSharedBytes of dynamic shared memory. Where nobody asks for
// two blocks in a multiprocessor the compiler aims at more of them and spills.
template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
__global__ void __launch_bounds__(GatedSdpaDecodeTiles<T, kD, kDv>::kThreads, 2)
    gated_sdpa_decode(const __grid_constant__ GatedSdpaDecode<T> p) {
  NSK_DYNAMIC_SHARED(shared);
  const int tile = int(blockIdx.x) % p.row_tiles(), of = int(blockIdx.x) / p.row_tiles();
  const int part = of % p.parts, head = of / p.parts;
  GatedSdpaDecodeBlock<T, kD, kDv, kSoftcap, kMask>(p, shared, head / p.forward.heads_kv, head % p.forward.heads_kv,
                                                    tile, part)
      .run();
}

struct GatedSdpaMergeTiles {
  static constexpr int kThreads = 128;
};

// Joins the parts: a thread takes four columns of a row. `columns` is Dv, a multiple of 4.
template <class T>
struct GatedSdpaMerge {
  GatedSdpaDecode<T> decode;
  int columns;

  __host__ __device__ int64_t threads() const { return decode.rows() * (columns / 4); }
  // Blocks in the grid.
  __host__ __device__ int64_t blocks() const {
    return (threads() + GatedSdpaMergeTiles::kThreads - 1) / GatedSdpaMergeTiles::kThreads;
  }
};

template <class T>
__global__ void __launch_bounds__(GatedSdpaMergeTiles::kThreads)
    gated_sdpa_merge(const __grid_constant__ GatedSdpaMerge<T> merge) {
  const GatedSdpaDecode<T>& decode = merge.decode;
  const GatedSdpa<T>& p = decode.forward;
  const int64_t index = int64_t(blockIdx.x) * GatedSdpaMergeTiles::kThreads + threadIdx.x;
  if (index >= merge.threads()) return;
  const int pieces = merge.columns / 4, piece = int(index % pieces);
  const int64_t row = index / pieces, rows = decode.rows();
  const int query = int(row % p.seqlen_q), head = int(row / p.seqlen_q % p.heads_q);
  const int batch = int(row / p.seqlen_q / p.heads_q);

  float top = minus_infinity();
#pragma unroll 4
  for (int part = 0; part < decode.parts; ++part) {
    const float of_part = decode.part_top[part * rows + row];
    top = max(top, of_part);
  }
  const bool only_minus_infinity = top == minus_infinity();
  float sum = 0, out[4] = {};
#pragma unroll 4
  for (int part = 0; part < decode.parts; ++part) {
    const int64_t at = part * rows + row;
    const float of_part = decode.part_sum[at], part_top = decode.part_top[at];
    if (of_part == 0) continue;
    const float weight = only_minus_infinity ? 1.0f : exp2_approx(part_top - top);
    const float4 value = as<const float4>(decode.part_out + at * merge.columns)[piece];
    sum += weight * of_part;
    out[0] += weight * value.x, out[1] += weight * value.y, out[2] += weight * value.z, out[3] += weight * value.w;
  }

  // A row that sees no key gives 0, whatever its gate holds, and -inf. One that sees only scores of -inf has no weights
  // that add up to 1: NaN, but that a sink takes it all.
  const bool alive = sum != 0;
  const float nan = __uint_as_float(0x7fffffffu);
  if (p.lse && piece == 0)
    p.lse[p.lse_stride.at(batch, head, query)] =
        !alive ? minus_infinity() : only_minus_infinity ? nan : log_of_sum(top, sum);
  if (alive) {
    float share = only_minus_infinity ? nan : rcp_approx(sum);
    if (p.sink) {  // one more key, whose value is 0
      const float sink = p.sink[head * p.sink_stride] * kLog2e, higher = max(top, sink);
      const float weight = exp2_approx(top - higher);
      share = weight * rcp_approx(sum * weight + exp2_approx(sink - higher));
    }
    const auto sigmoid = [](float x) { return rcp_approx(1.0f + exp2_approx(-kLog2e * x)); };
    if (p.gate_kind == Gate::headwise) share *= sigmoid(p.gate[p.gate_stride.at(batch, head, query)]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] *= share;
      if (p.gate_kind == Gate::elementwise)
        out[i] *= sigmoid(p.gate[p.gate_stride.at(batch, head, query) + (4 * piece + i)]);
    }
  }
  const Global<T> to = p.out + (p.out_stride.at(batch, head, query) + 4 * piece);
  if constexpr (sizeof(T) == 2)
    as<uint2>(to)[0] = {pack<T>(out[0], out[1]), pack<T>(out[2], out[3])};
  else
    as<float4>(to)[0] = {out[0], out[1], out[2], out[3]};
}

}  // namespace nsk::cuda
