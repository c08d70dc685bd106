// Asynchronous copies: what is in flight, and who issues it.
#pragma once
#include <optional>

#include "machine.h"
#include "memory.h"
#include "reduce.h"
#include "tensor_map.h"

namespace emulator {

constexpr uint32_t kPiece = 16;  // bytes: what arrives at a time

struct Arrival;

// The shared memory and the tensor map that a copy uses, held from its issue until a thread can know that it is over:
// by a wait of its group, or by the phase of its mbarrier.
struct Flight {
  Cta *source = nullptr, *target = nullptr;  // whose shared memory it reads, and writes
  uint32_t source_offset = 0, target_offset = 0, bytes = 0;
  bool reduces = false;  // combines with what is in the target
  uint32_t pieces = 0;   // still to come
  bool held = false;
  std::shared_ptr<void> map;                       // marks the tensor map as in use
  std::vector<std::shared_ptr<Arrival>> arrivals;  // cp.async: what waits for it
};

void hold(Flight& flight, const Instruction& by, const Who& who);
void release(Flight& flight);

// The part of a piece that lies inside of the tensor: its bytes [first, last), of which byte 0 would be at `address`.
struct Run {
  uint64_t address;
  uint32_t first, last;
};

// A tile of a tensor: a box with its place.
struct Box {
  TensorMapBits map;
  std::array<int64_t, kMaxRank> start{};    // coordinates, innermost first
  std::array<uint32_t, kMaxRank> extent{};  // elements that are copied

  uint32_t rank() const { return map.rank + 1u; }
  const ElementType& type() const { return kElementTypes[map.element_type]; }
  uint32_t row_bytes() const { return extent[0] * type().bytes; }
  uint64_t bytes() const;
  Run at(uint32_t piece) const;
};

// One bulk copy or reduction, between shared memory and either a range of global memory or a tile.
struct Bulk {
  Machine* machine;
  Cta* cta;  // that issues it
  Counters* counters;
  const Instruction* instruction;
  std::string who;
  uint32_t bytes = 0;
  uint64_t address = 0;    // of the range
  std::optional<Box> box;  // the tile
  const Reduction* reduction = nullptr;
  std::shared_ptr<void> map;

  Run at(uint32_t piece) const { return box ? box->at(piece) : Run{address + uint64_t{piece} * kPiece, 0, kPiece}; }
  // Where a piece lies in shared memory of which the tile or range begins at `begin`.
  uint32_t shared_at(uint32_t begin, uint32_t piece) const;
};
Bulk bulk_of(const Context& c);

// Shared memory that a bulk copy writes, with the mbarrier that learns of it; both in the same CTA.
struct Destination {
  Cta* cta;
  uint32_t offset, barrier;
};

// Operands and modifiers that bulk copies have in common, in the order of PTX.
struct BulkOperands {
  Address shared;   // source or destination
  Address barrier;  // of what writes shared memory
  Source mask;      // of a multicast
  bool cluster = false, multicast = false;

  // `offset_alignment` is that of the data.
  std::vector<Destination> destinations(Context& c, int lane, uint64_t bytes, uint32_t alignment) const;
  uint32_t source(Context& c, int lane, uint64_t bytes, uint32_t alignment) const;
};
// Consumes .mbarrier::complete_tx::bytes{.multicast::cluster}.
void take_mbarrier(const Decoder& d, BulkOperands& operands);
// Consumes .L2::cache_hint; whether it was there.
bool take_cache_hint(const Decoder& d);
// Checks the number of operands; a cache policy, which has no meaning here, is the last one.
void expect_operands(const Decoder& d, size_t count, bool hint);

void issue_load(const Bulk& bulk, const std::vector<Destination>& destinations);
void issue_store(Context& c, int lane, const Bulk& bulk, uint32_t source);
void issue_send(const Bulk& bulk, uint32_t source, const Destination& destination);

// The 128 bytes of a tensor map that lies where a copy may find one, or an error.
const uint8_t* find_tensor_map(Context& c, uint64_t address);
bool is_global(uint64_t address);
// Marks a tensor map in global memory as used by what keeps the result.
std::shared_ptr<void> use_tensor_map(Machine& machine, uint64_t address);
// Raises where what was stored to a tensor map in global memory may not have come to the tensormap proxy of the CTA.
void check_not_stale(Context& c, uint64_t address);

// Whether the instruction is prefetch.tensormap, which is not a prefetch of data.
bool is_tensor_map_prefetch(const Instruction& instruction);

// Families within decode_copy. The opcode and what comes before the differences are consumed.
Handler decode_async_copy(const Decoder& d);    // cp.async
Handler decode_bulk_copy(const Decoder& d);     // cp.async.bulk
Handler decode_bulk_reduce(const Decoder& d);   // cp.reduce.async.bulk
Handler decode_tensor_copy(const Decoder& d);   // cp.async.bulk.tensor
Handler decode_tensor_fetch(const Decoder& d);  // cp.async.bulk.prefetch.tensor
Handler decode_tensor_reduce(const Decoder& d);
Handler decode_tensor_map(const Decoder& d);
Handler decode_tensor_map_prefetch(const Decoder& d);
Handler decode_tensor_map_fence(const Decoder& d);  // fence.proxy.tensormap::generic

}  // namespace emulator
