// Products of floats on a matrix unit that multiplies bf16.
//
// A float is the sum of three bf16, exactly: x = high + middle + low, where high is x rounded. Of the nine products of
// two such sums six are computed,
//
//   xy = high high' + (high middle' + middle high') + (middle middle' + high low' + low high')
//
// and what is left out is 2^-26 of xy in the mean and of either sign: less than a float's own rounding. The small ones
// are summed first, so that the sum of the large ones is as long as if there were no others. The matrix unit does 16
// times the multiply-adds of a core's vectors, a sixth of that is still more than twice as much.
//
// Both operands lie in whole tiles, one after the other, the three parts of a tile together: row (or lane) tile after
// row tile, k within them. Extents are multiples of 16 rows or lanes and 32 terms.
//
// The parts of a number below 2^-110 are no longer normal and count as 0, as does the number itself below 2^-126.
#pragma once

#include "pack.h"

namespace nsk::NSK_ISA {

// The element of such operands. A unit is a pair along k, in three parts.
struct bf16x3 {};

template <int L_>
struct Math<float, bf16x3, L_> {
  using C = float;
  using E = bf16x3;
  static constexpr int L = L_, kStep = L, pack = 2;
  static constexpr bool kMatrix = true, kTiled = true;
  using Stored = Math<float, float, L>;
  struct Unit {
    uint32_t part[3];
  };
  using V = Vec<C, L>;
};

inline constexpr ptrdiff_t kSplitTerms = 2 * kMatrixSide;           // of k, in a tile
inline constexpr ptrdiff_t kTileUnits = kMatrixSide * kMatrixSide;  // in a tile of three parts
inline constexpr ptrdiff_t kPartWords = kTileUnits;                 // 32-bit words from part to part

// Where row `row` (or step `row` of k) of tile (tile, chunk) begins, with `units` of k in all.
template <class Unit>
NSK_INLINE uint32_t* split_row(Unit* operand, ptrdiff_t units, ptrdiff_t tile, ptrdiff_t chunk, ptrdiff_t row) {
  return operand[tile * units * kMatrixSide + chunk * kTileUnits].part + row * kMatrixSide;
}

// x = part[0] + part[1] + part[2], bf16 in the upper half of each lane.
template <int L>
NSK_INLINE void split(Vec<float, L> x, Vec<uint32_t, L> (&part)[3]) {
  using V = Vec<float, L>;
  using U = Vec<uint32_t, L>;
  part[0] = ((U)x + 0x8000u) & 0xffff0000u;
  x -= (V)part[0];
  part[1] = (U)x & 0xffff0000u;  // cut off: what is left still has 8 bits at most
  x -= (V)part[1];
  part[2] = (U)x;
}

template <size_t... I>
NSK_INLINE Vec<uint32_t, 16> upper_halves(Vec<uint32_t, 16> a, Vec<uint32_t, 16> b, std::index_sequence<I...>) {
  using H = Vec<uint16_t, 32>;
  return (Vec<uint32_t, 16>)__builtin_shufflevector((H)a, (H)b, (2 * I + 1)...);
}

// A row of a tile, its three parts.
NSK_INLINE void store_parts(uint32_t* row, const Vec<uint32_t, 16> (&pairs)[3]) {
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) store(row + p * kPartWords, pairs[p]);
}

// The pairs of neighbours among 32 numbers.
NSK_INLINE void split_neighbours(Vec<float, 16> first, Vec<float, 16> second, Vec<uint32_t, 16> (&pairs)[3]) {
  Vec<uint32_t, 16> a[3], b[3];
  split<16>(first, a);
  split<16>(second, b);
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) pairs[p] = upper_halves(a[p], b[p], std::make_index_sequence<32>{});
}
NSK_INLINE void store_split(uint32_t* row, Vec<float, 16> first, Vec<float, 16> second) {
  Vec<uint32_t, 16> pairs[3];
  split_neighbours(first, second, pairs);
  store_parts(row, pairs);
}

// The pairs (low[i], high[i]).
NSK_INLINE void split_pairs(Vec<float, 16> low, Vec<float, 16> high, Vec<uint32_t, 16> (&pairs)[3]) {
  Vec<uint32_t, 16> a[3], b[3];
  split<16>(low, a);
  split<16>(high, b);
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) pairs[p] = a[p] >> 16 | b[p];
}
NSK_INLINE void store_split_pairs(uint32_t* row, Vec<float, 16> low, Vec<float, 16> high) {
  Vec<uint32_t, 16> pairs[3];
  split_pairs(low, high, pairs);
  store_parts(row, pairs);
}

// Rows that run along k, as they are multiplied; k is filled up with 0 to `units` pairs.
template <class Unit>
void split_rows(Unit* to, ptrdiff_t units, const float* from, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t cols) {
  using V = Vec<float, 16>;
  constexpr ptrdiff_t kAhead = 256;
  for (ptrdiff_t r = 0; r < rows; ++r)
    for (ptrdiff_t c = 0; c < cols; c += kSplitTerms) {
      const float* const at = from + r * stride + c;
      __builtin_prefetch(at + kAhead, 0, 3);
      __builtin_prefetch(at + kAhead + 16, 0, 3);
      store_split(split_row(to, units, r / kMatrixSide, c / kSplitTerms, r % kMatrixSide), load<V>(at),
                  c + 16 < cols ? load<V>(at + 16) : V{});
    }
}

// A tile of 16 rows whose terms are read a step of k at a time: pair(i, pairs) gives what all rows have at pair i.
template <class F>
NSK_INLINE void store_split_transposed(uint32_t* tile, F&& pair) {
  using U = Vec<uint32_t, 16>;
  U block[3][16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    U pairs[3];
    pair(i, pairs);
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) block[p][i] = pairs[p];
  }
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) {
    transpose(block[p]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(tile + p * kPartWords + i * kMatrixSide, block[p][i]);
  }
}

// Columns that run along k, as rows of the transpose. A row of tiles is asked for while the one before is split.
template <class Unit>
void split_columns(Unit* to, const float* from, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t cols) {
  using V = Vec<float, 16>;
  for (ptrdiff_t r = 0; r < rows; r += kSplitTerms)
    for (ptrdiff_t c = 0; c < cols; c += kMatrixSide)
      store_split_transposed(split_row(to, rows / 2, c / kMatrixSide, r / kSplitTerms, 0), [&](int i, auto& pairs) {
        const float* const at = from + (r + 2 * i) * stride + c;
        __builtin_prefetch(at + kSplitTerms * stride, 0, 3);
        __builtin_prefetch(at + (kSplitTerms + 1) * stride, 0, 3);
        split_pairs(load<V>(at), load<V>(at + stride), pairs);
      });
}

// Panels of NR lanes, [row][NR], whose rows run along k, as tiles of lanes; k is filled up with 0 to `units` pairs.
template <int NR, class Unit>
void split_panel(Unit* to, ptrdiff_t units, const float* from, ptrdiff_t rows) {
  using V = Vec<float, 16>;
  for (ptrdiff_t r = 0; r < 2 * units; r += 2)
    for (ptrdiff_t lane = 0; lane < NR; lane += kMatrixSide) {
      const float* const at = from + r * NR + lane;
      __builtin_prefetch(at + 8 * NR, 0, 3);
      __builtin_prefetch(at + 9 * NR, 0, 3);
      store_split_pairs(split_row(to, units, lane / kMatrixSide, r / kSplitTerms, r % kSplitTerms / 2),
                        r < rows ? load<V>(at) : V{}, r + 1 < rows ? load<V>(at + NR) : V{});
    }
}

}  // namespace nsk::NSK_ISA
