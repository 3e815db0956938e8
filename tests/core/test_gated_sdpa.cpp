// Gated attention, forward and backward, against a definition in double, on every instruction set of this processor and
// on the emulated AVX-512 ones. Each tensor lies in a block of exactly its size, so that sanitizers see any overrun.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "tensor.h"

using namespace nsk;

namespace {

struct Case {
  int dtype, batch, heads_kv, group, sq, sk, d, dv, gate_kind, mask_kind;  // mask: 0 none, 1 bool, 2 float
  bool causal, bottom, sink, lse_grad;
  int left, right, threads;
  double softcap, scale;
};

// The largest error, relative to the largest result or to the size of the terms it is summed from, whichever is larger:
// the scores' gradients p (dP - delta) cancel, to nothing in a row that sees a single key.
double error_of(const Tensor& computed, const std::vector<double>& exact, double terms) {
  double worst = 0, largest = terms;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double got = computed.computed(i);
    if (std::isinf(exact[i]) && got == exact[i]) continue;
    const double e = std::fabs(got - exact[i]);
    if (!(e <= worst)) worst = e;
    if (std::fabs(exact[i]) > largest) largest = std::fabs(exact[i]);
  }
  return worst / (largest + 1e-30);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void run(const Kernels& kernels, const Case& c) {
  const int hq = c.heads_kv * c.group, wide = c.dtype == NSK_F64 ? NSK_F64 : NSK_F32;
  Tensor q(c.dtype, c.batch, hq, c.sq, c.d), k(c.dtype, c.batch, c.heads_kv, c.sk, c.d);
  Tensor v(c.dtype, c.batch, c.heads_kv, c.sk, c.dv);
  Tensor gate(chance(0.5) ? wide : c.dtype, c.batch, hq, c.sq, c.gate_kind == NSK_GATE_HEADWISE ? 1 : c.dv);
  Tensor mask(c.mask_kind == 1 ? int(NSK_BOOL) : c.dtype, chance(0.5) ? 1 : c.batch, chance(0.5) ? 1 : hq,
              chance(0.3) ? 1 : c.sq, chance(0.1) ? 1 : c.sk);
  Tensor sink(wide, 1, hq, 1, 1), out(c.dtype, c.batch, hq, c.sq, c.dv), lse(wide, c.batch, hq, c.sq, 1);
  Tensor d_out(c.dtype, c.batch, hq, c.sq, c.dv), d_lse(wide, c.batch, hq, c.sq, 1);
  for (Tensor* t : {&q, &k, &v, &gate, &mask, &sink, &d_out, &d_lse}) t->normal();
  if (c.mask_kind == 1)
    for (size_t i = 0; i < mask.count(); ++i) mask.set(i, chance(0.7));
  if (c.mask_kind == 2)
    for (size_t i = 0; i < mask.count(); ++i)
      if (chance(0.2)) mask.set(i, -INFINITY);

  nsk_gated_sdpa_backward g{};
  nsk_gated_sdpa& a = g.forward;
  a.batch = c.batch, a.heads_q = hq, a.heads_kv = c.heads_kv, a.seqlen_q = c.sq, a.seqlen_k = c.sk;
  a.head_dim = c.d, a.head_dim_v = c.dv, a.scale = c.scale, a.softcap = c.softcap, a.threads = c.threads;
  a.window_left = c.left, a.window_right = c.right, a.is_causal = c.causal, a.bottom_right = c.bottom;
  a.gate_kind = c.gate_kind;
  a.query = q.view(), a.key = k.view(), a.value = v.view(), a.out = out.view(), a.lse = lse.view();
  if (c.gate_kind) a.gate = gate.view();
  if (c.mask_kind) a.mask = mask.view();
  if (c.sink) a.sink = sink.view(), a.sink.stride[1] = 1;
  for (nsk_view* view : {&a.query, &a.key, &a.value, &a.out}) view->stride[3] = 1;
  if (c.gate_kind == NSK_GATE_ELEMENTWISE) a.gate.stride[3] = 1;
  CHECK(kernels.gated_sdpa_forward(a) == NSK_OK);

  // The definition, row by row.
  std::vector<double> e_out(out.count()), e_lse(lse.count()), dq(q.count()), dk(k.count()), dv(v.count());
  std::vector<double> dq_terms(q.count()), dk_terms(k.count()), mask_terms(mask.count()), gate_terms(gate.count());
  double sink_terms = 0;
  std::vector<double> d_gate(gate.count()), d_mask(mask.count()), d_sink(sink.count());
  for (int b = 0; b < c.batch; ++b)
    for (int h = 0; h < hq; ++h)
      for (int i = 0; i < c.sq; ++i) {
        const int kv = h / c.group, center = i + (c.bottom ? c.sk - c.sq : 0);
        std::vector<double> s(c.sk, -INFINITY), slope(c.sk, 1);
        double top = -INFINITY;
        for (int j = 0; j < c.sk; ++j) {
          if ((c.causal && j > center) || (c.left >= 0 && j < center - c.left) || (c.right >= 0 && j > center + c.right))
            continue;
          const double m = c.mask_kind ? mask.x[mask.at(b, h, i, j)] : 0;
          if ((c.mask_kind == 1 && m == 0) || (c.mask_kind == 2 && m == -INFINITY)) continue;
          double x = 0;
          for (int d = 0; d < c.d; ++d) x += q.x[q.at(b, h, i, d)] * k.x[k.at(b, kv, j, d)];
          x *= c.scale;
          if (c.softcap > 0) {
            const double t = std::tanh(x / c.softcap);
            x = c.softcap * t, slope[j] = 1 - t * t;
          }
          s[j] = c.mask_kind == 2 ? x + m : x;
          top = std::fmax(top, s[j]);
        }
        const int64_t row = lse.at(b, h, i, 0);
        e_lse[row] = -INFINITY;
        if (top == -INFINITY) continue;
        double sum = 0;
        for (double x : s) sum += std::exp(x - top);
        e_lse[row] = top + std::log(sum);
        const double sunk = c.sink ? e_lse[row] + std::log1p(std::exp(sink.x[h] - e_lse[row])) : e_lse[row];
        std::vector<double> o(c.dv), d_o(c.dv);
        for (int j = 0; j < c.sk; ++j)
          for (int d = 0; d < c.dv; ++d) o[d] += std::exp(s[j] - sunk) * v.x[v.at(b, kv, j, d)];
        double delta = 0, delta_terms = 0;  // *_terms: sizes of what a sum adds up, where it may cancel
        for (int d = 0; d < c.dv; ++d) {
          const int64_t at = out.at(b, h, i, d), gate_at = gate.at(b, h, i, d);
          const double w = c.gate_kind ? sigmoid(gate.x[gate_at]) : 1;
          e_out[at] = w * o[d];
          d_o[d] = w * d_out.x[at];
          delta += d_o[d] * o[d];
          delta_terms += std::fabs(d_o[d] * o[d]);
          d_gate[gate_at] += d_out.x[at] * o[d] * w * (1 - w);
          gate_terms[gate_at] += std::fabs(d_out.x[at] * o[d] * w * (1 - w));
        }
        const double dl = c.lse_grad ? d_lse.x[row] : 0;
        for (int j = 0; j < c.sk; ++j) {
          if (s[j] == -INFINITY) continue;
          const double p = std::exp(s[j] - sunk);
          double dp = 0, dp_terms = 0;
          for (int d = 0; d < c.dv; ++d) {
            dp += d_o[d] * v.x[v.at(b, kv, j, d)];
            dp_terms += std::fabs(d_o[d] * v.x[v.at(b, kv, j, d)]);
            dv[v.at(b, kv, j, d)] += p * d_o[d];
          }
          double ds = p * (dp - delta) + std::exp(s[j] - e_lse[row]) * dl;
          double term = p * (dp_terms + delta_terms) + std::fabs(dl);
          if (c.mask_kind) d_mask[mask.at(b, h, i, j)] += ds, mask_terms[mask.at(b, h, i, j)] += term;
          ds *= slope[j] * c.scale;
          term *= std::fabs(c.scale);
          for (int d = 0; d < c.d; ++d) {
            dq[q.at(b, h, i, d)] += ds * k.x[k.at(b, kv, j, d)];
            dk[k.at(b, kv, j, d)] += ds * q.x[q.at(b, h, i, d)];
            dq_terms[q.at(b, h, i, d)] += term * std::fabs(k.x[k.at(b, kv, j, d)]);
            dk_terms[k.at(b, kv, j, d)] += term * std::fabs(q.x[q.at(b, h, i, d)]);
          }
        }
        if (c.sink) d_sink[h] -= std::exp(sink.x[h] - sunk) * delta, sink_terms += delta_terms;
      }

  auto same_shape = [](const Tensor& t) { return Tensor(t.dtype, t.n[0], t.n[1], t.n[2], t.n[3]); };
  Tensor gq = same_shape(q), gk = same_shape(k), gv = same_shape(v), gg = same_shape(gate), gm = same_shape(mask);
  Tensor gs = same_shape(sink);
  g.grad_out = d_out.view(), g.grad_out.stride[3] = 1;
  if (c.lse_grad) g.grad_lse = d_lse.view();
  g.grad_query = gq.view(), g.grad_key = gk.view(), g.grad_value = gv.view();
  for (nsk_view* view : {&g.grad_query, &g.grad_key, &g.grad_value}) view->stride[3] = 1;
  if (c.gate_kind) g.grad_gate = gg.view();
  if (c.gate_kind == NSK_GATE_ELEMENTWISE) g.grad_gate.stride[3] = 1;
  if (c.mask_kind == 2) {
    g.grad_mask = gm.view();
    std::memcpy(g.mask_size, gm.n, sizeof gm.n);
  }
  if (c.sink) g.grad_sink = gs.view(), g.grad_sink.stride[1] = 1;
  CHECK(kernels.gated_sdpa_backward(g) == NSK_OK);

  const double tolerance = c.dtype == NSK_F64 ? 1e-11 : c.dtype == NSK_F32 ? 2e-5 : c.dtype == NSK_F16 ? 6e-3 : 5e-2;
  auto compare = [&](const char* what, const Tensor& t, const std::vector<double>& exact, double terms = 0) {
    const double e = error_of(t, exact, terms);
    CHECK(e < tolerance, "%s %s: error %.1e; dtype %d b %d hkv %d g %d sq %d sk %d d %d dv %d gate %d mask %d causal %d "
          "bottom %d sink %d left %d right %d softcap %g threads %d", kernels.name, what, e, c.dtype, c.batch, c.heads_kv,
          c.group, c.sq, c.sk, c.d, c.dv, c.gate_kind, c.mask_kind, c.causal, c.bottom, c.sink, c.left, c.right,
          c.softcap, c.threads);
  };
  compare("out", out, e_out), compare("lse", lse, e_lse);
  auto largest = [](const std::vector<double>& x) { return x.empty() ? 0 : *std::max_element(x.begin(), x.end()); };
  compare("dq", gq, dq, largest(dq_terms)), compare("dk", gk, dk, largest(dk_terms)), compare("dv", gv, dv);
  if (c.gate_kind) compare("dgate", gg, d_gate, largest(gate_terms));
  if (c.mask_kind == 2) compare("dmask", gm, d_mask, largest(mask_terms));
  if (c.sink) compare("dsink", gs, d_sink, sink_terms);
}

Case random_case() {
  Case c{};
  c.dtype = pick({NSK_F32, NSK_F64, NSK_BF16, NSK_F16});
  c.batch = pick({1, 2}), c.heads_kv = pick({1, 2}), c.group = pick({1, 2, 8});
  c.sq = pick({1, 2, 7, 33, 100, 150}), c.sk = pick({1, 2, 31, 64, 97, 260});
  c.d = pick({1, 2, 7, 16, 33, 64, 72}), c.dv = pick({1, 3, 8, 17, 32, 65});
  c.gate_kind = pick({0, 1, 2}), c.mask_kind = pick({0, 0, 1, 2});
  c.causal = chance(0.5), c.bottom = chance(0.5), c.sink = chance(0.4), c.lse_grad = chance(0.5);
  c.left = pick({-1, -1, 0, 5, 40}), c.right = pick({-1, -1, 0, 9}), c.threads = pick({1, 2, 3});
  c.softcap = pick({0, 0, 3}), c.scale = chance(0.1) ? -0.3 : 1 / std::sqrt(double(c.d));
  return c;
}

}  // namespace

int main() {
  for (const Kernels* kernels : kernels_under_test()) {
    rng.seed(7);
    const int before = check::failures;
    for (int i = 0; i < 150; ++i) run(*kernels, random_case());
    std::printf("%s: %s\n", kernels->name, check::failures == before ? "ok" : "FAILED");
  }
  return check::result("gated_sdpa");
}
