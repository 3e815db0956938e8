// The second product of attention, weights times values, in which a key that a row does not see has no part in the row,
// whatever its value holds.
#pragma once

#include "tile.cuh"

namespace nsk::cuda {

// The bits of the exponents in a word.
template <class T>
inline constexpr uint32_t kExponents = std::is_same_v<T, tf32>   ? 0x7f800000u
                                       : std::is_same_v<T, bf16> ? 0x7f807f80u
                                                                 : 0x7c007c00u;

// Whether one of the numbers of a piece is infinite or NaN: its exponent is all ones, so that adding one to it carries.
template <class T>
__device__ __forceinline__ bool not_finite(uint4 x) {
  constexpr uint32_t one = kSigns<T> - kExponents<T>;
  const auto carries = [](uint32_t y) { return (y & kExponents<T>) + one; };
  return ((carries(x.x) | carries(x.y) | carries(x.z) | carries(x.w)) & kSigns<T>) != 0;
}

// A word with 0 for those of its numbers that are not finite.
template <class T>
__device__ __forceinline__ uint32_t finite(uint32_t x) {
  if constexpr (sizeof(T) == 4) {
    return (x & kExponents<T>) != kExponents<T> ? x : 0;
  } else {
    constexpr uint32_t low = kExponents<T> & 0xffffu, high = low << 16;
    return x & (((x & low) != low ? 0xffffu : 0u) | ((x & high) != high ? 0xffff0000u : 0u));
  }
}

// out += weights * values. The accumulators of the scores are, packed, just what the units take as A.
template <class T, bool kFinite, int kDv, int kBlocks>
  requires(sizeof(T) == 2)
__device__ __forceinline__ void add_values(float (&out)[kDv / 8][4], const float (&weights)[kBlocks][4],
                                           Shared<unsigned char> values, int lane) {
  const TileReader<T, kDv> reader = TileReader<T, kDv>::rows(lane);
#pragma unroll
  for (int step = 0; step < kBlocks / 2; ++step) {
    const float(&w0)[4] = weights[2 * step], (&w1)[4] = weights[2 * step + 1];
    const uint32_t a[4] = {pack<T>(w0[0], w0[1]), pack<T>(w0[2], w0[3]), pack<T>(w1[0], w1[1]), pack<T>(w1[2], w1[3])};
#pragma unroll
    for (int n = 0; n < kDv / 8; n += 2) {
      uint32_t b[4];
      reader.template load<true>(b, values, 16 * step, n);
      if constexpr (kFinite)
#pragma unroll
        for (uint32_t& x : b) x = finite<T>(x);
      mma_pair<T>(out[n], out[n + 1], a, b);
    }
  }
}

// The same of tf32. The accumulators are A in the order in which TransposedReader counts k.
template <class T, bool kFinite, int kDv, int kBlocks>
  requires(sizeof(T) == 4)
__device__ __forceinline__ void add_values(float (&out)[kDv / 8][4], const float (&weights)[kBlocks][4],
                                           Shared<unsigned char> values, int lane) {
#pragma unroll
  for (int step = 0; step < kBlocks; ++step) {
    const TransposedReader<T, kDv> reader(opaque(lane));  // its places are not kept from turn to turn
    const float(&w)[4] = weights[step];
    const uint32_t a[4] = {to_tf32(w[0]), to_tf32(w[2]), to_tf32(w[1]), to_tf32(w[3])};
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) {
      uint32_t b[2];
      reader.load(b, values, 8 * step, n);
      if constexpr (kFinite)
#pragma unroll
        for (uint32_t& x : b) x = finite<T>(x);
      mma<T>(out[n], a, b);
    }
  }
}

// Values that are not finite, added as they are to the rows that see them. `hidden` has a bit for each weight, 4 n + e
// for e of block n.
template <class T, int kDv, int kBlocks>
__device__ __forceinline__ void add_not_finite(float (&out)[kDv / 8][4], uint32_t hidden, Shared<unsigned char> values,
                                               int lane) {
  static_assert(4 * kBlocks <= 32);
#pragma unroll 1
  for (int key = 0; key < 8 * kBlocks; ++key) {
    const uint32_t bits = __shfl_sync(0xffffffffu, hidden, lane / 4 * 4 + key % 8 / 2) >> (key / 8 * 4 + key % 2);
    const bool seen[2] = {(bits & 1) == 0, (bits & 4) == 0};
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) {
      const Pair<T> pair = as<const Pair<T>>(values + Tile<T, kDv>::pair_at(key, n, lane))[0];
      const float2 value = unpack_pair<T>(pair);
      const float x = value.x - value.x == 0 ? 0 : value.x, y = value.y - value.y == 0 ? 0 : value.y;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (seen[half]) out[n][2 * half] += x, out[n][2 * half + 1] += y;
    }
  }
}

// As add_values where values that are not finite meet weights of 0 that mean that a row does not see the key: 0 times
// infinity would be NaN. The units get 0 for such values.
template <class T, int kDv, int kBlocks>
__device__ __forceinline__ void add_seen_values(float (&out)[kDv / 8][4], const float (&weights)[kBlocks][4],
                                                uint32_t hidden, Shared<unsigned char> values, int lane) {
  add_values<T, true, kDv>(out, weights, values, lane);
  add_not_finite<T, kDv, kBlocks>(out, hidden, values, lane);
}

// The same with weights of -0 for what is hidden.
template <class T, int kDv, int kBlocks>
__device__ __forceinline__ void add_seen_values(float (&out)[kDv / 8][4], const float (&weights)[kBlocks][4],
                                                Shared<unsigned char> values, int lane) {
  add_values<T, true, kDv>(out, weights, values, lane);
  uint32_t hidden = 0;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) hidden |= uint32_t(__float_as_uint(weights[n][e]) == 0x80000000u) << (4 * n + e);
  add_not_finite<T, kDv, kBlocks>(out, hidden, values, lane);
}

// Whether one of kWarps warps has found numbers that are not finite in a tile, for the tiles of two stages: each leaves
// its word before a barrier, after it all know.
template <int kWarps>
struct FoundByWarps {
  static constexpr int kBytes = 2 * 4 * kWarps;

  Shared<uint32_t> words;

  __device__ __forceinline__ void leave(int tile, bool of_lane) const {
    const bool any = __any_sync(0xffffffffu, of_lane);
    if (threadIdx.x % 32 == 0) words[tile % 2 * kWarps + int(threadIdx.x) / 32] = any;
  }
  __device__ __forceinline__ bool any(int tile) const {
    if constexpr (kWarps == 4) {
      const uint4 of_warps = as<const uint4>(words)[tile % 2];
      return (of_warps.x | of_warps.y | of_warps.z | of_warps.w) != 0;
    } else {
      bool any = false;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const uint32_t of_warp = words[tile % 2 * kWarps + warp];
        any |= of_warp != 0;
      }
      return any;
    }
  }
};

}  // namespace nsk::cuda
