// The barriers of a block: __syncthreads and the sixteen that have numbers.
#pragma once

#include <source_location>
#include <vector>

#include "clocks.h"
#include "thread.h"

namespace nsk::emu {

class Barriers {
 public:
  static constexpr int kCount = 16;

  void begin_block(int threads);

  // Waits until `count` threads have come to barrier `id`, the running one among them. `whole_block`: this is
  // __syncthreads, to which all threads have to come at the same place of the source.
  void sync(Thread& thread, int id, int count, bool whole_block, std::source_location where);
  // Comes to it without waiting.
  void arrive(Thread& thread, int id, int count, std::source_location where);

  // A thread has left the kernel: nobody may wait for it.
  void finished(Thread& thread);

 private:
  struct Barrier {
    int count = 0, arrived = 0;
    bool whole_block = false;
    Thread* first = nullptr;  // that came
    std::source_location where;
    uint32_t lanes[kMaxWarps] = {};              // that came
    std::source_location warp_where[kMaxWarps];  // where they did
    std::vector<Thread*> waiting;
    Knowledge knowledge;  // of those that came without waiting

    void clear();
  };

  Barrier& come(Thread& thread, int id, int count, bool whole_block, std::source_location where);
  void complete(Barrier& barrier, Thread& last);
  int needed(const Barrier& barrier) const { return barrier.count < threads_ ? barrier.count : threads_; }

  int threads_ = 0;
  Thread* gone_ = nullptr;  // one that has left the kernel
  Barrier barriers_[kCount];
};

}  // namespace nsk::emu
