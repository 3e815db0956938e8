// Activations and their gradients, of one number.
#pragma once

#include "residual_mlp_problem.cuh"

namespace nsk::cuda {

// 1 / (1 + exp(-u))
__device__ __forceinline__ float sigmoid(float u) {
  constexpr float kLog2e = 1.4426950408889634f;
  return rcp_approx(1.0f + exp2_approx(-kLog2e * u));
}

// silu is y sigmoid(u) of u = y. So is gelu_tanh of this u: 0.5 y (1 + tanh(u / 2)) is the same.
inline constexpr float kGeluSlope = 1.5957691216057308f, kGeluCubic = 0.044715f;  // 2 sqrt(2 / pi)
template <Activation kActivation>
__device__ __forceinline__ float gate(float y) {
  return kActivation == Activation::silu ? y : y * (y * y * (kGeluSlope * kGeluCubic) + kGeluSlope);
}

template <Activation kActivation>
__device__ __forceinline__ float activate(float y) {
  if constexpr (kActivation == Activation::relu)
    return y < 0 ? 0.0f : y;  // NaN stays
  else
    return y * sigmoid(gate<kActivation>(y));
}

// da act'(y)
template <Activation kActivation>
__device__ __forceinline__ float activate_backward(float y, float da) {
  if constexpr (kActivation == Activation::relu) {
    return y <= 0 ? 0.0f : da;  // whatever da is; y that is NaN makes NaN below, as xhat is NaN
  } else {
    const float s = sigmoid(gate<kActivation>(y));
    const float slope = kActivation == Activation::silu ? 1.0f : y * y * (3 * kGeluSlope * kGeluCubic) + kGeluSlope;
    return da * (s + s * (1.0f - s) * y * slope);
  }
}

}  // namespace nsk::cuda
