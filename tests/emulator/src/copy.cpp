// TMA: bulk tensor copies, in pieces of 16 bytes that complete in any order.
#include <cstring>
#include <sstream>

#include "memory.h"

namespace emulator {
namespace {

constexpr uint32_t kPiece = 16;

// One copy between a tensor in global memory and a box in shared memory.
struct Copy {
  TensorMapBits map;
  std::array<int64_t, 5> start;  // coordinates, innermost first
  Cta* cta;
  uint32_t shared;  // address in the shared window, so that the swizzle sees absolute bits
  std::string who;
  std::shared_ptr<BulkGroup> group;  // of a store
  uint32_t barrier = 0;              // offset in `cta`, of a load
  Counters* counters;

  uint32_t rank() const { return map.rank + 1u; }
  uint32_t row_bytes() const { return (map.box[0] + 1u) * map.element_bytes; }
  uint32_t rows() const {
    uint32_t rows = 1;
    for (uint32_t i = 1; i < rank(); ++i) rows *= map.box[i] + 1u;
    return rows;
  }

  // Offset in the CTA's shared memory of byte x of a row: the swizzle permutes chunks of 16 bytes by address bits.
  uint32_t shared_at(uint32_t row, uint32_t x) const {
    const uint32_t linear = shared + row * row_bytes() + x;
    const uint32_t mask = (1u << map.swizzle) - 1;
    return shared_offset(*cta, linear ^ (((linear >> 7) & mask) << 4), kPiece, who);
  }

