// The mask tile: what attn_mask and the key range say of [keys][lanes] scores, as a bias that is -inf
// exactly where a key is not allowed.
#pragma once

#include "gated_sdpa_problem.h"

namespace nsk::NSK_ISA {

// Per-lane key ranges of a panel, and what holds for all of its lanes.
template <int NR>
struct PanelRange {
  int64_t begin[NR], end[NR];
  int64_t any_begin, any_end;  // keys that some row sees
  int64_t all_begin, all_end;  // keys that every row sees

  // Lanes past `count` carry no row. Either they see nothing, or, where what they compute is never used, everything, so
  // that they do not stand in the way of `full`.
  void set(const Row* rows, int count, bool idle_see_all) {
    any_begin = INT64_MAX;
    any_end = INT64_MIN;
    all_begin = INT64_MIN;
    all_end = INT64_MAX;
    for (int r = 0; r < NR; ++r) {
      const bool real = r < count;
      begin[r] = real ? rows[r].begin : idle_see_all ? INT64_MIN : 0;
      end[r] = real ? rows[r].end : idle_see_all ? INT64_MAX : 0;
      if (!real && idle_see_all) continue;
      if (begin[r] > all_begin) all_begin = begin[r];
      if (end[r] < all_end) all_end = end[r];
      if (begin[r] >= end[r]) continue;
      if (begin[r] < any_begin) any_begin = begin[r];
      if (end[r] > any_end) any_end = end[r];
    }
    if (any_begin > any_end) any_begin = any_end = 0;
  }
  bool full(int64_t k0, int64_t k1) const { return all_begin <= k0 && k1 <= all_end; }
};

template <class C, class T>
inline C bias_value(T x) {
  return C(to_float(x));
}
template <class C>
inline C bias_value(bool allowed) {
  return allowed ? C(0) : -kInfinity<C>;
}

template <class C, int NR, class T>
void fill_bias_from(C* bias, ptrdiff_t ld, const nsk_view& mask, int64_t batch, const Row* rows, int count,
                    const PanelRange<NR>& range, int64_t k0, int64_t k1) {
  for (int r = 0; r < NR; ++r) {
    if (r >= count) {
      for (int64_t j = k0; j < k1; ++j) bias[(j - k0) * ld + r] = range.end[r] ? C(0) : -kInfinity<C>;
      continue;
    }
    const T* row = at<const T>(mask, batch, rows[r].head, rows[r].i);
    const int64_t begin = range.begin[r] > k0 ? range.begin[r] : k0, end = range.end[r] < k1 ? range.end[r] : k1;
    for (int64_t j = k0; j < k1; ++j)
      bias[(j - k0) * ld + r] = j >= begin && j < end ? bias_value<C>(row[j * mask.stride[3]]) : -kInfinity<C>;
  }
}

// bias[(j - k0) * ld + lane] for keys k0 <= j < k1. The mask is read only where the key range allows.
template <class C, int NR>
void fill_bias(C* bias, ptrdiff_t ld, const nsk_view& mask, int64_t batch, const Row* rows, int count,
               const PanelRange<NR>& range, int64_t k0, int64_t k1) {
  switch (mask.dtype) {
    case NSK_BOOL: return fill_bias_from<C, NR, bool>(bias, ld, mask, batch, rows, count, range, k0, k1);
    case NSK_F64: return fill_bias_from<C, NR, double>(bias, ld, mask, batch, rows, count, range, k0, k1);
    case NSK_BF16: return fill_bias_from<C, NR, bf16>(bias, ld, mask, batch, rows, count, range, k0, k1);
    case NSK_F16: return fill_bias_from<C, NR, f16>(bias, ld, mask, batch, rows, count, range, k0, k1);
    default: return fill_bias_from<C, NR, float>(bias, ld, mask, batch, rows, count, range, k0, k1);
  }
}

}  // namespace nsk::NSK_ISA
