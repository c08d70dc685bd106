// Programs: an entry with what it calls, decoded; and how handlers read operands.
#include <algorithm>
#include <sstream>

#include "machine.h"
#include "special.h"

namespace emulator {

uint64_t source_slow(const Source& source, Context& c, int lane) {
  switch (source.base) {
    case Source::Base::kSpecial:
      return special_value(source.special, c, lane);
    case Source::Base::kShared:
      return source.constant + (c.cta.cluster_rank << kRankShift);
    case Source::Base::kLocal:
      return source.constant + c.warp.local_base[lane];
    case Source::Base::kFrame:
      return source.constant + (kFrameParam | c.warp.param_base[lane]);
    default:
      return source.constant;
  }
}

int bytes_of(const std::string& type) {
  if (type == "pred") return 1;
  // Registers have no such types; instructions do.
  const uint64_t bytes = type == "bf16" ? 2 : type == "bf16x2" || type == "tf32" ? 4 : type_bytes(type);
  if (bytes == 0 || bytes > 16) throw std::invalid_argument("no type of PTX: ." + type);
  return static_cast<int>(bytes);
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

const Variable& Decoder::variable(const Operand& operand) const {
  const Function& function = *placed.function;
  auto index = static_cast<size_t>(operand.index);
  if (index < function.parameters.size()) return function.parameters[index];
  index -= function.parameters.size();
  if (index < function.variables.size()) return function.variables[index];
  return code.module->variables.at(index - function.variables.size());
}

Source Decoder::source(const Operand& operand) const {
  Source source;
  switch (operand.kind) {
    case Operand::Kind::kRegister:
      source.index = placed.first_register + operand.index;
      source.negated = operand.negated;
      touched.reads.push_back(source.index);
      return source;
    case Operand::Kind::kInteger:
    case Operand::Kind::kFloat:
      source.constant = static_cast<uint64_t>(operand.integer);
      return source;
    case Operand::Kind::kSpecial:
      source.base = Source::Base::kSpecial;
      source.special = special_index(operand.name);
      if (source.special < 0) unknown("special register " + operand.name);
      return source;
    case Operand::Kind::kFunction:
      if (code.find(operand.name) == nullptr) unknown("function, which has no body, " + operand.name);
      source.constant = function_pointer(*code.module, operand.name);
      return source;
    case Operand::Kind::kVariable: {
      const Variable& of = variable(operand);
      const auto space = of.space;
      source.constant = of.offset + static_cast<uint64_t>(operand.integer);
      if (space == Space::kShared) source.base = Source::Base::kShared, source.constant += kSharedBase;
      if (space == Space::kLocal) source.base = Source::Base::kLocal;
      const bool own = static_cast<size_t>(operand.index) < placed.function->parameters.size();
      if (space == Space::kParam && !(own && placed.function->is_entry)) source.base = Source::Base::kFrame;
      if (space == Space::kGlobal || space == Space::kConst) {
        if (of.address == 0) unknown("variable without storage, " + of.name);
        source.constant = of.address + static_cast<uint64_t>(operand.integer);
      }
      return source;
    }
    default:
      unknown("operand");
  }
}

int Decoder::destination(const Operand& operand) const {
  if (operand.kind == Operand::Kind::kSink) return -1;
  if (operand.kind != Operand::Kind::kRegister || operand.negated) unknown("destination");
  touched.writes.push_back(placed.first_register + operand.index);
  return touched.writes.back();
}

uint32_t Decoder::target(const Operand& label) const {
  if (label.kind != Operand::Kind::kLabel) unknown("target");
  return placed.first_pc + static_cast<uint32_t>(label.index);
}

const Placed* Code::find(const std::string& name) const {
  const auto found = std::find_if(functions.begin(), functions.end(),
                                  [&](const Placed& placed) { return placed.function->name == name; });
  return found == functions.end() ? nullptr : &*found;
}

const Placed* Code::find(uint64_t pointer) const {
  const uint64_t index = pointer - kFunctionWindow;
  if (pointer < kFunctionWindow || index >= module->functions.size()) return nullptr;
  return find(std::next(module->functions.begin(), static_cast<std::ptrdiff_t>(index))->first);
}

uint64_t function_pointer(const Module& module, const std::string& name) {
  const auto index = std::distance(module.functions.begin(), module.functions.find(name));
  return kFunctionWindow | static_cast<uint64_t>(index);
}

const Placed& Code::at(uint32_t pc) const {
  const auto after = std::upper_bound(functions.begin(), functions.end(), pc,
                                      [](uint32_t value, const Placed& placed) { return value < placed.first_pc; });
  return *std::prev(after);
}

std::string Code::register_name(int index) const {
  const Placed* of = &functions.front();
  for (const Placed& placed : functions)
    if (placed.first_register <= index) of = &placed;
  const auto within = static_cast<size_t>(index - of->first_register);
  return within < of->function->registers.size() ? of->function->registers[within].name : "?";
}

namespace {

void add_functions_of(const Operand& operand, std::vector<std::string>& names) {
  if (operand.kind == Operand::Kind::kFunction) names.push_back(operand.name);
  for (const Operand& element : operand.elements) add_functions_of(element, names);
}

void place(Code& code, const Function& function) {
  code.functions.push_back({&function, static_cast<uint32_t>(code.instructions.size()), code.registers});
  for (const Instruction& instruction : function.instructions) code.instructions.push_back(&instruction);
  code.registers += static_cast<int>(function.registers.size());
}

void place_reachable(Code& code) {
  place(code, *code.function);
  std::vector<std::string> names;
  for (const Variable& variable : code.module->variables)
    for (const Relocation& relocation : variable.relocations)
      if (!relocation.function.empty()) names.push_back(relocation.function);
  for (size_t done = 0; done < code.functions.size(); ++done) {
    for (const Instruction& instruction : code.functions[done].function->instructions)
      for (const Operand& operand : instruction.operands) add_functions_of(operand, names);
    for (const std::string& name : names) {
      const auto found = code.module->functions.find(name);
      if (found != code.module->functions.end() && found->second.is_defined && code.find(name) == nullptr)
        place(code, found->second);
    }
    names.clear();
  }
}

Touched::Undefined undefined_rule(const Instruction& instruction) {
  static const std::set<std::string> kPacking = {"mov", "prmt", "and", "or", "lop3", "bfi", "shl", "shr", "cvt"};
  static const std::set<std::string> kComputing = {
      "add",  "sub",  "mul",  "mad",  "fma",  "div",  "rem", "neg",  "abs",   "min",     "max",   "set",
      "setp", "selp", "slct", "not",  "xor",  "shf",  "bfe", "sad",  "rcp",   "sqrt",    "rsqrt", "ex2",
      "lg2",  "sin",  "cos",  "tanh", "popc", "brev", "clz", "cnot", "bfind", "copysign"};
  if (instruction.opcode == "shfl") return Touched::Undefined::kIgnored;
  if (kPacking.contains(instruction.opcode)) return Touched::Undefined::kPacks;
  return kComputing.contains(instruction.opcode) ? Touched::Undefined::kSpreads : Touched::Undefined::kRaises;
}

Handler decode_one(const Decoder& d) {
  for (auto* family : {decode_arithmetic, decode_convert, decode_memory, decode_matrix_memory, decode_atomic,
                       decode_control, decode_call, decode_warp, decode_barrier, decode_cluster, decode_fence,
                       decode_mbarrier, decode_copy, decode_wgmma, decode_mma}) {
    if (Handler handler = family(d.restart())) return handler;
    d.touched = {};
  }
  d.unknown("instruction");
}

}  // namespace

std::shared_ptr<Code> decode(const Module& module, const Function& entry) {
  auto code = std::make_shared<Code>();
  code->module = &module, code->function = &entry;
  place_reachable(*code);
  code->touched.resize(code->instructions.size());
  for (uint32_t pc = 0; pc < code->instructions.size(); ++pc) {
    const Instruction& instruction = *code->instructions[pc];
    const Decoder d{*code, code->at(pc), instruction, code->touched[pc]};
    try {
      code->handlers.push_back(decode_one(d));
    } catch (const Error&) {
      throw;
    } catch (const std::exception&) {
      d.unknown("instruction");
    }
    if (instruction.guard >= 0) code->touched[pc].reads.push_back(d.placed.first_register + instruction.guard);
    code->touched[pc].undefined = undefined_rule(instruction);
  }
  return code;
}

}  // namespace emulator
