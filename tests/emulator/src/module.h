// A module in memory, and launches of its kernels.
#pragma once
#include "machine.h"

namespace emulator {

struct LoadedModule {
  // Raises Error on what is no PTX and on instructions that the emulator does not know.
  explicit LoadedModule(const std::string& text);
  LoadedModule(const LoadedModule&) = delete;  // the code points into the module

  Module module;
  std::map<std::string, std::shared_ptr<Code>> kernels;
  std::vector<std::vector<uint64_t>> storage;  // of .global and .const variables, in whole granules
  std::vector<MemoryRange> ranges;
};

struct Launch {
  std::shared_ptr<const LoadedModule> module;
  std::string kernel;
  std::array<uint32_t, 3> grid, block, cluster;
  uint32_t shared_bytes;               // dynamic
  std::vector<std::string> arguments;  // bytes of each
  int device;
  bool programmatic;  // may start before those before it on the device have ended
};

// Runs all launches together. The machine holds what they may reach but for their modules' variables.
void add_launches(Machine& machine, const std::vector<Launch>& launches);

}  // namespace emulator
