// Residual MLPs: how the work is cut, and how data is laid out.
//
//   h = x;  for each block { t = h;  layers_per_block times  t = act(LayerNorm(t W^T + b));  h += t };  y = h
//
// Rows of the batch never meet in the forward, so a thread takes a tile of rows through all layers, and only weights
// stream. Lanes are rows: a matrix of activations is transposed, [feature][row], so that the weight [out][in] is the
// broadcast operand, read in place, LayerNorm reduces along columns without crossing lanes, and what comes out of one
// layer has the layout that the next one reads.
//
// Two layouts: a panel, [feature][NV * L rows], contiguous, is an operand of a product; strips, [16 rows][feature]
// transposed, hold what outlives a product (the residual stream, what is kept for the backward), the same for every
// instruction set and thread count.
#pragma once

#include "memory.h"
#include "pack.h"
#include "parallel.h"
#include "residual_mlp_activation.h"
#include "split.h"

namespace nsk::NSK_ISA {

// Element (row r, feature f) of strips that start at `data` stands at at(r)[f * kStrip].
inline constexpr ptrdiff_t kStrip = NSK_STRIP;
template <class T>
NSK_INLINE T* strip_row(T* data, ptrdiff_t row, ptrdiff_t width) {
  return data + row / kStrip * width * kStrip + row % kStrip;
}

// The least distance, in units, that `units` fit into and that is an odd number of cache lines: what stands so far apart is
// spread over all sets of a cache.
template <class Unit>
constexpr ptrdiff_t odd_lines(ptrdiff_t units) {
  constexpr ptrdiff_t kLine = 64 / sizeof(Unit);
  return (ceil_div(units, kLine) | 1) * kLine;
}

// The widest panel: 4 rows of accumulators x 4 vectors where registers are many, 6 x 2 where they are few.
inline constexpr int kWidePanel = kVectorRegisters == 32 ? 4 : 2;

// Cuts n lanes (a multiple of L) into panels, widest first: f(vectors as a type, first lane).
template <int L, class F>
NSK_INLINE void for_panels(ptrdiff_t n, F&& f) {
  ptrdiff_t first = 0;
  for (; n - first >= kWidePanel * L; first += kWidePanel * L) f(std::integral_constant<int, kWidePanel>{}, first);
  if constexpr (kWidePanel == 4)
    for (; n - first >= 2 * L; first += 2 * L) f(std::integral_constant<int, 2>{}, first);
  for (; first < n; first += L) f(std::integral_constant<int, 1>{}, first);
}

template <class T>
T* at(const nsk_view& v, int64_t group, int64_t layer = 0, int64_t row = 0) {
  return static_cast<T*>(v.data) + group * v.stride[0] + layer * v.stride[1] + row * v.stride[2];
}

// What every kernel of one call knows.
struct MlpShape {
  int64_t groups, rows, padded, width, depth, per_block;

  explicit MlpShape(const nsk_residual_mlp& a)
      : groups(a.groups), rows(a.rows), padded(round_up(a.rows, kStrip)), width(a.width), depth(a.depth),
        per_block(a.layers_per_block) {}

  int64_t blocks() const { return depth / per_block; }
  int64_t matrix() const { return padded * width; }  // elements of one [rows, width] matrix in strips or panels
};

// Tiles of rows, as even as strips allow: no larger than their activations' share of a core's cache, as many as keep
// all threads busy.
struct RowTiles {
  int64_t strips, per_group;

  RowTiles(const MlpShape& s, int threads, int64_t most_rows) : strips(s.padded / kStrip) {
    per_group = ceil_div(strips * kStrip, most_rows);
    const int64_t least = per_group;
    while (per_group < strips && per_group < least + threads && s.groups * per_group % threads) ++per_group;
    if (s.groups * per_group % threads && s.groups * per_group > threads) per_group = least;
  }
  ptrdiff_t first_row(int64_t tile) const { return tile * strips / per_group * kStrip; }
  ptrdiff_t size(int64_t tile) const { return first_row(tile + 1) - first_row(tile); }
  ptrdiff_t largest() const { return ceil_div(strips, per_group) * kStrip; }
};

// Rows of a tile: 256 for widths up to 256, fewer for wider ones, whose activations would leave the core's own cache.
// A matrix unit outruns the cache that the weights come from once a tile, and wants more of them.
template <class M>
int64_t most_rows(int64_t width) {
  const int64_t rows = (M::kMatrix ? 128 << 10 : 64 << 10) / width / 64 * 64;
  return rows < 64 ? 64 : rows > 256 ? 256 : rows;
}

// Rows of weights that are converted at a time, where they are not read in place: as many as fit a core's own cache beside
// the rest, 16 at least.
constexpr ptrdiff_t converted_rows(ptrdiff_t width) {
  const ptrdiff_t rows = (64 << 10) / width / 16 * 16;
  return rows < 16 ? 16 : rows < width ? rows : width;
}

// Rows of weights in place that all panels of a tile multiply in turn, where a layer of them leaves the core's own cache, as
// converted ones would, and each panel would fetch them from afar again (measured on Zen 3, four panels of width 1024: 3 %
// of the forward's time). A multiple of every register tile's rows, so that the sums of z's columns come in the same order.
template <class M>
constexpr ptrdiff_t rows_in_turn(ptrdiff_t width, ptrdiff_t tile_rows) {
  constexpr ptrdiff_t kLeastPanels = 4, kBytes = 128 << 10, kStep = 48;
  static_assert(kStep % kTileRows<1> == 0 && kStep % kTileRows<2> == 0 && kStep % kTileRows<kWidePanel> == 0);
  if (M::kMatrix || converted_rows(width) == width || tile_rows < kLeastPanels * kWidePanel * M::L) return width;
  const ptrdiff_t rows = kBytes / (ceil_div(width, M::pack) * ptrdiff_t(sizeof(typename M::Unit))) / kStep * kStep;
  return rows < kStep ? kStep : rows < width ? rows : width;
}

// One layer's vectors in the compute type, converted where they are stored in another.
template <class C>
struct LayerVectors {
  const C *bias, *gamma, *beta;

