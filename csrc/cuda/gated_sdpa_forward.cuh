// Forward of gated attention on tensor cores, for every batch, head and row i of the query:
//
//   s_ij  = scale q_i.k_j;  softcap * tanh(s_ij / softcap);  + mask_ij          over the keys j that row i sees
//   out_i = sigmoid(gate_i) * sum_j softmax_j(s_ij) v_j,    lse_i = log sum_j exp(s_ij)
//
// A block of four warps computes a tile of 64 rows of one head; each warp owns 16 rows and all columns of them, so that
// softmax needs no more than shuffles, and the scores of a tile of keys never leave the registers they are computed in:
// as weights they are the next product's operand. Keys and values come through cp.async in tiles of 64 (32 where heads
// are wide), two stages of each: tile t + 1 is under way while t is worked on. A turn is
//
//   wait, barrier    tile t has arrived, as far as each thread copied it, and all have left tile t - 1, whose stage
//   issue t + 1      is the one that t + 1 now overwrites: one barrier a turn does both
//   s = q k^T        hidden keys become -inf, in tiles only that not every row of the warp sees whole
//   softmax          new maximum and weights; what has been summed so far is rescaled
//   out += s v
//
// Tiles that no row of the block sees are not loaded, and a warp passes by those that none of its rows sees. What a row
// does not see must not reach it even as 0 times infinity. So tiles that are not seen whole are looked through for
// values that are not finite, by the threads that copied them; only where there are some does the last step take a
// longer way.
//
// The query's tile is copied once. A warp copies and reads its own 16 rows only, and takes them into registers if heads
// are narrow enough. Its rows in shared memory are then free: they receive the gate while the loop runs (where q stays
// in shared memory, after it), and the gate's place becomes that of the result, word by word by the same thread. So
// results leave in whole pieces of 16 bytes, and only __syncwarp orders any of this.
#pragma once

#include "gated_sdpa_scores.cuh"
#include "gated_sdpa_values.cuh"

namespace nsk::cuda {

template <class T, int kD, int kDv>
struct GatedSdpaTiles {
  static constexpr int kWidest = kD < kDv ? kDv : kD, kWidestBytes = kWidest * int(sizeof(T));
  static constexpr int kWarps = kWidestBytes <= 768 ? 4 : 2, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kKeys = kWidestBytes <= 256 ? 64 : kWidestBytes <= 512 ? 32 : 16;
  static constexpr bool kQueryInRegisters = kWidestBytes <= 256;
  // In a multiprocessor, as far as registers go: where nobody says it the compiler aims too high for some, and spills.
  static constexpr int kMinBlocks = kWidestBytes <= 128 ? 3 : 2;

  // Shared memory: a warp's rows of the query, or of gate and result, for all warps; then stages of keys and values.
  static constexpr int kWarpBytes = Tile<T, kWidest>::bytes(16), kKeyBytes = Tile<T, kD>::bytes(kKeys);
  static constexpr int kStageBytes = kKeyBytes + Tile<T, kDv>::bytes(kKeys);
  // Last, for each stage, whether a warp has found values that are not finite: a word a warp.
  static constexpr int kFoundAt = kWarps * kWarpBytes + 2 * kStageBytes;
  static constexpr int kSharedBytes = kFoundAt + FoundByWarps<kWarps>::kBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
struct GatedSdpaForward {
  using Tiles = GatedSdpaTiles<T, kD, kDv>;
  static constexpr int kKeys = Tiles::kKeys, kBlocks = kKeys / 8;

  const GatedSdpa<T>& p;
  const ScoreScale<kSoftcap, kMask> scale;
  const Shared<unsigned char> mine, stages;  // this warp's rows, and the block's keys and values
  const FoundByWarps<Tiles::kWarps> found;
  const int lane, batch, head;
  const Rows queries, keys;
  const Position position;

  __device__ __forceinline__ GatedSdpaForward(const GatedSdpa<T>& problem, Shared<unsigned char> shared, int b, int h)
      : p(problem),
        scale(problem),
        mine(shared + int(threadIdx.x) / 32 * Tiles::kWarpBytes),
        stages(shared + Tiles::kWarps * Tiles::kWarpBytes),
        found{as<uint32_t>(shared + Tiles::kFoundAt)},
        lane(int(threadIdx.x) % 32),
        batch(b),
        head(h),
        queries(rows_of(problem.cu_seqlens_q, b, problem.seqlen_q)),
        keys(rows_of(problem.cu_seqlens_k, b, problem.seqlen_k)),
        position(PositionMask::make(queries.count, keys.count, problem.is_causal, problem.bottom_right,
                                    problem.window_left, problem.window_right)) {}

  __device__ __forceinline__ Shared<unsigned char> stage(int tile) const {
    return stages + tile % 2 * Tiles::kStageBytes;
  }

