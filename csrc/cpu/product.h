// Products of whole panels, out of register tiles and, where a processor has a matrix unit, of its tiles.
#pragma once

#include "matrix_kernel.h"

namespace nsk::NSK_ISA {

// All rows of one panel. `stride`, `ldb`, `k` and the pointers a, b count units; `ldb` is from one step of the panel to
// the next. `ahead`: Ahead, Beside, Upcoming* or nothing.
// In a Math whose operands are tiled (split.h) rows and k fill whole tiles, and `stride` is k.
template <class M, int NV, Along A, Into I, class P = NothingAhead>
void product(ptrdiff_t rows, const typename M::Unit* a, ptrdiff_t stride, const typename M::Unit* b, ptrdiff_t k,
             typename M::C* c, ptrdiff_t ldc, typename M::C* lanes = nullptr, P ahead = {},
             ptrdiff_t ldb = NV * M::kStep, const typename M::C* bias = nullptr) {
  constexpr bool kScores = A == Along::K && (I == Into::Fresh || I == Into::FreshMax);
  constexpr bool kLong = M::kTiled || I == Into::BiasSum || kScores || std::is_same_v<P, Beside>;
  constexpr bool kBetween = std::is_same_v<P, Upcoming*>;
  constexpr ptrdiff_t kMost = M::kTiled ? kMostTiledTerms : kMostTerms<NV>;
  const Operands<M> p{a, stride, b, ldb, k, c, ldc, lanes, bias};
  std::conditional_t<kBetween, NothingAhead, P> within{};
  if constexpr (!kBetween) within = ahead;
  auto ask = [&] {
    if constexpr (kBetween) ahead->ask();
  };
  const ptrdiff_t most = kLong && k > kMost ? kMost : k;
  ptrdiff_t from = 0;
  do {
    const ptrdiff_t terms = k - from < most ? k - from : most;
    if constexpr (M::kTiled) {
      matrix_rows<M, NV, I>(p, rows, from, terms, ask);
    } else if constexpr (M::kMatrix && A == Along::K) {
      // What the unit's tiles leave over is the vectors': the rest of k, the rest of the rows.
      const ptrdiff_t whole = terms / kMatrixSide * kMatrixSide, fit = whole ? rows / kMatrixSide * kMatrixSide : 0;
      matrix_rows<M, NV, I>(p, fit, from, whole, [&] {
        for (int i = 0; i < kMatrixSide; i += kTileRows<NV>) ask();
      });
      if (fit > 0 && whole < terms) vector_rows<M, NV, A, I>(p, 0, fit, from + whole, terms - whole, within, ask);
      if (fit < rows) vector_rows<M, NV, A, I>(p, fit, rows, from, terms, within, ask);
    } else {
      vector_rows<M, NV, A, I>(p, 0, rows, from, terms, within, ask);
    }
    from += most;
  } while (from < k);
}

// c += ab for one panel of columns, of which the first `left` are wanted: where they fit half of it, the other half is
// spared.
template <class M, int NV, Along A>
void add_columns(ptrdiff_t left, ptrdiff_t rows, const typename M::Unit* a, ptrdiff_t stride, const typename M::Unit* b,
                 ptrdiff_t k, typename M::C* c, ptrdiff_t ldc) {
  if (left > NV * M::L / 2)
    product<M, NV, A, Into::Add>(rows, a, stride, b, k, c, ldc);
  else
    product<M, NV / 2, A, Into::Add>(rows, a, stride, b, k, c, ldc, nullptr, NothingAhead{}, NV * M::kStep);
}

// Spreads `bytes` from `at` over the steps of a product of `rows` rows and depth k.
template <int NV, int Lines = 1>
inline Ahead<Lines> spread(const void* at, ptrdiff_t bytes, ptrdiff_t rows, ptrdiff_t k) {
  const ptrdiff_t lines = (rows + kTileRows<NV> - 1) / kTileRows<NV> * k * Lines;
  return {static_cast<const char*>(at), lines > 0 ? (bytes + lines - 1) / lines : 0};
}

}  // namespace nsk::NSK_ISA
