// What bulk reductions do to one element in memory.
#pragma once
#include <cstdint>
#include <string>

namespace emulator {

struct Reduction {
  uint64_t (*combine)(uint64_t old, uint64_t value);
  uint32_t bytes;    // of an element
  bool into_shared;  // legal there, too
};

// `op` is "add", "min", ..., `type` "u32", "bf16", ...; nullptr for what PTX does not have.
const Reduction* find_reduction(const std::string& op, const std::string& type);

// Combines the bytes [first, last) of `value` into those of `target`.
void reduce(const Reduction& reduction, uint8_t* target, const uint8_t* value, uint32_t first, uint32_t last);

}  // namespace emulator