  using KeyLoader = TileLoader<kKeys, kD, Tiles::kThreads, T>;
  using ValueLoader = TileLoader<kKeys, kDv, Tiles::kThreads, T>;
  __device__ __forceinline__ KeyLoader key_loader() const {
    return {p.key + p.key_stride.at(batch, kv_head(), keys.first), p.key_stride.row, keys.count, int(threadIdx.x)};
  }
  __device__ __forceinline__ ValueLoader value_loader() const {
    return {p.value + p.value_stride.at(batch, kv_head(), keys.first), p.value_stride.row, keys.count,
            int(threadIdx.x)};
  }
  __device__ __forceinline__ int kv_head() const { return head / (p.heads_q / p.heads_kv); }

  // A negative scale is the query's sign: softmax can then take the maximum of the bare products.
  __device__ __forceinline__ uint32_t sign() const { return p.scale < 0 ? kSigns<T> : 0; }

  __device__ __forceinline__ bool gate_in_tile() const { return p.gate_kind == Gate::elementwise && !p.gate.is_float; }
  __device__ __forceinline__ void load_gate(int row0) const {
    if (!gate_in_tile()) return;
    const Global<const T> gate = as<const T>(p.gate.data) + p.gate_stride.at(batch, head, queries.first);
    // opaque: else its addresses, which are made as the query's are, stay in registers all the way.
    TileLoader<16, kDv, 32, T>(gate, p.gate_stride.row, queries.count, opaque(lane)).load(mine, row0);
  }

  // Rows `block_row` .. of the sequence.
  __device__ __forceinline__ void run(int block_row) const {
    const int row0 = block_row + int(threadIdx.x) / 32 * 16;
    const Position::Keys block_first = position.keys(block_row);
    const Position::Keys block_last = position.keys(min(block_row + Tiles::kRows, queries.count) - 1);
    const Position::Keys first = position.keys(row0), last = position.keys(row0 + 15);
    const int begin = block_first.begin / kKeys, end = (block_last.end + kKeys - 1) / kKeys;
    const bool sees_any = block_first.begin < block_last.end;

    const Global<const T> query = p.query + p.query_stride.at(batch, head, queries.first);
    TileLoader<16, kD, 32, T>(query, p.query_stride.row, queries.count, lane).load(mine, row0);
    const KeyLoader key = key_loader();
    const ValueLoader value = value_loader();
    const auto load_keys = [&](int tile) {
      key.load(stage(tile), tile * kKeys);
      value.load(stage(tile) + Tiles::kKeyBytes, tile * kKeys);
    };
    uint32_t q[Tiles::kQueryInRegisters ? Tile<T, kD>::kSteps : 1][4];
    if constexpr (Tiles::kQueryInRegisters) {
      cp_async_commit();
      if (sees_any) load_keys(begin);
      cp_async_wait<0>();  // the keys' group is not committed yet: it goes on
      __syncwarp();
      load_rows<T, kD>(q, mine, sign(), lane);
      __syncwarp();  // all lanes have read what the gate is to overwrite
      if (sees_any) load_gate(row0);
    } else if (sees_any) {
      load_keys(begin);
    }
    cp_async_commit();

    float out[kDv / 8][4] = {};
    OnlineSoftmax softmax;
    unsigned sees = 0;  // a bit for each half: whether the mask lets the row see a key, of this lane's
    for (int tile = begin; sees_any && tile < end; ++tile) {
      const bool block_whole = kMask == Mask::none && tile * kKeys >= block_last.begin &&
                               (tile + 1) * kKeys <= block_first.end;
      cp_async_wait<0>();
      if (!block_whole) look_for_infinities(value, tile);
      __syncthreads();
      if (tile + 1 < end) load_keys(tile + 1);
      cp_async_commit();
      // Else the places of all fragments in the tiles would be kept from turn to turn, and there are too few registers.
      const int lane = opaque(this->lane);
      const int key0 = tile * kKeys;
      if (key0 >= last.end || key0 + kKeys <= first.begin) continue;

      float s[kBlocks][4] = {};
      if constexpr (Tiles::kQueryInRegisters)
        multiply_tiles<T, kD>(s, q, stage(tile), lane);
      else
        multiply_tiles<T, kD>(s, mine, stage(tile), sign(), lane);
      if constexpr (kSoftcap || kMask == Mask::floating) {
#pragma unroll
        for (auto& block : s)
#pragma unroll
          for (float& score : block) score = scale.apply(score);
      }

      const bool whole = kMask == Mask::none && key0 >= last.begin && key0 + kKeys <= first.end;
      float correction[2];
      if (whole) {
        softmax.template weigh<false>(s, scale.softmax, correction);
      } else {
        sees |= hide<kMask>(s, p, position, batch, head, row0, queries.count, key0, lane);
        softmax.template weigh<true>(s, scale.softmax, correction);
      }
#pragma unroll
      for (auto& block : out)
#pragma unroll
        for (int e = 0; e < 4; ++e) block[e] *= correction[e / 2];
      if (!block_whole && !whole && found.any(tile))
        add_seen_values<T, kDv>(out, s, stage(tile) + Tiles::kKeyBytes, lane);
      else
        add_values<T, false, kDv>(out, s, stage(tile) + Tiles::kKeyBytes, lane);
    }

    if constexpr (!Tiles::kQueryInRegisters) {
      __syncwarp();  // all lanes have read the query for the last time
      if (sees_any) load_gate(row0);
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
    }
    softmax.finish();
    store(out, softmax, sees, row0);
  }

