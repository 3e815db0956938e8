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
// LayerNorm is two-pass within a warp: mean and sum of squared deviations of its columns of each row. They meet in
// shared memory, where all warps put them together by twos, of n numbers each:
//   mean = (mean_1 + mean_2) / 2,   squares = squares_1 + squares_2 + n / 2 (mean_1 - mean_2)^2
//
// Two barriers a layer:
//   1. t has been written by all before anybody multiplies it; and the statistics of the layer before have been read by
//      all before anybody writes those of this one
//   2. the statistics have been written by all before anybody reads them; and t has been read by all before anybody
//      overwrites it
// The end of a tile needs none: its last step after barrier 2 touches registers and statistics only.
#pragma once

#include "residual_mlp_weights.cuh"

namespace nsk::cuda {

template <Activation kActivation>
__device__ __forceinline__ float activate(float y) {
  constexpr float kLog2e = 1.4426950408889634f;
  constexpr float kGeluSlope = 1.5957691216057308f, kGeluCubic = 0.044715f;  // 2 sqrt(2 / pi)
  if constexpr (kActivation == Activation::relu) {
    return y < 0 ? 0.0f : y;  // NaN stays
  } else {
    // y sigmoid(u); 0.5 y (1 + tanh(u / 2)) is the same.
    const float u = kActivation == Activation::silu ? y : y * (y * y * (kGeluSlope * kGeluCubic) + kGeluSlope);
    return y * rcp_approx(1.0f + exp2_approx(-kLog2e * u));
  }
}

// One thread's share of a tile.
template <class Tile>
class MlpForwardTile {
  using T = typename Tile::T;
  using Fragments = typename Tile::Fragments;
  static constexpr int kM = Tile::kM, kN = Tile::kN, kRowsOfThread = 2 * kM;

  // Pieces of 16 bytes of a row of t are permuted, so that the eight rows of ldmatrix lie in different banks: piece p
  // of row r lies at p ^ r % 8. A thread's own bits of p and r are apart from those that loops go over, which the
  // compiler knows: few addresses have to be kept.
  static constexpr int kRowBytes = Tile::kWidth * int(sizeof(T));

 public:
  __device__ __forceinline__ MlpForwardTile(Shared<unsigned char> shared, int warp, int lane)
      : activations_(shared + Tile::kActivations), statistics_(as<float2>(shared + Tile::kStatistics)), warp_(warp),
        lane_(lane) {}

  // f(m, n, half, row, column) for each pair of neighbouring elements: 2 half and 2 half + 1 of fragment (m, n).
  template <class F>
  __device__ __forceinline__ void for_pairs(const F& f) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          f(m, n, half, 16 * m + 8 * half + lane_ / 4, warp_ * Tile::kColumns + column(n));
  }

  // t becomes what the next layer multiplies.
  __device__ __forceinline__ void put(const Fragments& t) const {
    const Shared<unsigned char> first = activations_ + (lane_ / 4 * kRowBytes + lane_ % 4 * 4);
    const int piece = warp_ * kN ^ lane_ / 4;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *as<uint32_t>(first + ((16 * m + 8 * half) * kRowBytes + (piece ^ n) * 16)) =
              pack<T>(t[m][n][2 * half], t[m][n][2 * half + 1]);
  }

