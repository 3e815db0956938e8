// A problem of gated attention's backward, up to the query's gradient, with its answers in double.
//
// The forward's out and lse are its answer in double, rounded. The row-wise kernel is held against these, and the
// query's gradient against what the row-wise kernel has left, each as closely as its own arithmetic allows. Whether
// both together give the gradient of the definition, differences of the forward in double tell.
#pragma once

#include "../../csrc/cuda/gated_sdpa_dq.cuh"
#include "../../csrc/cuda/gated_sdpa_rows.cuh"
#include "gated_sdpa.h"
#include "gated_sdpa_backward_case.h"

namespace nsk::test {

template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
class BackwardProblem {
 public:
  explicit BackwardProblem(const SdpaCase& c, const BackwardCase& more = {}, uint64_t seed = 1) : c_(c), more_(more) {
    CHECK((c.softcap > 0) == kSoftcap && c.mask == kMask);
    row_q_ = c.heads_q * kD + 8, row_k_ = c.heads_kv * kD + 8, row_v_ = c.heads_kv * kDv + 8;
    row_o_ = c.heads_q * kDv + 8;
    rows_ = int64_t(c.batch) * c.seqlen_q;
    fill(q_, rows_, c.heads_q * kD, row_q_, seed);
    fill(k_, c.batch * c.seqlen_k, c.heads_kv * kD, row_k_, seed + 1);
    fill(v_, c.batch * c.seqlen_k, c.heads_kv * kDv, row_v_, seed + 2);
    if (c.hidden_nan >= 0) {
      const float bad[] = {NAN, INFINITY, -INFINITY, 1.0f};
      for (int i = 0; i < c.heads_kv * kDv; ++i) v_[c.hidden_nan * row_v_ + i] = from_float<T>(bad[i % 4]);
      for (int i = 0; i < c.heads_kv * kD && c.nan_in_key; ++i)
        k_[c.hidden_nan * row_k_ + i] = from_float<T>(bad[i % 4]);
    }
    if (more.far >= 0)
      for (int h = 0; h < c.heads_kv; ++h) k_[more.far * row_k_ + h * kD + 3] = from_float<T>(more.far_key);
    gate_.fill(normal(size_t(rows_) * row_o_ + 1, seed + 3), c.float_gate);
    sink_.fill(normal(c.heads_q, seed + 4), c.float_sink);
    fill_mask(seed + 5);
    fill_grad_out(seed + 6);
    grad_lse_ = normal(size_t(rows_) * c.heads_q, seed + 7);
    out_.assign(size_t(rows_) * row_o_, from_float<T>(NAN)), lse_.assign(size_t(rows_) * c.heads_q, NAN);
    const size_t numbers = size_t(rows_) * c.heads_q;
    norm_.assign(numbers, NAN), low_.assign(numbers, NAN), change_.assign(numbers, NAN), scaled_.resize(numbers * kDv);
    each_row([&](const Place& at) {
      const Solved row = solve(at);
      lse_[dense(at)] = float(row.lse);
      norm_[dense(at)] = row.alive ? float(row.top * kLog2) : INFINITY;
      low_[dense(at)] = row.alive ? float(row.lse * kLog2 - norm_[dense(at)]) : 0.0f;
      for (int d = 0; d < kDv; ++d) out_[at.row * row_o_ + at.head * kDv + d] = from_float<T>(row.out[d]);
    });
  }

