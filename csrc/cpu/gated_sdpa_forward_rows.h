// How the forward cuts its rows into blocks, and what each row writes at the end.
#pragma once

#include "gated_sdpa_problem.h"

namespace nsk::NSK_ISA {

// How the rows of the problem are cut into blocks; the same for all panel shapes.
struct ForwardPlan {
  const nsk_gated_sdpa& a;
  int64_t most_rows, panel_rows;
  int64_t splits = 1;
  Buffer<int64_t> first;  // first block of each sequence; first[batch] = number of blocks

  struct Block {
    Sequence seq;
    int64_t head;       // first query head
    int64_t heads;      // heads folded into rows
    int64_t row, rows;  // rows of the folded problem: row r is query r % q_len of head + r / q_len
  };

  ForwardPlan(const nsk_gated_sdpa& args, int64_t rows, int64_t panel)
      : a(args), most_rows(rows), panel_rows(panel), first(args.batch + 1) {
    if (first.failed()) return;
    first[0] = 0;
    int64_t longest = 0;
    for (int64_t n = 0; n < a.batch; ++n) {
      const Sequence s = sequence(a, n);
      const int64_t fold = heads_folded(s.q_len), all = fold * s.q_len;
      first[n + 1] = first[n] + a.heads_q / fold * ceil_div(all, rows_per_block(all));
      if (s.k_len > longest) longest = s.k_len;
    }
    // Splitting the keys costs a merge; it pays only where whole blocks would leave threads idle.
    const int64_t count = first[a.batch], threads = a.threads;
    if (count > 0 && count < 4 * threads && count % threads != 0) {
      const int64_t wanted = threads / greatest_common_divisor(count, threads), most = ceil_div(longest, 256);
      splits = wanted < most ? wanted : most > 0 ? most : 1;
    }
  }

  int64_t group() const { return a.heads_q / a.heads_kv; }
  int64_t heads_folded(int64_t q_len) const { return q_len < most_rows ? group() : 1; }
  int64_t blocks() const { return first[a.batch]; }

  // Blocks of one size, in whole panels, as few as most_rows allows.
  int64_t rows_per_block(int64_t rows) const {
    const int64_t count = ceil_div(rows, most_rows);
    return count ? round_up(ceil_div(rows, count), panel_rows) : panel_rows;
  }

  Block block(int64_t index) const {
    int64_t low = 0, high = a.batch;  // the last sequence whose first block is <= index and which has blocks
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= index ? low : high) = middle;
    }
    const Sequence s = sequence(a, low);
    const int64_t fold = heads_folded(s.q_len), heads = a.heads_q / fold, all = fold * s.q_len;
    const int64_t size = rows_per_block(all), per_head = ceil_div(all, size), at = index - first[low];
    // Last rows first: under a causal mask they are the longest, and threads should finish together.
    const int64_t row = (per_head - 1 - at / heads) * size, left = all - row;
    return {s, at % heads * fold, fold, row, left < size ? left : size};
  }
};

// What one row of a block needs to be written.
template <class T, class C>
struct OutputRow {
  T* out;
  int64_t gate;   // offset of its gate
  C weight;       // of the sum over values: 1 / sum, and the gate if it is headwise
  bool dead;      // no key was allowed
};

// The rows of a block.
inline void fill_rows(const ForwardPlan::Block& block, Row* rows) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t at = block.row + r, i = at % block.seq.q_len;
    const KeyRange keys = block.seq.mask.keys(i);
    rows[r] = {block.head + at / block.seq.q_len, block.seq.q_start + i, keys.begin, keys.end};
  }
}

// Whether a row may see some key. Only asked of rows whose probabilities sum to 0: they saw no key, or scores of -inf
// alone.
inline bool any_allowed(const nsk_gated_sdpa& a, int64_t batch, const Row& row) {
  if (!a.mask.data) return row.begin < row.end;
  for (int64_t j = row.begin; j < row.end; ++j) {
    const int64_t at = offset(a.mask, batch, row.head, row.i, j);
    if (a.mask.dtype == NSK_BOOL ? static_cast<const bool*>(a.mask.data)[at]
                                 : load_scalar(a.mask, at) != -kInfinity<double>)
      return true;
  }
  return false;
}

// Writes lse of a row, from the maximum (natural) and the sum of its softmax.
template <class T, class C>
OutputRow<T, C> finish_row(const nsk_gated_sdpa& a, int64_t batch, const Row& row, double max, double sum) {
  OutputRow<T, C> to{};
  to.out = at<T>(a.out, batch, row.head, row.i);
  if (a.gate.data) to.gate = offset(a.gate, batch, row.head, row.i);
  to.dead = sum == 0 && !any_allowed(a, batch, row);
  const double lse =
      to.dead ? -kInfinity<double> : sum == 0 ? __builtin_nan("") : max + __builtin_log(sum);
  static_cast<C*>(a.lse.data)[offset(a.lse, batch, row.head, row.i)] = C(lse);
  double weight = sum == 0 ? __builtin_nan("") : 1 / sum;
  if (a.sink.data && sum != 0) {
    const double sink = load_scalar(a.sink, row.head * a.sink.stride[1]), top = sink > max ? sink : max;
    weight = __builtin_exp(max - top) / (sum * __builtin_exp(max - top) + __builtin_exp(sink - top));
  }
  if (a.gate_kind == NSK_GATE_HEADWISE) weight *= scalar_sigmoid(C(load_scalar(a.gate, to.gate)));
  to.weight = C(weight);
  return to;
}

// Scales, gates and rounds columns d .. d + L - 1 of a row, the row's end permitting. G: the type of an elementwise
// gate, or void.
template <class G, int L, class T, class C>
NSK_INLINE void write_columns(const nsk_gated_sdpa& a, const OutputRow<T, C>& row, int64_t d, Vec<C, L> x) {
  const int64_t left = a.head_dim_v - d;
  x *= row.weight;
  if constexpr (!std::is_void_v<G>) {
    const G* gate = static_cast<const G*>(a.gate.data) + row.gate + d;
    x *= sigmoid<C, L>(left >= L ? load_as<C, L>(gate) : load_partial<C, L>(gate, left));
  }
  if (row.dead) x = Vec<C, L>{};
  left >= L ? store_as<C, L>(row.out + d, x) : store_partial<C, L>(row.out + d, x, left);
}

// Calls f.template operator()<G>() for the gate at hand.
template <class T, class F>
NSK_INLINE void with_gate_type(const nsk_gated_sdpa& a, F&& f) {
  if (a.gate_kind != NSK_GATE_ELEMENTWISE)
    f.template operator()<void>();
  else
    a.gate.dtype == kDtype<T> ? f.template operator()<T>() : f.template operator()<float>();
}

// Gates are read once, at the end: asked for ahead of time, they are there when the last products are done.
template <class T>
void ask_gates_now(const nsk_gated_sdpa& a, const ForwardPlan::Block& block, const Row* rows) {
  if (a.gate_kind != NSK_GATE_ELEMENTWISE) return;
  const int64_t element = a.gate.dtype == kDtype<T> ? sizeof(T) : sizeof(float);
  for (int64_t r = 0; r < block.rows; ++r) {
    const char* row =
        static_cast<const char*>(a.gate.data) + element * offset(a.gate, block.seq.batch, rows[r].head, rows[r].i);
    for (int64_t at = 0; at < element * a.head_dim_v; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

}  // namespace nsk::NSK_ISA
