// The CUDA half of the native module.
#pragma once

#include <pybind11/pybind11.h>

namespace nsk::bind {

// Adds `cuda`, a submodule with the functions of nsk_cuda_* in nsk.h, or None where the library has none.
void define_cuda(pybind11::module_& m);

}  // namespace nsk::bind
