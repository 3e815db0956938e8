// CUDA's own words, for kernels that g++ compiles: what nvcc knows without any header.
//
// __shared__ is not among them, so that a plain `__shared__ float x[32]`, whose accesses nobody would see, does not
// compile; see NSK_SHARED_ARRAY.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "collectives.h"
#include "pointer.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern constinit thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

// What synchronises knows where it is written: messages name the place, and a test can leave it out.
inline void __syncthreads(std::source_location where = std::source_location::current()) {
  nsk::emu::sync_threads(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location where = std::source_location::current()) {
  nsk::emu::sync_warp(mask, where);
}
inline void __threadfence(std::source_location where = std::source_location::current()) { nsk::emu::fence(where); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              std::source_location where = std::source_location::current()) {
  return nsk::emu::shuffle(nsk::emu::Shuffle::index, mask, value, lane, width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 std::source_location where = std::source_location::current()) {
  return nsk::emu::shuffle(nsk::emu::Shuffle::up, mask, value, int(delta), width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   std::source_location where = std::source_location::current()) {
  return nsk::emu::shuffle(nsk::emu::Shuffle::down, mask, value, int(delta), width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  std::source_location where = std::source_location::current()) {
  return nsk::emu::shuffle(nsk::emu::Shuffle::exclusive_or, mask, value, lanes, width, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  return nsk::emu::vote(mask, predicate != 0, where).ballot;
}
inline int __any_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return nsk::emu::vote(mask, predicate != 0, where).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  const nsk::emu::Vote vote = nsk::emu::vote(mask, predicate != 0, where);
  return vote.ballot == vote.lanes;
}

// Atomics return what was there before.
template <nsk::emu::Space kSpace, class T, class F>
T nsk_emu_atomic(nsk::emu::Pointer<kSpace, T> p, const F& update) {
  nsk::emu::access(kSpace, p.raw(), sizeof(T), alignof(T), nsk::emu::Access::atomic);
  T before;
  std::memcpy(&before, p.raw(), sizeof(T));
  const T after = update(before);
  std::memcpy(p.raw(), &after, sizeof(T));
  return before;
}
template <nsk::emu::Space kSpace, class T>
T atomicAdd(nsk::emu::Pointer<kSpace, T> p, std::type_identity_t<T> value) {
  return nsk_emu_atomic(p, [&](T before) { return T(before + value); });
}
template <nsk::emu::Space kSpace, class T>
T atomicMax(nsk::emu::Pointer<kSpace, T> p, std::type_identity_t<T> value) {
  return nsk_emu_atomic(p, [&](T before) { return before < value ? value : before; });
}
template <nsk::emu::Space kSpace, class T>
T atomicMin(nsk::emu::Pointer<kSpace, T> p, std::type_identity_t<T> value) {
  return nsk_emu_atomic(p, [&](T before) { return value < before ? value : before; });
}
template <nsk::emu::Space kSpace, class T>
T atomicExch(nsk::emu::Pointer<kSpace, T> p, std::type_identity_t<T> value) {
  return nsk_emu_atomic(p, [&](T) { return value; });
}
template <nsk::emu::Space kSpace, class T>
T atomicCAS(nsk::emu::Pointer<kSpace, T> p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return nsk_emu_atomic(p, [&](T before) { return before == compare ? value : before; });
}
template <class T>
T __ldg(nsk::emu::Pointer<nsk::emu::Space::global, const T> p) {
  return *p;
}

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
