// Gated attention, forward.
//
//   out_i = sigmoid(gate_i) * sum_j softmax_j(s_ij) v_j
//
// Work is cut into blocks of query rows; a block owns its rows of out and lse. In a block, everything is transposed:
// lanes are queries. For each tile of keys, and each panel of NV * L queries:
//
//   S^T [keys][q]  = K Q^T      broadcast operand K in place, panel Q^T packed once per block
//   P^T [keys][q]  = online softmax, in place
//   O^T [d][q]     = O^T * rescale + V^T P^T     broadcast operand V in place, panel P^T as it was produced
//
// and the gate multiplies O^T in the epilogue, before the one rounding. Tiles outside the key range of every row are
// skipped; a panel reads only the keys between its first and last allowed one.
//
// Short queries fold: when a head's queries do not fill a block, the query heads that share a KV head become rows of
// one block, so K and V are read once for the whole group (decode). When there are too few blocks for the threads,
// the keys of each block are split, and a second pass merges the partial results in order.
#pragma once

#include "gated_sdpa_forward_rows.h"
#include "gated_sdpa_scores.h"

namespace nsk::NSK_ISA {

template <class T, class M_, int NV_>
struct ForwardBlock {
  using M = M_;
  static constexpr int NV = NV_;
  using C = typename M::C;
  using Unit = typename M::Unit;
  using V = typename M::V;
  static constexpr int L = M::L, NR = NV * L;
  static constexpr int64_t kMaxPanels = NV == 1 ? 1 : 6;
  static constexpr int64_t kKeys = NV == 1 ? 2 * kTileRows<NV> : kVectorRegisters == 32 ? 192 : 96;

  // A thread's tile memory.
  struct Workspace {
    Unit* q;     // [panels][ceil(D / pack)][NR]
    C* s;        // [kKeys][NR]
    Unit* p;     // as s, or pairs along the keys
    C* bias;     // [kKeys][NR]
    Unit* k;     // converted keys, if they cannot be read in place
    Unit* v;     // converted values, likewise
    C* o;        // [panels][Dv][NR]
    Row* rows;
    PanelRange<NR>* ranges;
    SoftmaxState<M, NV>* state;

    Workspace(const nsk_gated_sdpa& a, Arena arena) {
      const ptrdiff_t d_units = ceil_div(a.head_dim, M::pack);
      q = arena.take<Unit>(kMaxPanels * d_units * NR);
      s = arena.take<C>(kKeys * NR);
      p = M::pack == 1 ? reinterpret_cast<Unit*>(s) : arena.take<Unit>(kKeys / M::pack * NR);
      bias = arena.take<C>(a.mask.data ? kKeys * NR : 0);
      k = arena.take<Unit>(sizeof(T) == sizeof(Unit) ? 0 : kKeys * d_units);
      v = arena.take<Unit>(sizeof(T) == sizeof(Unit) ? 0 : ceil_div(kKeys, M::pack) * a.head_dim_v);
      o = arena.take<C>(kMaxPanels * a.head_dim_v * NR);
      rows = arena.take<Row>(kMaxPanels * NR);
      ranges = arena.take<PanelRange<NR>>(kMaxPanels);
      state = arena.take<SoftmaxState<M, NV>>(kMaxPanels);
      bytes = arena.used();
    }
    size_t bytes;
  };

  const nsk_gated_sdpa& a;
  const ForwardPlan::Block& block;
  Workspace w;
  ScoreScale<C> scale{a, a.mask.data ? 1 : kLn2};
  int64_t panels = ceil_div(block.rows, NR);

  ForwardBlock(const nsk_gated_sdpa& args, const ForwardPlan::Block& b, char* scratch)
      : a(args), block(b), w(args, Arena(scratch)) {
    fill_rows(block, w.rows);
    for (int64_t p = 0; p < panels; ++p) w.ranges[p].set(w.rows + p * NR, rows_in(p), true);
  }

  int rows_in(int64_t panel) const {
    const int64_t left = block.rows - panel * NR;
    return int(left < NR ? left : NR);
  }
  C* o_panel(int64_t p) const { return w.o + p * a.head_dim_v * NR; }