  // Before the barrier each thread looks through the values that it copied, after it all know what all have found.
  __device__ __forceinline__ void look_for_infinities(const ValueLoader& value, int tile) const {
    const bool mine = value.any(stage(tile) + Tiles::kKeyBytes, [](uint4 piece) { return not_finite<T>(piece); });
    found.leave(tile, mine);
  }

  // Without a mask position knows it, and `sees` has not to be kept.
  __device__ __forceinline__ bool sees_any(unsigned sees, int half, int row) const {
    if constexpr (kMask == Mask::none) {
      const Position::Keys seen = position.keys(row);
      return seen.begin < seen.end;
    } else {
      return (__ballot_sync(0xffffffffu, (sees >> half & 1) != 0) >> (lane / 4 * 4) & 15) != 0;
    }
  }

  // A row that sees no key gives 0, whatever its gate holds, and -inf. One that sees only scores of -inf has no weights
  // that add up to 1: NaN, but that a sink takes it all.
  __device__ __forceinline__ void store(const float (&out)[kDv / 8][4], const OnlineSoftmax& softmax, unsigned sees,
                                        int row0) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      const bool sees_key = sees_any(sees, half, row), only_minus_infinity = sees_key && softmax.sum[half] == 0;
      const float sum = only_minus_infinity ? 1.0f : softmax.sum[half];
      const bool alive = sum != 0 && row < queries.count;
      const float top = scale.top(softmax.top[half]);
      const float nan = only_minus_infinity ? top - top : 0.0f;
      float share = rcp_approx(sum) + nan;
      if (p.sink) {  // one more key, whose value is 0
        const float sink = p.sink[head * p.sink_stride] * kLog2e, higher = max(top, sink);
        const float weight = exp2_approx(top - higher);
        share = weight * rcp_approx(sum * weight + exp2_approx(sink - higher));
      }
      if (alive && p.gate_kind == Gate::headwise)
        share *= sigmoid(p.gate[p.gate_stride.at(batch, head, queries.first + row)]);
      if (p.lse && lane % 4 == 0 && row < queries.count)
        p.lse[p.lse_stride.at(batch, head, queries.first + row)] =
            alive ? log_of_sum(top, sum) + nan : minus_infinity();
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n) {
        const Shared<Pair<T>> pair = as<Pair<T>>(mine + Tile<T, kDv>::pair_at(lane / 4 + 8 * half, n, lane));
        float x = 0, y = 0;
        if (alive) {
          x = out[n][2 * half] * share, y = out[n][2 * half + 1] * share;
          if (p.gate_kind == Gate::elementwise) {
            const float2 gate = gate_at(pair, row, 8 * n + lane % 4 * 2);
            x *= sigmoid(gate.x), y *= sigmoid(gate.y);
          }
        }
        pair[0] = pack_pair<T>(x, y);
      }
    }
    __syncwarp();
    const Global<T> to = p.out + p.out_stride.at(batch, head, queries.first);
    constexpr int kPieces = Tile<T, kDv>::kPieces;
#pragma unroll
    for (int i = 0; i < 16 * kPieces / 32; ++i) {
      const int index = i * 32 + lane, row = index / kPieces, piece = index % kPieces;
      if (row0 + row >= queries.count) continue;
      const uint4 value = as<const uint4>(mine + Tile<T, kDv>::at(row, piece))[0];
      as<uint4>(to + (row0 + row) * p.out_stride.row)[piece] = value;
    }
  }

  __device__ __forceinline__ float2 gate_at(Shared<const Pair<T>> pair, int row, int column) const {
    if (gate_in_tile()) {
      const Pair<T> bits = pair[0];
      return unpack_pair<T>(bits);
    }
    const int64_t at = p.gate_stride.at(batch, head, queries.first + row) + column;
    return {p.gate[at], p.gate[at + 1]};
  }

  __device__ static __forceinline__ float sigmoid(float x) { return rcp_approx(1.0f + exp2_approx(-kLog2e * x)); }
};

// A grid of gated_sdpa_blocks(...) blocks, with Tiles::kSharedBytes of dynamic shared memory.
template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
__global__ void __launch_bounds__(GatedSdpaTiles<T, kD, kDv>::kThreads, GatedSdpaTiles<T, kD, kDv>::kMinBlocks)
    gated_sdpa_forward(const __grid_constant__ GatedSdpa<T> p) {
  using Tiles = GatedSdpaTiles<T, kD, kDv>;
  NSK_DYNAMIC_SHARED(shared);
  const RowTile tile = row_tile<Tiles::kRows>(p);
  const GatedSdpaForward<T, kD, kDv, kSoftcap, kMask> block(p, shared, tile.batch, tile.head);
  if (tile.row < block.queries.count) block.run(tile.row);
}

}  // namespace nsk::cuda