  Outcome run_rows(const Options& options) {
    GlobalMemory memory;
    GatedSdpaBackward<T> p = enter(memory);
    const int64_t parts = gated_sdpa_sink_parts(p.forward);
    const size_t gates = size_t(rows_) * row_o_ + 1;
    grad_gate_ = {}, grad_gate_.fill(std::vector<float>(gates), c_.float_gate);
    sink_parts_.resize(size_t(parts) * c_.heads_q);
    p.scaled = memory.output("scaled", scaled_.data(), scaled_.size());
    p.change = memory.output("change", change_.data(), change_.size());
    if (kMask == Mask::floating)
      p.norm = memory.in_out("norm", norm_.data(), norm_.size());
    else
      p.norm = memory.output("norm", norm_.data(), norm_.size());
    if (more_.grad_gate && c_.gate != Gate::none) {
      void* data = c_.float_gate ? static_cast<void*>(memory.output("grad_gate", grad_gate_.wide.data(), gates))
                                 : memory.output("grad_gate", grad_gate_.narrow.data(), gates);
      p.grad_gate = static_cast<unsigned char*>(data) + gate_shift() * (c_.float_gate ? 4 : 2);
      p.grad_gate_stride = p.forward.gate_stride;
    }
    if (more_.grad_sink && c_.sink) p.sink_parts = memory.output("sink_parts", sink_parts_.data(), sink_parts_.size());
    using Kernel = GatedSdpaRows<T>;
    const Launch what{"gated_sdpa_rows", {unsigned(gated_sdpa_blocks<Kernel::kRows>(p.forward))}, {Kernel::kThreads}};
    Outcome outcome{emu::launch(what, memory, options, [&] { gated_sdpa_rows<T>(p, kDv); }), true};
    outcome.right = compare_rows();
    return outcome;
  }

  // After run_rows.
  Outcome run_dq(const Options& options) {
    GlobalMemory memory;
    GatedSdpaBackward<T> p = enter(memory);
    p.scaled = const_cast<T*>(memory.input("scaled", scaled_.data(), scaled_.size()));
    p.change = const_cast<float*>(memory.input("change", change_.data(), change_.size()));
    p.norm = const_cast<float*>(memory.input("norm", norm_.data(), norm_.size()));
    grad_.resize(size_t(rows_) * row_q_);
    p.grad_query = memory.output("grad_query", grad_.data(), grad_.size());
    p.grad_query_stride = p.forward.query_stride;
    using Tiles = GatedSdpaDqTiles<T, kD, kDv>;
    const Launch what{"gated_sdpa_dq",
                      {unsigned(gated_sdpa_blocks<Tiles::kRows>(p.forward))},
                      {Tiles::kThreads},
                      Tiles::kSharedBytes};
    Outcome outcome{emu::launch(what, memory, options, [&] { gated_sdpa_dq<T, kD, kDv, kSoftcap, kMask>(p); }), true};
    outcome.right = compare_dq();
    return outcome;
  }

  // After run_dq: the root of the mean square of (gradient - difference quotient), as a share of the quotients'.
  double difference_from_definition() const {
    double errors = 0, sizes = 0;
    each_row([&](const Place& at) {
      if (at.i % 7 != 2 && at.i != 0) return;
      for (int d = at.i % 5; d < kD; d += 11) {
        const double step = 1e-4, exact = (loss(at, d, step) - loss(at, d, -step)) / (2 * step);
        const double error = to_float(grad_[at.row * row_q_ + at.head * kD + d]) - exact;
        errors += error * error, sizes += exact * exact;
      }
    });
    return std::sqrt(errors / sizes);
  }

  double worst_rows = 0, worst = 0;  // of all errors, as a share of what is allowed

 private:
  static constexpr double kLog2 = 1.4426950408889634, kHalfUlp = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
  static constexpr double kTiny = std::is_same_v<T, bf16> ? 1e-37 : 0x1p-24;

  // One row of a head: i of its sequence, `row` of all; k0 and sk are the keys of its sequence.
  struct Place {
    int batch, head, i, k0, sk, offset;
    int64_t row;
  };
  struct Solved {
    bool alive = false;
    double top = -INFINITY, lse = -INFINITY, share = 1;
    std::vector<double> p, slope, out;
    std::vector<bool> seen;
  };

