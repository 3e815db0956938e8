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

// Looked up rather than linked: torch's wheel carries an OpenMP runtime of its own, and a second one would mean a
// second pool. Every OpenMP runtime of GCC and LLVM on Linux has these entry points.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;

  OpenMP() {
    find(parallel, "GOMP_parallel");
    find(thread, "omp_get_thread_num");
    find(threads, "omp_get_num_threads");
  }
  bool found() const { return parallel && thread && threads; }

 private:
  template <class F>
  static void find(F& entry, const char* name) {
    entry = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  }
};

const OpenMP& openmp() {
  static const OpenMP entries;
  return entries;
}

std::atomic<bool> forked_child{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

bool use_openmp() { return openmp().found() && !forked_child; }

// Calls f() on the caller's thread and on up to threads - 1 new ones; first started(n) when it is known that it is n in
// all.
template <class F, class Started>
void run_on_own_threads(int threads, const F& f, const Started& started) {
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&f] { f(); });
  } catch (const std::exception&) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  started(int64_t(helpers.size()) + 1);
  f();
  for (auto& helper : helpers) helper.join();
}

}  // namespace

nsk_status parallel_for(int threads, int64_t count, size_t scratch_bytes, UnitBody body, const void* context) {
  Job job{body, context, count, scratch_bytes};
  if (threads > count) threads = int(count);
  if (threads <= 1)
    job.work();
  else if (use_openmp())
    openmp().parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(threads), 0);
  else
    run_on_own_threads(threads, [&] { job.work(); }, [](int64_t) {});
  return job.out_of_memory ? NSK_OUT_OF_MEMORY : NSK_OK;
}

void team(int threads, HandBody body, const void* context) {
  if (threads <= 1) return body(context, 0, 1);
  if (use_openmp()) {
    struct Team {
      HandBody body;
      const void* context;
    } all{body, context};
    return openmp().parallel(
        [](void* data) {
          const Team& t = *static_cast<const Team*>(data);
          t.body(t.context, openmp().thread(), openmp().threads());
        },
        &all, unsigned(threads), 0);
  }
  std::atomic<int64_t> hand{0}, hands{0};
  run_on_own_threads(
      threads,
      [&] {
        hands.wait(0);
        body(context, hand++, hands);
      },
      [&](int64_t n) {
        hands = n;
        hands.notify_all();
      });
}

}  // namespace nsk
