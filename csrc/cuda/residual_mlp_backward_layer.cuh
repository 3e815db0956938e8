// One layer of a residual MLP backward on a tile of rows, a thread's share of it: all but the product.
//
// With a = act(y), y = xhat gamma + beta, xhat = (z - mean) rstd, z = t W^T + b, and da coming in:
//   dy = da act'(y);  u = dy gamma;  dz = rstd (u - mean(u) - xhat mean(u xhat));  dt = dz W
//   dbeta = sum dy;  dgamma = sum dy xhat;  db = sum dz   over the rows
//
// xhat, da, u and dz are fp32 in registers, in the forward's layout. Sums along a row meet in shared memory, where all
// warps add them up in the same order. Sums over the tile's rows are a warp's own, as its columns are.
#pragma once

#include "residual_mlp_backward_problem.cuh"
#include "residual_mlp_layer.cuh"

namespace nsk::cuda {

template <class Tile>
class MlpBackwardLayer : public MlpLayer<Tile> {
  using Base = MlpLayer<Tile>;
  using T = typename Tile::T;
  using Fragments = typename Tile::Fragments;
  using Base::lane_, Base::warp_, Base::row, Base::column, Base::sum_of_row;
  static constexpr int kM = Tile::kM, kN = Tile::kN, kRowsOfThread = Tile::kRowsOfThread;

 public:
  __device__ __forceinline__ MlpBackwardLayer(Shared<unsigned char> shared, int warp, int lane)
      : Base(shared, warp, lane), sums_(as<float2>(shared + Tile::kSums)) {}

  // da becomes u. Leaves the sums of the warp's columns of u and u xhat for all, and dgamma and dbeta of the tile's
  // first `rows` rows in partial, if they are wanted.
  template <Activation kActivation, class Weights>
  __device__ __forceinline__ void through_activation(const Weights& weights, int rows, const Fragments& xhat,
                                                     Fragments& da, Global<float> partial) const {
    float sum_u[kRowsOfThread] = {}, sum_u_xhat[kRowsOfThread] = {};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 gammas = weights.vector(1, column(n)), betas = weights.vector(2, column(n));
      float dgamma[2] = {}, dbeta[2] = {};
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 2 * m + e / 2;
          const float gamma = e % 2 ? gammas.y : gammas.x, beta = e % 2 ? betas.y : betas.x, x = xhat[m][n][e];
          const float dy = activate_backward<kActivation>(x * gamma + beta, da[m][n][e]);
          const float u = dy * gamma;
          da[m][n][e] = u;
          sum_u[i] += u;
          sum_u_xhat[i] += u * x;
          // What is in rows past the last one may be anything.
          if (row(i) < rows) {
            dgamma[e % 2] += dy * x;
            dbeta[e % 2] += dy;
          }
        }
      store_sums_of_columns(partial, 1, n, dgamma);
      store_sums_of_columns(partial, 2, n, dbeta);
    }
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const float u = sum_of_row(sum_u[i]), u_xhat = sum_of_row(sum_u_xhat[i]);
      if (lane_ % 4 == 0) sums_[row(i) * Tile::kStatisticsRow + warp_] = make_float2(u, u_xhat);
    }
  }

  // u becomes dz, by the sums of all warps. Leaves db in partial.
  __device__ __forceinline__ void through_normalisation(int rows, const Fragments& xhat,
                                                        const float (&rstd)[kRowsOfThread], Fragments& u,
                                                        Global<float> partial) const {
    float2 means[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) means[i] = means_of_row(row(i));
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float db[2] = {};
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 2 * m + e / 2;
          const float dz = rstd[i] * ((u[m][n][e] - means[i].x) - xhat[m][n][e] * means[i].y);
          u[m][n][e] = dz;
          if (row(i) < rows) db[e % 2] += dz;
        }
      store_sums_of_columns(partial, 0, n, db);
    }
  }

  // The thread's own elements to where it alone reads them again.
  __device__ __forceinline__ void park(Global<float> to, const Fragments& xhat,
                                       const float (&rstd)[kRowsOfThread]) const {
    const Global<float> own = to + (warp_ * kWarp + lane_) * 4;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
        as<float4>(own)[(m * kN + n) * Tile::kThreads] =
            make_float4(xhat[m][n][0], xhat[m][n][1], xhat[m][n][2], xhat[m][n][3]);
#pragma unroll
    for (int m = 0; m < kM; ++m)
      *as<float2>(to + (parked_rstd(m))) = make_float2(rstd[2 * m], rstd[2 * m + 1]);
  }
  __device__ __forceinline__ void unpark(Global<float> from, Fragments& xhat, float (&rstd)[kRowsOfThread]) const {
    const Global<float> own = from + (warp_ * kWarp + lane_) * 4;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float4 x = as<float4>(own)[(m * kN + n) * Tile::kThreads];
        xhat[m][n][0] = x.x, xhat[m][n][1] = x.y, xhat[m][n][2] = x.z, xhat[m][n][3] = x.w;
      }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const float2 pair = *as<float2>(from + parked_rstd(m));
      rstd[2 * m] = pair.x, rstd[2 * m + 1] = pair.y;
    }
  }

 private:
  __device__ __forceinline__ int parked_rstd(int m) const {
    return (4 * kM * kN + 2 * m) * Tile::kThreads + (warp_ * kWarp + lane_) * 2;
  }

  // The eight lanes that share columns add up; the sums of fragment n's two columns go to a vector, the one of db,
  // dgamma and dbeta that comes `vector`-th.
  __device__ __forceinline__ void store_sums_of_columns(Global<float> partial, int vector, int n,
                                                        float (&sums)[2]) const {
    if (!partial) return;
#pragma unroll
    for (int lanes = 4; lanes < kWarp; lanes *= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], lanes);
    if (lane_ < 4)
      *as<float2>(partial + (vector * Tile::kWidth + warp_ * Tile::kColumns + column(n))) =
          make_float2(sums[0], sums[1]);
  }

  // Each of the four lanes that share a row takes two warps' sums. All get the same bits, since addition commutes.
  __device__ __forceinline__ float2 means_of_row(int row) const {
    const float4 two = as<float4>(sums_ + row * Tile::kStatisticsRow)[lane_ % 4];
    return make_float2(sum_of_row(two.x + two.z) * (1.0f / Tile::kWidth),
                       sum_of_row(two.y + two.w) * (1.0f / Tile::kWidth));
  }

  const Shared<float2> sums_;
};

}  // namespace nsk::cuda
