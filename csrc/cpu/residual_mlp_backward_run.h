// Runs the backward of residual MLPs.
//
// From the last layer to the first, a few layers of one block at a time, in two parallel steps: tiles of rows go down the
// chain and leave the operands of dW; then the dW of all these layers are multiplied, each by the whole batch. What lies
// between the steps is small enough to stay in cache, and what is kept from the forward is read once.
//
// Without `normalised` the chain's first step in a block runs the block's forward again, from its kept input, on the same
// tile with the same code.
#pragma once

#include "residual_mlp_forward.h"
#include "residual_mlp_split_grad.h"
#include "residual_mlp_weight_grad.h"

namespace nsk::NSK_ISA {

template <class T, class C, class E>
class MlpBackwardRun {
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using Unit = typename M::Unit;
  using Operands = MlpWeightOperands<typename M::Stored>;
  using Forward = MlpForwardTile<T, C, E>;
  using Chain = MlpChainTile<T, C, E>;
  using WeightGrad = std::conditional_t<M::kTiled, MlpSplitWeightGrad<C, E>, MlpWeightGrad<T, C, E>>;
  // Between the two steps. A matrix unit gains from longer steps even where their operands leave all but the last cache.
  static constexpr int64_t kMostLayers = 4, kMostBytes = M::kMatrix ? 32 << 20 : 8 << 20;

 public:
  static nsk_status run(const nsk_residual_mlp_backward& b) {
    if (b.forward.rows == 0 || b.forward.groups == 0) return NSK_OK;
    MlpBackwardRun work(b);
    if (work.gradients_.failed() || work.operands_.failed() || work.shares_.failed() || work.weights_.failed() ||
        work.normalised_.failed() || work.rstd_.failed())
      return NSK_OUT_OF_MEMORY;
    nsk_status status = work.between(work.s.depth, work.s.depth);
    for (int64_t hi = work.s.depth; hi > 0 && status == NSK_OK;) {
      const int64_t lo = work.below(hi);
      status = work.chain(lo, hi);
      if (status == NSK_OK) status = work.between(lo, hi);
      hi = lo;
    }
    return status;
  }

 private:
  explicit MlpBackwardRun(const nsk_residual_mlp_backward& args)
      : b(args), a(args.forward), s(args.forward), tiles(s, args.forward.threads, most_rows<M>(args.forward.width)),
        recompute_(!a.normalised.data), wants_weight_(b.grad_weight.data),
        wants_vectors_(b.grad_bias.data || b.grad_ln_weight.data || b.grad_ln_bias.data), in_place_(weights_in_place()),
        layers_(layers_at_once()), weight_grad_(s, layers_, a.threads),
        gradients_(2 * s.groups * s.matrix()), operands_(wants_weight_ ? layers_ * s.groups * operand_units() : 0),
        shares_(wants_vectors_ ? layers_ * s.groups * tiles.per_group * 3 * s.width : 0),
        weights_(in_place_ ? 0 : layers_ * s.groups * weight_units()),
        normalised_(recompute_ ? s.per_block * s.groups * s.matrix() : 0),
        rstd_(recompute_ ? s.per_block * s.groups * s.padded : 0) {}

  int64_t operand_units() const {
    return round_up(Operands::dz_units(s), 16) + round_up(Operands::x_units(s), 16);
  }
  int64_t weight_units() const { return round_up(ceil_div(s.width, M::pack) * weights_stride(), 16); }

  // Whether the chain takes the weights as they are. Where a column of them is in one set of the nearest cache, a line is gone
  // before the next register tile needs the rest of it: from some rows on it pays to copy the weights first (measured on
  // Zen 3, the chain of 512 rows of width 1024: 0.78 instead of 0.65 of the FMA roof).
  bool weights_in_place() const {
    constexpr int64_t kLeastRows = 512;
    const bool worth_a_copy = !M::kTiled && s.rows >= kLeastRows && in_one_set(s.width * int64_t(sizeof(Unit)));
    return std::is_same_v<T, C> && !worth_a_copy;
  }
  // From one row of them to the next, where they lie in rows.
  int64_t weights_stride() const { return in_place_ ? s.width : odd_lines<Unit>(s.width); }

  int64_t layers_at_once() const {
    const int64_t of_operands = operand_units() * int64_t(sizeof(typename Operands::Unit));
    const int64_t bytes = s.groups * (of_operands + weight_units() * int64_t(sizeof(Unit)));
    int64_t layers = kMostBytes / bytes < kMostLayers ? kMostBytes / bytes : kMostLayers;
    if (layers < 1) layers = 1;
    return layers < s.per_block ? layers : s.per_block;
  }
  // The first of the layers that go with layer hi - 1: never across the start of a block.
  int64_t below(int64_t hi) const {
    const int64_t block = (hi - 1) / s.per_block * s.per_block;
    return hi - layers_ > block ? hi - layers_ : block;
  }

