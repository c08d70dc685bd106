// Modules, functions, scopes and labels.
#include "parser.h"

#include <algorithm>

namespace emulator {
namespace {

using Kind = Operand::Kind;

constexpr size_t kMostScopes = 200, kMostFunctions = 1 << 13, kMostLabelUses = 1 << 20;

// What the machine has built in; all other functions must have a body if anything refers to them.
constexpr std::string_view kBuiltin[] = {"vprintf", "__assertfail", "malloc", "free"};

bool same_signature(const Function& a, const Function& b) {
  const auto same = [](const Variable& x, const Variable& y) {
    return x.bytes == y.bytes && type_bytes(x.type) == type_bytes(y.type) && x.alignment == y.alignment;
  };
  return a.is_entry == b.is_entry && a.results == b.results && std::ranges::equal(a.parameters, b.parameters, same);
}

}  // namespace

Operand make(Operand::Kind kind, int index) {
  Operand result{};
  result.kind = kind;
  result.index = index;
  return result;
}

Module Parser::run() {
  expect(".version");
  module_.version = take(Token::Kind::kNumber, "a version").text;
  expect(".target");
  module_.target = name("a target").text;
  while (accept(",")) name("a target option");
  if (accept(".address_size") && integer() != 64) fail("only addresses of 64 bits are known");
  while (!is(Token::Kind::kEnd)) module_statement();
  finish();
  return std::move(module_);
}

void Parser::module_statement() {
  if (inert_statement()) return;
  if (accept(".alias")) return alias();
  const bool is_extern = accept(".extern");
  if (!is_extern && !accept(".visible") && !accept(".weak")) accept(".common");
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
  parsed.line = peek().line;
  scopes_.emplace_back();
  Prototype prototype;
  if (accept(".attribute")) skip_group("(", ")");
  if (!is_entry && is("(")) parameters(prototype, &parsed);
  prototype.results = static_cast<int>(prototype.parameters.size());
  const Token& token = name("the name of a function");
  parsed.name = token.text;
  if (is("(")) parameters(prototype, &parsed);
  parsed.parameters = std::move(prototype.parameters);
  parsed.results = prototype.results;
  directives(parsed);

  // Known before its body, which may call it.
  Scope own = std::move(scopes_.back());
  scopes_.pop_back();
  const auto known = module_.functions.find(parsed.name);
  if (known == module_.functions.end()) {
    declare(token, parsed.name, {Kind::kFunction, -1});
    if (module_.functions.size() == kMostFunctions) fail(token.line, "more functions than the emulator takes");
  } else if (!same_signature(known->second, parsed)) {
    fail(token.line, parsed.name + " was declared with other parameters");
  }
  if (accept(";")) {
    module_.functions.try_emplace(parsed.name, std::move(parsed));
    return;
  }
  if (is_extern) unexpected(";");
  expect("{");
  if (known != module_.functions.end() && known->second.is_defined) {
    fail(token.line, parsed.name + " is defined twice");
  }
  parsed.is_defined = true;
  function_ = &(module_.functions[parsed.name] = std::move(parsed));
  scopes_.push_back(std::move(own));
  file_ = -1, source_line_ = 0;
  body();
  function_ = nullptr;
}

// .alias name, function;
void Parser::alias() {
  const std::string alias(name("a function").text);
  expect(",");
  const Token& function = name("a function");
  const auto alias_of = module_.functions.find(alias), aliasee = module_.functions.find(std::string(function.text));
  if (alias_of == module_.functions.end() || aliasee == module_.functions.end()) {
    fail(function.line, "an alias of a function that is not declared");
  }
  if (alias_of->second.is_defined || !aliasee->second.is_defined ||
      !same_signature(alias_of->second, aliasee->second)) {
    fail(function.line, "an alias needs a declared function and a defined one with the same parameters");
  }
  expect(";");
  alias_of->second.is_defined = true;
  aliases_.try_emplace(alias, function.text);
}

void Parser::declare(const Token& token, const std::string& name, Symbol symbol) {
  if (name == "_") return;  // a parameter without a name
  const bool fresh = scope().symbols.try_emplace(name, symbol).second;
  if (!fresh) fail(token.line, name + " is declared twice");
}

const Symbol* Parser::find(std::string_view name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->symbols.find(name);
    if (found != scope->symbols.end()) return &found->second;
  }
  return nullptr;
}

void Parser::body() {
  int last_line = 0;
  while (scopes_.size() > 1) {
    last_line = peek().line;
    statement();
  }
  // A body may end without one, and labels may stand behind the last instruction.
  Instruction leave{};
  leave.line = last_line;
  leave.text = "ret;";
  leave.opcode = "ret";
  function_->instructions.push_back(std::move(leave));
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
  if (accept("{")) {
    if (scopes_.size() == kMostScopes) fail("scopes nested too deep");
    return scopes_.push_back({});
  }
  if (accept("}")) return close_scope();
  if (accept(".reg")) return registers();
  if (accept(".param")) return variables(Space::kParam, false);
  if (accept(".local")) return variables(Space::kLocal, false);
  if (accept(".global")) return variables(Space::kGlobal, false);
  if (accept(".const")) return variables(Space::kConst, false);
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
  Scope& own = scope();
  if (own.labels.contains(label) || own.targets.contains(label) || own.prototypes.contains(label)) {
    fail(token.line, "label " + label + " is declared twice");
  }
  if (is(".callprototype") || is(".calltargets")) {
    prototype(label);
  } else if (accept(".branchtargets")) {
    std::vector<std::string>& targets = own.targets[label];
    do targets.emplace_back(name("a target").text);
    while (accept(","));
    expect(";");
  } else {
    own.labels.try_emplace(label, static_cast<int>(function_->instructions.size()));
  }
}

void Parser::use_label(Scope& scope, LabelUse use) {
  if (++label_uses_ > kMostLabelUses) fail("more branches than the emulator takes");
  scope.uses.push_back(std::move(use));
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

void Parser::finish() {
  for (const auto& [index, line] : variable_lines_) {
    const Variable& variable = module_.variables[static_cast<size_t>(index)];
    if (variable.is_extern) fail(line, "extern variable " + variable.name + " is not defined in this module");
  }
  for (const auto& [name, line] : function_lines_) {
    const bool is_builtin = std::ranges::find(kBuiltin, name) != std::end(kBuiltin);
    if (!is_builtin && !module_.functions.at(name).is_defined) fail(line, "function " + name + " has no body");
  }
  resolve();
  for (const auto& [alias, function] : aliases_) module_.functions.erase(alias);
  lay_out(module_);
}

// What may stand behind its uses: .file and .alias.
void Parser::resolve() {
  const auto rename = [this](std::string& function) {
    const auto found = aliases_.find(function);
    if (found != aliases_.end()) function = found->second;
  };
  for (auto& [name, function] : module_.functions) {
    for (Instruction& instruction : function.instructions) {
      const auto file = file_numbers_.find(instruction.source_file);
      instruction.source_file = file == file_numbers_.end() ? -1 : file->second;
      for (Operand& operand : instruction.operands) rename(operand.name);
    }
  }
  for (Variable& variable : module_.variables) {
    for (Relocation& relocation : variable.relocations) rename(relocation.function);
  }
}

Module parse(const std::string& text) { return Parser(text).run(); }

}  // namespace emulator
