// Gated attention's forward kernel for a device: the shapes and options that registers are short of.
#include "../../csrc/cuda/gated_sdpa_forward.cuh"

namespace nsk::cuda {

template __global__ void gated_sdpa_forward<bf16, 64, 64, false, Mask::none>(const __grid_constant__ GatedSdpa<bf16>);
template __global__ void gated_sdpa_forward<bf16, 128, 128, false, Mask::none>(const __grid_constant__ GatedSdpa<bf16>);

}  // namespace nsk::cuda
