// Branches, traps, and instructions that steer the machine rather than compute.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

Handler branch(const Decoder& d) {
  d.take("uni");
  d.expect_done();
  d.operands(1);
  return [target = d.target(d.operand(0))](Context& c) {
    // A jump to itself never ends.
    if (c.warp.pc[__builtin_ctz(c.mask)] == target) c.machine.note_poll(c.warp);
    for_lanes(c.mask, [&](int lane) { c.warp.pc[lane] = target; });
    return Outcome::kJumped;
  };
}

// brx.idx index, list
Handler indexed_branch(const Decoder& d) {
  if (!d.take("idx")) d.unknown("branch");
  d.take("uni");
  d.expect_done();
  d.operands(2);
  std::vector<uint32_t> targets;
  for (const Operand& label : d.operand(1).elements) targets.push_back(d.target(label));
  return [targets, index = d.source(0)](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const uint64_t i = index.get(c, lane) & 0xffffffff;
      if (i >= targets.size())
        fail(c, "index " + std::to_string(i) + " into " + std::to_string(targets.size()) + " targets");
      c.warp.pc[lane] = targets[i];
    });
    return Outcome::kJumped;
  };
}

constexpr int kRegisterFile = 65536, kWarpgroup = 4;
constexpr int kFewest = 24, kMost = 256, kStep = 8;

// Registers a thread has when the kernel starts, as ptxas fixes them; 0 where it cannot and ignores setmaxnreg.
int registers_at_entry(const Function& function) {
  const auto& all = function.directives;
  if (const auto given = all.find("maxnreg"); given != all.end() && !given->second.empty())
    return static_cast<int>(std::min<uint32_t>(given->second[0], kMost) + kStep - 1) / kStep * kStep;
  const auto ctas = all.find("minnctapersm");
  auto block = all.find("reqntid");
  if (block == all.end()) block = all.find("maxntid");
  if (ctas == all.end() || ctas->second.empty() || block == all.end()) return 0;
  uint64_t threads = ctas->second[0];
  for (uint32_t extent : block->second) threads *= std::clamp<uint32_t>(extent, 1, 1024);
  if (threads == 0 || threads > kRegisterFile) return 0;
  return std::min(kMost, static_cast<int>(kRegisterFile / threads) / kStep * kStep);
}

// All warps of a warpgroup execute the same setmaxnreg, in the same order.
void check_warpgroup(Context& c) {
  auto& steps = c.cta.register_steps[c.warp.index / kWarpgroup];
  if (c.warp.register_steps == steps.size()) steps.push_back(&c.instruction);
  const Instruction& first = *steps[c.warp.register_steps++];
  if (&first != &c.instruction &&
      (first.modifiers != c.instruction.modifiers || first.operands[0].integer != c.instruction.operands[0].integer))
    fail(c, "other warps of the warpgroup execute the one in line " + std::to_string(first.line) + ": " + first.text);
}

void begin_registers(Context& c, int at_entry) {
  Cta& cta = c.cta;
  if (cta.registers != 0) return;
  for (Warp& warp : cta.warps) warp.register_count = at_entry;
  cta.registers = at_entry * kLanes * static_cast<int>(cta.warps.size());
}

