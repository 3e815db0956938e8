// Runs the backward: (sequence, KV head) pairs over threads.
//
// One thread owns dK and dV of a pair and visits the query tiles of its whole group in order, so no sum is ever shared.
// Where pairs are too few to occupy the threads, the query tiles of each pair are cut into chunks of equal cost that
// add to private copies of dK and dV, summed afterwards in order: the same bits whichever thread ran what.
#pragma once

#include "gated_sdpa_mask_grad.h"

namespace nsk::NSK_ISA {

template <class T, class C, class E>
class BackwardRun {
  using M = Math<C, E, kLanes<C>>;
  using Tile = BackwardTile<T, M>;

 public:
  static nsk_status run(const nsk_gated_sdpa_backward& g) {
    if (g.grad_mask.data) {
      const nsk_status status = MaskGradient<T, C>::run(g);
      if (status != NSK_OK) return status;
    }
    const bool rows = g.grad_query.data || g.grad_gate.data || g.grad_sink.data;
    if (!rows && !g.grad_key.data && !g.grad_value.data) return NSK_OK;
    return BackwardRun(g).run();
  }

 private:
  const nsk_gated_sdpa_backward& g;
  const nsk_gated_sdpa& a = g.forward;
  const int64_t pairs = a.batch * a.heads_kv, group = a.heads_q / a.heads_kv;
  int64_t chunks = 1;
  Buffer<int64_t> first_tile;  // of each sequence, counting the tiles of one head
  Buffer<double> sink_shares;  // [tile][heads_q]
  bool failed = false;

  explicit BackwardRun(const nsk_gated_sdpa_backward& args)
      : g(args), first_tile(a.batch + 1), sink_shares(g.grad_sink.data ? sink_count(a) : 0) {
    const int64_t threads = a.threads;
    if (pairs % threads != 0 && pairs < 16 * threads) {
      const int64_t even = threads / greatest_common_divisor(pairs, threads), most = ceil_div(4 * threads, pairs);
      chunks = even < most ? even : most;
    }
    if (a.cu_seqlens_q && threads > 1 && pairs < 4 * threads) chunks = threads;  // lengths differ between pairs
  }

  static int64_t tiles_of(const Sequence& s) { return ceil_div(s.q_len, Tile::kRows); }
  static int64_t sink_count(const nsk_gated_sdpa& a) {
    int64_t tiles = 0;
    for (int64_t n = 0; n < a.batch; ++n) tiles += tiles_of(sequence(a, n));
    return tiles * a.heads_q;
  }

