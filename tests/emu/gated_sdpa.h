// A problem of gated attention with its answer in double, for the kernel under the emulator.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../csrc/cuda/gated_sdpa_forward.cuh"
#include "harness.h"

namespace nsk::test {

using namespace nsk::cuda;

struct SdpaCase {
  int batch = 1, heads_q = 1, heads_kv = 1, seqlen_q = 64, seqlen_k = 64;
  bool causal = false, bottom_right = false;
  int left = -1, right = -1;
  float scale = 0.125f, softcap = 0;
  Gate gate = Gate::elementwise;
  bool float_gate = false, sink = false, float_sink = false;
  Mask mask = Mask::none;
  bool float_mask = false, mask_per_head = false;
  float lift = 0;  // what the mask holds on all keys of every third row
  bool lse = true;
  int hidden_nan = -1;                        // a key whose value holds NaN and infinity
  bool nan_in_key = false;                    // and the key itself
  int infinite_keys = 0;                      // the first, with which every product is -inf
  std::vector<int32_t> cu_q = {}, cu_k = {};  // packed: seqlen_* are rows of all
};

// Elements of T or of float, and their values.
template <class T>
struct Either {
  bool is_float = false;
  std::vector<T> narrow;
  std::vector<float> wide;

  void fill(const std::vector<float>& values, bool as_float) {
    is_float = as_float;
    for (float x : values) as_float ? wide.push_back(x) : narrow.push_back(from_float<T>(x));
  }
  double operator[](size_t i) const { return is_float ? wide[i] : to_float(narrow[i]); }
  TensorOfEither<T> enter(GlobalMemory& memory, const char* name) const {
    const void* data;
    if (is_float)
      data = memory.input(name, wide.data(), wide.size());
    else
      data = memory.input(name, narrow.data(), narrow.size());
    return {static_cast<const unsigned char*>(data), is_float};
  }
};

template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
class SdpaProblem {
 public:
  explicit SdpaProblem(const SdpaCase& c, uint64_t seed = 1) : c_(c) {
    CHECK((c.softcap > 0) == kSoftcap && c.mask == kMask);
    // [batch, row, head, column] with eight elements of NaN after each row.
    row_q_ = c.heads_q * kD + 8, row_k_ = c.heads_kv * kD + 8, row_v_ = c.heads_kv * kDv + 8;
    row_o_ = c.heads_q * kDv + 8;
    fill(q_, c.batch * c.seqlen_q, c.heads_q * kD, row_q_, seed);
    fill(k_, c.batch * c.seqlen_k, c.heads_kv * kD, row_k_, seed + 1);
    fill(v_, c.batch * c.seqlen_k, c.heads_kv * kDv, row_v_, seed + 2);
    if (c.hidden_nan >= 0) {
      const float bad[] = {NAN, INFINITY, -INFINITY, 1.0f};
      for (int i = 0; i < c.heads_kv * kDv; ++i) v_[c.hidden_nan * row_v_ + i] = from_float<T>(bad[i % 4]);
      if (c.nan_in_key) k_[c.hidden_nan * row_k_] = from_float<T>(NAN);
    }
    for (int64_t i = 0; i < c.heads_q * int64_t(c.batch) * c.seqlen_q && c.infinite_keys; ++i) {
      T& x = q_[i / c.heads_q * row_q_ + i % c.heads_q * kD];
      x = from_float<T>(std::copysign(0.5f + std::fabs(to_float(x)), c.scale));
    }
    for (int j = 0; j < c.infinite_keys; ++j)
      for (int h = 0; h < c.heads_kv; ++h) k_[j * row_k_ + h * kD] = from_float<T>(-INFINITY);
    std::vector<float> gates = normal(size_t(c.batch) * c.seqlen_q * row_o_, seed + 3);
    // The mask hides everything from row 5 of the first head; then its gate does not matter.
    const bool blind = kMask != Mask::none && c.seqlen_q > 5;
    if (blind) std::fill_n(gates.begin() + 5 * row_o_, kDv, NAN);
    gate_.fill(gates, c.float_gate);
    sink_.fill(normal(c.heads_q, seed + 4), c.float_sink);
    mask_heads_ = c.mask_per_head ? c.heads_q : 1;
    std::vector<float> masks = normal(size_t(mask_heads_) * c.seqlen_q * c.seqlen_k, seed + 5);
    for (float& x : masks) {
      bytes_.push_back(x > -0.3f);
      if (x < -1) x = -INFINITY;
    }
    for (int j = 0; j < c.seqlen_k && blind; ++j)
      bytes_[5 * c.seqlen_k + j] = 0, masks[5 * c.seqlen_k + j] = -INFINITY;
    if (c.hidden_nan >= 0)
      for (int i = 0; i < c.seqlen_q; i += 2)
        bytes_[i * c.seqlen_k + c.hidden_nan] = 0, masks[i * c.seqlen_k + c.hidden_nan] = -INFINITY;
    for (size_t i = 0; i < masks.size() && c.lift != 0; ++i)
      if (i / c.seqlen_k % c.seqlen_q % 3 == 0) masks[i] = c.lift;
    mask_.fill(masks, c.float_mask);
    solve();
  }

