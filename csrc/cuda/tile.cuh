// Tiles of 16-bit matrices in shared memory, and the matrix units' operands out of them.
//
// A tile keeps its rows one after another, each as pieces of 16 bytes. ldmatrix reads one piece of each of eight rows at
// a time, which is free of conflicts if they lie in eight different groups of four banks. Where rows are so long that
// several of the eight begin in the same group, their pieces are permuted (swizzled): with g = gcd(pieces of a row, 8),
// row r begins in one of 8 / g groups, and an exclusive-or of the piece's number with r / (8 / g) % g tells those apart
// that begin in the same one.
#pragma once

#include "device.cuh"

namespace nsk::cuda {

template <int kColumns>
struct Tile {
  static_assert(kColumns % 16 == 0, "mma takes 16 columns at a time");
  static constexpr int kPieces = kColumns / 8, kRowBytes = 2 * kColumns;
  static constexpr int kShared = kPieces % 8 == 0 ? 8 : kPieces % 4 == 0 ? 4 : 2;  // gcd(kPieces, 8)

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // Where a piece of a row begins.
  __device__ static __forceinline__ int at(int row, int piece) {
    return row * kRowBytes + (piece ^ (row / (8 / kShared) % kShared)) * 16;
  }
};

// Begins to copy `kRows` rows of a matrix, from row `first` on, into a tile; rows from `rows` on become 0. `kThreads`
// threads share the work, of which this is the `thread`-th.
template <int kRows, int kColumns, int kThreads, class T>
__device__ __forceinline__ void load_tile(Shared<unsigned char> tile, Global<const T> matrix, int64_t stride, int first,
                                          int rows, int thread) {
  using Layout = Tile<kColumns>;
  static_assert(kRows * Layout::kPieces % kThreads == 0, "every thread copies as many pieces");
#pragma unroll
  for (int i = 0; i < kRows * Layout::kPieces / kThreads; ++i) {
    const int index = i * kThreads + thread, row = index / Layout::kPieces, piece = index % Layout::kPieces;
    const bool inside = first + row < rows;
    cp_async<16>(tile + Layout::at(row, piece), matrix + (inside ? (first + row) * stride + piece * 8 : 0),
                 inside ? 16 : 0);
  }
}

// A, 16 x 16: rows `row` .. and columns `column` .. of the tile.
template <int kColumns>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], Shared<unsigned char> tile, int row, int column, int lane) {
  ldmatrix(a, tile + Tile<kColumns>::at(row + lane % 16, column / 8 + lane / 16));
}

// B of two mma side by side, 16 x 16: k is the tile's columns from `column` on, n its rows from `row` on. The first two
// registers are of the first eight n.
template <int kColumns>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], Shared<unsigned char> tile, int row, int column, int lane) {
  ldmatrix(b, tile + Tile<kColumns>::at(row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
}

// The same with k as the tile's rows and n as its columns.
template <int kColumns>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], Shared<unsigned char> tile, int row, int column,
                                                  int lane) {
  ldmatrix<true>(b, tile + Tile<kColumns>::at(row + lane % 16, column / 8 + lane / 16));
}

// Two mma side by side.
template <class T>
__device__ __forceinline__ void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  mma<T>(d0, a, {b[0], b[1]});
  mma<T>(d1, a, {b[2], b[3]});
}

}  // namespace nsk::cuda
