// Gated attention's backward for the query and its rows, for a device: every head dimension, with and without the
// options that take registers.
#include "../../csrc/cuda/gated_sdpa_dq.cuh"
#include "../../csrc/cuda/gated_sdpa_rows.cuh"

namespace nsk::cuda {

#define NSK_DQ(T, d, dv, softcap, mask) \
  template __global__ void gated_sdpa_dq<T, d, dv, softcap, Mask::mask>(const __grid_constant__ GatedSdpaBackward<T>)
#define NSK_DQ_OF(d, dv)               \
  NSK_DQ(bf16, d, dv, false, none);    \
  NSK_DQ(f16, d, dv, false, boolean);  \
  NSK_DQ(f16, d, dv, true, floating)
NSK_DQ_OF(64, 64);
NSK_DQ_OF(80, 80);
NSK_DQ_OF(96, 96);
NSK_DQ_OF(128, 128);
NSK_DQ_OF(192, 128);
NSK_DQ_OF(192, 192);
NSK_DQ_OF(256, 256);

template __global__ void gated_sdpa_rows<bf16>(const __grid_constant__ GatedSdpaBackward<bf16>, int);
template __global__ void gated_sdpa_rows<f16>(const __grid_constant__ GatedSdpaBackward<f16>, int);

}  // namespace nsk::cuda
