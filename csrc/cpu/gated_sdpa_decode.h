// Gated attention, forward, for blocks of at most eight rows: a decode step, whose rows are the query heads that share
// a KV head. K and V are read once and used eight times, so the work is to keep up with memory at full vector width.
//
//   S^T [keys][8]  = K Q^T      twin lanes: a query has two lanes, which take odd and even elements of head_dim; the
//                               broadcast operand is 64 bits of K, in place
//   P^T [keys][8]  = online softmax, two keys in a vector
//   O [8][d]       = O * rescale + P V      lanes are columns; P^T is the broadcast operand, V the panel, in place
//
// Operands that cannot be read in place (float16, pairs of bf16 along the keys, odd sizes and strides) are converted
// tile by tile. While the scores of a tile are computed its values are asked for, and while the values are summed, the
// next tile's keys.
#pragma once

#include "gated_sdpa_forward_rows.h"
#include "gated_sdpa_scores.h"

namespace nsk::NSK_ISA {

template <class T, class M_>
struct DecodeBlock {
  using M = M_;
  using Twin = TwinMath<M>;
  using C = typename M::C;
  using E = typename M::E;
  using Unit = typename M::Unit;
  using V = typename M::V;
  static constexpr int L = M::L, NR = L, kRows = L / 2;
  static constexpr int64_t kKeys = 64;
  static constexpr int kTwins = 8 / sizeof(E);  // elements in 64 bits
  static constexpr bool kInPlace = sizeof(T) == sizeof(E);

  static constexpr ptrdiff_t padded(ptrdiff_t columns) { return round_up(columns, 2 * L); }

  struct Workspace {
    uint64_t* q;  // [ceil(D / kTwins)][8]
    uint64_t* k;  // keys that cannot be read in place
    C *sums, *s;  // [kKeys][16] before the twins are added, [kKeys][8] after
    Unit* p;      // as s, or pairs along the keys
    C* bias;      // [kKeys][8]
    Unit* v;      // values that cannot be read in place [kKeys / pack][padded Dv]
    C* o;         // [8][padded Dv]
    Row* rows;
    SoftmaxState<M, 1>* state;
    size_t bytes;

    Workspace(const nsk_gated_sdpa& a, Arena arena) {
      const ptrdiff_t units = ceil_div(a.head_dim, kTwins);
      q = arena.take<uint64_t>(units * kRows);
      k = arena.take<uint64_t>(kKeys * units);
      sums = arena.take<C>(kKeys * L);
      s = arena.take<C>(kKeys * kRows);
      p = M::pack == 1 ? reinterpret_cast<Unit*>(s) : arena.take<Unit>(kKeys / M::pack * kRows);
      bias = arena.take<C>(a.mask.data ? kKeys * kRows : 0);
      v = arena.take<Unit>(kKeys / M::pack * padded(a.head_dim_v));
      o = arena.take<C>(kRows * padded(a.head_dim_v));
      rows = arena.take<Row>(kRows);
      state = arena.take<SoftmaxState<M, 1>>(1);
      bytes = arena.used();
    }
  };

  const nsk_gated_sdpa& a;
  const ForwardPlan::Block& block;
  Workspace w;
  ScoreScale<C> scale{a, a.mask.data ? 1 : kLn2};
  PanelRange<kRows> range;
  const int count = int(block.rows);
  const ptrdiff_t ldo = padded(a.head_dim_v);

  DecodeBlock(const nsk_gated_sdpa& args, const ForwardPlan::Block& b, char* scratch)
      : a(args), block(b), w(args, Arena(scratch)) {
    fill_rows(block, w.rows);
    range.set(w.rows, count, true);
  }

  void attend(int64_t split, int64_t splits) {
    w.state->reset();
    fill_zero(w.o, kRows * ldo);
    int64_t begin = range.any_begin, end = range.any_end;
    if (begin < end && splits > 1) {
      const int64_t share = round_up(ceil_div(end - begin, splits), kKeys);
      begin += split * share;
      if (begin + share < end) end = begin + share;
    }
    if (begin >= end) return;
    pack_queries();
    ask_gates_now<T>(a, block, w.rows);
    for (int64_t k0 = begin; k0 < end; k0 += kKeys) step(k0, k0 + kKeys < end ? k0 + kKeys : end, end);
  }

  void finish() {
    for (int r = 0; r < count; ++r) {
      const auto row = finish_row<T, C>(a, block.seq.batch, w.rows[r], w.state->max[r] * scale.unit,
                                        w.state->sum[r] + w.state->sum[r + kRows]);
      with_gate_type<T>(a, [&]<class G>() {
        for (int64_t d = 0; d < a.head_dim_v; d += L) write_columns<G, L>(a, row, d, load<V>(w.o + r * ldo + d));
      });
    }
  }

