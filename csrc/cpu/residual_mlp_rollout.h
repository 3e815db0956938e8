// Small batches, as an agent that acts has them: fewer rows than would keep the threads or the lanes busy.
//
// Hands share out the columns of each layer (its output features). What one of them computes goes on as its own: it
// normalises its columns itself, as soon as it knows everybody's share of the rows' moments,
//
//   mean = sum n_i mean_i / n,   sum (z - mean)^2 = sum (square_i + n_i (mean_i - mean)^2)     of n_i columns each
//
// so that only moments and the layer's result go from core to core, and hands meet twice a layer: where moments are
// known, and where the result is. (One hand that normalises all columns has to fetch the others' z, and everybody then
// fetches the whole result.) How columns are shared out depends on the number of threads asked for, not on how many there
// are, and so do the bits.
//
// Up to kFewRows rows: lanes run along k. A weight's row is read in place as a vector, multiplied with the same piece of
// each row, and 16 sums are added up across their lanes in one transpose. That reads every weight once, at the speed of
// memory. More rows: lanes are rows, as in the tile.
#pragma once

#include <sched.h>

#include "residual_mlp_forward.h"

namespace nsk::NSK_ISA {

// A hand's place among those that share a group, on a cache line of its own. What a hand wrote before it meets the others
// is seen by all of them afterwards.
struct alignas(64) Seat {
  int64_t meetings;

  // As hand `mine` of `hands`.
  static void meet(Seat* seats, int64_t mine, int64_t hands) {
    const int64_t now = seats[mine].meetings + 1;
    __atomic_store_n(&seats[mine].meetings, now, __ATOMIC_RELEASE);
    for (int64_t i = 0; i < hands; ++i)
      for (int spins = 0; __atomic_load_n(&seats[i].meetings, __ATOMIC_ACQUIRE) < now; ++spins) {
        if (spins > 2000) sched_yield();  // there may be more threads than cores
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
  }
};

// The columns of a layer in shares of whole cache lines, where `groups` have all threads to themselves.
struct MlpShares {
  static constexpr ptrdiff_t kLeastColumns = 32;  // fewer are not worth the meeting
  int64_t count;
  ptrdiff_t width;

  MlpShares(const nsk_residual_mlp& a, int64_t groups) : count(1), width(a.width) {
    const int64_t wanted = ceil_div(a.threads, groups), most = width / kLeastColumns;
    count = wanted < most ? wanted : most > 1 ? most : 1;
  }
  ptrdiff_t begin(int64_t i) const { return i == count ? width : width * i / count / kLeastColumns * kLeastColumns; }
  ptrdiff_t columns(int64_t i) const { return begin(i + 1) - begin(i); }

  // Of a row whose mean in share i is moments[i * 2 * rows], and its sum of squares around that `rows` behind it.
  template <class C>
  void combine(const C* moments, ptrdiff_t rows, C& mean, C& square) const {
    mean = square = 0;
    for (int64_t i = 0; i < count; ++i) mean += moments[i * 2 * rows] * C(columns(i));
    mean /= C(width);
    for (int64_t i = 0; i < count; ++i) {
      const C off = moments[i * 2 * rows] - mean;
      square += moments[(i * 2 + 1) * rows] + C(columns(i)) * off * off;
    }
  }
};

// `rows` <= kFewRows rows of one group, lanes along k.
template <class T, class C, class E>
class MlpFewRows {
  static constexpr int L = kLanes<C>;
  using M = Math<C, E, L>;
  using V = Vec<C, L>;
  using Unit = typename M::Unit;

 public:
  static constexpr int kFewRows = M::kMatrix ? 4 : 8;  // measured: from there on panels are faster

  // What hands share.
  struct Shared {
    Unit* x;  // [row][units], 0 behind the width
    C *z, *stream;  // [row][width]
    C* moments;     // [share][2][row]
    ptrdiff_t units;

