// Compiled once per instruction set, as kernels.cpp.
#include "residual_mlp.h"

#include "residual_mlp_backward_run.h"
#include "residual_mlp_forward_run.h"
#include "typed.h"

namespace nsk::NSK_ISA {

namespace {

// Whether floats are multiplied in three parts on the matrix unit (split.h): in whole tiles, and where so many rows share
// the weights that splitting them pays (measured). A call that keeps something for its backward has that before it, which
// gains more; a recomputed forward must take the same path, for the same bits.
bool splits(const nsk_residual_mlp& args) {
  constexpr int64_t kLeastRows = 65, kLeastRecordedRows = 48;
  const bool recorded = args.stream.data || args.normalised.data;
  return args.weight.dtype == NSK_F32 && args.width % kSplitTerms == 0 &&
         args.rows >= (recorded ? kLeastRecordedRows : kLeastRows);
}

}  // namespace

nsk_status residual_mlp_forward(const nsk_residual_mlp& args) {
  if constexpr (kHasMatrixUnit)
    if (splits(args)) return MlpForwardRun<float, float, bf16x3>::run(args);
  return run_typed<MlpForwardRun>(args.weight.dtype, args);
}

nsk_status residual_mlp_backward(const nsk_residual_mlp_backward& args) {
  if constexpr (kHasMatrixUnit)
    if (splits(args.forward)) return MlpBackwardRun<float, float, bf16x3>::run(args);
  return run_typed<MlpBackwardRun>(args.forward.weight.dtype, args);
}

}  // namespace nsk::NSK_ISA