  // The global address of byte x of a row, and how many of the next `bytes` bytes lie inside; 0 if the row is outside.
  uint64_t global_at(uint32_t row, uint32_t x, uint32_t bytes, uint32_t& first, uint32_t& last) const {
    uint64_t address = map.address;
    first = last = 0;
    for (uint32_t i = 1, left = row; i < rank(); ++i) {
      const int64_t coordinate = start[i] + left % (map.box[i] + 1u);
      left /= map.box[i] + 1u;
      if (coordinate < 0 || coordinate > static_cast<int64_t>(map.dims[i])) return 0;
      address += coordinate * map.strides[i - 1];
    }
    const int64_t begin = start[0] * map.element_bytes + x, extent = (map.dims[0] + 1ll) * map.element_bytes;
    const int64_t from = std::max<int64_t>(begin, 0), to = std::min<int64_t>(begin + bytes, extent);
    if (from >= to) return 0;
    first = static_cast<uint32_t>(from - begin), last = static_cast<uint32_t>(to - begin);
    return address + begin;
  }
};

void load_piece(Machine& machine, const Copy& copy, uint32_t row, uint32_t x) {
  uint8_t bytes[kPiece] = {};
  uint32_t first, last;
  if (const uint64_t address = copy.global_at(row, x, kPiece, first, last)) {
    async_read_global(machine, *copy.cta, address + first, bytes + first, last - first, copy.who);
  }
  const uint32_t offset = copy.shared_at(row, x);
  async_write_shared(*copy.cta, offset, bytes, kPiece);
  hold_writes(*copy.cta, offset, kPiece, -1, nullptr, copy.who);
  copy.counters->tma_bytes += kPiece;
  mbarrier_complete_tx(machine, *copy.cta, copy.barrier, kPiece, copy.who);
}

constexpr uint32_t kPatience = 16;

// Most often it puts the write off, so that what was read long ago has not arrived yet.
void write_piece(Machine& machine, const std::shared_ptr<Copy>& copy, const std::array<uint8_t, kPiece>& bytes,
                 uint64_t address, uint32_t first, uint32_t last) {
  if (machine.below(kPatience) != 0) {
    machine.pieces.push_back(
        [&machine, copy, bytes, address, first, last] { write_piece(machine, copy, bytes, address, first, last); });
    return;
  }
  if (address) {
    async_write_global(machine, *copy->cta, address + first, bytes.data() + first, last - first, copy->who);
    copy->counters->tma_bytes += last - first;
  }
  copy->group->unwritten--;
}

// A store reads its source now and writes some time later.
void store_piece(Machine& machine, const std::shared_ptr<Copy>& copy, uint32_t row, uint32_t x) {
  const uint32_t offset = copy->shared_at(row, x);
  uint32_t first, last;
  const uint64_t address = copy->global_at(row, x, kPiece, first, last);
  std::array<uint8_t, kPiece> bytes;
  if (address) async_read_shared(*copy->cta, offset, bytes.data(), kPiece, copy->who);
  hold_reads(*copy->cta, offset, kPiece, -1, nullptr, copy->who);
  copy->group->unread--;
  machine.pieces.push_back(
      [&machine, copy, bytes, address, first, last] { write_piece(machine, copy, bytes, address, first, last); });
}

TensorMapBits read_map(Context& c, uint64_t address) {
  TensorMapBits map;
  const uint8_t* host = nullptr;
  if (address % 64) fail(c, "a tensor map lies at a multiple of 64 bytes");
  if ((address & kWindowMask) == kParamWindow) {
    const uint64_t offset = address - kParamWindow;
    if (offset + 128 > c.grid.parameters.size()) fail(c, "no tensor map in the parameters there");
    host = c.grid.parameters.data() + offset;
  } else {
    host = c.machine.memory.find(address, 128, false, where(c));
  }
  std::memcpy(&map, host, sizeof map);
  if (map.element_bytes == 0) fail(c, "the tensor map is all zero");
  for (uint8_t stride : map.element_strides)
    if (stride) fail(c, "element strides above 1 are not emulated yet");
  return map;
}

// The common part: the map, the coordinates and the box's place in shared memory.
std::shared_ptr<Copy> begin_copy(Context& c, int lane, uint64_t map_address, const std::vector<Source>& coordinates,
                                 uint64_t shared) {
  auto copy = std::make_shared<Copy>();
  copy->map = read_map(c, map_address);
  if (copy->rank() != coordinates.size()) fail(c, "the tensor map has rank " + std::to_string(copy->rank()));
  for (size_t i = 0; i < coordinates.size(); ++i) copy->start[i] = static_cast<int32_t>(coordinates[i].get(c, lane));
  copy->cta = &c.cta;
  copy->shared = static_cast<uint32_t>(shared);
  copy->who = where(c);
  copy->counters = &c.grid.counters;
  if (shared % 128) fail(c, "a tensor copy's shared address is a multiple of 128");
  const uint32_t pattern = copy->map.swizzle ? 128u << copy->map.swizzle : 128;
  if (shared % pattern) fail(c, "the box does not start where its swizzle pattern does");
  // Whether rows of a narrower box lie at its own pitch or at the pattern's is not documented.
  if (copy->map.swizzle && copy->row_bytes() != 16u << copy->map.swizzle)
    fail(c, "a swizzled box has rows of exactly the swizzle's bytes");
  return copy;
}

struct TensorOperands {
  Source map, shared;
  std::vector<Source> coordinates;
};

std::vector<Source> coordinates_of(const Decoder& d, const Operand& memory) {
  std::vector<Source> coordinates;
  for (size_t i = 1; i < memory.elements.size(); ++i) {
    const Operand& element = memory.elements[i];
    if (element.kind == Operand::Kind::kVector)
      for (const Operand& inner : element.elements) coordinates.push_back(d.source(inner));
    else
      coordinates.push_back(d.source(element));
  }
  return coordinates;
}

Handler tensor_load(const Decoder& d) {
  if (!(d.take("global"))) d.unknown("tensor copy");
  d.take("tile");
  if (!d.take("mbarrier::complete_tx::bytes")) d.unknown("completion");
  d.expect_done();
  d.operands(3);
  const Source shared = d.source(d.operand(0).elements.at(0)), map = d.source(d.operand(1).elements.at(0));
  const Source barrier = d.source(d.operand(2).elements.at(0));
  const auto coordinates = coordinates_of(d, d.operand(1));
  return [=](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      auto copy = begin_copy(c, lane, map.get(c, lane), coordinates, shared.get(c, lane) & 0xffffffff);
      copy->barrier = shared_offset(c.cta, static_cast<uint32_t>(barrier.get(c, lane)), 8, copy->who);
      race_use_mbarrier(c, lane, c.cta, copy->barrier);
      for (uint32_t row = 0; row < copy->rows(); ++row) {
        for (uint32_t x = 0; x < copy->row_bytes(); x += kPiece) {
          hold_writes(c.cta, copy->shared_at(row, x), kPiece, 1, &c.instruction, copy->who);
          race_copy_in(c, lane, c.cta, copy->shared_at(row, x), kPiece);
          c.machine.pieces.push_back([&machine = c.machine, copy, row, x] { load_piece(machine, *copy, row, x); });
        }
      }
    });
    return Outcome::kNext;
  };
}

