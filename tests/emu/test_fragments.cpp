// ldmatrix, stmatrix and mma against the tables of the PTX ISA: which element of a matrix lies in which register of
// which lane. The tables are written out here as the manual has them, and not as the emulator does.
#include <cmath>

#include "harness.h"
#include "vocabulary.cuh"

using namespace nsk;
using namespace nsk::cuda;
using namespace nsk::test;

namespace {

struct At {
  int row, column;
};

// mma.m16n8k16, 16-bit types: a0..a7, b0..b3, c0..c3.
At a16(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
  return {row, i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8};
}
At b16(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8, group};
}
At c32(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 ? group : group + 8, thread * 2 + (i & 1)};
}
// mma.m16n8k8, tf32: a0..a3, b0..b1.
At a_tf32(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i == 0 || i == 2 ? group : group + 8, i < 2 ? thread : thread + 4};
}
At b_tf32(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i == 0 ? thread : thread + 4, group};
}

template <class T>
uint32_t element(float x) {
  if constexpr (std::is_same_v<T, tf32>)
    return __float_as_uint(x);
  else
    return from_float<T>(x).bits;
}

// Small integers: every product and sum is exact, so that the results must be equal, in any order of summation.
template <class T>
void multiply(const char* name) {
  constexpr bool kTf32 = std::is_same_v<T, tf32>;
  constexpr int kDepth = kTf32 ? 8 : 16;
  std::mt19937 random(1);
  int a[16][kDepth], b[kDepth][8], c[16][8];
  for (auto& row : a)
    for (int& x : row) x = int(random() % 17) - 8;
  for (auto& row : b)
    for (int& x : row) x = int(random() % 17) - 8;
  for (auto& row : c)
    for (int& x : row) x = int(random() % 1001) - 500;
  must_pass(name, 32, [&] {
    const int lane = int(threadIdx.x);
    uint32_t fragment_a[4] = {}, fragment_b[2] = {};
    float d[4];
    for (int i = 0; i < (kTf32 ? 4 : 8); ++i) {
      const At at = kTf32 ? a_tf32(lane, i) : a16(lane, i);
      const uint32_t bits = element<T>(float(a[at.row][at.column]));
      if (kTf32)
        fragment_a[i] = bits | 0x1abcu;  // the hardware does not look at the lower 13 bits
      else
        fragment_a[i / 2] |= bits << 16 * (i % 2);
    }
    for (int i = 0; i < (kTf32 ? 2 : 4); ++i) {
      const At at = kTf32 ? b_tf32(lane, i) : b16(lane, i);
      const uint32_t bits = element<T>(float(b[at.row][at.column]));
      if (kTf32)
        fragment_b[i] = bits;
      else
        fragment_b[i / 2] |= bits << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i) d[i] = float(c[c32(lane, i).row][c32(lane, i).column]);
    mma<T>(d, fragment_a, fragment_b);
    for (int i = 0; i < 4; ++i) {
      const At at = c32(lane, i);
      int exact = c[at.row][at.column];
      for (int k = 0; k < kDepth; ++k) exact += a[at.row][k] * b[k][at.column];
      CHECK(d[i] == float(exact), "%s lane %d, d%d: %g, not %d", name, lane, i, d[i], exact);
    }
  });
}