  static void fill(std::vector<T>& to, int64_t rows, int columns, int64_t stride, uint64_t seed) {
    const std::vector<float> values = normal(size_t(rows * stride), seed);
    for (int64_t i = 0; i < rows * stride; ++i)
      to.push_back(from_float<T>(i % stride < columns ? values[i] : NAN));
  }
  void fill_mask(uint64_t seed) {
    mask_heads_ = c_.mask_per_head ? c_.heads_q : 1;
    std::vector<float> masks = normal(size_t(mask_heads_) * c_.seqlen_q * c_.seqlen_k, seed);
    const auto hide = [&](int i, int j) { bytes_[i * c_.seqlen_k + j] = 0, masks[i * c_.seqlen_k + j] = -INFINITY; };
    for (float& x : masks) {
      bytes_.push_back(x > -0.3f);
      if (x < -1) x = -INFINITY;
    }
    for (size_t i = 0; i < masks.size() && more_.lift != 0; ++i)
      if (i / c_.seqlen_k % 7 == 0) masks[i] = more_.lift;
    for (int j = 0; j < c_.seqlen_k && c_.seqlen_q > 5 && kMask != Mask::none; ++j) hide(5, j);
    for (int i = 0; i < c_.seqlen_q && c_.hidden_nan >= 0; i += 2) hide(i, c_.hidden_nan);
    mask_.fill(masks, c_.float_mask);
  }
  void fill_grad_out(uint64_t seed) {
    const int64_t tail = more_.grad_out == GradOut::misaligned ? 1 : 0;
    switch (more_.grad_out) {
      case GradOut::dense:
      case GradOut::misaligned: grad_out_stride_ = {c_.seqlen_q * row_o_, kDv, row_o_}, column_ = 1; break;
      case GradOut::broadcast: grad_out_stride_ = {0, 0, 0}, column_ = 0; break;
      case GradOut::columns_apart:
        grad_out_stride_ = {int64_t(c_.heads_q) * kDv * c_.seqlen_q, int64_t(kDv) * c_.seqlen_q, 1};
        column_ = c_.seqlen_q;
    }
    if (packed()) grad_out_stride_.batch = 0;
    for (float x : normal(size_t(rows_) * row_o_ + size_t(tail), seed)) grad_out_.push_back(from_float<T>(x));
    shift_ = tail;
  }

  bool packed() const { return !c_.cu_q.empty(); }
  int sequences() const { return packed() ? int(c_.cu_q.size()) - 1 : c_.batch; }
  int64_t gate_shift() const { return more_.misaligned_gate ? 1 : 0; }

  template <class F>
  void each_row(const F& f) const {
    for (int b = 0; b < sequences(); ++b) {
      const int q0 = packed() ? c_.cu_q[b] : b * c_.seqlen_q, sq = packed() ? c_.cu_q[b + 1] - q0 : c_.seqlen_q;
      const int k0 = packed() ? c_.cu_k[b] : b * c_.seqlen_k, sk = packed() ? c_.cu_k[b + 1] - k0 : c_.seqlen_k;
      for (int h = 0; h < c_.heads_q; ++h)
        for (int i = 0; i < sq; ++i) f(Place{b, h, i, k0, sk, c_.bottom_right ? sk - sq : 0, q0 + i});
    }
  }
  int64_t dense(const Place& at) const {
    if (packed()) return at.head * c_.seqlen_q + at.row;
    return (int64_t(at.batch) * c_.heads_q + at.head) * c_.seqlen_q + at.i;
  }
  int64_t gate_at(const Place& at, int d) const {
    return at.row * row_o_ + (c_.gate == Gate::headwise ? at.head : at.head * kDv + d) + gate_shift();
  }
  double open(const Place& at, int d) const {
    return c_.gate == Gate::none ? 1 : 1 / (1 + std::exp(-gate_[gate_at(at, d)]));
  }
  double grad_out(const Place& at, int d) const {
    const Strides& s = grad_out_stride_;
    return to_float(grad_out_[shift_ + (packed() ? 0 : at.batch) * s.batch + at.head * s.head +
                              (packed() ? at.row : at.i) * s.row + d * column_]);
  }
  double key(const Place& at, int j, int d) const {
    return to_float(k_[(at.k0 + j) * row_k_ + at.head / (c_.heads_q / c_.heads_kv) * kD + d]);
  }
  double value(const Place& at, int j, int d) const {
    return to_float(v_[(at.k0 + j) * row_v_ + at.head / (c_.heads_q / c_.heads_kv) * kDv + d]);
  }

