// The parameters' gradients of a few layers at once: the part of the backward that is not sequential.
//
//   dW [out][in] = sum over rows of dz [row][out] x [row][in];   db, dgamma, dbeta = the tiles' shares added up in order
//
// Whoever computes an element of dW sums over the whole batch, in order: no atomics, no copies to add up, the same bits
// every time.
#pragma once

#include "residual_mlp_chain.h"

namespace nsk::NSK_ISA {

// A unit of work is a block of dW: for a piece of the batch its rows' share of dz stays in the core's cache while the panels
// of x pass, so that neither is read from afar more than a few times.
template <class T, class C, class E>
class MlpWeightGrad {
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using Operands = MlpWeightOperands<M>;
  static constexpr ptrdiff_t kRowsAtOnce = 256;  // of the batch: a panel of x stays in the nearest cache, and sums grow by sums
  static constexpr ptrdiff_t kOut = 64, kMostIn = 64, kLeastIn = kWidePanel * L;  // of a block
  static_assert(kMostIn % kLeastIn == 0);

 public:
  // Of `layers` layers at once, by `threads` threads: in blocks so small that threads end together.
  MlpWeightGrad(const MlpShape& shape, int64_t layers, int threads) : s(shape), in_(kMostIn) {
    if (units() * layers * s.groups < 8 * threads) in_ = kLeastIn;
  }

  size_t scratch_bytes() const { return size_t(kOut * in_) * sizeof(C); }
  int64_t units() const { return ceil_div(s.width, kOut) * across(); }

  void run(Operands from, T* grad, int64_t unit, C* scratch) const {
    const ptrdiff_t out = unit / across() * kOut, in = unit % across() * in_;
    const ptrdiff_t outs = s.width - out < kOut ? s.width - out : kOut;
    auto panels = [&](auto&& f) {
      for_panels<L>(round_up(s.width, L), [&](auto columns, ptrdiff_t first) {
        if (first < in || first >= in + in_) return;
        const bool in_place = std::is_same_v<T, C> && first + columns.value * L <= s.width;
        f(columns, first, in_place, scratch + (first - in) * kOut);
      });
    };
    for (ptrdiff_t row = 0; row < s.padded; row += kRowsAtOnce)
      panels([&](auto columns, ptrdiff_t first, bool in_place, C* apart) {
        C* const c = in_place ? reinterpret_cast<C*>(grad + out * s.width + first) : apart;
        add<columns.value>(from, row, out, outs, first, c, in_place ? s.width : columns.value * L);
      });
    panels([&](auto columns, ptrdiff_t first, bool in_place, const C* apart) {
      if (in_place) return;
      constexpr int NR = columns.value * L;
      const ptrdiff_t wanted = s.width - first < NR ? s.width - first : NR;
      for (ptrdiff_t r = 0; r < outs; ++r) scale_row<C>(grad + (out + r) * s.width + first, apart + r * NR, C(1), wanted);
    });
  }

 private:
  int64_t across() const { return ceil_div(s.width, in_); }

  // Rows [out, out + outs) of a panel of columns: what the piece of the batch that begins at `row` gives.
  template <int NV>
  void add(Operands from, ptrdiff_t row, ptrdiff_t out, ptrdiff_t outs, ptrdiff_t first, C* c, ptrdiff_t ldc) const {
    const ptrdiff_t rows = s.padded - row < kRowsAtOnce ? s.padded - row : kRowsAtOnce, k = rows / M::pack;
    const ptrdiff_t stride = Operands::dz_stride(s);
    const auto* const x = from.x + (first * s.padded + row * NV * L) / M::pack;
    const auto* const dz = from.dz + out * stride + row / M::pack;
    if (row == 0)
      product<M, NV, Along::K, Into::Fresh>(outs, dz, stride, x, k, c, ldc, nullptr, NextRows{});
    else
      product<M, NV, Along::K, Into::Add>(outs, dz, stride, x, k, c, ldc, nullptr, NextRows{});
  }

  const MlpShape& s;
  ptrdiff_t in_;  // columns of a block
};

// Adds up the tiles' shares of one layer's vectors, [tile][3][width], into the gradients that are asked for.
template <class T, class C>
void add_vector_grads(const nsk_residual_mlp_backward& b, int64_t group, int64_t layer, const C* shares, int64_t tiles) {
  constexpr int L = kLanes<C>;
  const ptrdiff_t width = b.forward.width;
  const nsk_view* const grads[] = {&b.grad_bias, &b.grad_ln_weight, &b.grad_ln_bias};
  for (int which = 0; which < 3; ++which) {
    const nsk_view& grad = *grads[which];
    if (!grad.data) continue;
    with_type<T>(grad.dtype, [&](auto type) {
      auto* to = at<decltype(type)>(grad, group, layer);
      for (ptrdiff_t f = 0; f < width; f += L) {
        Vec<C, L> sum{};
        for (int64_t t = 0; t < tiles; ++t) sum += load_up_to<C, L>(shares + (t * 3 + which) * width + f, width - f);
        store_up_to<C, L>(to + f, sum, width - f);
      }
    });
  }
}

}  // namespace nsk::NSK_ISA
