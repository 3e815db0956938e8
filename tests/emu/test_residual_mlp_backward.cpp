// The backward of residual MLPs on tensor cores, step by step against its definition in double, in which what products
// multiply is rounded as the kernel rounds it: every width, type and activation, groups, ragged rows, several tiles a
// block; in every schedule, with counts of bytes and FLOPs, and without each barrier, wait and commit.
#include <algorithm>

#include "../../csrc/cuda/residual_mlp_backward.cuh"
#include "../../csrc/cuda/residual_mlp_forward.cuh"
#include "residual_mlp_tensor.h"

using namespace nsk;
using namespace nsk::cuda;
using namespace nsk::test;

namespace {

struct Case {
  int64_t groups = 1, rows = 16;
  int depth = 2, per_block = 2;
  unsigned grid = 1;                                                              // blocks that share a group's tiles
  bool float_x = true, float_bias = true, float_gamma = true, float_beta = true;  // or T
  double eps = 0.05;  // large, so that it is missed where it is missing
  float bias = 0.5f;
  bool wants_weights = true, wants_vectors = true;
};

// Off what was expected, in units of the root mean square of what was expected.
struct Errors {
  double most = 0, squares = 0, expected_squares = 0, count = 0;

  void add(double got, double expected, double rounding) {
    const double error = std::max(std::fabs(got - expected) - rounding * std::fabs(expected), 0.0);
    most = error <= most ? most : error;  // NaN stays
    squares += error * error, expected_squares += expected * expected, ++count;
  }
  double unit() const { return std::sqrt(expected_squares / count); }
  double relative_most() const { return count > 0 ? most / unit() : 0; }
  double relative_mean() const { return count > 0 ? std::sqrt(squares / expected_squares) : 0; }
};

template <class T, int W, int R, Activation kActivation>
struct Problem {
  using Tile = MlpBackwardTile<T, W, R>;

  explicit Problem(const Case& of)
      : of(of), dy(of.groups, of.rows, W, of.float_x), weight(of.groups, of.depth, W * W, false),
        bias(of.groups, of.depth, W, of.float_bias), gamma(of.groups, of.depth, W, of.float_gamma),
        beta(of.groups, of.depth, W, of.float_beta) {
    dy.fill(1, 0, 1), weight.fill(2, 0, 1 / std::sqrt(float(W))), bias.fill(3, 0, of.bias);
    gamma.fill(4, 1, 0.3f), beta.fill(5, 0, 0.3f);
    // Any stream is a forward's, of one block; each block begins from its own.
    stream = normal(size_t(of.groups * blocks() * stream_stride()), 6);
    define();
  }

  int blocks() const { return of.depth / of.per_block; }
  int64_t tiles() const { return (of.rows + R - 1) / R; }
  int64_t stream_stride() const { return of.rows * W + 12; }
  int64_t operand_stride() const { return of.rows * W + 24; }
  size_t layer_at(int64_t group, int64_t layer) const { return size_t((group * of.depth + layer) * operand_stride()); }
  size_t partial_at(int64_t group, int64_t layer, int64_t row) const {
    return size_t(((group * of.depth + layer) * tiles() + row / R) * 3 * W);
  }

  static double rounded(double x) { return to_float(from_float<T>(float(x))); }
  double weight_at(int64_t group, int64_t layer, int i) const {  // half types are rounded in memory
    const double x = weight.at(group, layer, i);
    return std::is_same_v<T, tf32> ? rounded(x) : x;
  }

