// Each fault that the emulator looks for, by a kernel that commits it, in every schedule; and beside it what is none.
#include <stdexcept>

#include "../../csrc/cuda/device.cuh"
#include "harness.h"

using namespace nsk;
using namespace nsk::cuda;
using namespace nsk::test;

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <int kValue>
int array_of_a_template() {
  NSK_SHARED_ARRAY(int, array, 1);
  if (threadIdx.x == 0) array[0] = kValue;
  __syncthreads();
  return array[0];
}

void shared_memory() {
  must_fail("read beyond", Fault::out_of_bounds, "reads 4 bytes at byte 1024 of 1024 of dynamic shared memory", 1, [] {
    NSK_DYNAMIC_SHARED(bytes);
    [[maybe_unused]] const float x = as<float>(bytes)[256];
  });
  must_fail("write before", Fault::out_of_bounds, "writes 4 bytes at byte -4 of 1024", 1, [] {
    NSK_DYNAMIC_SHARED(bytes);
    as<float>(bytes)[-1] = 1;
  });
  must_fail("write far away", Fault::out_of_bounds, "writes", 1, [] {
    NSK_DYNAMIC_SHARED(bytes);
    as<float>(bytes)[int64_t{1} << 40] = 1;
  });
  must_fail("write across the end", Fault::out_of_bounds, "writes 16 bytes at byte 116 of 120 of the shared array", 1,
            [] {
              NSK_SHARED_ARRAY(float, array, 30);
              *as<float4>(array + 29) = float4{};
            });
  must_fail("array beyond", Fault::out_of_bounds, "of the shared array of line", 1, [] {
    NSK_SHARED_ARRAY(float, one, 8);
    NSK_SHARED_ARRAY(float, two, 8);
    one[0] = 1;
    two[8] = 1;
  });
  must_fail("misaligned store", Fault::misaligned, "writes 16 bytes at byte 4", 1, [] {
    NSK_DYNAMIC_SHARED(bytes);
    *as<float4>(bytes + 4) = float4{};
  });
  must_fail("misaligned row", Fault::misaligned, "reads 16 bytes at byte 8", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    for (int i = 0; i < 8; ++i) as<float>(bytes)[i * 32 + int(threadIdx.x)] = 0;
    __syncwarp();
    uint32_t fragment[1];
    ldmatrix(fragment, bytes + 8);
  });
  must_fail("unwritten", Fault::unwritten, "reads 8 bytes at byte 8 of 1024", 1, [] {
    NSK_DYNAMIC_SHARED(bytes);
    as<float>(bytes)[2] = 1;
    [[maybe_unused]] const float2 x = as<float2>(bytes)[1];
  });
  must_fail("unwritten counter", Fault::unwritten, "atomically updates 4 bytes at byte 0", 1, [] {
    NSK_DYNAMIC_SHARED(bytes);
    atomicAdd(as<int>(bytes), 1);
  });
  must_fail("unwritten row", Fault::unwritten, "reads 16 bytes", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    uint32_t fragment[1];
    ldmatrix(fragment, bytes);
  });
  must_fail("guard", Fault::guard, "byte 1024 of 1024 of dynamic shared memory was overwritten", 1, [] {
    NSK_DYNAMIC_SHARED(bytes);
    bytes.raw()[1024] = 0;  // behind the emulator's back
  });
  must_fail("too much", Fault::bad_argument, "shared memory", 1, [] {
    NSK_SHARED_ARRAY(float, array, 20000);
    array[0] = 1;
  });
  must_pass("arrays", 2, [] {  // one array for all threads, another for each place that declares one
    for (int i = 0; i < 2; ++i) {
      NSK_SHARED_ARRAY(int, array, 2);
      NSK_SHARED_ARRAY(int, other, 2);
      array[int(threadIdx.x)] = 1 + int(threadIdx.x), other[int(threadIdx.x)] = 7;
      __syncthreads();
      CHECK(array[1 - int(threadIdx.x)] == 2 - int(threadIdx.x));
      __syncthreads();
    }
    const int one = array_of_a_template<1>(), two = array_of_a_template<2>();
    CHECK(one == 1 && two == 2 && array_of_a_template<1>() == 1);
  });
}

