// The machine's own limits, measured: multiply-adds in registers, and streams from memory.
#pragma once

#include <time.h>

#include "matrix.h"
#include "microkernel.h"
#include "parallel.h"

namespace nsk::NSK_ISA {

inline double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Chains of dependent multiply-adds, N of them side by side; returns FLOPs done.
template <class M, int N>
[[gnu::noinline]] double fma_chains(int64_t steps, typename M::V* sink) {
  using V = typename M::V;
  V acc[N];
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) acc[i] = splat<typename M::C, M::L>(typename M::C(i));
  typename M::UnitVec x{};
  typename M::Unit y{};
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) {
#if defined(__AVX__)
      asm("" : "+x"(x));
#endif
      acc[i] = M::multiply_add(acc[i], x, y);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) *sink += acc[i];
  return 2.0 * double(steps) * N * M::L * M::pack;
}

#if defined(__AMX_BF16__)
// The matrix unit's: four products of tiles side by side.
inline double matrix_chains(int64_t steps) {
  const MatrixUnit unit;
  [&]<int... kTile>(std::integer_sequence<int, kTile...>) {
    (MatrixUnit::zero<kTile>(), ...);
  }(std::make_integer_sequence<int, 8>{});
  for (int64_t s = 0; s < steps; ++s) {
    MatrixUnit::multiply_add<0, 4, 6>();
    MatrixUnit::multiply_add<1, 4, 7>();
    MatrixUnit::multiply_add<2, 5, 6>();
    MatrixUnit::multiply_add<3, 5, 7>();
  }
  return 2.0 * double(steps) * 4 * (2 * kMatrixSide) * kMatrixSide * kMatrixSide;
}
#endif

// Calls step() (FLOPs or bytes done) over and over on every thread; the sum of the threads' best rates, in units of 1e9.
template <class Step>
double best_rate(int threads, double seconds, const Step& step) {
  constexpr int kMost = 1024;
  double rate[kMost] = {};
  if (threads > kMost) threads = kMost;
  parallel_for(threads, threads, 0, [&](int64_t unit, char*) {
    const double end = now() + seconds;
    for (double start = now(); start < end;) {
      double done = 0, stop = start;
      while (stop - start < 0.01) {
        done += step(unit);
        stop = now();
      }
      const double r = done / (stop - start) * 1e-9;
      if (r > rate[unit]) rate[unit] = r;
      start = stop;
    }
  });
  double sum = 0;
  for (int i = 0; i < threads; ++i) sum += rate[i];
  return sum;
}

template <class M>
double measure_chains(int threads, double seconds) {
  double best = 0;
  auto attempt = [&](auto chains) {
    const double rate = best_rate(threads, seconds / 3, [](int64_t) {
      typename M::V sink{};
      return fma_chains<M, decltype(chains)::value>(20000, &sink);
    });
    if (rate > best) best = rate;
  };
  attempt(std::integral_constant<int, 8>{});
  attempt(std::integral_constant<int, 12>{});
  if constexpr (kVectorRegisters == 32) attempt(std::integral_constant<int, 20>{});
  return best;
}

inline double measure_fma(int32_t dtype, int32_t threads, double seconds) {
  switch (dtype) {
    case NSK_F32: return measure_chains<Math<float, float, kLanes<float>>>(threads, seconds);
    case NSK_F64: return measure_chains<Math<double, double, kLanes<double>>>(threads, seconds);
#if defined(__AMX_BF16__)
    case NSK_BF16: return best_rate(threads, seconds, [](int64_t) { return matrix_chains(2000); });
#elif defined(__AVX512BF16__)
    case NSK_BF16: return measure_chains<Math<float, bf16, kLanes<float>>>(threads, seconds);
#endif
    default: return 0;
  }
}

// Reads [begin, begin + bytes) once, as kStreams streams of whole cache lines, prefetching kAhead bytes ahead.
template <int kStreams, int kAhead>
[[gnu::noinline]] double read_once(const char* begin, int64_t bytes) {
  using V = Vec<float, kLanes<float>>;
  const int64_t share = bytes / kStreams / 256 * 256;
  V sum[kStreams][2] = {};
  for (int64_t at = 0; at < share; at += 256)
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const char* p = begin + s * share + at;
#pragma GCC unroll 4
      for (int line = 0; line < 4 && kAhead > 0; ++line) __builtin_prefetch(p + kAhead + 64 * line, 0, 2);
#pragma GCC unroll 16
      for (int i = 0; i < 256; i += kVectorBytes) sum[s][i / kVectorBytes % 2] += load<V>(p + i);
    }
  for (auto& pair : sum)
    for (V& v : pair) {
#if defined(__AVX__)
      asm volatile("" : : "x"(v));
#else
      asm volatile("" : : "m"(v));
#endif
    }
  return double(share) * kStreams;
}

inline double measure_read(const void* buffer, int64_t bytes, int32_t threads, double seconds) {
  const char* data = static_cast<const char*>(buffer);
  const int64_t share = bytes / threads / 4096 * 4096;
  double best = 0;
  auto attempt = [&](auto read) {
    const double rate = best_rate(threads, seconds / 4, [&](int64_t unit) { return read(data + unit * share, share); });
    if (rate > best) best = rate;
  };
  attempt(read_once<1, 0>);
  attempt(read_once<1, 4096>);
  attempt(read_once<4, 0>);
  attempt(read_once<4, 2048>);
  return best;
}

}  // namespace nsk::NSK_ISA