  void define() {
    inputs.assign(layer_at(of.groups, 0), 0), gradients = inputs;
    top_y.assign(size_t(of.groups * of.rows * W), 0);
    partial.assign(of.rows > 0 ? partial_at(of.groups, 0, 0) : 0, 0);
    dx.assign(size_t(of.groups * of.rows * W), 0);
    for (int64_t g = 0; g < of.groups; ++g)
      for (int64_t r = 0; r < of.rows; ++r) {
        double* const dh = dx.data() + (g * of.rows + r) * W;
        for (int c = 0; c < W; ++c) dh[c] = dy.at(g, r, c);
        for (int block = blocks() - 1; block >= 0; --block) define_block(g, r, block, dh);
      }
  }
  void define_block(int64_t g, int64_t r, int block, double* dh) {
    std::vector<double> t(W), z(W), u(W), da(dh, dh + W), xhat(size_t(of.per_block * W)), rstd(size_t(of.per_block));
    for (int c = 0; c < W; ++c) t[c] = stream[size_t((g * blocks() + block) * stream_stride() + r * W + c)];
    for (int i = 0; i < of.per_block; ++i) {
      const int l = block * of.per_block + i;
      double mean = 0, variance = 0;
      for (int c = 0; c < W; ++c) {
        inputs[layer_at(g, l) + r * W + c] = t[c];
        t[c] = rounded(t[c]);
      }
      for (int c = 0; c < W; ++c) {
        z[c] = bias.at(g, l, c);
        for (int k = 0; k < W; ++k) z[c] += t[k] * weight_at(g, l, c * W + k);
        mean += z[c] / W;
      }
      for (int c = 0; c < W; ++c) variance += (z[c] - mean) * (z[c] - mean) / W;
      rstd[i] = 1 / std::sqrt(variance + of.eps);
      for (int c = 0; c < W; ++c) {
        xhat[i * W + c] = (z[c] - mean) * rstd[i];
        const double y = xhat[i * W + c] * gamma.at(g, l, c) + beta.at(g, l, c);
        if (l + 1 == of.depth) top_y[size_t((g * of.rows + r) * W + c)] = y;
        t[c] = activated(kActivation, y);
      }
    }
    for (int i = of.per_block - 1; i >= 0; --i) {
      const int l = block * of.per_block + i;
      const double* const x = xhat.data() + i * W;
      double* const sums = partial.data() + partial_at(g, l, r);
      double mean_u = 0, mean_u_xhat = 0;
      for (int c = 0; c < W; ++c) {
        const double d = da[c] * slope(kActivation, x[c] * gamma.at(g, l, c) + beta.at(g, l, c));
        sums[W + c] += d * x[c], sums[2 * W + c] += d;
        u[c] = d * gamma.at(g, l, c);
        mean_u += u[c] / W, mean_u_xhat += u[c] * x[c] / W;
        da[c] = 0;
      }
      for (int c = 0; c < W; ++c) {
        const double dz = rstd[i] * (u[c] - mean_u - x[c] * mean_u_xhat), factor = rounded(dz);
        sums[c] += dz;
        gradients[layer_at(g, l) + r * W + c] = dz;
        for (int k = 0; k < W; ++k) da[k] += factor * weight_at(g, l, c * W + k);
      }
    }
    for (int c = 0; c < W; ++c) dh[c] += da[c];
  }

  template <class Network>
  void describe(Network& args, GlobalMemory& memory) const {
    args.rows = of.rows, args.depth = of.depth, args.layers_per_block = of.per_block, args.eps = float(of.eps);
    args.bias = in(memory, "bias", bias), args.ln_weight = in(memory, "gamma", gamma);
    args.ln_bias = in(memory, "beta", beta);
    args.weight = reinterpret_cast<const T*>(memory.input("weight", weight.bytes.data(), weight.bytes.size()));
    args.weight_group_stride = weight.outer_stride(), args.weight_stride = weight.stride;
  }
  static MlpTensor<const unsigned char> in(GlobalMemory& memory, const char* name, const Tensor<T>& t) {
    return t.template view<const unsigned char>(memory.input(name, t.bytes.data(), t.bytes.size()));
  }

