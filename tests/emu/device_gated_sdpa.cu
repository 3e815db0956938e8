// Gated attention's forward kernel for a device: the shapes and options that are shortest of registers, and some more.
#include "../../csrc/cuda/gated_sdpa_forward.cuh"

namespace nsk::cuda {

#define NSK_FORWARD(T, d, dv, softcap, mask) \
  template __global__ void gated_sdpa_forward<T, d, dv, softcap, Mask::mask>(const __grid_constant__ GatedSdpa<T>)
NSK_FORWARD(bf16, 64, 64, false, none);
NSK_FORWARD(bf16, 128, 128, false, none);
NSK_FORWARD(f16, 80, 80, false, boolean);
NSK_FORWARD(bf16, 96, 96, true, floating);
NSK_FORWARD(bf16, 64, 128, false, floating);
NSK_FORWARD(f16, 128, 128, true, floating);
NSK_FORWARD(bf16, 192, 128, false, boolean);
NSK_FORWARD(f16, 192, 192, true, floating);
NSK_FORWARD(bf16, 256, 256, false, none);
NSK_FORWARD(f16, 256, 256, true, floating);

}  // namespace nsk::cuda
