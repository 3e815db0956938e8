// Which accesses are ordered: vector clocks of the threads of one block.
//
// Every warp counts its own time, which goes on when one of its threads releases what it did (arrives at a barrier). An
// access is stamped with the time of its warp, and a thread that knows of a later release of the accessing thread comes
// after it. Barriers of the whole block come so often that they have a count of their own, the epoch: an access of an
// earlier epoch is before everything of this one.
//
// Blocks of a launch are not ordered, unless one acquires what the other released: a fence and then an atomic in the
// one, an atomic on the same address and then a fence in the other.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace nsk::emu {

enum class Access : uint8_t {
  read,
  write,
  atomic,
  copy,  // the write of a cp.async that has not been waited for: ordered with nothing, not even its own thread
};

// An access by some lanes of a warp to some bytes of a word.
struct Record {
  uint32_t when = 0, lanes = 0, block = 0, epoch = 0;
  uint8_t warp = 0, bytes = 0;
  Access access = Access::read;
};

// What a thread knew of all threads of its block when it released it.
struct Released {
  uint32_t block, epoch;
  std::vector<uint32_t> times;
};
using Foreign = std::vector<std::shared_ptr<const Released>>;  // of other blocks

// What the threads that arrived at a barrier knew, and hand to those that leave it.
struct Knowledge {
  std::vector<uint32_t> times;
  uint32_t warps = 0;  // those of which anything is known
  Foreign foreign;

  void clear();
};

class Clocks {
 public:
  void begin_launch() { places_.clear(); }
  void begin_block(uint32_t block, int threads);

  Record stamp(int warp, uint32_t lanes, uint8_t bytes, Access access) const {
    return {now_[warp], lanes, block_, epoch_, uint8_t(warp), bytes, access};
  }

  void meet_all();  // __syncthreads
  void meet(int warp, uint32_t lanes);
  void arrive(int thread, Knowledge& at);
  void leave(int thread, const Knowledge& at);

  void fence(int thread);
  void atomic(int thread, uintptr_t address);

  bool ordered(const Record& before, const Record& after) const;

 private:
  struct Fences {
    Foreign released;  // by the last fence: what its thread did, and what it knew of other blocks
    Foreign seen;      // by atomics since then
  };

  bool knows(int thread, const Record& before) const;
  uint32_t all_warps() const { return ~0u >> (kMaxWarps - int(now_.size())); }
  uint32_t* times(int thread) { return &times_[size_t(thread) * width_]; }
  const uint32_t* times(int thread) const { return &times_[size_t(thread) * width_]; }

  uint32_t block_ = 0, epoch_ = 1;
  int width_ = 0;                // threads of the block, rounded up to whole warps
  std::vector<uint32_t> now_;    // of each warp
  std::vector<uint32_t> times_;  // [thread][other thread]: the latest release that the thread knows of
  std::vector<uint32_t> warps_;  // [thread]: warps of which it knows anything
  std::vector<Foreign> foreign_;
  std::vector<Fences> fences_;
  bool any_foreign_ = false;
  Knowledge meeting_;
  std::unordered_map<uintptr_t, Foreign> places_;  // what was released through an atomic's address
};

}  // namespace nsk::emu