  Outcome run(const Options& options) const {
    Tensor<T> got_dx(of.groups, of.rows, W, of.float_x);
    got_inputs.resize(inputs.size()), got_gradients.resize(inputs.size());
    std::vector<float> got_partial(partial.size());
    std::vector<float> parked(size_t(of.groups * of.grid * (of.per_block - 1) * Tile::kParked));
    GlobalMemory memory;
    MlpBackwardArgs<T> args{};
    describe(args, memory);
    args.dy = in(memory, "dy", dy);
    args.stream = memory.input("stream", stream.data(), stream.size());
    args.stream_group_stride = blocks() * stream_stride(), args.stream_block_stride = stream_stride();
    args.dx = got_dx.template view<unsigned char>(memory.output("dx", got_dx.bytes.data(), got_dx.bytes.size()));
    if (of.wants_weights) {
      args.inputs = memory.output("inputs", got_inputs.data(), got_inputs.size());
      args.gradients = memory.output("gradients", got_gradients.data(), got_gradients.size());
    }
    args.operand_group_stride = of.depth * operand_stride(), args.operand_layer_stride = operand_stride();
    if (of.wants_vectors) args.partial = memory.output("partial", got_partial.data(), got_partial.size());
    if (!parked.empty()) args.parked = memory.output("parked", parked.data(), parked.size());

    const Launch what{"residual_mlp_backward", {of.grid, unsigned(of.groups)}, {Tile::kThreads}, Tile::kSharedBytes};
    Outcome outcome{
        emu::launch(what, memory, options, [&] { residual_mlp_backward<T, W, R, kActivation>(args); }), true};

    // Layers in the middle see what all after them did; every one must be right.
    worst_most = worst_mean = 0;
    const auto judge = [&](const Errors& errors) {
      worst_most = errors.relative_most() <= worst_most ? worst_most : errors.relative_most();
      worst_mean = errors.relative_mean() <= worst_mean ? worst_mean : errors.relative_mean();
    };
    Errors of_dx;
    for (int64_t g = 0; g < of.groups; ++g) {
      for (int64_t r = 0; r < of.rows; ++r)
        for (int c = 0; c < W; ++c)
          of_dx.add(got_dx.at(g, r, c), dx[size_t((g * of.rows + r) * W + c)], of.float_x ? 0 : kRoundoff);
      for (int l = 0; l < of.depth && of.rows > 0; ++l) {
        Errors of_inputs, of_gradients, of_sums[3];
        for (int64_t i = 0; i < of.rows * W; ++i) {
          of_inputs.add(to_float(got_inputs[layer_at(g, l) + i]), inputs[layer_at(g, l) + i], kRoundoff);
          of_gradients.add(to_float(got_gradients[layer_at(g, l) + i]), gradients[layer_at(g, l) + i], kRoundoff);
        }
        if (of.wants_weights) judge(of_inputs), judge(of_gradients);
        for (int64_t row = 0; row < of.rows; row += R)
          for (int i = 0; i < 3 * W; ++i)
            of_sums[i / W].add(got_partial[partial_at(g, l, row) + i], partial[partial_at(g, l, row) + i], 0);
        for (const Errors& errors : of_sums)
          if (of.wants_vectors) judge(errors);
      }
    }
    judge(of_dx);
    outcome.right &= worst_most <= kMost && worst_mean <= kMean;

    // Nothing is written beside the rows, and the same bits come each time.
    outcome.right &= got_dx.kept_gaps();
    for (size_t i = 0; i < got_inputs.size(); ++i)
      if (of.wants_weights && int64_t(i) % operand_stride() >= of.rows * W)
        for (const T& x : {got_inputs[i], got_gradients[i]}) outcome.right &= x.bits == decltype(x.bits)(-1);
    std::vector<unsigned char> bytes = got_dx.bytes;
    const auto append = [&](const auto& values) {
      const auto* const first = reinterpret_cast<const unsigned char*>(values.data());
      bytes.insert(bytes.end(), first, first + values.size() * sizeof(values[0]));
    };
    if (of.wants_weights) append(got_inputs), append(got_gradients);
    if (of.wants_vectors) append(got_partial);
    if (result.empty()) result = bytes;
    outcome.right &= result == bytes;
    return outcome;
  }

  // Sums in float instead of double now and then turn a rounding the other way, by two roundoffs. That moves what
  // follows of the row, but few rows; more of them in f16, where roundings are nearer to each other.
  static constexpr double kRoundoff = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
  static constexpr double kMost = 8 * kRoundoff, kMean = kRoundoff / (std::is_same_v<T, bf16> ? 8 : 4);

