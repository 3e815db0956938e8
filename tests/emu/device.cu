// The very kernels that the emulator runs, for a device.
#include "gemm.cuh"
#include "kernels.cuh"
#include "vocabulary.cuh"

namespace nsk::test {

#define NSK_GEMM(T, transposed)                                                          \
  template __global__ void gemm<T, transposed>(GemmShape, const GemmTraits<T>::Element*, \
                                               const GemmTraits<T>::Element*, float*)
NSK_GEMM(bf16, false);
NSK_GEMM(bf16, true);
NSK_GEMM(f16, false);
NSK_GEMM(f16, true);
NSK_GEMM(tf32, false);

}  // namespace nsk::test
