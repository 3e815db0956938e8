// The activations of residual MLPs on vectors: silu(y) = y sigmoid(y), relu(y), and the tanh form of gelu, which is
// y sigmoid(2 u) with u = sqrt(2 / pi) (y + 0.044715 y^3). NaN stays NaN in all of them.
#pragma once

#include "vmath.h"

namespace nsk::NSK_ISA {

enum class Activation { Silu = NSK_SILU, Relu = NSK_RELU, GeluTanh = NSK_GELU_TANH };

inline constexpr double kGeluSlope = 1.5957691216057308;  // 2 sqrt(2 / pi)
inline constexpr double kGeluCubic = 0.044715;

// The argument of the sigmoid.
template <Activation A, class C, int L, int N>
NSK_INLINE void sigmoid_argument(const Vec<C, L> (&y)[N], Vec<C, L> (&u)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    u[i] = A == Activation::Silu ? y[i] : y[i] * (y[i] * y[i] * C(kGeluSlope * kGeluCubic) + C(kGeluSlope));
}

// y becomes act(y).
template <Activation A, class C, int L, int N>
NSK_INLINE void activate(Vec<C, L> (&y)[N]) {
  if constexpr (A == Activation::Relu) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) y[i] = max_keep<C, L>(Vec<C, L>{}, y[i]);
  } else {
    Vec<C, L> u[N], s[N];
    sigmoid_argument<A, C, L>(y, u);
    sigmoid_all<C, L>(u, s);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) y[i] *= s[i];
  }
}

// y becomes act(y), and grad, of act(y), that of y. What relu stops is 0 whatever came, as in torch: not 0 * NaN.
template <Activation A, class C, int L, int N>
NSK_INLINE void activate_and_back(Vec<C, L> (&y)[N], Vec<C, L> (&grad)[N]) {
  if constexpr (A == Activation::Relu) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      grad[i] = y[i] <= Vec<C, L>{} ? Vec<C, L>{} : grad[i];
      y[i] = max_keep<C, L>(Vec<C, L>{}, y[i]);
    }
  } else {
    Vec<C, L> u[N], s[N];
    sigmoid_argument<A, C, L>(y, u);
    sigmoid_all<C, L>(u, s);  // u is now exp(-u)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const Vec<C, L> value = y[i] * s[i];
      const Vec<C, L> du = A == Activation::Silu ? y[i]
                                                 : y[i] * (y[i] * y[i] * C(3 * kGeluSlope * kGeluCubic) + C(kGeluSlope));
      grad[i] *= s[i] * (du * (u[i] * s[i]) + C(1));
      y[i] = value;
    }
  }
}

// Calls f with the activation as a type.
template <class F>
NSK_INLINE auto with_activation(int32_t activation, F&& f) {
  switch (activation) {
    case NSK_RELU: return f(std::integral_constant<Activation, Activation::Relu>{});
    case NSK_GELU_TANH: return f(std::integral_constant<Activation, Activation::GeluTanh>{});
    default: return f(std::integral_constant<Activation, Activation::Silu>{});
  }
}

}  // namespace nsk::NSK_ISA