// "Each row is of 8 elements; thread T holds elements 2 (T % 4) and 2 (T % 4) + 1 of row T / 4." Transposed: the same
// of the transposed matrix. Rows lie in reversed order and a row of 24 bytes less 8 apart, so that addresses matter.
template <int kCount, bool kTransposed>
void move() {
  const auto value = [](int matrix, int row, int column) { return uint16_t(1 + matrix * 64 + row * 8 + column); };
  must_pass("ldmatrix, stmatrix", 32, [&] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<uint16_t> tile = as<uint16_t>(bytes);
    const int lane = int(threadIdx.x);
    const auto row_at = [&](int matrix, int row) { return tile + (kCount * 8 - 1 - (matrix * 8 + row)) * 8; };
    const int mine = lane % (kCount * 8);  // lanes beyond the last row give addresses that nobody looks at
    for (int column = 0; column < 8; ++column) {
      if (lane < kCount * 8) row_at(mine / 8, mine % 8)[column] = value(mine / 8, mine % 8, column);
    }
    __syncwarp();
    uint32_t fragments[kCount];
    ldmatrix<kTransposed>(fragments, lane < kCount * 8 ? row_at(mine / 8, mine % 8) : Shared<uint16_t>());
    for (int i = 0; i < kCount; ++i)
      for (int half = 0; half < 2; ++half) {
        const int major = lane / 4, minor = lane % 4 * 2 + half;
        const uint16_t expected = kTransposed ? value(i, minor, major) : value(i, major, minor);
        CHECK(uint16_t(fragments[i] >> 16 * half) == expected, "x%d, lane %d, matrix %d", kCount, lane, i);
      }
    __syncwarp();
    for (uint32_t& f : fragments) f += 0x01000100u;
    stmatrix<kTransposed>(fragments, lane < kCount * 8 ? row_at(mine / 8, mine % 8) : Shared<uint16_t>());
    __syncwarp();
    if (lane < kCount * 8)
      for (int column = 0; column < 8; ++column) {
        const uint16_t got = row_at(mine / 8, mine % 8)[column];
        CHECK(got == value(mine / 8, mine % 8, column) + 0x100, "x%d, row %d", kCount, mine);
      }
  });
}

void bank_conflicts() {
  GlobalMemory memory;
  for (const auto& [stride, conflicts] : {std::pair{16, 0u}, {32, 1u}, {64, 3u}, {128, 7u}, {144, 0u}, {0, 0u}}) {
    const Report report = must_pass("conflicts", memory, {"conflicts", {}, {32}, 2048}, [&] {
      NSK_DYNAMIC_SHARED(bytes);
      for (int i = 0; i < 16; ++i) as<uint32_t>(bytes)[i * 32 + int(threadIdx.x)] = 0;
      __syncwarp();
      uint32_t fragment[1];
      ldmatrix(fragment, bytes + int(threadIdx.x) % 8 * stride);
    });
    CHECK(report.counts.bank_conflicts == conflicts, "stride %d", stride);
    CHECK(report.counts.ldmatrix == 1 && report.counts.shared_read == 128 && report.counts.shared_written == 2048);
  }
}

template <class T>
void conversions() {
  must_pass("conversions", 1, [] {
    const uint32_t bits = pack<T>(1.5f, -2.25f);
    CHECK(bits == (uint32_t{from_float<T>(1.5).bits} | uint32_t{from_float<T>(-2.25).bits} << 16));
    const float2 values = unpack<T>(bits);
    CHECK(values.x == 1.5f && values.y == -2.25f);
    CHECK(__uint_as_float(to_tf32(1 + 0x1p-11f)) == 1 + 0x1p-10f && __uint_as_float(to_tf32(-1)) == -1);
    CHECK(__uint_as_float(to_tf32(INFINITY)) == INFINITY && std::isnan(__uint_as_float(to_tf32(NAN))));
  });
}

void every_word() {
  const std::vector<float> from = normal(32 * 8, 9);
  std::vector<float> to(64);
  std::vector<int> counters(5);
  GlobalMemory memory;
  const Global<const float> in = memory.input("from", from.data(), from.size());
  const Global<float> out = memory.output("to", to.data(), to.size());
  const Global<int> count = memory.in_out("counters", counters.data(), counters.size());
  for (const Options& options : emu::all_schedules(1))
    must_pass("vocabulary", memory, {"vocabulary", {}, {32}, 1024}, [&] { vocabulary(in, out, count); }, options);
  CHECK(counters[0] == 9 * 32 && counters[1] == 31 && counters[2] == 0);
}

}  // namespace

int main() {
  multiply<bf16>("bf16");
  multiply<f16>("f16");
  multiply<tf32>("tf32");
  move<1, false>(), move<2, false>(), move<4, false>();
  move<1, true>(), move<2, true>(), move<4, true>();
  bank_conflicts();
  conversions<bf16>(), conversions<f16>();
  every_word();
  return check::result("emu fragments");
}
