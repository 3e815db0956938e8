#include "cuda.h"

void nsk::bind::define_cuda(pybind11::module_& m) { m.attr("cuda") = pybind11::none(); }
