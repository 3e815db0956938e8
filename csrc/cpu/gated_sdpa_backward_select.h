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

// In the order of the products: a tile's terms are summed first, and then added.
template <class Tile, class T, class C>
void select_pairs(Tile& tile, int64_t k0, const T* key, const typename Tile::PanelKeys* seen, KeyGradients<C> acc) {
  using M = typename Tile::M;
  constexpr int NV = Tile::NV, NR = Tile::NR, kRows = Tile::kRows;
  const nsk_gated_sdpa& a = tile.a;
  const auto& w = tile.w;
  const T* const query = at<const T>(a.query, tile.seq.batch, tile.head, tile.seq.q_start + tile.row0);
  LaneMask<M, NV> masks[Tile::kPanels];
  int64_t keys = 0;
  for (int64_t p = 0; p < tile.panels; ++p) {
    if (seen[p].begin < seen[p].end) masks[p] = tile.lane_mask(p, seen[p], k0);
    if (seen[p].end > keys) keys = seen[p].end;
  }
  auto allowed = [&](int64_t q, int64_t j) {
    const typename Tile::PanelKeys& panel = seen[q / NR];
    return j >= panel.begin && j < panel.end && masks[q / NR].allowed(panel.kind, j - panel.begin, int(q % NR));
  };
  auto element = [&](const typename Tile::Unit* rows, int64_t q, int64_t j) {
    return unit_element<M>(rows[(j * kRows + q) / M::pack], q);
  };
  // to[d] += sum over the listed terms of factor[i] * from(i)[d]
  int64_t list[kRows > Tile::kKeys ? kRows : Tile::kKeys];
  C factor[sizeof list / sizeof *list];
  auto add = [&](C* to, int64_t columns, int64_t n, auto&& from) {
    for (int64_t d = 0; d < columns; ++d) {
      C sum = C(0);
      for (int64_t i = 0; i < n; ++i) sum += factor[i] * C(to_float(from(list[i])[d]));
      to[d] += sum;
    }
  };
  for (int64_t j = 0; j < keys; ++j) {
    int64_t n = 0;
    for (int64_t q = 0; q < tile.count; ++q)
      if (allowed(q, j)) list[n++] = q;
    if (tile.need_dv) {
      for (int64_t i = 0; i < n; ++i) factor[i] = element(w.p_rows, list[i], j);
      add(acc.value + (k0 + j) * acc.value_ld, a.head_dim_v, n, [&](int64_t q) { return w.d_o_rows + q * a.head_dim_v; });
    }
    if (tile.need_dk) {
      for (int64_t i = 0; i < n; ++i) factor[i] = element(w.ds_rows, list[i], j);
      add(acc.key + (k0 + j) * acc.key_ld, a.head_dim, n, [&](int64_t q) { return query + q * a.query.stride[2]; });
    }
  }
  for (int64_t q = 0; tile.need_dq && q < tile.count; ++q) {
    int64_t n = 0;
    for (int64_t j = 0; j < keys; ++j)
      if (allowed(q, j)) factor[n] = element(w.ds_rows, q, j), list[n++] = j;
    add(w.dq + q * Tile::padded(a.head_dim), a.head_dim, n, [&](int64_t j) { return key + j * a.key.stride[2]; });
  }
}

}  // namespace nsk::NSK_ISA
