// The kernels of one instruction set, as a table. kernels.cpp fills one per instruction set; dispatch.cpp picks.
#pragma once

#include "../include/nsk.h"

namespace nsk {

struct Kernels {
  const char* name;
  bool bf16_dot;
  nsk_status (*gated_sdpa_forward)(const nsk_gated_sdpa&);
  nsk_status (*gated_sdpa_backward)(const nsk_gated_sdpa_backward&);
  nsk_status (*residual_mlp_forward)(const nsk_residual_mlp&);
  nsk_status (*residual_mlp_backward)(const nsk_residual_mlp_backward&);
  double (*measure_fma)(int32_t dtype, int32_t threads, double seconds);
  double (*measure_read)(const void* buffer, int64_t bytes, int32_t threads, double seconds);
};

// Those of a named instruction set, or of the best (null), if this processor can run them; else null.
const Kernels* find_kernels(const char* name);

}  // namespace nsk