  // The mask is indexed by position in the sequence; masks exist only where sequences start at row 0.
  void attend(int64_t split, int64_t splits) {
    const int64_t b = block.seq.batch;
    int64_t begin = INT64_MAX, end = 0;
    for (int64_t p = 0; p < panels; ++p) {
      w.state[p].reset();
      if (w.ranges[p].any_begin >= w.ranges[p].any_end) continue;
      if (w.ranges[p].any_begin < begin) begin = w.ranges[p].any_begin;
      if (w.ranges[p].any_end > end) end = w.ranges[p].any_end;
    }
    if (begin < end && splits > 1) {
      const int64_t share = round_up(ceil_div(end - begin, splits), kKeys);
      begin += split * share;
      if (begin + share < end) end = begin + share;
    }
    fill_zero(w.o, panels * a.head_dim_v * NR);
    if (begin >= end) return;
    pack_queries(0);
    const int64_t kv_head = block.head / (a.heads_q / a.heads_kv);
    for (int64_t k0 = begin; k0 < end; k0 += kKeys) {
      const int64_t k1 = k0 + kKeys < end ? k0 + kKeys : end;
      const T* key = at<const T>(a.key, b, kv_head, block.seq.k_start + k0);
      const T* value = at<const T>(a.value, b, kv_head, block.seq.k_start + k0);
      const auto k = broadcast_rows<M>(key, a.key.stride[2], k1 - k0, a.head_dim, w.k);
      const auto v = values(value, k1 - k0);
      int clean = -1;  // whether the values of this tile are all finite; -1: not yet looked at
      const int64_t next = k1 + kKeys < end ? kKeys : end - k1;
      for (int64_t p = 0; p < panels; ++p) {
        if constexpr (NV > 1) {
          upcoming.begin(ceil_div(k1 - k0, kTileRows<NV>) + ceil_div(a.head_dim_v, kTileRows<NV>));
          if (k0 == begin && p + 1 < panels) ask_rows<T>(a.query, p + 1, a.head_dim);
          if (k1 == end && a.gate_kind == NSK_GATE_ELEMENTWISE) ask_gates(p);
        } else if (k1 == end) {
          ask_gates_now<T>(a, block, w.rows);
        }
        panel_step(p, k0, k1, k, v, value, clean, key, next);
        if (k0 == begin && p + 1 < panels) pack_queries(p + 1);
      }
    }
  }

  // The values of a tile of keys. A matrix unit takes rows that run along the keys, vectors take the keys' rows.
  static constexpr Along kValuesAlong = M::kMatrix ? Along::K : Along::Rows;
  Broadcast<M> values(const T* value, int64_t keys) const {
    if constexpr (M::kMatrix) {
      const ptrdiff_t units = ceil_div(keys, M::pack);
      transpose_pairs<M>(w.v, units, value, a.value.stride[2], keys, a.head_dim_v);
      return {w.v, units};
    } else {
      return broadcast_columns<M>(value, a.value.stride[2], keys, a.head_dim_v, w.v);
    }
  }

  // What the products of one panel step ask for: while the first keys are multiplied, the next panel's queries; while
  // the last are, the gates. Keys and values, which stream, the processor sees coming itself.
  Upcoming upcoming;

  template <class X>
  void ask_rows(const nsk_view& x, int64_t p, int64_t columns) {
    const Row& row = w.rows[p * NR];  // rows of one head follow each other; where heads fold, the guess may miss
    upcoming.add(at<const X>(x, block.seq.batch, row.head, row.i), x.stride[2] * int64_t(sizeof(X)), rows_in(p),
                 columns * int64_t(sizeof(X)));
  }
  void ask_gates(int64_t p) {
    a.gate.dtype == kDtype<T> ? ask_rows<T>(a.gate, p, a.head_dim_v) : ask_rows<float>(a.gate, p, a.head_dim_v);
  }
  // With a single vector of queries the products wait for memory. While the scores of a tile are computed, its values
  // are asked for, and while its values are summed, the next tile's keys; converted operands are a tile further ahead.
  auto ahead(const T* rows, const nsk_view& v, int64_t count, int64_t columns, int64_t product_rows, int64_t k) {
    if constexpr (NV == 1) {
      const bool dense = v.stride[2] == columns;
      return spread<NV>(rows, dense ? count * columns * int64_t(sizeof(T)) : 0, product_rows, k);
    } else {
      return &upcoming;
    }
  }