Handler set_registers(const Decoder& d) {
  const bool more = d.take("inc");
  if (!more && !d.take("dec")) d.unknown("setmaxnreg");
  if (!(d.take("sync") && d.take("aligned") && d.take("u32"))) d.unknown("setmaxnreg");
  d.expect_done();
  d.operands(1);
  const int64_t wanted = d.operand(0).integer;
  if (d.operand(0).kind != Operand::Kind::kInteger || wanted < kFewest || wanted > kMost || wanted % kStep)
    d.unknown("register count, which is 24 to 256 in eights");
  return [more, count = static_cast<int>(wanted), at_entry = registers_at_entry(*d.code.function)](Context& c) {
    Warp& warp = c.warp;
    if (!converged(c)) return Outcome::kBlocked;
    if (at_entry == 0)
      fail(c,
           "ptxas ignores setmaxnreg (C7508) where it does not know the registers at entry: .maxnreg, or "
           ".minnctapersm with .maxntid or .reqntid, is missing");
    begin_registers(c, at_entry);
    if (more ? count < warp.register_count : count > warp.register_count)
      fail(c, "the warp has " + std::to_string(warp.register_count) + " registers a thread already");
    const int change = (count - warp.register_count) * kLanes;
    if (change > c.cta.registers_free) {
      const int warps = static_cast<int>(c.cta.warps.size()), group = std::min(warps, kWarpgroup);
      const int least = (group * count + (warps - group) * kFewest) * kLanes;
      if (least > c.cta.registers)
        fail(c, "beyond the budget: the CTA has " + std::to_string(c.cta.registers) + " registers, and needs " +
                    std::to_string(least) + " even if all other warps come down to 24 a thread");
      warp.wait = {Wait::For::kRegisters, &c.cta, 0, static_cast<uint64_t>(change)};
      return Outcome::kBlocked;
    }
    check_warpgroup(c);
    c.cta.registers_free -= change;
    warp.register_count = count;
    if (change != 0) c.machine.events++;
    return Outcome::kNext;
  };
}

// griddepcontrol.wait: until the launch before this one has ended, and what it wrote is visible.
Outcome wait_for_grid(Context& c) {
  Grid& grid = c.grid;
  if (grid.after != nullptr) {
    if (!grid.after->finished) {
      c.warp.wait = {Wait::For::kGrid, &c.cta, 0, 0};
      return Outcome::kBlocked;
    }
    grid.after = nullptr;
    grid.started = c.machine.memory.now;
  }
  Observed& observed = c.cta.observed;
  for (uint64_t* time : {&observed.gpu, &observed.sys, &observed.proxy_fence}) *time = std::max(*time, grid.started);
  return Outcome::kNext;
}

Handler grid_dependency(const Decoder& d) {
  const bool wait = d.take("wait");
  if (!wait && !d.take("launch_dependents")) d.unknown("griddepcontrol");
  d.expect_done();
  d.operands(0);
  if (wait) return wait_for_grid;
  return [](Context& c) {
    if (!c.cta.releases_dependents) c.machine.events++;
    c.cta.releases_dependents = true;
    return Outcome::kNext;
  };
}

// Between 0 and twice the time asked for, which is at most a millisecond.
Handler nanosleep(const Decoder& d) {
  if (!d.take("u32")) d.unknown("type");
  d.expect_done();
  d.operands(1);
  return [time = d.source(0)](Context& c) {
    uint64_t longest = 0;
    for_lanes(c.mask, [&](int lane) { longest = std::max(longest, time.get(c, lane) & 0xffffffff); });
    c.warp.sleep = c.machine.below(static_cast<uint32_t>(std::min<uint64_t>(2 * longest, 256)) + 1);
    return Outcome::kNext;
  };
}

// trap and brkpt.
Handler stop(const Decoder& d) {
  d.expect_done();
  d.operands(0);
  return [](Context& c) -> Outcome { fail(c, c.instruction.opcode); };
}

Handler event(const Decoder& d) {
  d.take("mask");
  d.expect_done();
  d.operands(1);
  d.source(0);
  return [](Context&) { return Outcome::kNext; };
}

}  // namespace

Handler decode_control(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "bra") return branch(d);
  if (op == "brx") return indexed_branch(d);
  if (op == "setmaxnreg") return set_registers(d);
  if (op == "griddepcontrol") return grid_dependency(d);
  if (op == "nanosleep") return nanosleep(d);
  if (op == "trap" || op == "brkpt") return stop(d);
  if (op == "pmevent") return event(d);
  return {};
}

}  // namespace emulator
