// The weights' gradient (residual_mlp_weight_grad.h) of floats that are multiplied in three parts (split.h).
//
// The operands of the product arrive as floats, two thirds of the bytes that the parts have, and are split by whoever
// multiplies them. So a unit of work is a square of dW, large enough that splitting its two sides is little beside the
// product.
#pragma once

#include "residual_mlp_chain.h"

namespace nsk::NSK_ISA {

template <class C, class E>
class MlpSplitWeightGrad {
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using Operands = MlpWeightOperands<typename M::Stored>;
  using Unit = typename M::Unit;
  static constexpr ptrdiff_t kSide = 128, kRowsAtOnce = 256;
  static constexpr ptrdiff_t kSideUnits = kSide * kRowsAtOnce / 2;

 public:
  static size_t scratch_bytes() { return size_t(2 * kSideUnits) * sizeof(Unit); }
  static int64_t units(const MlpShape& s) { return ceil_div(s.width, kSide) * ceil_div(s.width, kSide); }

  static void run(const MlpShape& s, Operands from, C* grad, int64_t unit, C* scratch) {
    const int64_t across = ceil_div(s.width, kSide);
    const ptrdiff_t out = unit / across * kSide, in = unit % across * kSide;
    const ptrdiff_t outs = s.width - out < kSide ? s.width - out : kSide;
    const ptrdiff_t stride = Operands::dz_stride(s);
    Unit *const dz = reinterpret_cast<Unit*>(scratch), *const x = dz + kSideUnits;
    for (ptrdiff_t row = 0; row < s.padded; row += kRowsAtOnce) {
      const ptrdiff_t rows = s.padded - row < kRowsAtOnce ? s.padded - row : kRowsAtOnce;
      const ptrdiff_t k = round_up(rows, kSplitTerms) / 2;
      split_rows(dz, k, from.dz + out * stride + row, stride, outs, rows);
      for_panels<L>(s.width, [&](auto columns, ptrdiff_t first) {
        if (first < in || first >= in + kSide) return;
        constexpr int NV = columns.value, NR = NV * L;
        split_panel<NR>(x, k, from.x + first * s.padded + row * NR, rows);
        C* const to = grad + out * s.width + first;
        if (row == 0)
          product<M, NV, Along::K, Into::Fresh>(outs, dz, k, x, k, to, s.width);
        else
          product<M, NV, Along::K, Into::Add>(outs, dz, k, x, k, to, s.width);
      });
    }
  }
};

}  // namespace nsk::NSK_ISA
