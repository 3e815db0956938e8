// From raw products to probabilities, on a panel of scores S^T [keys][NV * L lanes]: lanes are queries, so maxima and
// sums need no horizontal step.
#pragma once

#include "gated_sdpa_bias.h"

namespace nsk::NSK_ISA {

enum class Masking {
  None,   // every lane sees every key
  Range,  // each lane sees the keys in [begin, end)
  Bias    // a mask tile says what to add, -inf where a key is not allowed
};

// What a lane may see of the keys of one panel of scores, as the inner loops want it.
template <class M, int NV>
struct LaneMask {
  using C = typename M::C;
  using V = typename M::V;
  using I = Vec<Int<C>, M::L>;
  I begin[NV], end[NV];  // relative to the first key
  ptrdiff_t all_begin, all_end;  // the keys that every lane sees, likewise; whole pairs of them
  const C* bias;         // [keys][ld]
  ptrdiff_t ld;

  void set_range(const PanelRange<NV * M::L>& range, int64_t k0, int64_t k1) {
    Int<C> b[NV * M::L], e[NV * M::L];
    for (int r = 0; r < NV * M::L; ++r) {
      auto clamp = [&](int64_t j) { return Int<C>((j < k0 ? k0 : j > k1 ? k1 : j) - k0); };
      b[r] = clamp(range.begin[r]);
      e[r] = clamp(range.end[r]);
    }
    for (int v = 0; v < NV; ++v) {
      begin[v] = load<I>(b + v * M::L);
      end[v] = load<I>(e + v * M::L);
    }
    all_begin = range.all_begin > k0 ? round_up((range.all_begin < k1 ? range.all_begin : k1) - k0, M::pack) : 0;
    all_end = range.all_end < k1 ? (range.all_end > k0 ? range.all_end - k0 : 0) / M::pack * M::pack : k1 - k0;
    if (all_begin >= all_end) all_begin = all_end = 0;
  }

  // Selects, never multiplies: what a key holds that a lane may not see is gone.
  template <Masking K>
  NSK_INLINE V apply(V score, int64_t key, int v) const {
    if constexpr (K == Masking::Range) {
      const I j = splat<Int<C>, M::L>(Int<C>(key));
      return (j >= begin[v]) & (j < end[v]) ? score : splat<C, M::L>(-kInfinity<C>);
    } else if constexpr (K == Masking::Bias) {
      const V b = load<V>(bias + key * ld + v * M::L);
      const V none = splat<C, M::L>(-kInfinity<C>);
      return b == none ? none : score + b;
    } else {
      return score;
    }
  }

  // The same choice for what was computed from a score: 0 where the lane may not see the key.
  template <Masking K>
  NSK_INLINE V select(V x, int64_t key, int v) const {
    if constexpr (K == Masking::Range) {
      const I j = splat<Int<C>, M::L>(Int<C>(key));
      return (j >= begin[v]) & (j < end[v]) ? x : V{};
    } else if constexpr (K == Masking::Bias) {
      return load<V>(bias + key * ld + v * M::L) == splat<C, M::L>(-kInfinity<C>) ? V{} : x;
    } else {
      return x;
    }
  }

  // For the rare paths that treat one pair at a time.
  bool allowed(Masking kind, int64_t key, int lane) const {
    if (kind == Masking::Range) return key >= begin[lane / M::L][lane % M::L] && key < end[lane / M::L][lane % M::L];
    if (kind == Masking::Bias) return bias[key * ld + lane] != -kInfinity<C>;
    return true;
  }
};

// Calls f(std::integral_constant<Masking, ...>, std::bool_constant<softcap>) for the values at hand.
template <class F>
NSK_INLINE void with_score_kind(Masking kind, bool softcap, F&& f) {
  auto inner = [&](auto k) { softcap ? f(k, std::true_type{}) : f(k, std::false_type{}); };
  switch (kind) {
    case Masking::None: return inner(std::integral_constant<Masking, Masking::None>{});
    case Masking::Range: return inner(std::integral_constant<Masking, Masking::Range>{});
    case Masking::Bias: return inner(std::integral_constant<Masking, Masking::Bias>{});
  }
}

// The scores before the mask.
template <class M, bool kSoftcap>
NSK_INLINE typename M::V scaled(typename M::V acc, const ScoreScale<typename M::C>& scale) {
  if constexpr (kSoftcap)
    return tanh<typename M::C, M::L>(acc * scale.to_tanh) * scale.cap;
  else
    return acc * scale.scale;
}

// The running state of the online softmax of one panel: maximum, sum, and the factor by which the last
// step asks older sums to be rescaled.
template <class M, int NV>
struct SoftmaxState {
  using C = typename M::C;
  alignas(64) C max[NV * M::L], sum[NV * M::L], rescale[NV * M::L];

