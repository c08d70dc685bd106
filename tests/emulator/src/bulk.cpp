// How bulk copies run: in pieces of 16 bytes that go in any order, between issue and completion.
#include <algorithm>
#include <cstring>

#include "copies.h"

namespace emulator {

constexpr uint32_t kPatience = 16;
static_assert(kSharedBase % 1024 == 0);  // the swizzle sees the same bits in offsets as in addresses

void hold(Flight& flight, const Instruction& by, const Who& who) {
  if (flight.bytes == 0) return;
  if (flight.source) hold_reads(*flight.source, flight.source_offset, flight.bytes, 1, &by, who);
  if (flight.target && flight.reduces)
    hold_reductions(*flight.target, flight.target_offset, flight.bytes, 1, &by, who);
  else if (flight.target)
    hold_writes(*flight.target, flight.target_offset, flight.bytes, 1, &by, who);
  if (flight.source && flight.target) flight.source->sends++;
  flight.held = true;
}

void release(Flight& flight) {
  flight.map = nullptr;
  if (!flight.held) return;
  flight.held = false;
  if (flight.source) hold_reads(*flight.source, flight.source_offset, flight.bytes, -1, nullptr, "");
  if (flight.target && flight.reduces)
    hold_reductions(*flight.target, flight.target_offset, flight.bytes, -1, nullptr, "");
  else if (flight.target)
    hold_writes(*flight.target, flight.target_offset, flight.bytes, -1, nullptr, "");
  if (flight.source && flight.target) flight.source->sends--;
}

void release_holds(Cta& cta, uint32_t barrier) {
  const auto found = cta.landed.find(barrier);
  if (found == cta.landed.end()) return;
  for (const auto& flight : found->second) release(*flight);
  cta.landed.erase(found);
}

uint64_t Box::bytes() const {
  uint64_t bytes = type().bytes;
  for (uint32_t i = 0; i < rank(); ++i) bytes *= extent[i];
  return bytes;
}

Run Box::at(uint32_t piece) const {
  uint32_t row = piece * kPiece / row_bytes();
  const uint32_t x = piece * kPiece % row_bytes();
  uint64_t address = map.address;
  for (uint32_t i = 1; i < rank(); ++i) {
    const int64_t coordinate = start[i] + int64_t{row % extent[i]} * (map.element_strides[i] + 1);
    row /= extent[i];
    if (coordinate < 0 || coordinate > int64_t{map.dims[i]}) return {};
    address += static_cast<uint64_t>(coordinate) * map.strides[i - 1];
  }
  const int64_t begin = start[0] * type().bytes + x, end = (map.dims[0] + int64_t{1}) * type().bytes;
  const int64_t first = std::clamp<int64_t>(-begin, 0, kPiece), last = std::clamp<int64_t>(end - begin, 0, kPiece);
  if (first >= last) return {};
  return {address + static_cast<uint64_t>(begin), static_cast<uint32_t>(first), static_cast<uint32_t>(last)};
}

uint32_t Bulk::shared_at(uint32_t begin, uint32_t piece) const {
  const uint32_t linear = begin + piece * kPiece;
  const uint32_t mask = box ? (1u << box->map.swizzle) - 1 : 0;
  return linear ^ (linear >> 7 & mask) << 4;
}

Bulk bulk_of(const Context& c) {
  return {&c.machine, &c.cta, &c.grid.counters, &c.instruction, where(c), 0, 0, {}, nullptr, {}};
}

std::vector<Destination> BulkOperands::destinations(Context& c, int lane, uint64_t bytes, uint32_t alignment) const {
  const auto data = static_cast<uint32_t>(shared.get(c, lane)), at = static_cast<uint32_t>(barrier.get(c, lane));
  if (data % alignment) fail(c, "the shared address is no multiple of " + std::to_string(alignment));
  if (at % 8) fail(c, "the mbarrier's address is no multiple of 8");
  const std::string who = where(c);
  const SharedPlace first = resolve_shared(c.cta, data, bytes, who), signal = resolve_shared(c.cta, at, 8, who);
  if (first.cta != signal.cta) fail(c, "the data and the mbarrier are in shared memory of different CTAs");
  if (!cluster && first.cta != &c.cta) fail(c, "a shared::cta address names another CTA");
  std::vector<Destination> all;
  const auto add = [&](Cta* cta) {
    all.push_back({cta, first.offset, signal.offset});
    race_use_mbarrier(c, lane, *cta, signal.offset);
    race_copy_in(c, lane, *cta, first.offset, static_cast<uint32_t>(bytes));
  };
  if (!multicast) {
    add(first.cta);
    return all;
  }
  const auto ranks = static_cast<uint32_t>(mask.get(c, lane) & 0xffff);
  const size_t size = c.cta.cluster.size();
  if (ranks == 0 || ranks >> size)
    fail(c, "multicast mask " + std::to_string(ranks) + " in a cluster of " + std::to_string(size) + " CTAs");
  for (uint32_t rank = 0; rank < size; ++rank) {
    const uint32_t base = kSharedBase + (rank << kRankShift);
    if (ranks >> rank & 1) add(resolve_shared(c.cta, base + first.offset, bytes, who).cta);
  }
  return all;
}

uint32_t BulkOperands::source(Context& c, int lane, uint64_t bytes, uint32_t alignment) const {
  const auto address = static_cast<uint32_t>(shared.get(c, lane));
  if (address % alignment) fail(c, "the shared address is no multiple of " + std::to_string(alignment));
  const SharedPlace place = resolve_shared(c.cta, address, bytes, c);
  if (place.cta != &c.cta) fail(c, "a shared::cta address names another CTA");
  race_copy_out(c, lane, c.cta, place.offset, static_cast<uint32_t>(bytes));
  return place.offset;
}

void take_mbarrier(const Decoder& d, BulkOperands& operands) {
  if (!d.take("mbarrier::complete_tx::bytes")) d.unknown("completion");
  operands.multicast = operands.cluster && d.take("multicast::cluster");
}

bool take_cache_hint(const Decoder& d) { return d.take("L2::cache_hint"); }

void expect_operands(const Decoder& d, size_t count, bool hint) {
  d.expect_done();
  d.operands(hint ? count + 1 : count);
  if (hint) d.source(count);
}

namespace {

std::shared_ptr<Flight> launch(const Bulk& bulk, Flight flight) {
  flight.bytes = bulk.bytes, flight.pieces = bulk.bytes / kPiece, flight.map = bulk.map;
  hold(flight, *bulk.instruction, bulk.who);
  return std::make_shared<Flight>(std::move(flight));
}

// What `to` finds in place of elements outside of the tensor.
void fill(const Bulk& bulk, std::array<uint8_t, kPiece>& to) {
  to.fill(0);
  if (!bulk.box || !bulk.box->map.fill_nan) return;
  to.fill(0xff);
  const uint32_t size = bulk.box->type().bytes;
  for (uint32_t i = size - 1; i < kPiece; i += size) to[i] = 0x7f;
}

// A piece for shared memory; the last one of a flight leaves the hold to the mbarrier's phase.
void land(const Bulk& bulk, const std::shared_ptr<Flight>& flight, uint32_t barrier, uint32_t piece,
          std::array<uint8_t, kPiece> bytes) {
  Cta& cta = *flight->target;
  const uint32_t offset = bulk.shared_at(flight->target_offset, piece);
  if (bulk.reduction) {
    std::array<uint8_t, kPiece> old;
    async_read_shared(cta, offset, old.data(), kPiece, bulk.who);
    reduce(*bulk.reduction, old.data(), bytes.data(), 0, kPiece);
    bytes = old;
  }
  async_write_shared(cta, offset, bytes.data(), kPiece);
  if (--flight->pieces == 0) cta.landed[barrier].push_back(flight);
  mbarrier_complete_tx(*bulk.machine, cta, barrier, kPiece, bulk.who, bulk.cta);
}

// Most often it puts the write off, so that what was read long ago has not arrived yet.
void write_global(const std::shared_ptr<const Bulk>& of, const std::shared_ptr<BulkGroup>& group, const Run& run,
                  std::array<uint8_t, kPiece> bytes) {
  const Bulk& bulk = *of;
  if (bulk.machine->below(kPatience) != 0) {
    bulk.machine->pieces.push_back([of, group, run, bytes] { write_global(of, group, run, bytes); });
    return;
  }
  const uint64_t at = run.address + run.first;
  if (bulk.reduction) {
    std::array<uint8_t, kPiece> old;
    async_read_global(*bulk.machine, *bulk.cta, at, old.data() + run.first, run.last - run.first, bulk.who);
    reduce(*bulk.reduction, old.data(), bytes.data(), run.first, run.last);
    bytes = old;
  }
  async_write_global(*bulk.machine, *bulk.cta, at, bytes.data() + run.first, run.last - run.first, bulk.who);
  bulk.counters->tma_bytes += run.last - run.first;
  group->unwritten--;
}

}  // namespace

void issue_load(const Bulk& of, const std::vector<Destination>& destinations) {
  const auto bulk = std::make_shared<const Bulk>(of);
  bulk->counters->tma_bytes += bulk->bytes;
  for (const Destination& to : destinations) {
    Flight flight;
    flight.target = to.cta, flight.target_offset = to.offset;
    const auto shared = launch(*bulk, flight);
    for (uint32_t piece = 0; piece < shared->pieces; ++piece) {
      bulk->machine->pieces.push_back([bulk, shared, barrier = to.barrier, piece] {
        std::array<uint8_t, kPiece> bytes;
        fill(*bulk, bytes);
        const Run run = bulk->at(piece);
        if (run.first < run.last)
          async_read_global(*bulk->machine, *bulk->cta, run.address + run.first, bytes.data() + run.first,
                            run.last - run.first, bulk->who);
        land(*bulk, shared, barrier, piece, bytes);
      });
    }
  }
}

void issue_store(Context& c, int lane, const Bulk& of, uint32_t source) {
  const auto bulk = std::make_shared<const Bulk>(of);
  auto& group = c.warp.open_group[lane];
  if (!group) group = std::make_shared<BulkGroup>();
  Flight flight;
  flight.source = &c.cta, flight.source_offset = source;
  group->flights.push_back(launch(*bulk, flight));
  for (uint32_t piece = 0; piece < bulk->bytes / kPiece; ++piece) {
    const Run run = bulk->at(piece);
    if (run.first >= run.last) continue;
    group->unread++, group->unwritten++;
    // It reads its source at one time, and writes at a later one.
    bulk->machine->pieces.push_back([bulk, group, run, offset = bulk->shared_at(source, piece)] {
      std::array<uint8_t, kPiece> bytes{};
      async_read_shared(*bulk->cta, offset + run.first, bytes.data() + run.first, run.last - run.first, bulk->who);
      group->unread--;
      bulk->machine->pieces.push_back([bulk, group, run, bytes] { write_global(bulk, group, run, bytes); });
    });
  }
}

void issue_send(const Bulk& of, uint32_t source, const Destination& destination) {
  const auto bulk = std::make_shared<const Bulk>(of);
  bulk->counters->tma_bytes += bulk->bytes;
  Flight flight;
  flight.source = bulk->cta, flight.source_offset = source;
  flight.target = destination.cta, flight.target_offset = destination.offset;
  flight.reduces = bulk->reduction != nullptr;
  const auto shared = launch(*bulk, flight);
  for (uint32_t piece = 0; piece < shared->pieces; ++piece) {
    bulk->machine->pieces.push_back([bulk, shared, barrier = destination.barrier, piece] {
      std::array<uint8_t, kPiece> bytes;
      async_read_shared(*shared->source, shared->source_offset + piece * kPiece, bytes.data(), kPiece, bulk->who);
      land(*bulk, shared, barrier, piece, bytes);
    });
  }
}

}  // namespace emulator
