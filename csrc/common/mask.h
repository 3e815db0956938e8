// Which keys a query may see by position alone: causality and the window leave one interval of keys.
#pragma once

#include <cstdint>

namespace nsk {

struct KeyRange {
  int64_t begin, end;  // empty when begin >= end
};

// With off = seqlen_k - seqlen_q for the bottom-right alignment and 0 for the top-left one, query i sees the keys
//   i + off - left <= j <= i + off + right,   and j <= i + off when causal.
struct PositionMask {
  int64_t seqlen_k;
  int64_t offset;
  int64_t left, right;  // -1: unbounded

  static constexpr PositionMask make(int64_t seqlen_q, int64_t seqlen_k, bool causal, bool bottom_right,
                                     int64_t window_left, int64_t window_right) {
    // A bound beyond every key is no bound; dropping it keeps the sums below far from overflow.
    const int64_t reach = seqlen_q + seqlen_k;
    if (window_left > reach) window_left = -1;
    if (window_right > reach) window_right = -1;
    if (causal) window_right = 0;
    return {seqlen_k, bottom_right ? seqlen_k - seqlen_q : 0, window_left, window_right};
  }

  constexpr KeyRange keys(int64_t i) const {
    const int64_t center = i + offset;
    int64_t begin = left < 0 ? 0 : center - left;
    int64_t end = right < 0 ? seqlen_k : center + right + 1;
    if (begin < 0) begin = 0;
    if (begin > seqlen_k) begin = seqlen_k;
    if (end > seqlen_k) end = seqlen_k;
    if (end < begin) end = begin;
    return {begin, end};
  }

  // The other way round: which of `seqlen_q` queries see key j.
  constexpr KeyRange queries(int64_t j, int64_t seqlen_q) const {
    const int64_t center = j - offset;
    int64_t begin = right < 0 ? 0 : center - right;
    int64_t end = left < 0 ? seqlen_q : center + left + 1;
    if (begin < 0) begin = 0;
    if (begin > seqlen_q) begin = seqlen_q;
    if (end > seqlen_q) end = seqlen_q;
    if (end < begin) end = begin;
    return {begin, end};
  }
};

}  // namespace nsk
