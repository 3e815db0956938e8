// Compiled once per instruction set: NSK_ISA names the namespace and the table, the compiler's flags do the rest.
#include "kernels.h"

#include "gated_sdpa_backward_run.h"
#include "gated_sdpa_forward_run.h"
#include "roofs.h"

#define NSK_STRING_(x) #x
#define NSK_STRING(x) NSK_STRING_(x)

namespace nsk::NSK_ISA {

#if defined(__AVX512BF16__) || defined(NSK_EMULATE_BF16_DOT)
using Bf16Element = bf16;
#else
using Bf16Element = float;
#endif

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

extern const Kernels kernels;
const Kernels kernels = {
    NSK_STRING(NSK_ISA),
    sizeof(Bf16Element) == 2,
    [](const nsk_gated_sdpa& args) { return run_typed<ForwardRun>(args.query.dtype, args); },
    [](const nsk_gated_sdpa_backward& args) { return run_typed<BackwardRun>(args.forward.query.dtype, args); },
    measure_fma,
    measure_read,
};

}  // namespace nsk::NSK_ISA