  void panel_step(int64_t p, int64_t k0, int64_t k1, Broadcast<M> k, Broadcast<M> v, const T* value, int& clean,
                  const T* key, int64_t next) {
    const PanelRange<NR>& range = w.ranges[p];
    int64_t b0 = range.any_begin > k0 ? range.any_begin : k0, b1 = range.any_end < k1 ? range.any_end : k1;
    if (b0 >= b1) return;
    b0 -= (b0 - k0) % M::pack;  // whole pairs of keys, as the tile holds them
    if (b1 < k1) b1 += (b1 - k0) % M::pack;
    const int64_t keys = b1 - b0;
    const Masking kind = a.mask.data ? Masking::Bias : range.full(b0, b1) ? Masking::None : Masking::Range;

    const ptrdiff_t depth = ceil_div(a.head_dim, M::pack);
    const bool in_place = sizeof(T) == sizeof(Unit);  // then this tile's values have not been touched yet
    const int64_t both = NV == 2 && !a.mask.data ? seen_by_first_half(range, b0, b1) : keys;
    const Unit* k_data = k.data + (b0 - k0) * k.stride;
    const Unit* q_data = w.q + p * depth * NR;
    const auto next_operand = ahead(in_place ? value : value + (k1 - k0) * a.value.stride[2], a.value,
                                    in_place ? k1 - k0 : next, a.head_dim_v, keys, depth);
    // The largest product of a lane leads to its largest score, if nothing but the scale is between them.
    const bool find_top = kind == Masking::None && !scale.softcap && scale.scale > 0;
    alignas(64) C top[NR];
    if (find_top) {
      for (C& x : top) x = -kInfinity<C>;
      product<M, NV, Along::K, Into::FreshMax>(keys, k_data, k.stride, q_data, depth, w.s, NR, top, next_operand);
    } else {
      product<M, NV, Along::K, Into::Fresh>(both, k_data, k.stride, q_data, depth, w.s, NR, nullptr, next_operand);
    }
    if (both < keys)
      product<M, 1, Along::K, Into::Fresh>(keys - both, k_data + both * k.stride, k.stride, q_data + L, depth,
                                           w.s + both * NR + L, NR, nullptr, NothingAhead{}, NR);
    LaneMask<M, NV> mask{};
    if (kind == Masking::Range) mask.set_range(range, b0, b1);
    if (kind == Masking::Bias) {
      fill_bias<C, NR>(w.bias, NR, a.mask, block.seq.batch, w.rows + p * NR, rows_in(p), range, b0, b1);
      mask.bias = w.bias;
      mask.ld = NR;
    }
    SoftmaxState<M, NV>& state = w.state[p];
    with_score_kind(kind, scale.softcap, [&](auto masking, auto softcap) {
      online_softmax<M, NV, masking.value, softcap.value>(w.s, w.p, keys, mask, scale, state,
                                                          find_top ? top : nullptr);
    });
    auto values_from = [&](int64_t key) { return v.data + (key - k0) / M::pack * (M::kMatrix ? 1 : v.stride); };
    if (kind != Masking::None) {
      // A probability of 0 must not meet an inf or NaN of a key that its row may not see.
      if (clean < 0) clean = !any_nonfinite<C>(value, a.value.stride[2], k1 - k0, a.head_dim_v);
      if (!clean) return select_values(p, keys, both, kind, mask, value + (b0 - k0) * a.value.stride[2]);
    }
    product<M, NV, kValuesAlong, Into::Rescale>(a.head_dim_v, values_from(b0), v.stride, w.p, ceil_div(both, M::pack),
                                               o_panel(p), NR, state.rescale,
                                               ahead(key + (k1 - k0) * a.key.stride[2], a.key, next, a.head_dim,
                                                     a.head_dim_v, ceil_div(keys, M::pack)));
    if (both < keys)
      product<M, 1, kValuesAlong, Into::Add>(a.head_dim_v, values_from(b0 + both), v.stride,
                                            w.p + both / M::pack * NR + L, ceil_div(keys - both, M::pack),
                                            o_panel(p) + L, NR, nullptr, NothingAhead{}, NR);
  }

