// mbarrier objects: 8 bytes of shared memory in an encoding of the emulator's own (hardware's is opaque).
#include <cstring>

#include "memory.h"

namespace emulator {
namespace {

constexpr int64_t kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;

// The phase completes when `pending` and `bytes` are both 0; `pending` then starts anew from `expected`.
struct Counts {
  bool phase;
  int64_t expected, pending, bytes;
};

Counts load_counts(const Cta& cta, uint32_t offset) {
  uint64_t word;
  std::memcpy(&word, cta.shared.bytes.data() + offset, 8);
  const int64_t bytes = static_cast<int64_t>(word << 43) >> 43;
  return {(word >> 61 & 1) != 0, static_cast<int64_t>(word >> 41 & 0xfffff), static_cast<int64_t>(word >> 21 & 0xfffff),
          bytes};
}

uint64_t word_of(const Counts& counts) {
  return 1ull << 62 | static_cast<uint64_t>(counts.phase) << 61 | static_cast<uint64_t>(counts.expected) << 41 |
         static_cast<uint64_t>(counts.pending) << 21 | (static_cast<uint64_t>(counts.bytes) & 0x1fffff);
}

// A live mbarrier, or an Error.
struct Barrier {
  Machine& machine;
  Cta& cta;
  uint32_t offset;
  const Who who;
  SharedMemory::Mbarrier* live;
  Counts counts;

  Barrier(Machine& machine, Cta& cta, uint32_t offset, const Who& who)
      : machine(machine), cta(cta), offset(offset), who(who), live(nullptr), counts{} {
    const auto found = cta.shared.mbarriers.find(offset);
    if (found == cta.shared.mbarriers.end())
      throw Error(who + ": there is no initialised mbarrier at shared offset " + std::to_string(offset));
    live = &found->second;
    counts = load_counts(cta, offset);
  }

  void check_init_seen_by(const Cta& from) const {
    if (&from != &cta && !live->released)
      throw Error(who + ": no fence.mbarrier_init between the init of this mbarrier and its use by another CTA");
  }

  // What is the same in every phase of a barrier, and names the phase: what arrivals return.
  uint64_t token(bool no_complete) const {
    return (no_complete ? 3ull : 2ull) << 62 | static_cast<uint64_t>(offset / 8) << 44 |
           static_cast<uint64_t>(live->phases & 0xffffff) << 20 | static_cast<uint64_t>(counts.pending);
  }

  void announce(int64_t more) {
    counts.bytes += more;
    if (counts.bytes > kMostBytes || counts.bytes < -kMostBytes)
      throw Error(who + ": the transaction count leaves its range with " + std::to_string(counts.bytes) + " bytes");
  }

  void arrive(int64_t count) {
    if (count > counts.pending)
      throw Error(who + ": more arrivals than the mbarrier expects in this phase: " + std::to_string(count) +
                  ", where " + std::to_string(counts.pending) + " of " + std::to_string(counts.expected) +
                  " are to come");
    counts.pending -= count;
  }

  void drop(int64_t count) {
    if (count > counts.expected) throw Error(who + ": it drops more arrivals than the mbarrier expects");
    counts.expected -= count;
  }

