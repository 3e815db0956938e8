// What a kernel did wrong, and which thread of which block did it.
#pragma once

#include <stdexcept>
#include <string>

#include "options.h"

namespace nsk::emu {

enum class Fault {
  out_of_bounds,
  misaligned,
  unwritten,  // a read of memory that nobody wrote
  read_only,  // a write to an input
  race,
  divergent_barrier,  // not all threads come to the same barrier
  mismatched,         // lanes of a warp come to different collectives, or to one that does not name them
  deadlock,
  bad_argument,
  guard,     // bytes beside shared memory have changed
  uncaught,  // an exception left the kernel
};

class Error : public std::runtime_error {
 public:
  Error(Fault fault, std::string kernel, Dim3 block, Dim3 thread, const std::string& what);

  Fault fault;
  std::string kernel;
  Dim3 block, thread;
};

// Ends the launch: called in a kernel, on behalf of the running thread. launch() then throws the Error.
[[noreturn]] [[gnu::format(printf, 2, 3)]] void fail(Fault fault, const char* format, ...);

}  // namespace nsk::emu