  // The forward of one row, with something added to one element of its query.
  Solved solve(const Place& at, int moved = 0, double by = 0) const {
    Solved row;
    row.p.assign(at.sk, 0), row.slope.assign(at.sk, 1), row.out.assign(kDv, 0), row.seen.assign(at.sk, false);
    const int i = at.i, offset = at.offset;
    for (int j = 0; j < at.sk; ++j) {
      const int64_t m = (int64_t(c_.mask_per_head ? at.head : 0) * c_.seqlen_q + i) * c_.seqlen_k + j;
      row.seen[j] = !(c_.causal && j > i + offset) && !(c_.left >= 0 && j < i + offset - c_.left) &&
                    !(c_.right >= 0 && j > i + offset + c_.right) && !(kMask == Mask::boolean && !bytes_[m]) &&
                    !(kMask == Mask::floating && mask_[m] == -INFINITY);
      if (!row.seen[j]) continue;
      double s = 0;
      for (int d = 0; d < kD; ++d)
        s += (to_float(q_[at.row * row_q_ + at.head * kD + d]) + (d == moved ? by : 0)) * key(at, j, d);
      s *= c_.scale;
      if (kSoftcap) {
        const double t = std::tanh(s / c_.softcap);
        s = c_.softcap * t, row.slope[j] = 1 - t * t;
      }
      if (kMask == Mask::floating) s += mask_[m];
      row.alive = true, row.p[j] = s, row.top = std::isnan(s) ? s : std::fmax(row.top, s);
    }
    if (!row.alive) return row;
    double sum = 0;
    for (int j = 0; j < at.sk; ++j) sum += row.p[j] = row.seen[j] ? std::exp(row.p[j] - row.top) : 0;
    for (double& p : row.p) p /= sum;
    row.lse = row.top + std::log(sum);
    if (c_.sink) row.share = 1 / (1 + std::exp(sink_[at.head] - row.lse));
    for (int d = 0; d < kDv; ++d) {
      for (int j = 0; j < at.sk; ++j)
        if (row.seen[j]) row.out[d] += row.p[j] * value(at, j, d);
      row.out[d] *= row.share * open(at, d);
    }
    return row;
  }
  double loss(const Place& at, int moved, double by) const {
    const Solved row = solve(at, moved, by);
    double sum = more_.grad_lse && row.alive ? grad_lse_[dense(at)] * row.lse : 0;
    for (int d = 0; d < kDv; ++d) sum += grad_out(at, d) * row.out[d];
    return sum;
  }

  GatedSdpaBackward<T> enter(GlobalMemory& memory) const {
    GatedSdpaBackward<T> all{};
    GatedSdpa<T>& p = all.forward;
    p.batch = sequences(), p.heads_q = c_.heads_q, p.heads_kv = c_.heads_kv;
    p.seqlen_q = c_.seqlen_q, p.seqlen_k = c_.seqlen_k;
    p.query = memory.input("query", q_.data(), q_.size());
    p.key = memory.input("key", k_.data(), k_.size());
    p.value = memory.input("value", v_.data(), v_.size());
    p.query_stride = {c_.seqlen_q * row_q_, kD, row_q_}, p.key_stride = {c_.seqlen_k * row_k_, kD, row_k_};
    p.value_stride = {c_.seqlen_k * row_v_, kDv, row_v_}, p.out_stride = {c_.seqlen_q * row_o_, kDv, row_o_};
    p.gate_kind = c_.gate;
    if (c_.gate != Gate::none) {
      p.gate = gate_.enter(memory, "gate");
      p.gate.data = p.gate.data + gate_shift() * (c_.float_gate ? 4 : 2);
    }
    p.gate_stride = c_.gate == Gate::headwise ? Strides{c_.seqlen_q * row_o_, 1, row_o_} : p.out_stride;
    if (c_.sink) p.sink = sink_.enter(memory, "sink"), p.sink_stride = 1;
    if (kMask == Mask::boolean) p.mask.data = memory.input("mask", bytes_.data(), bytes_.size());
    if (kMask == Mask::floating) p.mask = mask_.enter(memory, "mask");
    p.mask_stride = {0, c_.mask_per_head ? int64_t(c_.seqlen_q) * c_.seqlen_k : 0, c_.seqlen_k}, p.mask_stride_key = 1;
    p.out = const_cast<T*>(memory.input("out", out_.data(), out_.size()));
    p.lse = const_cast<float*>(memory.input("lse", lse_.data(), lse_.size()));
    p.lse_stride = {int64_t(c_.heads_q) * c_.seqlen_q, c_.seqlen_q, 1};
    if (packed()) {
      p.cu_seqlens_q = memory.input("cu_seqlens_q", c_.cu_q.data(), c_.cu_q.size());
      p.cu_seqlens_k = memory.input("cu_seqlens_k", c_.cu_k.data(), c_.cu_k.size());
      p.query_stride.batch = p.key_stride.batch = p.value_stride.batch = p.out_stride.batch = 0;
      p.gate_stride.batch = p.lse_stride.batch = 0;
    }
    p.window_left = c_.left, p.window_right = c_.right;
    p.is_causal = c_.causal, p.bottom_right = c_.bottom_right, p.scale = c_.scale, p.softcap = c_.softcap;
    all.grad_out = memory.input("grad_out", grad_out_.data(), grad_out_.size()) + shift_;
    all.grad_out_stride = grad_out_stride_, all.grad_out_stride_column = column_;
    if (more_.grad_lse) all.grad_lse = memory.input("grad_lse", grad_lse_.data(), grad_lse_.size());
    all.grad_lse_stride = p.lse_stride;
    if (kMask == Mask::floating)
      all.norm_low = const_cast<float*>(memory.input("norm_low", low_.data(), low_.size()));
    return all;
  }

