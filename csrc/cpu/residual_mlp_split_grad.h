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
  static constexpr ptrdiff_t kRowsAtOnce = 256;
  // Of the square: the larger, the less splitting; the smaller, the more threads have work.
  static ptrdiff_t side(const MlpShape& s) { return s.width < 512 ? 128 : 256; }
  static ptrdiff_t side_units(const MlpShape& s) { return side(s) * kRowsAtOnce / 2; }

 public:
  static size_t scratch_bytes(const MlpShape& s) { return size_t(2 * side_units(s)) * sizeof(Unit); }
  static int64_t units(const MlpShape& s) { return ceil_div(s.width, side(s)) * ceil_div(s.width, side(s)); }

  static void run(const MlpShape& s, Operands from, C* grad, int64_t unit, C* scratch) {
    const ptrdiff_t side = MlpSplitWeightGrad::side(s), across = ceil_div(s.width, side);
    const ptrdiff_t out = unit / across * side, in = unit % across * side;
    const ptrdiff_t outs = s.width - out < side ? s.width - out : side;
    const ptrdiff_t stride = Operands::dz_stride(s);
    Unit *const dz = reinterpret_cast<Unit*>(scratch), *const x = dz + side_units(s);
    for (ptrdiff_t row = 0; row < s.padded; row += kRowsAtOnce) {
      const ptrdiff_t rows = s.padded - row < kRowsAtOnce ? s.padded - row : kRowsAtOnce;
      const ptrdiff_t k = round_up(rows, kSplitTerms) / 2;
      split_rows(dz, k, from.dz + out * stride + row, stride, outs, rows);
      for_panels<L>(s.width, [&](auto columns, ptrdiff_t first) {
        if (first < in || first >= in + side) return;
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
