// Gated attention's decode kernels for a device: every width of heads, and the options that are shortest of registers.
#include "../../csrc/cuda/gated_sdpa_decode.cuh"

namespace nsk::cuda {

#define NSK_DECODE(T, d, dv, softcap, mask) \
  template __global__ void gated_sdpa_decode<T, d, dv, softcap, Mask::mask>(const __grid_constant__ GatedSdpaDecode<T>)
NSK_DECODE(bf16, 64, 64, false, none);
NSK_DECODE(f16, 80, 80, false, boolean);
NSK_DECODE(bf16, 96, 96, true, none);
NSK_DECODE(bf16, 128, 128, false, none);
NSK_DECODE(f16, 128, 128, true, floating);
NSK_DECODE(bf16, 192, 128, false, none);
NSK_DECODE(f16, 192, 192, true, floating);
NSK_DECODE(bf16, 256, 256, false, none);
NSK_DECODE(f16, 256, 256, true, floating);

template __global__ void gated_sdpa_merge<bf16>(const __grid_constant__ GatedSdpaMerge<bf16>);
template __global__ void gated_sdpa_merge<f16>(const __grid_constant__ GatedSdpaMerge<f16>);

}  // namespace nsk::cuda
