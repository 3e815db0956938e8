#include "collectives.h"

#include <bit>

#include "block.h"
#include "place.h"

namespace nsk::emu {
namespace {

Warp& warp() { return running->block->warps[running->warp]; }

struct Shuffled {
  uint64_t value, result;
  Shuffle kind;
  int by, width;
  std::source_location where;
};

// The lane whose value `lane` gets. Lanes fall into groups of `width`; a lane beyond the group gets its own.
int source_of(int lane, const Shuffled& s) {
  const int first = lane & ~(s.width - 1), last = first | (s.width - 1);
  switch (s.kind) {
    case Shuffle::index:
      return first | (s.by & (s.width - 1));
    case Shuffle::up:
      return lane - s.by < first ? lane : lane - s.by;
    case Shuffle::down:
      return lane + s.by > last ? lane : lane + s.by;
    case Shuffle::exclusive_or:
      break;
  }
  return ((lane ^ s.by) & 31) > last ? lane : (lane ^ s.by) & 31;
}

void perform_shuffle(uint32_t mask, void* const* operands) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    Shuffled& s = *static_cast<Shuffled*>(operands[lane]);
    const int source = source_of(lane, s);
    if (!(mask >> source & 1))
      fail(Fault::mismatched, "in a shuffle at %s lane %d reads lane %d, which takes no part", place(s.where).c_str(),
           lane, source);
    s.result = static_cast<const Shuffled*>(operands[source])->value;
  }
  ++running->block->report.counts.shuffles;
}

struct Voter {
  bool yes;
  Vote vote;
};

void perform_vote(uint32_t mask, void* const* operands) {
  uint32_t ballot = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    ballot |= uint32_t{static_cast<const Voter*>(operands[lane])->yes} << lane;
  }
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    static_cast<Voter*>(operands[std::countr_zero(rest)])->vote = {ballot, mask};
}

// Only this one orders memory among lanes; shuffles, votes and matrix instructions do not.
void perform_sync(uint32_t mask, void* const*) {
  running->block->clocks.meet(running->warp, mask);
  ++running->block->report.counts.warp_barriers;
}

}  // namespace

void sync_threads(std::source_location where) {
  Block& block = *running->block;
  if (block.at(SyncKind::barrier, where)) block.barriers.sync(*running, 0, block.size(), true, where);
}

void sync_barrier(int id, int count, std::source_location where) {
  Block& block = *running->block;
  if (block.at(SyncKind::barrier, where)) block.barriers.sync(*running, id, count, false, where);
}

void arrive_at_barrier(int id, int count, std::source_location where) {
  Block& block = *running->block;
  if (block.at(SyncKind::barrier, where)) block.barriers.arrive(*running, id, count, where);
}

void sync_warp(uint32_t mask, std::source_location where) {
  if (running->block->at(SyncKind::warp_barrier, where))
    warp().meet(*running, mask, {"__syncwarp"}, nullptr, perform_sync, where);
}

void fence(std::source_location where) {
  if (running->block->at(SyncKind::fence, where)) running->block->clocks.fence(running->id);
}

uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t value, int by, int width, std::source_location where) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail(Fault::bad_argument, "a shuffle of width %d at %s", width, place(where).c_str());
  Shuffled s{value, 0, kind, by, width, where};
  warp().meet(*running, mask, {"shuffle", uint32_t(kind) << 8 | uint32_t(width)}, &s, perform_shuffle, where);
  return s.result;
}

Vote vote(uint32_t mask, bool yes, std::source_location where) {
  Voter voter{yes, {}};
  warp().meet(*running, mask, {"vote"}, &voter, perform_vote, where);
  return voter.vote;
}

}  // namespace nsk::emu
