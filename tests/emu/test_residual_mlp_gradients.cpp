// Gradients of residual MLPs' weights and vectors against sums in double: widths, types, groups, layers, ragged rows;
// in every schedule, with counts of bytes and FLOPs, and without each barrier, wait and commit.
#include <algorithm>

#include "../../csrc/cuda/residual_mlp_vector_gradient.cuh"
#include "../../csrc/cuda/residual_mlp_weight_gradient.cuh"
#include "residual_mlp_tensor.h"

using namespace nsk;
using namespace nsk::cuda;
using namespace nsk::test;

namespace {

template <class T>
constexpr double kRoundoff = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;

// How far a sum of products of about 1 is off, in T or in float, in parts of what is allowed: as many roundings as
// products, of sums up to 4 sqrt(count), which mostly cancel: they grow as the root of their number.
template <class T>
double off(double got, double expected, int64_t count, bool is_float) {
  const double allowed = 2.5e-7 * double(count + 20) + (is_float ? 0 : kRoundoff<T> * std::fabs(expected));
  return std::fabs(got - expected) / allowed;
}

template <class T, int W>
struct WeightGradient {
  using Tile = MlpWeightGradientTile<T>;

  WeightGradient(int64_t groups, int64_t layers, int64_t rows, bool is_float)
      : groups(groups), layers(layers), rows(rows), is_float(is_float), layer_stride(rows * W + 8) {
    for (auto* operand : {&inputs, &gradients}) {
      const std::vector<float> values = normal(size_t(groups * layers * layer_stride), operand == &inputs ? 1 : 2);
      for (const float x : values) operand->push_back(from_float<T>(x));
    }
    for (int64_t l = 0; l < groups * layers; ++l) {
      std::vector<double> sums(W * W);
      for (int64_t r = 0; r < rows; ++r)
        for (int o = 0; o < W; ++o)
          for (int i = 0; i < W; ++i)
            sums[size_t(o * W + i)] += double(to_float(gradients[size_t(l * layer_stride + r * W + o)])) *
                                       to_float(inputs[size_t(l * layer_stride + r * W + i)]);
      expected.insert(expected.end(), sums.begin(), sums.end());
    }
  }

  Outcome run(const Options& options) const {
    Tensor<T> dweight(groups, layers, W * W, is_float);
    GlobalMemory memory;
    MlpWeightGradientArgs<T> args{};
    args.rows = rows;
    args.inputs = memory.input("inputs", inputs.data(), inputs.size());
    args.gradients = memory.input("gradients", gradients.data(), gradients.size());
    args.operand_group_stride = layers * layer_stride, args.operand_layer_stride = layer_stride;
    args.dweight =
        dweight.template view<unsigned char>(memory.output("dweight", dweight.bytes.data(), dweight.bytes.size()));
    const unsigned places = W / Tile::kSide * W / Tile::kSide;
    const Launch what{"residual_mlp_weight_gradient", {places, unsigned(layers), unsigned(groups)}, {Tile::kThreads},
                      Tile::kSharedBytes};
    Outcome outcome{emu::launch(what, memory, options, [&] { residual_mlp_weight_gradient<T, W>(args); }), true};
    worst = 0;
    for (int64_t l = 0; l < groups * layers; ++l)
      for (int i = 0; i < W * W; ++i) {
        const double one =
            off<T>(dweight.at(l / layers, l % layers, i), expected[size_t(l * W * W + i)], rows, is_float);
        worst = one <= worst ? worst : one;  // NaN stays
      }
    outcome.right &= worst <= 1;
    outcome.right &= dweight.kept_gaps();
    if (result.empty()) result = dweight.bytes;
    outcome.right &= result == dweight.bytes;
    return outcome;
  }

  void check_counts(const emu::Counts& counts) const {
    const uint64_t all = groups * layers, steps = (rows + Tile::kDepth - 1) / Tile::kDepth;
    const uint64_t blocks = all * (W / Tile::kSide) * (W / Tile::kSide);
    CHECK(counts.global_read == blocks * rows * 2 * Tile::kRowBytes);
    CHECK(counts.global_written == all * W * W * (is_float ? 4 : sizeof(T)));
    CHECK(counts.flops == 2 * all * steps * Tile::kDepth * W * W);
    CHECK(counts.barriers == blocks * steps);
    CHECK(counts.bank_conflicts == 0, "%llu", static_cast<unsigned long long>(counts.bank_conflicts));
  }

  int64_t groups, layers, rows;
  bool is_float;
  int64_t layer_stride;
  std::vector<T> inputs, gradients;
  std::vector<double> expected;
  mutable double worst = 0;                   // of the last run
  mutable std::vector<unsigned char> result;  // of the first run: all give the same bits
};

template <class T, int W>
struct VectorGradient {
  VectorGradient(int64_t groups, int64_t layers, int64_t tiles, bool is_float)
      : groups(groups), layers(layers), tiles(tiles), is_float(is_float),
        partial(normal(size_t(groups * layers * tiles * 3 * W), 1)) {}