  void store() {
    if (counts.pending == 0 && counts.bytes == 0) {
      counts.phase = !counts.phase, counts.pending = counts.expected;
      live->phases++;
      race_complete_mbarrier(machine, cta, offset);
      release_holds(cta, offset);
    }
    const uint64_t word = word_of(counts);
    std::memcpy(cta.shared.bytes.data() + offset, &word, 8);
    machine.events++;
  }
};

enum class Where : uint8_t { kGeneric, kOwn, kCluster };

// What stands between the operation and .b64.
struct Qualifiers {
  Order order;
  Where where = Where::kGeneric;
};

// `strong` is .release or .acquire, the default with .cta; a scope needs an order, and an order a scope.
Qualifiers take_qualifiers(const Decoder& d, const char* strong, bool remote) {
  Qualifiers q;
  const bool relaxed = d.take("relaxed");
  const bool given = relaxed || (strong[0] != 0 && d.take(strong));
  q.order.strong = true;
  q.order.release = !relaxed && std::strcmp(strong, "release") == 0;
  q.order.acquire = !relaxed && std::strcmp(strong, "acquire") == 0;
  if (given) {
    if (d.take("cluster"))
      q.order.scope = Scope::kCluster;
    else if (!d.take("cta"))
      d.unknown("scope");
  }
  if (d.take("shared") || d.take("shared::cta"))
    q.where = Where::kOwn;
  else if (remote && d.take("shared::cluster"))
    q.where = Where::kCluster;
  if (!d.take("b64")) d.unknown("mbarrier");
  d.expect_done();
  return q;
}

Place place_of(Context& c, int lane, const Address& address, Where where) {
  const uint64_t at = address.get(c, lane);
  if (where == Where::kGeneric && (at & kWindowMask) != kSharedWindow)
    fail(c, "an mbarrier lies in shared memory, and this is no address there");
  const Place place = locate(c, lane, Space::kShared, at & 0xffffffff, 8, true);
  if (where != Where::kCluster && place.cta != &c.cta)
    fail(c, "this mbarrier is another CTA's: it needs .shared::cluster");
  return place;
}

int64_t count_of(Context& c, int lane, const Source& count) {
  const auto value = static_cast<int64_t>(count.get(c, lane) & 0xffffffff);
  if (value < 1 || value > kMostArrivals)
    fail(c, "a count of arrivals is 1 to 2^20 - 1, and this is " + std::to_string(value));
  return value;
}

int64_t bytes_of_operand(Context& c, int lane, const Source& bytes) {
  const auto value = static_cast<int64_t>(bytes.get(c, lane) & 0xffffffff);
  if (value > kMostBytes)
    fail(c, "a transaction has 0 to 2^20 - 1 bytes: the count " + std::to_string(value) + " leaves its range");
  return value;
}

uint8_t half_of(uint32_t offset) { return offset / 8 % 2 ? 2 : 1; }

Handler init(const Decoder& d) {
  const Qualifiers q = take_qualifiers(d, "", false);
  d.operands(2);
  return [q, address = address_of(d, d.operand(0)), count = d.source(1)](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const int64_t arrivals = count_of(c, lane, count);
      const Place place = place_of(c, lane, address, q.where);
      SharedMemory& shared = place.cta->shared;
      if (shared.mbarriers.contains(place.offset))
        fail(c, "the mbarrier at shared offset " + std::to_string(place.offset) +
                    " is in use: it needs mbarrier.inval before another init");
      const uint64_t word = word_of({false, arrivals, arrivals, 0});
      race_init_mbarrier(c, lane, *place.cta, place.offset);
      shared_write(c, lane, *place.cta, place.offset, &word, 8);
      shared.mbarriers[place.offset] = {.known = 1u << c.warp.index};
      shared.holds[place.offset / kHold].mbarriers |= half_of(place.offset);
      c.machine.events++;
    });
    return Outcome::kNext;
  };
}

Handler invalidate(const Decoder& d) {
  const Qualifiers q = take_qualifiers(d, "", false);
  d.operands(1);
  return [q, address = address_of(d, d.operand(0))](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const Place place = place_of(c, lane, address, q.where);
      Barrier barrier(c.machine, *place.cta, place.offset, c);
      SharedMemory& shared = place.cta->shared;
      shared.holds[place.offset / kHold].mbarriers &= static_cast<uint8_t>(~half_of(place.offset));
      std::fill_n(shared.defined.begin() + place.offset, 8, static_cast<uint8_t>(0));
      shared.mbarriers.erase(place.offset);
      c.machine.events++;
    });
    return Outcome::kNext;
  };
}

