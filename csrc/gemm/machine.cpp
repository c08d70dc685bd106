#include "machine.h"

#include <stdexcept>

namespace fastfp8::gemm {
namespace {

// Names that contain another come first.
constexpr Machine kMachines[] = {
    {"H200", 132, 1.98, 8192, 0.9 * 4800 / 1.98, 4500, 64, 1000},
    {"H20", 78, 1.98, 2048, 0.9 * 4000 / 1.98, 4500, 64, 1000},
    {"H800", 132, 1.98, 8192, 0.9 * 3350 / 1.98, 4500, 64, 1000},
    {"H100", 132, 1.98, 8192, 0.9 * 3350 / 1.98, 4500, 64, 1000},
};
constexpr const Machine& kDefault = kMachines[3];

}  // namespace

const Machine& Machine::of(const std::string& device_name) {
  for (const Machine& machine : kMachines) {
    if (device_name.find(machine.name) != std::string::npos) return machine;
  }
  return kDefault;
}

const Machine& Machine::named(const std::string& name) {
  std::string known;
  for (const Machine& machine : kMachines) {
    if (name == machine.name) return machine;
    known += std::string(known.empty() ? "" : ", ") + machine.name;
  }
  throw std::runtime_error("fastfp8: the cost model knows " + known + ", not '" + name + "'");
}

}  // namespace fastfp8::gemm
