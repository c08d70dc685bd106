#include <algorithm>
#include <set>
#include <utility>

#include "lexer.h"
#include "ptx.h"

namespace emulator {
namespace {

using Kind = Operand::Kind;
template <typename T>
using Names = std::map<std::string, T, std::less<>>;

// A module-level variable has its index in Function's numbering only once all of the function's own are known.
constexpr int module_index(int index) { return -2 - index; }

struct Symbol {
  Kind kind;  // kRegister, kVariable or kFunction
  int index;
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
  Names<std::vector<std::string>> lists;  // .branchtargets; of .callprototype and .calltargets just the name
  std::vector<LabelUse> uses;
};

constexpr uint64_t round_up(uint64_t value, uint64_t alignment) { return (value + alignment - 1) & ~(alignment - 1); }

void place_all(std::vector<Variable>& variables, Space space, uint64_t& end) {
  for (Variable& v : variables) {
    if (v.space != space || (v.is_extern && space == Space::kShared)) continue;
    v.offset = round_up(end, v.alignment);
    end = v.offset + v.bytes;
  }
}

void place_dynamic(std::vector<Variable>& variables, uint64_t shared_bytes) {
  for (Variable& v : variables) {
    if (v.space == Space::kShared && v.is_extern) v.offset = round_up(shared_bytes, v.alignment);
  }
}

Operand make(Kind kind, int index = -1) {
  Operand result{};
  result.kind = kind;
  result.index = index;
  return result;
}

class Parser : private Lexer {
 public:
  explicit Parser(const std::string& text) : Lexer(text) {}
  Module run();

 private:
  void module_statement();
  void function(bool is_entry, bool is_extern);
  void parameters(Function& function);
  void registers();
  void variables(Space space, bool is_extern);
  void declare(const Token& token, const std::string& name, Symbol symbol);

  void body();
  void statement();
  void label();
  void close_scope();
  void instruction();
  void call_operands(Instruction& call);
  Operand list(const char* open, const char* close);
  Operand target(const Instruction& branch);
  Operand operand();
  Operand single_operand();
  Operand memory_operand();
  Operand reference(const Token& token);
  Symbol dynamic_array(const std::string& name, Variable array, int line);
  int64_t displacement();

  void layout();

