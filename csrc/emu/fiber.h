// Fibers: threads of execution that switch among themselves only where they say so, all on one thread of the host.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NSK_EMU_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define NSK_EMU_ASAN 1
#endif

// A switch in hand-written assembly takes a few nanoseconds; ucontext makes two system calls to save the signal mask.
#if !defined(__x86_64__) && !defined(NSK_EMU_UCONTEXT)
#define NSK_EMU_UCONTEXT 1
#endif
#if defined(NSK_EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace nsk::emu {

// One stack with pages below it that nobody may touch. Only the pages that are used take memory. Stacks of different
// `number` begin at different offsets in their pages: at the same one they would compete for a few lines of the cache.
class Stack {
 public:
  explicit Stack(size_t number);
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return bottom_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kSize = 256 << 10, kGuard = 64 << 10;
  char* bottom_;
  size_t size_;
};

class Fiber {
 public:
  using Entry = void (*)();

  Fiber() = default;  // stands for the context that switches away from it first
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes this fiber run `entry` on `stack` when it is switched to. What it did before is forgotten, its frames
  // without being unwound.
  void prepare(Stack& stack, Entry entry);

  // Leaves this fiber, which is the running one, for `next`; returns when somebody switches back, or never when it
  // leaves for good.
  void switch_to(Fiber& next, bool for_good = false);

 private:
  static void start();

#if defined(NSK_EMU_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  Entry entry_ = nullptr;
  // For AddressSanitizer, which must be told of every change of stacks.
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace nsk::emu
