// The last launch for a sink's gradient: a head's parts, which the row-wise launch has left, added up. A warp a head:
// each lane every 32nd part, then the lanes; always in the same order.
#pragma once

#include "gated_sdpa_backward_problem.cuh"

namespace nsk::cuda {

struct GatedSdpaSink {
  static constexpr int kThreads = 32;

  Global<const float> parts;  // [head, count]
  int64_t count;
  Global<unsigned char> gradient;  // [head] in T or float
  int64_t stride;
  bool is_float;
};

template <class T>
__global__ void __launch_bounds__(GatedSdpaSink::kThreads) gated_sdpa_sink(const __grid_constant__ GatedSdpaSink p) {
  const int head = int(blockIdx.x), lane = int(threadIdx.x);
  float sum = 0;
  for (int64_t i = lane; i < p.count; i += GatedSdpaSink::kThreads) {
    const float part = p.parts[head * p.count + i];
    sum += part;
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  if (lane != 0) return;
  store_either<T>(p.gradient, head * p.stride, p.is_float, sum);
}

}  // namespace nsk::cuda
