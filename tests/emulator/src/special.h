// Special registers.
#pragma once
#include <cstdint>
#include <string>

namespace emulator {

struct Context;

int special_index(const std::string& name);  // -1: unknown
uint64_t special_value(int index, Context& context, int lane);

}  // namespace emulator
