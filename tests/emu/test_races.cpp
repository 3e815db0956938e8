// The race detector: accesses that nothing orders, though they come in the right order in most schedules; and beside
// them accesses ordered by the weakest means that suffices.
#include "../../csrc/cuda/device.cuh"
#include "harness.h"

using namespace nsk;
using namespace nsk::cuda;
using namespace nsk::test;

namespace {

constexpr Fault kRace = Fault::race;

// Some runs in which the second thread reads before the first wrote end as `unwritten`: cells are written first.
Shared<float> zeroed(Shared<unsigned char> bytes) {
  for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x)) as<float>(bytes)[i] = 0;
  __syncthreads();
  return as<float>(bytes);
}

void within_a_block() {
  must_fail("write, read", kRace, "race: ", 64, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    if (threadIdx.x == 0) x[5] = 1;
    if (threadIdx.x == 40) [[maybe_unused]]
      const float v = x[5];
  });
  must_fail("write, write", kRace,
            "race: writes 4 bytes at byte 20 of 1024 of dynamic shared memory, unordered with thread", 64, [] {
              NSK_DYNAMIC_SHARED(bytes);
              const Shared<float> x = zeroed(bytes);
              if (threadIdx.x % 32 == 3) x[5] = 1;
            });
  must_fail("atomic, read", kRace, "race: ", 64, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    if (threadIdx.x == 0) atomicAdd(x, 1.0f);
    if (threadIdx.x == 40) [[maybe_unused]]
      const float v = *x;
  });
  must_fail("one byte of a vector", kRace, "race: ", 64, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    if (threadIdx.x == 0) bytes[7] = 1;
    if (threadIdx.x == 40) [[maybe_unused]]
      const float4 v = *as<float4>(x);
  });
  must_fail("a shuffle orders nothing", kRace, "race: ", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    x[threadIdx.x] = 1;
    __shfl_xor_sync(0xffffffffu, 1, 1);
    [[maybe_unused]] const float v = x[threadIdx.x ^ 1];
  });
  must_fail("__syncwarp of others", kRace, "race: ", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    x[threadIdx.x] = 1;
    __syncwarp(threadIdx.x < 16 ? 0xffffu : 0xffff0000u);
    [[maybe_unused]] const float v = x[31 - int(threadIdx.x)];
  });
  must_fail("ldmatrix without __syncwarp", kRace, "race: ", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    x[threadIdx.x] = 1;
    uint32_t fragment[1];
    ldmatrix(fragment, x + int(threadIdx.x) % 8 * 4);
  });
  must_fail("overwritten after ldmatrix without __syncwarp", kRace, "race: writes", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    uint32_t fragment[1];
    ldmatrix(fragment, x + int(threadIdx.x) % 8 * 4);
    x[threadIdx.x ^ 31] = 1;
  });
  must_fail("stmatrix without __syncwarp", kRace, "race: reads", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    const uint32_t fragment[1] = {};
    stmatrix(fragment, x + int(threadIdx.x) % 8 * 4);
    [[maybe_unused]] const float v = x[threadIdx.x ^ 31];
  });
  must_fail("read after arriving at a barrier", kRace, "race: ", 64, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    if (threadIdx.x < 32) {
      barrier_arrive(1, 64);
      [[maybe_unused]] const float v = x[threadIdx.x];  // too late: the others do not wait for it
    } else {
      barrier_sync(1, 64);
      x[threadIdx.x - 32] = 1;
    }
  });
  must_fail("one of many readers", kRace, "race: ", 128, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    [[maybe_unused]] const float v = *x;
    if (threadIdx.x < 96) barrier_sync(1, 96);
    if (threadIdx.x == 0) *x = 1;  // the last warp may not have read it
  });
}

// Lane l writes what the others get from the row whose address it gives.
template <bool kTransposed>
void load_own_row() {
  NSK_DYNAMIC_SHARED(bytes);
  const Shared<float> row = zeroed(bytes) + int(threadIdx.x) % 8 * 4;
  if (threadIdx.x < 8) *as<float4>(row) = float4{};
  uint32_t fragment[1];
  ldmatrix<kTransposed>(fragment, row);
}

// What has to be remembered although others came after it.
void remembered() {
  must_fail("who gets a row reads it", kRace, "race: ", 32, [] { load_own_row<false>(); });
  must_fail("who gets a column reads it", kRace, "race: ", 32, [] { load_own_row<true>(); });
  must_fail("a read does not hide the write before it", kRace, "race: ", 96, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    if (threadIdx.x == 0) *x = 1;
    if (threadIdx.x < 64) barrier_sync(1, 64);
    if (threadIdx.x >= 32) [[maybe_unused]]
      const float v = *x;
  });
  must_fail("an atomic does not hide the write before it", kRace, "race: ", 96, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    if (threadIdx.x == 0) *x = 1;
    if (threadIdx.x < 64) barrier_sync(1, 64);
    if (threadIdx.x >= 32) atomicAdd(x, 1.0f);
  });
  must_fail("every lane that read", kRace, "race: ", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    [[maybe_unused]] const float v = *x;
    __ballot_sync(0xffffffffu, 1);  // all have read by now, but that orders nothing
    if (threadIdx.x < 2) __syncwarp(3);
    if (threadIdx.x == 1) *x = 1;
  });
}