  void check_counts(const emu::Counts& counts) const {
    const uint64_t all_tiles = of.groups * tiles(), layers = all_tiles * of.depth, rows = of.groups * of.rows;
    const uint64_t below = all_tiles * (of.depth - blocks());  // layers that have one of their block above them
    const uint64_t size_x = dy.element_bytes(), bias_size = bias.element_bytes();
    const uint64_t affine_size = gamma.element_bytes() + beta.element_bytes();
    const uint64_t copied = layers * (2 * sizeof(T) * W * W + (bias_size + affine_size) * W) + below * affine_size * W;
    const uint64_t parked = below * 4 * Tile::kParked;
    CHECK(counts.copies == copied / 16);
    CHECK(counts.global_read == copied + parked + rows * W * (size_x + 4 * blocks()));
    const uint64_t operands = of.wants_weights ? rows * W * 2 * sizeof(T) * of.depth : 0;
    const uint64_t shares = of.wants_vectors ? layers * 3 * W * 4 : 0;
    CHECK(counts.global_written == parked + rows * W * size_x + operands + shares);
    CHECK(counts.flops == 4 * layers * R * W * W);
    CHECK(counts.barriers == 4 * layers);
    CHECK(counts.warp_barriers == 2 * layers * 8 * Tile::kSteps);
    const uint64_t of_weights = W / 64 * (sizeof(T) == 2 ? 2 : 1);  // which does not transpose 32 bits
    CHECK(counts.ldmatrix == layers * 8 * Tile::kSteps * (of_weights + 2 * 2 * (R / 16)));
    CHECK(counts.bank_conflicts == 0, "%llu", static_cast<unsigned long long>(counts.bank_conflicts));
  }

  Case of;
  Tensor<T> dy, weight, bias, gamma, beta;
  std::vector<float> stream;
  std::vector<double> inputs, gradients, partial, dx;  // what is expected, before the rounding of results
  std::vector<double> top_y;                           // what the last layer's activation is of
  mutable std::vector<T> got_inputs, got_gradients;    // of the last run
  mutable std::vector<unsigned char> result;           // of the first run: all give the same bits
  mutable double worst_most = 0, worst_mean = 0;       // of the last run
};

template <class T, int W, int R, Activation kActivation>
void prove(const char* name, const Case& of) {
  const Problem<T, W, R, kActivation> problem(of);
  for (const Options& options : emu::all_schedules(3)) {
    try {
      const Outcome outcome = problem.run(options);
      CHECK(outcome.right, "%s: off by %g, %g (%s)", name, problem.worst_most, problem.worst_mean,
            options.name().c_str());
      problem.check_counts(outcome.report.counts);
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  std::printf("%s, %d rows, depth %d: off by %.1e at most (%.1e allowed), %.1e in the mean square (%.1e allowed)\n",
              name, int(of.rows), of.depth, problem.worst_most, problem.kMost, problem.worst_mean, problem.kMean);
}

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
                                     .float_beta = false});
}

// The activations that are computed again have the bits of the forward's. What comes out of one block of layers is
// h + t: that is t where h is very small, and still counts where the first layer's weights are as large.
void prove_same_bits() {
  constexpr int W = 128, R = 16;
  constexpr float kLarge = 0x1p100f;
  Problem<bf16, W, R, Activation::silu> problem({.rows = 21, .depth = 4, .per_block = 4});
  for (float& x : problem.stream) x /= kLarge;
  for (int i = 0; i < W * W; ++i) {
    const bf16 w = from_float<bf16>(float(problem.weight.at(0, 0, i)) * kLarge);
    std::memcpy(problem.weight.bytes.data() + problem.weight.index(0, 0, i) * sizeof(w), &w, sizeof(w));
  }
  problem.run({});
  for (int depth = 1; depth < 4; ++depth) {
    Tensor<bf16> y(1, problem.of.rows, W, true);
    GlobalMemory memory;
    MlpForwardArgs<bf16> args{};
    problem.describe(args, memory);
    args.depth = args.layers_per_block = depth;
    const float* const x = memory.input("x", problem.stream.data(), problem.stream.size());
    args.x = {reinterpret_cast<const unsigned char*>(x), 0, W, true};
    args.y = y.view<unsigned char>(memory.output("y", y.bytes.data(), y.bytes.size()));
    must_pass("forward", memory, {"residual_mlp_forward", {}, {256}, MlpTile<bf16, W, R>::kSharedBytes},
              [&] { residual_mlp_forward<bf16, W, R, Activation::silu>(args); });
    int different = 0;
    for (int64_t i = 0; i < problem.of.rows * W; ++i)
      different += from_float<bf16>(float(y.at(0, i / W, i % W))).bits !=
                   problem.got_inputs[problem.layer_at(0, depth) + size_t(i)].bits;
    CHECK(different == 0, "layer %d: %d inputs are not the forward's", depth, different);
  }
}

