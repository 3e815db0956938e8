// The gradients of a residual MLP's weights, of all layers in one launch, from what the backward wrote:
//
//   dW = gradients^T inputs, [out, in], summed over the rows; both operands are [row, kWidth] in T, rounded to it
//
// A block of threads computes 64 x 64 elements of one layer and adds up all rows in order, so that the same bits come
// out each time. blockIdx.x is the place in dW, y the layer, z the group. Its four warps take 32 x 32 each.
//
// Rows run along the product: mma wants both operands the other way round (residual_mlp_operands.cuh). Stages of kDepth
// rows go through a ring that all warps share, filled by cp.async some stages ahead. One barrier a stage: the stage has
// arrived for all, and the stage before has been read by all, which makes room for a later one.
#pragma once

#include "residual_mlp_operands.cuh"

namespace nsk::cuda {

// Operands are [group, layer, row, kWidth], layers start at multiples of 16 bytes; strides count elements. Rows of dW
// are dense: its `stride` is of layers.
template <class T>
struct MlpWeightGradientArgs {
  int64_t rows;
  Global<const T> inputs, gradients;
  int64_t operand_group_stride, operand_layer_stride;
  MlpTensor<unsigned char> dweight;
};

template <class T>
struct MlpWeightGradientTile {
  static constexpr int kThreads = 128, kSide = 64, kOfWarp = 32;
  static constexpr int kDepth = 64 / int(sizeof(T)), kStages = 4;
  static constexpr int kM = kOfWarp / 16, kN = kOfWarp / 8;  // fragments of a warp
  static constexpr int kRowBytes = kSide * int(sizeof(T)), kOperandBytes = kDepth * kRowBytes;
  static constexpr int kSharedBytes = kStages * 2 * kOperandBytes;  // [stage][gradients, inputs][row][kSide]

  __device__ __forceinline__ static int at(int row, int piece) {
    return swizzled<kRowBytes / 16, Transposed<T>::kPieces>(row, piece);
  }
};

// The tile's columns of both operands on their way to shared memory, a thread's share of the copies.
template <class T, int kWidth>
class MlpOperandRing {
  using Tile = MlpWeightGradientTile<T>;
  static constexpr int kPieces = Tile::kRowBytes / 16, kRows = Tile::kThreads / kPieces;  // of a copy by all threads

 public:
  __device__ __forceinline__ MlpOperandRing(const MlpWeightGradientArgs<T>& args, int out, int in,
                                            Shared<unsigned char> shared)
      : row_(int(threadIdx.x) / kPieces), rows_(args.rows), shared_(shared + Tile::at(row_, threadIdx.x % kPieces)) {
    const int64_t first = int64_t(blockIdx.z) * args.operand_group_stride + blockIdx.y * args.operand_layer_stride;
    const int own = row_ * kWidth + int(threadIdx.x) % kPieces * (16 / int(sizeof(T)));
    gradients_ = args.gradients + (first + out + own);
    inputs_ = args.inputs + (first + in + own);
  }

  // Issues the copies of stage `step`: one group, be it empty. Rows past the last one are 0.
  __device__ __forceinline__ void fill(int64_t step) {
    const Shared<unsigned char> to = shared_ + int(step % Tile::kStages) * 2 * Tile::kOperandBytes;
    const int64_t row0 = step * Tile::kDepth;
    if (row0 < rows_) {
#pragma unroll
      for (int row = 0; row < Tile::kDepth; row += kRows) {
        const bool is_there = row0 + row + row_ < rows_;
        const int64_t from = is_there ? (row0 + row) * kWidth : -row_ * kWidth;  // or the first row: it is not read
        cp_async<16>(to + row * Tile::kRowBytes, gradients_ + from, is_there ? 16 : 0);
        cp_async<16>(to + (Tile::kOperandBytes + row * Tile::kRowBytes), inputs_ + from, is_there ? 16 : 0);
      }
    }
    cp_async_commit();
  }

 private:
  const int row_;
  const int64_t rows_;
  const Shared<unsigned char> shared_;
  Global<const T> gradients_, inputs_;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(MlpWeightGradientTile<T>::kThreads)
    residual_mlp_weight_gradient(const __grid_constant__ MlpWeightGradientArgs<T> args) {
  using Tile = MlpWeightGradientTile<T>;
  using Matrix = Transposed<T>;
  NSK_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  constexpr int kAcross = kWidth / Tile::kSide;
  const int out = int(blockIdx.x) / kAcross * Tile::kSide, in = int(blockIdx.x) % kAcross * Tile::kSide;
  const int out_of_warp = warp / 2 * Tile::kOfWarp, in_of_warp = warp % 2 * Tile::kOfWarp;

  MlpOperandRing<T, kWidth> ring(args, out, in, shared);
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) ring.fill(step);

  float sums[Tile::kM][Tile::kN][4] = {};
  const int64_t steps = (args.rows + Tile::kDepth - 1) / Tile::kDepth;
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    ring.fill(step + Tile::kStages - 1);
    const Shared<unsigned char> gradients = shared + int(step % Tile::kStages) * 2 * Tile::kOperandBytes;
    const Shared<unsigned char> inputs = gradients + Tile::kOperandBytes;
#pragma unroll
    for (int row = 0; row < Tile::kDepth; row += 2 * Matrix::kRows) {
      uint32_t a[Tile::kM][4], b[Tile::kN / 2][4];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m)
        Matrix::load(a[m], lane, [&](int i, int of_matrix, int piece) {
          return gradients + Tile::at(row + i / 2 * Matrix::kRows + of_matrix,
                                      (out_of_warp / 8 + 2 * m + i % 2) * Matrix::kPieces + piece);
        });
#pragma unroll
      for (int n = 0; n < Tile::kN / 2; ++n)
        Matrix::load(b[n], lane, [&](int i, int of_matrix, int piece) {
          return inputs + Tile::at(row + i % 2 * Matrix::kRows + of_matrix,
                                   (in_of_warp / 8 + 2 * n + i / 2) * Matrix::kPieces + piece);
        });
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n) {
        const uint32_t half[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m) mma<T>(sums[m][n], a[m], half);
      }
    }
  }

  const Global<unsigned char> dweight = args.dweight.template at<T>(blockIdx.z, blockIdx.y, 0);
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = out + out_of_warp + 16 * m + 8 * half + lane / 4;
        const int column = in + in_of_warp + 8 * n + lane % 4 * 2;
        store_pair<T>(dweight, row * kWidth + column, args.dweight.is_float,
                      make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]));
      }
}

}  // namespace nsk::cuda
