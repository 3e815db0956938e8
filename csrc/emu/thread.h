// One CUDA thread: a fiber, its place in the block, and its asynchronous copies under way.
#pragma once

#include <cstdint>
#include <source_location>
#include <vector>

#include "fiber.h"
#include "options.h"

namespace nsk::emu {

class Block;

// One cp.async that has been issued.
struct Copy {
  char* to;
  const void* from;
  uint8_t bytes, valid;  // of which the first `valid` are copied, the others are 0
  uint64_t group;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Dim3 index{0, 0, 0};
  int id = 0, warp = 0, lane = 0;
  bool finished = false;

  // What it waits for, for messages; null while it does not wait.
  const char* waits_at = nullptr;
  int barrier = -1;  // its number, if it is a barrier that has one
  std::source_location where;

  std::vector<Copy> copies;  // issued and not waited for, oldest first
  uint64_t groups = 0;       // committed
  int atomics = 0;           // since it last waited

  void begin_block() {
    finished = false, waits_at = nullptr, groups = 0, atomics = 0;
    copies.clear();
  }
};

// The thread that runs now; null outside kernels. All that a kernel calls acts on its behalf.
extern constinit thread_local Thread* running;

}  // namespace nsk::emu
