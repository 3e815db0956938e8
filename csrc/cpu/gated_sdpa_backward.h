// Gated attention, backward: one tile of queries against all of its keys.
//
//   P = exp(S - L),  dP = dO V^T,  dS = P (dP - delta)
//   dV += P^T dO,    dK += dS^T Q,    dQ = dS K        (dQ and dK times scale at the end)
//
// Five products in a single pass. Queries are the outer loop: a tile packs its Q and dO once, owns its rows of dQ, and
// streams the keys; dK and dV of the (sequence, KV head) accumulate in memory that one thread owns. As in the forward
// everything is transposed, lanes are queries for S^T and dP^T [keys][queries], and columns for dV, dK and dQ.
//
// A tile's panels (NV * L queries) skip keys outside their range, rounded to the rows of a register tile, so that a
// causal diagonal costs no more than its granularity.
#pragma once

#include "gated_sdpa_backward_rows.h"
#include "gated_sdpa_scores.h"

namespace nsk::NSK_ISA {

// Above this, lse in C is too coarse for exp(s - lse).
template <class C>
inline constexpr C kCoarseLse = sizeof(C) == 8 ? C(1e12) : C(1e5);

// Where a thread adds up dK and dV of one KV head: rows of keys, `ld` apart, wide enough for whole panels.
template <class C>
struct KeyGradients {
  C* key;
  C* value;
  ptrdiff_t key_ld, value_ld;
};

template <class Tile>
void renormalise(Tile& tile, KeyRange keys);

template <class Tile, class T>
bool all_finite(Tile& tile, const T* key, int64_t keys);

template <class Tile, class T, class C>
void select_pairs(Tile& tile, int64_t k0, const T* key, const typename Tile::PanelKeys* seen, KeyGradients<C> acc);

template <class T, class M_>
struct BackwardTile {
  using M = M_;
  using Element = T;
  using C = typename M::C;
  using Unit = typename M::Unit;
  using V = typename M::V;
  using Operand = typename BackwardRow<T, M>::Operand;
  static constexpr int NV = 2, L = M::L, NR = NV * L, R = kTileRows<NV>;
  static constexpr int64_t kPanels = kVectorRegisters == 32 ? 4 : 6;
  static constexpr int64_t kRows = kPanels * NR;
  static constexpr int64_t kKeys = R == 6 ? 96 : 128;

  static constexpr ptrdiff_t padded(ptrdiff_t d) { return round_up(d, NR); }

  struct Workspace {
    Unit *q, *d_o;                // transposed panels [kPanels][ceil(D / pack)][NR]
    Unit *q_panels, *d_o_panels;  // column panels [D / NR][kRows / pack][NR]
    Unit* k_panels;               // column panels of the key tile [D / NR][kKeys / pack][NR]
    Unit *k, *v;                  // converted key tile, if it cannot be read in place
    C *s, *dp;                    // S^T, dP^T, then P^T and dS^T [kKeys][kRows]
    Unit *p_rows, *ds_rows;       // P^T and dS^T as products read them: in place, or bf16 rows
    Unit* ds_pairs;               // dS^T paired along the keys: in place, or [kKeys / 2][kRows]
    C* bias;                      // [kKeys][kRows]
    Operand* d_o_rows;            // [kRows][Dv]
    C* dq;                        // [kRows][padded D]
    C *norm, *lse, *delta, *grad_lse;
    C *norm_low, *lse_low;        // what norm and lse cannot hold, see gated_sdpa_renormalise.h
    Row* rows;
    PanelRange<NR>* ranges;
    size_t bytes;

