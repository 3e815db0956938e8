// From the C ABI's description of a call of gated attention to the kernels' own, and which kernel serves it.
#pragma once

#include "gated_sdpa_backward_problem.cuh"
#include "launch.cuh"

namespace nsk::cuda {

template <int kD_, int kDv_>
struct HeadDims {
  static constexpr int kD = kD_, kDv = kDv_;
};

// Calls f.operator()<HeadDims<...>>() for the pair that is asked for; NSK_BAD_ARGUMENT if it is none of them.
template <class... Pairs>
struct HeadDimsList {
  template <class F>
  static nsk_status find(int64_t d, int64_t dv, const F& f) {
    nsk_status status = NSK_BAD_ARGUMENT;
    (void)((Pairs::kD == d && Pairs::kDv == dv && (status = f.template operator()<Pairs>(), true)) || ...);
    return status;
  }
};

template <class T>
TensorOfEither<T> either(const nsk_view& v) {
  const bool is_float = sizeof(T) == 2 && v.dtype == NSK_F32;
  return {Global<const unsigned char>(static_cast<const unsigned char*>(v.data)), is_float};
}
inline Strides strides(const nsk_view& v) { return {v.stride[0], v.stride[1], v.stride[2]}; }
template <class T>
Global<T> pointer(const nsk_view& v) {
  return Global<T>(static_cast<T*>(v.data));
}

// A bound beyond every key is none; so sums with one stay far from overflow.
inline int window(int64_t bound, const nsk_gated_sdpa& a) {
  return bound > a.seqlen_q + a.seqlen_k ? -1 : int(bound);
}

template <class T>
GatedSdpa<T> problem_of(const nsk_gated_sdpa& a) {
  GatedSdpa<T> p{};
  p.batch = int(a.batch), p.heads_q = int(a.heads_q), p.heads_kv = int(a.heads_kv);
  p.seqlen_q = int(a.seqlen_q), p.seqlen_k = int(a.seqlen_k);
  p.query = pointer<const T>(a.query), p.key = pointer<const T>(a.key), p.value = pointer<const T>(a.value);
  p.query_stride = strides(a.query), p.key_stride = strides(a.key), p.value_stride = strides(a.value);
  p.gate = either<T>(a.gate), p.gate_stride = strides(a.gate), p.gate_kind = Gate(a.gate_kind);
  p.mask = either<T>(a.mask), p.mask_stride = strides(a.mask), p.mask_stride_key = a.mask.stride[3];
  p.sink = either<T>(a.sink), p.sink_stride = a.sink.stride[1];
  p.out = pointer<T>(a.out), p.out_stride = strides(a.out);
  p.lse = pointer<float>(a.lse), p.lse_stride = strides(a.lse);
  p.cu_seqlens_q = Global<const int32_t>(a.cu_seqlens_q), p.cu_seqlens_k = Global<const int32_t>(a.cu_seqlens_k);
  p.window_left = window(a.window_left, a), p.window_right = window(a.window_right, a);
  p.is_causal = a.is_causal, p.bottom_right = a.bottom_right;
  p.scale = float(a.scale), p.softcap = float(a.softcap);
  return p;
}

inline Mask mask_of(const nsk_gated_sdpa& a) {
  return !a.mask.data ? Mask::none : a.mask.dtype == NSK_BOOL ? Mask::boolean : Mask::floating;
}

// Calls f.operator()<kSoftcap, kMask>().
template <class F>
nsk_status with_scores_of(bool softcap, Mask mask, const F& f) {
  const auto with_mask = [&]<bool kSoftcap>() {
    switch (mask) {
      case Mask::boolean:
        return f.template operator()<kSoftcap, Mask::boolean>();
      case Mask::floating:
        return f.template operator()<kSoftcap, Mask::floating>();
      default:
        return f.template operator()<kSoftcap, Mask::none>();
    }
  };
  return softcap ? with_mask.template operator()<true>() : with_mask.template operator()<false>();
}

// One translation unit each, for a pair of head dimensions.
template <class T, class Dims>
nsk_status start_forward(const GatedSdpa<T>& p, Mask mask, const Launcher& launcher);
template <class T, class Dims>
nsk_status start_decode(const GatedSdpa<T>& p, Mask mask, int parts, const Launcher& launcher, Scratch& scratch);
template <class T, class Dims>
nsk_status start_norm(const GatedSdpaBackward<T>& p, const Launcher& launcher);
template <class T, class Dims>
nsk_status start_dq(const GatedSdpaBackward<T>& p, Mask mask, const Launcher& launcher);
template <class T, class Dims>
nsk_status start_dkdv(const GatedSdpaBackward<T>& p, Mask mask, const Launcher& launcher);
template <class T, class Dims>
nsk_status start_mask_grad(const GatedSdpaBackward<T>& p, const Launcher& launcher);

// One for all head dimensions.
template <class T>
int64_t sink_parts(const GatedSdpa<T>& p);
template <class T>
nsk_status start_rows(const GatedSdpaBackward<T>& p, int columns, const Launcher& launcher);
template <class T>
nsk_status start_sink(const GatedSdpaBackward<T>& p, const nsk_view& gradient, const Launcher& launcher);

}  // namespace nsk::cuda
