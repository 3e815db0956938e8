// Starts the backward of networks of one width: the chain through all layers, then, where parameters want them, the
// gradients of weights and vectors.
#pragma once

#include "residual_mlp_backward.cuh"
#include "residual_mlp_launch.cuh"
#include "residual_mlp_vector_gradient.cuh"
#include "residual_mlp_weight_gradient.cuh"

namespace nsk::cuda {

// With `counts` nothing is started: the scratch has counted what it would take.
template <class T, int kWidth>
nsk_status start_backward(const nsk_residual_mlp_backward& a, const Launcher& launcher, Scratch& scratch,
                          bool counts) {
  const nsk_residual_mlp& f = a.forward;
  if (f.rows == 0 || f.groups == 0) return NSK_OK;
  const int64_t blocks = f.depth / f.layers_per_block, matrix = f.rows * kWidth;
  const RowTiles tiles = row_tiles_of(f, launcher.device, MlpBackwardTile<T, kWidth, 32>::kSharedBytes);
  const int parked = tiles.rows_of_tile == 32 ? MlpBackwardTile<T, kWidth, 32>::kParked
                                              : MlpBackwardTile<T, kWidth, 16>::kParked;

  MlpBackwardArgs<T> args{};
  describe(args, f);
  nsk_residual_mlp again = f;
  if (!f.stream.data) {
    again.stream = {scratch.take<float>(f.groups * blocks * matrix), {blocks * matrix, matrix, kWidth, 1}, NSK_F32};
    again.y = {scratch.take<float>(f.groups * matrix), {matrix, 0, kWidth, 1}, NSK_F32};
  }
  args.stream = Global<const float>(static_cast<const float*>(again.stream.data));
  args.stream_group_stride = again.stream.stride[0], args.stream_block_stride = again.stream.stride[1];
  args.dy = rows_tensor<const unsigned char>(a.grad_y);
  args.dx = rows_tensor<unsigned char>(a.grad_x);
  if (!a.grad_x.data) args.dx = {scratch.take<unsigned char>(f.groups * matrix * 4), matrix, kWidth, true};
  if (a.grad_weight.data) {
    args.inputs = scratch.take<T>(f.groups * f.depth * matrix);
    args.gradients = scratch.take<T>(f.groups * f.depth * matrix);
  }
  args.operand_group_stride = f.depth * matrix, args.operand_layer_stride = matrix;
  const bool wants_vectors = a.grad_bias.data || a.grad_ln_weight.data || a.grad_ln_bias.data;
  if (wants_vectors) args.partial = scratch.take<float>(f.groups * f.depth * tiles.tiles * 3 * kWidth);
  args.parked = scratch.take<float>(f.groups * tiles.blocks * (f.layers_per_block - 1) * parked);
  // A gradient that is not wanted, of vectors that come together.
  const auto vectors = [&](const nsk_view& v) {
    if (v.data) return layers_tensor<unsigned char>(v);
    return MlpTensor<unsigned char>{scratch.take<unsigned char>(f.groups * f.depth * kWidth * 4), f.depth * kWidth,
                                    kWidth, true};
  };
  MlpVectorGradientArgs of_vectors{tiles.tiles, args.partial, {}, {}, {}};
  if (wants_vectors) {
    of_vectors.dbias = vectors(a.grad_bias), of_vectors.dgamma = vectors(a.grad_ln_weight);
    of_vectors.dbeta = vectors(a.grad_ln_bias);
  }
  if (counts) return NSK_OK;

  if (!f.stream.data) {
    const nsk_status status = start_forward<T, kWidth>(again, launcher);
    if (status != NSK_OK) return status;
  }
  const nsk_status status = with_rows(tiles.rows_of_tile, [&]<int kRows>() {
    return with_activation(f.activation, [&]<Activation kActivation>() {
      using Tile = MlpBackwardTile<T, kWidth, kRows>;
      return launcher.start<residual_mlp_backward<T, kWidth, kRows, kActivation>>(
          "residual_mlp_backward", {tiles.blocks, f.groups}, Tile::kThreads, Tile::kSharedBytes, args);
    });
  });
  if (status != NSK_OK) return status;
  if (a.grad_weight.data) {
    using Tile = MlpWeightGradientTile<T>;
    const MlpWeightGradientArgs<T> of_weights{f.rows,
                                              args.inputs,
                                              args.gradients,
                                              args.operand_group_stride,
                                              args.operand_layer_stride,
                                              layers_tensor<unsigned char>(a.grad_weight)};
    constexpr int kAcross = kWidth / Tile::kSide;
    const nsk_status status = launcher.start<residual_mlp_weight_gradient<T, kWidth>>(
        "residual_mlp_weight_gradient", {kAcross * kAcross, f.depth, f.groups}, Tile::kThreads, Tile::kSharedBytes,
        of_weights);
    if (status != NSK_OK) return status;
  }
  if (!wants_vectors) return NSK_OK;
  return launcher.start<residual_mlp_vector_gradient<T, kWidth>>(
      "residual_mlp_vector_gradient", {3, f.depth, f.groups}, kWidth / 2, 0, of_vectors);
}

}  // namespace nsk::cuda