  void reset() {
    for (int r = 0; r < NV * M::L; ++r) {
      max[r] = -kInfinity<C>;
      sum[r] = C(0);
    }
  }
};

// Beyond this, half a unit in the last place of a score is no small number: a score that is multiplied and subtracted in
// one rounding then differs from the maximum, which was rounded before, by more than exp takes.
template <class C>
inline constexpr C kHugeScore = C(1 << 20);

// One step of the online softmax over `keys` scores. Reads s [keys][NV * L]; writes probabilities relative to the new
// maximum to `p`: in place of s (C), or as pairs of bf16 along the keys, [ceil(keys / 2)][NV * L]. Scores and their
// maximum are in units of log(2), but with a mask in units of 1: a mask may hold anything that C does.
//
// `top`: the lanes' largest products, if the caller knows them already; then no key is masked and the scale is positive.
//
// kTwin: the vector's halves are two keys of the same lanes, so row j of s holds keys 2 j and 2 j + 1. They share a
// maximum, and pairs of bf16 are made of the two.
template <class M, int NV, Masking K, bool kSoftcap, bool kTwin = false>
void online_softmax(typename M::C* s, typename M::Unit* p, ptrdiff_t keys, const LaneMask<M, NV>& mask,
                    const ScoreScale<typename M::C>& scale, SoftmaxState<M, NV>& state,
                    const typename M::C* top = nullptr) {
  using C = typename M::C;
  using V = typename M::V;
  constexpr int L = M::L, NR = NV * L;
  // Keys [from, to) need neither mask nor softcap: their products are scores but for the scale, which the second pass
  // applies. The others' scores are stored.
  constexpr bool kPlain = K != Masking::Bias && !kSoftcap;
  const ptrdiff_t from = !kPlain ? keys : K == Masking::None ? 0 : mask.all_begin;
  const ptrdiff_t to = !kPlain || K == Masking::None ? keys : mask.all_end;

  V max[NV];
  for (int v = 0; v < NV; ++v) max[v] = splat<C, L>(-kInfinity<C>);
  if constexpr (kPlain) {
    // The largest score belongs to the largest product, or the smallest if the scale is negative.
    auto find = [&](auto flip) {
      for (ptrdiff_t j = from; j < to; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const V t = load<V>(s + j * NR + v * L);
          max[v] = max_keep<C, L>(max[v], flip.value ? -t : t);
        }
      if (from < to)  // a scale of 0 would make NaN of -inf
        for (int v = 0; v < NV; ++v) max[v] = (flip.value ? -max[v] : max[v]) * scale.scale;
    };
    if (top)
      for (int v = 0; v < NV; ++v) max[v] = load<V>(top + v * L) * scale.scale;
    else
      scale.scale < 0 ? find(std::true_type{}) : find(std::false_type{});
  }
  C factor = scale.scale;
  if constexpr (kPlain) {
    auto huge = max[0] > kHugeScore<C>;
    for (int v = 0; v < NV; ++v) huge |= (max[v] > kHugeScore<C>) | (max[v] < -kHugeScore<C>);
    if (from < to && any(huge)) {  // rounded by themselves
      for (ptrdiff_t i = from * NR; i < to * NR; i += L) store(s + i, load<V>(s + i) * factor);
      factor = C(1);
    }
  }
  auto store_scores = [&](ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t j = first; j < last; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V t = mask.template apply<K>(scaled<M, kSoftcap>(load<V>(s + j * NR + v * L), scale), j, v);
        store(s + j * NR + v * L, t);
        max[v] = max_keep<C, L>(max[v], t);
      }
  };
  if constexpr (K != Masking::None || kSoftcap) {
    store_scores(0, from);
    store_scores(to, keys);
  }
  for (int v = 0; v < NV; ++v) {
    max[v] = max_keep<C, L>(load<V>(state.max + v * L), max[v]);
    if constexpr (kTwin) max[v] = max_keep<C, L>(max[v], swap_halves<L>(max[v], std::make_index_sequence<L>{}));
  }

  constexpr C kToLog2 = C(K == Masking::Bias ? kLog2e : 1);
  V pivot[NV], sum[NV];
  for (int v = 0; v < NV; ++v) {
    // A lane that has seen nothing yet has maximum -inf; pivoting on 0 keeps -inf - -inf out.
    pivot[v] = max[v] == splat<C, L>(-kInfinity<C>) ? V{} : max[v];
    const V rescale = exp2<C, L>((load<V>(state.max + v * L) - pivot[v]) * kToLog2);
    store(state.rescale + v * L, rescale);
    sum[v] = load<V>(state.sum + v * L) * rescale;
  }
  // Keys j .. j + n - 1.
  auto some = [&](ptrdiff_t j, auto n, C factor) {
    constexpr int N = decltype(n)::value;
    V e[N * NV];
#pragma GCC unroll 16
    for (int i = 0; i < N * NV; ++i) {
      const V t = load<V>(s + j * NR + i * L);
      e[i] = (t * factor - pivot[i % NV]) * kToLog2;
    }
    probabilities_exp2<M, true>(e);
#pragma GCC unroll 16
    for (int i = 0; i < N * NV; ++i) sum[i % NV] += e[i];
    if constexpr (M::pack == 1) {
#pragma GCC unroll 16
      for (int i = 0; i < N * NV; ++i) store(p + j * NR + i * L, e[i]);
    } else if constexpr (kTwin) {
#pragma GCC unroll 16
      for (int i = 0; i < N * NV; ++i) store(p + (j * NR + i * L) / 2, pair_halves<L>(e[i]));
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < N * NV; ++i)
        if (i / NV % 2 == 0)
          store(p + j / 2 * NR + (i / NV / 2 * NV + i % NV) * L, pair_bf16<L>(e[i], i + NV < N * NV ? e[i + NV] : V{}));
    }
  };
    auto probabilities = [&](ptrdiff_t j, ptrdiff_t last, C factor) {
    for (; j + 2 <= last; j += 2) some(j, std::integral_constant<int, 2>{}, factor);
    if (j < last) some(j, std::integral_constant<int, 1>{}, factor);
  };
  if constexpr (K != Masking::None || kSoftcap) probabilities(0, from, C(1));
  if constexpr (kPlain) probabilities(from, to, factor);
  if constexpr (K != Masking::None || kSoftcap) probabilities(to, keys, C(1));
  for (int v = 0; v < NV; ++v) {
    store(state.max + v * L, max[v]);
    store(state.sum + v * L, sum[v]);
  }
}

}  // namespace nsk::NSK_ISA
