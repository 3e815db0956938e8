// One tile of rows backward through layers of a residual MLP: the part that is sequential.
//
// With a = act(y), y = xhat gamma + beta, xhat = (z - mean) rstd, z = W x + b, and da coming in:
//   dy = da act'(y);  u = dy gamma;  dz = rstd (u - mean(u) - xhat mean(u xhat));  dx = W^T dz
//   dbeta = sum dy;  dgamma = sum dy xhat;  db = sum dz   over the rows
// dW = dz^T x has no part in the chain: the chain writes its operands, dz and x, and another pass multiplies them.
// x is the activation of the layer below, which the chain meets on its way down anyway.
//
// A panel of rows at a time: a first pass over xhat and da gives u and the two means, a second one dz, and then the
// product with the weights, read in place, gives the da of the layer below.
#pragma once

#include "residual_mlp_problem.h"

namespace nsk::NSK_ISA {

// The operands of one layer's dW = dz^T x, as `product` reads them.
//   dz [width][padded rows] elements: the broadcast operand, its rows run along the batch, an odd number of cache lines
//      apart, so that a column of them does not fall into a few sets of the cache
//   x  panels of columns, each [padded rows / pack][columns] units
template <class M>
struct MlpWeightOperands {
  using Unit = typename M::Unit;
  static constexpr int pack = M::pack;
  Unit *dz, *x;

  // In units.
  static ptrdiff_t dz_stride(const MlpShape& s) { return odd_lines<Unit>(s.padded / M::pack); }
  static ptrdiff_t dz_units(const MlpShape& s) { return s.width * dz_stride(s); }
  static ptrdiff_t x_units(const MlpShape& s) { return round_up(s.width, M::L) * s.padded / M::pack; }
};

template <class T, class C_, class E>
class MlpChainTile {
 public:
  using C = C_;
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using V = Vec<C, L>;
  using Unit = typename M::Unit;
  using Operands = MlpWeightOperands<typename M::Stored>;
  using Element = std::conditional_t<M::Stored::pack == 2, bf16, C>;

  // dx = W^T dz reads the weights' rows, [out units][in]; a matrix unit those of W^T, [in][out units].
  static constexpr Along kWeightsAlong = M::kMatrix ? Along::K : Along::Rows;

  struct Workspace {
    C *u, *sums, *vectors;
    Element* act;
    Unit *dz, *weights;

    // For tiles of up to `rows` rows.
    Workspace(const MlpShape& s, ptrdiff_t rows, Arena& arena) {
      const ptrdiff_t panel = s.width * kWidePanel * L;
      u = arena.take<C>(panel);
      act = arena.take<Element>(panel);
      weights = arena.take<Unit>(M::kTiled ? s.width / 2 * rows_at_once(s.width) : 0);
      const ptrdiff_t lanes = rows_at_once(s.width) < s.width ? round_up(rows, kWidePanel * L) : kWidePanel * L;
      dz = M::pack == 1 ? reinterpret_cast<Unit*>(u) : arena.take<Unit>(round_up(s.width, 2) / 2 * lanes);
      sums = arena.take<C>(3 * round_up(s.width, L) * L);
      vectors = arena.take<C>(3 * s.width);
    }
  };

  // What one layer of the chain reads and writes, for the rows of the tile.
  struct Layer {
    int64_t l;
    const T* normalised;  // strips
    const T* below;       // those of the layer below, to ask for meanwhile; null: there is none
    const C* rstd;
    const C* da;         // panels
    C* dx;               // panels; null: nobody asks
    bool add;            // dx is added to what is there
    const Unit* weights;  // as kWeightsAlong says; null: they are split here
    ptrdiff_t weights_stride;  // of rows
    Operands own, above;  // dz of this layer and x of the one above; null: nobody asks
    C* partial;          // [3][width]: this tile's share of db, dgamma, dbeta; null: nobody asks
  };

  MlpChainTile(const nsk_residual_mlp& args, const MlpShape& shape, int64_t group, ptrdiff_t row0, ptrdiff_t rows,
               const Workspace& workspace)
      : a(args), s(shape), group_(group), row0_(row0), rows_(rows), width_(shape.width), w(workspace) {}

