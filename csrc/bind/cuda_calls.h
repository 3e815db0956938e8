// The functions of the CUDA kernels for Python, for a device and for the emulator alike: Calls has those of nsk_cuda_*,
// and Place is what says where they run.
#pragma once

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

namespace nsk::bind {

inline nsk_cuda_device& device_of(nsk_cuda_device& device) { return device; }

// A call's status and its launches, as kernel, blocks, threads and bytes of shared memory. call(place) is what the call
// would be.
using Launches = std::vector<std::tuple<std::string, std::array<int64_t, 3>, int32_t, int32_t>>;

template <class Place, class F>
std::pair<int, Launches> launches_of(Place place, const F& call) {
  nsk_cuda_launch launches[16];
  nsk_cuda_plan plan{launches, 16, 0};
  device_of(place).plan = &plan;
  const nsk_status status = call(place);
  Launches found;
  for (int i = 0; i < plan.count && i < plan.most; ++i) {
    const auto& [kernel, grid, threads, shared] = launches[i];
    found.emplace_back(kernel, std::array<int64_t, 3>{grid[0], grid[1], grid[2]}, threads, shared);
  }
  return {status, found};
}

template <class Calls, class Place>
void define_cuda_calls(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Problem>(m, "Problem", py::module_local())
      .def(py::init([](std::array<int64_t, 7> sizes, std::array<Tensor, 8> tensors,
                       std::array<uintptr_t, 2> cu_seqlens, std::array<int64_t, 6> options,
                       std::array<double, 2> scale) { return Problem{sizes, tensors, cu_seqlens, options, scale}; }));
  m.def("head_dims", [] {
    std::vector<std::pair<int, int>> pairs;
    for (const int32_t* d = Calls::head_dims(); *d; d += 2) pairs.emplace_back(d[0], d[1]);
    return pairs;
  }, "Head dimensions of query and value that attention kernels were built for.");
  m.def("widths", [] {
    std::vector<int> widths;
    for (const int32_t* w = Calls::widths(); *w; ++w) widths.push_back(*w);
    return widths;
  }, "Widths that kernels of residual MLPs were built for.");
  m.def("residual_mlp_shared", &Calls::residual_mlp_shared,
        "Bytes of shared memory that a block needs at least, by width and weight's type.");

  m.def("gated_sdpa_forward_scratch", [](const Place& place, const Problem& problem) {
    const nsk_gated_sdpa args = problem.args();
    return Calls::gated_sdpa_forward_scratch(args, place);
  });
  m.def("gated_sdpa_forward", [](const Place& place, const Problem& problem, uintptr_t scratch) -> int {
    const nsk_gated_sdpa args = problem.args();
    py::gil_scoped_release release;
    return Calls::gated_sdpa_forward(args, place, reinterpret_cast<void*>(scratch));
  });
  m.def("gated_sdpa_forward_launches", [](const Place& place, const Problem& problem) {
    const nsk_gated_sdpa args = problem.args();
    return launches_of(place, [&](const Place& planned) { return Calls::gated_sdpa_forward(args, planned, nullptr); });
  });
  m.def("gated_sdpa_backward_launches",
        [](const Place& place, const Problem& problem, Gradients gradients, std::array<int64_t, 4> mask_size) {
          const nsk_gated_sdpa_backward args = backward_args(problem, gradients, mask_size);
          return launches_of(
              place, [&](const Place& planned) { return Calls::gated_sdpa_backward(args, planned, nullptr); });
        });
  m.def("gated_sdpa_backward_scratch",
        [](const Place& place, const Problem& problem, Gradients gradients, std::array<int64_t, 4> mask_size) {
          return Calls::gated_sdpa_backward_scratch(backward_args(problem, gradients, mask_size), place);
        });
  m.def("gated_sdpa_backward", [](const Place& place, const Problem& problem, Gradients gradients,
                                  std::array<int64_t, 4> mask_size, uintptr_t scratch) -> int {
    const nsk_gated_sdpa_backward args = backward_args(problem, gradients, mask_size);
    py::gil_scoped_release release;
    return Calls::gated_sdpa_backward(args, place, reinterpret_cast<void*>(scratch));
  });

  m.def("residual_mlp_forward", [](const Place& place, MlpSizes sizes, MlpTensors tensors, MlpOptions options,
                                   double eps) -> int {
    const nsk_residual_mlp args = mlp_args(sizes, tensors, options, eps);
    py::gil_scoped_release release;
    return Calls::residual_mlp_forward(args, place);
  });
  m.def("residual_mlp_forward_launches", [](const Place& place, MlpSizes sizes, MlpTensors tensors, MlpOptions options,
                                            double eps) {
    const nsk_residual_mlp args = mlp_args(sizes, tensors, options, eps);
    return launches_of(place, [&](const Place& planned) { return Calls::residual_mlp_forward(args, planned); });
  });
  m.def("residual_mlp_backward_launches", [](const Place& place, MlpSizes sizes, MlpTensors tensors,
                                             MlpOptions options, double eps, MlpGradients gradients) {
    const nsk_residual_mlp_backward args = mlp_backward_args(mlp_args(sizes, tensors, options, eps), gradients);
    return launches_of(place,
                       [&](const Place& planned) { return Calls::residual_mlp_backward(args, planned, nullptr); });
  });
  m.def("residual_mlp_backward_scratch", [](const Place& place, MlpSizes sizes, MlpTensors tensors, MlpOptions options,
                                            double eps, MlpGradients gradients) {
    return Calls::residual_mlp_backward_scratch(mlp_backward_args(mlp_args(sizes, tensors, options, eps), gradients),
                                                place);
  });
  m.def("residual_mlp_backward", [](const Place& place, MlpSizes sizes, MlpTensors tensors, MlpOptions options,
                                    double eps, MlpGradients gradients, uintptr_t scratch) -> int {
    const nsk_residual_mlp_backward args = mlp_backward_args(mlp_args(sizes, tensors, options, eps), gradients);
    py::gil_scoped_release release;
    return Calls::residual_mlp_backward(args, place, reinterpret_cast<void*>(scratch));
  });
}

}  // namespace nsk::bind
