// cp.async: copies of 4 to 16 bytes by the generic proxy, from global to shared memory, at any time before they are
// waited for.
#include <bit>
#include <utility>

#include "copies.h"

namespace emulator {

// An arrival at an mbarrier by cp.async.mbarrier.arrive, once the copies that its thread had issued are done.
struct Arrival {
  Context context;
  int lane;
  uint32_t barrier;
  std::string who;
  std::vector<std::weak_ptr<Flight>> flights;  // they own the arrival
  size_t left;
};

namespace {

using Flights = std::vector<std::shared_ptr<Flight>>;

void post(const std::shared_ptr<Arrival>& arrival) {
  arrival->context.machine.pieces.push_back([arrival] {
    Context& c = arrival->context;
    auto& landed = c.cta.landed[arrival->barrier];
    for (const auto& flight : arrival->flights)
      if (auto waiting = flight.lock()) landed.push_back(std::move(waiting));
    // The copies were accesses of their thread.
    race_arrive(c, 1u << arrival->lane, c.cta.races.mbarriers[arrival->barrier]);
    mbarrier_add_pending(c.machine, c.cta, arrival->barrier, -1, arrival->who);
  });
}

struct AsyncCopy {
  uint32_t bytes;
  Address to, from;
  std::optional<Source> source_bytes, ignored;
};

void land(Context c, int lane, const std::shared_ptr<Flight>& flight, uint64_t source, uint32_t count) {
  std::array<uint8_t, 16> bytes{};
  for (uint32_t done = 0; done < count;) {
    // A lane's access of the memory model is a power of two.
    const uint32_t part = std::bit_floor(count - done);
    global_load(c, lane, source + done, bytes.data() + done, part, {});
    done += part;
  }
  // Its own hold does not keep it out. It stays in place for all others until a wait.
  const bool held = flight->held;
  if (held) hold_writes(c.cta, flight->target_offset, flight->bytes, -1, nullptr, "");
  shared_write(c, lane, c.cta, flight->target_offset, bytes.data(), flight->bytes);
  if (held) hold_writes(c.cta, flight->target_offset, flight->bytes, 1, &c.instruction, "");
  flight->pieces = 0;
  for (const auto& arrival : flight->arrivals)
    if (--arrival->left == 0) post(arrival);
  flight->arrivals.clear();
}

void issue(Context& c, int lane, const AsyncCopy& copy, const Who& who) {
  const uint64_t source = copy.from.get(c, lane);
  uint64_t count = copy.bytes;
  if (copy.source_bytes) count = copy.source_bytes->get(c, lane) & 0xffffffff;
  if (copy.ignored && (copy.ignored->get(c, lane) & 1)) count = 0;
  if (count > copy.bytes)
    fail(c, "a source of " + std::to_string(count) + " bytes for " + std::to_string(copy.bytes) + " to copy");
  if (source % copy.bytes) fail(c, "misaligned: the source is no multiple of " + std::to_string(copy.bytes));
  if (count > 0) c.machine.memory.find(source, count, false, who);
  const Place place = locate(c, lane, Space::kShared, copy.to.get(c, lane), copy.bytes, true);
  if (place.cta != &c.cta) fail(c, "cp.async writes shared memory of its own CTA only");
  auto flight = std::make_shared<Flight>();
  flight->target = place.cta, flight->target_offset = place.offset;
  flight->bytes = copy.bytes, flight->pieces = 1;
  hold(*flight, c.instruction, who);
  c.warp.async_copies[lane].open.push_back(flight);
  c.machine.pieces.push_back(
      [c, lane, flight, source, count = static_cast<uint32_t>(count)] { land(c, lane, flight, source, count); });
}

// cp.async.{ca,cg}.shared{::cta}.global{.L2::cache_hint}{.L2::NB} [to], [from], size{, source size or ignore}{, policy}
Handler copy(const Decoder& d) {
  const bool only16 = d.take("cg");
  if (!only16 && !d.take("ca")) d.unknown("copy");
  if (!(d.take("shared") || d.take("shared::cta")) || !d.take("global")) d.unknown("state space");
  const bool hint = take_cache_hint(d);
  if (!d.take("L2::64B") && !d.take("L2::128B")) d.take("L2::256B");
  const bool fourth = d.instruction.operands.size() == (hint ? 5 : 4);
  expect_operands(d, fourth ? 4 : 3, hint);
  const Operand& size = d.operand(2);
  const int64_t n = size.integer;
  if (size.kind != Operand::Kind::kInteger || !(n == 16 || (!only16 && (n == 4 || n == 8)))) d.unknown("size");
  AsyncCopy copy{static_cast<uint32_t>(n), address_of(d, d.operand(0)), address_of(d, d.operand(1)), {}, {}};
  if (fourth) {
    const Operand& last = d.operand(3);
    const bool predicate = last.kind == Operand::Kind::kRegister &&
                           d.placed.function->registers.at(static_cast<size_t>(last.index)).type == "pred";
    (predicate ? copy.ignored : copy.source_bytes) = d.source(last);
  }
  return [copy](Context& c) {
    const std::string who = where(c);
    for_lanes(c.mask, [&](int lane) { issue(c, lane, copy, who); });
    return Outcome::kNext;
  };
}

void commit_lane(CopyGroups& groups) { groups.committed.push_back(std::exchange(groups.open, {})); }

Handler commit(const Decoder& d) {
  d.expect_done();
  d.operands(0);
  return [](Context& c) {
    for_lanes(c.mask, [&](int lane) { commit_lane(c.warp.async_copies[lane]); });
    return Outcome::kNext;
  };
}

// .wait_group N leaves the newest N groups; .wait_all waits for what is in no group, too.
Handler wait(const Decoder& d, bool all) {
  d.expect_done();
  d.operands(all ? 0 : 1);
  if (!all && (d.operand(0).kind != Operand::Kind::kInteger || d.operand(0).integer < 0)) d.unknown("number of groups");
  const size_t pending = all ? 0 : static_cast<size_t>(d.operand(0).integer);
  return [=](Context& c) {
    bool blocked = false;
    const auto check = [&](const Flights& flights) {
      for (const auto& flight : flights) blocked |= flight->pieces > 0;
    };
    for_lanes(c.mask, [&](int lane) {
      const CopyGroups& groups = c.warp.async_copies[lane];
      for (size_t i = 0; i + pending < groups.committed.size(); ++i) check(groups.committed[i]);
      if (all) check(groups.open);
    });
    if (blocked) {
      c.warp.wait = {Wait::For::kBulkGroup, &c.cta, 0, 0};
      return Outcome::kBlocked;
    }
    for_lanes(c.mask, [&](int lane) {
      CopyGroups& groups = c.warp.async_copies[lane];
      if (all) commit_lane(groups);
      for (; groups.committed.size() > pending; groups.committed.pop_front())
        for (const auto& flight : groups.committed.front()) release(*flight);
    });
    return Outcome::kNext;
  };
}

// cp.async.mbarrier.arrive{.noinc}{.shared{::cta}}.b64 [mbarrier]
Handler arrive(const Decoder& d) {
  const bool counted = d.take("noinc");
  std::optional<Space> space;
  if (d.take("shared") || d.take("shared::cta")) space = Space::kShared;
  if (!d.take("b64")) d.unknown("mbarrier");
  d.expect_done();
  d.operands(1);
  return [=, address = address_of(d, d.operand(0))](Context& c) {
    const std::string who = where(c);
    for_lanes(c.mask, [&](int lane) {
      const Place place = locate(c, lane, space, address.get(c, lane), 8, true);
      if (place.cta != &c.cta) fail(c, "the mbarrier is not in shared memory of the CTA");
      if (!counted) mbarrier_add_pending(c.machine, c.cta, place.offset, 1, who);
      auto arrival = std::make_shared<Arrival>(Arrival{c, lane, place.offset, who, {}, 0});
      const auto track = [&](Flights& flights) {
        std::erase_if(flights, [](const auto& flight) { return !flight->held; });
        for (const auto& flight : flights) {
          arrival->flights.push_back(flight);
          if (flight->pieces == 0) continue;
          flight->arrivals.push_back(arrival);
          arrival->left++;
        }
      };
      CopyGroups& groups = c.warp.async_copies[lane];
      for (Flights& flights : groups.committed) track(flights);
      track(groups.open);
      if (arrival->left == 0) post(arrival);
    });
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_async_copy(const Decoder& d) {
  if (d.take("commit_group")) return commit(d);
  if (d.take("wait_group")) return wait(d, false);
  if (d.take("wait_all")) return wait(d, true);
  if (!d.take("mbarrier")) return copy(d);
  if (!d.take("arrive")) d.unknown("mbarrier");
  return arrive(d);
}

}  // namespace emulator
