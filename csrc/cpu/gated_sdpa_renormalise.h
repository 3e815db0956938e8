// Normalising rows whose lse is too coarse.
//
// The backward recomputes P = exp(s - lse). A row whose scores are huge (a mask of the lowest finite number on all of its
// keys, say) has an lse in which log(sum) is lost to rounding, and its P would not sum to 1. For a tile with such a row
// the maximum and the sum are computed again and kept apart: P = exp((s - max) - log(sum)), in the units of the online
// softmax, so that a score is rounded the same way in both places.
#pragma once

#include "gated_sdpa_backward.h"

namespace nsk::NSK_ISA {

template <class Tile>
void renormalise(Tile& tile, KeyRange keys) {
  using M = typename Tile::M;
  using T = typename Tile::Element;
  using C = typename Tile::C;
  constexpr int NV = Tile::NV, NR = Tile::NR;
  const nsk_gated_sdpa& a = tile.a;
  const ptrdiff_t depth = ceil_div(a.head_dim, M::pack);
  const int64_t kv_head = tile.head / (a.heads_q / a.heads_kv);
  const double unit = a.mask.data ? 1 : kLn2;
  tile.scale = ScoreScale<C>(a, unit);
  tile.to_log2 = a.mask.data ? C(kLog2e) : C(1);
  fill_zero(tile.w.norm_low, Tile::kRows);
  fill_zero(tile.w.lse_low, Tile::kRows);
  for (int64_t p = 0; p < tile.panels; ++p) {
    SoftmaxState<M, NV> state;
    state.reset();
    for (int64_t k0 = keys.begin; k0 < keys.end; k0 += Tile::kKeys) {
      const int64_t count = keys.end - k0 < Tile::kKeys ? keys.end - k0 : Tile::kKeys;
      const T* key = at<const T>(a.key, tile.seq.batch, kv_head, tile.seq.k_start + k0);
      const auto k = broadcast_rows<M>(key, a.key.stride[2], count, a.head_dim, tile.w.k);
      product<M, NV, Along::K, Into::Fresh>(count, k.data, k.stride, tile.w.q + p * depth * NR, depth, tile.w.s, NR);
      const typename Tile::PanelKeys seen{0, count, a.mask.data ? Masking::Bias : Masking::Range};
      const LaneMask<M, NV> mask = tile.lane_mask(p, seen, k0);
      with_score_kind(seen.kind, tile.scale.softcap, [&](auto kind, auto softcap) {
        online_softmax<M, NV, kind.value, softcap.value>(tile.w.s, tile.w.ds_pairs, count, mask, tile.scale, state);
      });
    }
    for (int r = 0; r < NR && p * NR + r < tile.count; ++r) {
      const int64_t row = p * NR + r;
      if (tile.w.rows[row].begin == tile.w.rows[row].end) continue;  // dead
      double top = state.max[r], sum = state.sum[r];
      tile.w.lse[row] = C(top);
      tile.w.lse_low[row] = C(__builtin_log(sum) / unit);
      if (a.sink.data) {
        const double max = top, sink = load_scalar(a.sink, tile.head * a.sink.stride[1]) / unit;
        top = sink > max ? sink : max;
        sum = sum * __builtin_exp((max - top) * unit) + __builtin_exp((sink - top) * unit);
      }
      tile.w.norm[row] = C(top);
      tile.w.norm_low[row] = C(__builtin_log(sum) / unit);
    }
  }
}

}  // namespace nsk::NSK_ISA
