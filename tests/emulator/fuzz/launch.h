// A launch for the fuzzer: all it knows of the machine.
#pragma once
#include <string>

#include "../src/module.h"

namespace emulator {

// Runs each kernel as one cluster, of the CTAs and the threads that its directives ask for, without them one CTA of 64
// threads. Its parameters of 8 bytes point to one buffer, and those of 128 are tensor maps of it. Raises Error.
void launch_all(const std::shared_ptr<const LoadedModule>& loaded, uint64_t seed);

}  // namespace emulator
