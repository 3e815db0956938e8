#include "clocks.h"

#include <algorithm>
#include <bit>

namespace nsk::emu {
namespace {

void add(Foreign& to, const Foreign& from) {
  for (const auto& released : from)
    if (std::find(to.begin(), to.end(), released) == to.end()) to.push_back(released);
}

// to = max(to, from), in the columns of some warps.
void take_later(uint32_t* to, const uint32_t* from, uint32_t warps) {
  for (; warps; warps &= warps - 1) {
    const int column = std::countr_zero(warps) * kWarpSize;
    for (int i = column; i < column + kWarpSize; ++i) to[i] = std::max(to[i], from[i]);
  }
}

}  // namespace

void Knowledge::clear() {
  std::fill(times.begin(), times.end(), 0);
  warps = 0;
  foreign.clear();
}

void Clocks::begin_block(uint32_t block, int threads) {
  const int warps = (threads + kWarpSize - 1) / kWarpSize;
  block_ = block;
  epoch_ = 1;
  width_ = warps * kWarpSize;
  now_.assign(warps, 1);
  times_.assign(size_t(width_) * width_, 0);
  warps_.assign(width_, 0);
  foreign_.assign(width_, {});
  fences_.assign(width_, {});
  any_foreign_ = false;
  meeting_.times.assign(width_, 0);
}

void Clocks::meet_all() {
  ++epoch_;
  if (!any_foreign_) return;
  Foreign all;
  for (const Foreign& foreign : foreign_) add(all, foreign);
  std::fill(foreign_.begin(), foreign_.end(), all);
}

void Clocks::meet(int warp, uint32_t lanes) {
  meeting_.clear();
  for (uint32_t rest = lanes; rest; rest &= rest - 1) arrive(warp * kWarpSize + std::countr_zero(rest), meeting_);
  for (uint32_t rest = lanes; rest; rest &= rest - 1) leave(warp * kWarpSize + std::countr_zero(rest), meeting_);
}

void Clocks::arrive(int thread, Knowledge& at) {
  at.times.resize(width_);
  const int warp = thread / kWarpSize;
  take_later(at.times.data(), times(thread), warps_[thread]);
  at.times[thread] = ++now_[warp];
  at.warps |= warps_[thread] | 1u << warp;
  if (any_foreign_) add(at.foreign, foreign_[thread]);
}

void Clocks::leave(int thread, const Knowledge& at) {
  take_later(times(thread), at.times.data(), at.warps);
  warps_[thread] |= at.warps;
  if (any_foreign_) add(foreign_[thread], at.foreign);
}

// A fence acquires what was released through the atomics before it, and releases what the thread did and knows through
// the atomics that follow it.
void Clocks::fence(int thread) {
  Fences& fences = fences_[thread];
  for (const auto& released : fences.seen) {
    if (released->block == block_) {
      take_later(times(thread), released->times.data(), all_warps());
      warps_[thread] = all_warps();
    } else {
      add(foreign_[thread], {released});
      any_foreign_ = true;
    }
  }
  fences.seen.clear();
  Released mine{block_, epoch_, std::vector<uint32_t>(times(thread), times(thread) + width_)};
  mine.times[thread] = ++now_[thread / kWarpSize];
  fences.released = foreign_[thread];
  fences.released.push_back(std::make_shared<const Released>(std::move(mine)));
}

void Clocks::atomic(int thread, uintptr_t address) {
  Fences& fences = fences_[thread];
  Foreign& place = places_[address];
  add(fences.seen, place);
  add(place, fences.released);
}

bool Clocks::knows(int thread, const Record& before) const {
  for (uint32_t rest = before.lanes; rest; rest &= rest - 1) {
    const int other = before.warp * kWarpSize + std::countr_zero(rest);
    if (other != thread && times(thread)[other] <= before.when) return false;
  }
  return true;
}

bool Clocks::ordered(const Record& before, const Record& after) const {
  if (before.access == Access::copy) return false;
  if (before.block == block_ && before.epoch < epoch_) return true;
  for (uint32_t rest = after.lanes; rest; rest &= rest - 1) {
    const int thread = after.warp * kWarpSize + std::countr_zero(rest);
    if (before.block == block_) {
      if (!knows(thread, before)) return false;
      continue;
    }
    const bool acquired = std::any_of(foreign_[thread].begin(), foreign_[thread].end(), [&](const auto& released) {
      if (released->block != before.block) return false;
      if (before.epoch != released->epoch) return before.epoch < released->epoch;
      for (uint32_t lanes = before.lanes; lanes; lanes &= lanes - 1)
        if (released->times[before.warp * kWarpSize + std::countr_zero(lanes)] <= before.when) return false;
      return true;
    });
    if (!acquired) return false;
  }
  return true;
}

}  // namespace nsk::emu
