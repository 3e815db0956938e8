// The C ABI's functions, and what is known of the last failure.
#include <cstdio>

#include "entries.cuh"

namespace nsk::cuda {

static thread_local char failure[256] = "";

void remember_failure(const char* kernel, const Grid& grid, int threads, int shared, cudaError_t error) {
  std::snprintf(failure, sizeof failure, "%s on a grid of %lld x %lld x %lld blocks of %d threads with %d bytes: %s",
                kernel, static_cast<long long>(grid.x), static_cast<long long>(grid.y),
                static_cast<long long>(grid.z), threads, shared, cudaGetErrorString(error));
}

}  // namespace nsk::cuda

using namespace nsk::cuda;

template <class F>
static int64_t count(const F& call) {
  Scratch scratch(nullptr);
  call(scratch);
  return scratch.bytes();
}

extern "C" {

const char* nsk_cuda_failure(void) { return failure; }
const char* nsk_cuda_architectures(void) { return NSK_CUDA_ARCHITECTURES; }

const int32_t* nsk_cuda_head_dims(void) { return gated_sdpa_head_dims(); }
const int32_t* nsk_cuda_widths(void) { return residual_mlp_widths(); }
int32_t nsk_cuda_residual_mlp_shared(int32_t width, int32_t weight) { return residual_mlp_shared(width, weight); }

int64_t nsk_cuda_gated_sdpa_forward_scratch(const nsk_gated_sdpa* args, const nsk_cuda_device* device) {
  return count([&](Scratch& scratch) { gated_sdpa_forward(*args, Launcher{*device}, scratch, true); });
}
nsk_status nsk_cuda_gated_sdpa_forward(const nsk_gated_sdpa* args, const nsk_cuda_device* device, void* buffer) {
  Scratch scratch(buffer);
  return gated_sdpa_forward(*args, Launcher{*device}, scratch, false);
}
int64_t nsk_cuda_gated_sdpa_backward_scratch(const nsk_gated_sdpa_backward* args, const nsk_cuda_device* device) {
  return count([&](Scratch& scratch) { gated_sdpa_backward(*args, Launcher{*device}, scratch, true); });
}
nsk_status nsk_cuda_gated_sdpa_backward(const nsk_gated_sdpa_backward* args, const nsk_cuda_device* device,
                                        void* buffer) {
  Scratch scratch(buffer);
  return gated_sdpa_backward(*args, Launcher{*device}, scratch, false);
}

nsk_status nsk_cuda_residual_mlp_forward(const nsk_residual_mlp* args, const nsk_cuda_device* device) {
  return residual_mlp_forward(*args, Launcher{*device});
}
int64_t nsk_cuda_residual_mlp_backward_scratch(const nsk_residual_mlp_backward* args, const nsk_cuda_device* device) {
  return count([&](Scratch& scratch) { residual_mlp_backward(*args, Launcher{*device}, scratch, true); });
}
nsk_status nsk_cuda_residual_mlp_backward(const nsk_residual_mlp_backward* args, const nsk_cuda_device* device,
                                          void* buffer) {
  Scratch scratch(buffer);
  return residual_mlp_backward(*args, Launcher{*device}, scratch, false);
}

}  // extern "C"
