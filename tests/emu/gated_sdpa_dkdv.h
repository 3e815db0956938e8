// A problem of gated attention's gradients of keys and values with its answer in double, for the kernel under the
// emulator. What the launch before leaves per row is made up here: norms belong to the scores, all else is random.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../csrc/cuda/gated_sdpa_dkdv.cuh"
#include "harness.h"

namespace nsk::test {

using namespace nsk::cuda;

enum class Bad { nothing, query, scaled, key, value };  // which row of what holds NaN and infinities

struct KeyGradientsCase {
  int batch = 1, heads_q = 1, heads_kv = 1, seqlen_q = 64, seqlen_k = 64;
  bool causal = false, bottom_right = false;
  int left = -1, right = -1;
  float scale = 0.125f, softcap = 0;
  Mask mask = Mask::none;
  bool float_mask = false, mask_per_head = false, mask_of_keys = false;  // last: the same for all rows
  float lift = 0;  // added to a floating mask
  Bad bad = Bad::nothing;
  int bad_row = 30;
  std::vector<int32_t> cu_q = {}, cu_k = {};  // packed: seqlen_* are rows of all
};

template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
class KeyGradientsProblem {
 public:
  explicit KeyGradientsProblem(const KeyGradientsCase& c, uint64_t seed = 1) : c_(c) {
    CHECK((c.softcap > 0) == kSoftcap && c.mask == kMask);
    // [batch, row, head, column] with eight elements of NaN after each row; scaled is [batch, head, row, column].
    row_q_ = c.heads_q * kD + 8, row_k_ = c.heads_kv * kD + 8, row_v_ = c.heads_kv * kDv + 8;
    rows_q_ = int64_t(c.batch) * c.seqlen_q, rows_k_ = int64_t(c.batch) * c.seqlen_k;
    fill(q_, rows_q_, c.heads_q * kD, row_q_, seed);
    fill(k_, rows_k_, c.heads_kv * kD, row_k_, seed + 1);
    fill(v_, rows_k_, c.heads_kv * kDv, row_v_, seed + 2);
    fill(scaled_, rows_q_ * c.heads_q, kDv, kDv, seed + 3);
    if (c.bad == Bad::query) spoil(&q_[c.bad_row * row_q_], c.heads_q * kD);
    if (c.bad == Bad::key) spoil(&k_[c.bad_row * row_k_], c.heads_kv * kD);
    if (c.bad == Bad::value) spoil(&v_[c.bad_row * row_v_], c.heads_kv * kDv);
    if (c.bad == Bad::scaled)
      for (int h = 0; h < c.heads_q; ++h) spoil(&scaled_[(h * c.seqlen_q + c.bad_row) * kDv], kDv);
    wide_mask_ = normal(size_t(c.mask_per_head ? c.batch * c.heads_q : 1) * c.seqlen_q * c.seqlen_k, seed + 4);
    for (size_t at = 0; at < wide_mask_.size(); ++at) {
      float& x = wide_mask_[at];
      const bool blind = at / c.seqlen_k % c.seqlen_q == 5 && !c.mask_of_keys;  // a row that sees nothing
      bytes_.push_back(x > -0.3f && !blind);
      x = x < -1 || blind ? -INFINITY : x + c.lift;
      narrow_mask_.push_back(from_float<T>(x));
      if (!c.float_mask) x = to_float(narrow_mask_.back());
    }
    change_ = normal(size_t(rows_q_) * c.heads_q, seed + 5);
    solve();
  }

