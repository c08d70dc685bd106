// Branches, traps, and instructions that steer the machine rather than compute.
#include "machine.h"

namespace emulator {
namespace {

Handler branch(const Decoder& d) {
  d.take("uni");
  d.expect_done();
  d.operands(1);
  return [target = d.target(d.operand(0))](Context& c) {
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

}  // namespace

Handler decode_control(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "bra") return branch(d);
  if (op == "brx") return indexed_branch(d);
  if (op == "setmaxnreg") return set_registers(d);
  if (op == "trap") return [](Context& c) -> Outcome { fail(c, "trap"); };
  return {};
}

}  // namespace emulator
