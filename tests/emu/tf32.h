// Numbers as TF32 has them, 10 bits behind the point, between the host's types and tf32.
#pragma once

#include "../../csrc/cuda/device.cuh"

namespace nsk {

inline float to_float(tf32 x) { return __uint_as_float(x.bits); }
template <>
inline tf32 from_float<tf32>(double x) {
  return {cuda::to_tf32(float(x))};
}

}  // namespace nsk
