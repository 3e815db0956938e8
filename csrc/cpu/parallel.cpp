#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

namespace nsk {
namespace {

// Grows to the largest tile that a thread was asked for and lives as long as the thread.
struct ThreadScratch {
  char* data = nullptr;
  size_t size = 0;
  ~ThreadScratch() { std::free(data); }

  char* reserve(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = 0;
      data = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (data) size = bytes;
    }
    return data;
  }
};
thread_local ThreadScratch thread_scratch;

struct Job {
  UnitBody body;
  const void* context;
  int64_t count;
  size_t scratch_bytes;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  void work() {
    char* scratch = nullptr;
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      if (!scratch && scratch_bytes && !(scratch = thread_scratch.reserve(scratch_bytes))) {
        out_of_memory = true;
        return;
      }
      body(context, unit, scratch);
    }
  }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Looked up rather than linked: torch's wheel carries an OpenMP runtime of its own, and a second one would mean a
// second pool. Every OpenMP runtime of GCC and LLVM on Linux has this entry point.
GompParallel openmp() {
  static const GompParallel entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

std::atomic<bool> forked_child{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

void run_on_own_threads(Job& job, int threads) {
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&job] { job.work(); });
  } catch (const std::exception&) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  job.work();
  for (auto& helper : helpers) helper.join();
}

}  // namespace

nsk_status parallel_for(int threads, int64_t count, size_t scratch_bytes, UnitBody body, const void* context) {
  Job job{body, context, count, scratch_bytes};
  if (threads > count) threads = int(count);
  if (threads <= 1)
    job.work();
  else if (openmp() && !forked_child)
    openmp()([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(threads), 0);
  else
    run_on_own_threads(job, threads);
  return job.out_of_memory ? NSK_OUT_OF_MEMORY : NSK_OK;
}

}  // namespace nsk