  // z = t W^T for the warp's columns.
  __device__ __forceinline__ void multiply(MlpWeights<Tile>& weights, Fragments& z) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[m][n][e] = 0;
    const Shared<unsigned char> first = activations_ + lane_ % 16 * kRowBytes;
    const int piece = lane_ / 16 ^ lane_ % 8;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      const Shared<unsigned char> stage = weights.next(step);
      uint32_t a[2][kM][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < kM; ++m)
          ldmatrix(a[half][m], first + (16 * m * kRowBytes + (piece ^ (4 * step + 2 * half)) * 16));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        uint32_t b[4];
        weights.load(b, stage, n);
        const uint32_t halves[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < kM; ++m) mma<T>(z[m][n], a[half][m], halves[half]);
      }
    }
  }

  // Adds the bias to z and leaves the statistics of the warp's columns for all.
  __device__ __forceinline__ void measure(const MlpWeights<Tile>& weights, Fragments& z) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 bias = weights.vector(0, column(n));
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[m][n][e] += e % 2 ? bias.y : bias.x;
    }
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int n = 0; n < kN; ++n) sum += z[i / 2][n][i % 2 * 2] + z[i / 2][n][i % 2 * 2 + 1];
      const float mean = sum_of_row(sum) * (1.0f / Tile::kColumns);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float difference = z[i / 2][n][i % 2 * 2 + j] - mean;
          squares += difference * difference;
        }
      squares = sum_of_row(squares);
      if (lane_ % 4 == 0) statistics_[row(i) * Tile::kStatisticsRow + warp_] = make_float2(mean, squares);
    }
  }

  // z becomes act(LayerNorm(z)), by the statistics of all warps.
  template <Activation kActivation>
  __device__ __forceinline__ void normalise(const MlpWeights<Tile>& weights, float eps, Fragments& z) const {
    float means[kRowsOfThread], rstd[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) statistics_of_row(row(i), eps, means[i], rstd[i]);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 gamma = weights.vector(1, column(n)), beta = weights.vector(2, column(n));
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float normalised = (z[m][n][e] - means[2 * m + e / 2]) * rstd[2 * m + e / 2];
          z[m][n][e] = activate<kActivation>(normalised * (e % 2 ? gamma.y : gamma.x) + (e % 2 ? beta.y : beta.x));
        }
    }
  }

 private:
  __device__ __forceinline__ int row(int i) const { return 8 * i + lane_ / 4; }        // of the thread's rows
  __device__ __forceinline__ int column(int n) const { return 8 * n + lane_ % 4 * 2; }  // of the warp's

  // The four lanes that share a row add up.
  __device__ __forceinline__ static float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // Each of the four lanes that share a row takes two warps' statistics; then they put theirs together by twos. All
  // get the same bits, since what they do is symmetric.
  __device__ __forceinline__ void statistics_of_row(int row, float eps, float& mean, float& rstd) const {
    const float4 two = as<float4>(statistics_ + row * Tile::kStatisticsRow)[lane_ % 4];
    mean = two.x;
    float squares = two.y;
    merge(mean, squares, two.z, two.w, Tile::kColumns);
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const float other_mean = __shfl_xor_sync(0xffffffffu, mean, lanes);
      const float other_squares = __shfl_xor_sync(0xffffffffu, squares, lanes);
      merge(mean, squares, other_mean, other_squares, 2 * lanes * Tile::kColumns);
    }
    rstd = rsqrt_approx(squares * (1.0f / Tile::kWidth) + eps);
  }

  // Of two times n numbers.
  __device__ __forceinline__ static void merge(float& mean, float& squares, float other_mean, float other_squares,
                                               int n) {
    const float difference = mean - other_mean;
    squares = (squares + other_squares) + difference * difference * (0.5f * float(n));
    mean = 0.5f * (mean + other_mean);
  }

  const Shared<unsigned char> activations_;
  const Shared<float2> statistics_;
  const int warp_, lane_;
};

template <class T, int kWidth, int kRows, Activation kActivation>
__global__ void __launch_bounds__(MlpTile<T, kWidth, kRows>::kThreads, MlpTile<T, kWidth, kRows>::kResident)
    residual_mlp_forward(const __grid_constant__ MlpForwardArgs<T> args) {
  using Tile = MlpTile<T, kWidth, kRows>;
  NSK_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t group = blockIdx.y, tiles = (args.rows + kRows - 1) / kRows;
  const int64_t own_tiles = (tiles - int64_t(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  if (own_tiles <= 0) return;

  MlpWeights<Tile> weights(args, group, own_tiles, warp, lane, shared);
  const MlpForwardTile<Tile> tile(shared, warp, lane);
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
      tile.put(t);
      __syncthreads();  // barrier 1
      tile.multiply(weights, t);
      tile.measure(weights, t);
      __syncthreads();  // barrier 2
      tile.template normalise<kActivation>(weights, args.eps, t);
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
