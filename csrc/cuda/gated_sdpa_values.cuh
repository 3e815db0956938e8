// The second product of attention, weights times values, in which a key that a row does not see has no part in the row,
// whatever its value holds.
#pragma once

#include "tile.cuh"

namespace nsk::cuda {

template <class T>
inline constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80u : 0x7c00u;

// Whether one of two packed numbers is infinite or NaN: its exponent is all ones, so that adding one to it carries.
template <class T>
__device__ __forceinline__ bool not_finite(uint32_t x) {
  constexpr uint32_t exponents = kExponent<T> * 0x10001u, ones = (0x8000u - kExponent<T>) * 0x10001u;
  return (((x & exponents) + ones) & 0x80008000u) != 0;
}

// out += weights * values, of 16 keys and 16 columns, where values that are not finite meet weights of -0, which mean
// that a row does not see the key: 0 times infinity would be NaN. The units get 0 for them; what they would have
// contributed to the other rows is infinite or NaN, and two more products tell which: they count, over the keys seen,
// the values that are +inf or NaN and those that are -inf or NaN.
template <class T>
__device__ __forceinline__ void mma_pair_selecting(float (&d0)[4], float (&d1)[4], const uint32_t (&weights)[4],
                                                   const uint32_t (&values)[4]) {
  constexpr uint32_t one = std::is_same_v<T, bf16> ? 0x3f80u : 0x3c00u;
  uint32_t finite[4], up[4], down[4], seen[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    finite[i] = up[i] = down[i] = seen[i] = 0;
#pragma unroll
    for (int shift = 0; shift < 32; shift += 16) {
      const uint32_t value = values[i] >> shift & 0xffffu, magnitude = value & 0x7fffu;
      if (magnitude < kExponent<T>) finite[i] |= value << shift;
      if (magnitude > kExponent<T> || value == kExponent<T>) up[i] |= one << shift;
      if (magnitude > kExponent<T> || value == (kExponent<T> | 0x8000u)) down[i] |= one << shift;
      if ((weights[i] >> shift & 0xffffu) != 0x8000u) seen[i] |= one << shift;
    }
  }
  mma_pair<T>(d0, d1, weights, finite);
  float ups[2][4] = {}, downs[2][4] = {};
  mma_pair<T>(ups[0], ups[1], seen, up);
  mma_pair<T>(downs[0], downs[1], seen, down);
  const float infinity = __uint_as_float(0x7f800000u);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (ups[0][e] > 0) d0[e] += infinity;
    if (downs[0][e] > 0) d0[e] -= infinity;
    if (ups[1][e] > 0) d1[e] += infinity;
    if (downs[1][e] > 0) d1[e] -= infinity;
  }
}

// out += weights * values. The accumulators of the scores are, packed, just what the units take as A.
template <class T, bool kSelects, int kDv, int kBlocks>
__device__ __forceinline__ void add_values(float (&out)[kDv / 8][4], const float (&weights)[kBlocks][4],
                                           Shared<unsigned char> values, int lane) {
  const TileReader<kDv> reader = TileReader<kDv>::rows(lane);
#pragma unroll
  for (int step = 0; step < kBlocks / 2; ++step) {
    const float(&w0)[4] = weights[2 * step], (&w1)[4] = weights[2 * step + 1];
    const uint32_t a[4] = {pack<T>(w0[0], w0[1]), pack<T>(w0[2], w0[3]), pack<T>(w1[0], w1[1]), pack<T>(w1[2], w1[3])};
#pragma unroll
    for (int n = 0; n < kDv / 8; n += 2) {
      uint32_t b[4];
      reader.template load<true>(b, values, 16 * step, 8 * n);
      if (kSelects && __any_sync(0xffffffffu, not_finite<T>(b[0]) || not_finite<T>(b[1]) || not_finite<T>(b[2]) ||
                                                  not_finite<T>(b[3])))
        mma_pair_selecting<T>(out[n], out[n + 1], a, b);
      else
        mma_pair<T>(out[n], out[n + 1], a, b);
    }
  }
}

}  // namespace nsk::cuda