  Operands operands(int64_t group, int64_t l) const {
    if (!wants_weight_) return {nullptr, nullptr};
    typename Operands::Unit* const base = operands_.data() + (l % layers_ * s.groups + group) * operand_units();
    return {base, base + round_up(Operands::dz_units(s), 16)};
  }
  C* shares(int64_t group, int64_t l) const {
    return shares_.data() + (l % layers_ * s.groups + group) * tiles.per_group * 3 * s.width;
  }
  // The weights as the chain reads them (kWeightsAlong there). Where they are converted, those of the next layers take the
  // place of the last ones' once the chain is done with these, while the parameters' gradients are computed.
  Unit* converted(int64_t group, int64_t l) const {
    return weights_.data() + (l % layers_ * s.groups + group) * weight_units();
  }
  const Unit* weights(int64_t group, int64_t l) const {
    if constexpr (M::kTiled)
      return nullptr;  // the chain splits them
    else if (in_place_)
      return at<const Unit>(a.weight, group, l);
    else
      return converted(group, l);
  }

  // ---- the chain

  nsk_status chain(int64_t lo, int64_t hi) {
    Arena forward, own;  // one after the other in the same memory
    if (recompute_) lay_out_forward(forward);
    typename Chain::Workspace(s, tiles.largest(), own);
    const size_t bytes = forward.used() > own.used() ? forward.used() : own.used();
    return parallel_for(a.threads, s.groups * tiles.per_group, bytes, [&](int64_t unit, char* memory) {
      [[maybe_unused]] const Multiplier<M> multiplier;
      const int64_t group = unit / tiles.per_group, tile = unit % tiles.per_group;
      with_activation(a.activation, [&](auto act) { run_tile<act.value>(lo, hi, group, tile, memory); });
    });
  }

  template <Activation A>
  void run_tile(int64_t lo, int64_t hi, int64_t group, int64_t tile, char* memory) {
    const ptrdiff_t row0 = tiles.first_row(tile), rows = tiles.size(tile), at_row = row0 * s.width;
    const int64_t block = lo / s.per_block, first = block * s.per_block, end = first + s.per_block;
    C* const skip = gradients_.data() + group * s.matrix() + at_row;  // of the stream
    C* const inner = skip + s.groups * s.matrix();                    // of what flows inside a block
    const C* const stream =
        a.stream.data ? static_cast<const C*>(a.stream.data) + (group * s.blocks() + block) * s.matrix() + at_row : nullptr;
    if (hi == s.depth) load_gradient(skip, group, row0, rows);
    if (recompute_ && hi == end) run_forward<A>(first, group, row0, rows, stream, memory);

    Arena arena(memory);
    Chain work(a, s, group, row0, rows, typename Chain::Workspace(s, tiles.largest(), arena));
    for (int64_t l = hi - 1; l >= lo; --l) {
      typename Chain::Layer layer{};
      const auto kept = this->kept(group, l, row0);
      layer.l = l;
      layer.normalised = kept.normalised;
      layer.below = l > (recompute_ ? first : 0) ? this->kept(group, l - 1, row0).normalised : nullptr;
      layer.rstd = kept.rstd;
      layer.da = l + 1 == end ? skip : inner;
      layer.dx = l == first ? skip : inner;
      if (l == 0 && !b.grad_x.data) layer.dx = nullptr;
      layer.add = l == first;
      layer.weights = weights(group, l);
      layer.weights_stride = weights_stride();
      layer.own = operands(group, l);
      if (l + 1 < hi) layer.above = operands(group, l + 1);
      if (wants_vectors_) layer.partial = shares(group, l) + tile * 3 * s.width;
      work.template layer<A>(layer);
    }
    if (wants_weight_) {
      if (lo == first)
        work.operand_from_stream(stream, operands(group, lo));
      else
        work.template operand_from_normalised<A>(lo - 1, kept(group, lo - 1, row0).normalised, operands(group, lo));
    }
    if (lo == 0 && b.grad_x.data) store_gradient(skip, group, row0, rows);
  }

  MlpKept<T, C> kept(int64_t group, int64_t l, ptrdiff_t row0) const {
    if (recompute_) {
      const int64_t i = l % s.per_block * s.groups + group;
      return {normalised_.data() + i * s.matrix() + row0 * s.width, rstd_.data() + i * s.padded + row0};
    }
    const int64_t i = group * s.depth + l;
    return {static_cast<T*>(a.normalised.data) + i * s.matrix() + row0 * s.width,
            static_cast<C*>(a.rstd.data) + i * s.padded + row0};
  }

  auto lay_out_forward(Arena& arena) const {
    const typename Forward::Rows rows(s, tiles.largest(), arena);
    return std::pair(rows, typename Forward::Parameters(s, arena));
  }

