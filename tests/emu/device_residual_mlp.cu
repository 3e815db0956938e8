// The forward of residual MLPs for a device: all of it.
#include "../../csrc/cuda/residual_mlp_forward.cuh"

namespace nsk::cuda {

#define NSK_FORWARD(T, width, rows, activation)                                         \
  template __global__ void residual_mlp_forward<T, width, rows, Activation::activation>( \
      const __grid_constant__ MlpForwardArgs<T>)
#define NSK_FORWARDS(T, width, rows)   \
  NSK_FORWARD(T, width, rows, silu);   \
  NSK_FORWARD(T, width, rows, relu);   \
  NSK_FORWARD(T, width, rows, gelu_tanh)
NSK_FORWARDS(bf16, 64, 16);
NSK_FORWARDS(bf16, 64, 32);
NSK_FORWARDS(bf16, 128, 16);
NSK_FORWARDS(bf16, 128, 32);
NSK_FORWARDS(bf16, 256, 16);
NSK_FORWARDS(bf16, 256, 32);
NSK_FORWARDS(f16, 64, 16);
NSK_FORWARDS(f16, 64, 32);
NSK_FORWARDS(f16, 128, 16);
NSK_FORWARDS(f16, 128, 32);
NSK_FORWARDS(f16, 256, 16);
NSK_FORWARDS(f16, 256, 32);

}  // namespace nsk::cuda
