// Residual MLPs on tensor cores against their definition in double, in which the layers' inputs are rounded as the
// kernel rounds them: every width, type and activation, groups, ragged rows, several tiles a block; in every schedule,
// with counts of bytes and FLOPs, and without each barrier, wait and commit.
#include <algorithm>
#include <cmath>

#include "../../csrc/cuda/residual_mlp_forward.cuh"
#include "residual_mlp_tensor.h"

using namespace nsk;
using namespace nsk::cuda;
using namespace nsk::test;

namespace {

struct Case {
  int64_t groups = 1, rows = 16;
  int depth = 2, per_block = 2;
  unsigned grid = 1;                                                          // blocks that share a group's tiles
  bool float_x = true, float_bias = true, float_gamma = true, float_beta = true;  // or T
  bool keeps_stream = true;
  float mean_bias = 0;
};

template <class T, int W, int R, Activation kActivation>
struct Problem {
  using Tile = MlpTile<T, W, R>;
  static constexpr double kEps = 0.05;  // large, so that it is missed where it is missing

  explicit Problem(const Case& of)
      : of(of), x(of.groups, of.rows, W, of.float_x), weight(of.groups, of.depth, W * W, false),
        bias(of.groups, of.depth, W, of.float_bias), gamma(of.groups, of.depth, W, of.float_gamma),
        beta(of.groups, of.depth, W, of.float_beta) {
    x.fill(1, 0, 1), weight.fill(2, 0, 1 / std::sqrt(float(W))), bias.fill(3, of.mean_bias, 0.5f);
    gamma.fill(4, 1, 0.3f), beta.fill(5, 0, 0.3f);
    exact = define(false), expected = define(true);
  }

  int blocks() const { return of.depth / of.per_block; }
  size_t at(int64_t group, int64_t block, int64_t row, int c) const {
    return size_t(((group * (blocks() + 1) + block) * of.rows + row) * W + c);
  }

  double weight_at(int64_t g, int64_t l, int i, bool rounds) const {
    const double x = weight.at(g, l, i);
    return std::is_same_v<T, tf32> && rounds ? to_float(from_float<T>(x)) : x;
  }

  // The stream before each block and after the last one.
  std::vector<double> define(bool rounds) const {
    std::vector<double> stream(at(of.groups, 0, 0, 0)), h(W), t(W), z(W);
    for (int64_t g = 0; g < of.groups; ++g)
      for (int64_t r = 0; r < of.rows; ++r) {
        for (int c = 0; c < W; ++c) h[c] = x.at(g, r, c);
        for (int l = 0; l < of.depth; ++l) {
          if (l % of.per_block == 0)
            for (int c = 0; c < W; ++c) stream[at(g, l / of.per_block, r, c)] = t[c] = h[c];
          if (rounds)
            for (double& v : t) v = to_float(from_float<T>(v));
          double mean = 0, variance = 0;
          for (int c = 0; c < W; ++c) {
            z[c] = bias.at(g, l, c);
            for (int i = 0; i < W; ++i) z[c] += t[i] * weight_at(g, l, c * W + i, rounds);
            mean += z[c] / W;
          }
          for (int c = 0; c < W; ++c) variance += (z[c] - mean) * (z[c] - mean) / W;
          for (int c = 0; c < W; ++c)
            t[c] = activated(kActivation,
                             (z[c] - mean) / std::sqrt(variance + kEps) * gamma.at(g, l, c) + beta.at(g, l, c));
          if ((l + 1) % of.per_block == 0)
            for (int c = 0; c < W; ++c) h[c] += t[c];
        }
        for (int c = 0; c < W; ++c) stream[at(g, blocks(), r, c)] = h[c];
      }
    return stream;
  }

