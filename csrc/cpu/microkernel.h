// The register-blocked product that every kernel here is made of:
//
//   c[r][lane] (+)= sum_k a(r, k) * b[k][lane]        r < rows, lane < NV * L
//
// `b` is a packed panel, NV vectors wide and contiguous in k; `a` is the broadcast operand, read in place: its rows
// run along k (a[r * stride + k]) or its columns do (a[k * stride + r]). A tile of R x NV accumulators stays in
// registers for the whole of k: on 16 registers 6 x 2 leaves room for one row of the panel and one broadcast.
//
// The element of a and b is a `Unit`: one float or double, or a pair of bf16 along k in 32 bits, for processors that
// multiply bf16 pairs and add to float. Where they have a matrix unit, it multiplies what fills its tiles.
//
// Each tile is a function of its own, never inlined: in a larger function the compiler spills accumulators, and folds
// the panel's loads into every FMA, which doubles the load traffic (measured: 0.60 instead of 0.88 of the FMA roof).
#pragma once

#include "matrix.h"

namespace nsk::NSK_ISA {

// What the products compute in: C accumulates, E is the element of the operands, L the lanes of a vector.
template <class C_, class E_, int L_>
struct Math {
  using C = C_;
  using E = E_;
  static constexpr int L = L_;
  static constexpr int kStep = L;  // units in a vector of a panel
  static constexpr int pack = sizeof(E) == 2 ? 2 : 1;
  static constexpr bool kMatrix = kHasMatrixUnit && pack == 2 && L == kMatrixSide;
  static constexpr bool kTiled = false;  // whether operands lie in whole tiles, as split.h makes them
  using Stored = Math;                   // what they are made from
  using Unit = std::conditional_t<pack == 2, uint32_t, C>;
  using V = Vec<C, L>;
  using UnitVec = Vec<Unit, L>;

  static NSK_INLINE V multiply_add(V acc, UnitVec b, Unit a) {
    if constexpr (pack == 1) {
      return b * a + acc;
    } else {
#if defined(__AVX512BF16__)
      if constexpr (L == 16)
        return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32(int(a)));
      else if constexpr (L == 8)
        return (V)_mm256_dpbf16_ps((__m256)acc, (__m256bh)b, (__m256bh)_mm256_set1_epi32(int(a)));
#endif
      const uint32_t high = 0xffff0000u;
      acc += (V)(b & high) * bit_cast<float>(a & high);
      return acc + (V)(b << 16) * bit_cast<float>(a << 16);
    }
  }

  // Lane by lane.
  static NSK_INLINE V multiply_add(V acc, UnitVec b, UnitVec a) {
    if constexpr (pack == 1) {
      return b * a + acc;
    } else {
#if defined(__AVX512BF16__)
      if constexpr (L == 16) return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)a);
#endif
      const UnitVec high = splat<uint32_t, L>(0xffff0000u);
      acc += (V)(b & high) * (V)(a & high);
      return acc + (V)(b << 16) * (V)(a << 16);
    }
  }
};

// The same with two lanes for each column of the panel: lane 2 c takes one unit of k and lane 2 c + 1 the next, so that
// eight columns fill a vector of sixteen lanes. The two sums of a column are added afterwards.
template <class M_>
struct TwinMath {
  using C = typename M_::C;
  using V = typename M_::V;
  using Unit = uint64_t;
  static constexpr int L = M_::L, kStep = L / 2, pack = 2 * M_::pack;
  static constexpr bool kMatrix = false, kTiled = false;
  using UnitVec = Vec<Unit, kStep>;
  static_assert(sizeof(C) == 4);

  static NSK_INLINE V multiply_add(V acc, UnitVec b, Unit a) {
    using U = typename M_::UnitVec;
    return M_::multiply_add(acc, (U)b, (U)(a - UnitVec{}));
  }
};

// Element j of k, out of the unit that holds it.
template <class M>
NSK_INLINE typename M::C unit_element(typename M::Unit unit, ptrdiff_t j) {
  if constexpr (M::pack == 1)
    return unit;
  else
    return bit_cast<float>(j % 2 ? unit & 0xffff0000u : unit << 16);
}

