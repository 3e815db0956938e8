// Softmax over keys that come tile by tile: running maximum and sum of each row, in the domain of exp2.
//
// A warp has 16 rows. Its lane l has, of the accumulators of each 16 x 8 product, the columns 2 (l % 4) and one more of
// the rows l / 4 (elements 0, 1) and l / 4 + 8 (elements 2, 3); four lanes share a row.
#pragma once

#include "device.cuh"

namespace nsk::cuda {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

struct OnlineSoftmax {
  float top[2], sum[2];  // sum: over this lane's own columns

  __device__ __forceinline__ OnlineSoftmax()
      : top{minus_infinity(), minus_infinity()}, sum{0, 0} {}

  // Scores s become exp2(scale (s - top)) with the tops of all tiles so far, and `correction` what the sums of earlier
  // tiles have to be multiplied with. scale > 0. -inf marks keys that a row does not see; where there are some
  // (`kSelects`), their weight is -0, by which it can be told from one that underflowed.
  template <bool kSelects, int kBlocks>
  __device__ __forceinline__ void weigh(float (&s)[kBlocks][4], float scale, float (&correction)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = top[half];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) now = max(now, max(s[n][2 * half], s[n][2 * half + 1]));
      now = max(now, __shfl_xor_sync(0xffffffffu, now, 1));
      now = max(now, __shfl_xor_sync(0xffffffffu, now, 2));
      // A row that has seen nothing yet: any finite number, for -inf - -inf is NaN.
      const float reference = now == minus_infinity() ? 0.0f : now * scale;
      correction[half] = exp2_approx(top[half] * scale - reference);
      top[half] = now;
      float total = 0;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float weight = exp2_approx(s[n][e] * scale - reference);
          total += weight;
          s[n][e] = kSelects && s[n][e] == minus_infinity() ? -0.0f : weight;
        }
      sum[half] = sum[half] * correction[half] + total;
    }
  }

  // Once all tiles are in: the sums over all columns.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    }
  }
};

}  // namespace nsk::cuda
