// The row-wise part of the backward of gated attention: what each query row contributes before any product.
//
// The ungated output O = out / sigmoid(gate) is never needed:
//   dO    = dOut * sigma                      (sigma = sigmoid(gate))
//   dGate = dOut * out * (1 - sigma)          headwise: (1 - sigma) * delta
//   delta = rowsum(dO * O) = rowsum(dOut * out)
// With a sink b, probabilities are normalised by L = logaddexp(lse, b), and dSink = -sum_i exp(b - L_i) delta_i.
#pragma once

#include "gated_sdpa_problem.h"

namespace nsk::NSK_ISA {

template <class T, class M>
struct BackwardRow {
  using C = typename M::C;
  using Operand = std::conditional_t<M::pack == 2, bf16, C>;
  static constexpr int L = kLanes<C>;

  C lse;        // 0 where dead
  C norm;       // the same with the sink
  C delta;
  C grad_lse;
  double grad_sink;  // this row's share
  bool dead;

  // Fills dO [head_dim_v], in the type that the products take, and writes the gate's gradient.
  BackwardRow(const nsk_gated_sdpa_backward& g, int64_t b, const Row& row, Operand* d_o) {
    const nsk_gated_sdpa& a = g.forward;
    const double lse_value = load_scalar(a.lse, offset(a.lse, b, row.head, row.i));
    dead = lse_value == -kInfinity<double>;
    lse = norm = dead ? C(0) : C(lse_value);
    delta = dead ? clear(g, b, row, d_o) : gate(g, b, row, d_o);
    grad_lse = g.grad_lse.data && !dead ? C(load_scalar(g.grad_lse, offset(g.grad_lse, b, row.head, row.i))) : C(0);
    grad_sink = 0;
    if (a.sink.data && !dead) {
      const double sink = load_scalar(a.sink, row.head * a.sink.stride[1]), gap = sink - lse_value;
      const double full = (gap > 0 ? sink : lse_value) + __builtin_log1p(__builtin_exp(gap > 0 ? -gap : gap));
      norm = C(full);
      grad_sink = -__builtin_exp(sink - full) * double(delta);
    }
  }

 private:
  // A query with no allowed key has no gradient, whatever its gate and its incoming gradient hold.
  static C clear(const nsk_gated_sdpa_backward& g, int64_t b, const Row& row, Operand* d_o) {
    const nsk_gated_sdpa& a = g.forward;
    fill_zero(d_o, a.head_dim_v);
    if (g.grad_gate.data && a.gate_kind == NSK_GATE_HEADWISE)
      store_scalar(g.grad_gate, offset(g.grad_gate, b, row.head, row.i), 0);
    if (g.grad_gate.data && a.gate_kind == NSK_GATE_ELEMENTWISE)
      for (int64_t d = 0; d < a.head_dim_v; d += L)
        store_mixed<C, L, T>(g.grad_gate, offset(g.grad_gate, b, row.head, row.i) + d, Vec<C, L>{}, a.head_dim_v - d);
    return C(0);
  }

  static C gate(const nsk_gated_sdpa_backward& g, int64_t b, const Row& row, Operand* d_o) {
    const nsk_gated_sdpa& a = g.forward;
    const bool elementwise = a.gate_kind == NSK_GATE_ELEMENTWISE, headwise = a.gate_kind == NSK_GATE_HEADWISE;
    using S = Sigmoid<C, L>;
    S sigma(splat<C, L>(headwise ? C(load_scalar(a.gate, offset(a.gate, b, row.head, row.i))) : kInfinity<C>));
    const C head_complement = sigma.complement[0];
    double sum[L] = {};
    const T* d_out = at<const T>(g.grad_out, b, row.head, row.i);
    const T* out = at<const T>(a.out, b, row.head, row.i);
    const int64_t gate_at = a.gate.data ? offset(a.gate, b, row.head, row.i) : 0;
    const int64_t grad_at = g.grad_gate.data ? offset(g.grad_gate, b, row.head, row.i) : 0;
    for (int64_t d = 0; d < a.head_dim_v; d += L) {
      const int64_t left = a.head_dim_v - d;
      auto read = [&](const T* p) { return left >= L ? load_as<C, L>(p + d) : load_partial<C, L>(p + d, left); };
      const Vec<C, L> dy = read(d_out), y = read(out);
      if (elementwise) {
        sigma = S(load_mixed<C, L, T>(a.gate, gate_at + d, left));
        if (g.grad_gate.data) store_mixed<C, L, T>(g.grad_gate, grad_at + d, dy * y * sigma.complement, left);
      }
      const Vec<C, L> x = dy * sigma.value;
      left >= L ? store_as<C, L>(d_o + d, x) : store_partial<C, L>(d_o + d, x, left);
      // The sum decides how well rows of dS cancel; in double it costs nothing next to the products.
      const Vec<C, L> weight = output_weight(dy, x, sigma);
      for (int i = 0; i < L; ++i) sum[i] += double(y[i]) * double(weight[i]);
    }
    double total = 0;
    for (double s : sum) total += s;
    const C delta = C(total);
    if (headwise && g.grad_gate.data)
      store_scalar(g.grad_gate, offset(g.grad_gate, b, row.head, row.i), delta * head_complement);
    return delta;
  }

  // What multiplies out in delta: dOut. Where the products round dO to bf16, the same rounding must reach delta, or
  // rows of dS no longer sum to 0: then it is round(dO) / sigma.
  static NSK_INLINE Vec<C, L> output_weight(Vec<C, L> dy, Vec<C, L> d_o, const Sigmoid<C, L>& sigma) {
    if constexpr (M::pack == 1) {
      return dy;
    } else {
      const Vec<C, L> rounded = widen<L>(narrow<L>(d_o, bf16{}), bf16{});
      return sigma.value > splat<C, L>(C(1e-30)) ? rounded * sigma.inverse : dy;
    }
  }
};

}  // namespace nsk::NSK_ISA
