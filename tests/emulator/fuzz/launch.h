// A launch for the fuzzer: all it knows of the machine.
#pragma once
#include <cstdint>

#include "../src/machine.h"

namespace emulator {

// Decodes every function that has a body. Raises Error.
void decode_all(const Module& module);

// Runs each kernel as one CTA of 64 threads whose 8-byte parameters all point to one buffer of 4 KB. Raises Error.
void launch_all(const Module& module, uint64_t seed);

}  // namespace emulator
