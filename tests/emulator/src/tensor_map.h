// The 128 bytes of a CUtensorMap in the emulator's own encoding (hardware's is not documented). emulator/tensor_map.py
// writes it with struct.pack("<Q4Q5I5H5B5B") and zeros up to 128 bytes; tensormap.replace edits it, and all zero is a
// map to start from.
#pragma once
#include <cstdint>

namespace emulator {

constexpr uint32_t kMapBytes = 128, kMapAlignment = 64;
constexpr uint32_t kMaxRank = 5, kMaxBox = 256, kMaxElementStride = 8, kMostSwizzle = 3, kMostInterleave = 2;
constexpr uint64_t kMaxStride = 1ull << 40;  // bytes; the first that is too large

#pragma pack(push, 1)
struct TensorMapBits {
  uint64_t address;
  uint64_t strides[4];         // bytes, of dimensions 1 to 4
  uint32_t dims[5];            // elements - 1, innermost first
  uint16_t box[5];             // elements - 1
  uint8_t element_strides[5];  // - 1
  uint8_t rank;                // - 1
  uint8_t element_type;        // into kElementTypes
  uint8_t interleave;          // 0 none, 1 16B, 2 32B
  uint8_t swizzle;             // log2 of 16-byte chunks permuted: 0 none, 1 32B, 2 64B, 3 128B
  uint8_t fill_nan;
};
#pragma pack(pop)
static_assert(sizeof(TensorMapBits) <= kMapBytes);

struct ElementType {
  const char* name;
  uint32_t bytes;
  bool is_float;     // may be filled with NaN
  const char* bits;  // the type of its and, or, xor; none where there is none
};

// In the order of tensormap.replace's .elemtype, which is not that of CUtensorMapDataType.
constexpr ElementType kElementTypes[] = {
    {"u8", 1, false, ""},      {"u16", 2, false, ""},    {"u32", 4, false, "b32"}, {"s32", 4, false, "b32"},
    {"u64", 8, false, "b64"},  {"s64", 8, false, "b64"}, {"f16", 2, true, ""},     {"f32", 4, true, ""},
    {"f32.ftz", 4, true, ""},  {"f64", 8, true, ""},     {"bf16", 2, true, ""},    {"tf32", 4, true, ""},
    {"tf32.ftz", 4, true, ""},
};
constexpr uint32_t kElementTypeCount = sizeof kElementTypes / sizeof *kElementTypes;

}  // namespace emulator
