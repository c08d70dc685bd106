// What the parser knows while it reads. parser.cpp reads modules and functions, declaration.cpp what they declare,
// operand.cpp instructions and call.cpp calls; layout.cpp then places the variables.
#pragma once
#include <map>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "lexer.h"
#include "ptx.h"

namespace emulator {

template <typename T>
using Names = std::map<std::string, T, std::less<>>;

struct Symbol {
  Operand::Kind kind;  // kRegister, kVariable or kFunction
  int index;
  int width = 1;  // of a vector register, whose elements are registers in a row
};

// Signature of what is called; the results come first.
struct Prototype {
  std::vector<Variable> parameters;
  int results = 0;
};

// A use of a label, which the scope that declares it resolves when it closes.
struct LabelUse {
  std::string name;
  size_t instruction, operand;
  int element;  // of a kVector operand, or -1
};

struct Scope {
  Names<Symbol> symbols;
  Names<int> labels;
  Names<std::vector<std::string>> targets;  // of .branchtargets
  Names<Prototype> prototypes;              // of .callprototype and .calltargets
  std::vector<LabelUse> uses;
};

Operand make(Operand::Kind kind, int index = -1);

// A module-level variable has its index in Function's numbering only once all of the function's own are known. Until
// then it is this, of its index in Module::variables, and back.
constexpr int module_index(int index) { return -2 - index; }

// An operand of a literal's value; a number in decimal has 0 `bytes` until it is fitted.
Operand literal_of(const Constant& value);

// Turns a floating-point literal into what a number of `type` takes; fails by `lexer` if it has no place there.
void fit(const Lexer& lexer, Operand& literal, std::string_view type, int line);

// Gives all variables their offsets, and functions their sizes.
void lay_out(Module& module);

class Parser : private Lexer {
 public:
  explicit Parser(const std::string& text) : Lexer(text) {}
  Module run();

 private:
  // parser.cpp
  void module_statement();
  void function(bool is_entry, bool is_extern);
  void body();
  void statement();
  void label();
  void close_scope();
  void use_label(Scope& scope, LabelUse use);
  void alias();
  void finish();
  void resolve();
  void declare(const Token& token, const std::string& name, Symbol symbol);
  Scope& scope() { return scopes_.back(); }
  const Symbol* find(std::string_view name) const;

  // debug.cpp
  bool inert_statement();  // whether there was one, which says nothing about the run: .pragma, .file, .loc, .section
  void location();
  void file();

  // declaration.cpp
  void registers();
  void variables(Space space, bool is_extern);
  void parameters(Prototype& prototype, Function* callee);
  Variable attributes(Space space, bool is_extern, uint64_t& width);  // of `bytes` for an element of `width` numbers
  const Token& declarator(Variable& variable, uint64_t width);        // name, extents and initial values
  uint32_t alignment();
  void directives(Function& function);
  int add_register(Function& function, const std::string& name, std::string_view type);
  void declare_register(const Token& token, const std::string& name, std::string_view type, int width);
  bool declared_before(const Token& token, const Variable& variable);

  // initial.cpp
  void initializer(Variable& variable, std::vector<uint64_t> extents, uint64_t width);
  void initial_values(Variable& variable, std::span<const uint64_t> extents, uint64_t at);
  void initial_number(Variable& variable, uint64_t at);
  void initial_address(Variable& variable, uint64_t at);
  void reserve(Variable& variable, uint64_t end);

  // operand.cpp
  void instruction();
  void guard(Instruction& instruction);
  void fit_literals(Instruction& instruction);
  Operand list(const char* open, const char* close);
  Operand target(const Instruction& branch);
  Operand operand();
  Operand single_operand();
  Operand memory_operand();
  Operand reference(const Token& token);
  Operand register_operand(const Symbol& symbol) const;
  Operand selected(const Token& token) const;
  Symbol dynamic_array(const std::string& name, const Variable& array);
  int64_t displacement();

  // call.cpp
  void call_operands(Instruction& call);
  void prototype(const std::string& label);
  Prototype declared_prototype();
  void check_call(Instruction& call, const std::string& callee, const Prototype& prototype);
  void check_argument(Operand& argument, const Variable& parameter, const std::string& callee, int line);
  Prototype signature(const Token& name) const;

  Module module_;
  Function* function_ = nullptr;
  std::vector<Scope> scopes_ = std::vector<Scope>(1);  // [0] is the module's, [1] the function's
  std::map<int, int> variable_lines_;                  // where each extern variable of the module is first used
  Names<int> function_lines_;                          // where each function is first used
  Names<std::string> aliases_;
  std::map<int, int> file_numbers_;                              // of .file, to indices into Module::files
  int file_ = -1, source_line_ = 0;                              // of the last .loc; the file by its number
  uint64_t registers_ = 0, initial_bytes_ = 0, label_uses_ = 0;  // of the module so far
};

}  // namespace emulator