enum class Along { K, Rows };  // what is contiguous in the broadcast operand
// c = ab;  c += ab;  c = c * lanes[lane] + ab;  c = ab and lanes[lane] = the largest of itself and the lane's results;
// c = ab + bias[row] and lanes[lane] += the lane's results.
enum class Into { Fresh, Add, Rescale, FreshMax, BiasSum };

// Memory to ask for while a product runs: `Lines` lines per step of k, one after the other. For products of so few
// lanes that reading their operands is the work: the next operand arrives while this one is multiplied.
template <int Lines>
struct Ahead {
  const char* at;
  ptrdiff_t step;
  NSK_INLINE void ask() {
    for (int i = 0; i < Lines; ++i, at += step) __builtin_prefetch(at, 0, 3);
  }
};
struct NothingAhead {};

// Whether memory in such steps falls into a single set of the nearest cache, of 64 sets of 64 bytes: what is read so has
// pushed out its own lines before they are read again.
constexpr bool in_one_set(ptrdiff_t step_bytes) { return step_bytes % 4096 == 0; }

// What stands `bytes` behind each column of the broadcast operand, where its columns are contiguous: the cache line that a
// later register tile will read. And the column that is `columns` further, about to be read: columns lie a matrix's width
// apart, which where that is a power of two is in few sets of the nearest cache, so that none is still there from the tile
// before (measured on Zen 3: 0.95 instead of 0.91 of the FMA roof). Where it is a single set there is no room for more.
struct Beside {
  ptrdiff_t bytes, columns;

  static Beside of_rows(ptrdiff_t row_bytes) { return {64, in_one_set(row_bytes) ? 0 : 4}; }
};

// The rows of the next register tile, where the rows of the broadcast operand run along k.
struct NextRows {};

// Rows of memory to ask for while products run, a few lines before each register tile: for products that do more than
// they read, whose next operands should not keep them waiting either.
class Upcoming {
 public:
  // What is asked for is spread over this many register tiles; what is left when they are done is dropped.
  void begin(int64_t tiles) {
    parts_ = at_ = line_ = 0;
    lines_ = 0;
    tiles_ = tiles;
  }
  void add(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    if (rows <= 0 || parts_ == kMost) return;
    part_[parts_++] = {static_cast<const char*>(first), stride, rows, int((bytes + 63) / 64)};
    lines_ += rows * ((bytes + 63) / 64);
    per_tile_ = int((lines_ + tiles_ - 1) / tiles_);
  }
  NSK_INLINE void ask() {
    for (int n = per_tile_; n > 0 && at_ < parts_; --n) {
      Part& part = part_[at_];
      __builtin_prefetch(part.row + 64 * line_, 0, 2);
      if (++line_ < part.lines) continue;
      line_ = 0;
      part.row += part.stride;
      if (--part.rows == 0) ++at_;
    }
  }

 private:
  struct Part {
    const char* row;
    int64_t stride, rows;
    int lines;
  };
  static constexpr int kMost = 4;
  Part part_[kMost];
  int parts_ = 0, at_ = 0, line_ = 0, per_tile_ = 0;
  int64_t lines_ = 0, tiles_ = 1;
};

// Where k is the width of a network or a head dimension it may be hundreds of terms or thousands: the product then goes
// over it in portions of this many units. A portion of the panel stays in the core's nearest cache while all rows pass
// (measured on Golden Cove: 0.83 instead of 0.79 of the FMA roof), and c grows by sums, not term by term. A panel of one
// cache line leaves room for more: rows of 256 floats are then read in one sweep (8 % faster for 16 rows from the last
// cache on Golden Cove, 3 % for many on Zen 3). That costs accuracy: sums twice as long have 1.4 times the error of eager
// torch's instead of 1.04 times, of the 2 that are allowed.
template <int NV>
inline constexpr ptrdiff_t kMostTerms = NV * kVectorBytes <= 64 ? 256 : 128;
inline constexpr ptrdiff_t kMostTiledTerms = 64;

