// Gated attention through the C ABI: type and head dimensions choose the kernel.
#include "gated_sdpa_launch.cuh"
#include "gated_sdpa_table.cuh"

namespace nsk::cuda {

template <class F>
nsk_status with_heads(const nsk_gated_sdpa& a, const F& f) {
  return BuiltHeadDims::find(a.head_dim, a.head_dim_v, [&]<class Dims>() {
    switch (a.query.dtype) {
      case NSK_BF16:
        return f.template operator()<bf16, Dims>();
      case NSK_F16:
        return f.template operator()<f16, Dims>();
      default:
        return NSK_BAD_ARGUMENT;
    }
  });
}

nsk_status gated_sdpa_forward(const nsk_gated_sdpa& a, const Launcher& launcher) {
  return with_heads(a, [&]<class T, class Dims>() {
    return start_forward<T, Dims>(problem_of<T>(a), mask_of(a), launcher);
  });
}

const int32_t* gated_sdpa_head_dims() { return kBuiltHeadDims; }

}  // namespace nsk::cuda
