#include "race.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

constexpr uint32_t kBytes = 16;  // of shared memory that share a list of accesses
constexpr uint32_t kMbarrierBytes = 8;
constexpr size_t kMostAccesses = 256;  // in a list; the oldest are forgotten

using Access = Races::Access;

uint32_t warps_of_cluster(const Cta& cta) { return static_cast<uint32_t>(cta.cluster.size() * cta.warps.size()); }
uint16_t warp_of(const Context& c) {
  return static_cast<uint16_t>(c.cta.cluster_rank * c.cta.warps.size() + c.warp.index);
}
uint32_t thread_of(const Context& c, int lane) { return warp_of(c) * kLanes + static_cast<uint32_t>(lane); }

Known& known_of(Context& c, int lane) {
  auto& known = c.cta.races.known;
  if (known.empty()) known.resize(c.cta.warps.size() * kLanes);
  return known[static_cast<size_t>(c.warp.index) * kLanes + static_cast<size_t>(lane)];
}

std::vector<Access>& granule(Cta& cta, uint32_t index) {
  auto& granules = cta.races.granules;
  if (granules.empty()) granules.resize(cta.shared.size() / kBytes + 1);
  return granules[index];
}

// Calls f(accesses of the granule, mask of the bytes in it) for each granule of the range.
template <class F>
void for_granules(Cta& cta, uint32_t offset, uint32_t bytes, F&& f) {
  for (uint32_t at = offset; at < offset + bytes;) {
    const uint32_t first = at % kBytes, count = std::min(kBytes - first, offset + bytes - at);
    f(granule(cta, at / kBytes), static_cast<uint16_t>(((1u << count) - 1) << first));
    at += count;
  }
}

// The lanes of an access that a thread with this clock does not know of.
uint32_t unordered(const Access& access, uint32_t self, const Known& known) {
  const uint32_t first = access.warp * kLanes;
  uint32_t lanes = access.lanes;
  if (known) {
    const uint64_t* times = known->data() + first;
    for_lanes(access.lanes, [&](int lane) { lanes &= ~((times[lane] >= access.time ? 1u : 0u) << lane); });
  }
  return self / kLanes == access.warp ? lanes & ~(1u << self % kLanes) : lanes;
}

std::string name_of(const Cta& cta, uint32_t thread) {
  const uint32_t warps = static_cast<uint32_t>(cta.warps.size());
  if (thread / kLanes == warps_of_cluster(cta)) return "a bulk copy";
  std::string name = "thread " + std::to_string(thread % (warps * kLanes));
  if (cta.cluster.size() > 1) name += " of CTA rank " + std::to_string(thread / (warps * kLanes));
  return name;
}

[[noreturn]] void fail_race(Context& c, int lane, const Access& before, uint32_t lanes, uint16_t bytes, bool write) {
  const uint32_t other = before.warp * kLanes + static_cast<uint32_t>(__builtin_ctz(lanes));
  fail(c, "race: " + std::to_string(__builtin_popcount(before.bytes & bytes)) + " bytes of shared memory " +
              (before.write ? "written" : "read") + " by " + name_of(c.cta, other) + " at line " +
              std::to_string(before.by->line) + " (" + before.by->text.substr(0, 70) + "), and " +
              (write ? "written" : "read") + " by " + name_of(c.cta, thread_of(c, lane)) + " at line " +
              std::to_string(c.instruction.line) + ", with no barrier in between");
}

void note(std::vector<Access>& accesses, const Access& access) {
  for (auto it = accesses.rbegin(); it != accesses.rend(); ++it) {
    if (it->time != access.time || it->warp != access.warp) break;
    if (it->by != access.by || it->bytes != access.bytes || it->write != access.write) continue;
    it->lanes |= access.lanes;
    return;
  }
  if (accesses.size() == kMostAccesses) accesses.erase(accesses.begin());
  accesses.push_back(access);
}

// Whoever comes to know of an access knows of those that it replaces.
void replace(std::vector<Access>& accesses) {
  std::erase_if(accesses, [](const Access& access) { return access.lanes == 0 || access.bytes == 0; });
}

void check_read(Context& c, int lane, std::vector<Access>& accesses, uint16_t bytes, bool strong) {
  const uint32_t self = thread_of(c, lane);
  const Known& known = known_of(c, lane);
  for (Access& before : accesses) {
    if (!(before.bytes & bytes)) continue;
    if (before.write) {
      if (strong && before.strong) continue;
      if (const uint32_t lanes = unordered(before, self, known)) fail_race(c, lane, before, lanes, bytes, false);
    } else if ((before.bytes & ~bytes) == 0 && (before.strong || !strong)) {
      before.lanes = unordered(before, self, known);
    }
  }
  replace(accesses);
}

void check_write(Context& c, int lane, std::vector<Access>& accesses, uint16_t bytes, bool strong, bool changes) {
  const uint32_t self = thread_of(c, lane);
  const Known& known = known_of(c, lane);
  for (Access& before : accesses) {
    if (!(before.bytes & bytes)) continue;
    const uint32_t lanes = unordered(before, self, known);
    // Where all write the same value it does not matter who wins: compilers count on that.
    const bool harmless = (strong && before.strong) || (before.write && !changes);
    if (lanes != 0 && !harmless) fail_race(c, lane, before, lanes, bytes, true);
    if (lanes == 0)
      before.bytes &= static_cast<uint16_t>(~bytes);
    else if ((before.bytes & ~bytes) == 0)
      before.lanes = lanes;
  }
  replace(accesses);
}