  // Partial results of split keys: see ForwardRun.
  int64_t partial_panels() const { return 1; }
  C* partial_sums(int64_t) const { return w.o; }
  int64_t partial_size() const { return kRows * ldo; }
  SoftmaxState<M, 1>& partial_state(int64_t) const { return *w.state; }
  int lane_of(int64_t i) const { return int(i / ldo); }

 private:
  void pack_queries() {
    const ptrdiff_t units = ceil_div(a.head_dim, kTwins);
    fill_zero(w.q, units * kRows);
    E* const q = reinterpret_cast<E*>(w.q);
    for (int r = 0; r < count; ++r) {
      const T* row = at<const T>(a.query, block.seq.batch, w.rows[r].head, w.rows[r].i);
      for (ptrdiff_t d = 0; d < a.head_dim; ++d) {
        E& to = q[(d / kTwins * kRows + r) * kTwins + d % kTwins];
        if constexpr (kInPlace)
          to = row[d];
        else
          to = E(to_float(row[d]));
      }
    }
  }

  // K in 64-bit units: in place where they line up.
  Broadcast<Twin> keys(const T* key, int64_t n) {
    const int64_t stride = a.key.stride[2];
    if constexpr (kInPlace)
      if (a.head_dim % kTwins == 0 && stride % kTwins == 0 && reinterpret_cast<uintptr_t>(key) % 8 == 0)
        return {reinterpret_cast<const uint64_t*>(key), stride / kTwins};
    const ptrdiff_t units = ceil_div(a.head_dim, kTwins);
    for (int64_t j = 0; j < n; ++j) {
      w.k[(j + 1) * units - 1] = 0;
      scale_row<C>(reinterpret_cast<E*>(w.k + j * units), key + j * stride, C(1), a.head_dim);
    }
    return {w.k, units};
  }

  // V as a panel that is as wide as the row: units of `pack` keys, 0 beyond the last column.
  Broadcast<M> values(const T* value, int64_t n) {
    const int64_t stride = a.value.stride[2], dv = a.head_dim_v;
    if constexpr (M::pack == 1 && kInPlace)
      if (dv % (2 * L) == 0) return {value, stride};
    for (int64_t j = 0; j < n; j += M::pack) {
      Unit* to = w.v + j / M::pack * ldo;
      const T* row = value + j * stride;
      for (int64_t d = 0; d < ldo; d += 2 * L, to += 2 * L) {
        const int64_t left = dv - d;
        if constexpr (M::pack == 1) {
          store(to, left >= L ? load_as<C, L>(row + d) : load_partial<C, L>(row + d, left));
          store(to + L, left >= 2 * L ? load_as<C, L>(row + d + L) : left > L ? load_partial<C, L>(row + d + L, left - L) : V{});
        } else {
          using H = Vec<uint16_t, 2 * L>;
          auto read = [&](const T* p) { return left >= 2 * L ? load<H>(p) : load_bytes<H>(p, 2 * left); };
          Vec<uint32_t, L> pairs[2];
          interleave<L>(read(row + d), j + 1 < n ? read(row + stride + d) : H{}, pairs, std::make_index_sequence<2 * L>{});
          store(to, pairs[0]);
          store(to + L, pairs[1]);
        }
      }
    }
    return {w.v, ldo};
  }

