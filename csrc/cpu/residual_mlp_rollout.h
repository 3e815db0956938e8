// Small batches, as an agent that acts has them: fewer rows than would keep the threads or the lanes busy.
//
// Threads share out the columns of each layer (its output features). Whoever finishes its share last normalises the rows
// and lets everybody go on to the next layer. Work is handed out layer by layer, so whoever waits for a layer waits for
// work that somebody has already begun: it ends on any number of threads.
//
// Up to kFewRows rows: lanes run along k. A weight's row is read in place as a vector, multiplied with the same piece of
// each row, and 16 sums are added up across their lanes in one transpose. That reads every weight once, at the speed of
// memory. More rows: lanes are rows, as in the tile.
#pragma once

#include <sched.h>

#include "residual_mlp_forward.h"

namespace nsk::NSK_ISA {

// Where the hands that share a layer meet. Counts never go back: layer l is done when `hands * (l + 1)` have arrived.
struct alignas(64) Meeting {
  int64_t arrived, layers_done;

  // Whether the caller is the last of the hands at layer `l`.
  bool arrive(int64_t l, int64_t hands) { return __atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == hands * (l + 1); }
  void let_go(int64_t l) { __atomic_store_n(&layers_done, l + 1, __ATOMIC_RELEASE); }
  void wait_for(int64_t layers) const {
    for (int spins = 0; __atomic_load_n(&layers_done, __ATOMIC_ACQUIRE) < layers; ++spins) {
      if (spins > 2000) sched_yield();  // there may be more threads than cores
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }
};

// `rows` <= kFewRows rows of one group, lanes along k.
template <class T, class C, class E>
class MlpFewRows {
 public:
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using V = Vec<C, L>;
  using Unit = typename M::Unit;
  static constexpr int kFewRows = 8, kMostAtOnce = 4;
  // The weights to ask for: the sweep is linear. Into L2, which takes more requests at once than L1 (1.5 x, measured).
  static constexpr ptrdiff_t kRowsAhead = 16;

  struct Rows {
    Unit* x;  // [row][units], 0 behind the width
    C *z, *stream;  // [row][width]
    ptrdiff_t units;

    Rows(const MlpShape& s, Arena& arena)
        : units(round_up(ceil_div(s.width, M::pack), L)) {
      const ptrdiff_t rows = round_up(s.rows, s.rows > 2 ? kMostAtOnce : 1);
      x = arena.take<Unit>(rows * units);
      z = arena.take<C>(s.rows * s.width);
      stream = arena.take<C>(s.rows * s.width);
    }
  };

  MlpFewRows(const nsk_residual_mlp& args, int64_t group, const Rows& of_rows, C* vectors)
      : a(args), group_(group), width_(args.width), w(of_rows), vectors_(vectors) {}

  void begin() {
    const ptrdiff_t rows = round_up(a.rows, a.rows > 2 ? kMostAtOnce : 1);
    fill_zero(w.x, rows * w.units);
    with_type<T>(a.x.dtype, [&](auto type) {
      for (int64_t r = 0; r < a.rows; ++r) {
        scale_row<C>(w.stream + r * width_, at<const decltype(type)>(a.x, group_, 0, r), C(1), width_);
        scale_row<C>(elements(r), w.stream + r * width_, C(1), width_);
      }
    });
  }

  // Columns [begin, end) of z = x W^T, without the bias.
  void part(int64_t l, ptrdiff_t begin, ptrdiff_t end) {
    for (int64_t r = 0; r < a.rows;) {
      const int64_t left = a.rows - r;
      if (left == 1)
        multiply<1>(l, r, begin, end), r += 1;
      else if (left == 2)
        multiply<2>(l, r, begin, end), r += 2;
      else
        multiply<kMostAtOnce>(l, r, begin, end), r += kMostAtOnce;
    }
  }

