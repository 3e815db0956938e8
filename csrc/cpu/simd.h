// SIMD types: `Vec<C, L>` is L lanes of C in the compiler's own vector extension, so one source serves every
// instruction set and + - * / compare as on scalars. Here are the few operations that the extension lacks.
//
// This header, and all that include it, are compiled once per instruction set inside namespace nsk::NSK_ISA. They
// must not call inline functions of the standard library: the linker keeps one copy of those, which may hold
// instructions that the processor lacks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../common/numeric.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define NSK_INLINE inline __attribute__((always_inline))

namespace nsk::NSK_ISA {

template <class C, int L>
struct VecOf {
  typedef C type __attribute__((vector_size(sizeof(C) * L)));
};
template <class C, int L>
using Vec = typename VecOf<C, L>::type;

#if defined(__AVX512F__) || defined(NSK_EMULATE_AVX512)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// Number of vector registers the microkernels may plan with.
#if defined(__AVX512F__) || defined(NSK_EMULATE_AVX512) || defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif

template <class C>
inline constexpr int kLanes = kVectorBytes / int(sizeof(C));

template <class C>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class C>
using Int = typename IntOf<C>::type;

template <class V>
NSK_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
NSK_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class C, int L>
NSK_INLINE Vec<C, L> splat(C x) {
  return x - Vec<C, L>{};
}

// a > b ? a : b lane by lane: b where either is NaN, so `b` is the operand whose NaN survives.
template <class C, int L>
NSK_INLINE Vec<C, L> max_keep(Vec<C, L> a, Vec<C, L> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4 && L == 16) return (Vec<C, L>)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(C) == 8 && L == 8) return (Vec<C, L>)_mm512_max_pd((__m512d)a, (__m512d)b);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(C) == 4 && L == 8) return (Vec<C, L>)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(C) == 8 && L == 4) return (Vec<C, L>)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}
template <class C, int L>
NSK_INLINE Vec<C, L> min_keep(Vec<C, L> a, Vec<C, L> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4 && L == 16) return (Vec<C, L>)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(C) == 8 && L == 8) return (Vec<C, L>)_mm512_min_pd((__m512d)a, (__m512d)b);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(C) == 4 && L == 8) return (Vec<C, L>)_mm256_min_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(C) == 8 && L == 4) return (Vec<C, L>)_mm256_min_pd((__m256d)a, (__m256d)b);
#endif
  return a < b ? a : b;
}

// Whether any lane of a comparison's result is true.
template <class I>
NSK_INLINE bool any(I mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(I) == 64) return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(I) == 32) return _mm256_movemask_epi8((__m256i)mask) != 0;
#endif
  using E = std::remove_cvref_t<decltype(mask[0])>;
  E lane[sizeof(I) / sizeof(E)], all = 0;
  store(lane, mask);
  for (E x : lane) all |= x;
  return all != 0;
}

