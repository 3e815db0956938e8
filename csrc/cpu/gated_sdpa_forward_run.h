// Runs the forward: blocks over threads, the panel shape by the rows of a block, and the merge of split keys.
#pragma once

#include "gated_sdpa_decode.h"
#include "gated_sdpa_forward.h"

namespace nsk::NSK_ISA {

template <class T, class C, class E>
class ForwardRun {
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using Wide = ForwardBlock<T, M, 2>;
  using Narrow = ForwardBlock<T, M, 1>;
  static constexpr bool kDecode = L == 16;  // eight rows fill its vectors; narrower ones are filled by eight as they are
  using Decode = DecodeBlock<T, std::conditional_t<kDecode, M, Math<float, float, 16>>>;

 public:
  static constexpr int64_t kRowsPerBlock = Wide::kMaxPanels * Wide::NR;

  static nsk_status run(const nsk_gated_sdpa& a) {
    const ForwardPlan plan(a, kRowsPerBlock, Wide::NR);
    if (plan.first.failed()) return NSK_OUT_OF_MEMORY;
    const size_t scratch = scratch_bytes(a);
    const int64_t splits = plan.splits;
    if (splits == 1)
      return parallel_for(a.threads, plan.blocks(), scratch, [&](int64_t unit, char* memory) {
        [[maybe_unused]] const Multiplier<M> multiplier;
        const auto block = plan.block(unit);
        with_shape(a, block, memory, [&](auto&& work) {
          work.attend(0, 1);
          work.finish();
        });
      });

    const int64_t size = partial_size(plan);
    const Buffer<C> partials(plan.blocks() * splits * size);
    if (partials.failed()) return NSK_OUT_OF_MEMORY;
    nsk_status status = parallel_for(a.threads, plan.blocks() * splits, scratch, [&](int64_t unit, char* memory) {
      [[maybe_unused]] const Multiplier<M> multiplier;
      const auto block = plan.block(unit / splits);
      with_shape(a, block, memory, [&](auto&& work) {
        work.attend(unit % splits, splits);
        save(work, partials.data() + unit * size);
      });
    });
    if (status != NSK_OK) return status;
    return parallel_for(a.threads, plan.blocks(), scratch, [&](int64_t unit, char* memory) {
      const auto block = plan.block(unit);
      with_shape(a, block, memory, [&](auto&& work) {
        merge(work, partials.data() + unit * splits * size, splits, size);
        work.finish();
      });
    });
  }

 private:
  static size_t scratch_bytes(const nsk_gated_sdpa& a) {
    size_t most = typename Wide::Workspace(a, Arena()).bytes;
    const size_t narrow = typename Narrow::Workspace(a, Arena()).bytes;
    if (narrow > most) most = narrow;
    if constexpr (kDecode) {
      const size_t decode = typename Decode::Workspace(a, Arena()).bytes;
      if (decode > most) most = decode;
    }
    return most;
  }

  template <class F>
  static void with_shape(const nsk_gated_sdpa& a, const ForwardPlan::Block& block, char* memory, F&& f) {
    if constexpr (kDecode)
      if (block.rows <= Decode::kRows) return f(Decode(a, block, memory));
    if (block.rows > L)
      f(Wide(a, block, memory));
    else
      f(Narrow(a, block, memory));
  }

  // A partial result is what a block has summed, panel by panel: sums, then the maximum and the sum of each lane. Room
  // for the largest.
  static int64_t partial_size(const ForwardPlan& plan) {
    int64_t rows = 0;
    for (int64_t n = 0; n < plan.a.batch; ++n) {
      const int64_t q_len = sequence(plan.a, n).q_len, all = plan.heads_folded(q_len) * q_len;
      if (all > rows) rows = all;
    }
    if (rows > kRowsPerBlock) rows = kRowsPerBlock;
    return round_up(rows, 2 * L) * (round_up(plan.a.head_dim_v, 2 * L) + 2);
  }

  template <class Work>
  static void save(const Work& work, C* out) {
    constexpr int NR = Work::NR;
    const int64_t size = work.partial_size();
    for (int64_t p = 0; p < work.partial_panels(); ++p, out += size + 2 * NR) {
      __builtin_memcpy(out, work.partial_sums(p), size * sizeof(C));
      __builtin_memcpy(out + size, work.partial_state(p).max, NR * sizeof(C));
      __builtin_memcpy(out + size + NR, work.partial_state(p).sum, NR * sizeof(C));
    }
  }

  template <class Work>
  static void merge(Work& work, const C* partials, int64_t splits, int64_t stride) {
    constexpr int NR = Work::NR;
    const int64_t size = work.partial_size();
    for (int64_t p = 0; p < work.partial_panels(); ++p) {
      const C* first = partials + p * (size + 2 * NR);
      auto& state = work.partial_state(p);
      state.reset();
      for (int64_t s = 0; s < splits; ++s)
        for (int r = 0; r < NR; ++r) {
          const C max = first[s * stride + size + r];
          if (!(max <= state.max[r])) state.max[r] = max;  // a NaN stays
        }
      C* sums = work.partial_sums(p);
      fill_zero(sums, size);
      for (int64_t s = 0; s < splits; ++s) {
        const C* part = first + s * stride;
        C weight[NR];
        for (int r = 0; r < NR; ++r) {
          const C max = part[size + r];
          weight[r] = max == -kInfinity<C> ? C(0)
                                           : C(__builtin_exp((double(max) - double(state.max[r])) * work.scale.unit));
          state.sum[r] += weight[r] * part[size + NR + r];
        }
        for (int64_t i = 0; i < size; ++i) sums[i] += weight[work.lane_of(i)] * part[i];
      }
    }
  }
};

}  // namespace nsk::NSK_ISA
