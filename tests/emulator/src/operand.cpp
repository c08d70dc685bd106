// Instructions and their operands.
#include <algorithm>
#include <bit>

#include "parser.h"

namespace emulator {
namespace {

using Kind = Operand::Kind;

int selector_index(char selector) {
  const std::string_view position = "xyzw", colour = "rgba";
  const size_t index = std::min(position.find(selector), colour.find(selector));
  return index == position.npos ? -1 : static_cast<int>(index);
}

}  // namespace

Operand literal_of(const Constant& value) {
  const bool is_integer = value.kind == Constant::Kind::kInteger;
  Operand result = make(is_integer ? Kind::kInteger : Kind::kFloat);
  result.integer = static_cast<int64_t>(value.bits);
  result.bytes = is_integer || value.is_decimal ? 0 : value.kind == Constant::Kind::kSingle ? 4 : 8;
  return result;
}

void fit(const Lexer& lexer, Operand& literal, std::string_view type, int line) {
  const int bytes = static_cast<int>(type_bytes(type));
  const bool is_number = type == "f32" || type == "f64";
  if (!is_number && (literal.bytes != bytes || !type.starts_with('b'))) {
    lexer.fail(line, "a floating-point literal has no place in type ." + std::string(type));
  }
  if (literal.bytes != bytes) {
    const auto bits = static_cast<uint64_t>(literal.integer);
    const double value =
        literal.bytes == 4 ? std::bit_cast<float>(static_cast<uint32_t>(bits)) : std::bit_cast<double>(bits);
    literal.integer = bytes == 8 ? std::bit_cast<int64_t>(value) : std::bit_cast<uint32_t>(static_cast<float>(value));
    literal.bytes = bytes;
  }
}

void Parser::instruction() {
  const Token& first = peek();
  Instruction result{};
  result.line = first.line;
  result.source_file = file_;
  result.source_line = source_line_;
  if (accept("@")) guard(result);
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
  if (result.opcode != "call") fit_literals(result);
  result.text = since(first);
  function_->instructions.push_back(std::move(result));
}

void Parser::guard(Instruction& instruction) {
  instruction.guard_negated = accept("!");
  const Token& token = take(Token::Kind::kWord, "a predicate");
  const Operand guard = reference(token);
  if (guard.kind != Kind::kRegister || function_->registers[static_cast<size_t>(guard.index)].type != "pred") {
    fail(token.line, "a guard must be a predicate");
  }
  instruction.guard = guard.index;
}

// Floating-point literals are of the type that the instruction names last: of its sources.
void Parser::fit_literals(Instruction& instruction) {
  std::string type = instruction.modifiers.empty() ? "" : instruction.modifiers.back();
  if (instruction.opcode == "createpolicy") type = "f32";  // of the fraction; the type named is the policy's
  for (Operand& operand : instruction.operands) {
    if (operand.kind == Kind::kFloat) fit(*this, operand, type, instruction.line);
    // What mov packs has its share of the size; elsewhere the type is of an element.
    const uint64_t share = type_bytes(type) / std::max<size_t>(operand.elements.size(), 1);
    const std::string packed = "b" + std::to_string(8 * share);
    for (Operand& element : operand.elements) {
      if (element.kind == Kind::kFloat) {
        fit(*this, element, instruction.opcode == "mov" ? packed : type, instruction.line);
      }
    }
  }
}

// A branch gets a kLabel, brx.idx the kVector of its list.
Operand Parser::target(const Instruction& branch) {
  const Token& token = name("a label");
  const std::string label(token.text);
  const size_t instruction = function_->instructions.size();
  const size_t operand = branch.operands.size();
  if (branch.opcode == "bra") {
    use_label(scope(), {label, instruction, operand, -1});
    return make(Kind::kLabel);
  }
  for (size_t depth = scopes_.size(); depth-- > 0;) {
    Scope& declaring = scopes_[depth];
    const auto found = declaring.targets.find(label);
    if (found == declaring.targets.end()) continue;
    Operand result = make(Kind::kVector);
    for (const std::string& name : found->second) {
      use_label(declaring, {name, instruction, operand, static_cast<int>(result.elements.size())});
      result.elements.push_back(make(Kind::kLabel));
    }
    return result;
  }
  fail(token.line, "undeclared list of labels " + label);
}

Operand Parser::list(const char* open, const char* close) {
  Operand result = make(Kind::kVector);
  expect(open);
  if (is(")") && accept(close)) return result;
  do {
    const int line = peek().line;
    result.elements.push_back(single_operand());
    const Kind kind = result.elements.back().kind;
    if (kind == Kind::kVector || kind == Kind::kMemory) fail(line, "expected a register, a symbol or a number");
  } while (accept(","));
  expect(close);
  return result;
}

Operand Parser::operand() {
  const int line = peek().line;
  Operand first = single_operand();
  if (!accept("|")) return first;
  Operand pair = make(Kind::kPair);
  pair.elements = {std::move(first), single_operand()};
  for (const Operand& o : pair.elements) {
    if (o.kind != Kind::kRegister && o.kind != Kind::kSink) fail(line, "a pair must be of registers");
  }
  return pair;
}

Operand Parser::single_operand() {
  if (is("{")) return list("{", "}");
  if (is("[")) return memory_operand();
  if (at_constant()) return literal_of(constant());
  if (accept("_")) return make(Kind::kSink);
  const bool negated = accept("!");
  const Token& token = take(Token::Kind::kWord, "an operand");
  Operand result = reference(token);
  result.negated = negated;
  if (negated && result.kind != Kind::kRegister) fail(token.line, "only a predicate can be negated");
  if (result.kind == Kind::kVariable) {
    if (is("[")) fail(token.line, "an array is indexed by its address in bytes: [name+4]");
    result.integer = displacement();
  }
  return result;
}

Operand Parser::memory_operand() {
  Operand result = make(Kind::kMemory);
  expect("[");
  const Token& token = peek();
  result.elements.push_back(at_constant() ? literal_of(constant()) : reference(take(Token::Kind::kWord, "a base")));
  const Kind kind = result.elements[0].kind;
  if (kind != Kind::kRegister && kind != Kind::kVariable && kind != Kind::kInteger) {
    fail(token.line, "no base of an address, " + std::string(token.text));
  }
  result.integer = displacement();
  for (int lists = 0; accept(","); ++lists) {
    Operand coordinates = list("{", "}");
    if (lists > 0) {
      result.elements.push_back(std::move(coordinates));
    } else {
      std::ranges::move(coordinates.elements, std::back_inserter(result.elements));
    }
  }
  expect("]");
  return result;
}

// "+16", "+-16", which is what nvcc writes, and "-16".
int64_t Parser::displacement() { return accept("+") || is("-") ? integer_constant("an offset") : 0; }

Operand Parser::reference(const Token& token) {
  const std::string name(token.text);
  const Symbol* found = find(name);
  if (found == nullptr) return selected(token);
  Symbol symbol = *found;
  if (symbol.kind == Kind::kRegister) return register_operand(symbol);
  if (symbol.kind == Kind::kFunction) function_lines_.try_emplace(name, token.line);
  if (symbol.kind == Kind::kVariable && symbol.index < -1) {
    const Variable& variable = module_.variables[static_cast<size_t>(module_index(symbol.index))];
    if (variable.space == Space::kShared && variable.is_extern) {
      symbol = dynamic_array(name, variable);
    } else {
      variable_lines_.try_emplace(module_index(symbol.index), token.line);
    }
  }
  Operand result = make(symbol.kind, symbol.index);
  if (symbol.kind == Kind::kFunction) result.name = name;
  return result;
}

// A vector register is the vector of its elements.
Operand Parser::register_operand(const Symbol& symbol) const {
  if (symbol.width == 1) return make(Kind::kRegister, symbol.index);
  Operand result = make(Kind::kVector);
  for (int i = 0; i < symbol.width; ++i) result.elements.push_back(make(Kind::kRegister, symbol.index + i));
  return result;
}

// An element of a vector register, as in %v.x, or a special register.
Operand Parser::selected(const Token& token) const {
  const size_t dot = token.text.rfind('.');
  const Symbol* vector = dot == token.text.npos ? nullptr : find(token.text.substr(0, dot));
  if (vector != nullptr && vector->kind == Kind::kRegister && token.text.size() == dot + 2) {
    const int element = selector_index(token.text.back());
    if (vector->width > 1 && element >= 0 && element < vector->width) {
      return make(Kind::kRegister, vector->index + element);
    }
  }
  const bool is_register = token.text[0] == '%';
  if (!is_register || !is_special_register(token.text)) {
    fail(token.line, std::string("undeclared ") + (is_register ? "register " : "symbol ") + std::string(token.text));
  }
  Operand result = make(Kind::kSpecial);
  result.name = token.text;
  return result;
}

// Where an extern shared array begins depends on the kernel: each function that names it has a variable of its own.
Symbol Parser::dynamic_array(const std::string& name, const Variable& array) {
  const auto index = static_cast<int>(function_->parameters.size() + function_->variables.size());
  function_->variables.push_back(array);
  return scopes_[1].symbols[name] = {Kind::kVariable, index};
}

}  // namespace emulator
