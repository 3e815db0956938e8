// The native module: the C ABI for Python. What arrives is in arguments.h.
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "cuda.h"

namespace py = pybind11;
using namespace nsk::bind;

namespace {

int forward(std::array<int64_t, 7> sizes, std::array<Tensor, 8> tensors, std::array<uintptr_t, 2> cu_seqlens,
            std::array<int64_t, 6> options, std::array<double, 2> scale) {
  const nsk_gated_sdpa args = Problem{sizes, tensors, cu_seqlens, options, scale}.args();
  py::gil_scoped_release release;
  return nsk_cpu_gated_sdpa_forward(&args);
}

int backward(std::array<int64_t, 7> sizes, std::array<Tensor, 8> tensors, std::array<uintptr_t, 2> cu_seqlens,
             std::array<int64_t, 6> options, std::array<double, 2> scale, Gradients gradients,
             std::array<int64_t, 4> mask_size) {
  const nsk_gated_sdpa_backward args =
      backward_args({sizes, tensors, cu_seqlens, options, scale}, gradients, mask_size);
  py::gil_scoped_release release;
  return nsk_cpu_gated_sdpa_backward(&args);
}

int mlp_forward(MlpSizes sizes, MlpTensors tensors, MlpOptions options, double eps) {
  const nsk_residual_mlp args = mlp_args(sizes, tensors, options, eps);
  py::gil_scoped_release release;
  return nsk_cpu_residual_mlp_forward(&args);
}

int mlp_backward(MlpSizes sizes, MlpTensors tensors, MlpOptions options, double eps, MlpGradients gradients) {
  const nsk_residual_mlp_backward args = mlp_backward_args(mlp_args(sizes, tensors, options, eps), gradients);
  py::gil_scoped_release release;
  return nsk_cpu_residual_mlp_backward(&args);
}

int32_t dtype_code(const std::string& name) {
  if (name == "float32") return NSK_F32;
  if (name == "float64") return NSK_F64;
  if (name == "bfloat16") return NSK_BF16;
  if (name == "float16") return NSK_F16;
  throw std::invalid_argument("dtype: got '" + name + "', expected float32, float64, bfloat16 or float16");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The native core of nsk: CPU kernels behind raw pointers. See csrc/include/nsk.h.";
  m.attr("OK") = int(NSK_OK);
  m.attr("OUT_OF_MEMORY") = int(NSK_OUT_OF_MEMORY);
  m.attr("BAD_CU_SEQLENS_Q") = int(NSK_BAD_CU_SEQLENS_Q);
  m.attr("BAD_CU_SEQLENS_K") = int(NSK_BAD_CU_SEQLENS_K);
  m.attr("DTYPES") = std::vector<std::string>{"float32", "float64", "bfloat16", "float16", "bool"};

  m.attr("LAUNCH_FAILED") = int(NSK_LAUNCH_FAILED);
  m.def("gated_sdpa_forward", &forward);
  m.def("gated_sdpa_backward", &backward);
  m.def("residual_mlp_forward", &mlp_forward);
  m.def("residual_mlp_backward", &mlp_backward);

  m.def("use_large_pages", [](uintptr_t data, int64_t bytes) {
    nsk_use_large_pages(reinterpret_cast<void*>(data), bytes);
  }, "For memory that was just allocated: large pages where they fit.");
  m.attr("LEAST_FOR_LARGE_PAGES") = int64_t(NSK_LEAST_FOR_LARGE_PAGES);

  m.def("isas", [] {
    std::vector<std::string> names;
    for (int i = 0; const char* name = nsk_cpu_isa_name(i); ++i) names.push_back(name);
    return names;
  }, "Instruction sets usable on this processor, best first.");
  m.def("isa", [] { return std::string(nsk_cpu_isa()); }, "The instruction set in use.");
  m.def("set_isa", [](const std::string& name) {
    if (!nsk_cpu_set_isa(name.c_str())) throw std::invalid_argument("isa: '" + name + "' is not usable here");
  }, "Switches the instruction set for the whole process; not while kernels run.");
  m.def("has_bf16_dot", [] { return nsk_cpu_has_bf16_dot() != 0; });
  m.def("compiler", [] { return std::string(__VERSION__); });

  m.def("measure_fma", [](const std::string& dtype, int threads, double seconds) {
    const int32_t code = dtype_code(dtype);
    py::gil_scoped_release release;
    return nsk_cpu_measure_fma(code, threads, seconds);
  }, py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
     "Multiply-adds in registers, GFLOP/s; 0 if the processor has none for this type.");
  m.def("measure_read", [](uintptr_t buffer, int64_t bytes, int threads, double seconds) {
    if (bytes < 4096 * int64_t(threads)) throw std::invalid_argument("bytes: at least 4096 a thread");
    py::gil_scoped_release release;
    return nsk_cpu_measure_read(reinterpret_cast<const char*>(buffer), bytes, threads, seconds);
  }, py::arg("buffer"), py::arg("bytes"), py::arg("threads"), py::arg("seconds"), "Reading this memory, GB/s.");

  define_cuda(m);
}
