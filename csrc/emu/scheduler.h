// Who runs next. The same seed gives the same order.
#pragma once

#include <cstdint>
#include <vector>

#include "options.h"

namespace nsk::emu {

inline constexpr int kWarpSize = 32, kMaxWarps = 32, kMaxThreads = kWarpSize * kMaxWarps;

class Scheduler {
 public:
  // All threads are ready.
  void begin(int threads, Order order, uint64_t seed);

  void wait(int thread);
  void wake(int thread);
  bool idle() const { return warps_ == 0; }
  // A ready thread, of which there must be one. The running one is `current`, and may be chosen again if it is ready.
  int next(int current);
  // Whether a thread that woke others lets somebody else go on.
  bool yields() const { return order_ != Order::greedy; }
  // A new order of the warps.
  void shuffle();

 private:
  uint64_t random();
  int greedy();

  Order order_ = Order::greedy;
  uint64_t state_ = 0;
  uint32_t ready_[kMaxWarps] = {};  // one bit a lane
  uint32_t warps_ = 0;              // one bit a warp that has a ready lane
  std::vector<int> line_;           // warps in the order in which they get their turn
  int turn_ = 0;
  int first_lane_ = 0;
};

}  // namespace nsk::emu
