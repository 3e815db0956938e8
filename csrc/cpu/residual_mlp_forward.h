// One tile of rows through layers of a residual MLP.
//
//   z = W t + b   a panel of rows at a time: the product adds the bias and sums up the mean while z leaves the registers
//   xhat = (z - mean) / sqrt(mean (z - mean)^2 + eps)   two-pass: a second pass over the panel, which is still in cache
//   t = act(xhat gamma + beta), written where t was, as the panel that the next layer multiplies
//
// The weights are read in place and only once per panel, in one linear sweep that is asked for one register tile ahead:
// measured, that beats a packed copy (0.98 of the FMA roof against 0.93), and there is nothing to keep up to date. Where
// they have to be converted, that is done once for the tile: a layer at a time, or where that would not stay in cache,
// some rows of it for all panels. Weights in place that would not stay there pass some rows at a time as well.
#pragma once

#include "residual_mlp_problem.h"

namespace nsk::NSK_ISA {

// What a layer leaves for the backward, for the rows of a tile; null: nothing.
template <class T, class C>
struct MlpKept {
  T* normalised = nullptr;  // strips
  C* rstd = nullptr;
};

template <class T, class C_, class E>
class MlpForwardTile {
 public:
  using C = C_;
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using V = Vec<C, L>;
  using Unit = typename M::Unit;

  // What the rows of a tile need: the panels of x, z and the statistics.
  struct Rows {
    Unit* x;
    C *z, *statistics;

    Rows(const MlpShape& s, ptrdiff_t rows, Arena& arena)
        : x(arena.take<Unit>(ceil_div(s.width, M::pack) * rows)), z(arena.take<C>(s.width * z_rows(s.width, rows))),
          statistics(arena.take<C>(2 * z_rows(s.width, rows))) {}

   private:
    // One panel's, unless all panels take turns.
    static ptrdiff_t z_rows(ptrdiff_t width, ptrdiff_t rows) {
      return round_up(converted_rows(width) < width ? rows : kWidePanel * L, kWidePanel * L);
    }
  };
  // Parameters on their way to where they are used, each thread's own.
  struct Parameters {
    Unit* weights;
    C* vectors;

    Parameters(const MlpShape& s, Arena& arena)
        : weights(arena.take<Unit>(converted_rows(s.width) * ceil_div(s.width, M::pack))),
          vectors(arena.take<C>(3 * s.width)) {}
  };

  // Rows `rows` (a multiple of kStrip) of the group.
  MlpForwardTile(const nsk_residual_mlp& args, int64_t group, ptrdiff_t rows, const Rows& of_rows, const Parameters& own)
      : a(args), group_(group), rows_(rows), width_(args.width), units_(ceil_div(args.width, M::pack)), w(of_rows),
        own_(own) {}

  // Makes strips of C the input of the next layer.
  void begin(const C* strips) {
    for_panels<L>(rows_, [&](auto nv, ptrdiff_t first) {
      constexpr int NV = nv.value;
      store_panel<M, NV>(w.x + units_ * first, width_, 0, width_, [&](ptrdiff_t f, auto count, auto& y) {
        for (int j = 0; j < count.value; ++j)
          for (int v = 0; v < NV; ++v)
            y[j * NV + v] = load<V>(strip_row(strips, first + v * L, width_) + (f + j) * kStrip);
      });
    });
  }

  // Layer `l`. With `in` (the block's input, strips) the layer ends its block: its result is added to it, into `out`.
  // `goes_on`: whether anybody reads what the layer gives, or only what it leaves in `kept`.
  template <Activation A>
  void layer(int64_t l, MlpKept<T, C> kept, bool goes_on, const C* in = nullptr, C* out = nullptr) {
    const LayerVectors<C> vectors(a, group_, l, own_.vectors);
    if constexpr (kAsks) ask_for_layer(l + 1);
    const bool in_turns = rows_at_once(at<const T>(a.weight, group_, l)) < width_;
    for_weights(l, 0, width_, [&](const Weights& weights) {
      for_panels<L>(rows_, [&](auto nv, ptrdiff_t first) {
        constexpr int NV = nv.value;
        const ptrdiff_t place = in_turns ? first : 0;  // panels that take turns have a z each
        C *const z = w.z + place * width_, *const statistics = w.statistics + 2 * place;
        if (weights.begin == 0) fill_zero(statistics, NV * L);
        multiply<NV>(weights, w.x + units_ * first, vectors.bias, z, statistics);
        if (weights.end < width_) return;
        moments<NV>(z, width_, statistics);
        scale<NV>(statistics);
        if (kept.rstd) __builtin_memcpy(kept.rstd + first, statistics + NV * L, NV * L * sizeof(C));
        normalise<A, NV>(w.x + units_ * first, first, z, statistics, vectors, kept, goes_on, in, out, 0, width_);
      });
    });
  }

  // The same layer of a tile that is one panel of NV vectors, by many hands that share `Rows`: each multiplies columns
  // [begin, end), leaves their moments (see `moments`) and, once it knows everybody's, makes these columns of the layer's
  // result out of them.
  template <int NV>
  void part(int64_t l, ptrdiff_t begin, ptrdiff_t end, C* of_columns) {
    const LayerVectors<C> vectors(a, group_, l, own_.vectors);
    fill_zero(of_columns, NV * L);
    for_weights(l, begin, end, [&](const Weights& weights) { multiply<NV>(weights, w.x, vectors.bias, w.z, of_columns); });
    moments<NV>(w.z + begin * NV * L, end - begin, of_columns);
  }
  template <Activation A, int NV>
  void finish(int64_t l, ptrdiff_t begin, ptrdiff_t end, C* of_row, const C* in, C* out) {
    scale<NV>(of_row);
    const LayerVectors<C> vectors(a, group_, l, own_.vectors);
    normalise<A, NV>(w.x, 0, w.z, of_row, vectors, {}, true, in, out, begin, end);
  }

