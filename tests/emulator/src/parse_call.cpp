// Calls: what is called, and whether arguments and results are what it takes.
#include <algorithm>

#include "parser.h"

namespace emulator {
namespace {

using Kind = Operand::Kind;

}  // namespace

Prototype Parser::signature(const Token& name) const {
  const auto found = module_.functions.find(std::string(name.text));
  if (found == module_.functions.end() || found->second.is_entry) {
    fail(name.line, std::string(name.text) + " is no function that can be called");
  }
  return {found->second.parameters, found->second.results};
}

// label: .callprototype (results) _ (parameters) directives;   label: .calltargets function, function, ...;
void Parser::prototype(const std::string& label) {
  Prototype result;
  if (accept(".calltargets")) {
    do {
      const Token& token = name("a function");
      result = signature(token);
      function_lines_.try_emplace(std::string(token.text), token.line);
    } while (accept(","));
  } else {
    expect(".callprototype");
    if (is("(")) parameters(result, nullptr);
    result.results = static_cast<int>(result.parameters.size());
    expect("_");
    if (is("(")) parameters(result, nullptr);
    Function directed{};
    directives(directed);
  }
  expect(";");
  scope().prototypes.insert_or_assign(label, std::move(result));
}

// The label of a prototype or of call targets, or the name of an array of functions.
Prototype Parser::declared_prototype() {
  const Token& token = name("a prototype");
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->prototypes.find(token.text);
    if (found != scope->prototypes.end()) return found->second;
  }
  const Symbol* table = find(token.text);
  if (table != nullptr && table->kind == Kind::kVariable && table->index < -1) {
    const Variable& variable = module_.variables[static_cast<size_t>(module_index(table->index))];
    for (const Relocation& relocation : variable.relocations) {
      if (!relocation.function.empty()) return signature({Token::Kind::kWord, relocation.function, token.line});
    }
  }
  fail(token.line, "undeclared prototype " + std::string(token.text));
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
  const bool is_pointer = call.operands[1].kind == Kind::kRegister;
  if (call.operands[1].kind != Kind::kFunction && !is_pointer) {
    fail(callee.line, std::string(callee.text) + " is no function");
  }
  Prototype prototype;
  if (!is_pointer) prototype = signature(callee);
  bool is_declared = !is_pointer;
  if (accept(",")) {
    const bool has_arguments = is("(");
    if (has_arguments) call.operands[2] = list("(", ")");
    if (!has_arguments || accept(",")) {
      prototype = declared_prototype();
      is_declared = true;
    }
  }
  if (!is_declared) fail(callee.line, "a call by address needs a prototype");
  check_call(call, std::string(callee.text), prototype);
}

void Parser::check_call(Instruction& call, const std::string& callee, const Prototype& prototype) {
  std::vector<Operand>&results = call.operands[0].elements, &arguments = call.operands[2].elements;
  const auto wanted = static_cast<size_t>(prototype.results);
  const size_t takes = prototype.parameters.size() - wanted;
  if (results.size() != wanted || arguments.size() != takes) {
    fail(call.line, callee + " has " + std::to_string(wanted) + " results and " + std::to_string(takes) +
                        " arguments, not " + std::to_string(results.size()) + " and " +
                        std::to_string(arguments.size()));
  }
  for (size_t i = 0; i < wanted; ++i) {
    const Kind kind = results[i].kind;
    if (kind == Kind::kSink) continue;
    if (kind == Kind::kInteger || kind == Kind::kFloat)
      fail(call.line, "a result of " + callee + " cannot be a number");
    check_argument(results[i], prototype.parameters[i], callee, call.line);
  }
  for (size_t i = 0; i < takes; ++i) {
    check_argument(arguments[i], prototype.parameters[wanted + i], callee, call.line);
  }
}

void Parser::check_argument(Operand& argument, const Variable& parameter, const std::string& callee, int line) {
  const bool is_number = parameter.bytes == type_bytes(parameter.type);
  const auto index = static_cast<size_t>(argument.index);
  bool good = false;
  if (argument.kind == Kind::kRegister) {
    good = is_number && !argument.negated && type_bytes(function_->registers[index].type) == parameter.bytes;
  } else if (argument.kind == Kind::kInteger) {
    good = is_number;
  } else if (argument.kind == Kind::kFloat) {
    fit(*this, argument, parameter.type, line);
    good = is_number;
  } else if (argument.kind == Kind::kVariable && argument.index >= 0 && argument.integer == 0) {
    const size_t own = function_->parameters.size();
    const Variable& variable = index < own ? function_->parameters[index] : function_->variables[index - own];
    const bool as_aligned = is_number || variable.alignment >= parameter.alignment;
    good = variable.space == Space::kParam && variable.bytes == parameter.bytes && as_aligned &&
           type_bytes(variable.type) == type_bytes(parameter.type);
  }
  if (!good) {
    const std::string name = parameter.name == "_" ? "" : " " + parameter.name;
    fail(line, "no such argument for " + callee + ", whose parameter" + name + " is of type ." + parameter.type +
                   " and " + std::to_string(parameter.bytes) + " bytes");
  }
}

}  // namespace emulator
