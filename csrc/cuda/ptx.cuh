// nvcc's half of device.cuh, which says what these mean: PTX instructions, one a function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#define NSK_SHARED_ARRAY(T, name, count) alignas(16) __shared__ T name[count]
#define NSK_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace nsk::cuda {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

template <class U, class T>
__device__ __forceinline__ U* as(T* p) {
  return reinterpret_cast<U*>(p);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ void barrier_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Copies of 16 bytes pass by the first-level cache: what is copied to shared memory is not read from global again.
template <int kBytes, class T, class U>
__device__ __forceinline__ void cp_async(T* to, U* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const size_t source = __cvta_generic_to_global(from);
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(source), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(source), "n"(kBytes),
                 "r"(valid)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#define NSK_LDMATRIX(suffix)                                                                  \
  if constexpr (kCount == 1)                                                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" suffix ".shared.b16 {%0}, [%1];"             \
                 : "=r"(f[0])                                                                 \
                 : "r"(address)                                                               \
                 : "memory");                                                                 \
  else if constexpr (kCount == 2)                                                             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" suffix ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(f[0]), "=r"(f[1])                                                     \
                 : "r"(address)                                                               \
                 : "memory");                                                                 \
  else                                                                                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" suffix ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])                             \
                 : "r"(address)                                                               \
                 : "memory")

template <bool kTransposed = false, int kCount, class T>
__device__ __forceinline__ void ldmatrix(uint32_t (&f)[kCount], T* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const uint32_t address = shared_address(row);
  if constexpr (kTransposed) {
    NSK_LDMATRIX(".trans");
  } else {
    NSK_LDMATRIX("");
  }
}
#undef NSK_LDMATRIX

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define NSK_STMATRIX(suffix)                                                                                     \
  if constexpr (kCount == 1)                                                                                     \
    asm volatile("stmatrix.sync.aligned.m8n8.x1" suffix ".shared.b16 [%0], {%1};" ::"r"(address), "r"(f[0])      \
                 : "memory");                                                                                    \
  else if constexpr (kCount == 2)                                                                                \
    asm volatile("stmatrix.sync.aligned.m8n8.x2" suffix ".shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(f[0]), \
                 "r"(f[1])                                                                                       \
                 : "memory");                                                                                    \
  else                                                                                                           \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" suffix ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),    \
                 "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3])                                                      \
                 : "memory")

template <bool kTransposed = false, int kCount, class T>
__device__ __forceinline__ void stmatrix(const uint32_t (&f)[kCount], T* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const uint32_t address = shared_address(row);
  if constexpr (kTransposed) {
    NSK_STMATRIX(".trans");
  } else {
    NSK_STMATRIX("");
  }
}
#undef NSK_STMATRIX
#else
// Before sm_90 there is no such instruction: each lane gets the addresses of its elements' rows and stores them itself.
template <bool kTransposed = false, int kCount, class T>
__device__ __forceinline__ void stmatrix(const uint32_t (&f)[kCount], T* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const uint32_t mine = shared_address(row);
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kTransposed) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t address = __shfl_sync(0xffffffffu, mine, 8 * i + lane % 4 * 2 + half) + lane / 4 * 2;
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(uint16_t(f[i] >> 16 * half)) : "memory");
      }
    } else {
      const uint32_t address = __shfl_sync(0xffffffffu, mine, 8 * i + lane / 4) + lane % 4 * 4;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(f[i]) : "memory");
    }
  }
}
#endif

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define NSK_MMA(shape, type)                                                          \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16> || std::is_same_v<T, tf32>);
  if constexpr (std::is_same_v<T, bf16>)
    NSK_MMA("m16n8k16", "bf16");
  else if constexpr (std::is_same_v<T, f16>)
    NSK_MMA("m16n8k16", "f16");
  else
    NSK_MMA("m16n8k8", "tf32");
#undef NSK_MMA
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  float2 values;
  if constexpr (std::is_same_v<T, bf16>)
    values.x = __uint_as_float(bits << 16), values.y = __uint_as_float(bits & 0xffff0000u);
  else
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(values.x), "=f"(values.y)
        : "r"(bits));
  return values;
}
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

#define NSK_UNARY(name, instruction)                    \
  __device__ __forceinline__ float name(float x) {      \
    float y;                                            \
    asm(instruction ".f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                           \
  }
NSK_UNARY(exp2_approx, "ex2.approx.ftz")
NSK_UNARY(log2_approx, "lg2.approx.ftz")
NSK_UNARY(rcp_approx, "rcp.approx.ftz")
NSK_UNARY(rsqrt_approx, "rsqrt.approx.ftz")
NSK_UNARY(tanh_approx, "tanh.approx")
#undef NSK_UNARY

}  // namespace nsk::cuda
