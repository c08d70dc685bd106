// Barriers among the warps of a CTA.
#include "machine.h"

namespace emulator {
namespace {

Outcome wait_for(Context& c, uint64_t barrier) {
  c.warp.wait = {Wait::For::kBarrier, &c.cta, barrier, 0};
  return Outcome::kBlocked;
}

// bar{rier}{.cta}.sync{.aligned} and .arrive.
Handler barrier(const Decoder& d) {
  d.take("cta");
  const bool arrive = d.take("arrive");
  if (!arrive && !d.take("sync")) d.unknown("barrier");
  const bool aligned = d.take("aligned") || d.instruction.opcode == "bar";
  d.expect_done();
  const Source id = d.source(0);
  const bool counted = d.instruction.operands.size() > 1;
  const Source count = counted ? d.source(1) : Source{};
  return [=](Context& c) {
    if (c.mask != c.warp.live) {
      if (aligned && c.group == c.warp.live) fail(c, "an aligned barrier under a guard that the warp does not share");
      c.warp.wait = {Wait::For::kLanes, &c.cta, 0, c.warp.live};
      return Outcome::kBlocked;
    }
    const int lane = __builtin_ctz(c.mask);
    const uint64_t index = id.get(c, lane);
    if (index >= 16) fail(c, "there are 16 barriers");
    NamedBarrier& b = c.cta.barriers[index];
    if (c.warp.waiting) {
      if (b.generation == c.warp.wait_token) return wait_for(c, index);
      race_leave(c, c.mask, c.cta.races.barriers[index]);
      c.warp.waiting = false;
      return Outcome::kNext;
    }
    const auto expected = static_cast<uint32_t>(counted ? count.get(c, lane) : c.cta.warps.size() * kLanes);
    if (expected % kLanes || expected == 0) fail(c, "a barrier counts multiples of 32 threads");
    if (b.arrived > 0 && b.expected != expected) fail(c, "warps disagree on the count of this barrier");
    b.expected = expected;
    const uint64_t generation = b.generation;
    if ((b.arrived += kLanes) > expected) fail(c, "more threads than the barrier counts");
    b.warps |= 1u << c.warp.index;
    race_arrive(c, c.mask, c.cta.races.barriers[index]);
    if (b.arrived == expected) {
      barrier_tells(c.cta, b.warps);
      race_complete(c.cta.races.barriers[index]);
      b.arrived = 0, b.warps = 0, b.generation++;
    }
    c.machine.events++;
    if (arrive) return Outcome::kNext;
    if (b.generation != generation) {
      race_leave(c, c.mask, c.cta.races.barriers[index]);
      return Outcome::kNext;
    }
    c.warp.waiting = true, c.warp.wait_token = generation;
    return wait_for(c, index);
  };
}

}  // namespace

Handler decode_barrier(const Decoder& d) {
  if (d.instruction.opcode == "bar" || d.instruction.opcode == "barrier") return barrier(d);
  return {};
}

}  // namespace emulator
