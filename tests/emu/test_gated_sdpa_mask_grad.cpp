// Gated attention's norm and mask gradient kernels against their definition in double: heads, lengths, shapes of masks,
// positions and types, every schedule, bytes against paper, and without each of their barriers, waits and commits.
#include "../../csrc/cuda/gated_sdpa_mask_grad.cuh"

#include "../../csrc/cuda/gated_sdpa_norm.cuh"
#include "gated_sdpa.h"

using namespace nsk;
using namespace nsk::test;

namespace {

struct GradCase {
  int batch = 1, heads_q = 1, heads_kv = 1, seqlen_q = 64, seqlen_k = 64;
  bool own_batch = true, own_head = true, own_row = true, own_key = true;  // dimensions of the mask
  bool causal = false, bottom_right = false;
  int left = -1, right = -1;
  float scale = 0.125f, softcap = 0;
  bool float_mask = false;
  float lift = 0;       // what the mask holds on all keys of every third row
  int hidden_nan = -1;  // a key that holds NaN, as its value does, and that even rows do not see
};

constexpr double kLog2 = 0.69314718055994530942;

template <class T, int kD, int kDv, bool kSoftcap>
class GradProblem {
 public:
  explicit GradProblem(const GradCase& c, uint64_t seed = 1) : c_(c) {
    CHECK((c.softcap > 0) == kSoftcap);
    row_q_ = c.heads_q * kD + 8, row_k_ = c.heads_kv * kD + 8, row_v_ = c.heads_kv * kDv + 8;
    fill(q_, c.batch * c.seqlen_q, c.heads_q * kD, row_q_, seed);
    fill(k_, c.batch * c.seqlen_k, c.heads_kv * kD, row_k_, seed + 1);
    fill(v_, c.batch * c.seqlen_k, c.heads_kv * kDv, row_v_, seed + 2);
    if (c.hidden_nan >= 0) {
      k_[c.hidden_nan * row_k_] = from_float<T>(NAN);
      v_[c.hidden_nan * row_v_] = from_float<T>(INFINITY);
    }
    size_[0] = c.own_batch ? c.batch : 1, size_[1] = c.own_head ? c.heads_q : 1;
    size_[2] = c.own_row ? c.seqlen_q : 1, size_[3] = c.own_key ? c.seqlen_k : 1;
    std::vector<float> mask = normal(size_t(size_[0] * size_[1] * size_[2] * size_[3]), seed + 3);
    for (size_t i = 0; i < mask.size(); ++i) {
      const int64_t row = int64_t(i) / size_[3] % size_[2], key = int64_t(i) % size_[3];
      if (mask[i] < -1.3f || (c.own_row && row == 5)) mask[i] = -INFINITY;
      if (c.lift != 0 && row % 3 == 0) mask[i] = c.lift;
      if (c.hidden_nan == key && row % 2 == 0) mask[i] = -INFINITY;
    }
    mask_.fill(mask, c.float_mask);
    rows_ = int64_t(c.batch) * c.heads_q * c.seqlen_q;
    for (float x : normal(size_t(rows_ * kDv), seed + 4)) scaled_.push_back(from_float<T>(x));
    change_ = normal(size_t(rows_), seed + 5);
    solve();
  }

  Outcome run_norm(const Options& options) const {
    using Tiles = GatedSdpaNormTiles<T, kD>;
    GlobalMemory memory;
    GatedSdpaBackward<T> p = enter(memory);
    std::vector<float> norm(rows_), low(rows_);
    p.norm = memory.output("norm", norm.data(), norm.size());
    p.norm_low = memory.output("norm_low", low.data(), low.size());
    Outcome outcome{emu::launch({"gated_sdpa_norm",
                                 {unsigned(gated_sdpa_blocks<Tiles::kRows>(p.forward))},
                                 {Tiles::kThreads},
                                 Tiles::kSharedBytes},
                                memory, options, [&] { gated_sdpa_norm<T, kD, kSoftcap>(p); }),
                    true};
    for (int64_t i = 0; i < rows_; ++i) {
      // How much is in which part is open to rounding, their sum is not; all is known of rows that see nothing.
      const bool dead = norm_[i] == INFINITY;
      const double allowed = 4e-6 * (1 + std::fabs(norm_[i]));
      outcome.right &= near(norm[i], norm_[i], dead ? 0 : allowed);
      outcome.right &= near(low[i], dead ? 0 : norm_[i] - norm[i] + low_[i], dead ? 0 : std::fmin(allowed, 1e-3));
    }
    return outcome;
  }

