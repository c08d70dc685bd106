// What CTAs of a cluster share: addresses of each other's shared memory, and the cluster's barrier.
#include "lanes.h"

namespace emulator {
namespace {

constexpr uint64_t kRankMask = 0xffull << kRankShift;

// A state space and a size, as mapa and getctarank have them.
struct Kind {
  bool shared;  // an address in the shared window rather than a generic one
  int bytes;
};

Kind take_kind(const Decoder& d) {
  const bool shared = d.take("shared::cluster");
  const std::string type = d.next();
  if (type != "u32" && type != "u64") d.unknown("type");
  d.expect_done();
  return {shared, type == "u32" ? 4 : 8};
}

// The address of a lane, which has to be one of shared memory.
uint64_t shared_address(Context& c, int lane, const Source& source, const Kind& kind) {
  const uint64_t address = source.get(c, lane) & mask_of(kind.bytes);
  if (!kind.shared && (address & kWindowMask) != kSharedWindow) fail(c, "this is no generic address of shared memory");
  return address;
}

// mapa d, a, rank: the address in CTA `rank` of what `a` names in this one.
Handler map_address(const Decoder& d) {
  const Kind kind = take_kind(d);
  d.operands(3);
  return assign(d.destination(0), [=, a = d.source(1), b = d.source(2)](Context& c, int lane) -> uint64_t {
    const uint64_t address = shared_address(c, lane, a, kind), rank = b.get(c, lane) & 0xffffffff;
    if (rank >= c.cta.cluster.size())
      fail(c, "rank " + std::to_string(rank) + " in a cluster of " + std::to_string(c.cta.cluster.size()) + " CTAs");
    return (address & ~kRankMask) | rank << kRankShift;
  });
}

Handler rank_of_address(const Decoder& d) {
  const Kind kind = take_kind(d);
  d.operands(2);
  return assign(d.destination(0), [=, a = d.source(1)](Context& c, int lane) -> uint64_t {
    return (shared_address(c, lane, a, kind) & kRankMask) >> kRankShift;
  });
}

bool is_constant(const Context& c, uint64_t address) {
  for (const Variable& variable : c.grid.code->module->variables)
    if (variable.space == Space::kConst && address - variable.address < variable.bytes) return true;
  return false;
}

// isspacep.space p, a: whether a generic address lies in the space.
Handler is_space(const Decoder& d) {
  using Test = bool (*)(const Context&, uint64_t);
  Test test = nullptr;
  if (d.take("shared") || d.take("shared::cta"))
    test = [](const Context& c, uint64_t a) {
      return (a & kWindowMask) == kSharedWindow && (a & kRankMask) >> kRankShift == c.cta.cluster_rank;
    };
  else if (d.take("shared::cluster"))
    test = [](const Context& c, uint64_t a) {
      return (a & kWindowMask) == kSharedWindow && (a & kRankMask) >> kRankShift < c.cta.cluster.size();
    };
  else if (d.take("local"))
    test = [](const Context&, uint64_t a) { return (a & kWindowMask) == kLocalWindow; };
  else if (d.take("param") || d.take("param::entry"))
    test = [](const Context&, uint64_t a) { return (a & kWindowMask) == kParamWindow; };
  else if (d.take("const"))
    test = [](const Context& c, uint64_t a) { return is_constant(c, a); };
  else if (d.take("global"))
    test = [](const Context& c, uint64_t a) { return (a & kWindowMask) == 0 && !is_constant(c, a); };
  else
    d.unknown("state space");
  d.expect_done();
  d.operands(2);
  return assign(d.destination(0), [test, a = d.source(1)](Context& c, int lane) { return test(c, a.get(c, lane)); });
}

// Lets all go on if every thread of the cluster that has not exited has arrived.
void complete_if_due(Context& c) {
  for (const Cta* cta : c.cta.cluster)
    for (const Warp& warp : cta->warps)
      if (warp.live & ~warp.cluster_arrived) return;
  race_complete(cluster_meeting(c.cta));
  for (Cta* cta : c.cta.cluster) {
    for (Warp& warp : cta->warps) warp.cluster_released |= warp.cluster_arrived, warp.cluster_arrived = 0;
  }
  c.machine.events++;
}

Handler cluster_arrive(const Decoder& d) {
  const bool release = d.take("release") || !d.take("relaxed");
  const bool aligned = d.take("aligned");
  d.expect_done();
  d.operands(0);
  return [=](Context& c) {
    if (aligned && !converged(c)) return Outcome::kBlocked;
    if (c.mask & (c.warp.cluster_arrived | c.warp.cluster_released))
      fail(c, "a thread arrives at the cluster's barrier again without having waited");
    if (release) global_fence(c, {.strong = true, .release = true, .scope = Scope::kCluster});
    if (release) race_arrive(c, c.mask, cluster_meeting(c.cta));
    c.warp.cluster_arrived |= c.mask;
    c.machine.events++;
    complete_if_due(c);
    return Outcome::kNext;
  };
}

Handler cluster_wait(const Decoder& d) {
  d.take("acquire");
  const bool aligned = d.take("aligned");
  d.expect_done();
  d.operands(0);
  return [=](Context& c) {
    Warp& warp = c.warp;
    if (aligned && !converged(c)) return Outcome::kBlocked;
    if (c.mask & ~(warp.cluster_arrived | warp.cluster_released))
      fail(c, "a thread waits at the cluster's barrier without having arrived");
    const uint32_t ready = c.mask & warp.cluster_released;
    if (ready == 0) {
      warp.wait = {Wait::For::kClusterBarrier, &c.cta, 0, 0};
      return Outcome::kBlocked;
    }
    warp.cluster_released &= ~ready;
    race_leave(c, ready, cluster_meeting(c.cta));
    race_acquire(c, ready);  // a fence before a relaxed arrival releases, too
    global_fence(c, {.strong = true, .acquire = true, .scope = Scope::kCluster});
    if (ready == c.mask) return Outcome::kNext;
    for_lanes(ready, [&](int lane) { warp.pc[lane]++; });
    return Outcome::kJumped;
  };
}

}  // namespace

Handler decode_cluster_barrier(const Decoder& d) {
  if (d.take("arrive")) return cluster_arrive(d);
  if (d.take("wait")) return cluster_wait(d);
  d.unknown("barrier of a cluster");
}

void threads_exited(Context& c) {
  c.warp.cluster_arrived &= c.warp.live;
  c.warp.posted &= c.warp.live;
  cta_barriers_after_exit(c);
  complete_if_due(c);
}

Handler decode_cluster(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "mapa") return map_address(d);
  if (op == "getctarank") return rank_of_address(d);
  if (op == "isspacep") return is_space(d);
  return {};
}

}  // namespace emulator
