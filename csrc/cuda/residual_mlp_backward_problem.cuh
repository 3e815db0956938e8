// The backward of residual MLPs on tensor cores: the tensors, and what a block of threads needs beside the forward's.
#pragma once

#include "residual_mlp_problem.cuh"

namespace nsk::cuda {

// The stream is what the forward kept. Operands of dW = gradients^T inputs are [group, layer, row, kWidth] in T,
// strides count elements and are multiples of two. Tiles' shares of the vectors' gradients are [group, layer, tile, 3,
// kWidth]: of db, dgamma and dbeta. What is null is not wanted: both operands, or the shares.
template <class T>
struct MlpBackwardArgs : MlpNetwork<T> {
  Global<const float> stream;  // [group, block, row, column]
  int64_t stream_group_stride, stream_block_stride;
  MlpTensor<const unsigned char> dy;
  MlpTensor<unsigned char> dx;
  Global<T> inputs, gradients;
  int64_t operand_group_stride, operand_layer_stride;
  Global<float> partial;
  // [group, gridDim.x][layers_per_block - 1][MlpBackwardTile::kParked]; null where there is one layer a block.
  Global<float> parked;
};

template <class T, int kWidth, int kRows>
struct MlpBackwardTile : MlpTile<T, kWidth, kRows> {
  using Forward = MlpTile<T, kWidth, kRows>;
  static constexpr int kResident = kRows * kWidth <= 1024 ? 2 : 1;
  static constexpr int kUnrolled = Forward::kSteps < 4 ? Forward::kSteps : 4;  // it lacks registers

  // Of a layer of a block, in global memory: its fragments and 1 / deviation of its rows, as each thread has them.
  static constexpr int kParked = (4 * Forward::kM * Forward::kN + Forward::kRowsOfThread) * Forward::kThreads;

  // Shared memory, beside the forward's.
  static constexpr int kGradients = Forward::kSharedBytes;                            // dz: [row][kWidth]
  static constexpr int kSums = kGradients + kRows * kWidth * int(sizeof(T));          // [row][warp]: of u and of u xhat
  static constexpr int kSharedBytes = kSums + kRows * Forward::kStatisticsRow * int(sizeof(float2));
};

}  // namespace nsk::cuda