// Where a portion stands in its k.
struct Portion {
  bool first = true, last = true;
};

// R rows of a matrix, read a column at a time. A pointer to each of more than 8 is more than there are registers, and in
// vector registers, where the compiler then keeps them, it takes the multiplications' time (13 % of a product of 16 rows).
// So some rows are reached from others, as base + 1, 2, 4 or 8 strides, which the processor adds up for nothing.
template <int R, class Unit>
class Column {
 public:
  NSK_INLINE Column(const Unit* a, ptrdiff_t stride) : bytes_(stride * ptrdiff_t(sizeof(Unit))) {
#pragma GCC unroll 6
    for (int b = 0; b < kBases; ++b) base_[b] = reinterpret_cast<const char*>(a) + 3 * b * bytes_;
  }
  NSK_INLINE const Unit& operator[](int row) const {
    return *reinterpret_cast<const Unit*>(base_[kBase[row]] + kStrides[row] * bytes_);
  }
  NSK_INLINE void next() {
#pragma GCC unroll 6
    for (int b = 0; b < kBases; ++b) {
      base_[b] += sizeof(Unit);
      asm("" : "+r"(base_[b]));  // not a pointer to each row after all
    }
  }

 private:
  static_assert(R <= 16);
  static constexpr int kBases = (R + 2) / 3;
  static constexpr int kBase[] = {0, 0, 0, 1, 0, 1, 2, 1, 0, 3, 2, 1, 4, 3, 2, 5};  // base b is row 3 b
  static constexpr int kStrides[] = {0, 1, 2, 0, 4, 2, 0, 4, 8, 0, 4, 8, 0, 4, 8, 0};
  const char* base_[kBases];
  ptrdiff_t bytes_;
};

template <class M, int R, int NV, Along A, Into I, class P>
[[gnu::noinline]] void tile(const typename M::Unit* a, ptrdiff_t stride, const typename M::Unit* b, ptrdiff_t k,
                            typename M::C* c, ptrdiff_t ldc, typename M::C* lanes, P& ahead, ptrdiff_t ldb,
                            const typename M::C* bias, Portion portion) {
  using C = typename M::C;
  using V = typename M::V;
  using B = typename M::UnitVec;
  constexpr int L = M::L;
  // From 0 even where c is added to: a long sum loses less to rounding.
  V acc[R][NV];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
  const typename M::Unit* next = a + R * stride;
  ptrdiff_t column = 0;
  constexpr bool kManyRows = A == Along::K && R > 8;
  [[maybe_unused]] Column<R, typename M::Unit> rows(a, stride);
  for (ptrdiff_t i = 0; i < k; ++i) {
    B panel[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      panel[v] = load<B>(b + v * M::kStep);
#if defined(__AVX__)
      asm("" : "+x"(panel[v]));  // one load into a register, not one in each multiplication
#endif
    }
    b += ldb;
    if constexpr (std::is_same_v<P, Beside>) {
      static_assert(A == Along::Rows);
      __builtin_prefetch(reinterpret_cast<const char*>(a + i * stride) + ahead.bytes, 0, 2);
      __builtin_prefetch(a + (i + ahead.columns) * stride + R - 1, 0, 3);
    } else if constexpr (std::is_same_v<P, NextRows>) {
      if (i % 2 == 0) {
        __builtin_prefetch(next + column, 0, 3);
        column += 2 * R;
        next += column >= k ? stride : 0;
        column -= column >= k ? k : 0;
      }
    } else if constexpr (!std::is_same_v<P, NothingAhead>)
      ahead.ask();
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const typename M::Unit x = A == Along::Rows ? a[i * stride + r] : kManyRows ? rows[r] : a[r * stride + i];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = M::multiply_add(acc[r][v], panel[v], x);
    }
    if constexpr (kManyRows) rows.next();
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* to = c + r * ldc + v * L;
      if (I == Into::Add || !portion.first)
        acc[r][v] = load<V>(to) + acc[r][v];
      else if constexpr (I == Into::Rescale)
        acc[r][v] = load<V>(to) * load<V>(lanes + v * L) + acc[r][v];
      if constexpr (I == Into::BiasSum)
        if (portion.last) acc[r][v] += bias[r];
      store(to, acc[r][v]);
    }
  if (!portion.last) return;
  if constexpr (I == Into::FreshMax) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      V most = load<V>(lanes + v * L);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) most = max_keep<typename M::C, L>(most, acc[r][v]);
      store(lanes + v * L, most);
    }
  }
  if constexpr (I == Into::BiasSum) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      V sum = acc[0][v];
