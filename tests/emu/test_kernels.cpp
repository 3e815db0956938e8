// Small kernels in every schedule: right, counted to the byte, and wrong or reported without each of their barriers,
// waits and fences.
#include <cmath>

#include "harness.h"
#include "kernels.cuh"

using namespace nsk;
using namespace nsk::test;

namespace {

bool near(double got, double exact, double terms) { return std::fabs(got - exact) <= 1e-5 * terms; }

void vector_add() {
  for (int count : {0, 1, 4, 7, 1000, 1003}) {
    const std::vector<float> x = normal(count, 1), y = normal(count, 2);
    std::vector<float> sum(count);
    GlobalMemory memory;
    const Global<const float> in_x = memory.input("x", x.data(), x.size()),
                              in_y = memory.input("y", y.data(), y.size());
    const Global<float> out = memory.output("sum", sum.data(), sum.size());
    for (const Options& options : emu::all_schedules(1)) {
      const Report report = must_pass(
          "vector_add", memory, {"vector_add", {3}, {64}}, [&] { test::vector_add(count, in_x, in_y, out); }, options);
      for (int i = 0; i < count; ++i) CHECK(sum[i] == x[i] + y[i], "%d of %d", i, count);
      CHECK(report.counts.global_read == 8u * count && report.counts.global_written == 4u * count);
      CHECK(report.counts.flops == 0 && report.syncs.empty());
    }
  }
}

void row_sums() {
  const int rows = 3, columns = 300;
  const std::vector<float> x = normal(rows * columns, 3);
  for (unsigned threads : {32u, 128u, 1024u}) {
    const auto run = [&](const Options& options) {
      std::vector<float> sums(rows);
      GlobalMemory memory;
      const Global<const float> in = memory.input("x", x.data(), x.size());
      const Global<float> out = memory.output("sums", sums.data(), sums.size());
      Outcome outcome{
          emu::launch({"row_sums", {}, {threads}}, memory, options, [&] { test::row_sums(rows, columns, in, out); }),
          true};
      for (int r = 0; r < rows; ++r) {
        double exact = 0, terms = 0;
        for (int i = 0; i < columns; ++i) exact += x[r * columns + i], terms += std::fabs(x[r * columns + i]);
        outcome.right &= near(sums[r], exact, terms);
      }
      CHECK(outcome.report.counts.barriers == 2u * rows || options.flaw);
      return outcome;
    };
    if (threads == 128)
      every_flaw_is_seen("row_sums", run);
    else
      for (const Options& options : emu::all_schedules(2)) CHECK(run(options).right, "%u threads", threads);
  }
}

void reverse_rows() {
  const int rows = 11;
  const std::vector<float> x = normal(rows * 32, 4);
  every_flaw_is_seen("reverse_rows", [&](const Options& options) {
    std::vector<float> y(x.size());
    GlobalMemory memory;
    const Global<const float> in = memory.input("x", x.data(), x.size());
    const Global<float> out = memory.output("y", y.data(), y.size());
    Outcome outcome{emu::launch({"reverse_rows", {}, {64}, 64 * sizeof(float)}, memory, options,
                                [&] { test::reverse_rows(rows, in, out); }),
                    true};
    for (int i = 0; i < rows * 32; ++i) outcome.right &= y[i] == x[i / 32 * 32 + 31 - i % 32];
    return outcome;
  });
}

void pipelined_sums() {
  const int tiles = 6, half = 64;
  const std::vector<float> x = normal(tiles * half, 5);
  every_flaw_is_seen("pipelined_sums", [&](const Options& options) {
    std::vector<float> sums(half);
    GlobalMemory memory;
    const Global<const float> in = memory.input("x", x.data(), x.size());
    const Global<float> out = memory.output("sums", sums.data(), sums.size());
    Outcome outcome{emu::launch({"pipelined_sums", {}, {2 * half}, 2 * half * sizeof(float)}, memory, options,
                                [&] { test::pipelined_sums(tiles, in, out); }),
                    true};
    for (int thread = 0; thread < half; ++thread) {
      double exact = 0, terms = 0;
      for (int tile = 0; tile < tiles; ++tile)
        for (int i = 0; i < half; ++i) {
          const double term = double(x[tile * half + (thread + i) % half]) * (i + 1);
          exact += term, terms += std::fabs(term);
        }
      outcome.right &= near(sums[thread], exact, terms);
    }
    return outcome;
  });
}

void sum_of_all() {
  const int count = 1000, blocks = 5;
  const std::vector<float> x = normal(count, 6);
  every_flaw_is_seen("sum_of_all", [&](const Options& options) {
    std::vector<float> partial(blocks), sum(1);
    std::vector<unsigned> done(1);
    GlobalMemory memory;
    const Global<const float> in = memory.input("x", x.data(), x.size());
    const Global<float> parts = memory.output("partial", partial.data(), partial.size());
    const Global<unsigned> counter = memory.in_out("done", done.data(), done.size());
    const Global<float> out = memory.output("sum", sum.data(), sum.size());
    Outcome outcome{emu::launch({"sum_of_all", {blocks}, {32}}, memory, options,
                                [&] { test::sum_of_all(count, in, parts, counter, out); }),
                    true};
    double exact = 0, terms = 0;
    for (float v : x) exact += v, terms += std::fabs(v);
    outcome.right = near(sum[0], exact, terms) && done[0] == blocks;
    return outcome;
  });
}

}  // namespace

int main() {
  vector_add();
  row_sums();
  reverse_rows();
  pipelined_sums();
  sum_of_all();
  return check::result("emu kernels");
}
