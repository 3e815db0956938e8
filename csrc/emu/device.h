// The emulator's half of csrc/cuda/device.cuh, which says what these mean.
#pragma once

#include <cmath>
#include <cstdint>
#include <source_location>
#include <type_traits>

#include "builtins.h"
#include "copies.h"
#include "launch.h"
#include "matrix.h"
#include "pointer.h"

#define NSK_SHARED_ARRAY(T, name, count) \
  const ::nsk::cuda::Shared<T> name = ::nsk::cuda::shared_array<T>(count, std::source_location::current())
#define NSK_DYNAMIC_SHARED(name) \
  const ::nsk::cuda::Shared<unsigned char> name { ::nsk::emu::dynamic_shared() }

namespace nsk::cuda {

using std::source_location;

template <class T>
using Global = emu::Pointer<emu::Space::global, T>;
template <class T>
using Shared = emu::Pointer<emu::Space::shared, T>;

template <class U, emu::Space kSpace, class T>
emu::Pointer<kSpace, U> as(emu::Pointer<kSpace, T> p) {
  static_assert(std::is_const_v<U> || !std::is_const_v<T>);
  return reinterpret_cast<U*>(p.raw());
}

template <class T>
Shared<T> shared_array(size_t count, source_location where) {
  return reinterpret_cast<T*>(emu::shared_array(count * sizeof(T), alignof(T), where));
}

inline void barrier_sync(int id, int count, source_location where = source_location::current()) {
  emu::sync_barrier(id, count, where);
}
inline void barrier_arrive(int id, int count, source_location where = source_location::current()) {
  emu::arrive_at_barrier(id, count, where);
}

template <int kBytes, class T, class U>
void cp_async(Shared<T> to, Global<U> from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emu::issue_copy(to.raw(), from.raw(), kBytes, size_t(valid));
}
inline void cp_async_commit(source_location where = source_location::current()) { emu::commit_copies(where); }
template <int kGroups>
void cp_async_wait(source_location where = source_location::current()) {
  emu::wait_copies(kGroups, where);
}
inline void cp_async_wait_all(source_location where = source_location::current()) { emu::wait_all_copies(where); }

template <bool kTransposed = false, int kCount, class T>
void ldmatrix(uint32_t (&fragments)[kCount], Shared<T> row, source_location where = source_location::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emu::load_matrix(fragments, kCount, kTransposed, row.raw(), where);
}
template <bool kTransposed = false, int kCount, class T>
void stmatrix(const uint32_t (&fragments)[kCount], Shared<T> row, source_location where = source_location::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emu::store_matrix(fragments, kCount, kTransposed, row.raw(), where);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         source_location where = source_location::current()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16> || std::is_same_v<T, tf32>);
  constexpr emu::Operand type = std::is_same_v<T, bf16>  ? emu::Operand::bf16
                                : std::is_same_v<T, f16> ? emu::Operand::f16
                                                         : emu::Operand::tf32;
  emu::multiply(d, a, b, type, where);
}

template <class T>
uint32_t pack(float low, float high) {
  return uint32_t{from_float<T>(low).bits} | uint32_t{from_float<T>(high).bits} << 16;
}
template <class T>
float2 unpack(uint32_t bits) {
  return {to_float(T{uint16_t(bits)}), to_float(T{uint16_t(bits >> 16)})};
}
// To nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x - x == 0 ? (bits + 0x1000u) & 0xffffe000u : bits & 0xffffe000u;
}

inline int opaque(int x) { return x; }

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1 / x; }
inline float rsqrt_approx(float x) { return 1 / std::sqrt(x); }
inline float tanh_approx(float x) { return std::tanh(x); }

}  // namespace nsk::cuda
