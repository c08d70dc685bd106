#include "launch.h"

namespace emulator {
namespace {

void launch(const Module& module, const Function& kernel, uint64_t seed) {
  constexpr uint64_t kBufferBytes = 4096;
  alignas(128) static uint8_t buffer[kBufferBytes];
  Machine machine(seed);
  const auto address = reinterpret_cast<uint64_t>(buffer);
  machine.memory.push_back({address, kBufferBytes, true, "buffer"});
  Grid& grid = machine.grids.emplace_back();
  grid.code = decode(module, kernel);
  grid.grid = grid.cluster = {1, 1, 1};
  grid.block = {64, 1, 1};
  grid.clusters = 1;
  grid.shared_bytes = 1024;
  grid.parameters.assign(kernel.param_bytes, 0);
  for (const Variable& parameter : kernel.parameters) {
    if (parameter.bytes == sizeof address) {
      std::memcpy(grid.parameters.data() + parameter.offset, &address, sizeof address);
    }
  }
  machine.run();
}

}  // namespace

void decode_all(const Module& module) {
  for (const auto& [name, function] : module.functions) {
    if (function.is_defined) decode(module, function);
  }
}

void launch_all(const Module& module, uint64_t seed) {
  for (const auto& [name, function] : module.functions) {
    if (function.is_entry && function.is_defined) launch(module, function, seed);
  }
}

}  // namespace emulator