  Outcome run(const Options& options) const {
    return run_with([&](const GatedSdpa<T>& p, GlobalMemory& memory) {
      using Tiles = GatedSdpaTiles<T, kD, kDv>;
      const Launch what{"gated_sdpa_forward",
                        {unsigned(gated_sdpa_blocks<Tiles::kRows>(p))},
                        {Tiles::kThreads},
                        Tiles::kSharedBytes};
      return emu::launch(what, memory, options, [&] { gated_sdpa_forward<T, kD, kDv, kSoftcap, kMask>(p); });
    });
  }

  // launch(problem, memory) writes out and lse.
  template <class F>
  Outcome run_with(const F& launch) const {
    std::vector<T> out(size_t(c_.batch) * c_.seqlen_q * row_o_);
    std::vector<float> lse(size_t(c_.batch) * c_.heads_q * c_.seqlen_q);
    GlobalMemory memory;
    GatedSdpa<T> p{};
    p.batch = sequences(), p.heads_q = c_.heads_q, p.heads_kv = c_.heads_kv;
    p.seqlen_q = c_.seqlen_q, p.seqlen_k = c_.seqlen_k;
    p.query = memory.input("query", q_.data(), q_.size());
    p.key = memory.input("key", k_.data(), k_.size());
    p.value = memory.input("value", v_.data(), v_.size());
    p.query_stride = {c_.seqlen_q * row_q_, kD, row_q_}, p.key_stride = {c_.seqlen_k * row_k_, kD, row_k_};
    p.value_stride = {c_.seqlen_k * row_v_, kDv, row_v_}, p.out_stride = {c_.seqlen_q * row_o_, kDv, row_o_};
    p.gate_kind = c_.gate;
    if (c_.gate != Gate::none) p.gate = gate_.enter(memory, "gate");
    p.gate_stride = c_.gate == Gate::headwise ? Strides{c_.seqlen_q * row_o_, 1, row_o_} : p.out_stride;
    if (c_.sink) p.sink = sink_.enter(memory, "sink"), p.sink_stride = 1;
    if (kMask == Mask::boolean) p.mask.data = memory.input("mask", bytes_.data(), bytes_.size());
    if (kMask == Mask::floating) p.mask = mask_.enter(memory, "mask");
    p.mask_stride = {0, c_.mask_per_head ? int64_t(c_.seqlen_q) * c_.seqlen_k : 0, c_.seqlen_k}, p.mask_stride_key = 1;
    p.out = memory.output("out", out.data(), out.size());
    if (c_.lse) p.lse = memory.output("lse", lse.data(), lse.size());
    p.lse_stride = {int64_t(c_.heads_q) * c_.seqlen_q, c_.seqlen_q, 1};
    if (packed()) {
      p.cu_seqlens_q = memory.input("cu_seqlens_q", c_.cu_q.data(), c_.cu_q.size());
      p.cu_seqlens_k = memory.input("cu_seqlens_k", c_.cu_k.data(), c_.cu_k.size());
      p.query_stride.batch = p.key_stride.batch = p.value_stride.batch = p.out_stride.batch = 0;
      p.gate_stride.batch = p.lse_stride.batch = 0;
    }
    p.window_left = c_.left, p.window_right = c_.right;
    p.is_causal = c_.causal, p.bottom_right = c_.bottom_right, p.scale = c_.scale, p.softcap = c_.softcap;
    Outcome outcome{launch(p, memory), true};
    outcome.right = compare(out, lse);
    return outcome;
  }

  mutable double worst = 0;  // of all errors, as a share of what is allowed

 private:
  static void fill(std::vector<T>& to, int64_t rows, int columns, int64_t stride, uint64_t seed) {
    const std::vector<float> values = normal(size_t(rows * stride), seed);
    for (int64_t i = 0; i < rows * stride; ++i)
      to.push_back(from_float<T>(i % stride < columns ? values[i] : NAN));
  }

  bool packed() const { return !c_.cu_q.empty(); }
  int sequences() const { return packed() ? int(c_.cu_q.size()) - 1 : c_.batch; }

  struct Answer {
    double value, allowed;  // error
  };

  void solve() {
    answers_.assign(size_t(c_.batch) * c_.seqlen_q * c_.heads_q * kDv, {0, 0});
    lse_.assign(size_t(c_.batch) * c_.seqlen_q * c_.heads_q, -INFINITY);
    for (int b = 0; b < sequences(); ++b) {
      const int q0 = packed() ? c_.cu_q[b] : b * c_.seqlen_q, sq = packed() ? c_.cu_q[b + 1] - q0 : c_.seqlen_q;
      const int k0 = packed() ? c_.cu_k[b] : b * c_.seqlen_k, sk = packed() ? c_.cu_k[b + 1] - k0 : c_.seqlen_k;
      for (int h = 0; h < c_.heads_q; ++h)
        for (int i = 0; i < sq; ++i) solve_row(h, i, q0 + i, k0, sk, c_.bottom_right ? sk - sq : 0);
    }
  }