  Outcome run(const Options& options) const {
    return c_.float_mask ? run_with<float>(options) : run_with<T>(options);
  }

  mutable double worst = 0;  // of all errors, as a share of what is allowed

 private:
  static void fill(std::vector<T>& to, int64_t rows, int columns, int64_t stride, uint64_t seed) {
    const std::vector<float> values = normal(size_t(rows * stride), seed);
    for (int64_t i = 0; i < rows * stride; ++i) to.push_back(from_float<T>(i % stride < columns ? values[i] : NAN));
  }

  GatedSdpaBackward<T> enter(GlobalMemory& memory) const {
    GatedSdpaBackward<T> backward{};
    GatedSdpa<T>& p = backward.forward;
    p.batch = c_.batch, p.heads_q = c_.heads_q, p.heads_kv = c_.heads_kv;
    p.seqlen_q = c_.seqlen_q, p.seqlen_k = c_.seqlen_k;
    p.query = memory.input("query", q_.data(), q_.size());
    p.key = memory.input("key", k_.data(), k_.size());
    p.value = memory.input("value", v_.data(), v_.size());
    p.query_stride = {c_.seqlen_q * row_q_, kD, row_q_}, p.key_stride = {c_.seqlen_k * row_k_, kD, row_k_};
    p.value_stride = {c_.seqlen_k * row_v_, kDv, row_v_};
    p.mask = mask_.enter(memory, "mask");
    p.mask_stride = {c_.own_batch ? size_[1] * size_[2] * size_[3] : 0, c_.own_head ? size_[2] * size_[3] : 0,
                     c_.own_row ? size_[3] : 0};
    p.mask_stride_key = c_.own_key ? 1 : 0;
    p.window_left = c_.left, p.window_right = c_.right;
    p.is_causal = c_.causal, p.bottom_right = c_.bottom_right, p.scale = c_.scale, p.softcap = c_.softcap;
    std::copy_n(size_, 4, backward.mask_size);
    return backward;
  }

  template <class G>
  Outcome run_with(const Options& options) const {
    using Tiles = GatedSdpaMaskGradTiles<T, kD, kDv>;
    GlobalMemory memory;
    GatedSdpaBackward<T> p = enter(memory);
    p.scaled = const_cast<T*>(memory.input("scaled", scaled_.data(), scaled_.size()));
    p.change = const_cast<float*>(memory.input("change", change_.data(), change_.size()));
    p.norm = const_cast<float*>(memory.input("norm", norm_.data(), norm_.size()));
    p.norm_low = const_cast<float*>(memory.input("norm_low", low_.data(), low_.size()));
    std::vector<G> grad(answers_.size());
    p.grad_mask = reinterpret_cast<unsigned char*>(memory.output("grad_mask", grad.data(), grad.size()));
    Outcome outcome{emu::launch({"gated_sdpa_mask_grad",
                                 {unsigned(mask_grad_blocks<Tiles>(p))},
                                 {Tiles::kThreads},
                                 Tiles::kSharedBytes},
                                memory, options, [&] { gated_sdpa_mask_grad<T, kD, kDv, kSoftcap>(p); }),
                    true};
    const double half_ulp = std::is_same_v<G, float> ? 0x1p-24 : std::is_same_v<G, bf16> ? 0x1p-8 : 0x1p-11;
    for (size_t i = 0; i < grad.size(); ++i)
      outcome.right &= near(to_float(grad[i]), answers_[i],
                            allowed_[i] + 1.01 * half_ulp * std::fabs(answers_[i]) +
                                (std::is_same_v<G, f16> ? 0x1p-25 : 1e-37));
    return outcome;
  }

  bool near(double got, double exact, double allowed) const {
    if (std::isnan(exact)) return std::isnan(got);
    if (got == exact) return true;
    const double share = std::fabs(got - exact) / allowed;
    if (!(share <= worst)) worst = share;
    return share <= 1;
  }