void merge(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// Shares a clock where one of the two contains the other.
Known join(const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  bool less = false, more = false;
  for (size_t i = 0; i < a->size(); ++i) less |= (*a)[i]<(*b)[i], more |= (*a)[i]>(*b)[i];
  if (!less) return a;
  if (!more) return b;
  auto both = std::make_shared<Clock>(*a);
  merge(*both, *b);
  return both;
}

}  // namespace

void race_read(Context& c, int lane, Cta& cta, uint32_t offset, uint32_t bytes, bool strong) {
  for_granules(cta, offset, bytes, [&](std::vector<Access>& accesses, uint16_t mask) {
    check_read(c, lane, accesses, mask, strong);
    note(accesses, {&c.instruction, c.machine.ticks, 1u << lane, warp_of(c), mask, false, strong});
  });
}

void race_write(Context& c, int lane, Cta& cta, uint32_t offset, const void* in, uint32_t bytes, bool strong) {
  const bool changes = std::memcmp(cta.shared.bytes.data() + offset, in, bytes) != 0;
  for_granules(cta, offset, bytes, [&](std::vector<Access>& accesses, uint16_t mask) {
    check_write(c, lane, accesses, mask, strong, changes);
    note(accesses, {&c.instruction, c.machine.ticks, 1u << lane, warp_of(c), mask, true, strong});
  });
}

void race_copy_in(Context& c, int lane, Cta& cta, uint32_t offset, uint32_t bytes) {
  const auto copies = static_cast<uint16_t>(warps_of_cluster(cta));
  for_granules(cta, offset, bytes, [&](std::vector<Access>& accesses, uint16_t mask) {
    // A copy over one that is known to be over: its hold has checked that.
    std::erase_if(accesses, [&](const Access& access) { return access.warp == copies; });
    check_write(c, lane, accesses, mask, false, true);
    note(accesses, {&c.instruction, c.machine.ticks, 1, copies, mask, true, false});
  });
}

void race_copy_out(Context& c, int lane, Cta& cta, uint32_t offset, uint32_t bytes) {
  race_read(c, lane, cta, offset, bytes);
}

void race_arrive(Context& c, uint32_t lanes, Meeting& meeting) {
  meeting.open.resize(warps_of_cluster(c.cta) * kLanes + 1);
  const Clock* merged = nullptr;
  for_lanes(lanes, [&](int lane) {
    const Clock* known = known_of(c, lane).get();
    if (known != nullptr && known != merged) merge(meeting.open, *known), merged = known;
    meeting.open[thread_of(c, lane)] = c.machine.ticks;
  });
}

void race_complete(Meeting& meeting) {
  // Nobody that arrived has released anything.
  if (!meeting.open.empty()) meeting.closed = std::make_shared<const Clock>(meeting.open);
}

void race_leave(Context& c, uint32_t lanes, const Meeting& meeting) {
  Known from, to;
  for_lanes(lanes, [&](int lane) {
    Known& known = known_of(c, lane);
    if (!to || known != from) from = known, to = join(known, meeting.closed);
    known = to;
  });
}

Meeting& cluster_meeting(Cta& cta) { return cta.cluster.front()->races.cluster; }

void race_release(Context& c, uint32_t lanes) { race_arrive(c, lanes, c.cta.cluster.front()->races.strong); }

void race_acquire(Context& c, uint32_t lanes) {
  Meeting& meeting = c.cta.cluster.front()->races.strong;
  if (meeting.open.empty()) return;
  if (!meeting.closed || *meeting.closed != meeting.open) race_complete(meeting);
  race_leave(c, lanes, meeting);
}

void race_warp_sync(Context& c, uint32_t lanes) {
  Meeting meeting;
  race_arrive(c, lanes, meeting);
  race_complete(meeting);
  race_leave(c, lanes, meeting);
}

void race_init_mbarrier(Context& c, int lane, Cta& cta, uint32_t offset) {
  cta.races.mbarriers.erase(offset);
  for_granules(cta, offset, kMbarrierBytes, [&](std::vector<Access>& accesses, uint16_t mask) {
    check_write(c, lane, accesses, mask, false, true);
    note(accesses, {&c.instruction, c.machine.ticks, 1u << lane, warp_of(c), mask, true, false});
  });
}

void race_use_mbarrier(Context& c, int lane, Cta& cta, uint32_t offset) {
  for_granules(cta, offset, kMbarrierBytes,
               [&](std::vector<Access>& accesses, uint16_t mask) { check_read(c, lane, accesses, mask, false); });
}

void race_complete_mbarrier(Machine& machine, Cta& cta, uint32_t offset) {
  Meeting& meeting = cta.races.mbarriers[offset];
  meeting.open.resize(warps_of_cluster(cta) * kLanes + 1);
  meeting.open.back() = machine.ticks;
  race_complete(meeting);
}

}  // namespace emulator
