// A PTX module after parsing: names resolved to indices, nothing interpreted yet.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

// What the emulator raises; reaches Python as emulator.EmulationError.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space : uint8_t { kParam, kShared, kLocal, kGlobal, kConst };

// A variable with an address: a kernel parameter, or a .shared, .local, .global or .const variable.
struct Variable {
  std::string name;
  Space space;
  uint64_t offset;     // within its space: parameters and shared variables are laid out in order of declaration
  uint64_t bytes;      // 0 for an extern shared array
  uint32_t alignment;  // bytes
  std::string type;    // of an element: "b8", "u32", "f32", ...
  bool is_extern;
  std::vector<uint8_t> initial;  // empty: zero for .global and .const, undefined elsewhere
  uint64_t address = 0;          // of .global and .const, once the module is loaded
};

struct Register {
  std::string name;  // "%r12"
  std::string type;  // "pred", "b32", "f32", "b64", ...
};

struct Operand {
  enum class Kind : uint8_t {
    kRegister,  // `index` into Function::registers; `negated` for !%p
    kInteger,   // `integer`; sign-extended literals, and WARP_SZ
    kFloat,     // `integer` holds the bits of 0fXXXXXXXX (32, `bytes` = 4) or 0dXXXXXXXXXXXXXXXX (64, `bytes` = 8)
    kSpecial,   // `name`: "%tid.x", "%laneid", "%clock64", ...
    kVariable,  // the address of variable `index` plus `integer`, as in mov.u64 %rd, name;
    kMemory,    // [...]: base in `elements[0]` (kRegister, kVariable or kInteger), `integer` the byte offset;
                //        further elements are the coordinates of a tensor copy, as in [%rd, {%r1, %r2}]
    kVector,    // {a, b, ...} in `elements`
    kPair,      // d|p in `elements`; either may be kSink
    kSink,      // _
    kLabel,     // `index` of the instruction jumped to
    kFunction,  // `name` of a function called
  };
  Kind kind;
  int index = -1;
  bool negated = false;
  int64_t integer = 0;
  int bytes = 0;
  std::string name;
  std::vector<Operand> elements;
};

struct Instruction {
  int line;          // in the PTX text, from 1
  std::string text;  // as written, one line, for messages
  int source_file = -1, source_line = 0;
  std::string opcode;                  // "cp", "mad", "wgmma"
  std::vector<std::string> modifiers;  // "async", "bulk", "tensor", "2d", "shared::cluster", ... in order
  int guard = -1;                      // register index of @%p
  bool guard_negated = false;
  std::vector<Operand> operands;
};

struct Function {
  std::string name;
  bool is_entry;
  std::vector<Variable> parameters;  // of an entry, in Space::kParam; of a device function, result first
  std::vector<Register> registers;   // nested { .reg ... } scopes have registers of their own
  std::vector<Variable> variables;   // .shared and .local of the function; Operand::index of kVariable counts
                                     // parameters, then these, then Module::variables
  std::vector<Instruction> instructions;
  // A call has the operands {kVector of results, kFunction or kRegister, kVector of arguments}.
  std::map<std::string, std::vector<uint32_t>> directives;  // "maxntid": {384, 1, 1}, "minnctapersm": {1}, ...
  uint64_t shared_bytes = 0;  // of the variables, module-level ones included; an extern array begins there, aligned
};

struct Module {
  std::string version, target;  // "9.0", "sm_90a"
  std::vector<Variable> variables;
  std::map<std::string, Function> functions;
  std::string file(int) const { return ""; }
  std::vector<std::string> functions_in_data() const { return {}; }
};

// Raises Error with the line and its text on what is no PTX or what it does not know.
Module parse(const std::string& text);

}  // namespace emulator
