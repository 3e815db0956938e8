// Runs the forward of residual MLPs: tiles of rows over threads, each through all layers; or, where there are fewer tiles
// than threads, columns over threads (residual_mlp_rollout.h).
#pragma once

#include "residual_mlp_rollout.h"

namespace nsk::NSK_ISA {

template <class T, class C, class E>
class MlpForwardRun {
  using Tile = MlpForwardTile<T, C, E>;
  using Rollout = MlpRollout<T, C, E>;

 public:
  static nsk_status run(const nsk_residual_mlp& a) {
    const MlpShape s(a);
    if (s.rows == 0 || s.groups == 0) return NSK_OK;
    if (Rollout::serves(a)) return Rollout::run(a);
    const RowTiles tiles(s, a.threads, most_rows<typename Tile::M>(s.width));
    Arena size;
    lay_out(s, tiles, size);
    return parallel_for(a.threads, s.groups * tiles.per_group, size.used(), [&](int64_t unit, char* memory) {
      [[maybe_unused]] const Multiplier<typename Tile::M> multiplier;
      const int64_t group = unit / tiles.per_group, tile = unit % tiles.per_group;
      with_activation(a.activation, [&](auto act) { run_tile<act.value>(a, s, tiles, group, tile, memory); });
    });
  }

 private:
  struct Workspace {
    C* stream;
    typename Tile::Rows rows;
    typename Tile::Parameters own;
  };
  static Workspace lay_out(const MlpShape& s, const RowTiles& tiles, Arena& arena) {
    C* const stream = arena.take<C>(s.width * tiles.largest());
    const typename Tile::Rows rows(s, tiles.largest(), arena);
    return {stream, rows, typename Tile::Parameters(s, arena)};
  }

  template <Activation A>
  static void run_tile(const nsk_residual_mlp& a, const MlpShape& s, const RowTiles& tiles, int64_t group, int64_t tile,
                       char* memory) {
    const ptrdiff_t row0 = tiles.first_row(tile), rows = tiles.size(tile), real = row0 + rows < s.rows ? rows : s.rows - row0;
    Arena arena(memory);
    const Workspace w = lay_out(s, tiles, arena);
    Tile work(a, group, rows, w.rows, w.own);
    // The stream's strips of this tile, as they enter a block; where they are not kept, one matrix serves all blocks.
    auto stream = [&](int64_t block) {
      if (!a.stream.data || block == s.blocks()) return w.stream;
      return static_cast<C*>(a.stream.data) + (group * s.blocks() + block) * s.matrix() + row0 * s.width;
    };
    with_type<T>(a.x.dtype, [&](auto type) {
      load_strips<C>(stream(0), at<const decltype(type)>(a.x, group, 0, row0), a.x.stride[2], real, s.width);
    });
    work.begin(stream(0));
    for (int64_t l = 0; l < s.depth; ++l) {
      const int64_t block = l / s.per_block;
      MlpKept<T, C> kept;
      if (a.normalised.data) {
        kept.normalised = static_cast<T*>(a.normalised.data) + (group * s.depth + l) * s.matrix() + row0 * s.width;
        kept.rstd = static_cast<C*>(a.rstd.data) + (group * s.depth + l) * s.padded + row0;
      }
      if ((l + 1) % s.per_block)
        work.template layer<A>(l, kept, true);
      else
        work.template layer<A>(l, kept, true, stream(block), stream(block + 1));
    }
    with_type<T>(a.y.dtype, [&](auto type) {
      store_strips<C>(w.stream, at<decltype(type)>(a.y, group, 0, row0), a.y.stride[2], real, s.width);
    });
  }
};

}  // namespace nsk::NSK_ISA
