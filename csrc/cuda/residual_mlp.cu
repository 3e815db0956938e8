// Residual MLPs through the C ABI: type and width choose the kernel.
#include "residual_mlp_launch.cuh"
#include "residual_mlp_table.cuh"

namespace nsk::cuda {

template <class F>
nsk_status with_type_and_width(int32_t weight, int64_t width, const F& f) {
  return BuiltWidths::find(width, [&]<int kWidth>() {
    switch (weight) {
      case NSK_BF16:
        return f.template operator()<bf16, kWidth>();
      case NSK_F16:
        return f.template operator()<f16, kWidth>();
      case NSK_F32:
        return f.template operator()<tf32, kWidth>();
      default:
        return NSK_BAD_ARGUMENT;
    }
  });
}
template <class F>
nsk_status with_network(const nsk_residual_mlp& a, const F& f) {
  return with_type_and_width(a.weight.dtype, a.width, f);
}

nsk_status residual_mlp_forward(const nsk_residual_mlp& a, const Launcher& launcher) {
  return with_network(a, [&]<class T, int kWidth>() { return start_forward<T, kWidth>(a, launcher); });
}

nsk_status residual_mlp_backward(const nsk_residual_mlp_backward& a, const Launcher& launcher, Scratch& scratch,
                                 bool counts) {
  return with_network(a.forward, [&]<class T, int kWidth>() {
    return start_backward<T, kWidth>(a, launcher, scratch, counts);
  });
}

int32_t residual_mlp_shared(int32_t width, int32_t weight) {
  int32_t shared = 0;
  with_type_and_width(weight, width, [&]<class T, int kWidth>() {
    shared = MlpBackwardTile<T, kWidth, 16>::kSharedBytes;  // tiles of 32 rows are taken where they fit
    return NSK_OK;
  });
  return shared;
}

const int32_t* residual_mlp_widths() { return BuiltWidths::kNumbers; }

}  // namespace nsk::cuda
