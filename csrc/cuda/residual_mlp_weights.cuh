// The weights of a network on their way to the warp that multiplies by them: a ring of stages in shared memory that is
// its own, filled by cp.async some stages ahead.
//
// A product is t W^T, for which a stage is kDepth columns of the warp's rows of W; or t W, for which it is kDepth rows
// of the warp's columns, read from the same W. An order says which products of which layers follow each other. The ring
// runs on from product to product and from tile to tile, so that only the very first stages are waited for in full.
//
// With the first stage of a product come the warp's columns of the vectors of the LayerNorm that follows it, bias,
// gamma and beta, into one of two places in turn. They are read until the next product begins, when the ring has no
// more than the stages of that one under way: the copies into the same place begin later.
#pragma once

#include "residual_mlp_operands.cuh"

namespace nsk::cuda {

// All layers of a tile one after another.
class MlpForwardOrder {
 public:
  static constexpr bool kTransposes = false;  // W for t W, too

  template <class Network>
  __device__ __forceinline__ static int products(const Network& network) {  // of a tile
    return network.depth;
  }
  template <class Network>
  __device__ __forceinline__ void advance(const Network& network) {
    layer_ = layer_ + 1 == network.depth ? 0 : layer_ + 1;
  }
  __device__ __forceinline__ int layer() const { return layer_; }
  __device__ __forceinline__ bool transposed() const { return false; }
  // Whether vector 0 (bias), 1 (gamma) or 2 (beta) is asked for, and the layer it is of.
  __device__ __forceinline__ bool brings(int) const { return true; }
  __device__ __forceinline__ int layer_of_vectors() const { return layer_; }

 private:
  int layer_ = -1;
};

template <class Tile, class Order>
class MlpWeights {
  using T = typename Tile::T;
  static constexpr int kAhead = Tile::kStages - 1;
  static constexpr int kPieces = Tile::kDepth * int(sizeof(T)) / 16;    // of 16 bytes, of a row of a stage
  static constexpr int kAcross = Tile::kColumns * int(sizeof(T)) / 16;  // the same, for t W
  static constexpr int kMostPieces = Tile::kVectorBytes / 16;           // of a vector
  static constexpr int kN = Tile::kN;
  using VectorStride = std::conditional_t<Order::kTransposes, int, int64_t>;  // the backward lacks registers
  static_assert(kPieces == 4 && kAhead <= Tile::kSteps && 3 * kMostPieces <= kWarp);

 public:
  // Sets out for `tiles` times all products of the group.
  __device__ __forceinline__ MlpWeights(const MlpNetwork<T>& args, int64_t group, int64_t tiles, int warp, int lane,
                                        Shared<unsigned char> shared)
      : args_(args), lane_(lane), ring_(shared + Tile::kRings + warp * Tile::kStages * Tile::kStageBytes),
        vectors_(shared + Tile::kVectors + warp * 2 * 3 * Tile::kVectorBytes),
        products_left_(tiles * Order::products(args)) {
    const int own =
        (warp * Tile::kColumns + lane / kPieces) * Tile::kWidth + lane % kPieces * (16 / int(sizeof(T)));
    first_weight_ = args.weight + (group * args.weight_group_stride + own);
    to_ = swizzled<kPieces>(lane / kPieces, lane % kPieces);
    if constexpr (Order::kTransposes) {
      transposed_from_ =
          lane / kAcross * Tile::kWidth + warp * Tile::kColumns + lane % kAcross * (16 / int(sizeof(T))) - own;
      transposed_to_ = swizzled<kAcross, Transposed<T>::kPieces>(lane / kAcross, lane % kAcross);
    }

    // Every lane copies one piece of one of the vectors, or none.
    const int vector = lane / kMostPieces, byte = lane % kMostPieces * 16;
    const MlpTensor<const unsigned char>& from = vector == 0 ? args.bias : vector == 1 ? args.ln_weight : args.ln_bias;
    copies_vector_ = vector < 3 && byte < Tile::kColumns * from.template element_bytes<T>();
    first_vector_ = from.template at<T>(group, 0, warp * Tile::kColumns) + byte;
    vector_stride_ = VectorStride(from.stride) * from.template element_bytes<T>();

#pragma unroll
    for (int step = 0; step < kAhead; ++step) fill(step, step);
  }

