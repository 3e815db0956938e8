// Compiled once per instruction set: NSK_ISA names the namespace and the table, the compiler's flags do the rest.
#include "kernels.h"

#include "gated_sdpa_backward_run.h"
#include "gated_sdpa_forward_run.h"
#include "residual_mlp.h"
#include "roofs.h"
#include "typed.h"

#define NSK_STRING_(x) #x
#define NSK_STRING(x) NSK_STRING_(x)

namespace nsk::NSK_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    NSK_STRING(NSK_ISA),
    sizeof(Bf16Element) == 2,
    [](const nsk_gated_sdpa& args) { return run_typed<ForwardRun>(args.query.dtype, args); },
    [](const nsk_gated_sdpa_backward& args) { return run_typed<BackwardRun>(args.forward.query.dtype, args); },
    residual_mlp_forward,
    residual_mlp_backward,
    measure_fma,
    measure_read,
};

}  // namespace nsk::NSK_ISA