  Module module_;
  Function* function_ = nullptr;
  std::vector<Scope> scopes_ = std::vector<Scope>(1);  // [0] is the module's, [1] the function's
  std::set<std::string> defined_;
  Names<int> dynamic_lines_;  // where each function first speaks of an extern shared array
};

Module Parser::run() {
  expect(".version");
  module_.version = take(Token::Kind::kNumber, "a version").text;
  expect(".target");
  module_.target = name("a target").text;
  while (accept(",")) name("a target option");
  while (!is(Token::Kind::kEnd)) module_statement();
  layout();
  return std::move(module_);
}

void Parser::module_statement() {
  if (inert_statement()) return;
  if (accept(".address_size")) {
    const int line = peek().line;
    if (integer() != 64) fail(line, "only addresses of 64 bits are known");
    return;
  }
  bool is_extern = false;
  while (true) {
    if (accept(".extern")) {
      is_extern = true;
    } else if (!accept(".visible") && !accept(".weak") && !accept(".common")) {
      break;
    }
  }
  if (accept(".entry")) return function(true, is_extern);
  if (accept(".func")) return function(false, is_extern);
  if (accept(".global")) return variables(Space::kGlobal, is_extern);
  if (accept(".const")) return variables(Space::kConst, is_extern);
  if (accept(".shared")) return variables(Space::kShared, is_extern);
  fail("unknown at module level, " + std::string(peek().text));
}

void Parser::function(bool is_entry, bool is_extern) {
  Function parsed{};
  parsed.is_entry = is_entry;
  scopes_.emplace_back();
  if (!is_entry && is("(")) parameters(parsed);
  const Token& token = name("the name of a function");
  parsed.name = token.text;
  if (is("(")) parameters(parsed);
  parsed.directives = function_directives();

  // Known before its body, which may call it.
  Scope own = std::move(scopes_.back());
  scopes_.pop_back();
  if (!module_.functions.contains(parsed.name)) declare(token, parsed.name, {Kind::kFunction, -1});
  if (accept(";")) {
    module_.functions.try_emplace(parsed.name, std::move(parsed));
    return;
  }
  if (is_extern) unexpected(";");
  expect("{");
  if (!defined_.insert(parsed.name).second) fail(token.line, parsed.name + " is defined twice");
  function_ = &(module_.functions[parsed.name] = std::move(parsed));
  scopes_.push_back(std::move(own));
  body();
  function_ = nullptr;
}

void Parser::parameters(Function& function) {
  expect("(");
  if (accept(")")) return;
  do {
    expect(".param");
    uint64_t width = 1;
    Variable variable = attributes(Space::kParam, false, width);
    const Token& token = declarator(variable, width);
    declare(token, variable.name, {Kind::kVariable, static_cast<int>(function.parameters.size())});
    function.parameters.push_back(std::move(variable));
  } while (accept(","));
  expect(")");
}

void Parser::declare(const Token& token, const std::string& name, Symbol symbol) {
  if (name == "_") return;  // a parameter without a name
  const bool fresh = scopes_.back().symbols.try_emplace(name, symbol).second;
  if (!fresh) fail(token.line, name + " is declared twice");
}

void Parser::registers() {
  const std::string_view type = peek().text.substr(is(Token::Kind::kWord) ? 1 : 0);
  if (type != "pred" && type_bytes(type) == 0) fail("unknown type of a register " + std::string(peek().text));
  take(Token::Kind::kWord, "a type");
  const auto add = [&](const Token& token, const std::string& name) {
    declare(token, name, {Kind::kRegister, static_cast<int>(function_->registers.size())});
    function_->registers.push_back({name, std::string(type)});
  };
  do {
    const Token& token = name("a register");
    if (!accept("<")) {
      add(token, std::string(token.text));
      continue;
    }
    const uint64_t count = integer(1 << 20);
    expect(">");
    for (uint64_t i = 0; i < count; ++i) add(token, std::string(token.text) + std::to_string(i));
  } while (accept(","));
  expect(";");
}

void Parser::variables(Space space, bool is_extern) {
  uint64_t width = 1;
  const Variable base = attributes(space, is_extern, width);
  do {
    Variable variable = base;
    const Token& token = declarator(variable, width);
    auto& all = function_ ? function_->variables : module_.variables;
    const int index = static_cast<int>(all.size());
    const int before = function_ ? static_cast<int>(function_->parameters.size()) : 0;
    declare(token, variable.name, {Kind::kVariable, function_ ? before + index : module_index(index)});
    if (function_ && is_extern) dynamic_lines_.try_emplace(function_->name, token.line);
    all.push_back(std::move(variable));
  } while (accept(","));
  expect(";");
}

void Parser::body() {
  while (scopes_.size() > 1) statement();
  const int own = static_cast<int>(function_->parameters.size() + function_->variables.size());
  const auto renumber = [own](const auto& self, std::vector<Operand>& operands) -> void {
    for (Operand& o : operands) {
      if (o.index < -1) o.index = own + module_index(o.index);
      self(self, o.elements);
    }
  };
  for (Instruction& i : function_->instructions) renumber(renumber, i.operands);
}

void Parser::statement() {
  if (inert_statement()) return;
  if (accept("{")) return scopes_.push_back({});
  if (accept("}")) return close_scope();
  if (accept(".reg")) return registers();
  if (accept(".param")) return variables(Space::kParam, false);
  if (accept(".local")) return variables(Space::kLocal, false);
  const bool is_extern = accept(".extern");
  if (accept(".shared")) return variables(Space::kShared, is_extern);
  if (is(Token::Kind::kEnd)) unexpected("}");
  if (is_extern || (!is("@") && (!is(Token::Kind::kWord) || peek().text[0] == '.'))) {
    fail("unknown in a function, " + std::string(peek().text));
  }
  if (peek(1).text == ":") return label();
  instruction();
}

void Parser::label() {
  const Token& token = name("a label");
  const std::string label(token.text);
  expect(":");
  Scope& scope = scopes_.back();
  bool fresh = true;
  if (accept(".branchtargets") || accept(".calltargets")) {
    std::vector<std::string> targets;
    do targets.emplace_back(name("a target").text);
    while (accept(","));
    expect(";");
    fresh = scope.lists.try_emplace(label, std::move(targets)).second;
  } else if (accept(".callprototype")) {
    while (!is(";") && !is(Token::Kind::kEnd)) take(peek().kind, "a prototype");
    expect(";");
    fresh = scope.lists.try_emplace(label).second;
  } else {
    fresh = scope.labels.try_emplace(label, static_cast<int>(function_->instructions.size())).second;
  }
  if (!fresh) fail(token.line, "label " + label + " is declared twice");
}

void Parser::close_scope() {
  const Scope scope = std::move(scopes_.back());
  scopes_.pop_back();
  for (const LabelUse& use : scope.uses) {
    Instruction& user = function_->instructions[use.instruction];
    const auto found = scope.labels.find(use.name);
    if (found != scope.labels.end()) {
      Operand& operand = user.operands[use.operand];
      (use.element < 0 ? operand : operand.elements[static_cast<size_t>(use.element)]).index = found->second;
    } else if (scopes_.size() > 1) {
      scopes_.back().uses.push_back(use);
    } else {
      fail(user.line, "undeclared label " + use.name);
    }
  }
}

void Parser::instruction() {
  const Token& first = peek();
  Instruction result{};
  result.line = first.line;
  result.guard = -1;
  if (accept("@")) {
    result.guard_negated = accept("!");
    const Operand guard = reference(take(Token::Kind::kWord, "a predicate"));
    if (guard.kind != Kind::kRegister || function_->registers[static_cast<size_t>(guard.index)].type != "pred") {
      fail(first.line, "a guard must be a predicate");
    }
    result.guard = guard.index;
  }
  std::string_view rest = take(Token::Kind::kWord, "an opcode").text;
  if (rest[0] < 'a' || rest[0] > 'z') fail(first.line, "expected an opcode, not " + std::string(rest));
  result.opcode = rest.substr(0, rest.find('.'));
  while (rest.find('.') != rest.npos) {
    rest.remove_prefix(rest.find('.') + 1);
    result.modifiers.emplace_back(rest.substr(0, rest.find('.')));
  }
  if (result.opcode == "call") {
    call_operands(result);
  } else if (!is(";")) {
    do {
      const size_t index = result.operands.size();
      const bool is_target = (result.opcode == "bra" && index == 0) || (result.opcode == "brx" && index == 1);
      result.operands.push_back(is_target ? target(result) : operand());
    } while (accept(","));
  }
  const size_t wanted = result.opcode == "bra" ? 1 : result.opcode == "brx" ? 2 : result.operands.size();
  if (result.operands.size() != wanted) fail(first.line, "a branch has one label or list of labels");
  expect(";");
  result.text = since(first);
  function_->instructions.push_back(std::move(result));
}

// A branch gets a kLabel, brx.idx the kVector of its list.
Operand Parser::target(const Instruction& branch) {
  const Token& token = name("a label");
  const std::string label(token.text);
  const size_t instruction = function_->instructions.size();
  const size_t operand = branch.operands.size();
  if (branch.opcode == "bra") {
    scopes_.back().uses.push_back({label, instruction, operand, -1});
    return make(Kind::kLabel);
  }
  for (size_t depth = scopes_.size(); depth-- > 0;) {
    Scope& scope = scopes_[depth];
    const auto found = scope.lists.find(label);
    if (found == scope.lists.end()) continue;
    Operand result = make(Kind::kVector);
    for (const std::string& name : found->second) {
      scope.uses.push_back({name, instruction, operand, static_cast<int>(result.elements.size())});
      result.elements.push_back(make(Kind::kLabel));
    }
    return result;
  }
  fail(token.line, "undeclared list of labels " + label);
}

// Always three operands: the kVector of results, the function, the kVector of arguments.
void Parser::call_operands(Instruction& call) {
  call.operands.assign(3, make(Kind::kVector));
  if (is("(")) {
    call.operands[0] = list("(", ")");
    expect(",");
  }
  const Token& callee = name("a function");
  call.operands[1] = reference(callee);
  const Kind kind = call.operands[1].kind;
  if (kind != Kind::kFunction && kind != Kind::kRegister)
    fail(callee.line, std::string(callee.text) + " is no function");
  if (!accept(",")) return;
  if (is("(")) {
    call.operands[2] = list("(", ")");
    if (!accept(",")) return;
  }
  const Token& prototype = name("a prototype");
  const auto declares = [&](const Scope& scope) { return scope.lists.contains(prototype.text); };
  if (std::none_of(scopes_.begin(), scopes_.end(), declares)) {
    fail(prototype.line, "undeclared prototype " + std::string(prototype.text));
  }
}

Operand Parser::list(const char* open, const char* close) {
  Operand result = make(Kind::kVector);
  expect(open);
  if (is(")") && accept(close)) return result;
  do {
    if (is("{") || is("[")) unexpected("a register, a symbol or a number");
    result.elements.push_back(single_operand());
  } while (accept(","));
  expect(close);
  return result;
}

Operand Parser::operand() {
  Operand first = single_operand();
  if (!accept("|")) return first;
  Operand pair = make(Kind::kPair);
  pair.elements = {std::move(first), single_operand()};
  for (const Operand& o : pair.elements) {
    if (o.kind != Kind::kRegister && o.kind != Kind::kSink) fail("a pair must be of registers");
  }
  return pair;
}

Operand Parser::single_operand() {
  if (is("{")) return list("{", "}");
  if (is("[")) return memory_operand();
  if (is("-") || is(Token::Kind::kNumber) || is("WARP_SZ")) return literal();
  if (accept("_")) return make(Kind::kSink);
  const bool negated = accept("!");
  const Token& token = take(Token::Kind::kWord, "an operand");
  Operand result = reference(token);
  result.negated = negated;
  if (negated && result.kind != Kind::kRegister) fail(token.line, "only a predicate can be negated");
  if (result.kind == Kind::kVariable) result.integer = displacement();
  return result;
}

Operand Parser::memory_operand() {
  Operand result = make(Kind::kMemory);
  expect("[");
  const Token& token = peek();
  result.elements.push_back(is(Token::Kind::kWord) ? reference(take(Token::Kind::kWord, "a base")) : literal());
  const Kind kind = result.elements[0].kind;
  if (kind != Kind::kRegister && kind != Kind::kVariable && kind != Kind::kInteger) {
    fail(token.line, "no base of an address, " + std::string(token.text));
  }
  result.integer = displacement();
  while (accept(",")) {
    for (Operand& o : list("{", "}").elements) result.elements.push_back(std::move(o));
  }
  expect("]");
  return result;
}

// "+16", "-16" and "+-16", which is what nvcc writes.
int64_t Parser::displacement() {
  uint64_t sum = 0;
  while (is("+") || is("-")) {
    accept("+");
    const int line = peek().line;
    const Operand value = literal();
    if (value.kind != Kind::kInteger) fail(line, "an offset must be an integer");
    sum += static_cast<uint64_t>(value.integer);
  }
  return static_cast<int64_t>(sum);
}

Operand Parser::reference(const Token& token) {
  const std::string name(token.text);
  for (size_t depth = scopes_.size(); depth-- > 0;) {
    const auto found = scopes_[depth].symbols.find(name);
    if (found == scopes_[depth].symbols.end()) continue;
    Symbol symbol = found->second;
    if (symbol.kind == Kind::kVariable && symbol.index < -1) {
      const Variable& variable = module_.variables[static_cast<size_t>(module_index(symbol.index))];
      if (variable.space == Space::kShared && variable.is_extern) symbol = dynamic_array(name, variable, token.line);
    }
    Operand result = make(symbol.kind, symbol.index);
    if (symbol.kind == Kind::kFunction) result.name = name;
    return result;
  }
  const bool is_register = name[0] == '%';
  if (!is_register || !is_special_register(name)) {
    fail(token.line, std::string("undeclared ") + (is_register ? "register " : "symbol ") + name);
  }
  Operand result = make(Kind::kSpecial);
  result.name = name;
  return result;
}

// Where a module's extern shared array begins depends on the function, which therefore gets a variable of its own.
Symbol Parser::dynamic_array(const std::string& name, Variable array, int line) {
  const auto index = static_cast<int>(function_->parameters.size() + function_->variables.size());
  function_->variables.push_back(std::move(array));
  dynamic_lines_.try_emplace(function_->name, line);
  return scopes_[1].symbols[name] = {Kind::kVariable, index};
}

void Parser::layout() {
  std::map<Space, uint64_t> ends;
  for (Space space : {Space::kShared, Space::kGlobal, Space::kConst}) place_all(module_.variables, space, ends[space]);
  // A device function's shared variables must not overlap those of any entry that may call it.
  uint64_t common = ends[Space::kShared];
  for (auto& [name, f] : module_.functions) {
    if (!f.is_entry) place_all(f.variables, Space::kShared, common);
  }
  place_dynamic(module_.variables, common);
  std::set<uint64_t> entry_ends;
  for (auto& [name, f] : module_.functions) {
    uint64_t parameters = 0, local = 0;
    place_all(f.parameters, Space::kParam, parameters);
    place_all(f.variables, Space::kParam, parameters);
    place_all(f.variables, Space::kLocal, local);
    f.shared_bytes = common;
    if (!f.is_entry) continue;
    place_all(f.variables, Space::kShared, f.shared_bytes);
    place_dynamic(f.variables, f.shared_bytes);
    entry_ends.insert(f.shared_bytes);
  }
  for (const auto& [name, line] : dynamic_lines_) {
    Function& f = module_.functions.at(name);
    if (f.is_entry) continue;
    // A variable has one offset, whoever calls.
    if (entry_ends.size() > 1) fail(line, "entries differ in where this function's extern shared array begins");
    place_dynamic(f.variables, entry_ends.empty() ? common : *entry_ends.begin());
  }
}

}  // namespace

Module parse(const std::string& text) { return Parser(text).run(); }

}  // namespace emulator
