// Tiles of matrices in shared memory, and the matrix units' operands out of them.
//
// A tile keeps its rows one after another, each as pieces of 16 bytes. ldmatrix reads one piece of each of eight rows
// at a time, which is free of conflicts if they lie in eight different groups of four banks. Where rows are so long
// that several of the eight begin in the same group, their pieces are permuted (swizzled): with g = gcd(pieces of a
// row, 8), row r begins in one of 8 / g groups, and an exclusive-or of the piece's number with r / (8 / g) % g tells
// those apart that begin in the same one.
//
// An mma takes two pieces of every row: 16 columns of a half type, eight of tf32. ldmatrix, which knows nothing of
// types, puts either where it belongs. Only its transposed form is for 16 bits, and numbers of 32 are read one by one there.
#pragma once

#include "device.cuh"

namespace nsk::cuda {

template <class T, int kColumns>
struct Tile {
  static constexpr int kOfPiece = 16 / int(sizeof(T)), kPieces = kColumns / kOfPiece, kRowBytes = 16 * kPieces;
  static_assert(kColumns % (2 * kOfPiece) == 0, "mma takes two pieces at a time");
  static constexpr int kSteps = kPieces / 2;  // of a product along the columns
  static constexpr int kShared = kPieces % 8 == 0 ? 8 : kPieces % 4 == 0 ? 4 : 2;  // gcd(kPieces, 8)

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // Where a piece of a row begins.
  __device__ static __forceinline__ int at(int row, int piece) { return row * kRowBytes + (piece ^ swizzle(row)) * 16; }
  // Where a lane has the two numbers of a row that are its own among the sums of columns 8 n to 8 n + 7.
  __device__ static __forceinline__ int pair_at(int row, int n, int lane) {
    if constexpr (sizeof(T) == 2)
      return at(row, n) + lane % 4 * 4;
    else
      return at(row, 2 * n + lane % 4 / 2) + lane % 2 * 8;
  }
  // It depends on row % 8 alone, and permutes pieces within groups of kShared. Numbers of 32 bits are read and written
  // by two pieces of four rows at a time as well, every other row or neighbours: with the bits r2 r1 r0 of the row,
  // that r1, r2 ^ r0, r0 tells apart.
  __device__ static __forceinline__ int swizzle(int row) {
    if constexpr (sizeof(T) == 4 && kShared == 8)
      return row / 2 % 2 * 4 + (row / 4 ^ row) % 2 * 2 + row % 2;
    else
      return row / (8 / kShared) % kShared;
  }
};

// Copies rows of a matrix into tiles, shared by `kThreads` threads. Those that are neighbours take the pieces of a
// group, further ones the rows below. So all that a thread keeps is where its first row begins: the places of its other
// pieces differ from there by constants in the tile, and by whole rows in the matrix.
template <int kRows, int kColumns, int kThreads, class T>
class TileLoader {
  using Layout = Tile<T, kColumns>;
  static constexpr int kGroup = Layout::kShared, kStep = kThreads / kGroup;
  static_assert(kRows % kStep == 0, "every thread copies as many pieces");

 public:
  __device__ __forceinline__ TileLoader(Global<const T> matrix, int64_t stride, int rows, int thread)
      : from_(matrix + (thread / kGroup * stride + thread % kGroup * Layout::kOfPiece)),
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
      for (int group = 0; group < Layout::kPieces; group += kGroup) f(there + group * 16, r, group * Layout::kOfPiece);
    }
  }

  Global<const T> from_;
  int64_t stride_;
  int rows_, thread_;
};

// What ldmatrix takes from a tile, for one lane. `row` and `piece` are multiples of 8 and 2, known when compiling.
template <class T, int kColumns>
class TileReader {
  using Layout = Tile<T, kColumns>;

 public:
  // A, 16 rows; and B of two mma of a half type side by side with k as the tile's rows and n as its columns,
  // transposed: its first two registers are of the first eight n.
  __device__ static __forceinline__ TileReader rows(int lane) { return {lane % 16, lane / 16}; }
  // B of two mma side by side with k as the tile's columns and n as its rows.
  __device__ static __forceinline__ TileReader columns(int lane) {
    return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
  }

  template <bool kTransposed = false>
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], Shared<unsigned char> tile, int row, int piece) const {
    static_assert(!kTransposed || sizeof(T) == 2);
    const int own = piece % Layout::kShared, group = piece - own;
    ldmatrix<kTransposed>(fragment, tile + ((own * 16 ^ permuted_) + row_) + (row * Layout::kRowBytes + group * 16));
    round_operand<T>(fragment);
  }

 private:
  __device__ __forceinline__ TileReader(int row, int piece)
      : row_(row * Layout::kRowBytes), permuted_((piece ^ Layout::swizzle(row)) * 16) {}

  int row_, permuted_;
};

