// Initial values of .global and .const variables.
#include <bit>
#include <cstring>

#include "parser.h"

namespace emulator {
namespace {

using Kind = Operand::Kind;

constexpr uint64_t kMostInitialBytes = 64 << 20;  // of a module

}  // namespace

// After the '='.
void Parser::initializer(Variable& variable, std::vector<uint64_t> extents, uint64_t width) {
  if (variable.type == "f16" || variable.type == "f16x2" || variable.type == "b128") {
    fail("a variable of type ." + variable.type + " takes no initial value");
  }
  const bool open = !extents.empty() && extents[0] == 0;
  if (open) extents[0] = UINT32_MAX;
  if (width > 1) extents.push_back(width);
  uint64_t row = type_bytes(variable.type);
  for (size_t i = 1; i < extents.size(); ++i) row *= extents[i];
  initial_values(variable, extents, 0);
  if (open) variable.bytes = (variable.initial.size() + row - 1) / row * row;
  initial_bytes_ += variable.initial.size();
}

void Parser::initial_values(Variable& variable, std::span<const uint64_t> extents, uint64_t at) {
  if (extents.empty()) {
    const bool by_name = is(Token::Kind::kWord) && !is("WARP_SZ");
    const bool by_mask = is(Token::Kind::kNumber) && peek(1).text == "(";
    return by_name || by_mask ? initial_address(variable, at) : initial_number(variable, at);
  }
  uint64_t stride = type_bytes(variable.type);
  for (uint64_t extent : extents.subspan(1)) stride *= extent;
  if (is(Token::Kind::kString)) fail("a string is no initial value: its bytes are");
  expect("{");
  if (accept("}")) return;
  for (uint64_t i = 0; i == 0 || accept(","); ++i) {
    if (i == extents[0]) fail("too many initial values");
    initial_values(variable, extents.subspan(1), at + i * stride);
  }
  expect("}");
}

void Parser::reserve(Variable& variable, uint64_t end) {
  if (initial_bytes_ + end > kMostInitialBytes) fail("more bytes of initial values than the emulator takes");
  if (variable.initial.size() < end) variable.initial.resize(end);
}

void Parser::initial_number(Variable& variable, uint64_t at) {
  const Token& token = peek();
  Operand number = literal_of(constant());
  const uint64_t size = type_bytes(variable.type);
  if (number.kind == Kind::kFloat) fit(*this, number, variable.type, token.line);
  const int64_t bits = number.integer;
  if (number.kind == Kind::kInteger && variable.type[0] == 'f') fail(token.line, "expected a floating-point number");
  if (number.kind == Kind::kInteger && size < 8 && (bits >> (8 * size) > 0 || bits >> (8 * size - 1) < -1)) {
    fail(token.line, "initial value too large for ." + variable.type);
  }
  reserve(variable, at + size);
  std::memcpy(variable.initial.data() + at, &bits, size);
}

// name {+ addend}, generic(name) {+ addend}, and one byte of such: 0xff00(generic(name) + 4)
void Parser::initial_address(Variable& variable, uint64_t at) {
  const Token& first = peek();
  Relocation address{};
  address.offset = at;
  address.bytes = static_cast<uint32_t>(type_bytes(variable.type));
  const bool is_byte = is(Token::Kind::kNumber);
  if (is_byte) {
    const uint64_t mask = integer();
    address.shift = mask == 0 ? 0 : static_cast<uint32_t>(std::countr_zero(mask));
    if (mask >> address.shift != 0xff || address.shift % 8 != 0)
      fail(first.line, "a mask must be one byte of an address");
    expect("(");
  }
  if (variable.type != (is_byte ? "u8" : "u64")) {
    fail(first.line, std::string("an address needs a variable of type .u64, and .u8 if it is masked"));
  }
  address.is_generic = is("generic") && peek(1).text == "(";
  if (address.is_generic) {
    take(Token::Kind::kWord, "generic");
    expect("(");
  }
  const Token& token = name("the name of a variable or function");
  const Symbol* symbol = find(token.text);
  const bool is_variable = symbol != nullptr && symbol->kind == Kind::kVariable && symbol->index < -1;
  address.variable = is_variable ? module_index(symbol->index) : -1;
  if (is_variable) {
    const Variable& target = module_.variables[static_cast<size_t>(address.variable)];
    if (target.space == Space::kShared)
      fail(token.line, target.name + " is in shared memory, which has no fixed address");
    variable_lines_.try_emplace(address.variable, token.line);
  } else if (symbol != nullptr && symbol->kind == Kind::kFunction && !address.is_generic) {
    address.function = token.text;
    function_lines_.try_emplace(address.function, token.line);
  } else {
    fail(token.line, std::string(token.text) + " has no address that could be an initial value");
  }
  if (address.is_generic) expect(")");
  if (is_variable && accept("+")) address.addend = integer_constant("an offset");
  if (is_byte) expect(")");
  reserve(variable, at + address.bytes);
  variable.relocations.push_back(std::move(address));
}

}  // namespace emulator
