#include "launch.h"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

constexpr uint64_t kBufferBytes = 8192, kStepLimit = 3'000;
constexpr uint32_t kThreads = 64, kMostCtas = 4, kDynamicBytes = 1024;
alignas(128) uint8_t buffer[kBufferBytes];

// The product of what a directive states.
uint32_t stated(const Function& function, const std::string& directive, uint32_t otherwise, uint32_t most) {
  const auto found = function.directives.find(directive);
  if (found == function.directives.end()) return otherwise;
  uint64_t product = 1;
  for (uint32_t extent : found->second) product = std::min<uint64_t>(product * extent, most);
  return static_cast<uint32_t>(product);
}

// What a kernel takes: a pointer, a tensor map with a box of 256 bytes, or else zeros.
std::string argument(uint64_t bytes) {
  constexpr uint16_t kColumns = 32, kRows = kBufferBytes / 4 / kColumns;
  TensorMapBits map{};
  map.address = reinterpret_cast<uint64_t>(buffer);
  map.strides[0] = kColumns * 4;
  map.dims[0] = kColumns - 1, map.dims[1] = kRows - 1;
  map.box[0] = kColumns - 1, map.box[1] = 1;
  map.rank = 1;
  map.element_type = 2;
  std::string value(bytes, '\0');
  if (bytes == sizeof map.address) std::memcpy(value.data(), &map.address, sizeof map.address);
  if (bytes == kMapBytes) std::memcpy(value.data(), &map, sizeof map);
  return value;
}

}  // namespace

void launch_all(const std::shared_ptr<const LoadedModule>& loaded, uint64_t seed) {
  std::ranges::fill(buffer, uint8_t{0});
  for (const auto& [name, code] : loaded->kernels) {
    const Function& function = *code->function;
    const uint32_t threads = stated(function, "reqntid", stated(function, "maxntid", kThreads, 1024), 1024);
    const uint32_t ctas = stated(function, "reqnctapercluster", 1, kMostCtas);
    Launch launch{loaded, name, {ctas, 1, 1}, {threads, 1, 1}, {ctas, 1, 1}, kDynamicBytes, {}, 0, false};
    for (const Variable& parameter : function.parameters) launch.arguments.push_back(argument(parameter.bytes));
    Machine machine(seed);
    machine.step_limit = kStepLimit;
    machine.memory.ranges.push_back({reinterpret_cast<uint64_t>(buffer), kBufferBytes, true, "buffer"});
    add_launches(machine, {launch});
    machine.run();
  }
}

}  // namespace emulator