#pragma GCC unroll 32
      for (int r = 1; r < R; ++r) sum += acc[r][v];
      store(lanes + v * L, load<V>(lanes + v * L) + sum);
    }
  }
}

// Rows of a full tile: accumulators, a panel row and a broadcast must fit the registers. The more of them, the fewer
// loads a multiplication needs (measured on Golden Cove, which loads and multiplies less than both at full rate: 6 x 4
// reach 0.83 of the FMA roof, 4 x 4 0.78); but attention skips masked keys in steps of two vectors' rows.
template <int NV>
inline constexpr int kTileRows = kVectorRegisters == 32 ? (NV == 4 ? 6 : 16 / NV) : 12 / NV;

// Fewer rows than a full tile has: the largest power of two first. A tile for every count would be faster by little and
// take twice as long to compile.
template <class M, int R, int NV, Along A, Into I, class P>
void tail(ptrdiff_t rows, const typename M::Unit* a, ptrdiff_t stride, const typename M::Unit* b, ptrdiff_t k,
          typename M::C* c, ptrdiff_t ldc, typename M::C* lanes, P& ahead, ptrdiff_t ldb, const typename M::C* bias,
          Portion portion) {
  if (rows >= R) {
    tile<M, R, NV, A, I>(a, stride, b, k, c, ldc, lanes, ahead, ldb, bias, portion);
    rows -= R;
    a += R * (A == Along::K ? stride : 1);
    c += R * ldc;
    if constexpr (I == Into::BiasSum) bias += R;
  }
  if constexpr (R > 1)
    if (rows > 0) tail<M, R / 2, NV, A, I>(rows, a, stride, b, k, c, ldc, lanes, ahead, ldb, bias, portion);
}
constexpr int power_of_two_below(int n) {
  int p = 1;
  while (2 * p < n) p *= 2;
  return p;
}

// A product c = ab: what `product` is given.
template <class M>
struct Operands {
  const typename M::Unit* a;
  ptrdiff_t stride;
  const typename M::Unit* b;
  ptrdiff_t ldb, k;
  typename M::C* c;
  ptrdiff_t ldc;
  typename M::C* lanes;
  const typename M::C* bias;
};

// Rows [begin, end), terms [from, from + terms) of it. `within` is asked for memory inside of tiles; between() is called
// before each.
template <class M, int NV, Along A, Into I, class P, class F>
void vector_rows(const Operands<M>& p, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t from, ptrdiff_t terms, P& within,
                 F&& between) {
  constexpr int R = kTileRows<NV>;
  const Portion portion{from == 0, from + terms == p.k};
  const ptrdiff_t step = A == Along::K ? p.stride : 1;
  const typename M::Unit *at = p.a + from * (A == Along::K ? 1 : p.stride) + begin * step, *panel = p.b + from * p.ldb;
  const typename M::C* bias = I == Into::BiasSum ? p.bias + begin : nullptr;
  ptrdiff_t r = begin;
  for (; end - r >= R; r += R, at += R * step) {
    between();
    tile<M, R, NV, A, I>(at, p.stride, panel, terms, p.c + r * p.ldc, p.ldc, p.lanes, within, p.ldb, bias, portion);
    if constexpr (I == Into::BiasSum) bias += R;
  }
  if constexpr (R > 1)
    if (end > r)
      tail<M, power_of_two_below(R), NV, A, I>(end - r, at, p.stride, panel, terms, p.c + r * p.ldc, p.ldc, p.lanes, within,
                                               p.ldb, bias, portion);
}

}  // namespace nsk::NSK_ISA
