#pragma once
#include <pybind11/pybind11.h>

namespace fastfp8 {

// Geometry, memory and launches of the all-to-all, for fastfp8.comm.
void bind_comm(pybind11::module_& module);

}  // namespace fastfp8
