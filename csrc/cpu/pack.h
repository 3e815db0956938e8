// Bringing operands into the layouts that `product` reads: panels [k][lanes] for the vector operand, rows of elements
// for the broadcast operand. Converting from the storage type T to the element type E happens here, once per tile.
//
// With E = bf16 a unit is a pair along k, so panels are [k / 2][lanes][2] and odd ends are padded with 0.
#pragma once

#include "product.h"

namespace nsk::NSK_ISA {

constexpr ptrdiff_t ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
constexpr ptrdiff_t round_up(ptrdiff_t a, ptrdiff_t b) { return ceil_div(a, b) * b; }

// n units from a row of T starting at element `d` of `cols`; what lies past the row reads as 0.
template <class M, class T>
NSK_INLINE typename M::UnitVec load_units(const T* row, ptrdiff_t d, ptrdiff_t cols) {
  constexpr int L = M::L;
  const ptrdiff_t left = cols - d;
  if constexpr (M::pack == 1) {
    return left >= L ? load_as<typename M::C, L>(row + d) : load_partial<typename M::C, L>(row + d, left);
  } else {
    static_assert(sizeof(T) == 2);
    using H = Vec<uint16_t, 2 * L>;
    const H h = left >= 2 * L ? load<H>(row + d) : load_bytes<H>(row + d, 2 * left);
    return (typename M::UnitVec)h;
  }
}

// The panel of a transposed operand: lane r runs along rows[r], k along the columns. Null rows read as 0.
//   dst [ceil(cols / pack)][NV * L] units
template <class M, int NV, class T>
void pack_transposed(typename M::Unit* dst, const T* const* rows, ptrdiff_t cols) {
  constexpr int L = M::L;
  using U = typename M::UnitVec;
  const ptrdiff_t units = ceil_div(cols, M::pack);
  for (int v = 0; v < NV; ++v)
    for (ptrdiff_t u = 0; u < units; u += L) {
      U block[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r)
        block[r] = rows[v * L + r] ? load_units<M>(rows[v * L + r], u * M::pack, cols) : U{};
      transpose(block);
      const ptrdiff_t n = units - u < L ? units - u : L;
      for (ptrdiff_t i = 0; i < n; ++i) store(dst + (u + i) * NV * L + v * L, block[i]);
    }
}

// Panels of an operand whose columns are the lanes and whose rows are k; rows and columns past the end are 0.
//   dst [ceil(cols / (NV * L))][units][NV * L] units,   units >= ceil(rows / pack)
template <class M, int NV, class T>
void pack_panels(typename M::Unit* dst, const T* src, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t cols,
                 ptrdiff_t units) {
  constexpr int L = M::L;
  using C = typename M::C;
  using V = Vec<C, L>;
  for (ptrdiff_t d = 0; d < round_up(cols, NV * L); d += L) {
    const ptrdiff_t left = cols - d;
    typename M::Unit* out = dst + d / (NV * L) * units * NV * L + d % (NV * L);
    auto row = [&](ptrdiff_t r) {
      if (r >= rows || left <= 0) return V{};
      const T* p = src + r * stride + d;
      return left >= L ? load_as<C, L>(p) : load_partial<C, L>(p, left);
    };
    for (ptrdiff_t u = 0; u < units; ++u, out += NV * L) {
      if constexpr (M::pack == 1)
        store(out, row(u));
      else
        store(out, pair_bf16<L>(row(2 * u), row(2 * u + 1)));
    }
  }
}

// Makes row r of such panels 0.
template <class M, int NV>
void clear_panel_row(typename M::Unit* dst, ptrdiff_t r, ptrdiff_t cols, ptrdiff_t units) {
  constexpr int NR = NV * M::L;
  using Unit = typename M::Unit;
  for (ptrdiff_t d = 0; d < round_up(cols, NR); ++d) {
    Unit& unit = dst[(d / NR * units + r / M::pack) * NR + d % NR];
    if constexpr (M::pack == 1)
      unit = Unit(0);
    else
      unit &= r % 2 ? 0x0000ffffu : 0xffff0000u;
  }
}

// N / NV rows of NV vectors each, `stride` elements apart, as rows of elements. `at` and `stride` count elements.
template <class M, int NV, int N>
NSK_INLINE void store_rows(typename M::Unit* dst, ptrdiff_t at, ptrdiff_t stride, const typename M::V (&x)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; i += NV, at += stride) {
    if constexpr (M::pack == 1)
      for (int v = 0; v < NV; ++v) store(dst + at + v * M::L, x[i + v]);
    else
      for (int v = 0; v < NV; v += 2)
        store(reinterpret_cast<uint16_t*>(dst) + at + v * M::L, narrow_both<M::L>(x[i + v], x[i + v + 1]));
  }
}

// dst = src * factor, n elements, in the compute type in between.
template <class C, class D, class T>
void scale_row(D* dst, const T* src, C factor, ptrdiff_t n) {
  constexpr int L = kLanes<C>;
  ptrdiff_t i = 0;
  for (; i + L <= n; i += L) store_as<C, L>(dst + i, load_as<C, L>(src + i) * factor);
  if (i < n) store_partial<C, L>(dst + i, load_partial<C, L>(src + i, n - i) * factor, n - i);
}

