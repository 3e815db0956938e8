// The forward of residual MLPs, whole networks in one launch.
//
//   h = x;  for each block { t = h;  layers_per_block times t = act(LayerNorm(t W^T + b));  h += t };  y = h
//
// Rows never meet, so a block of threads takes a tile of kRows rows through all layers and only weights stream, once
// per tile. gridDim.y is the groups; gridDim.x blocks share a group's tiles, each takes every gridDim.x-th. Tiles of 16
// rows are for few rows, where a layer's latency is all there is; those of 32 read the weights half as often.
//
// Eight warps cut the tile by columns: a warp computes all rows of kWidth / 8 columns. Who owns what:
//   h         fp32, in registers, in the layout of mma's sums: a thread has the same elements of h, of z and of t
//   t         rounded to T, in shared memory: what all warps multiply, and each wrote its columns of
//   weights   in shared memory, a ring for each warp, which no other reads (residual_mlp_weights.cuh)
//   z         fp32, in registers: sums of the products, plus the bias
//
// Two barriers a layer:
//   1. t has been written by all before anybody multiplies it; and the statistics of the layer before have been read by
//      all before anybody writes those of this one
//   2. the statistics have been written by all before anybody reads them; and t has been read by all before anybody
//      overwrites it
// The end of a tile needs none: its last step after barrier 2 touches registers and statistics only.
#pragma once

#include "residual_mlp_layer.cuh"

namespace nsk::cuda {

template <class T, int kWidth, int kRows, Activation kActivation>
__global__ void __launch_bounds__(MlpTile<T, kWidth, kRows>::kThreads, MlpTile<T, kWidth, kRows>::kResident)
    residual_mlp_forward(const __grid_constant__ MlpForwardArgs<T> args) {
  using Tile = MlpTile<T, kWidth, kRows>;
  NSK_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t group = blockIdx.y, tiles = (args.rows + kRows - 1) / kRows;
  const int64_t own_tiles = (tiles - int64_t(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  if (own_tiles <= 0) return;

  MlpWeights<Tile, MlpForwardOrder> weights(args, group, own_tiles, warp, lane, shared);
  const MlpLayer<Tile> tile(shared, warp, lane);
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t row0 = i * kRows;
    const int rows = int(min(args.rows - row0, int64_t(kRows)));
    // Rows past the last one are 0 to begin with. What becomes of them nobody reads.
    typename Tile::Fragments h, t;
    tile.for_pairs([&](int m, int n, int half, int row, int column) {
      float2 pair = make_float2(0, 0);
      if (row < rows) pair = load_pair<T>(args.x.template at<T>(group, row0 + row, 0), column, args.x.is_float);
      t[m][n][2 * half] = h[m][n][2 * half] = pair.x;
      t[m][n][2 * half + 1] = h[m][n][2 * half + 1] = pair.y;
    });

    Global<float> stream = args.stream;
    if (stream) stream += group * args.stream_group_stride + row0 * kWidth;
    for (int layer = 0, of_block = 0; layer < args.depth; ++layer) {
      if (of_block == 0 && stream) {
        tile.for_pairs([&](int m, int n, int half, int row, int column) {
          if (row < rows)
            *as<float2>(stream + (row * kWidth + column)) = make_float2(h[m][n][2 * half], h[m][n][2 * half + 1]);
        });
        stream += args.stream_block_stride;
      }
      tile.template put<Tile::kActivations>(t);
      __syncthreads();  // barrier 1
      tile.template multiply<Tile::kActivations>(weights, t);
      tile.measure(weights, t);
      __syncthreads();  // barrier 2
      float rstd[Tile::kRowsOfThread];
      tile.normalise(args.eps, t, rstd);
      tile.template activate_all<kActivation>(weights, t);
      if (++of_block == args.layers_per_block) {
        of_block = 0;
        tile.for_pairs([&](int m, int n, int half, int, int) {
          t[m][n][2 * half] = h[m][n][2 * half] += t[m][n][2 * half];
          t[m][n][2 * half + 1] = h[m][n][2 * half + 1] += t[m][n][2 * half + 1];
        });
      }
    }

    tile.for_pairs([&](int m, int n, int half, int row, int column) {
      if (row < rows)
        store_pair<T>(args.y.template at<T>(group, row0 + row, 0), column, args.y.is_float,
                      make_float2(h[m][n][2 * half], h[m][n][2 * half + 1]));
    });
  }
}

}  // namespace nsk::cuda
