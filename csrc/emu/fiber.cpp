#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(NSK_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace nsk::emu {
namespace {

// Who switched, and to whom: a fiber that begins or goes on learns from it whence it came.
thread_local Fiber* left = nullptr;
thread_local Fiber* entered = nullptr;

}  // namespace

Stack::Stack(size_t number) : size_(kSize - number % 61 * 192) {
  void* p = mmap(nullptr, kGuard + kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  mprotect(p, kGuard, PROT_NONE);
  bottom_ = static_cast<char*>(p) + kGuard;
}

Stack::~Stack() { munmap(bottom_ - kGuard, kGuard + kSize); }

#if defined(NSK_EMU_UCONTEXT)

void Fiber::prepare(Stack& stack, Entry entry) {
  entry_ = entry, bottom_ = stack.bottom(), size_ = stack.size(), fake_stack_ = nullptr;
#if defined(NSK_EMU_ASAN)
  __asan_unpoison_memory_region(stack.bottom(), stack.size());
#endif
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack.bottom();
  context_.uc_stack.ss_size = stack.size();
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::start, 0);
}

#define NSK_EMU_SWITCH(from, to) swapcontext(&(from).context_, &(to).context_)

#else

// Saves what the ABI asks a function to preserve on the stack, swaps stacks and takes the same from the other one.
// The rounding and exception modes are the same in all fibers.
extern "C" void nsk_emu_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden nsk_emu_switch
.globl nsk_emu_switch
.type nsk_emu_switch, @function
nsk_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size nsk_emu_switch, . - nsk_emu_switch
)");

void Fiber::prepare(Stack& stack, Entry entry) {
  entry_ = entry, bottom_ = stack.bottom(), size_ = stack.size(), fake_stack_ = nullptr;
#if defined(NSK_EMU_ASAN)
  __asan_unpoison_memory_region(stack.bottom(), stack.size());
#endif
  // Six registers, the address that the switch returns to, and a null one that ends every walk up the stack. start()
  // begins as if it had been called: the stack pointer is a multiple of 16 plus 8.
  void** top = reinterpret_cast<void**>(stack.bottom() + stack.size()) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&Fiber::start);
  stack_pointer_ = top;
}

#define NSK_EMU_SWITCH(from, to) nsk_emu_switch(&(from).stack_pointer_, (to).stack_pointer_)

#endif

void Fiber::start() {
  Fiber& self = *entered;
#if defined(NSK_EMU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &left->bottom_, &left->size_);
#endif
  self.entry_();
  std::abort();  // an entry leaves for good, it does not return
}

void Fiber::switch_to(Fiber& next, [[maybe_unused]] bool for_good) {
  left = this, entered = &next;
#if defined(NSK_EMU_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, next.bottom_, next.size_);
#endif
  NSK_EMU_SWITCH(*this, next);
#if defined(NSK_EMU_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack_, &left->bottom_, &left->size_);
#endif
}

}  // namespace nsk::emu