  template <Activation A>
  void run_forward(int64_t first, int64_t group, ptrdiff_t row0, ptrdiff_t rows, const C* stream, char* memory) {
    Arena arena(memory);
    const auto [of_rows, own] = lay_out_forward(arena);
    Forward work(a, group, rows, of_rows, own);
    work.begin(stream);
    for (int64_t l = first; l < first + s.per_block; ++l)
      work.template layer<A>(l, kept(group, l, row0), l + 1 < first + s.per_block);
  }

  void load_gradient(C* panels, int64_t group, ptrdiff_t row0, ptrdiff_t rows) const {
    with_type<T>(b.grad_y.dtype, [&](auto type) {
      using X = decltype(type);
      for_panels<L>(rows, [&](auto nv, ptrdiff_t first) {
        const X* from[nv.value * L];
        for (ptrdiff_t i = 0; i < nv.value * L; ++i)
          from[i] = row0 + first + i < s.rows ? at<const X>(b.grad_y, group, 0, row0 + first + i) : nullptr;
        pack_transposed<Math<C, C, L>, nv.value>(panels + first * s.width, from, s.width);
      });
    });
  }
  void store_gradient(const C* panels, int64_t group, ptrdiff_t row0, ptrdiff_t rows) const {
    with_type<T>(b.grad_x.dtype, [&](auto type) {
      for_panels<L>(rows, [&](auto nv, ptrdiff_t first) {
        for (ptrdiff_t r = first; r < first + nv.value * L && row0 + r < s.rows; r += L)
          store_lanes<C>(panels + first * s.width + r - first, nv.value * L,
                         at<decltype(type)>(b.grad_x, group, 0, row0 + r), b.grad_x.stride[2], s.rows - row0 - r, s.width);
      });
    });
  }

  // ---- between two steps of the chain: the parameters' gradients of layers [lo, hi), the weights of the layers before

  nsk_status between(int64_t lo, int64_t hi) {
    const int64_t layers = hi - lo, next = lo > 0 ? below(lo) : 0;
    const int64_t dw = wants_weight_ ? weight_grad_.units() : 0, vectors = wants_vectors_ ? 1 : 0;
    const int64_t grads = layers * s.groups * (dw + vectors);
    const int64_t pieces = ceil_div(s.width, kRowsConverted), conversions = in_place_ ? 0 : (lo - next) * s.groups * pieces;
    if (grads + conversions == 0) return NSK_OK;
    return parallel_for(a.threads, grads + conversions, weight_grad_.scratch_bytes(), [&](int64_t unit, char* memory) {
      [[maybe_unused]] const Multiplier<M> multiplier;
      if (unit >= grads) {
        const int64_t i = unit - grads, l = next + i / pieces / s.groups, group = i / pieces % s.groups;
        return convert(group, l, i % pieces * kRowsConverted);
      }
      const int64_t l = lo + unit / (dw + vectors) / s.groups, group = unit / (dw + vectors) % s.groups;
      const int64_t part = unit % (dw + vectors);
      if (part < dw)
        weight_grad_.run(operands(group, l), at<T>(b.grad_weight, group, l), part, reinterpret_cast<C*>(memory));
      else
        add_vector_grads<T, C>(b, group, l, shares(group, l), tiles.per_group);
    });
  }

  static constexpr ptrdiff_t kRowsConverted = 64;  // even: pairs of rows stay together

  void convert(int64_t group, int64_t l, ptrdiff_t out) const {
    const T* from = at<const T>(a.weight, group, l, out);
    const ptrdiff_t rows = s.width - out < kRowsConverted ? s.width - out : kRowsConverted, stride = weights_stride();
    Unit* const to = converted(group, l);
    if constexpr (M::kTiled)
      return;
    else if constexpr (M::kMatrix)
      transpose_pairs<M>(to + out / 2, ceil_div(s.width, 2), from, s.width, rows, s.width);
    else
      for (ptrdiff_t r = 0; r < rows; r += M::pack) {
        const T* const row = from + r * s.width;
        Unit* const units = to + (out + r) / M::pack * stride;
        if constexpr (M::pack == 1)
          scale_row<C>(units, row, C(1), s.width);
        else
          broadcast_columns<M>(row, s.width, rows - r < 2 ? rows - r : 2, s.width, units);
      }
  }

  const nsk_residual_mlp_backward& b;
  const nsk_residual_mlp& a;
  const MlpShape s;
  const RowTiles tiles;
  const bool recompute_, wants_weight_, wants_vectors_, in_place_;
  const int64_t layers_;
  const WeightGrad weight_grad_;
  const Buffer<C> gradients_;      // [stream, inner][group] matrices in panels of tiles
  const Buffer<typename Operands::Unit> operands_;    // [layer][group] dz and x
  const Buffer<C> shares_;         // [layer][group][tile][3][width]
  const Buffer<Unit> weights_;     // [layer][group] as kWeightsAlong says
  const Buffer<T> normalised_;     // [layer of the block][group] strips
  const Buffer<C> rstd_;           // [layer of the block][group][padded]
};

}  // namespace nsk::NSK_ISA
