// From the storage type that a call names to the types that its kernels are made for.
#pragma once

#include "simd.h"

namespace nsk::NSK_ISA {

// What products of bf16 multiply: bf16 itself where the processor does.
#if defined(__AVX512BF16__) || defined(NSK_EMULATE_BF16_DOT)
using Bf16Element = bf16;
#else
using Bf16Element = float;
#endif

// Run<storage, compute, element>
template <template <class, class, class> class Run, class A>
nsk_status run_typed(int32_t dtype, const A& args) {
  switch (dtype) {
    case NSK_F32: return Run<float, float, float>::run(args);
    case NSK_F64: return Run<double, double, double>::run(args);
    case NSK_BF16: return Run<bf16, float, Bf16Element>::run(args);
    case NSK_F16: return Run<f16, float, float>::run(args);
    default: return NSK_BAD_ARGUMENT;
  }
}

}  // namespace nsk::NSK_ISA