  static bool near(double& worst, double got, double exact, double allowed) {
    if (!std::isfinite(exact)) return !std::isfinite(got);
    if (got == exact) return true;
    const double share = std::fabs(got - exact) / allowed;
    if (!(share <= worst)) worst = share;
    return share <= 1;
  }

  bool compare_rows() {
    bool right = true;
    std::vector<bool> covered(rows_);
    std::vector<double> sinks(c_.heads_q), sink_sizes(c_.heads_q);
    each_row([&](const Place& at) {
      covered[at.row] = true;
      const bool alive = lse_[dense(at)] != -INFINITY;
      const double lse = kMask == Mask::floating ? (double(norm_[dense(at)]) + low_[dense(at)]) / kLog2
                                                 : lse_[dense(at)];
      const double gap = c_.sink ? lse - sink_[at.head] : INFINITY;
      const double share = 1 / (1 + std::exp(-gap)), closed = 1 / (1 + std::exp(gap));
      double delta = 0, size = 0;
      for (int d = 0; d < kDv; ++d) {
        const double dout = grad_out(at, d), out = to_float(out_[at.row * row_o_ + at.head * kDv + d]);
        const double factor = share * open(at, d), exact = alive ? factor * dout : 0;
        const double got = to_float(scaled_[dense(at) * kDv + d]);
        right &= near(worst_rows, got, exact, kHalfUlp * 1.01 * std::fabs(exact) + kTiny);
        const double term = out * (factor > 1e-30 ? got / factor : dout);
        delta += term, size += std::fabs(term);
        if (c_.gate == Gate::elementwise && more_.grad_gate) {
          const double grad = alive ? dout * out * (1 - open(at, d)) : 0;
          right &= near(worst_rows, grad_gate_[gate_at(at, d)], grad, gate_error(grad));
        }
      }
      if (c_.gate == Gate::headwise && more_.grad_gate) {
        const double grad = alive ? delta * (1 - open(at, 0)) : 0;
        right &= near(worst_rows, grad_gate_[gate_at(at, 0)], grad, gate_error(grad) + 0x1p-20 * size);
      }
      const double change = alive ? share * delta - (more_.grad_lse ? grad_lse_[dense(at)] : 0) : 0;
      right &= near(worst_rows, change_[dense(at)], change, 0x1p-20 * (size + std::fabs(change)) + 1e-30);
      const double norm = alive ? lse * kLog2 : INFINITY;
      if (kMask != Mask::floating)
        right &= alive ? near(worst_rows, norm_[dense(at)], norm, 2e-7 * std::fabs(norm)) : norm_[dense(at)] == norm;
      if (alive) sinks[at.head] -= closed * delta, sink_sizes[at.head] += std::fabs(closed) * size;
    });
    if (c_.sink && more_.grad_sink)
      for (int h = 0; h < c_.heads_q; ++h) {
        const int64_t parts = int64_t(sink_parts_.size()) / c_.heads_q;
        double sum = 0;
        for (int64_t i = 0; i < parts; ++i) sum += sink_parts_[h * parts + i];
        right &= near(worst_rows, sum, sinks[h], 0x1p-18 * sink_sizes[h] + 1e-30);
      }
    for (int64_t row = 0; row < rows_; ++row) right &= covered[row] || left_alone(row);
    return right;
  }
  double gate_error(double grad) const {
    return c_.float_gate ? 0x1p-20 * std::fabs(grad) + 1e-30 : kHalfUlp * 1.01 * std::fabs(grad) + kTiny;
  }
  // A row of packed sequences that none covers.
  bool left_alone(int64_t row) const {
    bool right = true;
    for (int h = 0; h < c_.heads_q; ++h) {
      const int64_t at = h * c_.seqlen_q + row;
      right &= std::isnan(change_[at]) && std::isnan(norm_[at]);
      for (int d = 0; d < kDv; ++d) right &= std::isnan(to_float(scaled_[at * kDv + d]));
      if (c_.gate == Gate::elementwise && more_.grad_gate)
        for (int d = 0; d < kDv; ++d) right &= std::isnan(grad_gate_[row * row_o_ + h * kDv + d + gate_shift()]);
    }
    return right;
  }