  template <Wanted kWanted>
  Outcome run(const Options& options) const {
    std::vector<T> dk(k_.size()), dv(v_.size());
    GlobalMemory memory;
    GatedSdpaBackward<T> g{};
    GatedSdpa<T>& p = g.forward;
    p.batch = sequences(), p.heads_q = c_.heads_q, p.heads_kv = c_.heads_kv;
    p.seqlen_q = c_.seqlen_q, p.seqlen_k = c_.seqlen_k;
    p.query = memory.input("query", q_.data(), q_.size());
    p.key = memory.input("key", k_.data(), k_.size());
    p.value = memory.input("value", v_.data(), v_.size());
    p.query_stride = {c_.seqlen_q * row_q_, kD, row_q_}, p.key_stride = {c_.seqlen_k * row_k_, kD, row_k_};
    p.value_stride = {c_.seqlen_k * row_v_, kDv, row_v_};
    if (kMask == Mask::boolean) p.mask.data = memory.input("mask", bytes_.data(), bytes_.size());
    if (kMask == Mask::floating) {
      const void* data;
      if (c_.float_mask)
        data = memory.input("mask", wide_mask_.data(), wide_mask_.size());
      else
        data = memory.input("mask", narrow_mask_.data(), narrow_mask_.size());
      p.mask = {static_cast<const unsigned char*>(data), c_.float_mask};
    }
    const int64_t mask_size = c_.mask_per_head ? int64_t(c_.seqlen_q) * c_.seqlen_k : 0;
    p.mask_stride = {mask_size * c_.heads_q, mask_size, c_.mask_of_keys ? 0 : c_.seqlen_k};
    p.mask_stride_key = c_.mask_of_keys ? 2 : 1;
    if (packed()) {
      p.cu_seqlens_q = memory.input("cu_seqlens_q", c_.cu_q.data(), c_.cu_q.size());
      p.cu_seqlens_k = memory.input("cu_seqlens_k", c_.cu_k.data(), c_.cu_k.size());
      p.query_stride.batch = p.key_stride.batch = p.value_stride.batch = 0;
    }
    p.window_left = c_.left, p.window_right = c_.right;
    p.is_causal = c_.causal, p.bottom_right = c_.bottom_right, p.scale = c_.scale, p.softcap = c_.softcap;

    g.scaled = scaled(memory);
    g.norm = numbers(memory, "norm", norm_);
    if (kMask == Mask::floating) g.norm_low = numbers(memory, "norm_low", norm_low_);
    if (kWanted != Wanted::value) g.change = numbers(memory, "change", change_);
    if (kWanted != Wanted::value) g.grad_key = memory.output("grad_key", dk.data(), dk.size());
    if (kWanted != Wanted::key) g.grad_value = memory.output("grad_value", dv.data(), dv.size());
    g.grad_key_stride = p.key_stride, g.grad_value_stride = p.value_stride;

    using Tiles = GatedSdpaKeyTiles<T, kD, kDv, kWanted>;
    const Launch what{"gated_sdpa_dkdv",
                      {unsigned(gated_sdpa_key_blocks<Tiles::kKeys>(p))},
                      {Tiles::kThreads},
                      Tiles::kSharedBytes};
    Outcome outcome{
        emu::launch(what, memory, options, [&] { gated_sdpa_dkdv<T, kD, kDv, kSoftcap, kMask, kWanted>(g); }), true};
    if (kWanted != Wanted::value) outcome.right &= compare(dk, dk_, c_.heads_kv * kD, row_k_);
    if (kWanted != Wanted::key) outcome.right &= compare(dv, dv_, c_.heads_kv * kDv, row_v_);
    return outcome;
  }

  mutable double worst = 0;  // of all errors, as a share of what is allowed
  mutable int not_finite = 0;  // numbers of the answers

 private:
  static void fill(std::vector<T>& to, int64_t rows, int columns, int64_t stride, uint64_t seed) {
    const std::vector<float> values = normal(size_t(rows * stride), seed);
    for (int64_t i = 0; i < rows * stride; ++i)
      to.push_back(from_float<T>(i % stride < columns ? values[i] : NAN));
  }
  static void spoil(T* row, int columns) {
    const float bad[] = {NAN, 1.0f, INFINITY, -INFINITY};
    for (int i = 0; i < columns; ++i) row[i] = from_float<T>(bad[i % 4]);
  }

