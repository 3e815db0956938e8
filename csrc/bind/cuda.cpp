#include "cuda.h"

#include "cuda_calls.h"

namespace {

struct Calls {
  static const int32_t* head_dims() { return nsk_cuda_head_dims(); }
  static const int32_t* widths() { return nsk_cuda_widths(); }
  static int32_t residual_mlp_shared(int32_t width, int32_t weight) {
    return nsk_cuda_residual_mlp_shared(width, weight);
  }
  static int64_t gated_sdpa_forward_scratch(const nsk_gated_sdpa& args, const nsk_cuda_device& device) {
    return nsk_cuda_gated_sdpa_forward_scratch(&args, &device);
  }
  static nsk_status gated_sdpa_forward(const nsk_gated_sdpa& args, const nsk_cuda_device& device, void* scratch) {
    return nsk_cuda_gated_sdpa_forward(&args, &device, scratch);
  }
  static int64_t gated_sdpa_backward_scratch(const nsk_gated_sdpa_backward& args, const nsk_cuda_device& device) {
    return nsk_cuda_gated_sdpa_backward_scratch(&args, &device);
  }
  static nsk_status gated_sdpa_backward(const nsk_gated_sdpa_backward& args, const nsk_cuda_device& device,
                                        void* scratch) {
    return nsk_cuda_gated_sdpa_backward(&args, &device, scratch);
  }
  static nsk_status residual_mlp_forward(const nsk_residual_mlp& args, const nsk_cuda_device& device) {
    return nsk_cuda_residual_mlp_forward(&args, &device);
  }
  static int64_t residual_mlp_backward_scratch(const nsk_residual_mlp_backward& args, const nsk_cuda_device& device) {
    return nsk_cuda_residual_mlp_backward_scratch(&args, &device);
  }
  static nsk_status residual_mlp_backward(const nsk_residual_mlp_backward& args, const nsk_cuda_device& device,
                                          void* scratch) {
    return nsk_cuda_residual_mlp_backward(&args, &device, scratch);
  }
};

}  // namespace

void nsk::bind::define_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels behind raw pointers. See csrc/include/nsk.h.");
  py::class_<nsk_cuda_device>(cuda, "Device", py::module_local())
      .def(py::init([](uintptr_t stream, int multiprocessors, int shared_bytes) {
        return nsk_cuda_device{reinterpret_cast<void*>(stream), multiprocessors, shared_bytes};
      }));
  cuda.def("architectures", [] { return std::string(nsk_cuda_architectures()); });
  cuda.def("failure", [] { return std::string(nsk_cuda_failure()); }, "What the last launch that failed was, and why.");
  define_cuda_calls<Calls, nsk_cuda_device>(cuda);
}
