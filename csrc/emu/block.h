// One block of threads at a time: it runs them as fibers until all have left the kernel, or one has done wrong.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "barrier.h"
#include "clocks.h"
#include "error.h"
#include "global_memory.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "thread.h"
#include "warp.h"

namespace nsk::emu {

// A kernel with its arguments.
struct Body {
  void (*call)(const void* context);
  const void* context;
};

class Block {
 public:
  Block(std::string kernel, Dim3 block, size_t shared_bytes, Body body, GlobalMemory& memory, const Options& options);

  // Throws what went wrong.
  void run(Dim3 index, uint32_t number);

  // For the running thread. wait() returns when another has woken it.
  void wait(const char* waits_at, std::source_location where, int barrier = -1);
  void wake(Thread& thread);
  // After it woke others.
  void yield();
  // Whether to do what is written at a place that synchronises, or to leave it out; `less`: one group less.
  bool at(SyncKind kind, std::source_location where, bool* less = nullptr);

  const std::string& kernel() const { return kernel_; }
  Dim3 index() const { return index_; }
  uint32_t number() const { return number_; }
  int size() const { return int(threads_.size()); }

  Options options;
  Report report;
  GlobalMemory& memory;
  SharedMemory shared;
  Scheduler scheduler;
  Clocks clocks;
  Shadow shadow{true};  // of shared memory
  Barriers barriers;
  std::vector<Warp> warps;

 private:
  static void entry();
  void leave(Thread& thread);
  void resume(Thread& from, bool for_good = false);
  std::string who_waits() const;

  std::string kernel_;
  Dim3 index_{0, 0, 0};
  uint32_t number_ = 0;
  Body body_;
  std::vector<std::unique_ptr<Thread>> threads_;
  Fiber host_;
  int unfinished_ = 0;
  std::optional<Error> error_;
};

}  // namespace nsk::emu
