// Functions that device code may call without having a body: what CUDA's device runtime provides.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Context;

// Each argument in 64 bits; the result likewise.
using Builtin = uint64_t (*)(Context&, int lane, const std::vector<uint64_t>& arguments);
Builtin find_builtin(const std::string& name);  // null: none

}  // namespace emulator
