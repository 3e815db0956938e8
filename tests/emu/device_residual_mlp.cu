// The forward of residual MLPs for a device: every width, and both tiles.
#include "../../csrc/cuda/residual_mlp_forward.cuh"

namespace nsk::cuda {

#define NSK_FORWARD(T, width, rows, activation)                                         \
  template __global__ void residual_mlp_forward<T, width, rows, Activation::activation>( \
      const __grid_constant__ MlpForwardArgs<T>)
NSK_FORWARD(bf16, 64, 16, silu);
NSK_FORWARD(bf16, 64, 32, silu);
NSK_FORWARD(bf16, 128, 16, silu);
NSK_FORWARD(bf16, 128, 32, silu);
NSK_FORWARD(bf16, 256, 16, silu);
NSK_FORWARD(bf16, 256, 32, silu);
NSK_FORWARD(bf16, 256, 32, relu);
NSK_FORWARD(bf16, 256, 32, gelu_tanh);
NSK_FORWARD(f16, 256, 16, gelu_tanh);
NSK_FORWARD(f16, 256, 32, silu);

}  // namespace nsk::cuda
