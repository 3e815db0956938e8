// The backward's products where inf or NaN hides among the pairs that are not allowed: 0 times either is NaN, so the
// pairs are taken one at a time, and only the allowed ones.
#pragma once

#include "gated_sdpa_backward.h"

namespace nsk::NSK_ISA {

template <class Tile, class T>
bool all_finite(Tile& tile, const T* key, int64_t keys) {
  using C = typename Tile::C;
  const nsk_gated_sdpa& a = tile.a;
  if (tile.rows_finite < 0) {
    const T* query = at<const T>(a.query, tile.seq.batch, tile.head, tile.seq.q_start + tile.row0);
    bool finite = !any_nonfinite<C>(tile.w.d_o_rows, a.head_dim_v, tile.count, a.head_dim_v);
    for (int64_t r = 0; r < tile.count && finite; ++r)
      finite = tile.dead(r) || !any_nonfinite<C>(query + r * a.query.stride[2], 0, 1, a.head_dim);
    tile.rows_finite = finite;
  }
  return tile.rows_finite && !any_nonfinite<C>(key, a.key.stride[2], keys, a.head_dim);
}

template <class Tile, class T, class C>
void select_pairs(Tile& tile, int64_t k0, const T* key, const typename Tile::PanelKeys* seen, KeyGradients<C> acc) {
  using M = typename Tile::M;
  constexpr int NV = Tile::NV, NR = Tile::NR, kRows = Tile::kRows;
  const nsk_gated_sdpa& a = tile.a;
  const auto& w = tile.w;
  for (int64_t q = 0; q < tile.count; ++q) {
    const typename Tile::PanelKeys& panel = seen[q / NR];
    if (panel.begin == panel.end) continue;
    const LaneMask<M, NV> mask = tile.lane_mask(q / NR, panel, k0);
    const T* query = at<const T>(a.query, tile.seq.batch, tile.head, tile.seq.q_start + tile.row0 + q);
    for (int64_t j = panel.begin; j < panel.end; ++j) {
      if (!mask.allowed(panel.kind, j - panel.begin, int(q % NR))) continue;
      const C prob = unit_element<M>(w.p_rows[(j * kRows + q) / M::pack], q);
      const C ds = tile.need_ds ? unit_element<M>(w.ds_rows[(j * kRows + q) / M::pack], q) : C(0);
      for (int64_t d = 0; tile.need_dv && d < a.head_dim_v; ++d)
        acc.value[(k0 + j) * acc.value_ld + d] += prob * C(to_float(w.d_o_rows[q * a.head_dim_v + d]));
      for (int64_t d = 0; tile.need_dk && d < a.head_dim; ++d)
        acc.key[(k0 + j) * acc.key_ld + d] += ds * C(to_float(query[d]));
      for (int64_t d = 0; tile.need_dq && d < a.head_dim; ++d)
        w.dq[q * Tile::padded(a.head_dim) + d] += ds * C(to_float(key[j * a.key.stride[2] + d]));
    }
  }
}

}  // namespace nsk::NSK_ISA
