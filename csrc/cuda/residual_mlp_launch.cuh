// From the C ABI's description of a residual MLP to the kernels' own, and how its rows are spread over the device.
#pragma once

#include "launch.cuh"
#include "residual_mlp_backward_problem.cuh"

namespace nsk::cuda {

template <int... kWidths>
struct WidthList {
  static constexpr int32_t kNumbers[] = {kWidths..., 0};
  template <class F>
  static nsk_status find(int64_t width, const F& f) {
    nsk_status status = NSK_BAD_ARGUMENT;
    (void)((kWidths == width && (status = f.template operator()<kWidths>(), true)) || ...);
    return status;
  }
};

template <class Byte>
MlpTensor<Byte> mlp_tensor(const nsk_view& v, int along) {
  return {Global<Byte>(static_cast<Byte*>(v.data)), v.stride[0], v.stride[along], v.dtype == NSK_F32};
}
template <class Byte>
MlpTensor<Byte> rows_tensor(const nsk_view& v) {
  return mlp_tensor<Byte>(v, 2);
}
template <class Byte>
MlpTensor<Byte> layers_tensor(const nsk_view& v) {
  return mlp_tensor<Byte>(v, 1);
}

template <class T>
void describe(MlpNetwork<T>& n, const nsk_residual_mlp& a) {
  using Byte = const unsigned char;
  n.rows = a.rows, n.depth = int(a.depth), n.layers_per_block = int(a.layers_per_block), n.eps = float(a.eps);
  n.weight = Global<const T>(static_cast<const T*>(a.weight.data));
  n.weight_group_stride = a.weight.stride[0], n.weight_stride = a.weight.stride[1];
  n.bias = layers_tensor<Byte>(a.bias), n.ln_weight = layers_tensor<Byte>(a.ln_weight);
  n.ln_bias = layers_tensor<Byte>(a.ln_bias);
}

// Tiles of 32 rows read the weights half as often, those of 16 keep more multiprocessors busy. `blocks` share a group's.
struct RowTiles {
  int rows_of_tile;
  int64_t tiles, blocks;
};
inline RowTiles row_tiles_of(const nsk_residual_mlp& a, const nsk_cuda_device& device, int shared_of_32) {
  const bool large = a.groups * ((a.rows + 31) / 32) >= device.multiprocessors && shared_of_32 <= device.shared_bytes;
  const int rows = large ? 32 : 16;
  const int64_t tiles = (a.rows + rows - 1) / rows;
  // Three blocks fit on a multiprocessor at best; more would only wait.
  const int64_t share = (3 * int64_t(device.multiprocessors) + a.groups - 1) / a.groups;
  return {rows, tiles, tiles < share ? tiles : share};
}

template <class F>
nsk_status with_activation(int32_t activation, const F& f) {
  switch (activation) {
    case NSK_SILU:
      return f.template operator()<Activation::silu>();
    case NSK_RELU:
      return f.template operator()<Activation::relu>();
    case NSK_GELU_TANH:
      return f.template operator()<Activation::gelu_tanh>();
    default:
      return NSK_BAD_ARGUMENT;
  }
}
template <class F>
nsk_status with_rows(int rows, const F& f) {
  return rows == 32 ? f.template operator()<32>() : f.template operator()<16>();
}

// One translation unit each, for a width.
template <class T, int kWidth>
nsk_status start_forward(const nsk_residual_mlp& a, const Launcher& launcher);
template <class T, int kWidth>
nsk_status start_backward(const nsk_residual_mlp_backward& a, const Launcher& launcher, Scratch& scratch, bool counts);

}  // namespace nsk::cuda
