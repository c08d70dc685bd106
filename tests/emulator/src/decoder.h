// From a parsed instruction to its handler: modifiers in order, operands as sources and destinations.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ptx.h"

namespace emulator {

struct Context;

// kNext: go on behind the instruction. kBlocked: the lanes stay and try again. kJumped: it has set the pcs itself.
enum class Outcome { kNext, kBlocked, kJumped };
using Handler = std::function<Outcome(Context&)>;

// An operand that is read.
struct Source {
  // What is added to `constant` when the instruction runs.
  enum class Base : uint8_t { kNone, kSpecial, kShared, kLocal, kFrame };
  int index = -1;  // of a register; -1 for a constant
  bool negated = false;
  uint64_t constant = 0;
  Base base = Base::kNone;
  int special = -1;  // into decode.cpp's table

  uint64_t get(Context& context, int lane) const;
};

// A function within a program: where its instructions and registers begin.
struct Placed {
  const Function* function;
  uint32_t first_pc;
  int first_register;
};

// The registers an instruction touches, so that the machine can check them before it runs.
struct Touched {
  std::vector<int> reads, writes;
  // Compilers let lanes compute with values that are undefined there and of which nobody will use the result, so only
  // what acts on the world raises: addresses, stores, guards, barriers. kPacks: the result is undefined only where all
  // that goes into it is. kIgnored: shfl, whose result is another lane's.
  enum class Undefined : uint8_t { kRaises, kSpreads, kPacks, kIgnored } undefined = Undefined::kRaises;
  bool defines = false;  // keeps Warp::defined of its results itself: loads
  bool owns = false;     // checks its registers itself: wgmma
};

// An entry with all functions that it may call, as one sequence of instructions over one register file.
struct Code {
  const Module* module;
  const Function* function;  // the entry
  std::vector<Placed> functions;
  std::vector<const Instruction*> instructions;
  std::vector<Handler> handlers;
  std::vector<Touched> touched;
  int registers = 0;

  const Placed* find(const std::string& name) const;
  // Of the value that a pointer to a function has; null for others.
  const Placed* find(uint64_t pointer) const;
  const Placed& at(uint32_t pc) const;
  std::string register_name(int index) const;
};

// What a pointer to a function is.
uint64_t function_pointer(const Module& module, const std::string& name);

// Raises Error on an instruction or a modifier it does not know, with line and text.
std::shared_ptr<Code> decode(const Module& module, const Function& entry);

struct Decoder {
  const Code& code;
  const Placed& placed;
  const Instruction& instruction;
  Touched& touched;
  mutable size_t used = 0;  // modifiers consumed

  [[noreturn]] void unknown(const std::string& what) const;
  Decoder restart() const { return {code, placed, instruction, touched}; }
  // The modifiers must be consumed in order, so that none is passed over.
  bool take(const std::string& modifier) const;
  std::string next() const;
  bool done() const { return used == instruction.modifiers.size(); }
  void expect_done() const;
  const Operand& operand(size_t index) const;
  void operands(size_t count) const;
  const Variable& variable(const Operand& operand) const;
  Source source(const Operand& operand) const;
  Source source(size_t index) const { return source(operand(index)); }
  int destination(const Operand& operand) const;  // register index, -1 for a sink
  int destination(size_t index) const { return destination(operand(index)); }
  uint32_t target(const Operand& label) const;  // pc
};

// Families of instructions; each returns an empty Handler for an opcode that is not its own.
Handler decode_arithmetic(const Decoder& d);
Handler decode_convert(const Decoder& d);
Handler decode_memory(const Decoder& d);
Handler decode_matrix_memory(const Decoder& d);
Handler decode_atomic(const Decoder& d);
Handler decode_control(const Decoder& d);
Handler decode_call(const Decoder& d);
Handler decode_warp(const Decoder& d);
Handler decode_barrier(const Decoder& d);
Handler decode_cluster_barrier(const Decoder& d);  // behind barrier.cluster
Handler decode_cluster(const Decoder& d);
Handler decode_fence(const Decoder& d);
Handler decode_mbarrier(const Decoder& d);
Handler decode_copy(const Decoder& d);
Handler decode_wgmma(const Decoder& d);
Handler decode_mma(const Decoder& d);

// Bytes of ".b32", ".bf16x2", ...; a predicate has 1. Raises invalid_argument for what is no type of PTX, of which
// decode() makes an Error with line and text.
int bytes_of(const std::string& type);
inline uint64_t mask_of(int bytes) { return bytes >= 8 ? ~0ull : (1ull << 8 * bytes) - 1; }

}  // namespace emulator