// A broadcast operand: `data` in units, `stride` in units between rows (or between columns of k).
template <class M>
struct Broadcast {
  const typename M::Unit* data;
  ptrdiff_t stride;
};

// Rows along k (each row's `cols` elements are one k run): read in place where the storage type is the element type,
// else converted into `scratch`, [rows][ceil(cols / pack)] units.
template <class M, class T>
Broadcast<M> broadcast_rows(const T* src, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t cols,
                            typename M::Unit* scratch) {
  using Unit = typename M::Unit;
  if constexpr (M::pack == 1) {
    if constexpr (sizeof(T) == sizeof(Unit)) {
      return {src, stride};
    } else {
      for (ptrdiff_t r = 0; r < rows; ++r) scale_row<typename M::C>(scratch + r * cols, src + r * stride, typename M::C(1), cols);
      return {scratch, cols};
    }
  } else {
    static_assert(sizeof(T) == 2);
    if (cols % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(src) % sizeof(Unit) == 0)
      return {reinterpret_cast<const Unit*>(src), stride / 2};
    const ptrdiff_t units = ceil_div(cols, 2);
    for (ptrdiff_t r = 0; r < rows; ++r)
      for (ptrdiff_t u = 0; u < units; ++u) {
        const T* p = src + r * stride + 2 * u;
        scratch[r * units + u] = p[0].bits | (2 * u + 1 < cols ? uint32_t{p[1].bits} << 16 : 0u);
      }
    return {scratch, units};
  }
}

// Columns along k (row j of `src` is step j of k): in place, or [ceil(rows / pack)][cols] units in `scratch`.
template <class M, class T>
Broadcast<M> broadcast_columns(const T* src, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t cols,
                               typename M::Unit* scratch) {
  if constexpr (M::pack == 1) {
    return broadcast_rows<M>(src, stride, rows, cols, scratch);
  } else {
    constexpr int L = M::L;
    for (ptrdiff_t r = 0; r < rows; r += 2) {
      const T* low = src + r * stride;
      const T* high = r + 1 < rows ? low + stride : nullptr;
      typename M::Unit* out = scratch + r / 2 * cols;
      ptrdiff_t d = 0;
      for (; d + 2 * L <= cols; d += 2 * L) {
        typename M::UnitVec units[2];
        using H = Vec<uint16_t, 2 * L>;
        interleave<L>(load<H>(low + d), high ? load<H>(high + d) : H{}, units, std::make_index_sequence<2 * L>{});
        store(out + d, units[0]);
        store(out + d + L, units[1]);
      }
      for (; d < cols; ++d) out[d] = low[d].bits | (high ? uint32_t{high[d].bits} << 16 : 0u);
    }
    return {scratch, cols};
  }
}

// The transpose of rows x cols elements, as rows of pairs along what were rows; an odd last one is paired with 0.
//   dst [cols][dst_stride], of each row ceil(rows / 2) units are written
template <class M, class T>
void transpose_pairs(typename M::Unit* dst, ptrdiff_t dst_stride, const T* src, ptrdiff_t stride, ptrdiff_t rows,
                     ptrdiff_t cols) {
  static_assert(M::pack == 2 && sizeof(T) == 2);
  constexpr int L = M::L;
  using H = Vec<uint16_t, L>;
  using U = typename M::UnitVec;
  for (ptrdiff_t r = 0; r < rows; r += 2 * L) {
    const ptrdiff_t units = ceil_div(rows - r < 2 * L ? rows - r : 2 * L, 2);
    for (ptrdiff_t c = 0; c < cols; c += L) {
      const ptrdiff_t left = cols - c < L ? cols - c : L;
      auto half = [&](ptrdiff_t row) {
        if (row >= rows) return U{};
        const T* const at = src + row * stride + c;
        __builtin_prefetch(at + 2 * L * stride, 0, 3);  // of the rows after these
        return __builtin_convertvector(left == L ? load<H>(at) : load_bytes<H>(at, 2 * left), U);
      };
      U block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = half(r + 2 * i) | half(r + 2 * i + 1) << 16;
      transpose(block);
      for (ptrdiff_t i = 0; i < left; ++i)
        __builtin_memcpy(dst + (c + i) * dst_stride + r / 2, &block[i], size_t(units) * sizeof(typename M::Unit));
    }
  }
}

// Whether any of rows x cols elements is inf or NaN.
template <class C, class T>
bool any_nonfinite(const T* src, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t cols) {
  constexpr int L = kLanes<C>;
  Vec<C, L> sum{};
  for (ptrdiff_t r = 0; r < rows; ++r) {
    const T* p = src + r * stride;
    ptrdiff_t d = 0;
    for (; d + L <= cols; d += L) sum += load_as<C, L>(p + d) * C(0);
    if (d < cols) sum += load_partial<C, L>(p + d, cols - d) * C(0);
  }
  return !(reduce_add<C, L>(sum) == C(0));
}

}  // namespace nsk::NSK_ISA
