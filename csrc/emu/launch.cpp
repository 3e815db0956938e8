#include "launch.h"

#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "block.h"
#include "builtins.h"

constinit thread_local uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace nsk::emu {
namespace {

constexpr size_t kMaxSharedBytes = 227 << 10;  // of one block, on the largest devices

uint3 as_uint3(Dim3 d) { return {d.x, d.y, d.z}; }

}  // namespace

Report launch(const Launch& what, GlobalMemory& memory, const Options& options, void (*body)(const void* context),
              const void* context) {
  if (what.block.count() == 0 || what.block.count() > kMaxThreads || what.shared_bytes > kMaxSharedBytes)
    throw std::invalid_argument(what.kernel + ": blocks of " + std::to_string(what.block.count()) + " threads and " +
                                std::to_string(what.shared_bytes) + " bytes of shared memory cannot be launched");
  Block block(what.kernel, what.block, what.shared_bytes, {body, context}, memory, options);
  std::vector<uint32_t> order(what.grid.count());
  std::iota(order.begin(), order.end(), 0u);
  if (options.order != Order::round_robin) {
    std::mt19937_64 random(options.seed);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  }
  blockDim = as_uint3(what.block), gridDim = as_uint3(what.grid);
  uint32_t number = 0;
  for (uint32_t i : order) {
    const Dim3 index{i % what.grid.x, i / what.grid.x % what.grid.y, i / what.grid.x / what.grid.y};
    blockIdx = as_uint3(index);
    block.run(index, ++number);
  }
  return std::move(block.report);
}

char* shared_array(size_t bytes, size_t align, std::source_location where) {
  return running->block->shared.array(bytes, align, where);
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(running->block->shared.dynamic()); }

}  // namespace nsk::emu