  Outcome run(const Options& options) const {
    Tensor<T> results[3] = {
        {groups, layers, W, is_float}, {groups, layers, W, !is_float}, {groups, layers, W, is_float, 10}};
    GlobalMemory memory;
    MlpVectorGradientArgs args{};
    args.tiles = tiles;
    if (!partial.empty()) args.partial = memory.input("partial", partial.data(), partial.size());
    MlpTensor<unsigned char>* const tensors[3] = {&args.dbias, &args.dgamma, &args.dbeta};
    for (int v = 0; v < 3; ++v)
      *tensors[v] = results[v].template view<unsigned char>(
          memory.output("vector", results[v].bytes.data(), results[v].bytes.size()));
    const Launch what{"residual_mlp_vector_gradient", {3, unsigned(layers), unsigned(groups)}, {W / 2}};
    Outcome outcome{emu::launch(what, memory, options, [&] { residual_mlp_vector_gradient<T, W>(args); }), true};
    for (int v = 0; v < 3; ++v) {
      for (int64_t l = 0; l < groups * layers; ++l)
        for (int c = 0; c < W; ++c) {
          float sum = 0;  // the same additions in the same order
          for (int64_t i = 0; i < tiles; ++i) sum += partial[size_t(((l * tiles + i) * 3 + v) * W + c)];
          const float expected = results[v].is_float ? sum : to_float(from_float<T>(sum));
          outcome.right &= results[v].at(l / layers, l % layers, c) == expected;
        }
      outcome.right &= results[v].kept_gaps();
    }
    return outcome;
  }

  void check_counts(const emu::Counts& counts) const {
    const uint64_t elements = groups * layers * W;
    CHECK(counts.global_read == 4 * 3 * elements * tiles);
    CHECK(counts.global_written == elements * (is_float ? 4 + 2 + 4 : 2 + 4 + 2));
  }

  static constexpr double worst = 0;  // to the bit
  int64_t groups, layers, tiles;
  bool is_float;
  std::vector<float> partial;
};

template <class Problem>
void prove(const char* name, const Problem& problem) {
  for (const Options& options : emu::all_schedules(3)) {
    try {
      const Outcome outcome = problem.run(options);
      CHECK(outcome.right, "%s: off by %g of what is allowed (%s)", name, problem.worst, options.name().c_str());
      problem.check_counts(outcome.report.counts);
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  std::printf("%s: off by %.2f of what is allowed\n", name, problem.worst);
}

void prove_banks() {
  const auto transposed = [](const char* name, const auto& at) {  // Transposed<tf32>::load
    for (int row = 0; row < 16; row += 4)
      different_banks(name, 32, 1, [&](int lane) { return at(row + lane % 4, lane / 16) + lane / 4 % 4 * 4; });
  };
  transposed("gradients' operands", [](int row, int piece) { return MlpWeightGradientTile<tf32>::at(row, piece); });
  transposed("weights, 256 wide", [](int row, int piece) { return swizzled<8, 2>(row, piece); });
  transposed("weights, 128 wide", [](int row, int piece) { return swizzled<4, 2>(row, piece); });
  transposed("weights, 64 wide", [](int row, int piece) { return swizzled<2, 2>(row, piece); });
  different_banks("activations are put", 16, 2, [](int lane) {
    return lane / 4 * 256 + (lane % 4 / 2 ^ permutation<tf32>(lane / 4)) * 16 + lane % 2 * 8;
  });
}

}  // namespace

int main() {
  prove("weights, bf16 64", WeightGradient<bf16, 64>(1, 1, 32, true));
  prove("weights, bf16 64, groups", WeightGradient<bf16, 64>(2, 3, 77, false));
  prove("weights, f16 64, many rows", WeightGradient<f16, 64>(1, 1, 333, true));
  prove("weights, f16 128", WeightGradient<f16, 128>(2, 1, 150, false));
  prove("weights, bf16 256", WeightGradient<bf16, 256>(1, 1, 35, true));
  prove("weights, one row", WeightGradient<bf16, 64>(1, 2, 1, true));
  prove("weights, no rows", WeightGradient<bf16, 64>(1, 2, 0, true));
  prove("weights, tf32 64, groups", WeightGradient<tf32, 64>(2, 3, 77, true));
  prove("weights, tf32 128", WeightGradient<tf32, 128>(1, 1, 150, true));
  prove("vectors, bf16 64", VectorGradient<bf16, 64>(1, 1, 1, true));
  prove("vectors, f16 128", VectorGradient<f16, 128>(2, 3, 9, false));
  prove("vectors, bf16 256", VectorGradient<bf16, 256>(1, 2, 20, true));
  prove("vectors, no tiles", VectorGradient<bf16, 64>(1, 2, 0, true));
  every_flaw_is_seen("weights", [problem = WeightGradient<bf16, 64>(1, 1, 200, true)](const Options& options) {
    return problem.run(options);
  });
  every_flaw_is_seen("weights, tf32", [problem = WeightGradient<tf32, 64>(1, 1, 100, true)](const Options& options) {
    return problem.run(options);
  });
  prove_banks();
  return check::result("emu residual mlp gradients");
}
