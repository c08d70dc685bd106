// Matrix descriptors of wgmma: where each 16 bytes of an operand lie in shared memory. Their fields count such
// granules.
#pragma once
#include <sstream>

#include "machine.h"

namespace emulator {

constexpr int kOperandRowBytes = 32;  // of K in one instruction, whatever the type

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t span;                    // granules side by side that are swizzled as one, 8, 4 or 2; 1 without swizzle
};

// Raises on what the PTX ISA rules out for an operand of so many rows of M or N, 16-bit ones where it is `transposed`.
inline Descriptor parse_descriptor(uint64_t bits, int rows, bool transposed, const Who& who) {
  const auto field = [&](int first) { return static_cast<uint32_t>(bits >> first & 0x3fff) * kGranule; };
  const int mode = static_cast<int>(bits >> 62);
  const Descriptor d{field(0), field(16), field(32), mode == 0 ? 1u : 1u << (4 - mode)};
  const auto reject = [&](const std::string& what) {
    std::ostringstream text;
    text << who << ": matrix descriptor 0x" << std::hex << bits << ": " << what;
    throw Error(text.str());
  };
  if (bits >> 49 & 7) reject("a base offset is not emulated; it is 0 where the swizzle pattern is aligned to its size");
  constexpr uint64_t kFields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
  if (bits & ~kFields) reject("reserved bits are set");
  if (mode == 0) return d;
  // The pattern is 8 lines of `line` bytes. Stepping along the first one is the only legal way to begin inside it.
  const uint32_t line = d.span * kGranule, pattern = 8 * line;
  const uint32_t needed = transposed ? std::min<uint32_t>(line, 2 * rows) : kOperandRowBytes;
  const auto multiple = [&](uint32_t value, const char* what) {
    if (value % pattern)
      reject(std::string(what) + " of " + std::to_string(value) + " bytes is no multiple of the " +
             std::to_string(pattern) + " bytes of the swizzle pattern");
  };
  if (d.start % pattern + needed > line)
    reject("the start address " + std::to_string(d.start) + " is not in the first " + std::to_string(line) +
           " bytes of a swizzle pattern, which is aligned to " + std::to_string(pattern) + " bytes, with room for " +
           std::to_string(needed));
  if (transposed || rows > 8) multiple(d.stride, "the stride byte offset");
  if (transposed && 2u * rows > line) multiple(d.leading, "the leading byte offset");
  return d;
}

// Calls f(row, byte, offset) for all 16-byte granules of an operand, in shared memory of `cta` at `offset`. K-major:
// the granule is bytes `byte` to `byte` + 15 of the row. Transposed: it is 2 bytes at `byte` of 8 rows from `row` on.
template <class F>
void for_granules(const Cta& cta, uint64_t bits, int rows, bool transposed, const Who& who, F&& f) {
  const Descriptor d = parse_descriptor(bits, rows, transposed, who);
  const bool swizzled = d.span > 1;
  const uint32_t line = d.span * kGranule;
  const auto visit = [&](int row, int byte, uint32_t linear) {
    const uint32_t address = linear ^ ((linear >> 7 & (d.span - 1)) * kGranule);
    f(row, byte, shared_offset(cta, address, kGranule, who));
  };
  if (!transposed) {
    const uint32_t column = swizzled ? kGranule : d.leading;
    for (int row = 0; row < rows; ++row) {
      const uint32_t begin = d.start + row % 8 * line + row / 8 * d.stride;
      for (int byte = 0; byte < kOperandRowBytes; byte += kGranule) visit(row, byte, begin + byte / kGranule * column);
    }
    return;
  }
  // Without swizzle the two offsets change their parts.
  const uint32_t repeat = swizzled ? d.leading : d.stride, octet = swizzled ? d.stride : d.leading;
  for (int k = 0; k < kOperandRowBytes / 2; ++k) {
    const uint32_t begin = d.start + k % 8 * line + k / 8 * octet;
    for (int row = 0; row < rows; row += 8) {
      const uint32_t granule = row / 8;
      visit(row, 2 * k, begin + granule % d.span * kGranule + granule / d.span * repeat);
    }
  }
}

}  // namespace emulator