  // The kernel may read these only, though the launch before writes them.
  Global<T> scaled(GlobalMemory& memory) const {
    return const_cast<T*>(memory.input("scaled", scaled_.data(), scaled_.size()));
  }
  static Global<float> numbers(GlobalMemory& memory, const char* name, const std::vector<float>& values) {
    return const_cast<float*>(memory.input(name, values.data(), values.size()));
  }

  bool packed() const { return !c_.cu_q.empty(); }
  int sequences() const { return packed() ? int(c_.cu_q.size()) - 1 : c_.batch; }

  // Sums of terms that are rounded to T, each on its own, and how large they are.
  struct Sum {
    double value = 0, size = 0, squares = 0, tiny = 0;
    bool covered = false;

    void add(double weight, double number, double weight_size) {
      const double term = weight * number;
      value += term, size += std::fabs(weight_size * number), squares += term * term, tiny += std::fabs(number);
    }
  };

  void solve() {
    dk_.assign(rows_k_ * c_.heads_kv * kD, {}), dv_.assign(rows_k_ * c_.heads_kv * kDv, {});
    norm_.assign(rows_q_ * c_.heads_q, NAN), norm_low_ = norm_;
    for (int b = 0; b < sequences(); ++b) {
      const int q0 = packed() ? c_.cu_q[b] : b * c_.seqlen_q, sq = packed() ? c_.cu_q[b + 1] - q0 : c_.seqlen_q;
      const int k0 = packed() ? c_.cu_k[b] : b * c_.seqlen_k, sk = packed() ? c_.cu_k[b + 1] - k0 : c_.seqlen_k;
      for (int64_t i = int64_t(k0) * c_.heads_kv * kD; i < int64_t(k0 + sk) * c_.heads_kv * kD; ++i)
        dk_[i].covered = true;
      for (int64_t i = int64_t(k0) * c_.heads_kv * kDv; i < int64_t(k0 + sk) * c_.heads_kv * kDv; ++i)
        dv_[i].covered = true;
      for (int h = 0; h < c_.heads_q; ++h)
        for (int i = 0; i < sq; ++i) solve_row(b, h, i, q0 + i, k0, sk, c_.bottom_right ? sk - sq : 0);
    }
    for (std::vector<Sum>* sums : {&dk_, &dv_})
      for (const Sum& sum : *sums) not_finite += !std::isfinite(sum.value);
  }

