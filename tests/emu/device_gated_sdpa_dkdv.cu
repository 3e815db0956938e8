// The gradients of keys and values for a device: the shapes and options that are shortest of registers, and some more.
#include "../../csrc/cuda/gated_sdpa_dkdv.cuh"

namespace nsk::cuda {

#define NSK_DKDV(T, d, dv, softcap, mask, wanted)                                         \
  template __global__ void gated_sdpa_dkdv<T, d, dv, softcap, Mask::mask, Wanted::wanted>( \
      const __grid_constant__ GatedSdpaBackward<T>)
NSK_DKDV(bf16, 64, 64, false, none, both);
NSK_DKDV(f16, 64, 64, true, floating, both);
NSK_DKDV(f16, 80, 80, true, floating, both);
NSK_DKDV(f16, 80, 80, true, floating, key);
NSK_DKDV(bf16, 96, 96, true, boolean, both);
NSK_DKDV(bf16, 128, 128, false, none, both);
NSK_DKDV(f16, 128, 128, false, boolean, both);
NSK_DKDV(f16, 128, 128, true, floating, both);
NSK_DKDV(bf16, 128, 128, false, boolean, value);
NSK_DKDV(bf16, 192, 128, false, none, both);
NSK_DKDV(f16, 192, 128, true, floating, both);
NSK_DKDV(bf16, 192, 192, false, none, key);
NSK_DKDV(f16, 192, 192, true, boolean, key);
NSK_DKDV(f16, 192, 192, true, floating, value);
NSK_DKDV(bf16, 256, 256, false, none, key);
NSK_DKDV(f16, 256, 256, true, boolean, key);
NSK_DKDV(bf16, 256, 256, false, none, value);
NSK_DKDV(f16, 256, 256, true, floating, value);

}  // namespace nsk::cuda
