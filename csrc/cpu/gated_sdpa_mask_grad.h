// The gradient of a floating attn_mask: dS summed over the dimensions that the mask broadcasts over.
//
// It is a pass of its own because its owner differs: a thread owns rows of the mask's gradient and visits, in order,
// every (batch, head) that the mask serves. That repeats two of the five products, and only where it was asked for.
#pragma once

#include "gated_sdpa_backward_select.h"
#include "gated_sdpa_renormalise.h"

namespace nsk::NSK_ISA {

template <class T, class C>
class MaskGradient {
  using Tile = BackwardTile<T, Math<C, C, kLanes<C>>>;

 public:
  static nsk_status run(const nsk_gated_sdpa_backward& g) {
    const nsk_gated_sdpa& a = g.forward;
    const auto& size = g.mask_size;
    const int64_t tiles = size[2] > 1 ? ceil_div(a.seqlen_q, Tile::kRows) : 1;
    // No gradient of an input may be written twice: this pass computes dS alone.
    nsk_gated_sdpa_backward only = g;
    only.grad_query.data = only.grad_key.data = only.grad_value.data = only.grad_gate.data = nullptr;

    bool failed = false;
    const size_t scratch = typename Tile::Workspace(a, Arena()).bytes;
    const nsk_status status =
        parallel_for(a.threads, size[0] * size[1] * tiles, scratch, [&](int64_t unit, char* memory) {
          const int64_t tile = unit % tiles, h = unit / tiles % size[1], b = unit / tiles / size[1];
          const int64_t first = size[2] > 1 ? tile * Tile::kRows : 0;
          const int64_t last = size[2] > 1 && first + Tile::kRows < a.seqlen_q ? first + Tile::kRows : a.seqlen_q;
          const Buffer<double> sum((size[2] > 1 ? last - first : 1) * size[3]);
          if (sum.failed()) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
          }
          add_all(only, b, h, first, last, sum, memory);
          for (int64_t i = 0; i < (size[2] > 1 ? last - first : size[2]); ++i)
            for (int64_t j = 0; j < size[3]; ++j)
              store_scalar(g.grad_mask, offset(g.grad_mask, b, h, first + i, j), sum[i * size[3] + j]);
        });
    return failed ? NSK_OUT_OF_MEMORY : status;
  }

 private:
  // Sums over every batch and head that mask entry (b, h) serves, and over queries first .. last - 1 if it has no rows.
  static void add_all(const nsk_gated_sdpa_backward& g, int64_t b, int64_t h, int64_t first, int64_t last,
                      const Buffer<double>& sum, char* memory) {
    const nsk_gated_sdpa& a = g.forward;
    const auto& size = g.mask_size;
    fill_zero(sum.data(), (size[2] > 1 ? last - first : 1) * size[3]);
    for (int64_t batch = size[0] > 1 ? b : 0; batch < (size[0] > 1 ? b + 1 : a.batch); ++batch)
      for (int64_t head = size[1] > 1 ? h : 0; head < (size[1] > 1 ? h + 1 : a.heads_q); ++head) {
        const Sequence seq = sequence(a, batch);
        for (int64_t row = first; row < last; row += Tile::kRows) {
          const int64_t rows = last - row < Tile::kRows ? last - row : Tile::kRows;
          Tile tile(g, seq, head, row, rows, memory, true);
          tile.pack();
          const KeyRange all = tile.keys();
          if (tile.coarse) renormalise(tile, all);
          for (int64_t k0 = all.begin; k0 < all.end; k0 += Tile::kKeys)
            add_tile(tile, k0, k0 + Tile::kKeys < all.end ? k0 + Tile::kKeys : all.end, size, sum);
        }
      }
  }

  static void add_tile(Tile& tile, int64_t k0, int64_t k1, const int64_t* size, const Buffer<double>& sum) {
    using M = typename Tile::M;
    const nsk_gated_sdpa& a = tile.a;
    const int64_t kv_head = tile.head / (a.heads_q / a.heads_kv);
    const T* key = at<const T>(a.key, tile.seq.batch, kv_head, tile.seq.k_start + k0);
    const T* value = at<const T>(a.value, tile.seq.batch, kv_head, tile.seq.k_start + k0);
    const auto k = broadcast_rows<M>(key, a.key.stride[2], k1 - k0, a.head_dim, tile.w.k);
    const auto v = broadcast_rows<M>(value, a.value.stride[2], k1 - k0, a.head_dim_v, tile.w.v);
    for (int64_t p = 0; p < tile.panels; ++p) {
      typename Tile::PanelKeys seen;
      tile.panel_scores(p, k0, k1, k, v, seen);
      for (int r = 0; r < Tile::NR && p * Tile::NR + r < tile.count; ++r) {
        const int64_t q = p * Tile::NR + r;
        double* row = sum.data() + (size[2] > 1 ? q * size[3] : 0);
        for (int64_t j = seen.begin; j < seen.end; ++j)
          row[size[3] > 1 ? k0 + j : 0] += tile.w.dp[j * Tile::kRows + q];
      }
    }
  }
};

}  // namespace nsk::NSK_ISA