void global_memory() {
  const std::vector<float> in(8);
  std::vector<float> out(8), both(8);
  GlobalMemory memory;
  const Global<const float> x = memory.input("x", in.data(), 8);
  const Global<float> y = memory.output("y", out.data(), 8), z = memory.in_out("z", both.data(), 7);
  const Launch one{"kernel", {}, {1}, 64};
  const auto fails = [&](Fault fault, const char* words, auto body) {
    for (const Options& options : emu::all_schedules(1)) must_fail(words, fault, words, memory, one, body, options);
  };
  fails(Fault::out_of_bounds, "reads 4 bytes at byte 32 of 32 of x", [&] { [[maybe_unused]] const float v = x[8]; });
  fails(Fault::out_of_bounds, "writes 8 bytes at byte 24 of 28 of z", [&] { as<float2>(z)[3] = float2{}; });
  fails(Fault::out_of_bounds, "no region", [&] { [[maybe_unused]] const float v = *Global<const float>(); });
  fails(Fault::misaligned, "reads 8 bytes at byte 4 of 32 of x",
        [&] { [[maybe_unused]] const float2 v = *as<const float2>(x + 1); });
  fails(Fault::read_only, "writes 4 bytes at byte 0 of 32 of x",
        [&] { *Global<float>(const_cast<float*>(x.raw())) = 1; });
  fails(Fault::unwritten, "reads 4 bytes at byte 4 of 32 of y", [&] { [[maybe_unused]] const float v = y[1]; });
  fails(Fault::misaligned, "cp.async of 16 bytes from byte 4", [&] {
    NSK_DYNAMIC_SHARED(bytes);
    cp_async<16>(bytes, x + 1);
  });
  fails(Fault::out_of_bounds, "reads 16 bytes at byte 32 of 32 of x", [&] {
    NSK_DYNAMIC_SHARED(bytes);
    cp_async<16>(bytes, x + 8);
  });
  must_pass("no bytes of an address are not read", memory, one, [&] {
    NSK_DYNAMIC_SHARED(bytes);
    cp_async<16>(bytes, x + 9, 0);
    cp_async_wait_all();
    CHECK(as<float>(bytes)[3] == 0.0f);
  });
  must_pass("written by one launch, read by the next", memory, one, [&] { y[1] = 5; });
  must_pass("written by one launch, read by the next", memory, one, [&] { CHECK(y[1] == 5.0f); });

  const Global<const float> part = memory.input("part", in.data() + 2, 3);
  must_pass("inputs that share memory", memory, one, [&] { CHECK(part[2] == 0.0f && x[7] == 0.0f); });
  fails(Fault::out_of_bounds, "reads 4 bytes at byte 32 of 32 of x, part",
        [&] { [[maybe_unused]] const float v = x[8]; });

  bool overlap = false;
  try {
    memory.input("w", both.data() + 6, 1);
  } catch (const std::invalid_argument&) {
    overlap = true;
  }
  CHECK(overlap);
}

void barriers() {
  must_fail("half a warp", Fault::divergent_barrier, "__syncthreads", 32, [] {
    if (threadIdx.x < 16) __syncthreads();
  });
  must_fail("one warp", Fault::divergent_barrier, "__syncthreads", 64, [] {
    if (threadIdx.x < 32) __syncthreads();
  });
  must_fail("one has left", Fault::divergent_barrier, "__syncthreads", 32, [] {
    if (threadIdx.x != 0) __syncthreads();
  });
  must_fail("two places", Fault::divergent_barrier, "comes to barrier 0 at test_faults.cpp", 32, [] {
    if (threadIdx.x < 16)
      __syncthreads();
    else
      __syncthreads();
  });
  must_fail("two counts", Fault::divergent_barrier, "comes to barrier 1 for", 64,
            [] { barrier_sync(1, threadIdx.x < 32 ? 64 : 32); });
  must_fail("twice", Fault::divergent_barrier, "a second time", 64, [] {
    if (threadIdx.x < 32)
      barrier_arrive(1, 64), barrier_arrive(1, 64);
    else
      barrier_sync(1, 64);
  });
  must_fail("no such barrier", Fault::bad_argument, "there is no barrier 16", 32, [] { barrier_sync(16, 32); });
  must_fail("odd count", Fault::bad_argument, "multiple of 32", 32, [] { barrier_sync(1, 16); });
  must_fail("deadlock", Fault::deadlock, "deadlock: 32 threads up to (31, 0, 0) wait in barrier 1 at test_faults.cpp",
            64, [] { barrier_sync(threadIdx.x < 32 ? 1 : 2, 64); });
  must_fail("nobody comes", Fault::deadlock, "32 threads up to (31, 0, 0) wait in barrier 3 at", 64, [] {
    if (threadIdx.x < 32) barrier_sync(3, 64);
  });
  must_fail("spinning", Fault::deadlock, "spins at byte 0 of 1024 of dynamic shared memory", 32, [] {
    NSK_DYNAMIC_SHARED(bytes);
    const Shared<int> flag = as<int>(bytes);
    if (threadIdx.x == 0) *flag = 0;
    __syncwarp();
    while (atomicAdd(flag, 0) == 0 && threadIdx.x != 7) continue;
    if (threadIdx.x == 7) atomicExch(flag, 1);
  });
  must_pass("parts of a block", 96, [] {
    if (threadIdx.x < 64) barrier_sync(1, 64), barrier_sync(1, 64);
    __syncthreads();
  });
  must_pass("a ragged block", 50, [] {
    __syncthreads();
    __syncwarp();
    barrier_sync(2, 64);
    CHECK(__ballot_sync(kAll, 1) == (threadIdx.x < 32 ? kAll : 0x3ffffu));
  });
}

