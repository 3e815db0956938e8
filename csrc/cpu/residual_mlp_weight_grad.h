// The parameters' gradients of a few layers at once: the part of the backward that is not sequential.
//
//   dW [out][in] = sum over rows of dz [row][out] x [row][in];   db, dgamma, dbeta = the tiles' shares added up in order
//
// Whoever computes an element of dW sums over the whole batch, in order: no atomics, no copies to add up, the same bits
// every time.
#pragma once

#include "residual_mlp_chain.h"

namespace nsk::NSK_ISA {

template <class T, class C, class E>
class MlpWeightGrad {
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  static constexpr ptrdiff_t kRowsAtOnce = 256;  // of the batch: a panel of x stays in the core's cache, and sums grow by sums
  static constexpr ptrdiff_t kOut = 64;          // rows of dW in one unit of work: small, so that threads end together

 public:
  MlpWeightGrad(const MlpShape& shape, int64_t, int) : s(shape) {}

  size_t scratch_bytes() const { return size_t(kOut) * kWidePanel * L * sizeof(C); }

  // Panels of columns of one dW, times pieces of its rows.
  int64_t units() const {
    int64_t panels = 0;
    for_panels<L>(round_up(s.width, L), [&](auto, ptrdiff_t) { ++panels; });
    return panels * ceil_div(s.width, kOut);
  }

  void run(MlpWeightOperands<M> from, T* grad, int64_t unit, C* scratch) const {
    const int64_t pieces = ceil_div(s.width, kOut);
    const ptrdiff_t out = unit % pieces * kOut, outs = s.width - out < kOut ? s.width - out : kOut;
    int64_t panel = unit / pieces;
    for_panels<L>(round_up(s.width, L), [&](auto columns, ptrdiff_t first) {
      if (panel-- == 0) one<columns.value>(from, grad + out * s.width, out, outs, first, scratch);
    });
  }

 private:
  template <int NV>
  void one(MlpWeightOperands<M> from, T* grad, ptrdiff_t out, ptrdiff_t outs, ptrdiff_t first, C* scratch) const {
    constexpr int NR = NV * L;
    constexpr bool kSame = std::is_same_v<T, C>;
    const bool in_place = kSame && first + NR <= s.width;
    C* const c = in_place ? reinterpret_cast<C*>(grad + first) : scratch;
    const ptrdiff_t ldc = in_place ? s.width : NR, stride = MlpWeightOperands<M>::dz_stride(s);
    const auto* x = from.x + first * s.padded / M::pack;
    const auto* dz = from.dz + out * stride;
    for (ptrdiff_t row = 0; row < s.padded; row += kRowsAtOnce) {
      const ptrdiff_t rows = s.padded - row < kRowsAtOnce ? s.padded - row : kRowsAtOnce, k = rows / M::pack;
      const auto* b = x + row / M::pack * NR;
      if (row == 0)
        product<M, NV, Along::K, Into::Fresh>(outs, dz, stride, b, k, c, ldc, nullptr, NextRows{});
      else
        product<M, NV, Along::K, Into::Add>(outs, dz + row / M::pack, stride, b, k, c, ldc, nullptr, NextRows{});
    }
    if (in_place) return;
    const ptrdiff_t columns = s.width - first < NR ? s.width - first : NR;
    for (ptrdiff_t r = 0; r < outs; ++r) scale_row<C>(grad + r * s.width + first, scratch + r * NR, C(1), columns);
  }

  const MlpShape& s;
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
