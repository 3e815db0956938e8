// The gradients of residual MLPs' weights and vectors for a device: all of them.
#include "../../csrc/cuda/residual_mlp_vector_gradient.cuh"
#include "../../csrc/cuda/residual_mlp_weight_gradient.cuh"

namespace nsk::cuda {

#define NSK_GRADIENTS(T, width)                                                                                       \
  template __global__ void residual_mlp_weight_gradient<T, width>(const __grid_constant__ MlpWeightGradientArgs<T>); \
  template __global__ void residual_mlp_vector_gradient<T, width>(const __grid_constant__ MlpVectorGradientArgs)
NSK_GRADIENTS(bf16, 64);
NSK_GRADIENTS(bf16, 128);
NSK_GRADIENTS(bf16, 256);
NSK_GRADIENTS(f16, 64);
NSK_GRADIENTS(f16, 128);
NSK_GRADIENTS(f16, 256);

}  // namespace nsk::cuda
