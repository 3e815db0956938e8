// The emulator: runs CUDA kernels on the host and watches them. This page is the door.
//
//   GlobalMemory memory;
//   const Global<const float> x = memory.input("x", data.data(), data.size());
//   const Global<float> y = memory.output("y", result.data(), result.size());
//   Report report = launch({"kernel", grid, block, shared_bytes}, memory, options, [&] { kernel(n, x, y); });
//
// Every thread of a block is a fiber that runs until it has to wait for others; the schedule says who is next.
// Reported, with kernel, block and thread: accesses out of bounds, misaligned, of what nobody wrote, to inputs; races,
// by vector clocks, whatever the schedule; barriers and collectives that not all come to; deadlocks. Options::flaw
// leaves out one synchronisation, so that a test can show that each is needed and that its absence is seen.
//
// Stricter than the hardware: a thread that has left the kernel is missed at __syncthreads and in masks; __syncthreads
// is one place of the source for all threads. Blocks run one after another, each to its end, so that a block cannot
// wait for another. An address that is far out of bounds may lie in another array and pass. Sums of mma are rounded
// one by one, *_approx are exact to fp32.
#pragma once

#include <cstddef>
#include <source_location>
#include <string>

#include "error.h"
#include "global_memory.h"
#include "options.h"

namespace nsk::emu {

struct Launch {
  std::string kernel;  // its name, for messages
  Dim3 grid, block;
  size_t shared_bytes = 0;  // of dynamic shared memory
};

// Runs body(context) once in every thread. Throws the Error of the first that does wrong; the memory then holds what
// was written so far. Launches from several threads of the host are independent of each other.
Report launch(const Launch& what, GlobalMemory& memory, const Options& options, void (*body)(const void* context),
              const void* context);

// The same for a callable, e.g. [&] { kernel<float>(n, x, y); }.
template <class F>
Report launch(const Launch& what, GlobalMemory& memory, const Options& options, const F& body) {
  return launch(what, memory, options, [](const void* context) { (*static_cast<const F*>(context))(); }, &body);
}

// For the running thread: the array that is declared at `where`, and dynamic shared memory.
char* shared_array(size_t bytes, size_t align, std::source_location where);
unsigned char* dynamic_shared();

}  // namespace nsk::emu
