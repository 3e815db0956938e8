// A kernel that uses every word of device.cuh once: both of its halves have them all.
#pragma once

#include "../../csrc/cuda/device.cuh"

namespace nsk::test {

using namespace nsk::cuda;

template <class T, bool kTransposed>
__device__ void use_matrices(Shared<unsigned char> row, float (&d)[4]) {
  uint32_t a[4], b[2], c[1];
  ldmatrix<kTransposed>(a, as<T>(row));
  ldmatrix<kTransposed>(b, as<T>(row));
  ldmatrix<kTransposed>(c, as<T>(row));
  b[1] += c[0];
  mma<T>(d, a, b);
  __syncwarp();
  stmatrix<kTransposed>(a, as<T>(row));
  __syncwarp();
  stmatrix<kTransposed>(b, as<T>(row));
  __syncwarp();
  stmatrix<kTransposed>(c, as<T>(row));
  __syncwarp();
}

// For one warp, 1024 bytes of dynamic shared memory, 32 x 8 floats and 32 results.
__global__ void __launch_bounds__(32) vocabulary(Global<const float> from, Global<float> to, Global<int> counters) {
  NSK_DYNAMIC_SHARED(bytes);
  NSK_SHARED_ARRAY(float, values, 32);
  const int me = int(threadIdx.x);
  const Shared<unsigned char> mine = bytes + 32 * me;
  cp_async<4>(mine, from + 8 * me);
  cp_async<4>(mine + 4, from + 8 * me, 0);
  cp_async<8>(mine + 8, from + 8 * me + 2, 4);
  cp_async_commit();
  cp_async<16>(mine + 16, from + 8 * me + 4);
  cp_async_wait<0>();
  cp_async_wait_all();
  barrier_sync(1, 32);
  barrier_arrive(2, 32);
  float d[4] = {};
  use_matrices<bf16, false>(bytes + 16 * me, d);
  use_matrices<f16, true>(bytes + 16 * me, d);
  const float2 x = unpack<bf16>(pack<bf16>(d[0], d[1])), y = unpack<f16>(pack<f16>(d[2], d[3]));
  values[me] = exp2_approx(x.x) + log2_approx(x.y) + rcp_approx(y.x) + rsqrt_approx(y.y) +
               tanh_approx(__uint_as_float(to_tf32(d[0])));
  __syncthreads();
  float sum = values[31 - me] + __shfl_sync(0xffffffffu, x.x, 3) + __shfl_up_sync(0xffffffffu, x.x, 1) +
              __shfl_down_sync(0xffffffffu, x.x, 1) + __shfl_xor_sync(0xffffffffu, x.x, 1);
  sum += float(__ballot_sync(0xffffffffu, me & 1)) + float(__any_sync(0xffffffffu, me) + __all_sync(0xffffffffu, me));
  __threadfence();
  sum += float(atomicAdd(counters, 1) + atomicMax(counters + 1, me) + atomicMin(counters + 2, me));
  sum += float(atomicExch(counters + 3, me) + atomicCAS(counters + 4, me, me + 1));
  as<float2>(to)[me] = make_float2(sum, max(__ldg(from), min(1.0f, __int_as_float(__float_as_int(sum)))));
}

}  // namespace nsk::test