  void solve_row(int h, int i, int row, int k0, int sk, int offset) {
    const int kv = h / (c_.heads_q / c_.heads_kv);
    std::vector<double> s(sk, -INFINITY);
    std::vector<bool> seen(sk);
    double top = -INFINITY;
    bool alive = false;
    for (int j = 0; j < sk; ++j) {
      const int64_t at = (int64_t(c_.mask_per_head ? h : 0) * c_.seqlen_q + i) * c_.seqlen_k + j;
      seen[j] = !(c_.causal && j > i + offset) && !(c_.left >= 0 && j < i + offset - c_.left) &&
                !(c_.right >= 0 && j > i + offset + c_.right) && !(kMask == Mask::boolean && !bytes_[at]) &&
                !(kMask == Mask::floating && mask_[at] == -INFINITY);
      if (!seen[j]) continue;
      double sum = 0;
      for (int d = 0; d < kD; ++d)
        sum += double(to_float(q_[row * row_q_ + h * kD + d])) * to_float(k_[(k0 + j) * row_k_ + kv * kD + d]);
      s[j] = sum * c_.scale;
      if (kSoftcap) s[j] = c_.softcap * std::tanh(s[j] / c_.softcap);
      // In fp32 nothing is left of a score beside 1e38.
      if (kMask == Mask::floating) s[j] = std::fabs(mask_[at]) > 1e30 ? mask_[at] : s[j] + mask_[at];
      alive = true, top = std::fmax(top, s[j]);
    }
    if (!alive) return;
    double sum = 0;
    for (int j = 0; j < sk; ++j)
      if (seen[j]) sum += std::exp(s[j] - top);
    lse_[row * c_.heads_q + h] = top + std::log(sum);
    if (c_.sink) {  // it may be all that there is
      const double higher = std::fmax(top, sink_[h]);
      sum = (top > -INFINITY ? sum * std::exp(top - higher) : 0) + std::exp(sink_[h] - higher);
      top = higher;
    }
    for (int d = 0; d < kDv; ++d) {
      double value = 0, size = 0, squares = 0;
      for (int j = 0; j < sk; ++j) {
        if (!seen[j]) continue;
        const double term = std::exp(s[j] - top) / sum * to_float(v_[(k0 + j) * row_v_ + kv * kDv + d]);
        value += term, size += std::fabs(term), squares += term * term;
      }
      double factor = 1;
      if (c_.gate != Gate::none) {
        const int64_t at = row * row_o_ + (c_.gate == Gate::headwise ? h : h * kDv + d);
        factor = 1 / (1 + std::exp(-gate_[at]));
      }
      // Weights are rounded to T, each on its own, and the result once; all else is of the order of fp32.
      const double half_ulp = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
      answers_[(int64_t(row) * c_.heads_q + h) * kDv + d] = {
          factor * value,
          factor * (half_ulp * (1.01 * std::fabs(value) + std::fmin(size, 2 * std::sqrt(squares))) + 0x1p-16 * size) +
              (std::is_same_v<T, bf16> ? 1e-37 : 0x1p-25)};
    }
  }

  bool near(double got, double exact, double allowed) const {
    if (std::isnan(exact) || std::isinf(exact)) return std::isnan(exact) ? std::isnan(got) : got == exact;
    if (got == exact) return true;
    const double share = std::fabs(got - exact) / allowed;
    if (!(share <= worst)) worst = share;
    return share <= 1;
  }

  bool compare(const std::vector<T>& out, const std::vector<float>& lse) const {
    bool right = true;
    for (int64_t row = 0; row < int64_t(c_.batch) * c_.seqlen_q; ++row) {
      for (int64_t column = 0; column < row_o_; ++column) {
        const double got = to_float(out[row * row_o_ + column]);
        if (column >= c_.heads_q * kDv) {
          right &= std::isnan(got);  // nothing is written beside the result
          continue;
        }
        const Answer& exact = answers_[row * c_.heads_q * kDv + column];
        right &= near(got, exact.value, exact.allowed);
      }
      for (int h = 0; h < c_.heads_q && c_.lse; ++h) {
        const int64_t b = row / c_.seqlen_q, i = row % c_.seqlen_q;
        const double exact = lse_[row * c_.heads_q + h];
        right &= near(lse[(b * c_.heads_q + h) * c_.seqlen_q + i], exact, 4e-6 * (1 + std::fabs(exact)));
      }
    }
    return right;
  }

  SdpaCase c_;
  int64_t row_q_, row_k_, row_v_, row_o_;
  int mask_heads_;
  std::vector<T> q_, k_, v_;
  Either<T> gate_, sink_, mask_;
  std::vector<unsigned char> bytes_;
  std::vector<Answer> answers_;
  std::vector<double> lse_;
};

}  // namespace nsk::test
