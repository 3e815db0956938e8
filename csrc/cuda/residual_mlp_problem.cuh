// Residual MLPs on tensor cores: the tensors, and how a tile of rows is cut among the threads of a block.
//
//   h = x;  for each block { t = h;  layers_per_block times t = act(LayerNorm(t W^T + b));  h += t };  y = h
#pragma once

#include "device.cuh"

namespace nsk::cuda {

enum class Activation { silu, relu, gelu_tanh };  // the numbers of nsk_activation

inline constexpr int kWarp = 32;

// A tensor [group, layer or row, column] of columns side by side, in the type of the weights or in float; strides count
// elements.
template <class Byte>
struct MlpTensor {
  Global<Byte> data;
  int64_t group_stride, stride;
  bool is_float;

  template <class T>
  __device__ __forceinline__ int element_bytes() const {
    return is_float ? int(sizeof(float)) : int(sizeof(T));
  }
  // Element (group, i, column).
  template <class T>
  __device__ __forceinline__ Global<Byte> at(int64_t group, int64_t i, int column) const {
    return data + (group * group_stride + i * stride + column) * element_bytes<T>();
  }
};

// What all kernels read. Rows of the weights are dense. Layers of weights and vectors start at multiples of 16 bytes,
// for the backward those of vectors less than 2 GiB apart; rows of x, y and their gradients at multiples of two
// elements.
template <class T>
struct MlpNetwork {
  int64_t rows;
  int depth, layers_per_block;
  float eps;
  Global<const T> weight;  // [group, layer, out, in]
  int64_t weight_group_stride, weight_stride;
  MlpTensor<const unsigned char> bias, ln_weight, ln_bias;
};

template <class T>
struct MlpForwardArgs : MlpNetwork<T> {
  MlpTensor<const unsigned char> x;
  MlpTensor<unsigned char> y;
  // The blocks' inputs [group, block, row, column], for a backward; null: not kept.
  Global<float> stream;
  int64_t stream_group_stride, stream_block_stride;
};

// Eight warps share a tile of rows by columns: each computes all rows of its kColumns columns, so that it alone reads
// its rows of the weights, through a ring of its own. A stage of the ring holds kDepth columns of them, 64 bytes a row.
// T is bf16 or f16, or tf32 for floats that are multiplied as such.
template <class T_, int kWidth_, int kRows_>
struct MlpTile {
  using T = T_;
  static constexpr int kWidth = kWidth_, kRows = kRows_;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kColumns = kWidth / kWarps;
  static_assert(kColumns % 8 == 0 && kRows % 16 == 0);
  // Blocks for which a multiprocessor has the registers, 64K.
  static constexpr int kResident = kRows * kWidth <= 1024 ? 3 : kRows * kWidth <= 4096 ? 2 : 1;

  // What a thread holds of a [rows, columns] matrix: the fragments of mma, 16 x 8 each. Element e of fragment (m, n) is
  // at row 16 m + lane / 4 + e / 2 * 8 and at the warp's column 8 n + lane % 4 * 2 + e % 2.
  static constexpr int kM = kRows / 16, kN = kColumns / 8, kRowsOfThread = 2 * kM;
  using Fragments = float[kM][kN][4];

  // A ring is at most four stages, and at most a layer and a stage, so that of the vectors two layers are enough. Where
  // rows are longest it is three: then both operands of the backward fit beside it into 99 KB.
  static constexpr int kDepth = 64 / int(sizeof(T)), kSteps = kWidth / kDepth;
  static constexpr int kStages = kSteps < 3 ? kSteps + 1 : kWidth * int(sizeof(T)) <= 512 ? 4 : 3;
  static constexpr int kUnrolled = kSteps < 8 ? kSteps : 8;  // the addresses of more steps would take registers
  static constexpr int kStageBytes = kColumns * kDepth * int(sizeof(T));
  static constexpr int kVectorBytes = kColumns * int(sizeof(float));  // room for either type
  static constexpr int kStatisticsRow = kWarps + 2;                   // padded: rows start in different banks

  // Shared memory.
  static constexpr int kRings = 0;                                              // [warp][stage][column][kDepth]
  static constexpr int kActivations = kRings + kWarps * kStages * kStageBytes;  // [row][kWidth]
  static constexpr int kVectors = kActivations + kRows * kWidth * int(sizeof(T));   // [warp][2 layers][3][kVectorBytes]
  static constexpr int kStatistics = kVectors + kWarps * 2 * 3 * kVectorBytes;  // [row][warp]: mean, sum of squares
  static constexpr int kSharedBytes = kStatistics + kRows * kStatisticsRow * int(sizeof(float2));
};

// The type of a tensor is looked at where it is read or written: elements i and i + 1, i even,
// of what starts at p.
template <class T, class Pointer>
__device__ __forceinline__ float2 load_pair(Pointer p, int i, bool is_float) {
  if (sizeof(T) == sizeof(float) || is_float) {
    const float2 values = *as<const float2>(p + i * int(sizeof(float)));
    return values;
  }
  const Pair<T> bits = *as<const Pair<T>>(p + i * int(sizeof(T)));
  return unpack_pair<T>(bits);
}
template <class T>
__device__ __forceinline__ void store_pair(Global<unsigned char> p, int i, bool is_float, float2 values) {
  if (sizeof(T) == sizeof(float) || is_float)
    *as<float2>(p + i * int(sizeof(float))) = values;
  else
    *as<Pair<T>>(p + i * int(sizeof(T))) = pack_pair<T>(values.x, values.y);
}

}  // namespace nsk::cuda