// arrive and arrive_drop, {.expect_tx, .noComplete}.
Handler arrive(const Decoder& d, bool drop) {
  const bool expect = d.take("expect_tx"), no_complete = !expect && d.take("noComplete");
  const Qualifiers q = take_qualifiers(d, "release", !no_complete);
  if (no_complete && (!q.order.release || q.order.scope != Scope::kCta)) d.unknown("order");
  const bool counted = d.instruction.operands.size() > 2;
  d.operands(counted ? 3 : 2);
  if ((expect || no_complete) && !counted) d.unknown("number of operands");
  const int state = d.destination(0);
  if (q.where == Where::kCluster && state >= 0) d.unknown("state: remote arrivals return none");
  return [=, address = address_of(d, d.operand(1)), amount = counted ? d.source(2) : Source{}](Context& c) {
    if (q.order.release) global_fence(c, q.order);
    std::array<uint64_t, kLanes> tokens;
    for_shuffled(c, [&](int lane) {
      const Place place = place_of(c, lane, address, q.where);
      Barrier barrier(c.machine, *place.cta, place.offset, c);
      barrier.check_init_seen_by(c.cta);
      race_use_mbarrier(c, lane, *place.cta, place.offset);
      if (q.order.release) race_arrive(c, 1u << lane, place.cta->races.mbarriers[place.offset]);
      tokens[lane] = barrier.token(no_complete);
      if (expect) barrier.announce(bytes_of_operand(c, lane, amount));
      const int64_t count = expect || !counted ? 1 : count_of(c, lane, amount);
      barrier.arrive(count);
      if (drop) barrier.drop(count);
      if (no_complete && barrier.counts.pending == 0) fail(c, "an arrival with .noComplete would complete the phase");
      barrier.store();
    });
    if (state >= 0) for_lanes(c.mask, [&](int lane) { c.warp.reg(state)[lane] = tokens[lane]; });
    return Outcome::kNext;
  };
}

// expect_tx and complete_tx, which do not arrive.
Handler transact(const Decoder& d, int64_t sign) {
  const Qualifiers q = take_qualifiers(d, "", true);
  d.operands(2);
  return [=, address = address_of(d, d.operand(0)), amount = d.source(1)](Context& c) {
    for_shuffled(c, [&](int lane) {
      const Place place = place_of(c, lane, address, q.where);
      Barrier barrier(c.machine, *place.cta, place.offset, c);
      barrier.check_init_seen_by(c.cta);
      race_use_mbarrier(c, lane, *place.cta, place.offset);
      barrier.announce(sign * bytes_of_operand(c, lane, amount));
      barrier.store();
    });
    return Outcome::kNext;
  };
}

bool is_over(Context& c, const Barrier& barrier, bool parity, uint64_t value) {
  if (parity) {
    // Hardware looks at the lowest bit; Triton passes -1 for 1.
    return barrier.counts.phase != ((value & 1) != 0);
  }
  if (value >> 63 == 0) fail(c, "this is no state that an arrival has returned");
  if ((value >> 44 & 0x3ffff) != barrier.offset / 8) fail(c, "this is the state of another mbarrier");
  const uint32_t behind = (barrier.live->phases - static_cast<uint32_t>(value >> 20)) & 0xffffff;
  if (behind > 1) fail(c, "this state is " + std::to_string(behind) + " phases old: waits see only the last one");
  return behind == 1;
}

// test_wait and try_wait: the latter may take its time, and say no at any time, so that loops that take it for a wait
// show themselves.
Handler wait(const Decoder& d, bool tries) {
  const bool parity = d.take("parity");
  const Qualifiers q = take_qualifiers(d, "acquire", false);
  const bool hinted = tries && d.instruction.operands.size() == 4;
  d.operands(hinted ? 4 : 3);
  if (hinted) d.source(3);
  return [=, p = d.destination(0), address = address_of(d, d.operand(1)), phase = d.source(2)](Context& c) {
    const bool spurious = tries && c.machine.below(8) == 0;
    uint32_t over = 0;
    Wait waits;
    for_lanes(c.mask, [&](int lane) {
      const Place place = place_of(c, lane, address, q.where);
      const Barrier barrier(c.machine, *place.cta, place.offset, c);
      race_use_mbarrier(c, lane, *place.cta, place.offset);
      const uint64_t value = parity ? phase.get(c, lane) & 0xffffffff : phase.get(c, lane);
      if (is_over(c, barrier, parity, value)) {
        over |= 1u << lane;
        if (!spurious && q.order.acquire) race_leave(c, 1u << lane, place.cta->races.mbarriers[place.offset]);
      } else {
        waits = {Wait::For::kMbarrier, place.cta, place.offset, parity ? value & 1 : barrier.counts.phase};
      }
    });
    c.warp.wait = waits;
    if (over == 0) c.warp.sleep = c.machine.below(16), c.machine.note_poll(c.warp);
    const uint32_t told = spurious ? 0 : over;
    if (p >= 0) for_lanes(c.mask, [&](int lane) { c.warp.reg(p)[lane] = told >> lane & 1; });
    if (told && q.order.acquire) global_fence(c, q.order);
    return Outcome::kNext;
  };
}

