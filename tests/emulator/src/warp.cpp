// Instructions among the lanes of a warp. Each lane posts what it brings; when all members that live have posted, at
// whatever places of the program, the results are worked out, and each lane takes its own and goes on.
#include <algorithm>
#include <limits>

#include "lanes.h"

namespace emulator {
namespace {

constexpr uint64_t kAbsent = 0x7fc0dead;  // what lanes that do not take part hold is undefined

struct Collective {
  std::vector<Source> in;
  Source members;
  int result = -1, flag = -1;
};

// `lanes` wait for the others of `members`.
Outcome wait_for(Context& c, uint32_t members) {
  c.warp.wait = {Wait::For::kLanes, &c.cta, 0, members};
  return Outcome::kBlocked;
}

bool same_instruction(const Instruction& a, const Instruction& b) {
  return &a == &b || (a.opcode == b.opcode && a.modifiers == b.modifiers);
}

void post(Context& c, int lane, const Collective& what) {
  Warp& warp = c.warp;
  const auto members = static_cast<uint32_t>(what.members.get(c, lane));
  if (!(members >> lane & 1)) fail(c, "lane " + std::to_string(lane) + " is not in its own member mask");
  for_lanes(members & warp.posted, [&](int other) {
    if (warp.posts[other].members != members) fail(c, "lanes of the warp give different member masks");
    if (!same_instruction(*warp.posts[other].at, c.instruction))
      fail(c, "divergent: lane " + std::to_string(other) + " of the same member mask waits at line " +
                  std::to_string(warp.posts[other].at->line) + ": " + warp.posts[other].at->text);
  });
  Post& own = warp.posts[lane];
  own.at = &c.instruction, own.members = members;
  for (size_t i = 0; i < what.in.size(); ++i) own.in[i] = what.in[i].get(c, lane);
  warp.posted |= 1u << lane;
}

// `combine(context, posts, present)` sets `out` and `flag` of the lanes of `present`.
template <class F>
Handler collective(Collective what, F combine) {
  return [=](Context& c) {
    Warp& warp = c.warp;
    warp.posts.resize(kLanes);
    for_lanes(c.mask & ~(warp.posted | warp.served), [&](int lane) { post(c, lane, what); });
    for (uint32_t left = c.mask & warp.posted; left != 0;) {
      const uint32_t members = warp.posts[__builtin_ctz(left)].members, present = members & warp.live;
      left &= ~members;
      if (present & ~warp.posted) continue;
      combine(c, warp.posts.data(), present);
      warp.posted &= ~present, warp.served |= present;
    }
    const uint32_t ready = c.mask & warp.served;
    if (ready == 0) return wait_for(c, warp.posts[__builtin_ctz(c.mask)].members);
    warp.served &= ~ready;
    for_lanes(ready, [&](int lane) {
      if (what.result >= 0) warp.reg(what.result)[lane] = warp.posts[lane].out;
      if (what.flag >= 0) warp.reg(what.flag)[lane] = warp.posts[lane].flag;
    });
    if (ready == c.mask) return Outcome::kNext;
    for_lanes(ready, [&](int lane) { warp.pc[lane]++; });
    return Outcome::kJumped;
  };
}

Handler warp_sync(const Decoder& d) {
  d.expect_done();
  d.operands(1);
  return collective({{}, d.source(0)}, [](Context& c, Post*, uint32_t present) {
    warp_tells(c.cta, c.warp.index, present);
    race_warp_sync(c, present);
  });
}

enum class Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };

// The lane that `lane` reads from, or -1 where that lies outside its segment. `limits` is clamp | segment mask << 8.
int shuffle_source(Shuffle mode, int lane, int by, int limits) {
  const int segment = limits >> 8 & 31;
  const int last = (lane & segment) | ((limits & 31) & ~segment);
  switch (mode) {
    case Shuffle::kUp:
      return lane - by >= last ? lane - by : -1;
    case Shuffle::kDown:
      return lane + by <= last ? lane + by : -1;
    case Shuffle::kButterfly:
      return (lane ^ by) <= last ? lane ^ by : -1;
    case Shuffle::kIndex: {
      const int from = (lane & segment) | (by & ~segment);
      return from <= last ? from : -1;
    }
  }
  return -1;
}

// shfl.sync.{up,down,bfly,idx}.b32 d{|p}, a, b, c, membermask
Handler shuffle(const Decoder& d) {
  if (!d.take("sync")) d.unknown("shuffle");
  const Shuffle mode = d.take("up")     ? Shuffle::kUp
                       : d.take("down") ? Shuffle::kDown
                       : d.take("bfly") ? Shuffle::kButterfly
                       : d.take("idx")  ? Shuffle::kIndex
                                        : (d.unknown("mode"), Shuffle::kUp);
  if (!d.take("b32")) d.unknown("type");
  d.expect_done();
  d.operands(5);
  Collective what{{d.source(1), d.source(2), d.source(3)}, d.source(4)};
  const bool pair = d.operand(0).kind == Operand::Kind::kPair;
  what.result = d.destination(pair ? d.operand(0).elements.at(0) : d.operand(0));
  if (pair) what.flag = d.destination(d.operand(0).elements.at(1));
  return collective(what, [mode](Context&, Post* posts, uint32_t present) {
    for_lanes(present, [&](int lane) {
      Post& own = posts[lane];
      const int from = shuffle_source(mode, lane, static_cast<int>(own.in[1] & 31), static_cast<int>(own.in[2]));
      own.flag = from >= 0;
      const int at = from >= 0 ? from : lane;
      own.out = present >> at & 1 ? posts[at].in[0] & 0xffffffff : kAbsent;
    });
  });
}

// vote.sync.{all,any,uni}.pred and vote.sync.ballot.b32
Handler vote(const Decoder& d) {
  if (!d.take("sync")) d.unknown("vote, which needs .sync since sm_70");
  const std::string mode = d.next();
  const bool all = mode == "all", any = mode == "any", ballot = mode == "ballot";
  if (!all && !any && !ballot && mode != "uni") d.unknown("vote");
  if (!d.take(ballot ? "b32" : "pred")) d.unknown("type");
  d.expect_done();
  d.operands(3);
  Collective what{{d.source(1)}, d.source(2), d.destination(0)};
  return collective(what, [=](Context&, Post* posts, uint32_t present) {
    uint32_t yes = 0;
    for_lanes(present, [&](int lane) { yes |= static_cast<uint32_t>(posts[lane].in[0] & 1) << lane; });
    const bool unanimous = yes == present;
    const uint64_t result = ballot ? yes : all ? unanimous : any ? yes != 0 : unanimous || yes == 0;
    for_lanes(present, [&](int lane) { posts[lane].out = result; });
  });
}

// match.{any,all}.sync.{b32,b64}; ptxas takes match.sync.{any,all} too.
Handler match(const Decoder& d) {
  const bool sync = d.take("sync");
  const bool any = d.take("any");
  if (!any && !d.take("all")) d.unknown("match");
  if (!sync && !d.take("sync")) d.unknown("match");
  const std::string type = d.next();
  if (type != "b32" && type != "b64") d.unknown("type");
  d.expect_done();
  d.operands(3);
  const bool pair = d.operand(0).kind == Operand::Kind::kPair;
  if (pair && any) d.unknown("destination");
  Collective what{{d.source(1)}, d.source(2)};
  what.result = d.destination(pair ? d.operand(0).elements.at(0) : d.operand(0));
  if (pair) what.flag = d.destination(d.operand(0).elements.at(1));
  const uint64_t bits = mask_of(bytes_of(type));
  return collective(what, [=](Context&, Post* posts, uint32_t present) {
    for_lanes(present, [&](int lane) {
      Post& own = posts[lane];
      uint32_t same = 0;
      for_lanes(present, [&](int other) {
        if (((posts[other].in[0] ^ own.in[0]) & bits) == 0) same |= 1u << other;
      });
      own.flag = same == present;
      own.out = any || own.flag ? same : 0;
    });
  });
}

// redux.sync.{add,min,max}.{u32,s32} and .{and,or,xor}.b32
Handler redux(const Decoder& d) {
  if (!d.take("sync")) d.unknown("redux");
  const std::string op = d.next(), type = d.next();
  d.expect_done();
  d.operands(3);
  const bool logic = op == "and" || op == "or" || op == "xor";
  if (!logic && op != "add" && op != "min" && op != "max") d.unknown("operation");
  if (logic ? type != "b32" : type != "u32" && type != "s32") d.unknown("type");
  // Flipping the sign bit orders signed numbers as unsigned ones.
  const uint32_t flip = type == "s32" && op != "add" ? 1u << 31 : 0;
  using Combine = uint32_t (*)(uint32_t, uint32_t);
  const Combine combine = op == "add"   ? Combine([](uint32_t a, uint32_t b) { return a + b; })
                          : op == "min" ? Combine([](uint32_t a, uint32_t b) { return std::min(a, b); })
                          : op == "max" ? Combine([](uint32_t a, uint32_t b) { return std::max(a, b); })
                          : op == "and" ? Combine([](uint32_t a, uint32_t b) { return a & b; })
                          : op == "or"  ? Combine([](uint32_t a, uint32_t b) { return a | b; })
                                        : Combine([](uint32_t a, uint32_t b) { return a ^ b; });
  Collective what{{d.source(1)}, d.source(2), d.destination(0)};
  return collective(what, [=](Context&, Post* posts, uint32_t present) {
    const int first = __builtin_ctz(present);
    uint32_t total = static_cast<uint32_t>(posts[first].in[0]) ^ flip;
    for_lanes(present & (present - 1),
              [&](int lane) { total = combine(total, static_cast<uint32_t>(posts[lane].in[0]) ^ flip); });
    for_lanes(present, [&](int lane) { posts[lane].out = total ^ flip; });
  });
}

// elect.sync d|p, membermask
Handler elect(const Decoder& d) {
  if (!d.take("sync")) d.unknown("elect");
  d.expect_done();
  d.operands(2);
  if (d.operand(0).kind != Operand::Kind::kPair) d.unknown("destination");
  Collective what{{}, d.source(1)};
  what.result = d.destination(d.operand(0).elements.at(0)), what.flag = d.destination(d.operand(0).elements.at(1));
  return collective(what, [](Context& c, Post* posts, uint32_t present) {
    const int leader = c.machine.highest_lane_elected ? 31 - __builtin_clz(present) : __builtin_ctz(present);
    for_lanes(present, [&](int lane) { posts[lane].out = leader, posts[lane].flag = lane == leader; });
  });
}

Handler active_mask(const Decoder& d) {
  if (!d.take("b32")) d.unknown("type");
  d.expect_done();
  d.operands(1);
  return assign(d.destination(0), [](Context& c, int) -> uint64_t { return c.mask; });
}

}  // namespace