  // `scratch`: 3 * width
  LayerVectors(const nsk_residual_mlp& a, int64_t group, int64_t layer, C* scratch)
      : bias(vector(a.bias, group, layer, a.width, scratch)),
        gamma(vector(a.ln_weight, group, layer, a.width, scratch + a.width)),
        beta(vector(a.ln_bias, group, layer, a.width, scratch + 2 * a.width)) {}

 private:
  static const C* vector(const nsk_view& v, int64_t group, int64_t layer, int64_t n, C* scratch) {
    auto converted = [&](auto type) {
      scale_row<C>(scratch, at<const decltype(type)>(v, group, layer), C(1), n);
      return scratch;
    };
    switch (v.dtype) {
      case NSK_F32:
        if constexpr (sizeof(C) == 4) return at<const C>(v, group, layer);
        return converted(float{});
      case NSK_BF16:
        if constexpr (sizeof(C) == 4) return converted(bf16{});
        break;
      case NSK_F16:
        if constexpr (sizeof(C) == 4) return converted(f16{});
        break;
      default: break;
    }
    return at<const C>(v, group, layer);
  }
};

// Calls f with a value of the storage type: the weights' own, or float.
template <class T, class F>
void with_type(int32_t dtype, F&& f) {
  if constexpr (!std::is_same_v<T, float>)
    if (dtype == NSK_F32) return f(float{});
  f(T{});
}

// Rows [row, row + n) of a matrix of X become strips from `strips` on; the last strip repeats the last row, so that no
// lane holds a number that could not occur.
template <class C, class X>
void load_strips(C* strips, const X* x, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t width) {
  constexpr int L = kLanes<C>;
  for (ptrdiff_t r = 0; r < n; r += kStrip, strips += width * kStrip) {
    const X* rows[kStrip];
    for (ptrdiff_t i = 0; i < kStrip; ++i) rows[i] = x + (r + i < n ? r + i : n - 1) * stride;
    pack_transposed<Math<C, C, L>, kStrip / L>(strips, rows, width);
  }
}

// n rows, L lanes of a transposed matrix each, as rows of X: lane r of feature f stands at from[f * ld + r].
template <class C, class X>
void store_lanes(const C* from, ptrdiff_t ld, X* x, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t width) {
  constexpr int L = kLanes<C>;
  for (ptrdiff_t f = 0; f < width; f += L) {
    Vec<C, L> block[L];
    const ptrdiff_t features = width - f < L ? width - f : L;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) block[i] = i < features ? load<Vec<C, L>>(from + (f + i) * ld) : Vec<C, L>{};
    transpose(block);
    for (ptrdiff_t r = 0; r < L && r < n; ++r) store_up_to<C, L>(x + r * stride + f, block[r], features);
  }
}

// Strips become rows again.
template <class C, class X>
void store_strips(const C* strips, X* x, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t width) {
  for (ptrdiff_t r = 0; r < n; r += kLanes<C>)
    store_lanes<C>(strip_row(strips, r, width), kStrip, x + r * stride, stride, n - r, width);
}

// Features [begin, end) of a panel of the vector operand, [units][NV * L] or tiles, from rows of vectors: `row(f, count,
// y)` fills the NV vectors of each of `count` features from f on. Where units are pairs, begin is even and an odd last
// feature is paired with 0.
template <class M, int NV, class F>
NSK_INLINE void store_panel(typename M::Unit* panel, ptrdiff_t width, ptrdiff_t begin, ptrdiff_t end, F&& row) {
  using V = typename M::V;
  constexpr int L = M::L, NR = NV * L;
  if constexpr (M::kTiled) {
    for (ptrdiff_t f = begin; f < end; f += 2) {
      V y[2 * NV];
      row(f, std::integral_constant<int, 2>{}, y);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        store_split_pairs(split_row(panel, width / 2, v, f / kSplitTerms, f % kSplitTerms / 2), y[v], y[NV + v]);
    }
  } else if constexpr (M::pack == 1) {
    for (ptrdiff_t f = begin; f < end; ++f) {
      V y[NV];
      row(f, std::integral_constant<int, 1>{}, y);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(panel + f * NR + v * L, y[v]);
    }
  } else {
    ptrdiff_t f = begin;
    for (; f + 2 <= end; f += 2) {
      V y[2 * NV];
      row(f, std::integral_constant<int, 2>{}, y);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(panel + f / 2 * NR + v * L, pair_bf16<L>(y[v], y[NV + v]));
    }
    if (f < end) {
      V y[NV];
      row(f, std::integral_constant<int, 1>{}, y);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(panel + f / 2 * NR + v * L, pair_bf16<L>(y[v], V{}));
    }
  }
}

}  // namespace nsk::NSK_ISA