template <class C, int L>
NSK_INLINE C reduce_add(Vec<C, L> v) {  // a fixed tree: the same bits whatever the compiler
  C lane[L];
  store(lane, v);
  for (int half = L / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// ---- converting loads and stores -------------------------------------------------------------------------------

template <int L>
NSK_INLINE Vec<float, L> widen(Vec<uint16_t, L> h, bf16) {
  return (Vec<float, L>)(__builtin_convertvector(h, Vec<uint32_t, L>) << 16);
}

template <int L>
NSK_INLINE Vec<uint16_t, L> narrow(Vec<float, L> x, bf16) {
#if defined(__AVX512BF16__)  // as below, but numbers too small to be normal become 0
  if constexpr (L == 16) return (Vec<uint16_t, L>)_mm512_cvtneps_pbh((__m512)x);
#endif
  using U = Vec<uint32_t, L>;
  const U bits = (U)x;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet, Vec<uint16_t, L>);
}

// low and high one after the other, rounded to bf16.
template <int L>
NSK_INLINE Vec<uint16_t, 2 * L> narrow_both(Vec<float, L> low, Vec<float, L> high) {
#if defined(__AVX512BF16__)
  if constexpr (L == 16) return (Vec<uint16_t, 2 * L>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
  const Vec<uint16_t, L> halves[2] = {narrow<L>(low, bf16{}), narrow<L>(high, bf16{})};
  return load<Vec<uint16_t, 2 * L>>(halves);
}

template <size_t Half, class V, size_t... I>
NSK_INLINE V alternate(V x, std::index_sequence<I...>) {  // 0, Half, 1, Half + 1, ...
  return __builtin_shufflevector(x, x, (I / 2 + I % 2 * Half)...);
}

// Lane by lane, low and high rounded to bf16 in the halves of 32 bits.
template <int L>
NSK_INLINE Vec<uint32_t, L> pair_bf16(Vec<float, L> low, Vec<float, L> high) {
  using U = Vec<uint32_t, L>;
#if defined(__AVX512BF16__)
  if constexpr (L == 16) return (U)alternate<L>(narrow_both<L>(low, high), std::make_index_sequence<2 * L>{});
#endif
  return __builtin_convertvector(narrow<L>(low, bf16{}), U) | (__builtin_convertvector(narrow<L>(high, bf16{}), U) << 16);
}

// Units of pairs, low[i] below high[i], for 2 L elements: the first L, then the others.
template <int L, size_t... I>
NSK_INLINE void interleave(Vec<uint16_t, 2 * L> low, Vec<uint16_t, 2 * L> high, Vec<uint32_t, L> (&units)[2],
                           std::index_sequence<I...>) {
  units[0] = (Vec<uint32_t, L>)__builtin_shufflevector(low, high, (I / 2 + I % 2 * 2 * L)...);
  units[1] = (Vec<uint32_t, L>)__builtin_shufflevector(low, high, (I / 2 + I % 2 * 2 * L + L)...);
}

// Lane by lane of the two halves of x, rounded to bf16 in the halves of 32 bits.
template <int L>
NSK_INLINE Vec<uint32_t, L / 2> pair_halves(Vec<float, L> x) {
  return (Vec<uint32_t, L / 2>)alternate<L / 2>(narrow<L>(x, bf16{}), std::make_index_sequence<L>{});
}

template <int L, class V, size_t... I>
NSK_INLINE V swap_halves(V x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, ((I + L / 2) % L)...);
}

template <int L>
NSK_INLINE Vec<float, L> widen(Vec<uint16_t, L> h, f16) {
#if defined(__F16C__)
  if constexpr (L == 8) return (Vec<float, L>)_mm256_cvtph_ps((__m128i)h);
#endif
#if defined(__AVX512F__)
  if constexpr (L == 16) return (Vec<float, L>)_mm512_cvtph_ps((__m256i)h);
#endif
#if defined(__aarch64__)
  return __builtin_convertvector((Vec<__fp16, L>)h, Vec<float, L>);
#else
  Vec<float, L> x;
  for (int i = 0; i < L; ++i) x[i] = to_float(f16{h[i]});
  return x;
#endif
}

template <int L>
NSK_INLINE Vec<uint16_t, L> narrow(Vec<float, L> x, f16) {
#if defined(__F16C__)
  if constexpr (L == 8) return (Vec<uint16_t, L>)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__AVX512F__)
  if constexpr (L == 16) return (Vec<uint16_t, L>)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__aarch64__)
  return (Vec<uint16_t, L>)__builtin_convertvector(x, Vec<__fp16, L>);
#else
  Vec<uint16_t, L> h;
  for (int i = 0; i < L; ++i) h[i] = to_f16(x[i]).bits;
  return h;
#endif
}

// L elements of storage type T as lanes of C, and back with one rounding.
template <class C, int L, class T>
NSK_INLINE Vec<C, L> load_as(const T* p) {
  if constexpr (sizeof(T) == 2)
    return widen<L>(load<Vec<uint16_t, L>>(p), T{});
  else if constexpr (sizeof(T) == sizeof(C))
    return load<Vec<C, L>>(p);
  else
    return __builtin_convertvector(load<Vec<T, L>>(p), Vec<C, L>);
}
template <class C, int L, class T>
NSK_INLINE void store_as(T* p, Vec<C, L> v) {
  if constexpr (sizeof(T) == 2)
    store(p, narrow<L>(v, T{}));
  else if constexpr (sizeof(T) == sizeof(C))
    store(p, v);
  else
    store(p, __builtin_convertvector(v, Vec<T, L>));
}