    Shared(const MlpShape& s, int64_t shares, Arena& arena) : units(round_up(ceil_div(s.width, M::pack), L)) {
      x = arena.take<Unit>(rows_multiplied(s.rows) * units);
      z = arena.take<C>(s.rows * s.width);
      stream = arena.take<C>(s.rows * s.width);
      moments = arena.take<C>(shares * 2 * kFewRows);
    }
  };
  // Each hand's own.
  struct Own {
    C* vectors;

    Own(const MlpShape& s, Arena& arena) : vectors(arena.take<C>(3 * s.width)) {}
  };

  MlpFewRows(const nsk_residual_mlp& args, const MlpShares& shares, int64_t group, const Shared& shared, const Own& own)
      : a(args), shares_(shares), group_(group), width_(args.width), w(shared), own_(own) {}

  void begin() {
    fill_zero(w.x, rows_multiplied(a.rows) * w.units);
    with_type<T>(a.x.dtype, [&](auto type) {
      for (int64_t r = 0; r < a.rows; ++r) {
        scale_row<C>(w.stream + r * width_, at<const decltype(type)>(a.x, group_, 0, r), C(1), width_);
        scale_row<C>(elements(r), w.stream + r * width_, C(1), width_);
      }
    });
  }

  // A share's columns of z = x W^T + b, and their moments.
  void part(int64_t l, int64_t share) {
    const ptrdiff_t begin = shares_.begin(share), end = shares_.begin(share + 1);
    // A few weights for all rows, while they are in cache.
    for (ptrdiff_t out = begin; out < end; out += kColumnsAtOnce) {
      const ptrdiff_t to = end - out < kColumnsAtOnce ? end : out + kColumnsAtOnce;
      for (int64_t r = 0; r < a.rows;) {
        const int64_t left = a.rows - r;
        if (left == 1)
          multiply<1>(l, r, out, to), r += 1;
        else if (left == 2)
          multiply<2>(l, r, out, to), r += 2;
        else
          multiply<kMostAtOnce>(l, r, out, to), r += kMostAtOnce;
      }
    }
    const LayerVectors<C> vectors(a, group_, l, own_.vectors);
    C* const moments = w.moments + share * 2 * kFewRows;
    for (int64_t r = 0; r < a.rows; ++r) {
      C* const z = w.z + r * width_;
      V sum{}, square{};
      over(begin, end, [&](ptrdiff_t j, ptrdiff_t n) {
        const V y = load_up_to<C, L>(z + j, n) + load_up_to<C, L>(vectors.bias + j, n);
        store_up_to<C, L>(z + j, y, n);
        sum += y;
      });
      const C mean = reduce_add<C, L>(sum) / C(end - begin);
      over(begin, end, [&](ptrdiff_t j, ptrdiff_t n) {
        V lane;
        for (int i = 0; i < L; ++i) lane[i] = C(i);
        const V d = load_up_to<C, L>(z + j, n) - mean;
        square += lane < C(n) ? d * d : V{};
      });
      moments[r] = mean;
      moments[kFewRows + r] = reduce_add<C, L>(square);
    }
  }