Handler tensor_store(const Decoder& d) {
  if (!d.take("shared::cta")) d.unknown("tensor copy");
  d.take("tile");
  if (!d.take("bulk_group")) d.unknown("completion");
  d.expect_done();
  d.operands(2);
  const Source map = d.source(d.operand(0).elements.at(0)), shared = d.source(d.operand(1).elements.at(0));
  const auto coordinates = coordinates_of(d, d.operand(0));
  return [=](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      auto copy = begin_copy(c, lane, map.get(c, lane), coordinates, shared.get(c, lane) & 0xffffffff);
      for (uint32_t i = 0; i < copy->rank(); ++i)
        if (copy->start[i] < 0) fail(c, "a store may not start at a negative coordinate");
      auto& group = c.warp.open_group[lane];
      if (!group) group = std::make_shared<BulkGroup>();
      copy->group = group;
      for (uint32_t row = 0; row < copy->rows(); ++row) {
        for (uint32_t x = 0; x < copy->row_bytes(); x += kPiece) {
          copy->group->unread++, copy->group->unwritten++;
          hold_reads(c.cta, copy->shared_at(row, x), kPiece, 1, &c.instruction, copy->who);
          race_copy_out(c, lane, c.cta, copy->shared_at(row, x), kPiece);
          c.machine.pieces.push_back([&machine = c.machine, copy, row, x] { store_piece(machine, copy, row, x); });
        }
      }
    });
    return Outcome::kNext;
  };
}

Handler commit(const Decoder& d) {
  d.expect_done();
  return [](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      auto& group = c.warp.open_group[lane];
      c.warp.bulk_groups[lane].push_back(group ? group : std::make_shared<BulkGroup>());
      group = nullptr;
    });
    return Outcome::kNext;
  };
}

Handler wait(const Decoder& d) {
  const bool read = d.take("read");
  d.expect_done();
  const auto pending = static_cast<size_t>(d.operand(0).integer);
  return [=](Context& c) {
    bool blocked = false;
    for_lanes(c.mask, [&](int lane) {
      auto& groups = c.warp.bulk_groups[lane];
      for (size_t i = 0; i + pending < groups.size(); ++i)
        blocked |= (read ? groups[i]->unread : groups[i]->unwritten) > 0;
    });
    if (blocked) {
      c.warp.wait = {Wait::For::kBulkGroup, &c.cta, 0, 0};
      return Outcome::kBlocked;
    }
    if (!read) {
      for_lanes(c.mask, [&](int lane) {
        auto& groups = c.warp.bulk_groups[lane];
        while (groups.size() > pending) groups.pop_front();
      });
    }
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_copy(const Decoder& d) {
  if (d.instruction.opcode != "cp" || !d.take("async") || !d.take("bulk")) return {};
  if (d.take("commit_group")) return commit(d);
  if (d.take("wait_group")) return wait(d);
  if (!d.take("tensor")) d.unknown("bulk copy");
  const std::string dimensions = d.next();
  if (dimensions.size() != 2 || dimensions[0] < '1' || dimensions[0] > '5' || dimensions[1] != 'd') d.unknown("rank");
  if (d.take("shared::cluster") || d.take("shared::cta")) return tensor_load(d);
  if (d.take("global")) return tensor_store(d);
  d.unknown("bulk copy");
}

}  // namespace emulator