// B of an mma of tf32 with k as the tile's rows, eight from `row` on, and n as its columns, eight from 8 n on: for one
// lane. k is counted in another order than rows: the even ones come first, so that a lane has those two neighbours that
// are its own among the sums of another product.
template <class T, int kColumns>
class TransposedReader {
  using Layout = Tile<T, kColumns>;
  static_assert(sizeof(T) == 4);

 public:
  __device__ __forceinline__ explicit TransposedReader(int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane % 4 * 2 + i;
      row_[i] = row * Layout::kRowBytes + lane / 4 % 4 * 4;
      permuted_[i] = (lane / 16 ^ Layout::swizzle(row)) * 16;
    }
  }

  __device__ __forceinline__ void load(uint32_t (&b)[2], Shared<unsigned char> tile, int row, int n) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = as<const float>(tile + at(i, row, n))[0];
      b[i] = to_tf32(x);
    }
  }
  __device__ __forceinline__ int at(int i, int row, int n) const {
    const int own = 2 * n % Layout::kShared, group = 2 * n - own;
    return (own * 16 ^ permuted_[i]) + row_[i] + (row * Layout::kRowBytes + group * 16);
  }

 private:
  int row_[2], permuted_[2];
};

// The sign of every number in a word of operands.
template <class T>
inline constexpr uint32_t kSigns = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;

// Two mma side by side.
template <class T>
__device__ __forceinline__ void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  mma<T>(d0, a, {b[0], b[1]});
  mma<T>(d1, a, {b[2], b[3]});
}

// A of all columns of 16 rows, from the tile's first on. `sign` is for its numbers.
template <class T, int kColumns>
__device__ __forceinline__ void load_rows(uint32_t (&a)[Tile<T, kColumns>::kSteps][4], Shared<unsigned char> tile,
                                          uint32_t sign, int lane) {
#pragma unroll
  for (int step = 0; step < Tile<T, kColumns>::kSteps; ++step) {
    TileReader<T, kColumns>::rows(lane).load(a[step], tile, 0, 2 * step);
#pragma unroll
    for (uint32_t& x : a[step]) x ^= sign;
  }
}

// sums += a b^T along all columns, for 8 kBlocks rows of a tile `b`, from its first on.
template <class T, int kColumns, int kBlocks>
__device__ __forceinline__ void multiply_tiles(float (&sums)[kBlocks][4],
                                               const uint32_t (&a)[Tile<T, kColumns>::kSteps][4],
                                               Shared<unsigned char> b_tile, int lane) {
#pragma unroll
  for (int step = 0; step < Tile<T, kColumns>::kSteps; ++step)
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t b[4];
      TileReader<T, kColumns>::columns(lane).load(b, b_tile, 8 * n, 2 * step);
      mma_pair<T>(sums[n], sums[n + 1], a[step], b);
    }
}

// The same with `a` from a tile too, read when its turn comes.
template <class T, int kColumns, int kBlocks>
__device__ __forceinline__ void multiply_tiles(float (&sums)[kBlocks][4], Shared<unsigned char> a_tile,
                                               Shared<unsigned char> b_tile, uint32_t sign, int lane) {
  using Layout = Tile<T, kColumns>;
  using Reader = TileReader<T, kColumns>;
  // Pieces are permuted in groups, of which each is as the first. A loop over groups keeps the compiler from bringing
  // operands long before their turn, of which tf32 has so many that it runs out of registers.
  constexpr int kGroups = Layout::kPieces / Layout::kShared;
#pragma unroll sizeof(T) == 2 ? kGroups : 1
  for (int group = 0; group < kGroups; ++group) {
    const int from = group * (16 * Layout::kShared);
#pragma unroll
    for (int step = 0; step < Layout::kShared / 2; ++step) {
      uint32_t a[4];
      Reader::rows(lane).load(a, a_tile + from, 0, 2 * step);
#pragma unroll
      for (uint32_t& x : a) x ^= sign;
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        uint32_t b[4];
        Reader::columns(lane).load(b, b_tile + from, 8 * n, 2 * step);
        mma_pair<T>(sums[n], sums[n + 1], a, b);
      }
    }
  }
}

}  // namespace nsk::cuda
