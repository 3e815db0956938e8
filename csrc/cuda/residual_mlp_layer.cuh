// One layer of a residual MLP on a tile of rows, a thread's share of it: product, bias, LayerNorm, activation.
//
// Eight warps cut the tile by columns. What they multiply, the operand, lies in shared memory as T: every warp puts its
// columns there and reads all of them. Products, normalised numbers and activations are fp32 in registers, in the
// layout of mma's sums.
//
// LayerNorm is two-pass within a warp: mean and sum of squared deviations of its columns of each row. They meet in
// shared memory, where all warps put them together by twos, of n numbers each:
//   mean = (mean_1 + mean_2) / 2,   squares = squares_1 + squares_2 + n / 2 (mean_1 - mean_2)^2
#pragma once

#include "residual_mlp_activation.cuh"
#include "residual_mlp_weights.cuh"

namespace nsk::cuda {

template <class Tile>
class MlpLayer {
 protected:
  using T = typename Tile::T;
  using Fragments = typename Tile::Fragments;
  static constexpr int kM = Tile::kM, kN = Tile::kN, kRowsOfThread = Tile::kRowsOfThread;

 private:
  // Piece p of row r of an operand lies at p ^ permutation(r). A thread's own bits of p and r are apart from those that
  // loops go over, which the compiler knows: few addresses have to be kept.
  static constexpr int kRowBytes = Tile::kWidth * int(sizeof(T));
  static constexpr int kPieces = int(sizeof(T)) / 2;  // of a fragment's row

 public:
  __device__ __forceinline__ MlpLayer(Shared<unsigned char> shared, int warp, int lane)
      : shared_(shared), statistics_(as<float2>(shared + Tile::kStatistics)), warp_(warp), lane_(lane) {}

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

  // t becomes what the next product multiplies, the operand that starts at byte kOperand.
  template <int kOperand>
  __device__ __forceinline__ void put(const Fragments& t) const {
    const int byte = lane_ % 4 * int(sizeof(Pair<T>));
    const Shared<unsigned char> first = shared_ + (kOperand + lane_ / 4 * kRowBytes + byte % 16);
    const int piece = (warp_ * kN * kPieces + byte / 16) ^ permutation<T>(lane_ / 4);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *as<Pair<T>>(first + ((16 * m + 8 * half) * kRowBytes + (piece ^ (n * kPieces)) * 16)) =
              operand_pair<T>(t[m][n][2 * half], t[m][n][2 * half + 1]);
  }

  // z = t W^T for the warp's columns, or t W.
  template <int kOperand, bool kTransposed = false, class Weights>
  __device__ __forceinline__ void multiply(Weights& weights, Fragments& z) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[m][n][e] = 0;
    const Shared<unsigned char> first = shared_ + (kOperand + lane_ % 16 * kRowBytes);
    const int piece = lane_ / 16 ^ permutation<T>(lane_ % 8);
#pragma unroll 1
    for (int turn = 0; turn < Tile::kSteps; turn += Tile::kUnrolled)
#pragma unroll
      for (int step = turn; step < turn + Tile::kUnrolled; ++step) {
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
          weights.template load<kTransposed>(b, stage, n);
          const uint32_t halves[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int m = 0; m < kM; ++m) mma<T>(z[m][n], a[half][m], halves[half]);
        }
      }
  }

  // Adds the bias to z and leaves the statistics of the warp's columns for all.
  template <class Weights>
  __device__ __forceinline__ void measure(const Weights& weights, Fragments& z) const {
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

  // z becomes LayerNorm(z) before gamma and beta, by the statistics of all warps.
  __device__ __forceinline__ void normalise(float eps, Fragments& z, float (&rstd)[kRowsOfThread]) const {
    float means[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) statistics_of_row(row(i), eps, means[i], rstd[i]);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[m][n][e] = (z[m][n][e] - means[2 * m + e / 2]) * rstd[2 * m + e / 2];
  }

  // What is normalised becomes the layer's result.
  template <Activation kActivation, class Weights>
  __device__ __forceinline__ void activate_all(const Weights& weights, Fragments& z) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 gamma = weights.vector(1, column(n)), beta = weights.vector(2, column(n));
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          z[m][n][e] = activate<kActivation>(z[m][n][e] * (e % 2 ? gamma.y : gamma.x) + (e % 2 ? beta.y : beta.x));
    }
  }

 protected:
  __device__ __forceinline__ int row(int i) const { return 8 * i + lane_ / 4; }        // of the thread's rows
  __device__ __forceinline__ int column(int n) const { return 8 * n + lane_ % 4 * 2; }  // of the warp's

  // The four lanes that share a row add up.
  __device__ __forceinline__ static float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

 private:
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

 protected:
  const Shared<unsigned char> shared_;
  const Shared<float2> statistics_;
  const int warp_, lane_;
};

}  // namespace nsk::cuda