  // The weights of step `step` of a product. Steps come in turn; the one before is done with.
  __device__ __forceinline__ Shared<unsigned char> next(int step) {
    if (step == 0) reads_ ^= 1;
    const int stage = stage_of(step), before = stage == 0 ? kAhead : stage - 1;
    cp_async_wait<kAhead - 1>();  // the step's own group has arrived, as far as this lane copied it,
    __syncwarp();                 // and now as far as the others did; and all have read the stage before,
    fill((step + kAhead) % Tile::kSteps, before);  // which makes room for a later one
    if constexpr (!kInStep) stage_ = stage == kAhead ? 0 : stage + 1;
    return ring_ + stage * Tile::kStageBytes;
  }

  // B of both mma of a step: columns 8 n .. of its two halves.
  template <bool kTransposed>
  __device__ __forceinline__ void load(uint32_t (&b)[4], Shared<unsigned char> stage, int n) const {
    using Matrix = Transposed<T>;
    if constexpr (kTransposed)
      Matrix::load(b, lane_, [&](int i, int row, int piece) {
        return stage + swizzled<kAcross, Matrix::kPieces>(i * Matrix::kRows + row, n * Matrix::kPieces + piece);
      });
    else
      ldmatrix(b, stage + (n * kCopyBytes + swizzled<kPieces>(lane_ % 8, lane_ / 8)));
    round_operand<T>(b);
  }

  // Two elements of vector 0 (bias), 1 (gamma) or 2 (beta), that came with the product.
  __device__ __forceinline__ float2 vector(int i, int column) const {
    const bool is_float = i == 0 ? args_.bias.is_float : i == 1 ? args_.ln_weight.is_float : args_.ln_bias.is_float;
    return load_pair<T>(vectors_ + (reads_ * 3 + i) * Tile::kVectorBytes, column, is_float);
  }

 private:
  // A stage is copied by kN copies of each lane: of eight rows at a time, or of 32 / kAcross. Rows that a lane copies
  // lie swizzled in the same way.
  static constexpr int kCopyBytes = kWarp * 16;
  static constexpr bool kInStep = Tile::kSteps % Tile::kStages == 0;  // a step is always in the same stage

  __device__ __forceinline__ int stage_of(int step) const {
    if constexpr (kInStep) return step % Tile::kStages;
    return stage_;
  }

  // Issues the next copies there are to do, those of step `step` of a product: one group, be it empty.
  __device__ __forceinline__ void fill(int step, int stage) {
    if (step == 0) {
      order_.advance(args_);
      --products_left_;
      weight_ = first_weight_ + (order_.layer() * args_.weight_stride + (transposes() ? transposed_from_ : 0));
    }
    if (products_left_ >= 0) {
      if (step == 0) {
        writes_ ^= 1;
        if (copies_vector_ && order_.brings(lane_ / kMostPieces))
          cp_async<16>(vectors_ + (writes_ * 3 * Tile::kVectorBytes + lane_ * 16),
                       first_vector_ + int64_t(order_.layer_of_vectors()) * vector_stride_);
      }
      const int of_step = transposes() ? Tile::kDepth * Tile::kWidth : Tile::kDepth;
      const int of_copy = (transposes() ? kWarp / kAcross : 8) * Tile::kWidth;
      const int to = transposes() ? transposed_to_ : to_;
#pragma unroll
      for (int i = 0; i < kN; ++i)
        cp_async<16>(ring_ + (stage * Tile::kStageBytes + i * kCopyBytes + to),
                     weight_ + (step * of_step + i * of_copy));
    }
    cp_async_commit();
  }
  __device__ __forceinline__ bool transposes() const { return Order::kTransposes && order_.transposed(); }

  const MlpNetwork<T>& args_;
  Order order_;  // of what is being copied
  const int lane_;
  const Shared<unsigned char> ring_, vectors_;
  Global<const T> first_weight_, weight_;  // of the group, and of the product whose weights are being copied
  Global<const unsigned char> first_vector_;
  VectorStride vector_stride_;
  bool copies_vector_;
  int to_, transposed_to_ = 0, transposed_from_ = 0;  // the last from where W^T starts
  int64_t products_left_;  // to begin
  int stage_ = 0;        // of the next step
  int writes_ = 1, reads_ = 1;
};

}  // namespace nsk::cuda
