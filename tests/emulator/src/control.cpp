// Branches, barriers, warp-wide instructions, fences.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

Outcome next(Context&) { return Outcome::kNext; }

// Whether all of `members` that live are at this instruction; else they must wait for each other.
bool gathered(const Context& c, uint32_t members) { return (members & c.warp.live & ~c.mask) == 0; }

Handler branch(const Decoder& d) {
  d.take("uni");
  d.expect_done();
  d.operands(1);
  if (d.operand(0).kind != Operand::Kind::kLabel) d.unknown("target");
  return [target = static_cast<uint32_t>(d.operand(0).index)](Context& c) {
    for_lanes(c.mask, [&](int lane) { c.warp.pc[lane] = target; });
    return Outcome::kJumped;
  };
}

Handler leave(const Decoder& d) {
  d.take("uni");
  d.expect_done();
  return [](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      if (c.warp.open_group[lane]) fail(c, "the thread exits with bulk copies that it never committed to a group");
      for (const auto& group : c.warp.bulk_groups[lane])
        if (group->unread > 0) fail(c, "the thread exits while a bulk copy still reads its shared memory");
    });
    if (!c.warp.wgmma.empty()) fail(c, "the warp exits with wgmma in flight");
    c.warp.live &= ~c.mask;
    return Outcome::kNext;
  };
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
      return Outcome::kBlocked;
    }
    const int lane = __builtin_ctz(c.mask);
    const uint64_t index = id.get(c, lane);
    if (index >= 16) fail(c, "there are 16 barriers");
    NamedBarrier& b = c.cta.barriers[index];
    if (c.warp.waiting) {
      if (b.generation == c.warp.wait_token) return Outcome::kBlocked;
      c.warp.waiting = false;
      return Outcome::kNext;
    }
    const auto expected = static_cast<uint32_t>(counted ? count.get(c, lane) : c.cta.warps.size() * kLanes);
    if (expected % kLanes || expected == 0) fail(c, "a barrier counts multiples of 32 threads");
    if (b.arrived > 0 && b.expected != expected) fail(c, "warps disagree on the count of this barrier");
    b.expected = expected;
    const uint64_t generation = b.generation;
    if ((b.arrived += kLanes) > expected) fail(c, "more threads than the barrier counts");
    if (b.arrived == expected) b.arrived = 0, b.generation++;
    c.machine.events++;
    if (arrive || b.generation != generation) return Outcome::kNext;
    c.warp.waiting = true, c.warp.wait_token = generation;
    return Outcome::kBlocked;
  };
}

Handler warp_sync(const Decoder& d) {
  d.expect_done();
  const Source members = d.source(0);
  return [=](Context& c) {
    const auto mask = static_cast<uint32_t>(members.get(c, __builtin_ctz(c.mask)));
    return gathered(c, mask) ? Outcome::kNext : Outcome::kBlocked;
  };
}

// shfl.sync.{up,down,bfly,idx}.b32 d{|p}, a, b, c, membermask
Handler shuffle(const Decoder& d) {
  if (!d.take("sync")) d.unknown("shuffle");
  const std::string mode = d.next();
  if (!d.take("b32")) d.unknown("type");
  d.expect_done();
  d.operands(5);
  const bool pair = d.operand(0).kind == Operand::Kind::kPair;
  const int result = d.destination(pair ? d.operand(0).elements[0] : d.operand(0));
  const int valid = pair ? d.destination(d.operand(0).elements[1]) : -1;
  const Source a = d.source(1), b = d.source(2), clamp = d.source(3), members = d.source(4);
  return [=](Context& c) {
    const auto mask = static_cast<uint32_t>(members.get(c, __builtin_ctz(c.mask)));
    if (!gathered(c, mask)) return Outcome::kBlocked;
    uint64_t values[kLanes], out[kLanes], ok[kLanes];
    for_lanes(c.mask, [&](int lane) { values[lane] = a.get(c, lane); });
    for_lanes(c.mask, [&](int lane) {
      const int by = static_cast<int>(b.get(c, lane)) & 31, limits = static_cast<int>(clamp.get(c, lane));
      const int segment = limits >> 8 & 31, last = (lane & segment) | ((limits & 31) & ~segment);
      const int first = lane & segment;
      int from = 0;
      bool in = false;
      if (mode == "up") from = lane - by, in = from >= last;
      if (mode == "down") from = lane + by, in = from <= last;
      if (mode == "bfly") from = lane ^ by, in = from <= last;
      if (mode == "idx") from = first | (by & ~segment), in = from <= last;
      if (!in) from = lane;
      const bool member = mask >> from & c.mask >> from & 1;
      out[lane] = member ? values[from] : 0x7fc0dead;  // what an absent lane holds is undefined
      ok[lane] = in;
    });
    for_lanes(c.mask, [&](int lane) {
      if (result >= 0) c.warp.reg(result)[lane] = out[lane] & 0xffffffff;
      if (valid >= 0) c.warp.reg(valid)[lane] = ok[lane];
    });
    return Outcome::kNext;
  };
}

