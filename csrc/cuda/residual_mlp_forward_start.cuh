// Starts the forward of networks of one width.
#pragma once

#include "residual_mlp_forward.cuh"
#include "residual_mlp_launch.cuh"

namespace nsk::cuda {

template <class T, int kWidth>
nsk_status start_forward(const nsk_residual_mlp& a, const Launcher& launcher) {
  if (a.rows == 0 || a.groups == 0) return NSK_OK;
  MlpForwardArgs<T> args{};
  describe(args, a);
  args.x = rows_tensor<const unsigned char>(a.x);
  args.y = rows_tensor<unsigned char>(a.y);
  args.stream = Global<float>(static_cast<float*>(a.stream.data));
  args.stream_group_stride = a.stream.stride[0], args.stream_block_stride = a.stream.stride[1];
  const RowTiles tiles = row_tiles_of(a, launcher.device, MlpTile<T, kWidth, 32>::kSharedBytes);
  return with_rows(tiles.rows_of_tile, [&]<int kRows>() {
    return with_activation(a.activation, [&]<Activation kActivation>() {
      using Tile = MlpTile<T, kWidth, kRows>;
      return launcher.start<residual_mlp_forward<T, kWidth, kRows, kActivation>>(
          "residual_mlp_forward", {tiles.blocks, a.groups}, Tile::kThreads, Tile::kSharedBytes, args);
    });
  });
}

}  // namespace nsk::cuda
