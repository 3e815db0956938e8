// What the tests of residual MLPs share: tensors as kernels see them, and activations in double.
#pragma once

#include <cmath>
#include <cstring>

#include "../../csrc/cuda/residual_mlp_operands.cuh"
#include "harness.h"

namespace nsk::test {

using cuda::Activation, cuda::MlpTensor;

// What is in memory: [outer][inner][width] with gaps, in T or in float, as tf32 always is; and the numbers that it
// stands for.
template <class T>
struct Tensor {
  Tensor(int64_t outer, int64_t inner, int width, bool is_float, int gap = 8)
      : outer(outer), inner(inner), width(width), stride(width + gap), is_float(is_float || sizeof(T) == 4),
        bytes(size_t(outer * outer_stride()) * (is_float ? 4 : sizeof(T))) {}

  size_t element_bytes() const { return is_float ? 4 : sizeof(T); }
  int64_t outer_stride() const { return inner * stride + 16; }
  size_t index(int64_t o, int64_t i, int c) const { return size_t(o * outer_stride() + i * stride + c); }
  double at(int64_t o, int64_t i, int c) const {
    float x;
    T t;
    if (is_float) return std::memcpy(&x, bytes.data() + index(o, i, c) * sizeof(x), sizeof(x)), x;
    return std::memcpy(&t, bytes.data() + index(o, i, c) * sizeof(t), sizeof(t)), to_float(t);
  }
  Tensor& fill(uint64_t seed, float mean, float deviation) {
    const std::vector<float> values = normal(bytes.size() / (is_float ? 4 : sizeof(T)), seed);
    for (size_t i = 0; i < values.size(); ++i) {
      const float x = mean + deviation * values[i];
      const T t = from_float<T>(x);
      if (is_float)
        std::memcpy(bytes.data() + i * sizeof(x), &x, sizeof(x));
      else
        std::memcpy(bytes.data() + i * sizeof(t), &t, sizeof(t));
    }
    return *this;
  }
  // Whether only the tensor's own elements have been written to, what was there before being 0xff everywhere.
  bool kept_gaps() const {
    const size_t size = is_float ? 4 : sizeof(T);
    for (size_t i = 0; i < bytes.size(); ++i) {
      const int64_t within = int64_t(i / size) % outer_stride();
      if ((within / stride >= inner || within % stride >= width) && bytes[i] != 0xff) return false;
    }
    return true;
  }
  template <class Byte, class Data>
  MlpTensor<Byte> view(Data data) const {
    return {data, outer_stride(), stride, is_float};
  }

  int64_t outer, inner;
  int width;
  int64_t stride;
  bool is_float;
  std::vector<unsigned char> bytes;
};

inline double activated(Activation activation, double y) {
  if (activation == Activation::relu) return y > 0 ? y : 0;
  if (activation == Activation::silu) return y / (1 + std::exp(-y));
  return 0.5 * y * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
}

// act'(y)
inline double slope(Activation activation, double y) {
  if (activation == Activation::relu) return y > 0;
  if (activation == Activation::silu) {
    const double s = 1 / (1 + std::exp(-y));
    return s * (1 + y * (1 - s));
  }
  const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (y + 0.044715 * y * y * y));
  return 0.5 * (1 + t) + 0.5 * y * (1 - t * t) * c * (1 + 3 * 0.044715 * y * y);
}

}  // namespace nsk::test