  void solve_row(int b, int h, int i, int row, int k0, int sk, int offset) {
    const int kv = h / (c_.heads_q / c_.heads_kv);
    const int64_t at = packed() ? int64_t(h) * c_.seqlen_q + row : (int64_t(b) * c_.heads_q + h) * c_.seqlen_q + i;
    std::vector<double> s(sk, -INFINITY), slope(sk, 1);
    std::vector<bool> seen(sk);
    double top = -INFINITY;
    bool alive = false;
    for (int j = 0; j < sk; ++j) {
      int64_t mask = (int64_t(c_.mask_per_head ? b * c_.heads_q + h : 0) * c_.seqlen_q + i) * c_.seqlen_k + j;
      if (c_.mask_of_keys) mask = 2 * j;
      seen[j] = !(c_.causal && j > i + offset) && !(c_.left >= 0 && j < i + offset - c_.left) &&
                !(c_.right >= 0 && j > i + offset + c_.right) && !(kMask == Mask::boolean && !bytes_[mask]) &&
                !(kMask == Mask::floating && wide_mask_[mask] == -INFINITY);
      if (!seen[j]) continue;
      double sum = 0;
      for (int d = 0; d < kD; ++d)
        sum += double(to_float(q_[row * row_q_ + h * kD + d])) * to_float(k_[(k0 + j) * row_k_ + kv * kD + d]);
      s[j] = sum * c_.scale;
      if (kSoftcap) {
        const double t = std::tanh(s[j] / c_.softcap);
        s[j] = c_.softcap * t, slope[j] = 1 - t * t;
      }
      if (kMask == Mask::floating) s[j] += wide_mask_[mask];
      alive = true, top = std::fmax(top, s[j]);
    }
    if (!alive) {  // whatever its query holds
      spoil(&q_[row * row_q_ + h * kD], kD);
      std::fill_n(&scaled_[at * kDv], kDv, from_float<T>(0));
      norm_[at] = INFINITY, norm_low_[at] = 0, change_[at] = 0;
      return;
    }
    double sum = 0;
    for (int j = 0; j < sk; ++j)
      if (seen[j]) sum += std::exp(s[j] - top);
    const double log2e = 1 / std::log(2.0), lse = top + std::log(sum);
    norm_[at] = float((kMask == Mask::floating ? top : lse) * log2e);
    norm_low_[at] = float(lse * log2e - norm_[at]);

    std::vector<double> dp(sk), dp_size(sk);
    double delta = 0;
    for (int j = 0; j < sk; ++j) {
      if (!seen[j]) continue;
      for (int d = 0; d < kDv; ++d) {
        const double term = double(to_float(scaled_[at * kDv + d])) * to_float(v_[(k0 + j) * row_v_ + kv * kDv + d]);
        dp[j] += term, dp_size[j] += std::fabs(term);
      }
      delta += std::exp(s[j] - lse) * dp[j];
    }
    change_[at] = float(delta + 0.3 * change_[at]);
    for (int j = 0; j < sk; ++j) {
      if (!seen[j]) continue;
      const double weight = std::exp(s[j] - lse);
      Sum* dv = &dv_[((k0 + j) * c_.heads_kv + kv) * kDv];
      for (int d = 0; d < kDv; ++d) dv[d].add(weight, to_float(scaled_[at * kDv + d]), weight);
      const double ds = weight * (dp[j] - change_[at]) * slope[j];
      const double ds_size = weight * (dp_size[j] + std::fabs(change_[at]));
      Sum* dk = &dk_[((k0 + j) * c_.heads_kv + kv) * kD];
      for (int d = 0; d < kD; ++d) {
        const double q = to_float(q_[row * row_q_ + h * kD + d]) * double(c_.scale);
        dk[d].add(ds, q, ds_size);
      }
    }
  }

  bool compare(const std::vector<T>& got, const std::vector<Sum>& exact, int columns, int64_t stride) const {
    constexpr bool kBf16 = std::is_same_v<T, bf16>;
    const double half_ulp = kBf16 ? 0x1p-8 : 0x1p-11;
    for (size_t i = 0; i < got.size(); ++i) {
      const double x = to_float(got[i]);
      const size_t row = i / stride, column = i % stride;
      if (column >= size_t(columns) || !exact[row * columns + column].covered) {
        if (!std::isnan(x)) return false;  // nothing is written beside the result
        continue;
      }
      const Sum& sum = exact[row * columns + column];
      if (!std::isfinite(sum.value)) {
        if (std::isfinite(x)) return false;
        continue;
      }
      // All that is not rounded to T is of the order of fp32.
      const double rounded = 1.01 * std::fabs(sum.value) + std::fmin(sum.size, 2 * std::sqrt(sum.squares));
      const double allowed =
          half_ulp * rounded + 0x1p-16 * sum.size + (kBf16 ? 1e-37 : 0x1p-25 * (1 + sum.tiny));
      const double share = std::fabs(x - sum.value) / allowed;
      if (!(share <= worst)) worst = share;
      if (!(share <= 1)) return false;
    }
    return true;
  }

  KeyGradientsCase c_;
  int64_t row_q_, row_k_, row_v_, rows_q_, rows_k_;
  std::vector<T> q_, k_, v_, scaled_, narrow_mask_;
  std::vector<float> wide_mask_, norm_, norm_low_, change_;
  std::vector<unsigned char> bytes_;
  std::vector<Sum> dk_, dv_;
};

}  // namespace nsk::test
