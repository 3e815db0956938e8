// What forward and backward of gated attention share: where a sequence lies, what a row of the problem is, and how
// one row of any tensor is read.
#pragma once

#include "../common/mask.h"
#include "../include/nsk.h"
#include "memory.h"
#include "pack.h"
#include "parallel.h"
#include "vmath.h"

namespace nsk::NSK_ISA {

constexpr int64_t greatest_common_divisor(int64_t x, int64_t y) { return y ? greatest_common_divisor(y, x % y) : x; }

struct Sequence {
  int64_t batch;             // index into batch strides (those are 0 for packed sequences)
  int64_t q_start, q_len;    // rows of query, gate, out, lse
  int64_t k_start, k_len;    // rows of key, value
  PositionMask mask;
};

inline Sequence sequence(const nsk_gated_sdpa& a, int64_t n) {
  Sequence s{n, 0, a.seqlen_q, 0, a.seqlen_k, {}};
  if (a.cu_seqlens_q) {
    s.q_start = a.cu_seqlens_q[n];
    s.q_len = a.cu_seqlens_q[n + 1] - s.q_start;
    s.k_start = a.cu_seqlens_k[n];
    s.k_len = a.cu_seqlens_k[n + 1] - s.k_start;
  }
  s.mask = PositionMask::make(s.q_len, s.k_len, a.is_causal, a.bottom_right, a.window_left, a.window_right);
  return s;
}

template <class T>
NSK_INLINE T* at(const nsk_view& v, int64_t b, int64_t h, int64_t i) {
  return static_cast<T*>(v.data) + b * v.stride[0] + h * v.stride[1] + i * v.stride[2];
}

// One element of a tensor whose type is known only at run time.
inline double load_scalar(const nsk_view& v, int64_t offset) {
  switch (v.dtype) {
    case NSK_F64: return static_cast<const double*>(v.data)[offset];
    case NSK_BF16: return to_float(static_cast<const bf16*>(v.data)[offset]);
    case NSK_F16: return to_float(static_cast<const f16*>(v.data)[offset]);
    default: return static_cast<const float*>(v.data)[offset];
  }
}
inline void store_scalar(const nsk_view& v, int64_t offset, double x) {
  switch (v.dtype) {
    case NSK_F64: static_cast<double*>(v.data)[offset] = x; break;
    case NSK_BF16: static_cast<bf16*>(v.data)[offset] = from_float<bf16>(x); break;
    case NSK_F16: static_cast<f16*>(v.data)[offset] = from_float<f16>(x); break;
    default: static_cast<float*>(v.data)[offset] = float(x);
  }
}
inline int64_t offset(const nsk_view& v, int64_t b, int64_t h, int64_t i, int64_t j = 0) {
  return b * v.stride[0] + h * v.stride[1] + i * v.stride[2] + j * v.stride[3];
}

template <class D>
constexpr int32_t kDtype = sizeof(D) == 8 ? NSK_F64 : NSK_F32;
template <>
inline constexpr int32_t kDtype<bf16> = NSK_BF16;
template <>
inline constexpr int32_t kDtype<f16> = NSK_F16;

// The first min(n, L) elements of a row with unit stride whose type is T or, mixed, float: the gate and its gradient.
template <class C, int L, class T>
NSK_INLINE Vec<C, L> load_mixed(const nsk_view& v, int64_t at, ptrdiff_t n) {
  auto get = [&](auto* p) { return n >= L ? load_as<C, L>(p + at) : load_partial<C, L>(p + at, n); };
  return v.dtype == kDtype<T> ? get(static_cast<const T*>(v.data)) : get(static_cast<const float*>(v.data));
}
template <class C, int L, class T>
NSK_INLINE void store_mixed(const nsk_view& v, int64_t at, Vec<C, L> x, ptrdiff_t n) {
  auto put = [&](auto* p) { n >= L ? store_as<C, L>(p + at, x) : store_partial<C, L>(p + at, x, n); };
  v.dtype == kDtype<T> ? put(static_cast<T*>(v.data)) : put(static_cast<float*>(v.data));
}

template <class C>
inline C scalar_sigmoid(C x) {
  return sigmoid<C, kLanes<C>>(splat<C, kLanes<C>>(x))[0];
}

// The constants of a score: s = scale * acc, or cap * tanh(to_tanh * acc). Scores are in units of `unit`: 1, or log(2),
// which spares the exponential a multiplication.
template <class C>
struct ScoreScale {
  C scale, to_tanh, cap;
  bool softcap;
  double unit;

  explicit ScoreScale(const nsk_gated_sdpa& a, double unit_ = 1)
      : scale(C(a.scale / unit_)), to_tanh(a.softcap > 0 ? C(a.scale / a.softcap) : C(0)), cap(C(a.softcap / unit_)),
        softcap(a.softcap > 0), unit(unit_) {}
};

// One row (query i of head h) of a tile, and the keys it may see by position.
struct Row {
  int64_t head, i;
  int64_t begin, end;
};

template <class C>
inline constexpr C kInfinity = C(__builtin_inf());

}  // namespace nsk::NSK_ISA
