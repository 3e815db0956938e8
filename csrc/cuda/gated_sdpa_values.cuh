// The second product of attention, weights times values, in which a key that a row does not see has no part in the row,
// whatever its value holds.
#pragma once

#include "tile.cuh"

namespace nsk::cuda {

template <class T>
inline constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80u : 0x7c00u;

// Whether one of eight packed numbers is infinite or NaN: its exponent is all ones, so that adding one to it carries.
template <class T>
__device__ __forceinline__ bool not_finite(uint4 x) {
  constexpr uint32_t exponents = kExponent<T> * 0x10001u, one = (0x8000u - kExponent<T>) * 0x10001u;
  const auto carries = [](uint32_t y) { return (y & exponents) + one; };
  return ((carries(x.x) | carries(x.y) | carries(x.z) | carries(x.w)) & 0x80008000u) != 0;
}

// f(half) of each half of a register.
template <class F>
__device__ __forceinline__ uint32_t each_half(uint32_t x, const F& f) {
  return f(x & 0xffffu) | f(x >> 16) << 16;
}

// d += weights * values, of 16 keys and 8 columns, where values that are not finite meet weights of -0, which mean that
// a row does not see the key: 0 times infinity would be NaN. The units get 0 for them; what they would have contributed
// to the other rows is infinite or NaN, and two more products tell which: they count, over the keys seen, the values
// that are +inf or NaN and those that are -inf or NaN.
template <class T>
__device__ __forceinline__ void mma_selecting(float (&d)[4], const uint32_t (&weights)[4], uint32_t value0,
                                              uint32_t value1) {
  constexpr uint32_t one = std::is_same_v<T, bf16> ? 0x3f80u : 0x3c00u, infinity = kExponent<T>;
  const auto finite = [](uint32_t x) { return (x & 0x7fffu) < infinity ? x : 0u; };
  mma<T>(d, weights, {each_half(value0, finite), each_half(value1, finite)});
  uint32_t seen[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) seen[i] = each_half(weights[i], [](uint32_t x) { return x != 0x8000u ? one : 0u; });
#pragma unroll
  for (uint32_t sign : {0u, 0x8000u}) {
    const auto counts = [=](uint32_t x) { return (x & 0x7fffu) > infinity || x == (infinity | sign) ? one : 0u; };
    float count[4] = {};
    mma<T>(count, seen, {each_half(value0, counts), each_half(value1, counts)});
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (count[e] > 0) d[e] += __uint_as_float(0x7f800000u | sign << 16);
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
      if constexpr (kSelects) {
        mma_selecting<T>(out[n], a, b[0], b[1]);
        mma_selecting<T>(out[n + 1], a, b[2], b[3]);
      } else {
        mma_pair<T>(out[n], out[n + 1], a, b);
      }
    }
  }
}

}  // namespace nsk::cuda
