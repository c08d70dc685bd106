// mbarrier objects: 8 bytes of shared memory in an encoding of the emulator's own (hardware's is opaque).
#include <cstring>

#include "memory.h"

namespace emulator {
namespace {

constexpr int64_t kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;

// The phase completes when `pending` and `bytes` are both 0; `pending` then starts anew from `expected`.
struct Barrier {
  bool phase;
  int64_t expected, pending, bytes;

  static Barrier load(const uint8_t* host, const std::string& who) {
    uint64_t word;
    std::memcpy(&word, host, 8);
    if (word >> 62 != 1) throw Error(who + ": this is no initialised mbarrier");
    const int64_t bytes = static_cast<int64_t>(word << 43) >> 43;
    return {(word >> 61 & 1) != 0, static_cast<int64_t>(word >> 41 & 0xfffff),
            static_cast<int64_t>(word >> 21 & 0xfffff), bytes};
  }

  void store(Machine& machine, Cta& cta, uint32_t offset, const std::string& who) {
    if (pending < 0) throw Error(who + ": more arrivals than the mbarrier expects in this phase");
    if (bytes > kMostBytes || bytes < -kMostBytes) throw Error(who + ": the transaction count leaves its range");
    if (pending == 0 && bytes == 0) {
      phase = !phase, pending = expected;
      race_complete_mbarrier(machine, cta, offset);
      release_holds(cta, offset);
    }
    const uint64_t word = 1ull << 62 | static_cast<uint64_t>(phase) << 61 | static_cast<uint64_t>(expected) << 41 |
                          static_cast<uint64_t>(pending) << 21 | (static_cast<uint64_t>(bytes) & 0x1fffff);
    std::memcpy(cta.shared.bytes.data() + offset, &word, 8);
    machine.events++;
  }
};

// Consumes modifiers of semantics, scope and space in any order; the emulator is sequentially consistent but for the
// async proxy, so they only have to be legal.
void take_qualifiers(const Decoder& d) {
  while (d.take("release") || d.take("acquire") || d.take("relaxed") || d.take("cta") || d.take("cluster") ||
         d.take("shared") || d.take("shared::cta")) {
  }
}

Place place_of(Context& c, int lane, const Address& address) {
  return locate(c, lane, Space::kShared, address.get(c, lane) & 0xffffffff, 8, true);
}

Handler init(const Decoder& d) {
  take_qualifiers(d);
  if (!d.take("b64")) d.unknown("mbarrier");
  d.expect_done();
  d.operands(2);
  return [address = address_of(d, d.operand(0)), count = d.source(1)](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const auto arrivals = static_cast<int64_t>(count.get(c, lane) & 0xffffffff);
      if (arrivals < 1 || arrivals > kMostArrivals) fail(c, "an mbarrier expects 1 to 2^20 - 1 arrivals");
      const Place place = place_of(c, lane, address);
      race_init_mbarrier(c, lane, *place.cta, place.offset);
      Barrier{false, arrivals, arrivals, 0}.store(c.machine, *place.cta, place.offset, where(c));
    });
    return Outcome::kNext;
  };
}

Handler arrive(const Decoder& d) {
  const bool expect = d.take("expect_tx");
  take_qualifiers(d);
  if (!d.take("b64")) d.unknown("mbarrier");
  d.expect_done();
  if (d.operand(0).kind != Operand::Kind::kSink) d.unknown("state of an mbarrier");
  const bool counted = d.instruction.operands.size() > 2;
  return [=, address = address_of(d, d.operand(1)), amount = counted ? d.source(2) : Source{}](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const Place place = place_of(c, lane, address);
      race_use_mbarrier(c, lane, *place.cta, place.offset);
      race_arrive(c, 1u << lane, place.cta->races.mbarriers[place.offset]);
      Barrier barrier = Barrier::load(place.cta->shared.bytes.data() + place.offset, where(c));
      const auto value = static_cast<int64_t>(amount.get(c, lane) & 0xffffffff);
      if (expect) barrier.bytes += value;
      barrier.pending -= expect || !counted ? 1 : value;
      barrier.store(c.machine, *place.cta, place.offset, where(c));
    });
    return Outcome::kNext;
  };
}

Handler try_wait(const Decoder& d) {
  if (!d.take("parity")) d.unknown("mbarrier");
  take_qualifiers(d);
  if (!d.take("b64")) d.unknown("mbarrier");
  d.expect_done();
  d.operands(3);
  return [p = d.destination(0), address = address_of(d, d.operand(1)), parity = d.source(2)](Context& c) {
    // It may say no at any time, so that loops that take it for a blocking wait show themselves.
    const bool spurious = c.machine.below(8) == 0;
    bool any = false;
    for_lanes(c.mask, [&](int lane) {
      const Place place = place_of(c, lane, address);
      race_use_mbarrier(c, lane, *place.cta, place.offset);
      const Barrier barrier = Barrier::load(place.cta->shared.bytes.data() + place.offset, where(c));
      const bool done = barrier.phase != ((parity.get(c, lane) & 1) != 0);
      c.warp.reg(p)[lane] = done && !spurious;
      if (done && !spurious) race_leave(c, 1u << lane, place.cta->races.mbarriers[place.offset]);
      any |= done;
      if (!done) c.warp.wait = {Wait::For::kMbarrier, place.cta, place.offset, parity.get(c, lane) & 1};
    });
    if (any) c.warp.wait.what = Wait::For::kNothing;
    if (!any) c.warp.sleep = c.machine.below(16), c.machine.note_poll(c.warp);
    return Outcome::kNext;
  };
}

}  // namespace

void mbarrier_complete_tx(Machine& machine, Cta& cta, uint32_t offset, int64_t bytes, const std::string& who) {
  Barrier barrier = Barrier::load(cta.shared.bytes.data() + offset, who);
  barrier.bytes -= bytes;
  barrier.store(machine, cta, offset, who);
}

void mbarrier_add_pending(Machine& machine, Cta& cta, uint32_t offset, int64_t arrivals, const std::string& who) {
  Barrier barrier = Barrier::load(cta.shared.bytes.data() + offset, who);
  barrier.pending += arrivals;
  if (barrier.pending > kMostArrivals) throw Error(who + ": more arrivals than an mbarrier can count");
  barrier.store(machine, cta, offset, who);
}

std::string describe_mbarrier(const Cta& cta, uint32_t offset) {
  const Barrier b = Barrier::load(cta.shared.bytes.data() + offset, "a wait");
  return "mbarrier at shared offset " + std::to_string(offset) + " of CTA rank " + std::to_string(cta.cluster_rank) +
         ", in phase " + std::to_string(b.phase) + ": " + std::to_string(b.pending) + " of " +
         std::to_string(b.expected) + " arrivals and " + std::to_string(b.bytes) + " bytes to come";
}

Handler decode_mbarrier(const Decoder& d) {
  if (d.instruction.opcode != "mbarrier") return {};
  if (d.take("init")) return init(d);
  if (d.take("arrive")) return arrive(d);
  if (d.take("try_wait") || d.take("test_wait")) return try_wait(d);
  d.unknown("mbarrier");
}

}  // namespace emulator
