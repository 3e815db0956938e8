// exp2, tanh and sigmoid on vectors of float or double.
//
// exp2(x) = 2^n (1 + f p(f)) with n = round(x), |f| <= 1/2 and p the Chebyshev interpolant of (2^f - 1) / f:
// relative error 5e-9 (float, rounding aside) and 8e-18 (double).
#pragma once

#include "simd.h"

namespace nsk::NSK_ISA {

inline constexpr double kLog2e = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

// Adding round_magic rounds to an integer n and leaves n + bias in the low bits, where a shift makes it the exponent
// of 2^n and drops the rest.
template <class C>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  static constexpr float round_magic = 0x1.8p23f + 127;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float exp2_poly[] = {0.69314718802622878106f, 0.24022650760568126945f, 0.055503571142190778186f,
                                        0.0096180825572778514913f, 0.0013390863364671234381f,
                                        0.00015453162945120690177f};
  // The same with relative error 2e-7, where the result is rounded to bf16 anyway.
  static constexpr float exp2_short[] = {0.69314718055994510f, 0.24022349038020377f, 0.05550381013797239f,
                                         0.009666368515384414f, 0.0013381302536962971f};
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860677e-6f;
  static constexpr float expm1_poly[] = {0.50000000135387298866f, 0.16666666681704215043f, 0.041666464197405692315f,
                                         0.0083333108446478625642f, 0.0013933730715792082502f,
                                         0.00019891080463998842039f};
  static constexpr float tanh_saturates = 10.0f;
};

template <>
struct ExpTraits<double> {
  static constexpr double round_magic = 0x1.8p52 + 1023;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double exp2_poly[] = {0.69314718055994530942,   0.2402265069591009822,    0.055504108664821594339,
                                         0.0096181291076068885273, 0.001333355814641693531,  0.00015403530441736050155,
                                         0.000015252733829836118394, 1.3215442587921689653e-6,
                                         1.0178062445845773521e-7, 7.0725859492692236999e-9, 4.4549605981865183938e-10};
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double expm1_poly[] = {0.5, 0.16666666666666666667, 0.041666666666666676865,
                                          0.0083333333333333340131, 0.0013888888888879003084,
                                          0.00019841269841263251867, 0.000024801587336630946966,
                                          2.7557319247344509509e-6, 2.7557263077309411451e-7, 2.5052070959803661989e-8,
                                          2.0918212319133978201e-9, 1.6086677666787361503e-10};
  static constexpr double tanh_saturates = 20.0;
};

// sum_i poly[i] x^i. Pairs first (Estrin): a shorter chain of dependent operations than Horner's.
template <class C, int L, size_t N>
NSK_INLINE Vec<C, L> polynomial(Vec<C, L> x, const C (&poly)[N]) {
  constexpr int kPairs = int(N + 1) / 2;
  Vec<C, L> y = splat<C, L>(poly[2 * kPairs - 2]);
  if constexpr (N % 2 == 0) y += x * poly[N - 1];
  const Vec<C, L> x2 = x * x;
#pragma GCC unroll 8
  for (int i = kPairs - 2; i >= 0; --i) y = y * x2 + (x * poly[2 * i + 1] + poly[2 * i]);
  return y;
}

// 2^n for integral n in [-bias, bias + 1], given as shifted = n + round_magic; the ends give 0 and inf.
template <class C, int L>
NSK_INLINE Vec<C, L> power_of_two(Vec<C, L> shifted) {
  return (Vec<C, L>)((Vec<Int<C>, L>)shifted << ExpTraits<C>::mantissa_bits);
}

// Leaves x - round(x) in x and returns what scale_exponent takes to multiply by 2^round(x): the integer itself where
// the processor has an instruction for that, else the power. `kBounded`: no x is above bias + 1.
template <bool kBounded, class C, int L>
NSK_INLINE Vec<C, L> split_exponent(Vec<C, L>& x) {
  using T = ExpTraits<C>;
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4 && L == 16) {
    const Vec<C, L> n = (Vec<C, L>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x -= n;  // NaN for infinities, which scaling by infinity nevertheless makes 0 and inf
    return n;
  }
#endif
  x = max_keep<C, L>(splat<C, L>(C(-T::bias)), x);
  if constexpr (!kBounded) x = min_keep<C, L>(splat<C, L>(C(T::bias + 1)), x);
  const Vec<C, L> shifted = x + T::round_magic;
  x -= shifted - T::round_magic;
  return power_of_two<C, L>(shifted);
}
template <class C, int L>
NSK_INLINE Vec<C, L> scale_exponent(Vec<C, L> y, Vec<C, L> scale) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4 && L == 16) return (Vec<C, L>)_mm512_scalef_ps((__m512)y, (__m512)scale);
#endif
  return y * scale;
}

// exp2 of N vectors. Results below the normal range are 0 or denormal; NaN stays NaN; exp2(0) == 1, exp2(-inf) and
// exp2(inf) are exact. Step by step over all N, so that their chains of dependent operations run side by side.
template <bool kBounded, class C, int L, int N, size_t kTerms>
NSK_INLINE void exp2_all(Vec<C, L> (&x)[N], const C (&poly)[kTerms]) {
  Vec<C, L> scale[N], y[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) scale[i] = split_exponent<kBounded, C, L>(x[i]);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) y[i] = x[i] * poly[kTerms - 1] + poly[kTerms - 2];