void collectives() {
  must_fail("not its mask", Fault::mismatched, "is not one of them", 32, [] { __syncwarp(0x0000ffffu); });
  must_fail("different masks", Fault::mismatched, "__syncwarp", 32, [] { __syncwarp(threadIdx.x ? kAll : 1u | 2u); });
  must_fail("different ones", Fault::mismatched, "", 32, [] {
    if (threadIdx.x < 16)
      __syncwarp();
    else
      __ballot_sync(kAll, 1);
  });
  must_fail("different shuffles", Fault::mismatched, "shuffle", 32,
            [] { __shfl_xor_sync(kAll, 1, 1, threadIdx.x < 16 ? 32 : 16); });
  must_fail("left", Fault::mismatched, "__syncwarp", 32, [] {
    if (threadIdx.x != 5) __syncwarp();
  });
  must_fail("left before", Fault::mismatched, "__syncwarp", 32, [] {
    if (threadIdx.x != 0) __syncwarp();
  });
  must_fail("absent source", Fault::mismatched, "reads lane 16, which takes no part", 32, [] {
    if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 16);
  });
  must_fail("half an mma", Fault::mismatched, "mma", 32, [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x < 16)
      mma<bf16>(d, a, b);
    else
      mma<bf16>(d, a, b);
  });
  must_fail("ragged mma", Fault::mismatched, "fewer than 32 threads", 16, [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    mma<bf16>(d, a, b);
  });
  must_fail("width", Fault::bad_argument, "width 12", 32, [] { __shfl_sync(kAll, 1, 1, 12); });
  must_fail("exception", Fault::uncaught, "oh no", 64, [] {
    if (threadIdx.x == 40) throw std::runtime_error("oh no");
    __syncthreads();
  });
  must_pass("shuffles and votes", 64, [] {
    const int lane = int(threadIdx.x) % 32, me = int(threadIdx.x);
    CHECK(__shfl_sync(kAll, me, 7) == me - lane + 7 && __shfl_sync(kAll, me, 35) == me - lane + 3);
    CHECK(__shfl_sync(kAll, me, 3, 8) == me - lane % 8 + 3);
    CHECK(__shfl_up_sync(kAll, me, 3) == (lane < 3 ? me : me - 3));
    CHECK(__shfl_up_sync(kAll, me, 3, 8) == (lane % 8 < 3 ? me : me - 3));
    CHECK(__shfl_down_sync(kAll, me, 5) == (lane + 5 > 31 ? me : me + 5));
    CHECK(__shfl_down_sync(kAll, me, 5, 16) == (lane % 16 + 5 > 15 ? me : me + 5));
    CHECK(__shfl_xor_sync(kAll, 1.5 * me, 9) == 1.5 * (me ^ 9));
    CHECK(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u);
    CHECK(__any_sync(kAll, lane == 9) == 1 && __any_sync(kAll, 0) == 0);
    CHECK(__all_sync(kAll, 1) == 1 && __all_sync(kAll, lane != 9) == 0);
    // Halves of a warp go their own ways, and each meets itself.
    if (lane < 16) {
      CHECK(__shfl_xor_sync(0xffffu, lane, 1) == (lane ^ 1));
    } else {
      for (int i = 0; i < 3; ++i) CHECK(__all_sync(0xffff0000u, lane >= 16) == 1);
    }
  });
}

void places() {
  GlobalMemory memory;
  try {
    emu::launch({"named", {3, 2, 2}, {4, 3, 2}}, memory, {}, [] {
      if (blockIdx.x == 2 && blockIdx.y == 1 && blockIdx.z == 1 && threadIdx.x == 3 && threadIdx.y == 1 &&
          threadIdx.z == 1)
        *Global<float>() = 1;
    });
    CHECK(false);
  } catch (const Error& e) {
    CHECK(std::string(e.what()).starts_with("named: block (2, 1, 1), thread (3, 1, 1): out of bounds"), "%s", e.what());
    CHECK(e.block.x == 2 && e.block.y == 1 && e.block.z == 1 && e.thread.x == 3 && e.thread.y == 1 && e.thread.z == 1);
  }
  for (const Launch& what : {Launch{"wide", {}, {1025}, 0}, Launch{"large", {}, {32}, 228 << 10}}) {
    bool refused = false;
    try {
      emu::launch(what, memory, {}, [] {});
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused, "%s", what.kernel.c_str());
  }
}

}  // namespace

int main() {
  shared_memory();
  global_memory();
  barriers();
  collectives();
  places();
  return check::result("emu faults");
}