  template <Activation A>
  void layer(const Layer& work) {
    const LayerVectors<C> vectors(a, group_, work.l, w.vectors);
    // Where weights are split some rows of W^T at a time, all panels take turns with them, and have a dz each.
    const ptrdiff_t most = rows_at_once(width_), units = ceil_div(width_, M::pack);
    const bool in_turns = most < width_;
    if (work.dx && !in_turns) split_weights(work.l, 0, width_);
    if (work.partial) fill_zero(w.sums, 3 * round_up(width_, L) * L);
    for_panels<L>(rows_, [&](auto nv, ptrdiff_t first) {
      constexpr int NV = nv.value;
      V means[2 * NV];
      through_activation<A, NV>(work, vectors, first, means);
      if (work.above.x) store_operand<NV>(work.above.x, first);
      Unit* const dz = w.dz + (in_turns ? units * first : 0);
      through_normalisation<NV>(work, first, means, dz);
      if (work.dx && !in_turns) multiply<NV>(work, 0, width_, dz, work.dx + first * width_);
    });
    if (work.dx && in_turns)
      for (ptrdiff_t r = 0; r < width_; r += most) {
        const ptrdiff_t end = width_ - r < most ? width_ : r + most;
        split_weights(work.l, r, end);
        for_panels<L>(rows_, [&](auto nv, ptrdiff_t first) {
          multiply<nv.value>(work, r, end, w.dz + units * first, work.dx + first * width_);
        });
      }
    if (work.partial) store_sums(work.partial);
  }

  // x of a block's first layer: the stream, in strips.
  void operand_from_stream(const C* strips, Operands to) {
    for_panels<L>(rows_, [&](auto nv, ptrdiff_t first) {
      constexpr int NV = nv.value;
      for (ptrdiff_t f = 0; f < width_; ++f) {
        V y[NV];
        for (int v = 0; v < NV; ++v) y[v] = load<V>(strip_row(strips, first + v * L, width_) + f * kStrip);
        store_elements<NV>(f, y);
      }
      store_operand<NV>(to.x, first);
    });
  }

  // x of another layer, from xhat of the one below it, `below`.
  template <Activation A>
  void operand_from_normalised(int64_t below, const T* normalised, Operands to) {
    const LayerVectors<C> vectors(a, group_, below, w.vectors);
    for_panels<L>(rows_, [&](auto nv, ptrdiff_t first) {
      constexpr int NV = nv.value;
      for (ptrdiff_t f = 0; f < width_; ++f) {
        V y[NV];
        for (int v = 0; v < NV; ++v)
          y[v] = load_as<C, L>(strip_row(normalised, first + v * L, width_) + f * kStrip) * vectors.gamma[f] +
                 vectors.beta[f];
        activate<A, C, L>(y);
        store_elements<NV>(f, y);
      }
      store_operand<NV>(to.x, first);
    });
  }

 private:
  static constexpr ptrdiff_t rows_at_once(ptrdiff_t width) { return M::kTiled ? converted_rows(width) : width; }

  // Rows [begin, end) of W^T.
  void split_weights(int64_t l, ptrdiff_t begin, ptrdiff_t end) {
    if constexpr (M::kTiled)
      split_columns(w.weights, at<const T>(a.weight, group_, l) + begin, width_, width_, end - begin);
  }

  // Rows [begin, end) of dx = W^T dz.
  template <int NV>
  void multiply(const Layer& work, ptrdiff_t begin, ptrdiff_t end, const Unit* dz, C* dx) {
    constexpr int NR = NV * L;
    const ptrdiff_t units = ceil_div(width_, M::pack), stride = kWeightsAlong == Along::K ? units : work.weights_stride;
    const Unit* const weights = M::kTiled ? w.weights : work.weights;
    const auto ahead = [&] {
      if constexpr (kWeightsAlong == Along::K)
        return NextRows{};
      else
        return Beside::of_rows(stride * ptrdiff_t(sizeof(Unit)));
    }();
    C* const c = dx + begin * NR;
    if (work.add)
      product<M, NV, kWeightsAlong, Into::Add>(end - begin, weights, stride, dz, units, c, NR, nullptr, ahead);
    else
      product<M, NV, kWeightsAlong, Into::Fresh>(end - begin, weights, stride, dz, units, c, NR, nullptr, ahead);
  }

  C* sums_of(int which, ptrdiff_t f) const { return w.sums + (which * round_up(width_, L) + f) * L; }

  template <int NV>
  static NSK_INLINE V add_up(const V (&x)[NV]) {
    V sum = x[0];
#pragma GCC unroll 4
    for (int v = 1; v < NV; ++v) sum += x[v];
    return sum;
  }
  static NSK_INLINE void accumulate(C* to, V x) { store(to, load<V>(to) + x); }

  template <int NV>
  NSK_INLINE void store_elements(ptrdiff_t f, const V (&y)[NV]) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store_as<C, L>(w.act + f * NV * L + v * L, y[v]);
  }

  // Where each vector of a panel begins in strips.
  template <int NV>
  NSK_INLINE void strip_offsets(ptrdiff_t first, ptrdiff_t (&at)[NV]) const {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      at[v] = strip_row(static_cast<char*>(nullptr), first + v * L, width_) - static_cast<char*>(nullptr);
  }

