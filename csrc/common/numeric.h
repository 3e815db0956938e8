// Storage types and their scalar conversions, in plain integer arithmetic: the same bits on every machine.
#pragma once

#include <cstdint>

namespace nsk {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
constexpr To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}

constexpr float to_float(float x) { return x; }
constexpr double to_float(double x) { return x; }

constexpr float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

constexpr float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // inf, NaN
    return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x0400u) {  // zero, subnormal: an exact multiple of 2^-24
    const float value = float(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

// Round to nearest, ties to even; NaN stays a (quiet) NaN.
constexpr bf16 to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

constexpr f16 to_f16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {                                    // below 2^-14: subnormal
    // Adding 0.5 aligns the last bit kept with the last bit of the sum, so the addition does the rounding.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13))};
}

template <class T>
constexpr T from_float(double x);
template <>
constexpr double from_float<double>(double x) {
  return x;
}
template <>
constexpr float from_float<float>(double x) {
  return float(x);
}
template <>
constexpr bf16 from_float<bf16>(double x) {
  return to_bf16(float(x));
}
template <>
constexpr f16 from_float<f16>(double x) {
  return to_f16(float(x));
}

}  // namespace nsk