#pragma GCC unroll 16
  for (int k = int(kTerms) - 3; k >= 0; --k)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) y[i] = y[i] * x[i] + poly[k];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) x[i] = scale_exponent<C, L>(y[i] * x[i] + C(1), scale[i]);
}

// Probabilities, in the precision that products of Math type M keep.
template <class M, bool kBounded, int N>
NSK_INLINE void probabilities_exp2(typename M::V (&x)[N]) {
  using T = ExpTraits<typename M::C>;
  if constexpr (M::pack == 2)
    exp2_all<kBounded, typename M::C, M::L>(x, T::exp2_short);
  else
    exp2_all<kBounded, typename M::C, M::L>(x, T::exp2_poly);
}

template <class C, int L>
NSK_INLINE Vec<C, L> exp2(Vec<C, L> x) {
  Vec<C, L> one[1] = {x};
  exp2_all<false, C, L>(one, ExpTraits<C>::exp2_poly);
  return one[0];
}

// 1 / x of normal numbers whose reciprocals are normal too, to one unit in the last place or so.
template <class C, int L>
NSK_INLINE Vec<C, L> reciprocal(Vec<C, L> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4 && L == 16) {  // 14 bits, and a step of Newton's
    const Vec<C, L> r = (Vec<C, L>)_mm512_rcp14_ps((__m512)x);
    return r + r * (C(1) - x * r);
  }
#endif
  return C(1) / x;
}

template <class C, int L>
NSK_INLINE Vec<C, L> square_root(Vec<C, L> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4 && L == 16) return (Vec<C, L>)_mm512_sqrt_ps((__m512)x);
  if constexpr (sizeof(C) == 8 && L == 8) return (Vec<C, L>)_mm512_sqrt_pd((__m512d)x);
#endif
  for (int i = 0; i < L; ++i) x[i] = sizeof(C) == 8 ? C(__builtin_sqrt(double(x[i]))) : C(__builtin_sqrtf(float(x[i])));
  return x;
}

// sigmoid(x) of N vectors side by side in `value`, exp(-x) in x; 1 - sigmoid(x) is their product. Below -69 (float) or
// -690 (double), where sigmoid is less than 1e-30, it no longer falls. NaN stays NaN.
template <class C, int L, int N>
NSK_INLINE void sigmoid_all(Vec<C, L> (&x)[N], Vec<C, L> (&value)[N]) {
  const Vec<C, L> most = splat<C, L>(sizeof(C) == 4 ? C(100) : C(1000));
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) x[i] = min_keep<C, L>(most, x[i] * C(-kLog2e));
  if constexpr (sizeof(C) == 4)
    exp2_all<true, C, L>(x, ExpTraits<C>::exp2_short);
  else
    exp2_all<true, C, L>(x, ExpTraits<C>::exp2_poly);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) value[i] = reciprocal<C, L>(x[i] + C(1));
}

// x = n ln2 + r, with the product n ln2 in two parts so that r is exact where exp(x) is large or small.
template <class C, int L>
struct Reduced {
  Vec<C, L> shifted, r;

  explicit NSK_INLINE Reduced(Vec<C, L> x) {
    using T = ExpTraits<C>;
    shifted = x * C(kLog2e) + T::round_magic;
    const Vec<C, L> n = shifted - T::round_magic;
    r = (x - n * T::ln2_high) - n * T::ln2_low;
  }
  NSK_INLINE Vec<C, L> expm1_r() const { return polynomial<C, L>(r, ExpTraits<C>::expm1_poly) * r * r + r; }
};

// tanh(x) = e / (e + 2) with e = exp(2x) - 1, which keeps full relative accuracy near 0.
template <class C, int L>
NSK_INLINE Vec<C, L> tanh(Vec<C, L> x) {
  const Vec<C, L> limit = splat<C, L>(ExpTraits<C>::tanh_saturates);
  const Vec<C, L> clamped = min_keep<C, L>(limit, max_keep<C, L>(-limit, x));
  const Reduced<C, L> y(clamped + clamped);
  const Vec<C, L> scale = power_of_two<C, L>(y.shifted);
  const Vec<C, L> e = scale * y.expm1_r() + (scale - C(1));
  return e / (e + C(2));
}

// sigmoid(x) = 1 / (1 + exp(-x)) and 1 - sigmoid(x), each with full relative accuracy where it is small: exactly 0 and 1
// at -inf and +inf.
template <class C, int L>
struct Sigmoid {
  Vec<C, L> value, complement;
  Vec<C, L> inverse;  // 1 / value

  explicit NSK_INLINE Sigmoid(Vec<C, L> x) {
    using T = ExpTraits<C>;
    const Vec<C, L> low = splat<C, L>(C(-T::bias * kLn2)), high = splat<C, L>(C((T::bias + 1) * kLn2));
    const Reduced<C, L> y(min_keep<C, L>(high, max_keep<C, L>(low, -x)));
    const Vec<C, L> e = power_of_two<C, L>(y.shifted) * (y.expm1_r() + C(1));
    inverse = e + C(1);
    value = C(1) / inverse;
    complement = x < Vec<C, L>{} ? C(1) - value : e * value;
  }
};
template <class C, int L>
NSK_INLINE Vec<C, L> sigmoid(Vec<C, L> x) {
  return Sigmoid<C, L>(x).value;
}

}  // namespace nsk::NSK_ISA
