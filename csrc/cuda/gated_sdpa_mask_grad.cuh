// Gradient of a floating mask: that of the scores, summed over whatever the mask is broadcast along,
//
//   dS_ij = P_ij (scaled_i . v_j - change_i),   P_ij = exp2(s_ij - norm_i - low_i)
//
// and 0 where row i does not see key j. The mask is added after the softcap, so that the cap's derivative is not in it.
// What `scaled`, `change`, norm and low are is said in gated_sdpa_backward_problem.cuh.
//
// A block of four warps owns a tile of 64 rows and 64 keys (32 where heads are wide) of the mask's own last two
// dimensions; where one of these is of size 1 it owns that one row or key. It goes through all tiles of scores that its
// entries were added to: those of all batches, heads, rows and keys, as far as the mask has none of its own, in this
// order, and adds them up in registers. So nothing but the gradient is of the mask's size, no sum depends on which
// block is first, and each entry is written once. A turn has two products over two places in shared memory, each of
// which is filled while the other is worked on:
//
//   wait, barrier    query and keys have arrived; all have left values and dO of the turn before
//   issue dO, v
//   s = q k^T
//   wait, barrier    dO and values have arrived; all have left query and keys
//   issue q, k       of the next turn
//   dO v^T, dS       each warp of 16 rows and all keys
//
// A key that a row does not see is selected away in its one entry of dS, so that NaN in it or in its value stays there.
// At the end the sums go through shared memory: rows leave in the order of their entries, and where the mask has but
// one row or one key the tile's are summed, one after another.
#pragma once

#include "gated_sdpa_backward_problem.cuh"
#include "gated_sdpa_scores.cuh"
#include "tile.cuh"

namespace nsk::cuda {

template <class T, int kD, int kDv>
struct GatedSdpaMaskGradTiles {
  static constexpr int kWidest = kD < kDv ? kDv : kD, kWidestBytes = kWidest * int(sizeof(T));
  static constexpr int kWarps = kWidestBytes <= 512 ? 4 : 2, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kKeys = kWidestBytes <= 256 ? 64 : kWidestBytes <= 768 ? 32 : 16;

  // Shared memory: query, keys, dO, values. In the end, sums, in place of query and keys, which nobody reads while the
  // last turn's second product is under way.
  static constexpr int kKeysAt = Tile<T, kD>::bytes(kRows), kGradAt = kKeysAt + Tile<T, kD>::bytes(kKeys);
  static constexpr int kValuesAt = kGradAt + Tile<T, kDv>::bytes(kRows);
  static constexpr int kSharedBytes = kValuesAt + Tile<T, kDv>::bytes(kKeys);
  static_assert(4 * kRows * kKeys <= kGradAt && kSharedBytes <= 99 * 1024);
  // Eight entries of four rows, which half a warp writes at once, lie in different banks.
  __device__ static __forceinline__ int sum_at(int row, int key) {
    return row * kKeys + (key ^ (kKeys < 32 ? row / 2 % 2 : row % 4) * 8);
  }
};

// Which of the mask's dimensions are the scores' own; along the others it is broadcast.
template <class T>
struct MaskShape {
  bool batch, head, row, key;

  __host__ __device__ explicit MaskShape(const GatedSdpaBackward<T>& p)
      : batch(p.mask_size[0] == p.forward.batch),
        head(p.mask_size[1] == p.forward.heads_q),
        row(p.mask_size[2] == p.forward.seqlen_q),
        key(p.mask_size[3] == p.forward.seqlen_k) {}
};

// Blocks in the grid.
template <class Tiles, class T>
__host__ __device__ inline int64_t mask_grad_blocks(const GatedSdpaBackward<T>& p) {
  return p.mask_size[0] * p.mask_size[1] * ((p.mask_size[2] + Tiles::kRows - 1) / Tiles::kRows) *
         ((p.mask_size[3] + Tiles::kKeys - 1) / Tiles::kKeys);
}

template <class T, int kD, int kDv, bool kSoftcap>
struct GatedSdpaMaskGrad {
  using Tiles = GatedSdpaMaskGradTiles<T, kD, kDv>;
  static constexpr int kRows = Tiles::kRows, kKeys = Tiles::kKeys, kBlocks = kKeys / 8;

