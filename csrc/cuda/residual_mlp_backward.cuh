// The backward of residual MLPs, whole networks in one launch: all but dW, of which it writes the operands.
//
// Tiles, warps, rings and who owns what are the forward's (residual_mlp_forward.cuh). From the stream that the forward
// kept, a tile goes down the blocks of layers:
//   again    t = h;  each layer's t, rounded, goes to `inputs`; its xhat and rstd are parked in global memory, where
//            the thread that wrote them reads them again: they hardly leave the second-level cache. What the forward
//            did is done again in the same way, to the same bits.
//   down     da = dh, the gradient of the stream; from the last layer to the first: dz, rounded, goes to `gradients`,
//            da = dz W. Then dh += da.
// The same W is read for both products (residual_mlp_weights.cuh). dh is fp32, in registers, as xhat and da are.
//
// Sums over rows leave as one share for each tile, so that no two blocks of threads write to the same place, and the
// same bits come out each time. Layers' inputs are not parked: they go out row by row, and nobody here reads them.
//
// Four barriers a layer, two for what is done again, two on the way down:
//   1. t has been written by all before anybody multiplies it
//   2. the statistics have been written by all before anybody reads them
//   3. the sums along rows have been written by all before anybody reads them
//   4. dz has been written by all before anybody multiplies it
// t and dz, statistics and sums have places of their own: whatever is overwritten has been read before a barrier of the
// other kind, or of the same kind for the layer between.
#pragma once

#include "residual_mlp_backward_layer.cuh"

namespace nsk::cuda {

// Blocks of layers from the last to the first; of each all layers up, t W^T, then down, dz W.
class MlpBackwardOrder {
 public:
  static constexpr bool kTransposes = true;

  template <class Network>
  __device__ __forceinline__ static int products(const Network& network) {
    return 2 * network.depth;
  }
  template <class Network>
  __device__ __forceinline__ void advance(const Network& network) {
    if (down_ && layer_ == first_) {
      first_ = first_ == 0 ? network.depth - network.layers_per_block : first_ - network.layers_per_block;
      layer_ = first_;
      down_ = false;
    } else if (down_) {
      --layer_;
    } else if (layer_ + 1 == first_ + network.layers_per_block) {
      down_ = true;
    } else {
      ++layer_;
    }
  }
  __device__ __forceinline__ int layer() const { return layer_; }
  __device__ __forceinline__ bool transposed() const { return down_; }
  // On the way down the LayerNorm that follows is the one below, unless the block ends; its bias is of no use.
  __device__ __forceinline__ bool brings(int vector) const { return !down_ || (vector > 0 && layer_ > first_); }
  __device__ __forceinline__ int layer_of_vectors() const { return layer_ - down_; }

 private:
  int first_ = 0, layer_ = 0;  // of the block, and now
  bool down_ = true;
};

template <class T, int kWidth, int kRows, Activation kActivation>
__global__ void __launch_bounds__(MlpBackwardTile<T, kWidth, kRows>::kThreads,
                                  MlpBackwardTile<T, kWidth, kRows>::kResident)
    residual_mlp_backward(const __grid_constant__ MlpBackwardArgs<T> args) {
  using Tile = MlpBackwardTile<T, kWidth, kRows>;
  NSK_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t group = blockIdx.y, tiles = (args.rows + kRows - 1) / kRows;
  const int64_t own_tiles = (tiles - int64_t(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  if (own_tiles <= 0) return;

  MlpWeights<Tile, MlpBackwardOrder> weights(args, group, own_tiles, warp, lane, shared);
  const MlpBackwardLayer<Tile> tile(shared, warp, lane);
  const int per_block = args.layers_per_block;
  const Global<float> parked =
      args.parked + (group * gridDim.x + blockIdx.x) * int64_t(per_block - 1) * Tile::kParked;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t row0 = i * kRows;
    const int rows = int(min(args.rows - row0, int64_t(kRows)));
    // Rows past the last one are 0 to begin with. What becomes of them nobody reads.
    typename Tile::Fragments dh, da, t;
    tile.for_pairs([&](int m, int n, int half, int row, int column) {
      float2 pair = make_float2(0, 0);
      if (row < rows) pair = load_pair<T>(args.dy.template at<T>(group, row0 + row, 0), column, args.dy.is_float);
      dh[m][n][2 * half] = pair.x;
      dh[m][n][2 * half + 1] = pair.y;
    });

    for (int first = args.depth - per_block; first >= 0; first -= per_block) {
      const Global<const float> stream = args.stream + (group * args.stream_group_stride +
                                                        first / per_block * args.stream_block_stride + row0 * kWidth);
      tile.for_pairs([&](int m, int n, int half, int row, int column) {
        float2 pair = make_float2(0, 0);
        if (row < rows) {
          const float2 kept = *as<const float2>(stream + (row * kWidth + column));
          pair = kept;
        }
        t[m][n][2 * half] = pair.x;
        t[m][n][2 * half + 1] = pair.y;
        da[m][n][2 * half] = dh[m][n][2 * half];
        da[m][n][2 * half + 1] = dh[m][n][2 * half + 1];
      });
      // Of layer `layer` of the block, rows of an operand of dW, if that is wanted.
      const auto store = [&](Global<T> to, int layer, const typename Tile::Fragments& from) {
        if (!to) return;
        to += group * args.operand_group_stride + (first + layer) * args.operand_layer_stride + row0 * kWidth;
        tile.for_pairs([&](int m, int n, int half, int row, int column) {
          if (row < rows)
            *as<Pair<T>>(to + (row * kWidth + column)) =
                operand_pair<T>(from[m][n][2 * half], from[m][n][2 * half + 1]);
        });
      };

      float rstd[Tile::kRowsOfThread];
      for (int layer = 0; layer < per_block; ++layer) {
        store(args.inputs, layer, t);
        tile.template put<Tile::kActivations>(t);
        __syncthreads();  // barrier 1
        tile.template multiply<Tile::kActivations>(weights, t);
        tile.measure(weights, t);
        __syncthreads();  // barrier 2
        tile.normalise(args.eps, t, rstd);
        if (layer + 1 == per_block) break;
        tile.park(parked + layer * Tile::kParked, t, rstd);
        tile.template activate_all<kActivation>(weights, t);
      }

      // t is xhat from here on.
      for (int layer = per_block - 1; layer >= 0; --layer) {
        Global<float> partial = args.partial;
        if (partial) partial += ((group * args.depth + first + layer) * tiles + i) * (3 * kWidth);
        tile.template through_activation<kActivation>(weights, rows, t, da, partial);
        __syncthreads();  // barrier 3
        tile.through_normalisation(rows, t, rstd, da, partial);
        store(args.gradients, layer, da);
        tile.template put<Tile::kGradients>(da);
        if (layer > 0) tile.unpark(parked + (layer - 1) * Tile::kParked, t, rstd);
        __syncthreads();  // barrier 4
        tile.template multiply<Tile::kGradients, true>(weights, da);
      }
      tile.for_pairs([&](int m, int n, int half, int, int) {
        dh[m][n][2 * half] += da[m][n][2 * half];
        dh[m][n][2 * half + 1] += da[m][n][2 * half + 1];
      });
    }

    tile.for_pairs([&](int m, int n, int half, int row, int column) {
      if (row < rows)
        store_pair<T>(args.dx.template at<T>(group, row0 + row, 0), column, args.dx.is_float,
                      make_float2(dh[m][n][2 * half], dh[m][n][2 * half + 1]));
    });
  }
}

}  // namespace nsk::cuda
