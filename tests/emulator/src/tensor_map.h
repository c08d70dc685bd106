// The 128 bytes of a CUtensorMap in the emulator's own encoding (hardware's is not documented). emulator/tensor_map.py
// writes it with struct.pack("<Q4Q5I5H5B5B") and zeros up to 128 bytes; all zero is a map of rank 1 over nothing.
#pragma once
#include <cstdint>

namespace emulator {

#pragma pack(push, 1)
struct TensorMapBits {
  uint64_t address;
  uint64_t strides[4];         // bytes, of dimensions 1 to 4
  uint32_t dims[5];            // elements - 1, innermost first
  uint16_t box[5];             // elements - 1
  uint8_t element_strides[5];  // - 1
  uint8_t rank;                // - 1
  uint8_t element_bytes;       // 1, 2, 4 or 8
  uint8_t is_float;            // may be filled with NaN
  uint8_t swizzle;             // log2 of 16-byte chunks permuted: 0 none, 1 32B, 2 64B, 3 128B
  uint8_t fill_nan;
};
#pragma pack(pop)
static_assert(sizeof(TensorMapBits) <= 128);

}  // namespace emulator