  template <Activation A>
  void finish(int64_t l, bool ends_block) {
    const LayerVectors<C> vectors(a, group_, l, vectors_);
    for (int64_t r = 0; r < a.rows; ++r) {
      C* const z = w.z + r * width_;
      auto over_row = [&](auto&& f) {
        ptrdiff_t j = 0;
        for (; j + L <= width_; j += L) f(j, ptrdiff_t(L));
        if (j < width_) f(j, width_ - j);
      };
      V sum{}, square{};
      over_row([&](ptrdiff_t j, ptrdiff_t n) {
        const V y = load_up_to<C, L>(z + j, n) + load_up_to<C, L>(vectors.bias + j, n);
        store_up_to<C, L>(z + j, y, n);
        sum += y;
      });
      const C mean = reduce_add<C, L>(sum) / C(width_);
      over_row([&](ptrdiff_t j, ptrdiff_t n) {
        V lane;
        for (int i = 0; i < L; ++i) lane[i] = C(i);
        const V d = load_up_to<C, L>(z + j, n) - mean;
        square += lane < C(n) ? d * d : V{};
      });
      const C scale = C(1) / square_root<C, L>(splat<C, L>(reduce_add<C, L>(square) / C(width_) + C(a.eps)))[0];
      C* const stream = w.stream + r * width_;
      over_row([&](ptrdiff_t j, ptrdiff_t n) {
        V y[1] = {(load_up_to<C, L>(z + j, n) - mean) * scale * load_up_to<C, L>(vectors.gamma + j, n) +
                  load_up_to<C, L>(vectors.beta + j, n)};
        activate<A, C, L>(y);
        if (ends_block) {
          y[0] += load_up_to<C, L>(stream + j, n);
          store_up_to<C, L>(stream + j, y[0], n);
        }
        store_up_to<C, L>(elements(r) + j, y[0], n);
      });
    }
  }

  void end() const {
    with_type<T>(a.y.dtype, [&](auto type) {
      for (int64_t r = 0; r < a.rows; ++r)
        scale_row<C>(at<decltype(type)>(a.y, group_, 0, r), w.stream + r * width_, C(1), width_);
    });
  }

 private:
  using Element = std::conditional_t<M::pack == 2, bf16, C>;
  Element* elements(int64_t row) const { return reinterpret_cast<Element*>(w.x + row * w.units); }

  // N rows from row r0 on: L sums at a time, of L / N columns.
  template <int N>
  [[gnu::noinline]] void multiply(int64_t l, int64_t r0, ptrdiff_t begin, ptrdiff_t end) {
    constexpr int R = L >= N ? L / N : 1;
    const T* const weight = at<const T>(a.weight, group_, l);
    const Unit* const x = w.x + r0 * w.units;
    const int64_t real = a.rows - r0 < N ? a.rows - r0 : N;
    for (ptrdiff_t out = begin; out < end; out += R) {
      V sums[R * N] = {};
      const T* rows[R];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) rows[i] = weight + (out + i < end ? out + i : end - 1) * width_;
      for (ptrdiff_t k = 0; k < width_; k += L * M::pack) {
        typename M::UnitVec piece[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) piece[n] = load<typename M::UnitVec>(x + n * w.units + k / M::pack);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          __builtin_prefetch(rows[i] + k + kRowsAhead * width_, 0, 2);
          const auto y = load_units<M>(rows[i], k, width_);
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) sums[i * N + n] = M::multiply_add(sums[i * N + n], y, piece[n]);
        }
      }
      C total[R * N];
      if constexpr (R * N == L) {
        transpose(sums);
        V sum = sums[0];
#pragma GCC unroll 16
        for (int i = 1; i < L; ++i) sum += sums[i];
        store(total, sum);
      } else {
        for (int i = 0; i < R * N; ++i) total[i] = reduce_add<C, L>(sums[i]);
      }
      for (int i = 0; i < R && out + i < end; ++i)
        for (int64_t n = 0; n < real; ++n) w.z[(r0 + n) * width_ + out + i] = total[i * N + n];
    }
  }

  const nsk_residual_mlp& a;
  const int64_t group_;
  const ptrdiff_t width_;
  const Rows w;
  C* const vectors_;
};

template <class T, class C, class E>
class MlpRollout {
  using Tile = MlpForwardTile<T, C, E>;
  using Few = MlpFewRows<T, C, std::conditional_t<std::is_same_v<E, bf16x3>, C, E>>;
  static constexpr ptrdiff_t kLeastColumns = 32;  // a smaller share is not worth the meeting

 public:
  // Nothing is kept of a rollout.
  static bool serves(const nsk_residual_mlp& a) {
    if (a.stream.data || a.normalised.data) return false;
    if (a.rows <= Few::kFewRows) return true;
    return Tile::kPanelRows > 0 && a.rows <= Tile::kPanelRows && shares(a) > 1;
  }

  static nsk_status run(const nsk_residual_mlp& a) {
    return with_activation(a.activation, [&](auto act) { return a.rows <= Few::kFewRows ? few<act.value>(a) : one_panel<act.value>(a); });
  }

 private:
  static int64_t shares(const nsk_residual_mlp& a) {
    const int64_t wanted = ceil_div(a.threads, a.groups), most = a.width / kLeastColumns;
    return wanted < most ? wanted : most > 1 ? most : 1;
  }
  // The columns of share i: whole cache lines of z.
  static ptrdiff_t bound(const nsk_residual_mlp& a, int64_t i, int64_t count) {
    return i == count ? a.width : a.width * i / count / kStrip * kStrip;
  }

