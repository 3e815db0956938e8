// From products q.k to the scores that softmax takes, and which keys a row does not see.
#pragma once

#include "gated_sdpa_problem.cuh"
#include "online_softmax.cuh"

namespace nsk::cuda {

// 1 - 2 / (1 + exp(2 x)): its error is absolute, a few 2^-24, where tanh.approx has 2^-11, which a softcap of 50 would
// make an error of 2 % in a weight.
__device__ __forceinline__ float tanh_by_exp2(float x) {
  return 1.0f - 2.0f * rcp_approx(1.0f + exp2_approx(2 * kLog2e * x));
}

// Scores are kept such that exp2(scale s) is the weight. Unless something has to be added or capped, that leaves the
// products as they are, and the multiplication is part of the softmax's own.
template <bool kSoftcap, Mask kMask>
struct ScoreScale {
  float products, cap, softmax;

  // Of |scale|: its sign is the query's. Softmax takes a tiny number for 0, which keeps -inf what it is.
  template <class T>
  __device__ __forceinline__ explicit ScoreScale(const GatedSdpa<T>& p) {
    const float scale = p.scale < 0 ? -p.scale : p.scale;
    products = kSoftcap ? scale / p.softcap : scale * kLog2e;
    cap = kSoftcap ? p.softcap * kLog2e : 0;
    softmax = kSoftcap || kMask == Mask::floating ? 1.0f : max(products, 1e-37f);
  }

  // The score that is the largest of a row, in units of log2. No product reaches 1e7 times the tiny number.
  __device__ __forceinline__ float top(float s) const {
    const float scaled = s * softmax;
    return scaled < 1e-30f && scaled > -1e-30f ? 0.0f : scaled;
  }

  __device__ __forceinline__ float apply(float s) const {
    if constexpr (kSoftcap) return cap * tanh_by_exp2(s * products);
    if constexpr (kMask == Mask::floating) return s * products;
    return s;
  }
};

// What of position a kernel keeps, in half the registers of a PositionMask.
struct Position {
  int seqlen_k, offset, left, right;

  __device__ __forceinline__ explicit Position(const PositionMask& mask)
      : seqlen_k(int(mask.seqlen_k)), offset(int(mask.offset)), left(int(mask.left)), right(int(mask.right)) {}

  struct Keys {
    int begin, end;
  };
  __device__ __forceinline__ Keys keys(int row) const {
    const KeyRange range = PositionMask{seqlen_k, offset, left, right}.keys(row);
    return {int(range.begin), int(range.end)};
  }
  __device__ __forceinline__ Keys queries(int key, int rows) const {
    const KeyRange range = PositionMask{seqlen_k, offset, left, right}.queries(key, rows);
    return {int(range.begin), int(range.end)};
  }
};

// The lowest finite number. A mask may hold it on all keys of a row, which then all count the same: times log2(e) it
// would be -inf.
inline constexpr float kLowest = -3.402823466e+38f;

// lse, out of the largest score in units of log2 and the sum relative to it.
__device__ __forceinline__ float log_of_sum(float top, float sum) {
  return top == kLowest ? kLowest : (top + log2_approx(sum)) * kLn2;
}

// Applies the mask tensor and position to the scores of one row, of those of 8 kBlocks keys that this lane has in its
// half of the rows, and says whether it sees any of these. Neither is read for a key that position alone hides, nor for
// rows from `rows` on.
template <Mask kMask, int kBlocks, class T>
__device__ __forceinline__ bool hide_in_row(float (&s)[kBlocks][4], int half, const GatedSdpa<T>& p,
                                            const Position& position, int batch, int head, int row, int rows, int key0,
                                            int lane) {
  bool sees = false;
  const Position::Keys seen = position.keys(row);
  const int begin = seen.begin - key0, end = row < rows ? seen.end - key0 : 0;
  const int64_t mask_row = p.mask_stride.at(batch, head, row) + p.mask_stride_key * key0;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = 8 * n + lane % 4 * 2 + e;
      float& score = s[n][2 * half + e];
      bool hidden = key < begin || key >= end;
      if constexpr (kMask != Mask::none) {
        if (!hidden) {
          const int64_t at = mask_row + p.mask_stride_key * key;
          if constexpr (kMask == Mask::boolean) {
            const unsigned char sees_key = p.mask.data[at];
            hidden = !sees_key;
          } else {
            const float bias = p.mask[at];
            hidden = bias == minus_infinity();
            score += max(bias * kLog2e, kLowest);
          }
        }
      }
      if (hidden) score = minus_infinity();
      sees |= !hidden;
    }
  return sees;
}

// The same for 16 rows from row0 on; bit `half` of the result is that half's.
template <Mask kMask, int kBlocks, class T>
__device__ __forceinline__ unsigned hide(float (&s)[kBlocks][4], const GatedSdpa<T>& p, const Position& position,
                                         int batch, int head, int row0, int rows, int key0, int lane) {
  unsigned sees = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + 8 * half;
    sees |= unsigned(hide_in_row<kMask>(s, half, p, position, batch, head, row, rows, key0, lane)) << half;
  }
  return sees;
}

}  // namespace nsk::cuda