// Where relu is 0, so is its gradient, whatever comes from above.
void prove_selection() {
  Problem<bf16, 64, 16, Activation::relu> problem({.depth = 1, .per_block = 1});
  problem.run({});
  const std::vector<bf16> expected = problem.got_gradients;
  for (int i = 0; i < 16 * 64; ++i)
    if (problem.top_y[size_t(i)] < 0) {
      const float nan = NAN;
      std::memcpy(problem.dy.bytes.data() + problem.dy.index(0, i / 64, i % 64) * sizeof(nan), &nan, sizeof(nan));
    }
  problem.run({});
  int different = 0;
  for (size_t i = 0; i < expected.size(); ++i) different += expected[i].bits != problem.got_gradients[i].bits;
  CHECK(different == 0, "NaN where relu is 0: %d gradients are others", different);
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
  prove_all<f16, 256, 32, silu>("f16 256, tiles of 32, silu");

  prove_all<tf32, 64, 16, silu>("tf32 64, tiles of 16, silu");
  prove<tf32, 128, 32, gelu_tanh>("tf32 128, tiles of 32, gelu", {.rows = 40, .depth = 3, .per_block = 3});
  prove<tf32, 256, 16, relu>("tf32 256, tiles of 16, relu", {.groups = 2, .rows = 20});

  // Deep, with several tiles for a block of threads: rings and vectors go round many times, and on to the next tile.
  prove<bf16, 64, 16, silu>("bf16 64, deep", {.rows = 40, .depth = 9, .per_block = 3});
  prove<f16, 128, 32, silu>("f16 128, deep", {.groups = 2, .rows = 90, .depth = 5, .per_block = 1, .grid = 2});
  prove<bf16, 256, 16, relu>("bf16 256, deep", {.rows = 40, .depth = 6, .per_block = 3, .grid = 2});
  prove<bf16, 64, 16, silu>("input only", {.rows = 20, .wants_weights = false, .wants_vectors = false});
  prove<bf16, 64, 16, silu>("no weights", {.rows = 20, .wants_weights = false});
  prove<bf16, 64, 16, silu>("no vectors", {.rows = 20, .wants_vectors = false});
  // Rows past the last one have no deviation: what they have is NaN.
  prove<bf16, 64, 16, silu>("no eps", {.rows = 20, .eps = 0, .bias = 0});
  prove<bf16, 64, 16, silu>("no layers", {.rows = 20, .depth = 0, .per_block = 1});
  prove<bf16, 64, 16, silu>("no rows", {.rows = 0, .depth = 2, .per_block = 1});
  prove_same_bits();
  prove_selection();

  every_flaw_is_seen("64", [problem = Problem<bf16, 64, 16, silu>({.rows = 20, .depth = 2})](
                               const Options& options) { return problem.run(options); });
  every_flaw_is_seen("128", [problem = Problem<f16, 128, 32, silu>({.rows = 40, .depth = 2, .per_block = 1})](
                                const Options& options) { return problem.run(options); });
  every_flaw_is_seen("256", [problem = Problem<bf16, 256, 16, relu>({.rows = 20, .depth = 2})](
                                const Options& options) { return problem.run(options); });
  every_flaw_is_seen("tf32", [problem = Problem<tf32, 64, 16, silu>({.rows = 20, .depth = 2})](
                                 const Options& options) { return problem.run(options); });
  return check::result("emu residual mlp backward");
}