  // How many of the keys b0 .. b1 - 1 the first half of the lanes has to look at: under a causal mask they see fewer.
  // What the others' products leave in their lanes of the scores is not looked at.
  static int64_t seen_by_first_half(const PanelRange<NR>& range, int64_t b0, int64_t b1) {
    int64_t end = b0 + 1;  // at least one, so that the product starts the sums
    for (int r = 0; r < L; ++r)
      if (range.end[r] > end) end = range.end[r];
    const int64_t seen = end < b1 ? round_up(end - b0, M::pack) : b1 - b0;
    return seen < b1 - b0 ? seen : b1 - b0;
  }

  // O^T = O^T * rescale + V^T P^T, one allowed pair at a time, in the order of the products.
  void select_values(int64_t p, int64_t keys, int64_t both, Masking kind, const LaneMask<M, NV>& mask, const T* value) {
    C* o = o_panel(p);
    for (int r = 0; r < rows_in(p); ++r)
      for (int64_t d = 0; d < a.head_dim_v; ++d) {
        auto sum = [&](int64_t from, int64_t to) {
          C total = C(0);
          for (int64_t j = from; j < to; ++j)
            if (mask.allowed(kind, j, r))
              total += unit_element<M>(w.p[j / M::pack * NR + r], j) * C(to_float(value[j * a.value.stride[2] + d]));
          return total;
        };
        o[d * NR + r] = o[d * NR + r] * w.state[p].rescale[r] + sum(0, both);
        if (both < keys && r >= L) o[d * NR + r] += sum(both, keys);
      }
  }

  void pack_queries(int64_t p) {
    const T* rows[NR];
    for (int r = 0; r < NR; ++r) {
      const Row* row = w.rows + p * NR + r;
      rows[r] = r < rows_in(p) ? at<const T>(a.query, block.seq.batch, row->head, row->i) : nullptr;
    }
    pack_transposed<M, NV>(w.q + p * ceil_div(a.head_dim, M::pack) * NR, rows, a.head_dim);
  }

  // Divides by the sum, applies the gate, rounds once, writes out and lse.
  void finish() {
    for (int64_t p = 0; p < panels; ++p) {
      const SoftmaxState<M, NV>& state = w.state[p];
      OutputRow<T, C> rows[NR];
      for (int r = 0; r < rows_in(p); ++r)
        rows[r] = finish_row<T, C>(a, block.seq.batch, w.rows[p * NR + r], state.max[r] * scale.unit, state.sum[r]);
      with_gate_type<T>(a, [&]<class G>() {
        for (int group = 0; group < rows_in(p); group += L)
          for (int64_t d = 0; d < a.head_dim_v; d += L) write_tile<G>(p, group, d, rows);
      });
    }
  }

  // Partial results of split keys: see ForwardRun.
  int64_t partial_panels() const { return panels; }
  C* partial_sums(int64_t p) const { return o_panel(p); }
  int64_t partial_size() const { return a.head_dim_v * NR; }
  SoftmaxState<M, NV>& partial_state(int64_t p) const { return w.state[p]; }
  int lane_of(int64_t i) const { return int(i % NR); }

  // Columns d .. d + L - 1 of out for the L rows that start at lane `group` of panel p.
  template <class G>
  void write_tile(int64_t p, int group, int64_t d, const OutputRow<T, C>* to) {
    V rows[L];
    const int64_t left = a.head_dim_v - d;
    const C* o = o_panel(p) + d * NR + group;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = i < left ? load<V>(o + i * NR) : V{};
    transpose(rows);
    const int count = rows_in(p) - group < L ? rows_in(p) - group : L;
    for (int i = 0; i < count; ++i) write_columns<G, L>(a, to[group + i], d, rows[i]);
  }
};

}  // namespace nsk::NSK_ISA
