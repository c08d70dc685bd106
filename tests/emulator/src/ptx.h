// A PTX module after parsing: names resolved to indices, nothing interpreted yet.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

// What the emulator raises; reaches Python as emulator.EmulationError.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space : uint8_t { kParam, kShared, kLocal, kGlobal, kConst };

// An address among initial values: known once the variables have their places.
struct Relocation {
  uint64_t offset;       // within the variable
  uint32_t bytes;        // to write there: 8, or 1 where the text spells an address out byte by byte
  uint32_t shift;        // of the address to the right, in bits, before the low `bytes` of it are written
  int variable;          // index into Module::variables, -1 for a function
  std::string function;  // name, else empty
  int64_t addend;
  bool is_generic;  // generic(variable)
};

// A variable with an address: a parameter, or a .shared, .local, .global or .const variable.
struct Variable {
  std::string name;
  Space space;
  uint64_t offset;     // within its space; 0 for .global, which the machine places
  uint64_t bytes;      // 0 for an extern array without a size
  uint32_t alignment;  // bytes
  std::string type;    // of an element: "b8", "u32", "f32", ...
  bool is_extern;
  std::vector<uint8_t> initial;         // of the first bytes; of .global and .const the others are zero
  std::vector<Relocation> relocations;  // written over `initial`
  uint64_t address = 0;                 // of .global and .const, once the machine has placed them
  int register_index = -1;  // of a parameter in state space .reg: the callee's register it comes in or out by
};

struct Register {
  std::string name;  // "%r12"
  std::string type;  // "pred", "b32", "f32", "b64", ...
};

struct Operand {
  enum class Kind : uint8_t {
    kRegister,  // `index` into Function::registers; `negated` for !%p
    kInteger,   // `integer`; sign-extended literals, and WARP_SZ
    kFloat,     // `integer` holds the bits, `bytes` is 4 or 8: what the instruction's type takes, whatever was written
    kSpecial,   // `name`: "%tid.x", "%laneid", "%clock64", ...
    kVariable,  // the address of variable `index` plus `integer`, as in mov.u64 %rd, name;
    kMemory,    // [...]: base in `elements[0]` (kRegister, kVariable or kInteger), `integer` the byte offset;
                //        further elements are the coordinates of a tensor copy, as in [%rd, {%r1, %r2}]; a second
                //        list of such is one kVector
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
  int line;                            // in the PTX text, from 1
  std::string text;                    // as written, one line, for messages
  std::string opcode;                  // "cp", "mad", "wgmma"
  std::vector<std::string> modifiers;  // "async", "bulk", "tensor", "2d", "shared::cluster", ... in order
  int guard = -1;                      // register index of @%p
  bool guard_negated = false;
  std::vector<Operand> operands;
  int source_file = -1;  // index into Module::files, -1 if unknown
  int source_line = 0;   // 0 if unknown
};

// Space::kParam is a frame of `param_bytes`: the function's parameters, then the .param variables of its call
// sequences.
struct Function {
  std::string name;
  bool is_entry;
  bool is_defined = false;  // false: declared only, one of the functions that the machine has built in
  int line = 0;
  int results = 0;                   // how many of the parameters are results; these come first
  std::vector<Variable> parameters;  // in Space::kParam
  std::vector<Register> registers;   // nested { .reg ... } scopes have registers of their own
  std::vector<Variable> variables;   // .shared, .local and .param of the function; Operand::index of kVariable counts
                                     // parameters, then these, then Module::variables
  std::vector<Instruction> instructions;  // of a function with a body the last is always `ret`, written or not
  // A call has the operands {kVector of results, kFunction or kRegister, kVector of arguments}.
  std::map<std::string, std::vector<uint32_t>> directives;  // "maxntid": {384, 1, 1}, "minnctapersm": {1}, ...
  uint64_t shared_bytes = 0;  // of an entry, all it can reach included; an extern array begins there, aligned
  uint64_t param_bytes = 0, local_bytes = 0;
};

struct Module {
  std::string version, target;      // "9.0", "sm_90a"
  std::vector<Variable> variables;  // .shared, .global and .const; those of a function's body may share a name
  std::map<std::string, Function> functions;
  std::vector<std::string> files;  // of .file, in order
};

// Raises Error with the line and its text on what is no PTX or what it does not know.
Module parse(const std::string& text);

// The module in plain text, one fact a line, for tests and for looking at what was understood.
std::string describe(const Module& module);

// Bytes of the types of variables and registers; 0 for all else, .pred included.
uint64_t type_bytes(std::string_view type);

}  // namespace emulator