  Outcome run(const Options& options) const {
    Tensor<T> y(of.groups, of.rows, W, of.float_x);
    const int64_t padded = (of.rows + 15) / 16 * 16 * W;
    std::vector<float> stream(size_t(of.keeps_stream ? of.groups * blocks() * padded : 0));
    GlobalMemory memory;
    MlpForwardArgs<T> args{};
    args.rows = of.rows, args.depth = of.depth, args.layers_per_block = of.per_block, args.eps = float(kEps);
    const auto in = [&](const char* name, const Tensor<T>& t) {
      return t.template view<const unsigned char>(memory.input(name, t.bytes.data(), t.bytes.size()));
    };
    args.x = in("x", x), args.bias = in("bias", bias), args.ln_weight = in("gamma", gamma);
    args.ln_bias = in("beta", beta);
    args.weight = reinterpret_cast<const T*>(memory.input("weight", weight.bytes.data(), weight.bytes.size()));
    args.weight_group_stride = weight.outer_stride(), args.weight_stride = weight.stride;
    args.y = y.template view<unsigned char>(memory.output("y", y.bytes.data(), y.bytes.size()));
    if (of.keeps_stream) args.stream = memory.output("stream", stream.data(), stream.size());
    args.stream_group_stride = blocks() * padded, args.stream_block_stride = padded;

    const Launch what{"residual_mlp_forward", {of.grid, unsigned(of.groups)}, {Tile::kThreads}, Tile::kSharedBytes};
    Outcome outcome{
        emu::launch(what, memory, options, [&] { residual_mlp_forward<T, W, R, kActivation>(args); }), true};

    errors = all_errors = {};
    const double rounding = of.float_x ? 0 : kRoundoff;
    for (int64_t g = 0; g < of.groups; ++g)
      for (int64_t r = 0; r < of.rows; ++r)
        for (int c = 0; c < W; ++c) {
          errors.add(y.at(g, r, c), expected[at(g, blocks(), r, c)], rounding);
          all_errors.add(y.at(g, r, c), exact[at(g, blocks(), r, c)], rounding);
          for (int b = 0; of.keeps_stream && b < blocks(); ++b)
            errors.add(stream[size_t((g * blocks() + b) * padded + r * W + c)], expected[at(g, b, r, c)], 0);
        }
    outcome.right &= errors.most <= kMost && errors.mean() <= kMean && all_errors.mean() <= kRoundoff;
    if (result.empty()) result = y.bytes;
    outcome.right &= result == y.bytes;
    // Nothing is written beside the rows.
    outcome.right &= y.kept_gaps();
    for (size_t i = 0; i < stream.size(); ++i)
      outcome.right &= std::isnan(stream[i]) == (int64_t(i) % padded >= of.rows * W);
    return outcome;
  }

  // Sums in float instead of double now and then turn the rounding of a layer's input the other way, by two roundoffs.
  // That moves what follows of the row, but few rows.
  static constexpr double kRoundoff = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
  static constexpr double kMost = 4 * kRoundoff, kMean = kRoundoff / 8;
  struct Errors {
    double most = 0, squares = 0, count = 0;

    double mean() const { return count > 0 ? std::sqrt(squares / count) : 0; }
    void add(double got, double expected, double rounding) {
      const double error = std::max(std::fabs(got - expected) - rounding * std::fabs(expected), 0.0);
      most = error <= most ? most : error;  // NaN stays
      squares += error * error, ++count;
    }
  };

  void check_counts(const emu::Counts& counts) const {
    const uint64_t tiles = of.groups * ((of.rows + R - 1) / R), layers = tiles * of.depth;
    const uint64_t size_x = x.element_bytes(), rows = of.groups * of.rows;
    const uint64_t vectors = bias.element_bytes() + gamma.element_bytes() + beta.element_bytes();
    const uint64_t of_layer = sizeof(T) * W * W + vectors * W;
    CHECK(counts.global_read == layers * of_layer + rows * W * size_x);
    CHECK(counts.global_written == rows * W * (size_x + (of.keeps_stream ? 4 * blocks() : 0)));
    CHECK(counts.copies == layers * of_layer / 16);
    CHECK(counts.flops == 2 * layers * R * W * W);
    CHECK(counts.barriers == 2 * layers);
    CHECK(counts.warp_barriers == layers * 8 * Tile::kSteps);
    CHECK(counts.ldmatrix == layers * 8 * Tile::kSteps * (W / 64 + 2 * (R / 16)));
    CHECK(counts.bank_conflicts == 0, "%llu", static_cast<unsigned long long>(counts.bank_conflicts));
  }