  void solve() {
    answers_.assign(size_t(size_[0] * size_[1] * size_[2] * size_[3]), 0);
    allowed_ = answers_;
    for (int b = 0; b < c_.batch; ++b)
      for (int h = 0; h < c_.heads_q; ++h)
        for (int i = 0; i < c_.seqlen_q; ++i) solve_row(b, h, i);
  }

  void solve_row(int b, int h, int i) {
    const int kv = h / (c_.heads_q / c_.heads_kv), at = i + (c_.bottom_right ? c_.seqlen_k - c_.seqlen_q : 0);
    const int64_t row = (int64_t(b) * c_.heads_q + h) * c_.seqlen_q + i;
    const int64_t of_row = (((c_.own_batch ? b : 0) * size_[1] + (c_.own_head ? h : 0)) * size_[2] +
                            (c_.own_row ? i : 0)) * size_[3];
    std::vector<double> s(c_.seqlen_k);
    std::vector<bool> seen(c_.seqlen_k);
    double top = -INFINITY, sum = 0;
    bool alive = false;
    for (int j = 0; j < c_.seqlen_k; ++j) {
      const double bias = mask_[of_row + (c_.own_key ? j : 0)];
      seen[j] = !(c_.causal && j > at) && !(c_.left >= 0 && j < at - c_.left) &&
                !(c_.right >= 0 && j > at + c_.right) && bias != -INFINITY;
      if (!seen[j]) continue;
      for (int d = 0; d < kD; ++d)
        s[j] += double(to_float(q_[(int64_t(b) * c_.seqlen_q + i) * row_q_ + h * kD + d])) *
                to_float(k_[(int64_t(b) * c_.seqlen_k + j) * row_k_ + kv * kD + d]);
      s[j] *= c_.scale;
      if (kSoftcap) s[j] = c_.softcap * std::tanh(s[j] / c_.softcap);
      // In fp32 nothing is left of a score beside 1e38; the lowest number stays what it is in units of log2 too.
      s[j] = std::fabs(bias) > 1e30 ? std::fmax(float(bias) * kLog2e, kLowest) : (s[j] + bias) / kLog2;
      alive = true, top = std::fmax(top, s[j]);
    }
    norm_.push_back(alive ? float(top) : INFINITY);
    for (int j = 0; j < c_.seqlen_k; ++j)
      if (seen[j]) sum += std::exp2(s[j] - norm_[row]);
    low_.push_back(alive ? float(std::log2(sum)) : 0.0f);
    for (int j = 0; j < c_.seqlen_k; ++j) {
      if (!seen[j]) continue;
      double product = 0, size = 0;
      for (int d = 0; d < kDv; ++d) {
        const double term = double(to_float(scaled_[row * kDv + d])) *
                            to_float(v_[(int64_t(b) * c_.seqlen_k + j) * row_v_ + kv * kDv + d]);
        product += term, size += std::fabs(term);
      }
      const double p = std::exp2(s[j] - norm_[row] - low_[row]);
      answers_[of_row + (c_.own_key ? j : 0)] += p * (product - change_[row]);
      allowed_[of_row + (c_.own_key ? j : 0)] += p * 1e-5 * (size + std::fabs(change_[row]));
    }
  }

