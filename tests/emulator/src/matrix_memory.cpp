// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements between shared memory and a warp's registers.
#include <algorithm>
#include <cstring>

#include "memory.h"

namespace emulator {
namespace {

struct Matrices {
  int count;
  bool transposed;
  Address address;
};

// .sync.aligned.m8n8.x{1,2,4}{.trans}.shared{::cta}.b16, of which .x may stand before .m8n8.
Matrices decode_matrices(const Decoder& d, size_t memory) {
  if (!(d.take("sync") && d.take("aligned"))) d.unknown(d.instruction.opcode);
  int count = 0;
  const auto take_count = [&] {
    for (int n : {1, 2, 4})
      if (d.take("x" + std::to_string(n))) count = n;
  };
  take_count();
  if (!d.take("m8n8")) d.unknown("shape");
  if (count == 0) take_count();
  const bool transposed = d.take("trans");
  if (!(d.take("shared") || d.take("shared::cta")) || !d.take("b16") || count == 0) d.unknown(d.instruction.opcode);
  d.expect_done();
  d.operands(2);
  return {count, transposed, address_of(d, d.operand(memory))};
}

// The lane that holds element (row, column) of a matrix, and which half of its register.
struct Element {
  int lane, half;
};
Element element(bool transposed, int row, int column) {
  if (transposed) std::swap(row, column);
  return {row * 4 + column / 2, column % 2};
}

Place row_of(Context& c, const Matrices& m, int matrix, int row, bool write) {
  const int owner = matrix * 8 + row;
  return locate(c, owner, Space::kShared, m.address.get(c, owner) & 0xffffffff, 16, write);
}

void count_rows(Context& c, const std::array<Place, 8>& rows) {
  LaneAddresses offsets{};
  for (int row = 0; row < 8; ++row) offsets[row] = rows[row].offset;
  count_shared(c, offsets, 0xff, 16);
}

Handler decode_stmatrix(const Decoder& d) {
  const Matrices m = decode_matrices(d, 0);
  std::vector<Source> values;
  if (d.operand(1).kind == Operand::Kind::kVector)
    for (const Operand& operand : d.operand(1).elements) values.push_back(d.source(operand));
  else
    values.push_back(d.source(1));
  if (values.size() != static_cast<size_t>(m.count)) d.unknown("number of registers");
  return [=](Context& c) {
    if (!converged(c)) return Outcome::kBlocked;
    if (c.mask != kAllLanes) fail(c, "it is executed by all lanes of a warp, and some have exited");
    for (int matrix = 0; matrix < m.count; ++matrix) {
      std::array<Place, 8> rows;
      for (int row = 0; row < 8; ++row) {
        rows[row] = row_of(c, m, matrix, row, true);
        uint16_t halves[8];
        for (int column = 0; column < 8; ++column) {
          const auto [lane, half] = element(m.transposed, row, column);
          halves[column] = static_cast<uint16_t>(values[matrix].get(c, lane) >> 16 * half);
        }
        shared_write(c, matrix * 8 + row, *rows[row].cta, rows[row].offset, halves, 16);
      }
      count_rows(c, rows);
    }
    return Outcome::kNext;
  };
}

Handler decode_ldmatrix(const Decoder& d) {
  const Matrices m = decode_matrices(d, 1);
  std::vector<int> registers;
  if (d.operand(0).kind == Operand::Kind::kVector)
    for (const Operand& operand : d.operand(0).elements) registers.push_back(d.destination(operand));
  else
    registers.push_back(d.destination(0));
  if (registers.size() != static_cast<size_t>(m.count)) d.unknown("number of registers");
  d.touched.defines = true;
  return [=](Context& c) {
    if (!converged(c)) return Outcome::kBlocked;
    if (c.mask != kAllLanes) fail(c, "it is executed by all lanes of a warp, and some have exited");
    std::array<LaneAddresses, 4> values{};
    std::array<uint32_t, 4> undefined{};
    for (int matrix = 0; matrix < m.count; ++matrix) {
      std::array<Place, 8> rows;
      for (int row = 0; row < 8; ++row) {
        rows[row] = row_of(c, m, matrix, row, false);
        uint16_t halves[8];
        const bool known = shared_read(c, matrix * 8 + row, *rows[row].cta, rows[row].offset, halves, 16);
        for (int column = 0; column < 8; ++column) {
          const auto [lane, half] = element(m.transposed, row, column);
          values[matrix][lane] |= static_cast<uint64_t>(halves[column]) << 16 * half;
          if (!known) undefined[matrix] |= 1u << lane;
        }
      }
      count_rows(c, rows);
    }
    // After all reads: the address register may be among the results.
    for (int matrix = 0; matrix < m.count; ++matrix) {
      if (registers[matrix] < 0) continue;
      std::copy_n(values[matrix].begin(), kLanes, c.warp.reg(registers[matrix]));
      c.warp.defined[registers[matrix]] = ~undefined[matrix];
    }
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_matrix_memory(const Decoder& d) {
  if (d.instruction.opcode == "stmatrix") return decode_stmatrix(d);
  if (d.instruction.opcode == "ldmatrix") return decode_ldmatrix(d);
  return {};
}

}  // namespace emulator