    Workspace(const nsk_gated_sdpa& a, Arena arena) {
      const ptrdiff_t dk = ceil_div(a.head_dim, M::pack), dv = ceil_div(a.head_dim_v, M::pack);
      q = arena.take<Unit>(kRows * dk);
      d_o = arena.take<Unit>(kRows * dv);
      q_panels = arena.take<Unit>(kRows / M::pack * padded(a.head_dim));
      d_o_panels = arena.take<Unit>(kRows / M::pack * padded(a.head_dim_v));
      k_panels = arena.take<Unit>(kKeys / M::pack * padded(a.head_dim));
      k = arena.take<Unit>(sizeof(T) == sizeof(Unit) ? 0 : kKeys * dk);
      v = arena.take<Unit>(sizeof(T) == sizeof(Unit) ? 0 : kKeys * dv);
      s = arena.take<C>(kKeys * kRows);
      dp = arena.take<C>(kKeys * kRows);
      p_rows = M::pack == 1 ? reinterpret_cast<Unit*>(s) : arena.take<Unit>(kKeys * kRows / M::pack);
      ds_rows = M::pack == 1 ? reinterpret_cast<Unit*>(dp) : arena.take<Unit>(kKeys * kRows / M::pack);
      ds_pairs = M::pack == 1 ? ds_rows : arena.take<Unit>(kKeys * kRows / M::pack);
      bias = arena.take<C>(a.mask.data ? kKeys * kRows : 0);
      d_o_rows = arena.take<Operand>(kRows * a.head_dim_v);
      dq = arena.take<C>(kRows * padded(a.head_dim));
      norm = arena.take<C>(kRows);
      lse = arena.take<C>(kRows);
      delta = arena.take<C>(kRows);
      grad_lse = arena.take<C>(kRows);
      norm_low = arena.take<C>(kRows);
      lse_low = arena.take<C>(kRows);
      rows = arena.take<Row>(kRows);
      ranges = arena.take<PanelRange<NR>>(kPanels);
      bytes = arena.used();
    }
  };

  const nsk_gated_sdpa_backward& g;
  const nsk_gated_sdpa& a = g.forward;
  const Sequence& seq;
  const int64_t head, row0, count;  // queries row0 .. row0 + count - 1 of the sequence
  Workspace w;
  ScoreScale<C> scale{a};
  C to_log2 = C(kLog2e);  // from the scores' units to those of exp2
  int64_t panels = ceil_div(count, NR);
  const bool need_dq = g.grad_query.data, need_dk = g.grad_key.data, need_dv = g.grad_value.data;
  const bool for_mask;  // dS is wanted as the mask's gradient: before the softcap's derivative
  const bool need_ds = need_dq || need_dk || for_mask;
  bool coarse = false;  // some row's lse is so large that its rounding shows
  double grad_sink = 0;

