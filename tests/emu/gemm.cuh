// A matrix product on tensor cores, as real kernels do it: tiles come through cp.async into two stages of shared memory
// and through ldmatrix into registers, while the next tile is under way.
//
//   c[m, n] = sum_k a[m, k] b[n, k]        (kTransposed: b[k, n], read through ldmatrix.trans)
//
// A block computes a tile of 64 x 64 of c with eight warps, two by four, each 32 x 16. A stage holds 64 bytes of each
// row, as four pieces of 16 that are permuted within the row (swizzled), so that the eight rows that ldmatrix reads at
// a time lie in different banks. Rows of a, b and c may end anywhere; those of a and b start at multiples of 16 bytes.
#pragma once

#include "../../csrc/cuda/device.cuh"

namespace nsk::test {

using namespace nsk::cuda;

template <class T>
struct GemmTraits {  // T is what mma takes; elements in memory are of this size
  using Element = T;
};
template <>
struct GemmTraits<tf32> {
  using Element = float;
};

struct GemmShape {
  int m, n, k;
  int stride_a, stride_b, stride_c;  // of rows, in elements
};

inline constexpr int kGemmTile = 64, kGemmThreads = 256;
inline constexpr int kGemmRow = 64;                          // bytes of a row in a stage
inline constexpr int kGemmStage = 2 * kGemmTile * kGemmRow;  // a's tile, then b's
inline constexpr int kGemmSharedBytes = 2 * kGemmStage;

// The 16-byte piece of a row of 64 bytes, where it lies.
__device__ inline int swizzled(int row, int piece) { return row * kGemmRow + (piece ^ (row / 2 % 4)) * 16; }
// The same for the transposed b: 32 rows (k) of 128 bytes (n).
__device__ inline int swizzled_wide(int row, int piece) { return row * 128 + (piece ^ (row % 8)) * 16; }

// Rows `first` .. of a matrix [rows, columns] from column `column` on become a tile of 16-byte pieces; what lies
// outside of the matrix becomes 0. Every thread copies one piece.
template <bool kWide, class E>
__device__ void load_tile(Shared<unsigned char> tile, Global<const E> matrix, int stride, int rows, int columns,
                          int first, int column) {
  constexpr int kPieces = kWide ? 8 : 4, kPiece = 16 / int(sizeof(E));
  const int row = int(threadIdx.x) / kPieces, piece = int(threadIdx.x) % kPieces;
  const int r = first + row, c = column + piece * kPiece;
  const int inside = r < rows ? min(max(columns - c, 0), kPiece) : 0;
  const int to = kWide ? swizzled_wide(row, piece) : swizzled(row, piece);
  cp_async<16>(tile + to, matrix + (inside ? int64_t(r) * stride + c : 0), inside * int(sizeof(E)));
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(kGemmThreads) gemm(GemmShape shape, Global<const typename GemmTraits<T>::Element> a,
                                                     Global<const typename GemmTraits<T>::Element> b, Global<float> c) {
  using E = typename GemmTraits<T>::Element;
  constexpr int kDepth = kGemmRow / int(sizeof(E));  // k of a stage; an mma takes 32 bytes of it
  static_assert(!kTransposed || sizeof(E) == 2, "ldmatrix transposes 16-bit elements only");
  NSK_DYNAMIC_SHARED(shared);

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int row0 = int(blockIdx.y) * kGemmTile, column0 = int(blockIdx.x) * kGemmTile;
  const int warp_row = warp / 4 * 32, warp_column = warp % 4 * 16;

  auto load_stage = [&](int stage) {
    const Shared<unsigned char> tile = shared + stage % 2 * kGemmStage;
    load_tile<false, E>(tile, a, shape.stride_a, shape.m, shape.k, row0, stage * kDepth);
    if constexpr (kTransposed)
      load_tile<true, E>(tile + kGemmTile * kGemmRow, b, shape.stride_b, shape.k, shape.n, stage * kDepth, column0);
    else
      load_tile<false, E>(tile + kGemmTile * kGemmRow, b, shape.stride_b, shape.n, shape.k, column0, stage * kDepth);
  };

  const int stages = (shape.k + kDepth - 1) / kDepth;
  float sums[2][2][4] = {};
  if (stages > 0) load_stage(0);
  cp_async_commit();
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) load_stage(stage + 1);
    cp_async_commit();   // an empty group at the end keeps the count below
    cp_async_wait<1>();  // the stage's own group has arrived, as far as this thread copied it,
    __syncthreads();     // and now as far as the others did

    const Shared<unsigned char> tile_a = shared + stage % 2 * kGemmStage, tile_b = tile_a + kGemmTile * kGemmRow;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t fragments_a[2][4], fragments_b[4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ldmatrix(fragments_a[i], tile_a + swizzled(warp_row + 16 * i + lane % 16, 2 * step + lane / 16));
      // Matrices 0 and 1 are the two halves of k for the first eight columns, 2 and 3 those for the others.
      if constexpr (kTransposed)
        ldmatrix<true>(fragments_b, tile_b + swizzled_wide(16 * step + lane % 16, warp_column / 8 + lane / 16));
      else
        ldmatrix(fragments_b, tile_b + swizzled(warp_column + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      const uint32_t halves[2][2] = {{fragments_b[0], fragments_b[1]}, {fragments_b[2], fragments_b[3]}};
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) mma<T>(sums[i][j], fragments_a[i], halves[j]);
    }
    __syncthreads();  // all have read the stage that the next turn overwrites
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + warp_row + 16 * i + lane / 4 + e / 2 * 8;
        const int column = column0 + warp_column + 8 * j + lane % 4 * 2 + e % 2;
        if (row < shape.m && column < shape.n) c[int64_t(row) * shape.stride_c + column] = sums[i][j][e];
      }
}

}  // namespace nsk::test
