// The weights of a network on their way to the warp that multiplies by them: a ring of stages in shared memory that is
// its own, filled by cp.async some stages ahead.
//
// A stage is kDepth columns of the warp's rows of W. The ring runs on from layer to layer and from tile to tile, so
// that only the very first stages are waited for in full. With the first stage of a layer come the warp's columns of
// its bias, gamma and beta, into one of two places in turn. They are read until the layer ends, when the ring has no
// more than the next layer's stages under way: the copies into the same place begin later.
#pragma once

#include "residual_mlp_problem.cuh"

namespace nsk::cuda {

template <class Tile>
class MlpWeights {
  using T = typename Tile::T;
  static constexpr int kAhead = Tile::kStages - 1;
  static constexpr int kPieces = Tile::kDepth * int(sizeof(T)) / 16;  // of 16 bytes, of a row of a stage
  static constexpr int kMostPieces = Tile::kVectorBytes / 16;         // of a vector
  static_assert(kPieces == 4 && kAhead <= Tile::kSteps && 3 * kMostPieces <= kWarp);

 public:
  // Sets out for `tiles` times all layers of the group.
  __device__ __forceinline__ MlpWeights(const MlpForwardArgs<T>& args, int64_t group, int64_t tiles, int warp,
                                        int lane, Shared<unsigned char> shared)
      : args_(args), lane_(lane), ring_(shared + Tile::kRings + warp * Tile::kStages * Tile::kStageBytes),
        vectors_(shared + Tile::kVectors + warp * 2 * 3 * Tile::kVectorBytes), layers_left_(tiles * args.depth) {
    const int row = warp * Tile::kColumns + lane / kPieces, piece = lane % kPieces;
    first_weight_ =
        args.weight + (group * args.weight_group_stride + row * Tile::kWidth + piece * (16 / int(sizeof(T))));
    // Rows that a lane copies are eight apart, and lie swizzled in the same way.
    to_ = swizzled(lane / kPieces, piece);

    // Every lane copies one piece of one of the vectors, or none.
    const int vector = lane / kMostPieces, byte = lane % kMostPieces * 16;
    const MlpTensor<const unsigned char>& from = vector == 0 ? args.bias : vector == 1 ? args.ln_weight : args.ln_bias;
    copies_vector_ = vector < 3 && byte < Tile::kColumns * from.template element_bytes<T>();
    first_vector_ = from.template at<T>(group, 0, warp * Tile::kColumns) + byte;
    vector_stride_ = from.stride * from.template element_bytes<T>();

#pragma unroll
    for (int step = 0; step < kAhead; ++step) fill(step, step);
  }

  // The weights of step `step` of the layer. Steps come in turn; the one before is done with.
  __device__ __forceinline__ Shared<unsigned char> next(int step) {
    if (step == 0) reads_ ^= 1;
    const int stage = stage_of(step), before = stage == 0 ? kAhead : stage - 1;
    cp_async_wait<kAhead - 1>();  // the step's own group has arrived, as far as this lane copied it,
    __syncwarp();                 // and now as far as the others did; and all have read the stage before,
    fill((step + kAhead) % Tile::kSteps, before);  // which makes room for a later one
    if constexpr (!kInStep) stage_ = stage == kAhead ? 0 : stage + 1;
    return ring_ + stage * Tile::kStageBytes;
  }

  // B of both mma of a step: columns 8 n .. of its two halves of 16.
  __device__ __forceinline__ void load(uint32_t (&b)[4], Shared<unsigned char> stage, int n) const {
    ldmatrix(b, stage + (8 * n * kRowBytes + swizzled(lane_ % 8, lane_ / 8)));
  }

  // Two elements of vector 0 (bias), 1 (gamma) or 2 (beta), of the layer whose first step has come.
  __device__ __forceinline__ float2 vector(int i, int column) const {
    const bool is_float = i == 0 ? args_.bias.is_float : i == 1 ? args_.ln_weight.is_float : args_.ln_bias.is_float;
    return load_pair<T>(vectors_ + (reads_ * 3 + i) * Tile::kVectorBytes, column, is_float);
  }

 private:
  static constexpr int kRowBytes = kPieces * 16;
  static constexpr bool kInStep = Tile::kSteps % Tile::kStages == 0;  // a step is always in the same stage

  // Two rows of a stage span all banks: with pieces permuted every other row, eight rows of ldmatrix do not collide.
  __device__ __forceinline__ static int swizzled(int row, int piece) {
    return row * kRowBytes + (piece ^ (row / 2 % 4)) * 16;
  }

  __device__ __forceinline__ int stage_of(int step) const {
    if constexpr (kInStep) return step % Tile::kStages;
    return stage_;
  }

  // Issues the next copies there are to do, those of step `step` of a layer: one group, be it empty.
  __device__ __forceinline__ void fill(int step, int stage) {
    if (step == 0) {
      layer_ = layer_ + 1 == args_.depth ? 0 : layer_ + 1;
      --layers_left_;
      weight_ = first_weight_ + layer_ * args_.weight_stride;
    }
    if (layers_left_ >= 0) {
      if (step == 0) {
        writes_ ^= 1;
        if (copies_vector_)
          cp_async<16>(vectors_ + (writes_ * 3 * Tile::kVectorBytes + lane_ * 16),
                       first_vector_ + layer_ * vector_stride_);
      }
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n)
        cp_async<16>(ring_ + (stage * Tile::kStageBytes + 8 * n * kRowBytes + to_),
                     weight_ + (8 * n * Tile::kWidth + step * Tile::kDepth));
    }
    cp_async_commit();
  }

  const MlpForwardArgs<T>& args_;
  const int lane_;
  const Shared<unsigned char> ring_, vectors_;
  Global<const T> first_weight_, weight_;  // of the group, and of the layer that is being copied
  Global<const unsigned char> first_vector_;
  int64_t vector_stride_;
  bool copies_vector_;
  int to_;
  int64_t layers_left_;  // to begin
  int layer_ = -1;
  int stage_ = 0;        // of the next step
  int writes_ = 1, reads_ = 1;
};

}  // namespace nsk::cuda