void no_races() {
  must_pass("ordered", 128, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    const int me = int(threadIdx.x), lane = me % 32;
    const Shared<float> mine = x + (me - lane);
    for (int i = 0; i < 3; ++i) {
      mine[lane] = float(i);
      __syncwarp();
      CHECK(mine[31 - lane] == float(i));
      __syncwarp();
    }
    // Through a third warp: what it knew when it left the first barrier it hands on in the second.
    if (me == 0) mine[0] = 7;
    if (me < 64) barrier_sync(1, 64);
    if (me >= 32 && me < 96) barrier_sync(2, 64);
    if (me >= 64 && me < 96) CHECK(x[0] == 7.0f);
    __syncthreads();
    atomicAdd(x + 200, 1.0f);
    __syncthreads();
    CHECK(x[200] == 128.0f);
    bytes[512 + me] = 1;  // neighbouring bytes are nobody's business
    [[maybe_unused]] const unsigned char byte = bytes[512 + me];
  });
  must_pass("matrices", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes), row = x + int(threadIdx.x) % 8 * 4;
    uint32_t fragment[1];
    for (int i = 0; i < 2; ++i) {
      ldmatrix(fragment, row);
      ldmatrix<true>(fragment, row);
      __syncwarp();
      stmatrix(fragment, row);
      __syncwarp();
    }
  });
  must_pass("fences within a block", 64, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<float> x = zeroed(bytes);
    const Shared<int> ticket = as<int>(x) + 9;
    if (threadIdx.x % 32) return;
    if (threadIdx.x == 0) x[0] = 5;
    __threadfence();
    const int before = atomicAdd(ticket, 1);
    __threadfence();
    if (threadIdx.x == 32 && before == 1) CHECK(x[0] == 5.0f);
  });
}

void copies() {
  const std::vector<float> in(64, 3.0f);
  GlobalMemory memory;
  const Global<const float> source = memory.input("source", in.data(), in.size());
  const Launch what{"copies", {}, {32}, 1024};
  const auto fails = [&](const char* name, auto body) {
    for (const Options& options : emu::all_schedules(1)) {
      const bool unwritten = options.arrival == emu::Arrival::poisoned;
      try {
        emu::launch(what, memory, options, [&] {
          NSK_DYNAMIC_SHARED(bytes);
          body(zeroed(bytes), int(threadIdx.x));
        });
        CHECK(false, "%s: nothing was reported (%s)", name, options.name().c_str());
      } catch (const Error& e) {
        CHECK(e.fault == kRace || (unwritten && e.fault == Fault::unwritten), "%s: %s", name, e.what());
      }
    }
  };
  fails("no wait", [&](Shared<float> x, int me) {
    cp_async<4>(x + me, source + me);
    cp_async_commit();
    [[maybe_unused]] const float v = x[me];  // not even its own
  });
  fails("a barrier is no wait", [&](Shared<float> x, int me) {
    cp_async<4>(x + me, source + me);
    cp_async_commit();
    __syncthreads();
    [[maybe_unused]] const float v = x[me ^ 1];
  });
  fails("no commit", [&](Shared<float> x, int me) {
    cp_async<4>(x + me, source + me);
    cp_async_wait<0>();
    [[maybe_unused]] const float v = x[me];
  });
  fails("wait for the group before", [&](Shared<float> x, int me) {
    for (int i = 0; i < 2; ++i) {
      cp_async<4>(x + i * 32 + me, source + me);
      cp_async_commit();
    }
    cp_async_wait<1>();
    [[maybe_unused]] const float v = x[32 + me];
  });
  fails("no barrier after the wait", [&](Shared<float> x, int me) {
    cp_async<4>(x + me, source + me);
    cp_async_wait_all();
    [[maybe_unused]] const float v = x[me ^ 1];
  });
  fails("barrier before the wait", [&](Shared<float> x, int me) {
    cp_async<4>(x + me, source + me);
    __syncthreads();
    cp_async_wait_all();
    [[maybe_unused]] const float v = x[me ^ 1];
  });
  fails("two copies to one place", [&](Shared<float> x, int me) {
    cp_async<4>(x + me, source + me);
    cp_async<4>(x + me, source + me);
  });
  fails("issued before the others have read", [&](Shared<float> x, int me) {
    [[maybe_unused]] const float v = x[me ^ 1];
    cp_async<4>(x + me, source + me);
  });
  fails("a store before it has arrived", [&](Shared<float> x, int me) {
    cp_async<4>(x + me, source + me);
    x[me] = 1;
  });
  std::vector<float> scratch(64, 3.0f);
  const Global<float> changing = memory.in_out("scratch", scratch.data(), scratch.size());
  fails("the source changes before the wait", [&](Shared<float> x, int me) {
    cp_async<4>(x + me, changing + me);
    __syncthreads();
    changing[me ^ 1] = 1;
    cp_async_wait_all();
  });
  for (const Options& options : emu::all_schedules(1))
    must_pass(
        "waited for", memory, what,
        [&] {
          NSK_DYNAMIC_SHARED(bytes);
          const Shared<float> x = zeroed(bytes);
          const int me = int(threadIdx.x);
          cp_async<8>(x + 2 * me, source + 2 * me, 4);
          cp_async_commit();
          cp_async<4>(x + 64 + me, source + me);
          cp_async_commit();
          cp_async_wait<1>();
          CHECK(x[2 * me] == 3.0f && x[2 * me + 1] == 0.0f);
          __syncwarp();
          CHECK(x[2 * (me ^ 1)] == 3.0f);
          cp_async_wait<0>();
          CHECK(x[64 + me] == 3.0f);
        },
        options);
}

