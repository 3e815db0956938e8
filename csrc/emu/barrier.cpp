#include "barrier.h"

#include <algorithm>

#include "block.h"
#include "place.h"

namespace nsk::emu {

void Barriers::Barrier::clear() {
  arrived = 0;
  std::fill_n(lanes, kMaxWarps, 0u);
  waiting.clear();
  knowledge.clear();
}

void Barriers::begin_block(int threads) {
  threads_ = threads, gone_ = nullptr;
  for (Barrier& barrier : barriers_) barrier.clear();
}

Barriers::Barrier& Barriers::come(Thread& thread, int id, int count, bool whole_block, std::source_location where) {
  if (id < 0 || id >= kCount) fail(Fault::bad_argument, "there is no barrier %d at %s", id, place(where).c_str());
  if (!whole_block && (count <= 0 || count % kWarpSize || count >= threads_ + kWarpSize))
    fail(Fault::bad_argument, "barrier %d for %d of %d threads at %s: a multiple of 32 was expected", id, count,
         threads_, place(where).c_str());
  if (whole_block && gone_)
    fail(Fault::divergent_barrier, "comes to __syncthreads at %s, but thread %s has left the kernel",
         place(where).c_str(), name(gone_->index).c_str());
  Barrier& b = barriers_[id];
  if (!b.arrived) b.count = count, b.whole_block = whole_block, b.first = &thread, b.where = where;
  if (b.count != count)
    fail(Fault::divergent_barrier, "comes to barrier %d for %d threads at %s, thread %s for %d at %s", id, count,
         place(where).c_str(), name(b.first->index).c_str(), b.count, place(b.where).c_str());
  // The hardware counts warps, so one warp cannot come to a barrier at two places; __syncthreads is one place for all.
  uint32_t& lanes = b.lanes[thread.warp];
  if (lanes >> thread.lane & 1)
    fail(Fault::divergent_barrier, "comes to barrier %d at %s a second time before the others came", id,
         place(where).c_str());
  if (!lanes) b.warp_where[thread.warp] = whole_block ? b.where : where;
  if (!same(b.warp_where[thread.warp], where))
    fail(Fault::divergent_barrier, "comes to barrier %d at %s, others at %s", id, place(where).c_str(),
         place(b.warp_where[thread.warp]).c_str());
  lanes |= 1u << thread.lane;
  ++b.arrived;
  return b;
}

void Barriers::sync(Thread& thread, int id, int count, bool whole_block, std::source_location where) {
  Barrier& b = come(thread, id, count, whole_block, where);
  b.waiting.push_back(&thread);
  if (b.arrived < needed(b))
    return whole_block ? thread.block->wait("__syncthreads", where) : thread.block->wait("barrier", where, id);
  complete(b, thread);
  thread.block->yield();
}

void Barriers::arrive(Thread& thread, int id, int count, std::source_location where) {
  Barrier& b = come(thread, id, count, false, where);
  thread.block->clocks.arrive(thread.id, b.knowledge);  // what it does from now on is not part of it
  if (b.arrived == needed(b)) complete(b, thread);
}

void Barriers::complete(Barrier& b, Thread& last) {
  Block& block = *last.block;
  ++block.report.counts.barriers;
  if (int(b.waiting.size()) == threads_) {
    block.clocks.meet_all();
    block.scheduler.shuffle();
  } else {
    for (Thread* thread : b.waiting) block.clocks.arrive(thread->id, b.knowledge);
    for (Thread* thread : b.waiting) block.clocks.leave(thread->id, b.knowledge);
  }
  for (Thread* thread : b.waiting)
    if (thread != &last) block.wake(*thread);
  b.clear();
}

void Barriers::finished(Thread& thread) {
  gone_ = &thread;
  for (const Barrier& b : barriers_)
    if (b.arrived && b.whole_block)
      fail(Fault::divergent_barrier, "leaves the kernel while thread %s waits for it in __syncthreads at %s",
           name(b.first->index).c_str(), place(b.where).c_str());
}

}  // namespace nsk::emu
