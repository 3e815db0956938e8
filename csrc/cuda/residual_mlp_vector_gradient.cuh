// The gradients of a residual MLP's vectors, bias, gamma and beta, of all layers in one launch: the shares of the
// backward's tiles, [group, layer, tile, 3, kWidth], added up in the order of the tiles.
//
// Every thread has two neighbouring elements of one vector. blockIdx.x is the vector, y the layer, z the group.
#pragma once

#include "residual_mlp_problem.cuh"

namespace nsk::cuda {

struct MlpVectorGradientArgs {
  int64_t tiles;
  Global<const float> partial;
  MlpTensor<unsigned char> dbias, dgamma, dbeta;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kWidth / 2)
    residual_mlp_vector_gradient(const __grid_constant__ MlpVectorGradientArgs args) {
  const int vector = int(blockIdx.x), column = int(threadIdx.x) * 2;
  const Global<const float> partial =
      args.partial + (((int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * args.tiles * 3 + vector) * kWidth + column);
  float2 sums = make_float2(0, 0);
#pragma unroll 8
  for (int64_t tile = 0; tile < args.tiles; ++tile) {
    const float2 share = *as<const float2>(partial + tile * (3 * kWidth));
    sums.x += share.x;
    sums.y += share.y;
  }
  const MlpTensor<unsigned char>& to = vector == 0 ? args.dbias : vector == 1 ? args.dgamma : args.dbeta;
  store_pair<T>(to.template at<T>(blockIdx.z, blockIdx.y, 0), column, to.is_float, sums);
}

}  // namespace nsk::cuda
