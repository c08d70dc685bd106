// A parsed module in plain text.
#include <sstream>

#include "ptx.h"

namespace emulator {
namespace {

using Kind = Operand::Kind;

const char* name_of(Space space) {
  switch (space) {
    case Space::kParam:
      return "param";
    case Space::kShared:
      return "shared";
    case Space::kLocal:
      return "local";
    case Space::kGlobal:
      return "global";
    default:
      return "const";
  }
}

std::string hex(uint64_t value, int digits) {
  std::string result(static_cast<size_t>(digits), '0');
  for (auto digit = result.rbegin(); digit != result.rend(); ++digit, value >>= 4)
    *digit = "0123456789abcdef"[value & 15];
  return result;
}

std::string offset_of(int64_t offset) { return offset == 0 ? "" : (offset > 0 ? "+" : "") + std::to_string(offset); }

class Description {
 public:
  explicit Description(const Module& module) : module_(module) {}

  std::string text() {
    out_ << "version " << module_.version << " target " << module_.target << "\n";
    for (size_t i = 0; i < module_.files.size(); ++i) out_ << "file " << i << " " << module_.files[i] << "\n";
    for (const Variable& v : module_.variables) variable("variable", v);
    for (const auto& [name, f] : module_.functions) function(f);
    return out_.str();
  }

 private:
  void variable(const char* what, const Variable& v) {
    out_ << what << " " << v.name << " ." << name_of(v.space) << " ." << v.type << " align " << v.alignment << " bytes "
         << v.bytes << " offset " << v.offset;
    if (v.is_extern) out_ << " extern";
    if (v.register_index >= 0) out_ << " register " << v.register_index;
    if (!v.initial.empty()) out_ << " = ";
    for (uint8_t byte : v.initial) out_ << hex(byte, 2);
    out_ << "\n";
    for (const Relocation& r : v.relocations) {
      const std::string target = r.variable < 0 ? r.function : module_.variables[static_cast<size_t>(r.variable)].name;
      out_ << "  at " << r.offset << " bytes " << r.bytes << " shift " << r.shift << " "
           << (r.is_generic     ? "generic "
               : r.variable < 0 ? "function "
                                : "variable ")
           << target << offset_of(r.addend) << "\n";
    }
  }

  void function(const Function& f) {
    out_ << (f.is_entry ? "entry " : "function ") << f.name << (f.is_defined ? "" : " declared") << " line " << f.line
         << " results " << f.results << " param " << f.param_bytes << " local " << f.local_bytes << " shared "
         << f.shared_bytes << "\n";
    for (const auto& [directive, values] : f.directives) {
      out_ << "  directive " << directive;
      for (uint32_t value : values) out_ << " " << value;
      out_ << "\n";
    }
    for (const Variable& v : f.parameters) variable("  parameter", v);
    for (size_t i = 0; i < f.registers.size(); ++i) {
      out_ << "  register " << i << " " << f.registers[i].name << " ." << f.registers[i].type << "\n";
    }
    for (const Variable& v : f.variables) variable("  variable", v);
    for (size_t i = 0; i < f.instructions.size(); ++i) instruction(f, i);
  }

  void instruction(const Function& f, size_t index) {
    const Instruction& instruction = f.instructions[index];
    out_ << "  " << index << ": line " << instruction.line;
    if (instruction.source_line > 0) out_ << " source " << instruction.source_file << ":" << instruction.source_line;
    out_ << ": ";
    if (instruction.guard >= 0) out_ << "@" << (instruction.guard_negated ? "!#" : "#") << instruction.guard << " ";
    out_ << instruction.opcode;
    for (const std::string& modifier : instruction.modifiers) out_ << "." << modifier;
    for (size_t i = 0; i < instruction.operands.size(); ++i) {
      out_ << (i == 0 ? " " : ", ") << operand(f, instruction.operands[i]);
    }
    out_ << "\n";
  }

  std::string list(const Function& f, const Operand& o, size_t first, const char* between) {
    std::string result;
    for (size_t i = first; i < o.elements.size(); ++i) result += (i == 0 ? "" : between) + operand(f, o.elements[i]);
    return result;
  }

  std::string operand(const Function& f, const Operand& o) {
    switch (o.kind) {
      case Kind::kRegister:
        return (o.negated ? "!#" : "#") + std::to_string(o.index);
      case Kind::kInteger:
        return std::to_string(o.integer);
      case Kind::kFloat:
        return (o.bytes == 4 ? "f32:" : "f64:") + hex(static_cast<uint64_t>(o.integer), 2 * o.bytes);
      case Kind::kVariable:
        return variable_name(f, static_cast<size_t>(o.index)) + offset_of(o.integer);
      case Kind::kMemory:
        return "[" + operand(f, o.elements[0]) + offset_of(o.integer) + list(f, o, 1, ", ") + "]";
      case Kind::kVector:
        return "{" + list(f, o, 0, ", ") + "}";
      case Kind::kPair:
        return list(f, o, 0, "|");
      case Kind::kSink:
        return "_";
      case Kind::kLabel:
        return "->" + std::to_string(o.index);
      default:  // kSpecial, kFunction
        return o.name;
    }
  }

  // Of several with one name each says which it is.
  std::string variable_name(const Function& f, size_t index) {
    const size_t parameters = f.parameters.size(), own = parameters + f.variables.size();
    const Variable& v = index < parameters ? f.parameters[index]
                        : index < own      ? f.variables[index - parameters]
                                           : module_.variables[index - own];
    return v.name + "@" + name_of(v.space) + std::to_string(v.offset);
  }

  const Module& module_;
  std::ostringstream out_;
};

}  // namespace

std::string describe(const Module& module) { return Description(module).text(); }

}  // namespace emulator
