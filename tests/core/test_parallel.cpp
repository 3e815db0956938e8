// parallel_for: every unit once, scratch of its own, from several threads at once, and in a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "../../csrc/cpu/parallel.h"
#include "check.h"

static void every_unit_once(int threads, int64_t count) {
  std::vector<std::atomic<int>> seen(count);
  const nsk_status status = nsk::parallel_for(threads, count, 1000, [&](int64_t unit, char* scratch) {
    for (int i = 0; i < 1000; ++i) scratch[i] = char(unit);
    seen[unit] += 1;
    for (int i = 0; i < 1000; ++i) CHECK(scratch[i] == char(unit), "scratch is shared");
  });
  CHECK(status == NSK_OK);
  for (auto& n : seen) CHECK(n == 1);
}

int main() {
  for (int threads : {1, 2, 3, 8})
    for (int64_t count : {0, 1, 2, 7, 1000}) every_unit_once(threads, count);

  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back([] { every_unit_once(3, 500); });
  for (auto& caller : callers) caller.join();

  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    every_unit_once(2, 100);
    _exit(check::failures ? 1 : 0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "forked child: status %d", status);

  CHECK(nsk::parallel_for(2, 2, size_t(1) << 60, [](int64_t, char*) {}) == NSK_OUT_OF_MEMORY);
  return check::result("parallel");
}
