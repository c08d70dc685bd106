// A launch as data: driver.cpp executes it on a GPU, the tests' emulator on a CPU.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <variant>
#include <vector>

#include "tensor_map.h"

namespace fastfp8 {

// The address of the tensor bound to `slot`, a name the plan's caller knows ("a", "out", ...); null if none is bound.
struct TensorSlot {
  const char* slot;
};

// A tensor map over the tensor bound to `slot`. A kernel parameter that this instance never touches has slot nullptr.
struct TensorMapSlot {
  const char* slot;
  TensorMap map;
};

// A structure by value: `size` bytes of the plan's constants, from `at` on.
struct Constants {
  int at, size;
};

using LaunchArgument = std::variant<int32_t, float, TensorSlot, TensorMapSlot, Constants>;

struct LaunchPlan {
  static constexpr int kMaxArguments = 25;

  const char* module;  // stem of the .ptx and .cubin files in fastfp8/kernels
  const char* kernel;  // symbol in the module
  std::array<int, 3> grid, block, cluster;
  int shared_bytes;  // dynamic shared memory
  bool overlaps;     // may start while the grid before it in the stream ends: its kernel waits for that one itself
  int argument_count = 0;
  std::array<LaunchArgument, kMaxArguments> arguments;
  std::vector<std::byte> constants;

  void add(const LaunchArgument& argument) { arguments[argument_count++] = argument; }

  template <class Structure>
  void add_constants(const Structure& structure) {
    static_assert(std::is_trivially_copyable_v<Structure>);
    add_constants(reinterpret_cast<const std::byte*>(&structure), sizeof structure);
  }

  void add_constants(const std::byte* structure, size_t size) {
    const size_t at = constants.size();
    add(Constants{static_cast<int>(at), static_cast<int>(size)});
    constants.insert(constants.end(), structure, structure + size);
  }
};

}  // namespace fastfp8
