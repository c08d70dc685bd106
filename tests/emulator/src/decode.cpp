// From a parsed instruction to its handler, and how handlers read operands.
#include <sstream>

#include "machine.h"

namespace emulator {
namespace {

using SpecialValue = uint64_t (*)(Context&, int);

uint32_t thread_of(const Context& c, int lane) { return c.warp.index * kLanes + lane; }

// Special registers by name.
struct Special {
  const char* name;
  SpecialValue value;
};
constexpr Special kSpecials[] = {
    {"%tid.x", [](Context& c, int lane) -> uint64_t { return thread_of(c, lane) % c.grid.block[0]; }},
    {"%tid.y", [](Context& c, int lane) -> uint64_t { return thread_of(c, lane) / c.grid.block[0] % c.grid.block[1]; }},
    {"%tid.z", [](Context& c, int lane) -> uint64_t { return thread_of(c, lane) / c.grid.block[0] / c.grid.block[1]; }},
    {"%ntid.x", [](Context& c, int) -> uint64_t { return c.grid.block[0]; }},
    {"%ntid.y", [](Context& c, int) -> uint64_t { return c.grid.block[1]; }},
    {"%ntid.z", [](Context& c, int) -> uint64_t { return c.grid.block[2]; }},
    {"%ctaid.x", [](Context& c, int) -> uint64_t { return c.cta.id[0]; }},
    {"%ctaid.y", [](Context& c, int) -> uint64_t { return c.cta.id[1]; }},
    {"%ctaid.z", [](Context& c, int) -> uint64_t { return c.cta.id[2]; }},
    {"%nctaid.x", [](Context& c, int) -> uint64_t { return c.grid.grid[0]; }},
    {"%nctaid.y", [](Context& c, int) -> uint64_t { return c.grid.grid[1]; }},
    {"%nctaid.z", [](Context& c, int) -> uint64_t { return c.grid.grid[2]; }},
    {"%laneid", [](Context&, int lane) -> uint64_t { return lane; }},
    {"%warpid", [](Context& c, int) -> uint64_t { return c.warp.index; }},
    {"%cluster_ctarank", [](Context& c, int) -> uint64_t { return c.cta.cluster_rank; }},
    {"%cluster_nctarank", [](Context& c, int) -> uint64_t { return c.cta.cluster.size(); }},
};

}  // namespace

uint64_t Source::get(Context& context, int lane) const {
  if (index >= 0) {
    const uint64_t value = context.warp.reg(index)[lane];
    return negated ? (value & 1) ^ 1 : value;
  }
  return special >= 0 ? kSpecials[special].value(context, lane) : constant;
}

int bytes_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "f16x2" || type == "bf16x2") return 4;
  if (type == "bf16") return 2;
  const int bits = std::stoi(type.substr(type[0] == 'b' && type[1] == 'f' ? 2 : 1));
  return bits / 8;
}

void Decoder::unknown(const std::string& what) const {
  throw Error("line " + std::to_string(instruction.line) + ": the emulator does not know this " + what + ": " +
              instruction.text);
}

bool Decoder::take(const std::string& modifier) const {
  if (done() || instruction.modifiers[used] != modifier) return false;
  ++used;
  return true;
}

std::string Decoder::next() const {
  if (done()) unknown("instruction, which ends too early");
  return instruction.modifiers[used++];
}

void Decoder::expect_done() const {
  if (!done()) unknown("modifier ." + instruction.modifiers[used]);
}

const Operand& Decoder::operand(size_t index) const {
  if (index >= instruction.operands.size()) unknown("number of operands");
  return instruction.operands[index];
}

void Decoder::operands(size_t count) const {
  if (instruction.operands.size() != count) unknown("number of operands");
}

Source Decoder::source(const Operand& operand) const {
  Source source;
  switch (operand.kind) {
    case Operand::Kind::kRegister:
      source.index = operand.index;
      source.negated = operand.negated;
      return source;
    case Operand::Kind::kInteger:
    case Operand::Kind::kFloat:
      source.constant = static_cast<uint64_t>(operand.integer);
      return source;
    case Operand::Kind::kSpecial:
      for (size_t i = 0; i < std::size(kSpecials); ++i) {
        if (operand.name == kSpecials[i].name) source.special = static_cast<int>(i);
      }
      if (source.special < 0) unknown("special register " + operand.name);
      return source;
    case Operand::Kind::kVariable: {
      size_t index = operand.index;
      const Variable* variable = nullptr;
      if (index < function.parameters.size())
        variable = &function.parameters[index];
      else if ((index -= function.parameters.size()) < function.variables.size())
        variable = &function.variables[index];
      else
        variable = &module.variables.at(index - function.variables.size());
      const uint64_t base = variable->space == Space::kShared ? kSharedBase : 0;
      if (variable->space == Space::kGlobal || variable->space == Space::kConst) unknown("variable in global memory");
      source.constant = base + variable->offset + operand.integer;
      return source;
    }
    default:
      unknown("operand");
  }
}

int Decoder::destination(const Operand& operand) const {
  if (operand.kind == Operand::Kind::kSink) return -1;
  if (operand.kind != Operand::Kind::kRegister) unknown("destination");
  return operand.index;
}

std::shared_ptr<Code> decode(const Module& module, const Function& function) {
  auto code = std::make_shared<Code>();
  code->function = &function, code->module = &module;
  for (const Instruction& instruction : function.instructions) {
    Handler handler;
    for (auto* family : {decode_arithmetic, decode_convert, decode_memory, decode_control, decode_mbarrier, decode_copy,
                         decode_wgmma}) {
      const Decoder decoder{module, function, instruction};
      if ((handler = family(decoder))) break;
    }
    if (!handler) Decoder{module, function, instruction}.unknown("instruction");
    code->handlers.push_back(std::move(handler));
  }
  return code;
}

}  // namespace emulator
