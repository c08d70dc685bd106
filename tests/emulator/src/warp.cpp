// Instructions among the lanes of a warp.
#include "machine.h"

namespace emulator {
namespace {

Outcome wait_for(Context& c, uint32_t members) {
  c.warp.wait = {Wait::For::kLanes, &c.cta, 0, members};
  return Outcome::kBlocked;
}

Handler warp_sync(const Decoder& d) {
  d.expect_done();
  const Source members = d.source(0);
  return [=](Context& c) {
    const auto mask = static_cast<uint32_t>(members.get(c, __builtin_ctz(c.mask)));
    if (!gathered(c, mask)) return wait_for(c, mask);
    warp_tells(c.cta, c.warp.index, c.mask & mask);
    race_warp_sync(c, c.mask & mask);
    return Outcome::kNext;
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
    if (!gathered(c, mask)) return wait_for(c, mask);
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
    if (!gathered(c, mask)) return wait_for(c, mask);
    const uint32_t present = mask & c.mask;
    const int lane = c.machine.highest_lane_elected ? 31 - __builtin_clz(present) : __builtin_ctz(present);
    for_lanes(c.mask, [&](int l) {
      if (leader >= 0) c.warp.reg(leader)[l] = lane;
      if (elected >= 0) c.warp.reg(elected)[l] = l == lane;
    });
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_warp(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "bar" && d.take("warp")) {
    if (!d.take("sync")) d.unknown("barrier");
    return warp_sync(d);
  }
  if (op == "shfl") return shuffle(d);
  if (op == "elect") return elect(d);
  return {};
}

}  // namespace emulator
