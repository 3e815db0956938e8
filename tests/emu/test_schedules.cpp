// Schedules: who runs when, that a seed decides it, and that they bite by themselves, without the race detector.
#include <array>
#include <cmath>
#include <set>
#include <thread>

#include "harness.h"
#include "kernels.cuh"

using namespace nsk;
using namespace nsk::cuda;
using namespace nsk::test;

namespace {

using Trace = std::vector<int>;

// The order in which the threads of two blocks come by, before and after barriers of a warp and of the block.
Trace trace(emu::Order order, uint64_t seed) {
  Trace trace;
  GlobalMemory memory;
  Options options;
  options.order = order, options.seed = seed;
  must_pass(
      "trace", memory, {"trace", {2}, {96}},
      [&] {
        const auto come_by = [&] { trace.push_back(int(blockIdx.x * 1024 + threadIdx.x)); };
        come_by();
        __syncwarp();
        come_by();
        __syncthreads();
        come_by();
      },
      options);
  CHECK(trace.size() == 2 * 96 * 3);
  return trace;
}

void seeds() {
  for (emu::Order order : {emu::Order::greedy, emu::Order::round_robin, emu::Order::random}) {
    std::set<Trace> different;
    for (uint64_t seed = 0; seed < 8; ++seed) {
      different.insert(trace(order, seed));
      CHECK(trace(order, seed) == trace(order, seed));
    }
    CHECK(different.size() == (order == emu::Order::round_robin ? 1 : 8));
  }
  const Trace in_turn = trace(emu::Order::round_robin, 0);
  for (int i = 0; i < 96; ++i) CHECK(in_turn[i] == i);
  // Greedy: a warp is through with __syncwarp before the next one begins, and not all begin in the order of the warps.
  bool shuffled = false;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const Trace greedy = trace(emu::Order::greedy, seed);
    for (int i = 0; i < 192; ++i) CHECK(greedy[i] / 32 == greedy[i / 64 * 64] / 32);
    shuffled |= greedy[0] / 32 > greedy[64] / 32;
  }
  CHECK(shuffled);
}

// Without the race detector a flaw shows only where the schedule lets a thread run far enough ahead.
bool seen(const Options& base, int place) {
  Options options = base;
  options.races = false;
  const int tiles = 5;
  const std::vector<float> x = normal(tiles * 128, 8);
  std::vector<float> y(tiles * 128);
  std::vector<emu::Sync> syncs;
  for (int run = 0; run < 2; ++run) {
    GlobalMemory memory;
    const Global<const float> in = memory.input("x", x.data(), x.size());
    const Global<float> out = memory.output("y", y.data(), y.size());
    try {
      syncs = emu::launch({"copy", {}, {128}, 1024}, memory, options, [&] {
                NSK_DYNAMIC_SHARED(bytes);
                const Shared<float> tile = as<float>(bytes);
                const int me = int(threadIdx.x);
                for (int i = 0; i < tiles; ++i) {
                  cp_async<4>(tile + me, in + i * 128 + me);
                  cp_async_commit();
                  cp_async_wait<0>();
                  __syncthreads();
                  out[i * 128 + me] = tile[127 - me];
                  __syncthreads();
                }
              }).syncs;
      for (int i = 0; i < tiles * 128; ++i)
        if (y[i] != x[i / 128 * 128 + 127 - i % 128]) return true;
    } catch (const Error&) {
      return true;
    }
    if (run == 0) options.flaw = emu::Flaw{emu::Flaw::left_out, syncs.at(place)};
  }
  return false;
}

void values_alone() {
  using enum emu::Order;
  using enum emu::Arrival;
  for (emu::Order order : {greedy, round_robin, random})
    for (emu::Arrival arrival : {at_once, late, poisoned}) {
      const Options options{order, arrival, 4, true, std::nullopt};
      for (int place : {0, 1}) CHECK(seen(options, place) == (arrival != at_once), "%s", options.name().c_str());
      if (order == greedy && arrival != late)
        for (int place : {2, 3}) CHECK(seen(options, place), "barrier %d, %s", place, options.name().c_str());
    }
}

void host_threads() {
  std::array<std::thread, 2> threads;
  for (std::thread& thread : threads)
    thread = std::thread([] {
      for (int i = 0; i < 20; ++i) {
        std::vector<float> x(256, 1.0f), sums(2);
        GlobalMemory memory;
        const Global<const float> in = memory.input("x", x.data(), x.size());
        const Global<float> out = memory.output("sums", sums.data(), sums.size());
        emu::launch({"row_sums", {}, {128}}, memory, {}, [&] { row_sums(2, 128, in, out); });
        CHECK(sums[0] == 128 && sums[1] == 128);
      }
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  seeds();
  values_alone();
  host_threads();
  return check::result("emu schedules");
}