  ptrdiff_t key_ld() const { return Tile::padded(a.head_dim); }
  ptrdiff_t value_ld() const { return Tile::padded(a.head_dim_v); }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t n = 0; n < a.batch; ++n) most = sequence(a, n).k_len > most ? sequence(a, n).k_len : most;
    return most;
  }

  nsk_status run() {
    if (first_tile.failed() || sink_shares.failed()) return NSK_OUT_OF_MEMORY;
    first_tile[0] = 0;
    for (int64_t n = 0; n < a.batch; ++n) first_tile[n + 1] = first_tile[n] + tiles_of(sequence(a, n));

    const size_t scratch = typename Tile::Workspace(a, Arena()).bytes;
    const int64_t most = longest(), copy = most * (key_ld() + value_ld());
    const Buffer<C> copies(chunks > 1 ? pairs * chunks * copy : 0);
    if (copies.failed()) return NSK_OUT_OF_MEMORY;
    nsk_status status = parallel_for(a.threads, pairs * chunks, scratch, [&](int64_t unit, char* memory) {
      [[maybe_unused]] const Multiplier<M> multiplier;
      chunks > 1 ? chunk(unit / chunks, unit % chunks, copies.data() + unit * copy, memory) : whole_pair(unit, memory);
    });
    if (status == NSK_OK && chunks > 1)
      status = parallel_for(a.threads, pairs, 0, [&](int64_t pair, char*) {
        C* first = copies.data() + pair * chunks * copy;
        const Sequence seq = sequence(a, pair / a.heads_kv);
        const int64_t used = seq.k_len * (key_ld() + value_ld());
        for (int64_t c = 1; c < chunks; ++c)
          for (int64_t i = 0; i < used; ++i) first[i] += first[c * copy + i];
        write(seq, pair % a.heads_kv, gradients(seq, first));
      });
    if (failed) return NSK_OUT_OF_MEMORY;
    if (g.grad_sink.data) write_sink();
    return status;
  }

  // A private copy: dK [k_len][padded D], then dV [k_len][padded Dv].
  KeyGradients<C> gradients(const Sequence& seq, C* memory) const {
    return {memory, memory + seq.k_len * key_ld(), key_ld(), value_ld()};
  }

  // Whether a gradient can be added up where it is wanted.
  bool in_place(const nsk_view& grad, int64_t columns) const {
    return sizeof(T) == sizeof(C) && grad.data && columns % Tile::NR == 0;
  }

  void whole_pair(int64_t pair, char* memory) {
    const Sequence seq = sequence(a, pair / a.heads_kv);
    const int64_t h = pair % a.heads_kv;
    const bool key_here = in_place(g.grad_key, a.head_dim), value_here = in_place(g.grad_value, a.head_dim_v);
    const bool none = (key_here || !g.grad_key.data) && (value_here || !g.grad_value.data);
    const Buffer<C> copy(none ? 0 : seq.k_len * (key_ld() + value_ld()));
    if (copy.failed()) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    KeyGradients<C> acc = none ? KeyGradients<C>{} : gradients(seq, copy.data());
    if constexpr (sizeof(T) == sizeof(C)) {
      if (key_here) acc.key = at<T>(g.grad_key, seq.batch, h, seq.k_start), acc.key_ld = g.grad_key.stride[2];
      if (value_here) acc.value = at<T>(g.grad_value, seq.batch, h, seq.k_start), acc.value_ld = g.grad_value.stride[2];
    }
    clear(seq, acc);
    for (int64_t t = 0; t < group * tiles_of(seq); ++t) tile(seq, h, t, acc, memory);
    write(seq, h, acc);
  }

  void chunk(int64_t pair, int64_t index, C* copy, char* memory) {
    const Sequence seq = sequence(a, pair / a.heads_kv);
    const KeyGradients<C> acc = gradients(seq, copy);
    clear(seq, acc);
    const int64_t tiles = group * tiles_of(seq);
    int64_t total = 0;
    for (int64_t t = 0; t < tiles; ++t) total += cost(seq, t);
    for (int64_t t = 0, done = 0; t < tiles; done += cost(seq, t++))
      if ((done + cost(seq, t) / 2) * chunks / total == index) tile(seq, pair % a.heads_kv, t, acc, memory);
  }

  // Keys that the last row of tile t sees: what the tile costs, near enough.
  int64_t cost(const Sequence& seq, int64_t t) const {
    const int64_t last = (t % tiles_of(seq) + 1) * Tile::kRows;
    const KeyRange keys = seq.mask.keys((last < seq.q_len ? last : seq.q_len) - 1);
    return keys.end - keys.begin + 1;
  }

  void tile(const Sequence& seq, int64_t kv_head, int64_t t, KeyGradients<C> acc, char* memory) {
    const int64_t tiles = tiles_of(seq), head = kv_head * group + t / tiles, row = t % tiles * Tile::kRows;
    const int64_t rows = seq.q_len - row < Tile::kRows ? seq.q_len - row : Tile::kRows;
    Tile work(g, seq, head, row, rows, memory);
    work.run(acc);
    if (g.grad_sink.data) sink_shares[(first_tile[seq.batch] + t % tiles) * a.heads_q + head] = work.grad_sink;
  }

  void clear(const Sequence& seq, KeyGradients<C> acc) const {
    for (int64_t j = 0; j < seq.k_len; ++j) {
      if (g.grad_key.data) fill_zero(acc.key + j * acc.key_ld, a.head_dim);
      if (g.grad_value.data) fill_zero(acc.value + j * acc.value_ld, a.head_dim_v);
    }
  }

  void write(const Sequence& seq, int64_t h, KeyGradients<C> acc) const {
    for (int64_t j = 0; j < seq.k_len; ++j) {
      if (g.grad_key.data)
        scale_row<C>(at<T>(g.grad_key, seq.batch, h, seq.k_start + j), acc.key + j * acc.key_ld, C(a.scale), a.head_dim);
      if (g.grad_value.data)
        scale_row<C>(at<T>(g.grad_value, seq.batch, h, seq.k_start + j), acc.value + j * acc.value_ld, C(1),
                     a.head_dim_v);
    }
  }

  void write_sink() const {
    for (int64_t h = 0; h < a.heads_q; ++h) {
      double sum = 0;
      for (int64_t t = 0; t < first_tile[a.batch]; ++t) sum += sink_shares[t * a.heads_q + h];
      store_scalar(g.grad_sink, h * g.grad_sink.stride[1], sum);
    }
  }
};

}  // namespace nsk::NSK_ISA