bool converged(Context& c) {
  Warp& warp = c.warp;
  if (c.mask != c.group) fail(c, "divergent: an aligned instruction under a guard that the warp does not share");
  if (c.mask == warp.live) {
    warp.aligned_lanes = 0;
    return true;
  }
  const uint32_t pc = warp.pc[__builtin_ctz(c.mask)];
  uint32_t others = 0;  // that wait at another aligned instruction, for these lanes
  for_lanes(warp.aligned_lanes & warp.live, [&](int lane) {
    if (warp.aligned_pc != pc && warp.pc[lane] == warp.aligned_pc) others |= 1u << lane;
  });
  if (others) {
    const Instruction& there = *c.grid.code->instructions[warp.aligned_pc];
    fail(c, "divergent: other lanes of the warp wait for these at the aligned instruction in line " +
                std::to_string(there.line) + ": " + there.text);
  }
  warp.aligned_lanes = c.mask, warp.aligned_pc = pc;
  wait_for(c, warp.live);
  return false;
}

Handler decode_warp(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "bar" && d.take("warp")) {
    if (!d.take("sync")) d.unknown("barrier");
    return warp_sync(d);
  }
  if (op == "shfl") return shuffle(d);
  if (op == "vote") return vote(d);
  if (op == "match") return match(d);
  if (op == "redux") return redux(d);
  if (op == "elect") return elect(d);
  if (op == "activemask") return active_mask(d);
  return {};
}

}  // namespace emulator
