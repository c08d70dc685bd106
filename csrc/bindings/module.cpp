#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, module) { module.attr("version") = FASTFP8_VERSION; }
