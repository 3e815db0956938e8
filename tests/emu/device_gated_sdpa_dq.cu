// Gated attention's backward for the query and its rows, for a device: all head dimensions with the options that are
// shortest of registers.
#include "../../csrc/cuda/gated_sdpa_dq.cuh"
#include "../../csrc/cuda/gated_sdpa_rows.cuh"

namespace nsk::cuda {

#define NSK_DQ(T, d, dv, softcap, mask) \
  template __global__ void gated_sdpa_dq<T, d, dv, softcap, Mask::mask>(const __grid_constant__ GatedSdpaBackward<T>)
NSK_DQ(bf16, 64, 64, false, none);
NSK_DQ(f16, 64, 64, true, floating);
NSK_DQ(bf16, 80, 80, true, floating);
NSK_DQ(f16, 96, 96, true, floating);
NSK_DQ(bf16, 128, 128, false, none);
NSK_DQ(f16, 128, 128, true, floating);
NSK_DQ(bf16, 192, 128, true, floating);
NSK_DQ(f16, 192, 192, true, floating);
NSK_DQ(bf16, 256, 256, false, none);
NSK_DQ(f16, 256, 256, true, floating);

template __global__ void gated_sdpa_rows<bf16>(const __grid_constant__ GatedSdpaBackward<bf16>, int);
template __global__ void gated_sdpa_rows<f16>(const __grid_constant__ GatedSdpaBackward<f16>, int);

}  // namespace nsk::cuda