 private:
  // Rows [begin, end) of the weights as `product` reads them.
  struct Weights {
    Broadcast<M> operand;
    ptrdiff_t begin, end;
  };

  ptrdiff_t rows_at_once(const T* weight) const {
    const bool pairs = M::pack == 2 && width_ % 2 == 0 && uintptr_t(weight) % 4 == 0;
    return !M::kTiled && (std::is_same_v<T, C> || pairs) ? rows_in_turn<M>(width_, rows_) : converted_rows(width_);
  }

  // Calls f(Weights) for the pieces that make up rows [begin, end) of layer l.
  template <class F>
  void for_weights(int64_t l, ptrdiff_t begin, ptrdiff_t end, F&& f) {
    const T* const weight = at<const T>(a.weight, group_, l);
    const ptrdiff_t most = rows_at_once(weight);
    for (ptrdiff_t r = begin; r < end; r += most) {
      const ptrdiff_t to = end - r < most ? end : r + most;
      if constexpr (M::kTiled) {
        split_rows(own_.weights, units_, weight + r * width_, width_, to - r, width_);
        f(Weights{{own_.weights, units_}, r, to});
      } else {
        f(Weights{broadcast_rows<M>(weight + r * width_, width_, to - r, width_, own_.weights), r, to});
      }
    }
  }

  // The next layer's weights, while this one's results are normalised: a matrix unit outruns memory, and tiles that are
  // loaded one after the other ask for too little at a time. (What is split is read in a sweep that asks for itself.)
  static constexpr bool kAsks = M::kMatrix && !M::kTiled;
  void ask_for_layer(int64_t l) {
    ptrdiff_t panels = 0;
    for_panels<L>(rows_, [&](auto, ptrdiff_t) { ++panels; });
    upcoming_.begin(panels * ceil_div(width_, 2));
    if (l < a.depth) upcoming_.add(at<const T>(a.weight, group_, l), 0, 1, width_ * width_ * sizeof(T));
  }

  // Their rows of z = W x + b; the sums of its columns are added to `sums`.
  template <int NV>
  void multiply(const Weights& by, const Unit* x, const C* bias, C* z, C* sums) {
    constexpr int NR = NV * L;
    product<M, NV, Along::K, Into::BiasSum>(by.end - by.begin, by.operand.data, by.operand.stride, x, units_,
                                            z + by.begin * NR, NR, sums, NextRows{}, NR, bias + by.begin);
  }

  // Of `n` columns of z, from their sums: each row's mean and sum of squares around it.
  template <int NV>
  [[gnu::noinline]] void moments(const C* z, ptrdiff_t n, C* of_columns) {
    constexpr int NR = NV * L;
    V average[NV], square[NV] = {};
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) average[v] = load<V>(of_columns + v * L) / C(n);
    for (ptrdiff_t f = 0; f < n; ++f)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V d = load<V>(z + f * NR + v * L) - average[v];
        square[v] += d * d;
      }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      store(of_columns + v * L, average[v]);
      store(of_columns + NR + v * L, square[v]);
    }
  }

  // From the sums of squares of whole rows to 1 / sqrt(variance + eps).
  template <int NV>
  void scale(C* of_row) const {
#pragma GCC unroll 4
    for (int v = NV; v < 2 * NV; ++v)
      store(of_row + v * L, C(1) / square_root<C, L>(load<V>(of_row + v * L) / C(width_) + C(a.eps)));
  }

  template <Activation A, int NV>
  [[gnu::noinline]] void normalise(Unit* panel, ptrdiff_t first, const C* z, const C* statistics,
                                   const LayerVectors<C>& vectors, MlpKept<T, C> kept, bool goes_on, const C* in, C* out,
                                   ptrdiff_t begin, ptrdiff_t end) {
    constexpr int NR = NV * L;
    V average[NV], scale[NV];
    ptrdiff_t at[NV];  // where each vector's lanes begin in strips
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      average[v] = load<V>(statistics + v * L);
      scale[v] = load<V>(statistics + NR + v * L);
      at[v] = strip_row(static_cast<char*>(nullptr), first + v * L, width_) - static_cast<char*>(nullptr);
    }
    store_panel<M, NV>(panel, width_, begin, end, [&](ptrdiff_t f, auto count, auto& y) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      if constexpr (kAsks) upcoming_.ask();
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const V xhat = (load<V>(z + (f + j) * NR + v * L) - average[v]) * scale[v];
          if (kept.normalised) store_as<C, L>(kept.normalised + at[v] + (f + j) * kStrip, xhat);
          y[j * NV + v] = xhat * vectors.gamma[f + j] + vectors.beta[f + j];
        }
      if (!goes_on) return;
      activate<A, C, L>(y);
      if (in)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            const ptrdiff_t i = at[v] + (f + j) * kStrip;
            y[j * NV + v] += load<V>(in + i);
            store(out + i, y[j * NV + v]);
          }
    });
  }

  const nsk_residual_mlp& a;
  const int64_t group_;
  const ptrdiff_t rows_, width_, units_;
  const Rows w;
  const Parameters own_;
  Upcoming upcoming_;
};

}  // namespace nsk::NSK_ISA