  const GatedSdpaBackward<T>& backward;
  const GatedSdpa<T>& p;
  const Shared<unsigned char> shared;
  const MaskShape<T> own;
  const ScoreScale<kSoftcap, Mask::floating> scale;
  const Position position;
  const int lane, warp;
  int batch, head, row0, key0;  // where this block's part of the mask begins
  int heads, row_tiles, key_tiles, tiles;  // that it goes through, the last of all

  __device__ __forceinline__ GatedSdpaMaskGrad(const GatedSdpaBackward<T>& problem, Shared<unsigned char> memory)
      : backward(problem),
        p(problem.forward),
        shared(memory),
        own(problem),
        scale(problem.forward),
        position(PositionMask::make(p.seqlen_q, p.seqlen_k, p.is_causal, p.bottom_right, p.window_left,
                                    p.window_right)),
        lane(int(threadIdx.x) % 32),
        warp(int(threadIdx.x) / 32) {
    const int of_keys = int((backward.mask_size[3] + kKeys - 1) / kKeys);
    const int of_rows = int((backward.mask_size[2] + kRows - 1) / kRows), of_heads = int(backward.mask_size[1]);
    int place = int(blockIdx.x);
    key0 = place % of_keys * kKeys, place /= of_keys;
    row0 = place % of_rows * kRows, place /= of_rows;
    head = place % of_heads, batch = place / of_heads;
    heads = own.head ? 1 : p.heads_q;
    row_tiles = own.row ? 1 : (p.seqlen_q + kRows - 1) / kRows;
    key_tiles = own.key ? 1 : (p.seqlen_k + kKeys - 1) / kKeys;
    tiles = (own.batch ? 1 : p.batch) * heads * row_tiles * key_tiles;
  }

  struct Place {
    int batch, head, row, key;
  };
  __device__ __forceinline__ Place place(int tile) const {
    const int key = key0 + tile % key_tiles * kKeys, of_rows = tile / key_tiles;
    const int row = row0 + of_rows % row_tiles * kRows, of_heads = of_rows / row_tiles;
    return {batch + of_heads / heads, head + of_heads % heads, row, key};
  }
  // The first from `tile` on in which some row may see some key.
  __device__ __forceinline__ int next(int tile) const {
    for (; tile < tiles; ++tile) {
      const Place at = place(tile);
      const int begin = position.keys(at.row).begin, end = position.keys(min(at.row + kRows, p.seqlen_q) - 1).end;
      if (at.key < end && at.key + kKeys > begin) break;
    }
    return tile;
  }

  __device__ __forceinline__ int kv_head(const Place& at) const { return at.head / (p.heads_q / p.heads_kv); }
  __device__ __forceinline__ void load_query_and_keys(int tile) const {
    const Place at = place(tile);
    load_rows<kRows, kD>(shared, p.query, p.query_stride, at.batch, at.head, at.row, p.seqlen_q);
    load_rows<kKeys, kD>(shared + Tiles::kKeysAt, p.key, p.key_stride, at.batch, kv_head(at), at.key, p.seqlen_k);
  }
  __device__ __forceinline__ void load_grad_and_values(const Place& at) const {
    const Global<const T> grad = backward.scaled + backward.row_at(at.batch, at.head, {0, p.seqlen_q}) * kDv;
    load_rows<kRows, kDv>(shared + Tiles::kGradAt, grad, {0, 0, kDv}, 0, 0, at.row, p.seqlen_q);
    load_rows<kKeys, kDv>(shared + Tiles::kValuesAt, p.value, p.value_stride, at.batch, kv_head(at), at.key,
                          p.seqlen_k);
  }
  template <int kTileRows, int kColumns>
  __device__ __forceinline__ void load_rows(Shared<unsigned char> tile, Global<const T> from, const Strides& stride,
                                            int b, int h, int row, int rows) const {
    TileLoader<kTileRows, kColumns, Tiles::kThreads, T>(from + stride.at(b, h, 0), stride.row, rows, int(threadIdx.x))
        .load(tile, row);
  }

