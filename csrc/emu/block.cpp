#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <exception>

#include "builtins.h"
#include "place.h"

namespace nsk::emu {

constinit thread_local Thread* running = nullptr;

namespace {

// Stacks are kept from launch to launch.
thread_local std::vector<std::unique_ptr<Stack>> stacks;

void run_as(Thread& thread) {
  running = &thread;
  ::threadIdx = {thread.index.x, thread.index.y, thread.index.z};
}

}  // namespace

Error::Error(Fault fault, std::string kernel, Dim3 block, Dim3 thread, const std::string& what)
    : std::runtime_error(kernel + ": block " + name(block) + ", thread " + name(thread) + ": " + what),
      fault(fault),
      kernel(std::move(kernel)),
      block(block),
      thread(thread) {}

void fail(Fault fault, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error(fault, running->block->kernel(), running->block->index(), running->index, text);
}

Block::Block(std::string kernel, Dim3 block, size_t shared_bytes, Body body, GlobalMemory& memory,
             const Options& options)
    : options(options), memory(memory), shared(shared_bytes), kernel_(std::move(kernel)), body_(body) {
  const int count = int(block.count());
  warps.resize((count + kWarpSize - 1) / kWarpSize);
  for (int id = 0; id < count; ++id) {
    Thread& thread = *threads_.emplace_back(std::make_unique<Thread>());
    thread.block = this;
    thread.id = id, thread.warp = id / kWarpSize, thread.lane = id % kWarpSize;
    thread.index = {id % block.x, id / block.x % block.y, id / block.x / block.y};
  }
  while (stacks.size() < size_t(count)) stacks.push_back(std::make_unique<Stack>(stacks.size()));
  clocks.begin_launch();
  memory.begin_launch();
}

void Block::run(Dim3 index, uint32_t number) {
  index_ = index, number_ = number;
  const int count = int(threads_.size());
  shared.begin_block();
  shadow.reset(shared.size());
  clocks.begin_block(number, count);
  barriers.begin_block(count);
  for (int warp = 0; warp < int(warps.size()); ++warp)
    warps[warp].begin_block(~0u >> (32 - std::min(kWarpSize, count - warp * kWarpSize)));
  for (int id = 0; id < count; ++id) {
    threads_[id]->begin_block();
    threads_[id]->fiber.prepare(*stacks[id], &Block::entry);
  }
  scheduler.begin(count, options.order, options.seed * 0x9e3779b97f4a7c15u + number);
  unfinished_ = count;

  Thread& first = *threads_[scheduler.next(kMaxThreads - 1)];
  run_as(first);
  host_.switch_to(first.fiber);
  Thread& last = *running;
  running = nullptr;
  if (!error_)
    if (const std::string guard = shared.broken_guard(); !guard.empty())
      error_.emplace(Fault::guard, kernel_, index_, last.index, guard + " was overwritten");
  if (error_) throw *error_;
}

void Block::entry() {
  Thread& thread = *running;
  Block& block = *thread.block;
  try {
    block.body_.call(block.body_.context);
    block.leave(thread);
  } catch (const Error& e) {
    block.error_ = e;
  } catch (const std::exception& e) {
    block.error_.emplace(Fault::uncaught, block.kernel_, block.index_, thread.index,
                         std::string("an exception left the kernel: ") + e.what());
  }
  if (block.error_ || !block.unfinished_) thread.fiber.switch_to(block.host_, true);
  block.resume(thread, true);
}

void Block::leave(Thread& thread) {
  warps[thread.warp].finished(thread);
  barriers.finished(thread);
  thread.finished = true;
  --unfinished_;
  scheduler.wait(thread.id);
  if (unfinished_ && scheduler.idle()) fail(Fault::deadlock, "deadlock: %s", who_waits().c_str());
}

void Block::wait(const char* waits_at, std::source_location where, int barrier) {
  Thread& thread = *running;
  thread.waits_at = waits_at, thread.where = where, thread.barrier = barrier, thread.atomics = 0;
  scheduler.wait(thread.id);
  if (scheduler.idle()) fail(Fault::deadlock, "deadlock: %s", who_waits().c_str());
  resume(thread);
  thread.waits_at = nullptr;
}

void Block::wake(Thread& thread) { scheduler.wake(thread.id); }

void Block::yield() {
  if (scheduler.yields()) resume(*running);
}

void Block::resume(Thread& from, bool for_good) {
  const int next = scheduler.next(from.id);
  if (next == from.id) return;
  run_as(*threads_[next]);
  from.fiber.switch_to(threads_[next]->fiber, for_good);
}

std::string Block::who_waits() const {
  std::string text;
  int count = 0;
  auto alike = [&](const Thread& a, const Thread& b) {
    return a.waits_at == b.waits_at && a.barrier == b.barrier && same(a.where, b.where);
  };
  for (size_t i = 0; i < threads_.size(); ++i) {
    const Thread& thread = *threads_[i];
    if (thread.finished) continue;
    ++count;
    if (i + 1 < threads_.size() && !threads_[i + 1]->finished && alike(thread, *threads_[i + 1])) continue;
    if (!text.empty()) text += ", ";
    text += std::to_string(count) + " threads up to " + name(thread.index) + " wait in " + thread.waits_at;
    if (thread.barrier >= 0) text += ' ', text += std::to_string(thread.barrier);
    text += " at " + place(thread.where);
    count = 0;
    if (text.size() > 600) return text + ", ...";
  }
  return text;
}

bool Block::at(SyncKind kind, std::source_location where, bool* less) {
  const Sync sync{kind, where};
  if (std::find(report.syncs.begin(), report.syncs.end(), sync) == report.syncs.end()) report.syncs.push_back(sync);
  if (less) *less = false;
  if (!options.flaw || !(options.flaw->sync == sync)) return true;
  if (options.flaw->kind == Flaw::left_out) return false;
  if (less) *less = true;
  return true;
}

}  // namespace nsk::emu
