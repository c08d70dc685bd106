// A tensor map (cuTensorMapEncodeTiled) as data: what TMA needs to know of a tensor, before its address is known.
#pragma once
#include <array>
#include <cstdint>

#include "types.h"

namespace fastfp8 {

enum class Swizzle : uint8_t { kNone = 0, k32B = 32, k64B = 64, k128B = 128 };

// Of rank 2, innermost dimension first. Cells outside the tensor read as zero and are not written.
struct TensorMap {
  DType dtype;
  std::array<uint64_t, 2> dims;  // elements
  uint64_t pitch;                // bytes from one row to the next: a multiple of 16
  std::array<uint32_t, 2> box;   // elements: at most 256 each, the inner one at most the swizzle span
  Swizzle swizzle;
};

}  // namespace fastfp8