Handler pending_count(const Decoder& d) {
  if (!d.take("b64")) d.unknown("mbarrier");
  d.expect_done();
  d.operands(2);
  return [result = d.destination(0), state = d.source(1)](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const uint64_t value = state.get(c, lane);
      if (value >> 62 != 3) fail(c, "this is no state that an arrival with .noComplete has returned");
      if (result >= 0) c.warp.reg(result)[lane] = value & 0xfffff;
    });
    return Outcome::kNext;
  };
}

}  // namespace

void mbarrier_complete_tx(Machine& machine, Cta& cta, uint32_t offset, int64_t bytes, const Who& who, const Cta* from) {
  Barrier barrier(machine, cta, offset, who);
  if (from != nullptr) barrier.check_init_seen_by(*from);
  barrier.announce(-bytes);
  barrier.store();
}

void mbarrier_add_pending(Machine& machine, Cta& cta, uint32_t offset, int64_t arrivals, const Who& who) {
  Barrier barrier(machine, cta, offset, who);
  if (arrivals < 0) {
    barrier.arrive(-arrivals);
  } else {
    barrier.counts.pending += arrivals;
    if (barrier.counts.pending > kMostArrivals) throw Error(who + ": more arrivals than an mbarrier can count");
  }
  barrier.store();
}

void mbarriers_told(SharedMemory& shared, uint32_t from, uint32_t to) {
  for (auto& [offset, barrier] : shared.mbarriers)
    if (barrier.known & from) barrier.known |= to;
}

void mbarriers_released(SharedMemory& shared, int warp) {
  for (auto& [offset, barrier] : shared.mbarriers) barrier.released |= (barrier.known >> warp & 1) != 0;
}

void mbarriers_check_exit(const Context& c) {
  for (const auto& [offset, barrier] : c.cta.shared.mbarriers) {
    const int64_t bytes = load_counts(c.cta, offset).bytes;
    if (bytes == 0) continue;
    fail(c, "the CTA exits while the mbarrier at shared offset " + std::to_string(offset) +
                (bytes > 0 ? " still expects " + std::to_string(bytes) + " bytes"
                           : " has been sent " + std::to_string(-bytes) + " bytes that nobody expected"));
  }
}

std::string describe_mbarrier(const Cta& cta, uint32_t offset) {
  const std::string name =
      "mbarrier at shared offset " + std::to_string(offset) + " of CTA rank " + std::to_string(cta.cluster_rank);
  if (!cta.shared.mbarriers.contains(offset)) return name + ", which is invalid by now";
  const Counts counts = load_counts(cta, offset);
  return name + ", in phase " + std::to_string(counts.phase) + ": " + std::to_string(counts.pending) + " of " +
         std::to_string(counts.expected) + " arrivals and " + std::to_string(counts.bytes) + " bytes to come";
}

Handler decode_mbarrier(const Decoder& d) {
  if (d.instruction.opcode != "mbarrier") return {};
  if (d.take("init")) return init(d);
  if (d.take("inval")) return invalidate(d);
  if (d.take("arrive")) return arrive(d, false);
  if (d.take("arrive_drop")) return arrive(d, true);
  if (d.take("expect_tx")) return transact(d, 1);
  if (d.take("complete_tx")) return transact(d, -1);
  if (d.take("try_wait")) return wait(d, true);
  if (d.take("test_wait")) return wait(d, false);
  if (d.take("pending_count")) return pending_count(d);
  d.unknown("mbarrier");
}

}  // namespace emulator