  bool compare_dq() {
    bool right = true;
    std::vector<bool> covered(rows_);
    each_row([&](const Place& at) {
      covered[at.row] = true;
      const Solved row = solve(at);
      std::vector<double> ds(at.sk), sizes(at.sk);
      const double change = change_[dense(at)];
      for (int j = 0; j < at.sk; ++j) {
        if (!row.seen[j]) continue;
        double product = -change, size = std::fabs(change);
        for (int d = 0; d < kDv; ++d) {
          const double term = double(to_float(scaled_[dense(at) * kDv + d])) * value(at, j, d);
          product += term, size += std::fabs(term);
        }
        ds[j] = row.p[j] * row.slope[j] * product, sizes[j] = row.p[j] * size;
      }
      for (int d = 0; d < kD; ++d) {
        double sum = 0, size = 0, squares = 0, large = 0;
        for (int j = 0; j < at.sk; ++j) {
          if (!row.seen[j]) continue;
          const double term = ds[j] * key(at, j, d);
          sum += term, size += std::fabs(term), squares += term * term;
          large += (sizes[j] + (std::is_same_v<T, f16> ? 0x1p-9 : 0)) * std::fabs(key(at, j, d));
        }
        const double exact = sum * c_.scale, scale = std::fabs(c_.scale);
        // dS is rounded to T, each on its own, and the result once; all else is of the order of fp32.
        const double allowed = kHalfUlp * (1.01 * std::fabs(exact) + scale * std::fmin(size, 2 * std::sqrt(squares))) +
                               (0x1p-16 + 0x1p-23 * more_.lift) * scale * large + kTiny;
        right &= near(worst, to_float(grad_[at.row * row_q_ + at.head * kD + d]), exact, allowed);
      }
    });
    for (int64_t i = 0; i < rows_ * row_q_; ++i)  // nothing is written beside the result
      if (!covered[i / row_q_] || i % row_q_ >= c_.heads_q * kD) right &= std::isnan(to_float(grad_[i]));
    return right;
  }

  SdpaCase c_;
  BackwardCase more_;
  int64_t row_q_, row_k_, row_v_, row_o_, rows_, shift_ = 0, column_ = 1;
  int mask_heads_;
  Strides grad_out_stride_;
  std::vector<T> q_, k_, v_, out_, grad_out_, scaled_, grad_;
  Either<T> gate_, sink_, mask_, grad_gate_;
  std::vector<unsigned char> bytes_;
  std::vector<float> lse_, grad_lse_, norm_, low_, change_, sink_parts_;
};

}  // namespace nsk::test
