// One tile of rows through layers of a residual MLP.
//
//   z = W t + b   a panel of rows at a time: the product adds the bias and sums up the mean while z leaves the registers
//   xhat = (z - mean) / sqrt(mean (z - mean)^2 + eps)   two-pass: a second pass over the panel, which is still in cache
//   t = act(xhat gamma + beta), written where t was, as the panel that the next layer multiplies
//
// The weights are read in place and only once per panel, in one linear sweep that is asked for one register tile ahead:
// measured, that beats a packed copy (0.98 of the FMA roof against 0.93), and there is nothing to keep up to date.
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

  // What the rows of a tile need: the panels of x, and z and the statistics of one panel.
  struct Rows {
    Unit* x;
    C *z, *statistics;

    Rows(const MlpShape& s, ptrdiff_t rows, Arena& arena)
        : x(arena.take<Unit>(ceil_div(s.width, M::pack) * rows)), z(arena.take<C>(s.width * kWidePanel * L)),
          statistics(arena.take<C>(2 * kWidePanel * L)) {}
  };
  // Parameters on their way to where they are used, each thread's own.
  struct Parameters {
    Unit* weights;
    C* vectors;

    Parameters(const MlpShape& s, Arena& arena)
        : weights(arena.take<Unit>(chunk_rows(s.width) * ceil_div(s.width, M::pack))), vectors(arena.take<C>(3 * s.width)) {}
  };

  // Rows `rows` (a multiple of kStrip) of the group.
  MlpForwardTile(const nsk_residual_mlp& args, int64_t group, ptrdiff_t rows, const Rows& of_rows, const Parameters& own)
      : a(args), group_(group), rows_(rows), width_(args.width), units_(ceil_div(args.width, M::pack)), w(of_rows),
        own_(own) {}

  // Makes strips of C the input of the next layer.
  void begin(const C* strips) {
    for_panels<L>(rows_, [&](auto nv, ptrdiff_t first) {
      constexpr int NV = nv.value;
      store_panel<M, NV>(w.x + units_ * first, width_, [&](ptrdiff_t f, auto count, auto& y) {
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
    for_panels<L>(rows_, [&](auto nv, ptrdiff_t first) {
      constexpr int NV = nv.value;
      Unit* panel = w.x + units_ * first;
      fill_zero(w.statistics, NV * L);
      multiply<NV>(l, panel, vectors.bias, 0, width_, w.statistics);
      finish_statistics<NV>();
      if (kept.rstd)
        for (int v = 0; v < NV; ++v) store(kept.rstd + first + v * L, rstd(v, NV));
      normalise<A, NV>(panel, first, vectors, kept, goes_on, in, out);
    });
  }

  // The same layer of a tile that is one panel, by many hands: each multiplies columns [begin, end) and leaves their sums
  // in `sums`, one hand then finishes with everybody's sums, `count` of them. They share `Rows`.
  static constexpr ptrdiff_t kPanelRows = kStrip <= kWidePanel * L ? kStrip : 0;  // 0: vectors are too short for that

  void part(int64_t l, ptrdiff_t begin, ptrdiff_t end, C* sums) {
    if constexpr (kPanelRows > 0) {
      const LayerVectors<C> vectors(a, group_, l, own_.vectors);
      fill_zero(sums, kPanelRows);
      multiply<kPanelRows / L>(l, w.x, vectors.bias, begin, end, sums);
    }
  }
  template <Activation A>
  void finish(int64_t l, const C* sums, int64_t count, const C* in, C* out) {
    if constexpr (kPanelRows > 0) {
      constexpr int NV = kPanelRows / L;
      const LayerVectors<C> vectors(a, group_, l, own_.vectors);
      fill_zero(w.statistics, kPanelRows);
      for (int64_t i = 0; i < count; ++i)
        for (ptrdiff_t r = 0; r < kPanelRows; ++r) w.statistics[r] += sums[i * kPanelRows + r];
      finish_statistics<NV>();
      normalise<A, NV>(w.x, 0, vectors, {}, true, in, out);
    }
  }

 private:
  // Rows of weights that are converted at a time, where they are not read in place.
  static constexpr ptrdiff_t chunk_rows(ptrdiff_t width) {
    const ptrdiff_t rows = (32 << 10) / width / 16 * 16;
    return rows < 16 ? 16 : rows > 256 ? 256 : rows;
  }

  NSK_INLINE V mean(int v) const { return load<V>(w.statistics + v * L); }
  NSK_INLINE V rstd(int v, int nv) const { return load<V>(w.statistics + (nv + v) * L); }

  // Rows [begin, end) of z = W x + b; the sums of their columns are added to `sums`.
  template <int NV>
  void multiply(int64_t l, const Unit* x, const C* bias, ptrdiff_t begin, ptrdiff_t end, C* sums) {
    constexpr int NR = NV * L;
    const T* weight = at<const T>(a.weight, group_, l);
    const bool in_place = std::is_same_v<T, C> || (M::pack == 2 && width_ % 2 == 0 && uintptr_t(weight) % 4 == 0);
    const ptrdiff_t most = in_place ? width_ : chunk_rows(width_);
    for (ptrdiff_t r = begin; r < end; r += most) {
      const ptrdiff_t n = end - r < most ? end - r : most;
      const auto rows = broadcast_rows<M>(weight + r * width_, width_, n, width_, own_.weights);
      product<M, NV, Along::K, Into::BiasSum>(n, rows.data, rows.stride, x, units_, w.z + r * NR, NR, sums, NextRows{}, NR,
                                              bias + r);
    }
  }

  // From sums to means and 1 / sqrt(variance + eps).
  template <int NV>
  [[gnu::noinline]] void finish_statistics() {
    constexpr int NR = NV * L;
    V average[NV], square[NV] = {};
    const C n = C(width_);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) average[v] = mean(v) / n;
    for (ptrdiff_t f = 0; f < width_; ++f)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V d = load<V>(w.z + f * NR + v * L) - average[v];
        square[v] += d * d;
      }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      store(w.statistics + v * L, average[v]);
      store(w.statistics + NR + v * L, C(1) / square_root<C, L>(square[v] / n + C(a.eps)));
    }
  }

  template <Activation A, int NV>
  [[gnu::noinline]] void normalise(Unit* panel, ptrdiff_t first, const LayerVectors<C>& vectors, MlpKept<T, C> kept,
                                   bool goes_on, const C* in, C* out) {
    constexpr int NR = NV * L;
    V average[NV], scale[NV];
    ptrdiff_t at[NV];  // where each vector's lanes begin in strips
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      average[v] = mean(v);
      scale[v] = rstd(v, NV);
      at[v] = strip_row(static_cast<char*>(nullptr), first + v * L, width_) - static_cast<char*>(nullptr);
    }
    store_panel<M, NV>(panel, width_, [&](ptrdiff_t f, auto count, auto& y) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const V xhat = (load<V>(w.z + (f + j) * NR + v * L) - average[v]) * scale[v];
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
};

}  // namespace nsk::NSK_ISA