// The first `bytes` < sizeof(V) bytes of a vector, and 0 after them; and back. Touches no byte beyond.
template <class V>
NSK_INLINE V load_bytes(const void* p, ptrdiff_t bytes) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint64_t mask = (uint64_t{1} << bytes) - 1;
  if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_loadu_epi8(mask, p);
  if constexpr (sizeof(V) == 32) return (V)_mm256_maskz_loadu_epi8(uint32_t(mask), p);
  if constexpr (sizeof(V) == 16) return (V)_mm_maskz_loadu_epi8(uint16_t(mask), p);
#endif
  V v{};
  __builtin_memcpy(&v, p, size_t(bytes));
  return v;
}
template <class V>
NSK_INLINE void store_bytes(void* p, V v, ptrdiff_t bytes) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint64_t mask = (uint64_t{1} << bytes) - 1;
  if constexpr (sizeof(V) == 64) return _mm512_mask_storeu_epi8(p, mask, (__m512i)v);
  if constexpr (sizeof(V) == 32) return _mm256_mask_storeu_epi8(p, uint32_t(mask), (__m256i)v);
  if constexpr (sizeof(V) == 16) return _mm_mask_storeu_epi8(p, uint16_t(mask), (__m128i)v);
#endif
  __builtin_memcpy(p, &v, size_t(bytes));
}

// As load_as and store_as for the first n < L elements; missing lanes read as 0.
template <class C, int L, class T>
NSK_INLINE Vec<C, L> load_partial(const T* p, ptrdiff_t n) {
  if constexpr (sizeof(T) == 2)
    return widen<L>(load_bytes<Vec<uint16_t, L>>(p, 2 * n), T{});
  else if constexpr (sizeof(T) == sizeof(C))
    return load_bytes<Vec<C, L>>(p, n * ptrdiff_t(sizeof(T)));
  else
    return __builtin_convertvector((load_bytes<Vec<T, L>>(p, n * ptrdiff_t(sizeof(T)))), Vec<C, L>);
}
template <class C, int L, class T>
NSK_INLINE void store_partial(T* p, Vec<C, L> v, ptrdiff_t n) {
  if constexpr (sizeof(T) == 2)
    store_bytes(p, narrow<L>(v, T{}), 2 * n);
  else if constexpr (sizeof(T) == sizeof(C))
    store_bytes(p, v, n * ptrdiff_t(sizeof(T)));
  else
    store_bytes(p, __builtin_convertvector(v, Vec<T, L>), n * ptrdiff_t(sizeof(T)));
}

// The first n elements, or all L where n is no less.
template <class C, int L, class T>
NSK_INLINE Vec<C, L> load_up_to(const T* p, ptrdiff_t n) {
  return n >= L ? load_as<C, L>(p) : load_partial<C, L>(p, n);
}
template <class C, int L, class T>
NSK_INLINE void store_up_to(T* p, Vec<C, L> v, ptrdiff_t n) {
  if (n >= L)
    store_as<C, L>(p, v);
  else
    store_partial<C, L>(p, v, n);
}

// ---- transpose --------------------------------------------------------------------------------------------------

template <int S, bool High, int L, class V, size_t... I>
NSK_INLINE V exchange(V a, V b, std::index_sequence<I...>) {
  // Lanes of a and b whose index differs in bit S trade places: the step S of a butterfly transpose.
  return __builtin_shufflevector(a, b, ((High ? ((I & S) ? L + I : I + S) : ((I & S) ? L + I - S : I)))...);
}

template <int S, int L, class V>
NSK_INLINE void transpose_step(V (&rows)[L]) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & S)) {
      const V a = rows[i], b = rows[i + S];
      rows[i] = exchange<S, false, L>(a, b, std::make_index_sequence<L>{});
      rows[i + S] = exchange<S, true, L>(a, b, std::make_index_sequence<L>{});
    }
}

// rows[i][j] <-> rows[j][i] for an L x L tile held in registers.
template <int L, class V>
NSK_INLINE void transpose(V (&rows)[L]) {
  if constexpr (L > 8) transpose_step<8>(rows);
  if constexpr (L > 4) transpose_step<4>(rows);
  if constexpr (L > 2) transpose_step<2>(rows);
  if constexpr (L > 1) transpose_step<1>(rows);
}

}  // namespace nsk::NSK_ISA
