// Tiles of 16-bit matrices in shared memory, and the matrix units' operands out of them.
//
// A tile keeps its rows one after another, each as pieces of 16 bytes. ldmatrix reads one piece of each of eight rows
// at a time, which is free of conflicts if they lie in eight different groups of four banks. Where rows are so long
// that several of the eight begin in the same group, their pieces are permuted (swizzled): with g = gcd(pieces of a
// row, 8), row r begins in one of 8 / g groups, and an exclusive-or of the piece's number with r / (8 / g) % g tells
// those apart that begin in the same one.
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
  __device__ static __forceinline__ int at(int row, int piece) { return row * kRowBytes + (piece ^ swizzle(row)) * 16; }
  // It depends on row % 8 alone, and permutes pieces within groups of kShared.
  __device__ static __forceinline__ int swizzle(int row) { return row / (8 / kShared) % kShared; }
};

// Copies rows of a matrix into tiles, shared by `kThreads` threads. Those that are neighbours take the pieces of a
// group, further ones the rows below. So all that a thread keeps is where its first row begins: the places of its other
// pieces differ from there by constants in the tile, and by whole rows in the matrix.
template <int kRows, int kColumns, int kThreads, class T>
class TileLoader {
  using Layout = Tile<kColumns>;
  static constexpr int kGroup = Layout::kShared, kStep = kThreads / kGroup;
  static_assert(kRows % kStep == 0, "every thread copies as many pieces");

 public:
  __device__ __forceinline__ TileLoader(Global<const T> matrix, int64_t stride, int rows, int thread)
      : from_(matrix + (thread / kGroup * stride + thread % kGroup * 8)),
        stride_(stride),
        rows_(rows - thread / kGroup),
        thread_(thread) {}

  // Begins to copy the rows from `first` on; those after the matrix's last become 0.
  __device__ __forceinline__ void load(Shared<unsigned char> tile, int first) const {
    const Global<const T> from = from_ + first * stride_;
    each_piece(tile, [&](Shared<unsigned char> to, int row, int column) {
      const bool inside = first + row < rows_;
      cp_async<16>(to, inside ? from + (row * stride_ + column) : from_, inside ? 16 : 0);
    });
  }

  // Whether f(piece) holds for any piece that this thread copied. It must have waited for them.
  template <class F>
  __device__ __forceinline__ bool any(Shared<unsigned char> tile, const F& f) const {
    bool any = false;
    each_piece(tile, [&](Shared<unsigned char> at, int, int) {
      const uint4 piece = as<const uint4>(at)[0];
      any |= f(piece);
    });
    return any;
  }

 private:
  // f(place in the tile, row, column), both counted from this thread's first piece.
  template <class F>
  __device__ __forceinline__ void each_piece(Shared<unsigned char> tile, const F& f) const {
    const int row = thread_ / kGroup, piece = thread_ % kGroup;
    const Shared<unsigned char> place = tile + Layout::at(row, piece);
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
      const Shared<unsigned char> there =
          kStep % 8 == 0 ? place + r * Layout::kRowBytes : tile + Layout::at(row + r, piece);
#pragma unroll
      for (int group = 0; group < Layout::kPieces; group += kGroup) f(there + group * 16, r, group * 8);
    }
  }

  Global<const T> from_;
  int64_t stride_;
  int rows_, thread_;
};

// What ldmatrix takes from a tile, for one lane. `row` and `column` are multiples of 8 and 16, known when compiling.
template <int kColumns>
class TileReader {
  using Layout = Tile<kColumns>;

 public:
  // A, 16 x 16, and B of two mma side by side with k as the tile's rows and n as its columns, transposed: its first two
  // registers are of the first eight n.
  __device__ static __forceinline__ TileReader rows(int lane) { return {lane % 16, lane / 16}; }
  // B of two mma side by side with k as the tile's columns and n as its rows.
  __device__ static __forceinline__ TileReader columns(int lane) {
    return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
  }

  template <bool kTransposed = false>
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], Shared<unsigned char> tile, int row, int column) const {
    const int piece = column / 8 % Layout::kShared, group = column / 8 - piece;
    ldmatrix<kTransposed>(fragment, tile + ((piece * 16 ^ permuted_) + row_) + (row * Layout::kRowBytes + group * 16));
  }

 private:
  __device__ __forceinline__ TileReader(int row, int piece)
      : row_(row * Layout::kRowBytes), permuted_((piece ^ Layout::swizzle(row)) * 16) {}

  int row_, permuted_;
};

// Two mma side by side.
template <class T>
__device__ __forceinline__ void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  mma<T>(d0, a, {b[0], b[1]});
  mma<T>(d1, a, {b[2], b[3]});
}

}  // namespace nsk::cuda