  // work(group) makes what serves a group, from memory that all its hands share; do_part, finish and end are its steps.
  template <class DoPart, class Finish>
  static nsk_status share_out(const nsk_residual_mlp& a, int64_t count, Buffer<Meeting>& meetings, size_t own_bytes,
                              const DoPart& do_part, const Finish& finish) {
    for (int64_t g = 0; g < a.groups; ++g) meetings[g] = {};
    return parallel_for(a.threads, a.depth * a.groups * count, own_bytes, [&](int64_t unit, char* memory) {
      [[maybe_unused]] const Multiplier<typename Tile::M> multiplier;
      const int64_t l = unit / (a.groups * count), group = unit / count % a.groups, share = unit % count;
      Meeting& meeting = meetings[group];
      meeting.wait_for(l);
      do_part(l, group, share, memory);
      if (!meeting.arrive(l, count)) return;
      finish(l, group, memory);
      meeting.let_go(l);
    });
  }

  template <Activation A>
  static nsk_status few(const nsk_residual_mlp& a) {
    const MlpShape s(a);
    const int64_t count = shares(a);
    Arena size;
    typename Few::Rows(s, size);
    Buffer<Meeting> meetings(a.groups);
    Buffer<char> memory(a.groups * int64_t(size.used()));
    if (meetings.failed() || memory.failed()) return NSK_OUT_OF_MEMORY;
    auto serve = [&](int64_t group, char* own) {
      Arena arena(memory.data() + group * int64_t(size.used()));
      return Few(a, group, typename Few::Rows(s, arena), reinterpret_cast<C*>(own));
    };
    for (int64_t g = 0; g < a.groups; ++g) serve(g, nullptr).begin();
    return share_out(
        a, count, meetings, size_t(3 * s.width) * sizeof(C),
        [&](int64_t l, int64_t group, int64_t share, char* own) {
          serve(group, own).part(l, bound(a, share, count), bound(a, share + 1, count));
        },
        [&](int64_t l, int64_t group, char* own) {
          Few work = serve(group, own);
          work.template finish<A>(l, (l + 1) % s.per_block == 0);
          if (l + 1 == s.depth) work.end();
        });
  }

  template <Activation A>
  static nsk_status one_panel(const nsk_residual_mlp& a) {
    if constexpr (Tile::kPanelRows > 0) {
      const MlpShape s(a);
      const int64_t count = shares(a);
      struct Shared {
        typename Tile::Rows rows;
        C *stream, *sums;
      };
      auto lay_out = [&](Arena& arena) {
        const typename Tile::Rows rows(s, s.padded, arena);
        C* const stream = arena.take<C>(s.matrix());
        return Shared{rows, stream, arena.take<C>(count * s.padded)};
      };
      Arena size, own_size;
      lay_out(size);
      typename Tile::Parameters(s, own_size);
      Buffer<Meeting> meetings(a.groups);
      Buffer<char> memory(a.groups * int64_t(size.used()));
      if (meetings.failed() || memory.failed()) return NSK_OUT_OF_MEMORY;
      auto with_group = [&](int64_t group, char* own, auto&& f) {
        Arena arena(memory.data() + group * int64_t(size.used())), own_arena(own);
        const Shared shared = lay_out(arena);
        Tile work(a, group, s.padded, shared.rows, typename Tile::Parameters(s, own_arena));
        f(work, shared);
      };
      for (int64_t g = 0; g < a.groups; ++g)
        with_group(g, nullptr, [&](Tile& work, const Shared& shared) {
          with_type<T>(a.x.dtype, [&](auto type) {
            load_strips<C>(shared.stream, at<const decltype(type)>(a.x, g), a.x.stride[2], s.rows, s.width);
          });
          work.begin(shared.stream);
        });
      return share_out(
          a, count, meetings, own_size.used(),
          [&](int64_t l, int64_t group, int64_t share, char* own) {
            with_group(group, own, [&](Tile& work, const Shared& shared) {
              work.part(l, bound(a, share, count), bound(a, share + 1, count), shared.sums + share * s.padded);
            });
          },
          [&](int64_t l, int64_t group, char* own) {
            with_group(group, own, [&](Tile& work, const Shared& shared) {
              const bool ends = (l + 1) % s.per_block == 0;
              work.template finish<A>(l, shared.sums, count, ends ? shared.stream : nullptr, ends ? shared.stream : nullptr);
              if (l + 1 < s.depth) return;
              with_type<T>(a.y.dtype, [&](auto type) {
                store_strips<C>(shared.stream, at<decltype(type)>(a.y, group), a.y.stride[2], s.rows, s.width);
              });
            });
          });
    }
    return NSK_BAD_ARGUMENT;
  }
};

}  // namespace nsk::NSK_ISA