void among_blocks() {
  std::vector<float> data(64);
  std::vector<uint16_t> halves(64);
  GlobalMemory memory;
  const Global<float> x = memory.in_out("x", data.data(), data.size());
  const Global<uint16_t> h = memory.output("h", halves.data(), halves.size());
  const Launch what{"blocks", {2}, {32}};
  for (const Options& options : emu::all_schedules(1)) {
    must_fail(
        "both write", kRace, "of the launch's block number 1, which wrote it", memory, what,
        [&] { x[threadIdx.x] = 1; }, options);
    must_fail(
        "one writes", kRace, "race: ", memory, what,
        [&] {
          if (blockIdx.x)
            x[threadIdx.x] = 1;
          else [[maybe_unused]]
            const float v = x[threadIdx.x];
        },
        options);
    must_fail(
        "barriers are of one block", kRace, "race: ", memory, what,
        [&] {
          if (blockIdx.x) x[threadIdx.x] = 1;
          __syncthreads();
          if (!blockIdx.x) [[maybe_unused]]
            const float v = x[threadIdx.x];
        },
        options);
    must_fail(
        "an atomic without fences", kRace, "race: ", memory, what,
        [&] {
          if (threadIdx.x) return;
          x[1 + blockIdx.x] = 1;
          if (atomicAdd(x, 1.0f) == 1) [[maybe_unused]]
            const float v = x[2 - int(blockIdx.x)];
          x[0] = 0;
        },
        options);
    data[0] = 0;
    must_pass(
        "what one lane acquired, __syncwarp hands on", memory, what,
        [&] {
          const int me = int(threadIdx.x);
          if (me == 0) {
            x[32 + blockIdx.x] = 1;
            __threadfence();
          }
          const float before = me == 0 ? atomicAdd(x, 1.0f) : 0.0f;
          if (me == 0) __threadfence();
          __syncwarp();
          if (__shfl_sync(0xffffffffu, before, 0) == 1.0f && me == 9) CHECK(x[32] + x[33] == 2.0f);
        },
        options);
    data[0] = 0;
    must_pass("neighbours", memory, what, [&] { h[threadIdx.x * 2 + blockIdx.x] = 1; }, options);
    must_pass("atomics", memory, what, [&] { atomicAdd(x, 1.0f); }, options);
    CHECK(data[0] == 64);
    data[0] = 0;
  }
  Options blind;
  blind.races = false;
  must_pass("not looking", memory, what, [&] { x[threadIdx.x] = 1; }, blind);
}

void atomics() {
  std::vector<int> data = {5, 5, 5, 5};
  GlobalMemory memory;
  const Global<int> x = memory.in_out("x", data.data(), data.size());
  must_pass("atomics", memory, {"atomics", {}, {1}}, [&] {
    CHECK(atomicMax(x, 9) == 5 && atomicMin(x + 1, 2) == 5 && atomicExch(x + 2, 4) == 5);
    CHECK(atomicCAS(x + 3, 4, 1) == 5 && atomicCAS(&x[3], 5, 1) == 5);
  });
  CHECK((data == std::vector{9, 2, 4, 1}));
}

}  // namespace

int main() {
  within_a_block();
  remembered();
  no_races();
  copies();
  among_blocks();
  atomics();
  return check::result("emu races");
}
