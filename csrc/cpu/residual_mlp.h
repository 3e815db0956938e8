// Residual MLPs on one instruction set. Kernels of their own translation unit, so that builds run side by side.
#pragma once

#include "../include/nsk.h"

namespace nsk::NSK_ISA {

nsk_status residual_mlp_forward(const nsk_residual_mlp& args);
nsk_status residual_mlp_backward(const nsk_residual_mlp_backward& args);

}  // namespace nsk::NSK_ISA
