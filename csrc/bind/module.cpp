// Raw pointers in, status out. A tensor arrives as (data pointer, dtype, strides of [batch, head, row, column]), or
// None; nsk.backends.cpu makes them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "nsk.h"

namespace py = pybind11;

namespace {

using Tensor = std::optional<std::tuple<uintptr_t, int32_t, std::array<int64_t, 4>>>;

nsk_view view(const Tensor& tensor) {
  nsk_view v{};
  if (tensor) {
    v.data = reinterpret_cast<void*>(std::get<0>(*tensor));
    v.dtype = std::get<1>(*tensor);
    const auto& stride = std::get<2>(*tensor);
    std::copy(stride.begin(), stride.end(), v.stride);
  }
  return v;
}

// What forward and backward take alike.
struct Problem {
  std::array<int64_t, 7> sizes;  // batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
  std::array<Tensor, 8> tensors; // query, key, value, gate, mask, sink, out, lse
  std::array<uintptr_t, 2> cu_seqlens;
  std::array<int64_t, 6> options;  // window_left, window_right, is_causal, bottom_right, gate_kind, threads
  std::array<double, 2> scale;     // scale, softcap

  nsk_gated_sdpa args() const {
    nsk_gated_sdpa a{};
    a.batch = sizes[0];
    a.heads_q = sizes[1];
    a.heads_kv = sizes[2];
    a.seqlen_q = sizes[3];
    a.seqlen_k = sizes[4];
    a.head_dim = sizes[5];
    a.head_dim_v = sizes[6];
    nsk_view* const views[] = {&a.query, &a.key, &a.value, &a.gate, &a.mask, &a.sink, &a.out, &a.lse};
    for (size_t i = 0; i < tensors.size(); ++i) *views[i] = view(tensors[i]);
    a.cu_seqlens_q = reinterpret_cast<const int32_t*>(cu_seqlens[0]);
    a.cu_seqlens_k = reinterpret_cast<const int32_t*>(cu_seqlens[1]);
    a.window_left = options[0];
    a.window_right = options[1];
    a.is_causal = int32_t(options[2]);
    a.bottom_right = int32_t(options[3]);
    a.gate_kind = int32_t(options[4]);
    a.threads = int32_t(options[5]);
    a.scale = scale[0];
    a.softcap = scale[1];
    return a;
  }
};

int forward(std::array<int64_t, 7> sizes, std::array<Tensor, 8> tensors, std::array<uintptr_t, 2> cu_seqlens,
            std::array<int64_t, 6> options, std::array<double, 2> scale) {
  const nsk_gated_sdpa args = Problem{sizes, tensors, cu_seqlens, options, scale}.args();
  py::gil_scoped_release release;
  return nsk_cpu_gated_sdpa_forward(&args);
}

// gradients: grad_out, grad_lse, then those of query, key, value, gate, mask, sink.
int backward(std::array<int64_t, 7> sizes, std::array<Tensor, 8> tensors, std::array<uintptr_t, 2> cu_seqlens,
             std::array<int64_t, 6> options, std::array<double, 2> scale, std::array<Tensor, 8> gradients,
             std::array<int64_t, 4> mask_size) {
  nsk_gated_sdpa_backward args{};
  args.forward = Problem{sizes, tensors, cu_seqlens, options, scale}.args();
  nsk_view* const views[] = {&args.grad_out,   &args.grad_lse,  &args.grad_query, &args.grad_key,
                             &args.grad_value, &args.grad_gate, &args.grad_mask,  &args.grad_sink};
  for (size_t i = 0; i < gradients.size(); ++i) *views[i] = view(gradients[i]);
  std::copy(mask_size.begin(), mask_size.end(), args.mask_size);
  py::gil_scoped_release release;
  return nsk_cpu_gated_sdpa_backward(&args);
}

using MlpSizes = std::array<int64_t, 5>;    // groups, rows, width, depth, layers_per_block
using MlpTensors = std::array<Tensor, 9>;   // x, weight, bias, ln_weight, ln_bias, y, stream, normalised, rstd
using MlpOptions = std::array<int32_t, 2>;  // activation, threads

nsk_residual_mlp mlp_args(const MlpSizes& sizes, const MlpTensors& tensors, const MlpOptions& options, double eps) {
  nsk_residual_mlp a{};
  a.groups = sizes[0];
  a.rows = sizes[1];
  a.width = sizes[2];
  a.depth = sizes[3];
  a.layers_per_block = sizes[4];
  nsk_view* const views[] = {&a.x, &a.weight, &a.bias,       &a.ln_weight, &a.ln_bias,
                             &a.y, &a.stream, &a.normalised, &a.rstd};
  for (size_t i = 0; i < tensors.size(); ++i) *views[i] = view(tensors[i]);
  a.activation = options[0];
  a.threads = options[1];
  a.eps = eps;
  return a;
}

int mlp_forward(MlpSizes sizes, MlpTensors tensors, MlpOptions options, double eps) {
  const nsk_residual_mlp args = mlp_args(sizes, tensors, options, eps);
  py::gil_scoped_release release;
  return nsk_cpu_residual_mlp_forward(&args);
}

// gradients: grad_y, then those of x, weight, bias, ln_weight, ln_bias.
int mlp_backward(MlpSizes sizes, MlpTensors tensors, MlpOptions options, double eps, std::array<Tensor, 6> gradients) {
  nsk_residual_mlp_backward args{};
  args.forward = mlp_args(sizes, tensors, options, eps);
  nsk_view* const views[] = {&args.grad_y,    &args.grad_x,         &args.grad_weight,
                             &args.grad_bias, &args.grad_ln_weight, &args.grad_ln_bias};
  for (size_t i = 0; i < gradients.size(); ++i) *views[i] = view(gradients[i]);
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

  m.def("gated_sdpa_forward", &forward);
  m.def("gated_sdpa_backward", &backward);
  m.def("residual_mlp_forward", &mlp_forward);
  m.def("residual_mlp_backward", &mlp_backward);

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
}
