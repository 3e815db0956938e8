// The tiled matrix product on tensor cores against its definition in double: every type, ragged shapes, every schedule,
// with counts of bytes and FLOPs, and without each of its barriers, waits and commits.
#include <chrono>
#include <cmath>

#include "gemm.cuh"
#include "harness.h"

using namespace nsk;
using namespace nsk::test;

namespace {

double value(float x) { return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x) & 0xffffe000u); }
double value(bf16 x) { return to_float(x); }
double value(f16 x) { return to_float(x); }

template <class T, bool kTransposed>
struct Problem {
  using E = typename GemmTraits<T>::Element;

  Problem(int m, int n, int k, uint64_t seed) {
    // Rows start at multiples of 16 bytes, and one piece further apart than they need to be.
    auto stride = [](int columns) { return (columns * int(sizeof(E)) + 31) / 16 * 16 / int(sizeof(E)); };
    shape = {m, n, k, stride(k), stride(kTransposed ? n : k), n + 3};
    fill(a, m * shape.stride_a, seed), fill(b, (kTransposed ? k : n) * shape.stride_b, seed + 1);
    exact.resize(size_t(m) * n), terms.resize(exact.size());
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j)
        for (int x = 0; x < k; ++x) {
          const double product = value(a[i * shape.stride_a + x]) *
                                 value(kTransposed ? b[x * shape.stride_b + j] : b[j * shape.stride_b + x]);
          exact[i * n + j] += product, terms[i * n + j] += std::fabs(product);
        }
  }

  static void fill(std::vector<E>& values, size_t count, uint64_t seed) {
    for (float x : normal(count, seed)) values.push_back(from_float<E>(x));
  }

  Outcome run(const Options& options) const {
    std::vector<float> c(size_t(shape.m) * shape.stride_c);
    GlobalMemory memory;
    const E* a_in = memory.input("a", a.data(), a.size());
    const E* b_in = memory.input("b", b.data(), b.size());
    float* c_out = memory.output("c", c.data(), c.size());
    const Launch what{"gemm",
                      {unsigned(shape.n + kGemmTile - 1) / kGemmTile, unsigned(shape.m + kGemmTile - 1) / kGemmTile},
                      {kGemmThreads},
                      kGemmSharedBytes};
    Outcome outcome{emu::launch(what, memory, options, [&] { gemm<T, kTransposed>(shape, a_in, b_in, c_out); }), true};
    for (int i = 0; i < shape.m; ++i)
      for (int j = 0; j < shape.stride_c; ++j) {
        const float got = c[i * shape.stride_c + j];
        if (j >= shape.n)
          outcome.right &= std::isnan(got);  // nothing is written beside the matrix
        else
          outcome.right &=
              std::fabs(got - exact[i * shape.n + j]) <= 0x1p-22 * shape.k * terms[i * shape.n + j] + 1e-37;
      }
    return outcome;
  }

  void check_counts(const emu::Counts& counts) const {
    const uint64_t tiles_m = (shape.m + kGemmTile - 1) / kGemmTile, tiles_n = (shape.n + kGemmTile - 1) / kGemmTile;
    const uint64_t depth = kGemmRow / sizeof(E), stages = (shape.k + depth - 1) / depth;
    CHECK(counts.global_read == sizeof(E) * shape.k * (shape.m * tiles_n + shape.n * tiles_m));
    CHECK(counts.global_written == sizeof(float) * shape.m * shape.n);
    CHECK(counts.flops == 2 * tiles_m * tiles_n * kGemmTile * kGemmTile * stages * depth);
    CHECK(counts.copies == tiles_m * tiles_n * stages * 2 * kGemmThreads);
    CHECK(counts.barriers == tiles_m * tiles_n * stages * 2);
    CHECK(counts.ldmatrix == tiles_m * tiles_n * stages * 8 * 2 * 3);
    CHECK(counts.bank_conflicts == 0, "%llu", static_cast<unsigned long long>(counts.bank_conflicts));
  }

  GemmShape shape;
  std::vector<E> a, b;
  std::vector<double> exact, terms;
};

template <class T, bool kTransposed>
void prove(const char* name) {
  const int shapes[][3] = {{64, 64, 96}, {1, 1, 1}, {70, 65, 41}, {17, 130, 200}, {3, 5, 0}};
  for (const auto& [m, n, k] : shapes) {
    const Problem<T, kTransposed> problem(m, n, k, 5);
    for (const Options& options : emu::all_schedules(3)) {
      try {
        const Outcome outcome = problem.run(options);
        CHECK(outcome.right, "%s %d %d %d: wrong (%s)", name, m, n, k, options.name().c_str());
        problem.check_counts(outcome.report.counts);
      } catch (const Error& e) {
        CHECK(false, "%s %d %d %d (%s): %s", name, m, n, k, options.name().c_str(), e.what());
      }
    }
  }
  const Problem<T, kTransposed> problem(64, 64, 96, 5);
  every_flaw_is_seen(name, [&](const Options& options) { return problem.run(options); });
}

void measure() {
  const Problem<bf16, false> problem(128, 128, 256, 5);
  for (bool races : {false, true}) {
    Options options;
    options.races = races;
    const auto start = std::chrono::steady_clock::now();
    const Outcome outcome = problem.run(options);
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    std::printf("gemm 128 x 128 x 256, 4 blocks of 256 threads, %s: %.1f ms, %.0f MFLOP/s\n",
                races ? "looking for races" : "not looking for races", ms, outcome.report.counts.flops / ms / 1e3);
  }
}

}  // namespace

int main() {
  prove<bf16, false>("gemm bf16");
  prove<bf16, true>("gemm bf16, b transposed");
  prove<f16, false>("gemm f16");
  prove<f16, true>("gemm f16, b transposed");
  prove<tf32, false>("gemm tf32");
  measure();
  return check::result("emu gemm");
}