// elect.sync d|p, membermask
Handler elect(const Decoder& d) {
  if (!d.take("sync")) d.unknown("elect");
  d.expect_done();
  d.operands(2);
  const int leader = d.destination(d.operand(0).elements.at(0)), elected = d.destination(d.operand(0).elements.at(1));
  const Source members = d.source(1);
  return [=](Context& c) {
    const auto mask = static_cast<uint32_t>(members.get(c, __builtin_ctz(c.mask)));
    if (!gathered(c, mask)) return Outcome::kBlocked;
    const uint32_t present = mask & c.mask;
    const int lane = c.machine.highest_lane_elected ? 31 - __builtin_clz(present) : __builtin_ctz(present);
    for_lanes(c.mask, [&](int l) {
      if (leader >= 0) c.warp.reg(leader)[l] = lane;
      if (elected >= 0) c.warp.reg(elected)[l] = l == lane;
    });
    return Outcome::kNext;
  };
}

Handler set_registers(const Decoder& d) {
  const bool more = d.take("inc");
  if (!more && !d.take("dec")) d.unknown("setmaxnreg");
  if (!(d.take("sync") && d.take("aligned") && d.take("u32"))) d.unknown("setmaxnreg");
  d.expect_done();
  const int64_t count = d.operand(0).integer;
  if (count < 24 || count > 256 || count % 8) d.unknown("register count, which is 24 to 256 in eights");
  return [](Context& c) {
    if (c.mask != c.warp.live) fail(c, "setmaxnreg is executed by whole warps");
    return Outcome::kNext;
  };
}

Handler fence(const Decoder& d) {
  if (d.take("proxy")) {
    if (!d.take("async") && !d.take("async.shared::cta")) d.unknown("proxy");
    d.take("shared::cta");
    d.expect_done();
    return [](Context& c) {
      // Of this thread's writes only: each writer has to fence for itself.
      const uint32_t first = c.warp.index * kLanes + 1;
      for (uint16_t& writer : c.cta.unfenced) {
        const uint32_t lane = writer - first;  // huge where the writer is of an earlier warp, or there is none
        if (lane < kLanes && (c.mask >> lane & 1)) writer = 0;
      }
      return Outcome::kNext;
    };
  }
  if (d.take("mbarrier_init")) {
    if (!(d.take("release") && d.take("cluster"))) d.unknown("fence");
    d.expect_done();
    return next;
  }
  const std::string kind = d.next(), scope = d.next();
  if (kind != "acq_rel" && kind != "sc" && kind != "acquire" && kind != "release") d.unknown("fence");
  if (scope != "cta" && scope != "cluster" && scope != "gpu" && scope != "sys") d.unknown("scope");
  d.expect_done();
  return next;
}

}  // namespace

Handler decode_control(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "bra") return branch(d);
  if (op == "ret" || op == "exit") return leave(d);
  if (op == "bar" && d.take("warp")) {
    if (!d.take("sync")) d.unknown("barrier");
    return warp_sync(d);
  }
  if (op == "bar" || op == "barrier") return barrier(d);
  if (op == "shfl") return shuffle(d);
  if (op == "elect") return elect(d);
  if (op == "setmaxnreg") return set_registers(d);
  if (op == "fence") return fence(d);
  if (op == "trap") return [](Context& c) -> Outcome { fail(c, "trap"); };
  return {};
}

}  // namespace emulator
