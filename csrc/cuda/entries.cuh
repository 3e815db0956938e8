// What the C ABI and the emulated backend call.
#pragma once

#include "launch.cuh"

namespace nsk::cuda {

// With `counts` nothing is started: the scratch has counted what it would take.
nsk_status gated_sdpa_forward(const nsk_gated_sdpa& args, const Launcher& launcher, Scratch& scratch, bool counts);
nsk_status gated_sdpa_backward(const nsk_gated_sdpa_backward& args, const Launcher& launcher, Scratch& scratch,
                               bool counts);
const int32_t* gated_sdpa_head_dims();  // pairs, of query and value; ends with 0

nsk_status residual_mlp_forward(const nsk_residual_mlp& args, const Launcher& launcher);
nsk_status residual_mlp_backward(const nsk_residual_mlp_backward& args, const Launcher& launcher, Scratch& scratch,
                                 bool counts);
int32_t residual_mlp_shared(int32_t width, int32_t weight);  // bytes that a block needs at least, by weight's type
const int32_t* residual_mlp_widths();

}  // namespace nsk::cuda
