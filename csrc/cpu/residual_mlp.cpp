// Compiled once per instruction set, as kernels.cpp.
#include "residual_mlp.h"

#include "residual_mlp_backward_run.h"
#include "residual_mlp_forward_run.h"
#include "typed.h"

namespace nsk::NSK_ISA {

nsk_status residual_mlp_forward(const nsk_residual_mlp& args) {
  return run_typed<MlpForwardRun>(args.weight.dtype, args);
}

nsk_status residual_mlp_backward(const nsk_residual_mlp_backward& args) {
  return run_typed<MlpBackwardRun>(args.forward.weight.dtype, args);
}

}  // namespace nsk::NSK_ISA
