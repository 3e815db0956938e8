// What the lanes of a warp do together: they meet, and the last one to come does it for all.
#pragma once

#include <cstdint>
#include <source_location>
#include <vector>

#include "thread.h"

namespace nsk::emu {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// What all lanes must agree on. `variant` tells shuffles of different width or mma of different types apart.
struct Collective {
  const char* name;
  uint32_t variant = 0;
  bool aligned = false;  // all lanes have to come to the same place of the source
};

// Does it, given the operands of the lanes in `mask`.
using Perform = void (*)(uint32_t mask, void* const* operands);

class Warp {
 public:
  void begin_block(uint32_t lanes);

  // Returns when all lanes in `mask` have come and it is done; operands stay in the lanes' own frames until then.
  void meet(Thread& thread, uint32_t mask, const Collective& what, void* operand, Perform perform,
            std::source_location where);

  void finished(Thread& thread);

 private:
  struct Gathering {
    uint32_t mask = 0, arrived = 0;
    Collective what;
    std::source_location where;  // of the first that came
    Thread* threads[32];
    void* operands[32];
  };

  Gathering& gathering(Thread& thread, uint32_t mask, const Collective& what, std::source_location where);

  uint32_t lanes_ = 0, finished_ = 0;
  std::vector<Gathering> gatherings_;  // of lanes that are disjoint
};

}  // namespace nsk::emu
