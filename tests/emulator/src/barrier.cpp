// Barriers among the warps of a CTA.
#include "machine.h"

namespace emulator {
namespace {

constexpr uint64_t kBarriers = 16;

enum class Reduction : uint8_t { kNone, kCount, kAnd, kOr };

struct Barrier {
  bool arrive, aligned, counted;
  Reduction reduction;
  Source id, count, vote;
  int result;
};

Outcome wait_for(Context& c, uint64_t barrier) {
  c.warp.wait = {Wait::For::kBarrier, &c.cta, barrier, 0};
  return Outcome::kBlocked;
}

// Lets the waiting warps go on if all whom the barrier waits for have come.
void complete_if_due(Machine& machine, Cta& cta, NamedBarrier& barrier) {
  bool due = barrier.arrived == barrier.expected;
  if (barrier.all && !due) {
    due = true;
    for (const Warp& warp : cta.warps) due &= warp.live == 0 || (barrier.warps >> warp.index & 1);
  }
  if (!due) return;
  barrier_tells(cta, barrier.warps);
  race_complete(cta.races.barriers[&barrier - cta.barriers.data()]);
  for_lanes(barrier.waiting, [&](int index) {
    Visit& visit = cta.warps[index].visit;
    visit.released |= visit.arrived, visit.arrived = 0;
    visit.votes = barrier.votes, visit.voters = barrier.voters;
  });
  barrier = {};
  machine.events++;
}

// A warp arrives, with all its lanes.
void join(Context& c, const Visit& visit, bool waits) {
  NamedBarrier& barrier = c.cta.barriers[visit.id];
  const uint32_t own = 1u << c.warp.index;
  if (barrier.warps != 0) {
    if (barrier.expected != visit.expected)
      fail(c, "warps disagree on the count of this barrier: " + std::to_string(barrier.expected) + " and " +
                  std::to_string(visit.expected));
    if (barrier.reduces != visit.reduces) fail(c, "one phase of a barrier mixes .red with .sync or .arrive");
    if (barrier.warps & own) fail(c, "the warp comes to this barrier twice in one phase");
  }
  barrier.expected = visit.expected, barrier.reduces = visit.reduces;
  barrier.all |= visit.all;
  barrier.arrived += kLanes;
  barrier.warps |= own;
  if (waits) barrier.waiting |= own;
  barrier.votes += visit.votes, barrier.voters += visit.voters;
  c.machine.events++;
  complete_if_due(c.machine, c.cta, barrier);
}

// Which barrier, and how many threads, in the words of the lanes of `lanes`.
Visit begin_visit(Context& c, const Barrier& b, uint32_t lanes) {
  const auto same = [&](const Source& source) {
    const uint64_t value = source.get(c, __builtin_ctz(lanes)) & 0xffffffff;
    for_lanes(lanes, [&](int lane) {
      if ((source.get(c, lane) & 0xffffffff) != value) fail(c, "lanes of a warp disagree on the barrier or its count");
    });
    return value;
  };
  Visit visit;
  const uint64_t id = same(b.id), threads = c.cta.warps.size() * kLanes;
  if (id >= kBarriers) fail(c, "there are 16 barriers, but this is number " + std::to_string(id));
  const uint64_t expected = b.counted ? same(b.count) : threads;
  if (expected == 0 || expected % kLanes) fail(c, "a barrier counts multiples of 32 threads");
  if (expected > threads)
    fail(c, "the barrier waits for " + std::to_string(expected) + " threads in a CTA of " + std::to_string(threads));
  visit.id = static_cast<uint32_t>(id), visit.expected = static_cast<uint32_t>(expected);
  visit.all = !b.counted, visit.reduces = b.reduction != Reduction::kNone;
  return visit;
}

Outcome arrive(Context& c, const Barrier& b) {
  if (b.aligned ? !converged(c) : c.mask != c.warp.live) {
    c.warp.wait = {Wait::For::kLanes, &c.cta, 0, c.warp.live};
    return Outcome::kBlocked;
  }
  const Visit visit = begin_visit(c, b, c.mask);
  race_arrive(c, c.mask, c.cta.races.barriers[visit.id]);
  join(c, visit, false);
  return Outcome::kNext;
}

// The lanes of `lanes` are let go.
void leave(Context& c, const Barrier& b, uint32_t lanes) {
  Visit& visit = c.warp.visit;
  visit.released &= ~lanes;
  race_leave(c, lanes, c.cta.races.barriers[visit.id]);
  if (b.result < 0) return;
  const uint64_t result = b.reduction == Reduction::kCount ? visit.votes
                          : b.reduction == Reduction::kAnd ? visit.votes == visit.voters
                                                           : visit.votes != 0;
  for_lanes(lanes, [&](int lane) { c.warp.reg(b.result)[lane] = result; });
}

Outcome sync(Context& c, const Barrier& b) {
  Visit& visit = c.warp.visit;
  const uint32_t fresh = c.mask & ~(visit.arrived | visit.released);
  if (fresh && b.aligned && !converged(c)) return Outcome::kBlocked;
  if (fresh) {
    Visit mine = begin_visit(c, b, fresh);
    if (visit.arrived != 0) {
      if (mine.id != visit.id || mine.expected != visit.expected || mine.reduces != visit.reduces)
        fail(c, "divergent: other lanes of the warp wait at barrier " + std::to_string(visit.id) + " for " +
                    std::to_string(visit.expected) + " threads");
      mine.arrived = visit.arrived, mine.votes = visit.votes, mine.voters = visit.voters;
    }
    if (visit.released != 0) fail(c, "divergent: other lanes of the warp have not left the barrier before this one");
    mine.arrived |= fresh;
    if (b.reduction != Reduction::kNone) {
      for_lanes(fresh, [&](int lane) { mine.votes += b.vote.get(c, lane) & 1; });
      mine.voters += __builtin_popcount(fresh);
    }
    visit = mine;
    race_arrive(c, fresh, c.cta.races.barriers[visit.id]);
    c.machine.events++;
    if (visit.arrived == c.warp.live) join(c, Visit(visit), true);
  }
  const uint32_t ready = c.mask & visit.released;
  if (ready == 0) return wait_for(c, visit.id);
  leave(c, b, ready);
  if (ready == c.mask) return Outcome::kNext;
  for_lanes(ready, [&](int lane) { c.warp.pc[lane]++; });
  return Outcome::kJumped;
}

// bar{.cta}.{sync,arrive,red} and barrier{.cta}.{sync,arrive,red}{.aligned}; bar is always aligned.
Handler barrier(const Decoder& d) {
  Barrier b{};
  d.take("cta");
  b.arrive = d.take("arrive");
  const bool reduces = !b.arrive && d.take("red");
  if (!b.arrive && !reduces && !d.take("sync")) d.unknown("barrier");
  if (reduces) {
    b.reduction = d.take("popc")  ? Reduction::kCount
                  : d.take("and") ? Reduction::kAnd
                  : d.take("or")  ? Reduction::kOr
                                  : (d.unknown("reduction"), Reduction::kNone);
  }
  b.aligned = d.instruction.opcode == "bar" || d.take("aligned");
  if (reduces && !d.take(b.reduction == Reduction::kCount ? "u32" : "pred")) d.unknown("type");
  d.expect_done();
  const size_t first = reduces ? 1 : 0, given = d.instruction.operands.size();
  b.counted = given == 2 * first + 2;
  if (!b.counted && (b.arrive || given != 2 * first + 1)) d.unknown("number of operands");
  b.result = reduces ? d.destination(0) : -1;
  b.id = d.source(first);
  if (b.counted) b.count = d.source(first + 1);
  if (reduces) b.vote = d.source(given - 1);
  return [b](Context& c) { return b.arrive ? arrive(c, b) : sync(c, b); };
}

}  // namespace

// As the ISA has it for exit: barriers that wait for all threads do not wait for those that are gone.
void cta_barriers_after_exit(Context& c) {
  Visit& visit = c.warp.visit;
  if (c.warp.live != 0) {
    visit.arrived &= c.warp.live;
    if (visit.arrived == c.warp.live) join(c, Visit(visit), true);
    return;
  }
  for (NamedBarrier& barrier : c.cta.barriers)
    if (barrier.all && barrier.warps != 0) complete_if_due(c.machine, c.cta, barrier);
}

Handler decode_barrier(const Decoder& d) {
  if (d.instruction.opcode != "bar" && d.instruction.opcode != "barrier") return {};
  if (d.take("cluster")) return decode_cluster_barrier(d);
  return barrier(d);
}

}  // namespace emulator
