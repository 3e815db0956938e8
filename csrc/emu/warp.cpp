#include "warp.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"
#include "place.h"

namespace nsk::emu {
namespace {

bool alike(const Collective& a, const Collective& b) {
  return a.variant == b.variant && (a.name == b.name || !std::strcmp(a.name, b.name));
}

}  // namespace

void Warp::begin_block(uint32_t lanes) {
  lanes_ = lanes, finished_ = 0;
  gatherings_.clear();
}

Warp::Gathering& Warp::gathering(Thread& thread, uint32_t mask, const Collective& what, std::source_location where) {
  if (!(mask >> thread.lane & 1))
    fail(Fault::mismatched, "comes to %s at %s for lanes %08x and is not one of them", what.name, place(where).c_str(),
         mask);
  if (what.aligned && lanes_ != kAllLanes)
    fail(Fault::mismatched, "comes to %s at %s in a warp of fewer than 32 threads", what.name, place(where).c_str());
  for (Gathering& g : gatherings_) {
    if (!(g.mask & mask)) continue;
    const bool together = g.mask == mask && alike(g.what, what) && (!what.aligned || same(g.where, where));
    if (!together || (g.arrived >> thread.lane & 1))
      fail(Fault::mismatched, "comes to %s at %s for lanes %08x, others of them to %s at %s for lanes %08x", what.name,
           place(where).c_str(), mask, g.what.name, place(g.where).c_str(), g.mask);
    return g;
  }
  if (mask & finished_)
    fail(Fault::mismatched, "comes to %s at %s for lanes %08x, of which %08x have left the kernel", what.name,
         place(where).c_str(), mask, mask & finished_);
  Gathering& g = gatherings_.emplace_back();
  g.mask = mask, g.what = what, g.where = where;
  return g;
}

void Warp::meet(Thread& thread, uint32_t mask, const Collective& what, void* operand, Perform perform,
                std::source_location where) {
  mask &= lanes_;  // the last warp of a block may be short of lanes; they are never waited for
  Gathering& g = gathering(thread, mask, what, where);
  g.arrived |= 1u << thread.lane;
  g.threads[thread.lane] = &thread;
  g.operands[thread.lane] = operand;
  if (g.arrived != g.mask) return thread.block->wait(what.name, where);
  // The gathering ends first: what is performed may fail, and who is woken may come to the next one.
  const Gathering done = g;
  std::swap(g, gatherings_.back());
  gatherings_.pop_back();
  perform(mask, done.operands);
  for (uint32_t rest = mask & ~(1u << thread.lane); rest; rest &= rest - 1)
    thread.block->wake(*done.threads[std::countr_zero(rest)]);
  thread.block->yield();
}

void Warp::finished(Thread& thread) {
  finished_ |= 1u << thread.lane;
  for (const Gathering& g : gatherings_)
    if (g.mask >> thread.lane & 1)
      fail(Fault::mismatched, "leaves the kernel while lanes %08x wait for it in %s at %s", g.arrived, g.what.name,
           place(g.where).c_str());
}

}  // namespace nsk::emu
