// Gated attention's norm and mask gradient kernels for a device: every width of heads, with what takes most registers.
#include "../../csrc/cuda/gated_sdpa_mask_grad.cuh"
#include "../../csrc/cuda/gated_sdpa_norm.cuh"

namespace nsk::cuda {

#define NSK_MASK_GRAD(T, d, dv, softcap)                           \
  template __global__ void gated_sdpa_mask_grad<T, d, dv, softcap>( \
      const __grid_constant__ GatedSdpaBackward<T>)
NSK_MASK_GRAD(bf16, 64, 64, false);
NSK_MASK_GRAD(f16, 80, 80, true);
NSK_MASK_GRAD(bf16, 96, 96, true);
NSK_MASK_GRAD(bf16, 128, 128, true);
NSK_MASK_GRAD(f16, 192, 192, true);
NSK_MASK_GRAD(bf16, 192, 128, true);
NSK_MASK_GRAD(f16, 256, 256, true);

#define NSK_NORM(T, d, softcap) \
  template __global__ void gated_sdpa_norm<T, d, softcap>(const __grid_constant__ GatedSdpaBackward<T>)
NSK_NORM(bf16, 64, false);
NSK_NORM(f16, 80, true);
NSK_NORM(bf16, 96, true);
NSK_NORM(bf16, 128, true);
NSK_NORM(f16, 192, true);
NSK_NORM(f16, 256, true);

}  // namespace nsk::cuda
