// The backward of residual MLPs for a device: all of it.
#include "../../csrc/cuda/residual_mlp_backward.cuh"

namespace nsk::cuda {

#define NSK_BACKWARD(T, width, rows, activation)                                         \
  template __global__ void residual_mlp_backward<T, width, rows, Activation::activation>( \
      const __grid_constant__ MlpBackwardArgs<T>)
#define NSK_BACKWARDS(T, width, rows)   \
  NSK_BACKWARD(T, width, rows, silu);   \
  NSK_BACKWARD(T, width, rows, relu);   \
  NSK_BACKWARD(T, width, rows, gelu_tanh)
NSK_BACKWARDS(bf16, 64, 16);
NSK_BACKWARDS(bf16, 64, 32);
NSK_BACKWARDS(bf16, 128, 16);
NSK_BACKWARDS(bf16, 128, 32);
NSK_BACKWARDS(bf16, 256, 16);
NSK_BACKWARDS(bf16, 256, 32);
NSK_BACKWARDS(f16, 64, 16);
NSK_BACKWARDS(f16, 64, 32);
NSK_BACKWARDS(f16, 128, 16);
NSK_BACKWARDS(f16, 128, 32);
NSK_BACKWARDS(f16, 256, 16);
NSK_BACKWARDS(f16, 256, 32);

}  // namespace nsk::cuda