  // da -> u in w.u, a in w.act, the sums of dbeta and dgamma, and mean(u) and mean(u xhat) of each lane.
  template <Activation A, int NV>
  [[gnu::noinline]] void through_activation(const Layer& work, const LayerVectors<C>& vectors, ptrdiff_t first,
                                            V (&means)[2 * NV]) {
    constexpr int NR = NV * L;
    ptrdiff_t at[NV];
    strip_offsets<NV>(first, at);
    V c1[NV] = {}, c2[NV] = {};
    const C* da = work.da + first * width_;
    for (ptrdiff_t f = 0; f < width_; ++f) {
      const C gamma = vectors.gamma[f], beta = vectors.beta[f];
      V xhat[NV], y[NV], dy[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        xhat[v] = load_as<C, L>(work.normalised + at[v] + f * kStrip);
        y[v] = xhat[v] * gamma + beta;
        dy[v] = load<V>(da + f * NR + v * L);
      }
      activate_and_back<A, C, L>(y, dy);
      if (work.above.x) store_elements<NV>(f, y);
      if (work.partial) accumulate(sums_of(2, f), add_up<NV>(dy));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V u = dy[v] * gamma;
        c1[v] += u;
        c2[v] += u * xhat[v];
        store(w.u + f * NR + v * L, u);
        dy[v] *= xhat[v];
      }
      if (work.partial) accumulate(sums_of(1, f), add_up<NV>(dy));
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      means[v] = c1[v] / C(width_);
      means[NV + v] = c2[v] / C(width_);
    }
  }

  // u -> dz, as the panel of the chain's product and as the operand of dW, and the sums of db.
  template <int NV>
  [[gnu::noinline]] void through_normalisation(const Layer& work, ptrdiff_t first, const V (&means)[2 * NV], Unit* panel) {
    constexpr int NR = NV * L;
    ptrdiff_t at[NV];
    strip_offsets<NV>(first, at);
    // What the next panel will read, of this layer or of the one below.
    const bool last = first + NR >= rows_;
    const T* const coming = last ? work.below : work.normalised + at[0] + NR * width_;
    V scale[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) scale[v] = load<V>(work.rstd + first + v * L);
    Element* const operand = work.own.dz ? reinterpret_cast<Element*>(work.own.dz) + row0_ + first : nullptr;
    const ptrdiff_t stride = Operands::dz_stride(s) * Operands::pack;
    store_panel<M, NV>(panel, width_, 0, width_, [&](ptrdiff_t f, auto count, auto& dz) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) {
        if (coming)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) __builtin_prefetch(coming + at[v] - at[0] + (f + j) * kStrip, 0, 2);
        V one[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const V xhat = load_as<C, L>(work.normalised + at[v] + (f + j) * kStrip);
          one[v] = (load<V>(w.u + (f + j) * NR + v * L) - means[v] - xhat * means[NV + v]) * scale[v];
          dz[j * NV + v] = one[v];
        }
        if (operand)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) store_as<C, L>(operand + (f + j) * stride + v * L, one[v]);
        if (work.partial) accumulate(sums_of(0, f + j), add_up<NV>(one));
      }
    });
  }

  // w.act, [feature][row], as rows of the dW operand x: panels of columns, [row][feature].
  template <int NV>
  [[gnu::noinline]] void store_operand(typename Operands::Unit* x, ptrdiff_t first) {
    constexpr int NR = NV * L;
    const ptrdiff_t row = row0_ + first;
    for_panels<L>(round_up(width_, L), [&](auto columns, ptrdiff_t f) {
      constexpr int NC = columns.value * L;
      const Element* rows[NC];
      for (int i = 0; i < NC; ++i) rows[i] = f + i < width_ ? w.act + (f + i) * NR : nullptr;
      pack_transposed<typename M::Stored, columns.value>(x + (f * s.padded + row * NC) / Operands::pack, rows, NR);
    });
  }

  // The sums' lanes added up, L features at a time.
  void store_sums(C* partial) const {
    for (int which = 0; which < 3; ++which)
      for (ptrdiff_t f = 0; f < width_; f += L) {
        V block[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = load<V>(sums_of(which, f + i));
        transpose(block);
        V sum = block[0];
#pragma GCC unroll 16
        for (int i = 1; i < L; ++i) sum += block[i];
        store_up_to<C, L>(partial + which * width_ + f, sum, width_ - f);
      }
  }

  const nsk_residual_mlp& a;
  const MlpShape& s;
  const int64_t group_;
  const ptrdiff_t row0_, rows_, width_;
  const Workspace w;
};

}  // namespace nsk::NSK_ISA
