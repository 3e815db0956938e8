// Tiles of a product on the processor's matrix unit: what `tile` is on vectors.
#pragma once

#include "matrix.h"
#include "microkernel.h"

namespace nsk::NSK_ISA {

// What a thread holds while it multiplies in M.
struct NothingHeld {};
template <class M>
using Multiplier = std::conditional_t<M::kMatrix, MatrixUnit, NothingHeld>;

// On the matrix unit: T x N tiles of c in its first four tiles, operands in the others.
template <int T>
NSK_INLINE void load_rows(const void* at, const void* next, ptrdiff_t stride) {
  MatrixUnit::load<4>(at, stride);
  if constexpr (T > 1) MatrixUnit::load<5>(next, stride);
}
template <int N>
NSK_INLINE void load_lanes(const void* at, const void* next, ptrdiff_t stride) {
  MatrixUnit::load<6>(at, stride);
  if constexpr (N > 1) MatrixUnit::load<7>(next, stride);
}
template <int T, int N>
NSK_INLINE void multiply_tiles() {
  MatrixUnit::multiply_add<0, 4, 6>();
  if constexpr (N > 1) MatrixUnit::multiply_add<1, 4, 7>();
  if constexpr (T > 1) MatrixUnit::multiply_add<2, 5, 6>();
  if constexpr (T > 1 && N > 1) MatrixUnit::multiply_add<3, 5, 7>();
}

// k (a multiple of 16) terms of T x N tiles. `step`: from one tile of lanes to the next.
template <class M, int T, int N>
NSK_INLINE void sum_tiles(const typename M::Unit* a, ptrdiff_t stride, const typename M::Unit* b, ptrdiff_t ldb,
                          ptrdiff_t step, ptrdiff_t k) {
  constexpr ptrdiff_t S = kMatrixSide, kRow = 64;
  MatrixUnit::zero<0>();
  MatrixUnit::zero<1>();
  MatrixUnit::zero<2>();
  MatrixUnit::zero<3>();
  const char *rows = reinterpret_cast<const char*>(a), *lanes = reinterpret_cast<const char*>(b);
  constexpr ptrdiff_t kUnit = sizeof(typename M::Unit);
  const ptrdiff_t next_rows = S * stride * kUnit, next_lanes = step * kUnit;
  if constexpr (!M::kTiled) {
    for (ptrdiff_t i = 0; i < k; i += S, rows += S * kUnit, lanes += S * ldb * kUnit) {
      load_rows<T>(rows, rows + next_rows, stride * kUnit);
      load_lanes<N>(lanes, lanes + next_lanes, ldb * kUnit);
      multiply_tiles<T, N>();
    }
  } else {
    constexpr ptrdiff_t kMiddle = S * kRow, kLow = 2 * kMiddle, kTile = 3 * kMiddle;
    auto rows_of = [&](ptrdiff_t at) { load_rows<T>(rows + at, rows + next_rows + at, kRow); };
    auto lanes_of = [&](ptrdiff_t at) { load_lanes<N>(lanes + at, lanes + next_lanes + at, kRow); };
    const ptrdiff_t end = k / S * kTile;
    for (ptrdiff_t i = 0; i < end; i += kTile) {
      lanes_of(i);
      rows_of(i + kLow);
      multiply_tiles<T, N>();
      rows_of(i + kMiddle);
      multiply_tiles<T, N>();
      lanes_of(i + kMiddle);
      multiply_tiles<T, N>();
      rows_of(i);
      multiply_tiles<T, N>();
      lanes_of(i + kLow);
      multiply_tiles<T, N>();
    }
    for (ptrdiff_t i = 0; i < end; i += kTile) {
      rows_of(i);
      lanes_of(i);
      multiply_tiles<T, N>();
    }
  }
}

// What `tile` does, for T x 16 rows. Sums leave by way of a block of memory, since tiles add and multiply only; it stays
// in cache, and the next tiles do not wait for what is done with it.
template <class M, int T, int NV, Into I>
[[gnu::noinline]] void matrix_tile(const typename M::Unit* a, ptrdiff_t stride, const typename M::Unit* b, ptrdiff_t ldb,
                                   ptrdiff_t step, ptrdiff_t k, typename M::C* c, ptrdiff_t ldc, typename M::C* lanes,
                                   const typename M::C* bias, Portion portion) {
  using C = typename M::C;
  using V = typename M::V;
  constexpr int L = M::L, S = kMatrixSide, N = NV > 1 ? 2 : 1;
  alignas(64) C block[T * S][NV * L];
  constexpr bool kAdds = I == Into::Add || I == Into::Rescale;
  const bool direct = !kAdds && portion.first && (I == Into::Fresh || !portion.last);
  C* const out = direct ? c : block[0];
  const ptrdiff_t ldo = direct ? ldc : NV * L, bytes = ldo * ptrdiff_t(sizeof(C));
#pragma GCC unroll 2
  for (int v = 0; v < NV; v += N) {
    sum_tiles<M, T, N>(a, stride, b + v * step, ldb, step, k);
    C* const at = out + v * L;
    MatrixUnit::store<0>(at, bytes);
    if constexpr (N > 1) MatrixUnit::store<1>(at + L, bytes);
    if constexpr (T > 1) MatrixUnit::store<2>(at + S * ldo, bytes);
    if constexpr (N > 1 && T > 1) MatrixUnit::store<3>(at + S * ldo + L, bytes);
  }
  if (direct) return;
  V column[NV];  // the largest or the sum
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) column[v] = I == Into::FreshMax ? load<V>(lanes + v * L) : V{};
  for (int r = 0; r < T * S; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* const to = c + r * ldc + v * L;
      V acc = load<V>(block[r] + v * L);
      if (I == Into::Add || !portion.first)
        acc = load<V>(to) + acc;
      else if constexpr (I == Into::Rescale)
        acc = load<V>(to) * load<V>(lanes + v * L) + acc;
      if constexpr (I == Into::BiasSum)
        if (portion.last) acc += bias[r];
      store(to, acc);
      if constexpr (I == Into::FreshMax)
        column[v] = max_keep<C, L>(column[v], acc);
      else if constexpr (I == Into::BiasSum)
        column[v] += acc;
    }
  if (!portion.last) return;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    if constexpr (I == Into::FreshMax) store(lanes + v * L, column[v]);
    if constexpr (I == Into::BiasSum) store(lanes + v * L, load<V>(lanes + v * L) + column[v]);
  }
}

// Rows [0, rows), terms [from, from + terms) of a product, all multiples of 16. between() is called before each tile.
template <class M, int NV, Into I, class F>
void matrix_rows(const Operands<M>& p, ptrdiff_t rows, ptrdiff_t from, ptrdiff_t terms, F&& between) {
  constexpr ptrdiff_t S = kMatrixSide;
  const Portion portion{from == 0, from + terms == p.k};
  const ptrdiff_t step = M::kTiled ? p.k * S : M::L;
  const typename M::Unit *const a = p.a + from * (M::kTiled ? S : 1), *const b = p.b + from * (M::kTiled ? S : p.ldb);
  auto some = [&](auto tiles, ptrdiff_t r) {
    between();
    matrix_tile<M, tiles.value, NV, I>(a + r * p.stride, p.stride, b, p.ldb, step, terms, p.c + r * p.ldc, p.ldc, p.lanes,
                                       I == Into::BiasSum ? p.bias + r : nullptr, portion);
  };
  ptrdiff_t r = 0;
  for (; rows - r >= 2 * S; r += 2 * S) some(std::integral_constant<int, 2>{}, r);
  if (r < rows) some(std::integral_constant<int, 1>{}, r);
}

}  // namespace nsk::NSK_ISA
