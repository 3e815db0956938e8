// The weights' gradient (residual_mlp_weight_grad.h) of floats that are multiplied in three parts (split.h).
//
// The operands of the product arrive as floats, two thirds of the bytes that the parts have, and are split by whoever
// multiplies them. So a unit of work is a square of dW: the larger, the less splitting of its two sides beside the
// product; the smaller, the more threads have work.
#pragma once

#include "residual_mlp_chain.h"

namespace nsk::NSK_ISA {

template <class C, class E>
class MlpSplitWeightGrad {
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using Operands = MlpWeightOperands<typename M::Stored>;
  using Unit = typename M::Unit;
  static constexpr ptrdiff_t kRowsAtOnce = 256, kLargeSide = 256, kSmallSide = 128;

 public:
  // Of `layers` layers at once, by `threads` threads.
  MlpSplitWeightGrad(const MlpShape& shape, int64_t layers, int threads) : s(shape), side_(kLargeSide) {
    if (units() * layers * s.groups < 2 * threads) side_ = kSmallSide;
  }

  size_t scratch_bytes() const { return size_t(2 * side_units()) * sizeof(Unit); }
  int64_t units() const { return across() * across(); }

  void run(Operands from, C* grad, int64_t unit, C* scratch) const {
    const ptrdiff_t side = side_, out = unit / across() * side, in = unit % across() * side;
    const ptrdiff_t outs = s.width - out < side ? s.width - out : side;
    const ptrdiff_t stride = Operands::dz_stride(s);
    Unit *const dz = reinterpret_cast<Unit*>(scratch), *const x = dz + side_units();
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

 private:
  ptrdiff_t across() const { return ceil_div(s.width, side_); }
  ptrdiff_t side_units() const { return side_ * kRowsAtOnce / 2; }

  const MlpShape& s;
  ptrdiff_t side_;  // of the square
};

}  // namespace nsk::NSK_ISA