  // Does the row-wise work for all rows of the tile.
  BackwardTile(const nsk_gated_sdpa_backward& args, const Sequence& s, int64_t h, int64_t row, int64_t n, char* scratch,
               bool mask_gradient = false)
      : g(args), seq(s), head(h), row0(row), count(n), w(g.forward, Arena(scratch)), for_mask(mask_gradient) {
    for (int64_t r = 0; r < panels * NR; ++r) {
      if (r < count) {
        const KeyRange keys = seq.mask.keys(row0 + r);
        w.rows[r] = {head, seq.q_start + row0 + r, keys.begin, keys.end};
        const BackwardRow<T, M> at(g, seq.batch, w.rows[r], w.d_o_rows + r * a.head_dim_v);
        if (at.dead) w.rows[r].begin = w.rows[r].end = 0;
        w.lse[r] = at.lse;
        w.norm[r] = at.norm;
        coarse |= at.lse > kCoarseLse<C> || at.lse < -kCoarseLse<C>;
        // Without a sink both exponentials are one, and the gradient of lse joins delta.
        w.delta[r] = a.sink.data ? at.delta : at.delta - at.grad_lse;
        w.grad_lse[r] = at.grad_lse;
        grad_sink += at.grad_sink;
      } else {
        w.lse[r] = w.norm[r] = w.delta[r] = w.grad_lse[r] = C(0);
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t left = count - p * NR;
      w.ranges[p].set(w.rows + p * NR, int(left < NR ? left : NR), false);
    }
  }

  // Whether row r sees no key; what it holds then counts for nothing.
  bool dead(int64_t r) const { return w.rows[r].begin >= w.rows[r].end; }

  // The keys that some row sees, or an empty range.
  KeyRange keys() const {
    KeyRange all{INT64_MAX, 0};
    for (int64_t p = 0; p < panels; ++p) {
      if (w.ranges[p].any_begin >= w.ranges[p].any_end) continue;
      if (w.ranges[p].any_begin < all.begin) all.begin = w.ranges[p].any_begin;
      if (w.ranges[p].any_end > all.end) all.end = w.ranges[p].any_end;
    }
    return all;
  }

  void pack() {
    const T* query = at<const T>(a.query, seq.batch, head, seq.q_start + row0);
    for (int64_t p = 0; p < panels; ++p) {
      const T* rows[NR];
      const Operand* d_o[NR];
      for (int r = 0; r < NR; ++r) {
        const int64_t at = p * NR + r;
        rows[r] = at < count && !dead(at) ? query + at * a.query.stride[2] : nullptr;
        d_o[r] = at < count ? w.d_o_rows + at * a.head_dim_v : nullptr;
      }
      pack_transposed<M, NV>(w.q + p * ceil_div(a.head_dim, M::pack) * NR, rows, a.head_dim);
      if (need_ds) pack_transposed<M, NV>(w.d_o + p * ceil_div(a.head_dim_v, M::pack) * NR, d_o, a.head_dim_v);
    }
    const int64_t whole = panels * NR / M::pack;
    if (need_dk) {
      pack_panels<M, NV>(w.q_panels, query, a.query.stride[2], count, a.head_dim, whole);
      for (int64_t r = 0; r < count; ++r)
        if (dead(r)) clear_panel_row<M, NV>(w.q_panels, r, a.head_dim, whole);
    }
    if (need_dv)
      pack_panels<M, NV>(w.d_o_panels, w.d_o_rows, a.head_dim_v, count, a.head_dim_v, whole);
    if (need_dq) fill_zero(w.dq, count * padded(a.head_dim));
  }

  // One tile of keys, k0 .. k1 - 1.
  void step(int64_t k0, int64_t k1, KeyGradients<C> acc) {
    const int64_t kv_head = head / (a.heads_q / a.heads_kv);
    const T* key = at<const T>(a.key, seq.batch, kv_head, seq.k_start + k0);
    const T* value = at<const T>(a.value, seq.batch, kv_head, seq.k_start + k0);
    const auto k = broadcast_rows<M>(key, a.key.stride[2], k1 - k0, a.head_dim, w.k);
    const auto v = need_ds ? broadcast_rows<M>(value, a.value.stride[2], k1 - k0, a.head_dim_v, w.v) : Broadcast<M>{};
    PanelKeys seen[kPanels];
    bool whole = true;  // every row sees every key
    for (int64_t p = 0; p < panels; ++p) whole &= panel_scores(p, k0, k1, k, v, seen[p]);
    if (!whole && !all_finite(*this, key, k1 - k0)) return select_pairs(*this, k0, key, seen, acc);
    if (need_dv) add_key_gradient(w.p_rows, w.d_o_panels, a.head_dim_v, acc.value + k0 * acc.value_ld, acc.value_ld,
                                  k1 - k0, seen, whole);
    if (need_dk) add_key_gradient(w.ds_rows, w.q_panels, a.head_dim, acc.key + k0 * acc.key_ld, acc.key_ld, k1 - k0,
                                  seen, whole);
    if (need_dq) {
      pack_panels<M, NV>(w.k_panels, key, a.key.stride[2], k1 - k0, a.head_dim, ceil_div(k1 - k0, M::pack));
      add_query_gradient(k1 - k0, seen, whole);
    }
  }

  // Keys of the tile that a panel computed, relative to its first: [begin, end), multiples of R but for the tile's end.
  struct PanelKeys {
    int64_t begin, end;
    Masking kind;
  };

  // P^T and dS^T of one panel; true if none of its pairs is masked.
  bool panel_scores(int64_t p, int64_t k0, int64_t k1, Broadcast<M> k, Broadcast<M> v, PanelKeys& seen) {
    const PanelRange<NR>& range = w.ranges[p];
    const int64_t keys = k1 - k0;
    int64_t begin = range.any_begin > k0 ? range.any_begin - k0 : 0;
    int64_t end = range.any_end < k1 ? range.any_end - k0 : keys;
    if (begin >= end) begin = end = 0;
    begin -= begin % R;
    end = round_up(end, R) < keys ? round_up(end, R) : keys;
    const bool full = !a.mask.data && range.full(k0, k1);
    seen = {begin, end, a.mask.data ? Masking::Bias : full ? Masking::None : Masking::Range};
    if (begin > 0 || end < keys) clear_panel(p, keys);
    if (begin == end) return false;

    C* s = w.s + begin * kRows + p * NR;
    C* dp = w.dp + begin * kRows + p * NR;
    const ptrdiff_t dk = ceil_div(a.head_dim, M::pack), dv = ceil_div(a.head_dim_v, M::pack);
    product<M, NV, Along::K, Into::Fresh>(end - begin, k.data + begin * k.stride, k.stride, w.q + p * dk * NR, dk, s,
                                          kRows);
    if (need_ds)
      product<M, NV, Along::K, Into::Fresh>(end - begin, v.data + begin * v.stride, v.stride, w.d_o + p * dv * NR, dv,
                                            dp, kRows);
    const LaneMask<M, NV> mask = lane_mask(p, seen, k0);
    with_score_kind(seen.kind, scale.softcap, [&](auto kind, auto softcap) {
      auto some = [&](auto k, int64_t from, int64_t to) {
        probabilities<k.value, softcap.value>(p, begin, begin + from, begin + to, mask);
      };
      if constexpr (kind.value == Masking::Range) {
        some(kind, 0, mask.all_begin);
        some(std::integral_constant<Masking, Masking::None>{}, mask.all_begin, mask.all_end);
        some(kind, mask.all_end, end - begin);
      } else {
        some(kind, 0, end - begin);
      }
    });
    return full;
  }

  LaneMask<M, NV> lane_mask(int64_t p, const PanelKeys& seen, int64_t k0) {
    LaneMask<M, NV> mask{};
    const int64_t left = count - p * NR;
    if (seen.kind == Masking::Range) mask.set_range(w.ranges[p], k0 + seen.begin, k0 + seen.end);
    if (seen.kind == Masking::Bias) {
      C* bias = w.bias + seen.begin * kRows + p * NR;
      fill_bias<C, NR>(bias, kRows, a.mask, seq.batch, w.rows + p * NR, int(left < NR ? left : NR), w.ranges[p],
                       k0 + seen.begin, k0 + seen.end);
      mask.bias = bias;
      mask.ld = kRows;
    }
    return mask;
  }

  // What a panel did not compute reads as 0 in the products over several panels.
  void clear_panel(int64_t p, int64_t keys) {
    constexpr int n = NR / M::pack;
    for (int64_t j = 0; j < keys; ++j) {
      fill_zero(w.p_rows + j * kRows / M::pack + p * n, n);
      fill_zero(w.ds_rows + j * kRows / M::pack + p * n, n);
    }
    if constexpr (M::pack == 2)
      for (int64_t j = 0; j < keys; j += 2) fill_zero(w.ds_pairs + j / 2 * kRows + p * NR, NR);
  }

  // P^T = exp(S - L), dS^T = P (dP - delta) for keys from .. to - 1, in the layouts that the products read. The mask
  // counts keys from `base`.
  template <Masking K, bool kSoftcap>
  void probabilities(int64_t p, int64_t base, int64_t from, int64_t to, const LaneMask<M, NV>& mask) {
    const bool two_norms = a.sink.data && g.grad_lse.data;
    // e = exp(t - norm)
    auto weigh = [&](auto& e, const C* norm, const C* low) {
      constexpr int N = sizeof(e) / sizeof(V);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        if (coarse) __asm__("" : "+m"(e[i]));  // rounded before the subtraction, as the norm was
        e[i] -= load<V>(norm + p * NR + i % NV * L);
        if (coarse) e[i] -= load<V>(low + p * NR + i % NV * L);
        e[i] *= to_log2;
      }
      probabilities_exp2<M, false>(e);
    };
    // Rows j .. j + n - 1 of the panel.
    auto rows = [&](int64_t j, auto n) {
      constexpr int N = decltype(n)::value * NV;
      V t[N], prob[N], ds[N] = {};
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        const V raw = load<V>(w.s + (j + i / NV) * kRows + p * NR + i % NV * L);
        if constexpr (kSoftcap) {
          const V h = tanh<C, L>(raw * scale.to_tanh);
          t[i] = h * scale.cap;
          ds[i] = for_mask ? splat<C, L>(C(1)) : C(1) - h * h;  // the slope
        } else {
          t[i] = raw * scale.scale;
        }
        prob[i] = t[i] = mask.template apply<K>(t[i], j + i / NV - base, i % NV);
      }
      weigh(prob, w.norm, w.norm_low);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) prob[i] = mask.template select<K>(prob[i], j + i / NV - base, i % NV);
      if (need_ds) {
        if (two_norms) weigh(t, w.lse, w.lse_low);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
          const ptrdiff_t lane = p * NR + i % NV * L;
          V x = prob[i] * (load<V>(w.dp + (j + i / NV) * kRows + lane) - load<V>(w.delta + lane));
          if (two_norms) x += t[i] * load<V>(w.grad_lse + lane);
          if constexpr (kSoftcap) x *= ds[i];
          ds[i] = mask.template select<K>(x, j + i / NV - base, i % NV);
        }
      }
      store_rows<M, NV>(w.p_rows, j * kRows + p * NR, kRows, prob);
      if (!need_ds) return;
      store_rows<M, NV>(w.ds_rows, j * kRows + p * NR, kRows, ds);
      if constexpr (M::pack == 2)
        for (int v = 0; v < NV; ++v)
          store(w.ds_pairs + j / 2 * kRows + p * NR + v * L, pair_bf16<L>(ds[v], N > NV ? ds[N - NV + v] : V{}));
    };
    int64_t j = from;
    for (; j + 2 <= to; j += 2) rows(j, std::integral_constant<int, 2>{});
    if (j < to) rows(j, std::integral_constant<int, 1>{});
  }

  // c [keys][columns] += rows^T [keys][queries] * panels [queries][columns]: dV from P and dO, dK from dS and Q.
  void add_key_gradient(const Unit* rows, const Unit* columns, int64_t cols, C* acc, ptrdiff_t ld, int64_t keys,
                        const PanelKeys* seen, bool whole) {
    constexpr int n = NR / M::pack;  // units of a panel's queries
    constexpr ptrdiff_t stride = kRows / M::pack;
    const ptrdiff_t units = panels * n;
    for (int64_t d = 0; d < cols; d += NR, columns += units * NR) {
      if (whole) {
        add_columns<M, NV, Along::K>(cols - d, keys, rows, stride, columns, units, acc + d, ld);
        continue;
      }
      for (int64_t j = 0; j < keys; j += R) {
        int64_t first = 0, last = panels;  // the panels that computed these keys
        while (first < last && !(seen[first].begin <= j && j < seen[first].end)) ++first;
        while (last > first && !(seen[last - 1].begin <= j && j < seen[last - 1].end)) --last;
        if (first < last)
          add_columns<M, NV, Along::K>(cols - d, keys - j < R ? keys - j : R, rows + j * stride + first * n, stride,
                                       columns + first * n * NR, (last - first) * n, acc + j * ld + d, ld);
      }
    }
  }

  // dQ [queries][columns] += dS [queries][keys] * K [keys][columns]
  void add_query_gradient(int64_t keys, const PanelKeys* seen, bool whole) {
    const ptrdiff_t units = ceil_div(keys, M::pack), ld = padded(a.head_dim);
    const Unit* columns = w.k_panels;
    for (int64_t d = 0; d < a.head_dim; d += NR, columns += units * NR) {
      if (whole) {
        add_columns<M, NV, Along::Rows>(a.head_dim - d, count, w.ds_pairs, kRows, columns, units, w.dq + d, ld);
        continue;
      }
      for (int64_t r = 0; r < count; r += R) {
        const int64_t rows = count - r < R ? count - r : R;
        int64_t begin = keys, end = 0;
        for (int64_t p = r / NR; p <= (r + rows - 1) / NR; ++p) {
          if (seen[p].begin == seen[p].end) continue;
          if (seen[p].begin < begin) begin = seen[p].begin;
          if (seen[p].end > end) end = seen[p].end;
        }
        if (begin < end)
          add_columns<M, NV, Along::Rows>(a.head_dim - d, rows, w.ds_pairs + begin / M::pack * kRows + r, kRows,
                                          columns + begin / M::pack * NR, ceil_div(end - begin, M::pack),
                                          w.dq + r * ld + d, ld);
      }
    }
  }

  int rows_finite = -1;  // whether the tile's queries and dO are; -1: not yet looked at

  // Everything for this tile: adds to the keys' gradients, writes its rows of the query's.
  void run(KeyGradients<C> acc) {
    if (!need_ds && !need_dv) return;
    pack();
    const KeyRange all = keys();
    if (coarse) renormalise(*this, all);
    for (int64_t k0 = all.begin; k0 < all.end; k0 += kKeys) step(k0, k0 + kKeys < all.end ? k0 + kKeys : all.end, acc);
    for (int64_t r = 0; need_dq && r < count; ++r) {
      T* out = at<T>(g.grad_query, seq.batch, head, seq.q_start + row0 + r);
      scale_row<C>(out, w.dq + r * padded(a.head_dim), C(a.scale), a.head_dim);
    }
  }
};

}  // namespace nsk::NSK_ISA