  Case of;
  Tensor<T> x, weight, bias, gamma, beta;
  std::vector<double> exact, expected;  // without rounding of what layers multiply, and with it
  mutable std::vector<unsigned char> result;  // of the first run: all give the same bits
  mutable Errors errors, all_errors;    // of the last run: off what was expected, and of y off what is exact
};

template <class T, int W, int R, Activation kActivation>
void prove(const char* name, const Case& of) {
  const Problem<T, W, R, kActivation> problem(of);
  for (const Options& options : emu::all_schedules(3)) {
    try {
      const Outcome outcome = problem.run(options);
      CHECK(outcome.right, "%s: off by %g, %g (%s)", name, problem.errors.most, problem.errors.mean(),
            options.name().c_str());
      problem.check_counts(outcome.report.counts);
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  std::printf("%s, %d rows, depth %d: off by %.1e at most (%.1e allowed), %.1e in the mean square (%.1e allowed); "
              "without the rounding %.1e\n",
              name, int(of.rows), of.depth, problem.errors.most, problem.kMost, problem.errors.mean(), problem.kMean,
              problem.all_errors.mean());
}

// One case for each way to leave a tile, a block or a type, all of several blocks of layers.
template <class T, int W, int R, Activation kActivation>
void prove_all(const char* name) {
  // Two blocks of layers; one row; a tile and a bit, two groups, with all in T.
  prove<T, W, R, kActivation>(name, {.rows = R, .depth = 4, .per_block = 2});
  prove<T, W, R, kActivation>(name, {.rows = 1, .depth = 3, .per_block = 1, .float_bias = false});
  prove<T, W, R, kActivation>(name, {.groups = 2,
                                     .rows = R + 5,
                                     .depth = 3,
                                     .per_block = 3,
                                     .grid = 2,
                                     .float_x = false,
                                     .float_bias = false,
                                     .float_gamma = false,
                                     .float_beta = false,
                                     .keeps_stream = false});
}

}  // namespace

int main() {
  using enum Activation;
  prove_all<bf16, 64, 16, silu>("bf16 64, tiles of 16, silu");
  prove_all<bf16, 64, 32, relu>("bf16 64, tiles of 32, relu");
  prove_all<f16, 64, 16, gelu_tanh>("f16 64, tiles of 16, gelu");
  prove_all<bf16, 128, 16, gelu_tanh>("bf16 128, tiles of 16, gelu");
  prove_all<f16, 128, 32, silu>("f16 128, tiles of 32, silu");
  prove_all<bf16, 256, 16, relu>("bf16 256, tiles of 16, relu");
  prove_all<bf16, 256, 32, silu>("bf16 256, tiles of 32, silu");
  prove_all<f16, 256, 32, gelu_tanh>("f16 256, tiles of 32, gelu");

  prove_all<tf32, 64, 16, silu>("tf32 64, tiles of 16, silu");
  prove<tf32, 128, 32, gelu_tanh>("tf32 128, tiles of 32, gelu", {.rows = 40, .depth = 3, .per_block = 3});
  prove<tf32, 256, 16, silu>("tf32 256, tiles of 16, silu", {.groups = 2, .rows = 20});

  // Deep, with several tiles for a block of threads: rings and vectors go round many times, and on to the next tile.
  prove<bf16, 64, 16, silu>("bf16 64, deep", {.rows = 40, .depth = 9, .per_block = 3});
  prove<f16, 128, 16, silu>("f16 128, deep", {.groups = 2, .rows = 90, .depth = 5, .per_block = 1, .grid = 4});
  prove<bf16, 256, 16, silu>("bf16 256, deep", {.rows = 40, .depth = 5, .per_block = 5, .grid = 2});
  prove<bf16, 256, 32, silu>("bf16 256, far from 0", {.rows = 32, .mean_bias = 100});
  prove<bf16, 64, 16, silu>("no layers", {.rows = 20, .depth = 0, .per_block = 1});
  prove<bf16, 64, 16, silu>("no rows", {.rows = 0, .depth = 2, .per_block = 1});

  every_flaw_is_seen("64", [problem = Problem<bf16, 64, 16, silu>({.rows = 40, .depth = 3, .per_block = 1})](
                               const Options& options) { return problem.run(options); });
  every_flaw_is_seen("128", [problem = Problem<f16, 128, 32, gelu_tanh>({.rows = 40, .depth = 2})](
                                const Options& options) { return problem.run(options); });
  every_flaw_is_seen("256", [problem = Problem<bf16, 256, 16, relu>({.rows = 20, .depth = 2})](
                                const Options& options) { return problem.run(options); });
  every_flaw_is_seen("tf32", [problem = Problem<tf32, 64, 16, silu>({.rows = 20, .depth = 2})](
                                 const Options& options) { return problem.run(options); });
  return check::result("emu residual mlp");
}