  __device__ __forceinline__ void run() const {
    float sums[kBlocks][4] = {};
    int tile = next(0);
    if (tile < tiles) load_query_and_keys(tile);
    cp_async_commit();
    while (tile < tiles) {
      const Place at = place(tile);
      cp_async_wait<0>();
      __syncthreads();
      load_grad_and_values(at);
      cp_async_commit();
      float s[kBlocks][4] = {}, products[kBlocks][4] = {};
      multiply_tiles<T, kD>(s, shared + warp * Tile<T, kD>::bytes(16), shared + Tiles::kKeysAt,
                            p.scale < 0 ? kSigns<T> : 0, lane);
      cp_async_wait<0>();
      __syncthreads();
      tile = next(tile + 1);
      if (tile < tiles) load_query_and_keys(tile);
      cp_async_commit();
      multiply_tiles<T, kDv>(products, shared + (Tiles::kGradAt + warp * Tile<T, kDv>::bytes(16)),
                             shared + Tiles::kValuesAt, 0, lane);
      add(sums, s, products, at);
    }
    store(sums);
  }

  __device__ __forceinline__ void add(float (&sums)[kBlocks][4], float (&s)[kBlocks][4],
                                      const float (&products)[kBlocks][4], const Place& at) const {
#pragma unroll
    for (auto& block : s)
#pragma unroll
      for (float& score : block) score = scale.apply(score);
    const int first = at.row + 16 * warp;
    hide<Mask::floating>(s, p, position, at.batch, at.head, first, p.seqlen_q, at.key, lane);
    const int64_t of_head = backward.row_at(at.batch, at.head, {0, p.seqlen_q});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane / 4 + 8 * half;
      if (row >= p.seqlen_q) continue;
      const float norm = backward.norm[of_head + row], low = backward.norm_low[of_head + row];
      const float change = backward.change[of_head + row];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e)
          sums[n][e] += s[n][e] == minus_infinity()
                            ? 0.0f
                            : exp2_approx(s[n][e] - norm - low) * (products[n][e] - change);
    }
  }

  __device__ __forceinline__ void store(const float (&sums)[kBlocks][4]) const {
    const Shared<float> tile = as<float>(shared);
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
        as<float2>(tile + Tiles::sum_at(16 * warp + lane / 4 + 8 * half, 8 * n))[lane % 4] = {sums[n][2 * half],
                                                                                              sums[n][2 * half + 1]};
    __syncthreads();
    if (!own.key && thread < kRows) {  // a row's sum, in place of its first entry
      float sum = 0;
#pragma unroll 4
      for (int key = 0; key < kKeys; ++key) sum += tile[Tiles::sum_at(thread, key)];
      tile[Tiles::sum_at(thread, 0)] = sum;
    }
    const int keys = own.key ? kKeys : 1;
    if (own.row) {
#pragma unroll 1
      for (int i = thread; i < kRows * keys; i += Tiles::kThreads) {
        const float sum = tile[Tiles::sum_at(i / keys, i % keys)];
        write(row0 + i / keys, key0 + i % keys, sum);
      }
      return;
    }
    if (!own.key) __syncthreads();
    if (thread >= keys) return;
    float sum = 0;
#pragma unroll 4
    for (int row = 0; row < kRows; ++row) sum += tile[Tiles::sum_at(row, thread)];
    write(0, key0 + thread, sum);
  }

  __device__ __forceinline__ void write(int row, int key, float sum) const {
    const int64_t* size = backward.mask_size;
    if (row >= size[2] || key >= size[3]) return;
    const int64_t at = ((batch * size[1] + head) * size[2] + row) * size[3] + key;
    store_either<T>(backward.grad_mask, at, p.mask.is_float, sum);
  }
};

// A grid of mask_grad_blocks<Tiles>(p) blocks, with Tiles::kSharedBytes of dynamic shared memory. Dense calls only. Two
// blocks in a multiprocessor: where nobody says it the compiler aims at more, and spills.
template <class T, int kD, int kDv, bool kSoftcap>
__global__ void __launch_bounds__(GatedSdpaMaskGradTiles<T, kD, kDv>::kThreads, 2)
    gated_sdpa_mask_grad(const __grid_constant__ GatedSdpaBackward<T> p) {
  NSK_DYNAMIC_SHARED(shared);
  GatedSdpaMaskGrad<T, kD, kDv, kSoftcap>(p, shared).run();
}

}  // namespace nsk::cuda