  // These columns of the layer's result, when everybody's moments are known.
  template <Activation A>
  void finish(int64_t l, int64_t share, bool ends_block) {
    const LayerVectors<C> vectors(a, group_, l, own_.vectors);
    for (int64_t r = 0; r < a.rows; ++r) {
      C mean, square;
      shares_.combine(w.moments + r, kFewRows, mean, square);
      const C scale = C(1) / square_root<C, L>(splat<C, L>(square / C(width_) + C(a.eps)))[0];
      C *const z = w.z + r * width_, *const stream = w.stream + r * width_;
      over(shares_.begin(share), shares_.begin(share + 1), [&](ptrdiff_t j, ptrdiff_t n) {
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
  static constexpr int kMostAtOnce = 4, kColumnsAtOnce = 16;
  // The weights to ask for: the sweep is linear. Into L2, which takes more requests at once than L1 (1.5 x, measured).
  static constexpr ptrdiff_t kRowsAhead = 16;
  static constexpr ptrdiff_t rows_multiplied(ptrdiff_t rows) { return round_up(rows, rows > 2 ? kMostAtOnce : 1); }

  using Element = std::conditional_t<M::pack == 2, bf16, C>;
  Element* elements(int64_t row) const { return reinterpret_cast<Element*>(w.x + row * w.units); }

  // f(j, n) for the vectors of n numbers that make up [begin, end).
  template <class F>
  static NSK_INLINE void over(ptrdiff_t begin, ptrdiff_t end, F&& f) {
    ptrdiff_t j = begin;
    for (; j + L <= end; j += L) f(j, ptrdiff_t(L));
    if (j < end) f(j, end - j);
  }

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
  const MlpShares& shares_;
  const int64_t group_;
  const ptrdiff_t width_;
  const Shared w;
  const Own own_;
};

// The rows of one group as one panel of NV vectors.
template <class T, class C, class E, int NV>
class MlpOnePanel {
  using Tile = MlpForwardTile<T, C, E>;
  static constexpr ptrdiff_t kRows = NV * Tile::L;

 public:
  struct Shared {
    typename Tile::Rows rows;
    C *stream, *moments;  // strips; [share][2][row]

    Shared(const MlpShape& s, int64_t shares, Arena& arena)
        : rows(s, kRows, arena), stream(arena.take<C>(s.matrix())), moments(arena.take<C>(shares * 2 * kRows)) {}
  };
  struct Own {
    typename Tile::Parameters parameters;
    C* moments;  // of whole rows

    Own(const MlpShape& s, Arena& arena) : parameters(s, arena), moments(arena.take<C>(2 * kRows)) {}
  };

  MlpOnePanel(const nsk_residual_mlp& args, const MlpShares& shares, int64_t group, const Shared& shared, const Own& own)
      : a(args), shares_(shares), group_(group), w(shared), own_(own), tile_(args, group, kRows, shared.rows, own.parameters) {}

  void begin() {
    with_type<T>(a.x.dtype, [&](auto type) {
      load_strips<C>(w.stream, at<const decltype(type)>(a.x, group_), a.x.stride[2], a.rows, a.width);
    });
    tile_.begin(w.stream);
  }
  void part(int64_t l, int64_t share) {
    tile_.template part<NV>(l, shares_.begin(share), shares_.begin(share + 1), w.moments + share * 2 * kRows);
  }
  template <Activation A>
  void finish(int64_t l, int64_t share, bool ends_block) {
    for (ptrdiff_t r = 0; r < kRows; ++r)
      shares_.combine(w.moments + r, kRows, own_.moments[r], own_.moments[kRows + r]);
    C* const stream = ends_block ? w.stream : nullptr;
    tile_.template finish<A, NV>(l, shares_.begin(share), shares_.begin(share + 1), own_.moments, stream, stream);
  }
  void end() const {
    with_type<T>(a.y.dtype, [&](auto type) {
      store_strips<C>(w.stream, at<decltype(type)>(a.y, group_), a.y.stride[2], a.rows, a.width);
    });
  }

 private:
  const nsk_residual_mlp& a;
  const MlpShares& shares_;
  const int64_t group_;
  const Shared w;
  const Own own_;
  Tile tile_;
};

template <class T, class C, class E>
class MlpRollout {
  using Few = MlpFewRows<T, C, std::conditional_t<std::is_same_v<E, bf16x3>, C, E>>;
  template <int NV>
  using OnePanel = MlpOnePanel<T, C, E, NV>;
  static constexpr int kMostVectors = kWidePanel < 2 * kStrip / kLanes<C> ? kWidePanel : 2 * kStrip / kLanes<C>;

 public:
  // Nothing is kept of a rollout, and there are not as many strips of rows as threads.
  static bool serves(const nsk_residual_mlp& a) {
    if (a.stream.data || a.normalised.data) return false;
    if (a.rows <= Few::kFewRows) return true;
    return vectors(a) <= kMostVectors && a.groups * ceil_div(a.rows, kStrip) < a.threads && MlpShares(a, a.groups).count > 1;
  }

  static nsk_status run(const nsk_residual_mlp& a) {
    return with_activation(a.activation, [&](auto act) {
      if (a.rows <= Few::kFewRows) return share_out<act.value, Few>(a);
      if constexpr (kMostVectors >= 4)
        if (vectors(a) == 4) return share_out<act.value, OnePanel<4>>(a);
      if constexpr (kMostVectors >= 2)
        if (vectors(a) == 2) return share_out<act.value, OnePanel<2>>(a);
      if constexpr (kStrip == kLanes<C>) return share_out<act.value, OnePanel<1>>(a);
      return NSK_BAD_ARGUMENT;
    });
  }

 private:
  static int64_t vectors(const nsk_residual_mlp& a) { return round_up(a.rows, kStrip) / kLanes<C>; }

  template <Activation A, class Work>
  static nsk_status share_out(const nsk_residual_mlp& a) {
    const MlpShape s(a);
    // A group to a thread, as long as there are as many left as threads; the rest share all threads.
    const int64_t threads = a.threads > 1 ? a.threads : 1, whole = s.groups / threads * threads, rest = s.groups - whole;
    const MlpShares undivided(a, threads), divided(a, rest > 0 ? rest : threads);
    const int64_t places = whole + rest * divided.count, most = threads < places ? threads : places;
    Arena of_group, of_hand;
    typename Work::Shared(s, divided.count, of_group);
    typename Work::Own(s, of_hand);
    Buffer<Seat> seats(s.groups * divided.count);
    Buffer<char> memory(s.groups * int64_t(of_group.used()) + most * int64_t(of_hand.used()));
    if (seats.failed() || memory.failed()) return NSK_OUT_OF_MEMORY;
    fill_zero(seats.data(), s.groups * divided.count);
    team(int(most), [&](int64_t hand, int64_t hands) {
      [[maybe_unused]] const Multiplier<typename MlpForwardTile<T, C, E>::M> multiplier;
      Arena own(memory.data() + s.groups * int64_t(of_group.used()) + hand * int64_t(of_hand.used()));
      const typename Work::Own of_mine(s, own);
      // Groups [begin, end): one to a hand after the other, or where there are more hands, several hands to a group.
      auto take = [&](int64_t begin, int64_t end, const MlpShares& shares) {
        const int64_t at_once = hands < end - begin ? hands : end - begin, mine = hand / at_once;
        const int64_t there = at_once == hands ? 1 : (hands - 1 - hand % at_once) / at_once + 1;
        const int64_t of_these = there < shares.count ? there : shares.count;
        if (mine >= of_these) return;  // narrow layers leave nothing to do
        const int64_t first = shares.count * mine / of_these, last = shares.count * (mine + 1) / of_these;
        for (int64_t group = begin + hand % at_once; group < end; group += at_once) {
          Arena arena(memory.data() + group * int64_t(of_group.used()));
          Work work(a, shares, group, typename Work::Shared(s, shares.count, arena), of_mine);
          auto meet = [&] { Seat::meet(seats.data() + group * divided.count, mine, of_these); };
          if (mine == 0) work.begin();
          meet();
          for (int64_t l = 0; l < s.depth; ++l) {
            for (int64_t i = first; i < last; ++i) work.part(l, i);
            meet();
            for (int64_t i = first; i < last; ++i) work.template finish<A>(l, i, (l + 1) % s.per_block == 0);
            meet();
          }
          if (mine == 0) work.end();
        }
      };
      if (whole > 0) take(0, whole, undivided);
      if (rest > 0) take(whole, s.groups, divided);
    });
    return NSK_OK;
  }
};

}  // namespace nsk::NSK_ISA