  GradCase c_;
  int64_t row_q_, row_k_, row_v_, rows_;
  int64_t size_[4];
  std::vector<T> q_, k_, v_, scaled_;
  Either<T> mask_;
  std::vector<float> change_, norm_, low_;
  std::vector<double> answers_, allowed_;
};

struct Counted {
  emu::Counts norm, grad;
};

template <class T, int kD, int kDv = kD, bool kSoftcap = false>
Counted prove(const char* name, const GradCase& c, bool all = false) {
  const GradProblem<T, kD, kDv, kSoftcap> problem(c);
  Counted counts;
  const std::vector<Options> schedules = all ? emu::all_schedules(3) : std::vector<Options>(1);
  for (const Options& options : schedules) {
    try {
      const Outcome norm = problem.run_norm(options), grad = problem.run(options);
      CHECK(norm.right, "%s: norm is wrong (%s)", name, options.name().c_str());
      CHECK(grad.right, "%s: wrong (%s)", name, options.name().c_str());
      counts = {norm.report.counts, grad.report.counts};
      CHECK(counts.norm.bank_conflicts + counts.grad.bank_conflicts == 0, "%s", name);
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  std::printf("%s: largest error %.2f of what is allowed\n", name, problem.worst);
  return counts;
}

void heads_and_types() {
  GradCase c{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 130};
  prove<bf16, 64>("bf16, 64", c, true);
  c.float_mask = true;
  prove<f16, 64>("f16, 64, float", c);
  c.batch = 1, c.heads_q = 2, c.heads_kv = 1;
  prove<bf16, 80>("bf16, 80, float", c);
  prove<f16, 96>("f16, 96, float", c);
  prove<bf16, 128>("bf16, 128, float", c, true);
  prove<f16, 192>("f16, 192, float", c);
  c.float_mask = false;
  prove<bf16, 192, 128>("bf16, 192 and 128", c);
  prove<bf16, 64, 128>("bf16, 64 and 128", c);
  prove<f16, 256>("f16, 256", c, true);
}

void tf32_numbers() {
  GradCase c{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 130, .scale = -0.1f};
  prove<tf32, 64>("tf32, 64", c, true);
  prove<tf32, 80>("tf32, 80", c);
  c.own_batch = false;
  prove<tf32, 128>("tf32, 128", c);
  c.hidden_nan = 20;
  prove<tf32, 192, 128>("tf32, 192 and 128, NaN", c);
  prove<tf32, 256>("tf32, 256, NaN", c, true);
  c.own_row = c.own_key = false, c.hidden_nan = -1;
  prove<tf32, 256>("tf32, 256, one number", c);
}

// Every dimension its own or broadcast.
void shapes() {
  for (int bits = 0; bits < 16; ++bits) {
    GradCase c{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 90};
    c.own_batch = bits & 1, c.own_head = bits & 2, c.own_row = bits & 4, c.own_key = bits & 8;
    c.float_mask = true;
    const std::string name = "shape " + std::to_string(bits);
    prove<bf16, 64>(name.c_str(), c);
    c.causal = true, c.left = 30, c.float_mask = false;
    prove<bf16, 64>((name + ", window").c_str(), c);
  }
  prove<bf16, 256>("rows only, 256", {.heads_q = 2, .seqlen_q = 70, .seqlen_k = 70, .own_key = false}, true);
  prove<bf16, 64>("one number", {.batch = 2, .own_batch = false, .own_row = false, .own_key = false}, true);
}

void positions() {
  const int lengths[][2] = {{1, 1}, {1, 200}, {129, 1}, {65, 7}, {3, 0}, {0, 3}, {100, 200}, {200, 100}};
  for (const auto& [sq, sk] : lengths)
    for (bool own_row : {false, true})
      for (bool bottom_right : {false, true}) {
        const std::string name = std::to_string(sq) + " rows, " + std::to_string(sk) + " keys" +
                                 (bottom_right ? ", bottom right" : "") + (own_row ? "" : ", of all rows");
        GradCase c{.heads_q = 2, .seqlen_q = sq, .seqlen_k = sk, .own_row = own_row, .bottom_right = bottom_right};
        c.float_mask = true;
        prove<bf16, 64>(name.c_str(), c);
        c.causal = true;
        prove<bf16, 64>((name + ", causal").c_str(), c);
        c.left = 40;
        prove<bf16, 64>((name + ", causal, window").c_str(), c);
        c.causal = false, c.left = 3, c.right = 90;
        prove<bf16, 64>((name + ", window").c_str(), c);
        c.left = 2000000000, c.right = 0;
        prove<bf16, 64>((name + ", wide window").c_str(), c);
      }
}

void scales_and_lifts() {
  GradCase c{.heads_q = 2, .seqlen_q = 70, .seqlen_k = 100, .float_mask = true};
  for (float scale : {0.0f, -0.125f, 1.0f, 1e-20f}) {
    c.scale = scale;
    prove<bf16, 64>(("scale " + std::to_string(scale)).c_str(), c);
  }
  c.scale = -0.06f;
  prove<f16, 256>("scale -0.06, 256", c);
  c.scale = 0.5f, c.softcap = 2.0f;
  prove<bf16, 64, 64, true>("softcap", c, true);
  c.scale = -0.5f, c.softcap = 50.0f;
  prove<f16, 128, 128, true>("softcap 50", c);
  c.scale = 0.125f, c.softcap = 0;
  for (float lift : {1e38f, -1e38f, -3.402823466e+38f}) {
    c.lift = lift;
    c.float_mask = true;
    prove<bf16, 64>(("lifted " + std::to_string(lift)).c_str(), c);
    c.float_mask = false;
    if (lift > -3e38f) prove<bf16, 64>(("lifted in bf16 " + std::to_string(lift)).c_str(), c);
  }
}

void hidden() {
  GradCase c{.heads_q = 2, .heads_kv = 1, .seqlen_q = 70, .seqlen_k = 100, .float_mask = true, .hidden_nan = 30};
  prove<bf16, 64>("NaN", c);
  prove<f16, 256>("NaN, 256", c);
  c.causal = true;
  prove<bf16, 64>("NaN, causal", c);
  c.own_head = false;
  prove<bf16, 64>("NaN, of all heads", c);
}

void count_bytes() {
  const uint64_t row = 64 * sizeof(bf16), f = sizeof(float);
  // Two heads, two tiles of rows and three of keys.
  GradCase c{.heads_q = 2, .heads_kv = 2, .seqlen_q = 128, .seqlen_k = 192, .float_mask = true};
  const Counted own = prove<bf16, 64>("counted", c);
  // Query once, keys once for each tile of rows; each score's part of the mask.
  CHECK(own.norm.global_read == 2 * (128 + 2 * 192) * row + 2 * 128 * 192 * f);
  CHECK(own.norm.global_written == 2 * 2 * 128 * f);
  CHECK(own.norm.flops == 2ull * 2 * 128 * 192 * 64);
  // Query and dO once for each tile of keys, keys and values once for each tile of rows; three numbers a row in each of
  // the four lanes that share it.
  const uint64_t tiles = 2 * 2 * 3 * (64 * 4 * row + 64 * 64 * f + 4 * 64 * 3 * f);
  CHECK(own.grad.global_read == tiles);
  CHECK(own.grad.global_written == 2 * 128 * 192 * f);
  CHECK(own.grad.flops == 4ull * 2 * 128 * 192 * 64);
  // Of what is broadcast nothing but the result's size is different.
  c.own_head = c.own_row = false, c.float_mask = false;
  const Counted shared = prove<bf16, 64>("counted, of all heads and rows", c);
  CHECK(shared.grad.global_read == tiles - 2 * 128 * 192 * (f - sizeof(bf16)));
  CHECK(shared.grad.global_written == 192 * sizeof(bf16));
  // Of 2 x 2 tiles a causal mask leaves 3.
  const Counted causal = prove<bf16, 64>("counted, causal", {.seqlen_q = 128, .seqlen_k = 128, .causal = true});
  CHECK(causal.grad.flops == 3 * 4ull * 64 * 64 * 64);
}

template <class T, int kD>
void flaws(const char* name, bool own_key) {
  const GradCase c{.heads_q = 2, .seqlen_q = 64, .seqlen_k = 2 * GatedSdpaNormTiles<T, kD>::kKeys, .own_head = false,
                   .own_row = own_key, .own_key = own_key, .float_mask = true};
  const GradProblem<T, kD, kD, false> problem(c);
  const std::string of_norm = std::string(name) + ", norm";
  if (own_key) every_flaw_is_seen(of_norm.c_str(), [&](const Options& options) { return problem.run_norm(options); });
  every_flaw_is_seen(name, [&](const Options& options) { return problem.run(options); });
}

}  // namespace

int main() {
  prove<bf16, 64>("one tile", {}, true);
  heads_and_types();
  tf32_numbers();
  shapes();
  positions();
  scales_and_lifts();
  hidden();
  count_bytes();
  flaws<bf16, 64>("of all heads", true);
  flaws<bf16, 64>("one number", false);
  flaws<f16, 256>("of all heads, 256", true);
  flaws<tf32, 256>("of all heads, two warps, tf32", true);
  return check::result("emu gated_sdpa_mask_grad");
}