  void step(int64_t k0, int64_t k1, int64_t end) {
    const int64_t n = k1 - k0, b = block.seq.batch, kv_head = block.head / (a.heads_q / a.heads_kv);
    const T* key = at<const T>(a.key, b, kv_head, block.seq.k_start + k0);
    const T* value = at<const T>(a.value, b, kv_head, block.seq.k_start + k0);
    const int64_t next = k1 + kKeys < end ? kKeys : end - k1;
    const ptrdiff_t depth = ceil_div(a.head_dim, kTwins);
    const auto k = keys(key, n);
    product<Twin, 1, Along::K, Into::Fresh>(n, k.data, k.stride, w.q, depth, w.sums, L, nullptr,
                                            spread<1, 2>(value, bytes(a.value, n, a.head_dim_v), n, depth));
    for (int64_t j = 0; j < n; j += 2) add_twins(j, j + 1 < n);

    const Masking kind = a.mask.data                          ? Masking::Bias
                         : n % 2 == 0 && range.full(k0, k1) ? Masking::None
                                                              : Masking::Range;
    const LaneMask<M, 1> mask = lane_mask(kind, k0, k1);
    with_score_kind(kind, scale.softcap, [&](auto masking, auto softcap) {
      online_softmax<M, 1, masking.value, softcap.value, true>(w.s, w.p, ceil_div(n, 2), mask, scale, *w.state);
    });
    rescale();
    if (kind != Masking::None && !(range.full(k0, k1) && !a.mask.data) &&
        any_nonfinite<C>(value, a.value.stride[2], n, a.head_dim_v))
      return select_values(value, n, kind, mask);
    const auto v = values(value, n);
    const ptrdiff_t units = ceil_div(n, M::pack);
    auto ahead = spread<2, 2>(key + n * a.key.stride[2], bytes(a.key, next, a.head_dim), kTileRows<2> * (ldo / (2 * L)),
                              units);
    for (int64_t d = 0; d < ldo; d += 2 * L, ahead.at += 2 * units * ahead.step)
      product<M, 2, Along::Rows, Into::Add>(count, w.p, kRows, v.data + d, units, w.o + d, ldo, nullptr, ahead, v.stride);
  }

  // What lies between two rows of another head or position is not asked for.
  static ptrdiff_t bytes(const nsk_view& x, int64_t rows, int64_t columns) {
    return x.stride[2] == columns ? rows * columns * ptrdiff_t(sizeof(T)) : 0;
  }

  void add_twins(int64_t j, bool both) {
    const V x = load<V>(w.sums + j * L), y = both ? load<V>(w.sums + (j + 1) * L) : V{};
    store(w.s + j * kRows, pick<0>(x, y, std::make_index_sequence<L>{}) + pick<1>(x, y, std::make_index_sequence<L>{}));
  }
  template <int kOdd, size_t... I>
  static NSK_INLINE V pick(V x, V y, std::index_sequence<I...>) {  // every second lane of x, then of y
    return __builtin_shufflevector(x, y, (2 * I + kOdd)...);
  }

  // Lanes are (key % 2, row), and a row of scores is two keys.
  LaneMask<M, 1> lane_mask(Masking kind, int64_t k0, int64_t k1) {
    LaneMask<M, 1> mask{};
    if (kind == Masking::Range) {
      PanelRange<L> twins;
      auto clamp = [&](int64_t j) { return (j < k0 ? k0 : j > k1 ? k1 : j) - k0; };
      twins.all_begin = 0;
      twins.all_end = (k1 - k0) / 2;
      for (int r = 0; r < L; ++r) {
        const int64_t parity = r / kRows;
        twins.begin[r] = (clamp(range.begin[r % kRows]) + 1 - parity) / 2;
        twins.end[r] = (clamp(range.end[r % kRows]) + 1 - parity) / 2;
        if (twins.begin[r] > twins.all_begin) twins.all_begin = twins.begin[r];
        if (twins.end[r] < twins.all_end) twins.all_end = twins.end[r];
      }
      mask.set_range(twins, 0, ceil_div(k1 - k0, 2));
    }
    if (kind == Masking::Bias) {
      fill_bias<C, kRows>(w.bias, kRows, a.mask, block.seq.batch, w.rows, count, range, k0, k1);
      if ((k1 - k0) % 2) store(w.bias + (k1 - k0) * kRows, splat<C, kRows>(-kInfinity<C>));
      mask.bias = w.bias;
      mask.ld = L;
    }
    return mask;
  }

  void rescale() {
    const V factor = load<V>(w.state->rescale);
    if (!any(factor != splat<C, L>(C(1)))) return;
    for (int r = 0; r < count; ++r)
      for (ptrdiff_t d = 0; d < ldo; d += L) store(w.o + r * ldo + d, load<V>(w.o + r * ldo + d) * factor[r]);
  }

  // A probability of 0 must not meet an inf or NaN of a key that its row may not see.
  void select_values(const T* value, int64_t n, Masking kind, const LaneMask<M, 1>& mask) {
    for (int r = 0; r < count; ++r)
      for (int64_t d = 0; d < a.head_dim_v; ++d) {
        C sum = C(0);
        for (int64_t j = 0; j < n; ++j)
          if (mask.allowed(kind, j / 2, int(j % 2) * kRows + r))
            sum += unit_element<M>(w.p[j / M::pack * kRows + r], j) * C(to_float(value[j * a.value.stride[2] + d]));
        w.o[r * ldo + d] += sum;
      }
  }
};

}  // namespace nsk::NSK_ISA
