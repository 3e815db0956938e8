// The one header of every kernel: CUDA's own words plus those below. Under nvcc they are inline PTX (ptx.cuh); under a
// host compiler they are functions of the emulator (csrc/emu), which runs the same source and watches it.
//
// Memory. Global<T> and Shared<T> are pointers, T* under nvcc. Kernels take and use nothing else for global and shared
// memory, so that the emulator sees each access; locals and registers are as ever. Three habits make that work:
//   const float x = p[i];                          the type is written, never auto
//   const float4 v = as<const float4>(p)[i];       vectors are loaded whole, then taken apart
//   NSK_SHARED_ARRAY(float, partial, 32);          a static array; NSK_DYNAMIC_SHARED(bytes) names the dynamic one
//
// What is there beside __syncthreads, __syncwarp, __threadfence, shuffles, votes and atomics:
//   barrier_sync(id, count), barrier_arrive(id, count)            bar.sync, bar.arrive
//   cp_async<16>(to, from, valid)                                 `valid` bytes are copied, the rest is filled with 0
//   cp_async_commit(), cp_async_wait<N>(), cp_async_wait_all()
//   ldmatrix<transposed>(fragments, row), stmatrix                as many matrices as there are fragments: 1, 2, 4
//   mma<T>(d, a, b)                                               m16n8k16 for bf16 and f16, m16n8k8 for tf32
//   pack<T>(low, high), unpack<T>(bits), to_tf32(x)               rounding is to nearest
//   opaque(x)                                 x; what is computed from it is computed here, and not before the loop
//   exp2_approx, log2_approx, rcp_approx, rsqrt_approx, tanh_approx
// Only barriers, __syncwarp and fences order memory among threads; shuffles, votes, ldmatrix and mma do not.
#pragma once

#include "../common/numeric.h"

namespace nsk {

// An fp32 number of which the matrix units read the upper 19 bits.
struct tf32 {
  uint32_t bits;
};

}  // namespace nsk

#if defined(__CUDACC__)
#include "ptx.cuh"
#else
#include "../emu/device.h"
#endif

namespace nsk::cuda {

// Two neighbouring elements as they lie in memory: one word of a half type, two of tf32, whose numbers are rounded only
// where they become operands, by to_tf32.
template <class T>
using Pair = std::conditional_t<sizeof(T) == 2, uint32_t, uint2>;

template <class T>
__device__ __forceinline__ Pair<T> pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, tf32>)
    return {__float_as_uint(low), __float_as_uint(high)};
  else
    return pack<T>(low, high);
}
template <class T>
__device__ __forceinline__ float2 unpack_pair(Pair<T> bits) {
  if constexpr (std::is_same_v<T, tf32>)
    return {__uint_as_float(bits.x), __uint_as_float(bits.y)};
  else
    return unpack<T>(bits);
}

// Two neighbouring numbers as the matrix units will see them.
template <class T>
__device__ __forceinline__ Pair<T> operand_pair(float low, float high) {
  if constexpr (std::is_same_v<T, tf32>)
    return {to_tf32(low), to_tf32(high)};
  else
    return pack<T>(low, high);
}

// Words of operands that came as they lie in the user's memory.
template <class T>
__device__ __forceinline__ void round_operand(uint32_t (&fragments)[4]) {
  if constexpr (std::is_same_v<T, tf32>) {
#pragma unroll
    for (uint32_t& x : fragments) x = to_tf32(__uint_as_float(x));
  }
}

}  // namespace nsk::cuda
