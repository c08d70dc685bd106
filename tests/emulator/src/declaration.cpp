// Registers, variables, parameters and the directives of a function.
#include <bit>

#include "parser.h"

namespace emulator {
namespace {

using Kind = Operand::Kind;

constexpr uint64_t kMostBytes = 1ull << 32;  // of a variable
constexpr size_t kMostExtents = 8;
constexpr size_t kMostRegisters = 1 << 17;          // of a function
constexpr uint64_t kMostModuleRegisters = 1 << 20;  // of them all

constexpr char kSelectors[] = "xyzw";

}  // namespace

int Parser::add_register(Function& function, const std::string& name, std::string_view type) {
  if (function.registers.size() == kMostRegisters || ++registers_ > kMostModuleRegisters) {
    fail("more registers than the emulator takes");
  }
  function.registers.push_back({name, std::string(type)});
  return static_cast<int>(function.registers.size() - 1);
}

void Parser::declare_register(const Token& token, const std::string& name, std::string_view type, int width) {
  declare(token, name, {Kind::kRegister, static_cast<int>(function_->registers.size()), width});
  for (int i = 0; i < width; ++i) {
    add_register(*function_, width == 1 ? name : name + "." + kSelectors[i], type);
  }
}

void Parser::registers() {
  if (accept(".align")) alignment();
  const int width = accept(".v2") ? 2 : accept(".v4") ? 4 : 1;
  const std::string_view type = peek().text.substr(is(Token::Kind::kWord) ? 1 : 0);
  if (type != "pred" && type_bytes(type) == 0) fail("unknown type of a register " + std::string(peek().text));
  take(Token::Kind::kWord, "a type");
  do {
    const Token& token = name("a register");
    if (!accept("<")) {
      declare_register(token, std::string(token.text), type, width);
      continue;
    }
    const uint64_t count = integer(kMostRegisters);
    expect(">");
    for (uint64_t i = 0; i < count; ++i) {
      declare_register(token, std::string(token.text) + std::to_string(i), type, width);
    }
  } while (accept(","));
  expect(";");
}

void Parser::variables(Space space, bool is_extern) {
  uint64_t width = 1;
  const Variable base = attributes(space, is_extern, width);
  const bool is_local = function_ && space != Space::kGlobal && space != Space::kConst;
  if (is_extern && is_local) fail("an extern variable is declared at module level");
  do {
    Variable variable = base;
    const Token& token = declarator(variable, width);
    if (!function_ && declared_before(token, variable)) continue;
    if (is_local) {
      const size_t index = function_->parameters.size() + function_->variables.size();
      declare(token, variable.name, {Kind::kVariable, static_cast<int>(index)});
      function_->variables.push_back(std::move(variable));
    } else {
      declare(token, variable.name, {Kind::kVariable, module_index(static_cast<int>(module_.variables.size()))});
      module_.variables.push_back(std::move(variable));
    }
  } while (accept(","));
  expect(";");
}

// An extern variable may be declared again, once with its definition.
bool Parser::declared_before(const Token& token, const Variable& variable) {
  const Symbol* symbol = find(variable.name);
  if (symbol == nullptr || symbol->kind != Kind::kVariable) return false;
  Variable& known = module_.variables[static_cast<size_t>(module_index(symbol->index))];
  if (!known.is_extern && !variable.is_extern) return false;
  const bool same_size = known.bytes == variable.bytes || (known.is_extern ? known : variable).bytes == 0;
  if (known.space != variable.space || known.type != variable.type || !same_size) {
    fail(token.line, variable.name + " was declared otherwise");
  }
  if (!variable.is_extern) known = variable;
  return true;
}

uint32_t Parser::alignment() {
  const int line = peek().line;
  const uint64_t value = integer(1 << 20);
  if (!std::has_single_bit(value)) fail(line, "an alignment must be a power of two");
  return static_cast<uint32_t>(value);
}

Variable Parser::attributes(Space space, bool is_extern, uint64_t& width) {
  Variable v{};
  v.space = space;
  v.is_extern = is_extern;
  while (is(Token::Kind::kWord) && peek().text[0] == '.') {
    if (accept(".align")) {
      v.alignment = alignment();
    } else if (accept(".v2")) {
      width = 2;
    } else if (accept(".v4")) {
      width = 4;
    } else if (accept(".attribute")) {
      skip_group("(", ")");
    } else if (space == Space::kParam && accept(".ptr")) {
      for (const char* target : {".global", ".shared", ".local", ".const"}) accept(target);
      if (accept(".align")) alignment();  // of what it points to
    } else if (v.type.empty() && type_bytes(peek().text.substr(1)) != 0) {
      v.type = take(Token::Kind::kWord, "a type").text.substr(1);
    } else {
      fail("unknown attribute of a variable " + std::string(peek().text));
    }
  }
  if (v.type.empty()) unexpected("a type");
  v.bytes = width * type_bytes(v.type);
  if (v.alignment == 0) v.alignment = static_cast<uint32_t>(v.bytes);
  return v;
}

const Token& Parser::declarator(Variable& variable, uint64_t width) {
  const Token& token = name("the name of a variable");
  variable.name = token.text;
  std::vector<uint64_t> extents;
  uint64_t row = variable.bytes;  // of what the first extent counts
  while (accept("[")) {
    if (extents.size() == kMostExtents) fail("an array of too many dimensions");
    const bool open = extents.empty() && is("]");
    extents.push_back(open ? 0 : integer(UINT32_MAX));
    if (extents.size() > 1) row *= extents.back();
    if (row > kMostBytes) fail("too large an array");
    if (row == 0) fail("an array without a size");
    expect("]");
  }
  if (!extents.empty()) variable.bytes = row * extents[0];
  if (variable.bytes > kMostBytes) fail("too large an array");
  const bool may_start = variable.space == Space::kGlobal || variable.space == Space::kConst;
  if (may_start && !variable.is_extern && accept("=")) initializer(variable, std::move(extents), width);
  if (variable.bytes == 0 && !variable.is_extern) fail(token.line, "an array without a size");
  return token;
}

// With a function its body is to follow, which knows them by name.
void Parser::parameters(Prototype& prototype, Function* function) {
  expect("(");
  if (accept(")")) return;
  do {
    const bool in_register = (function == nullptr || !function->is_entry) && accept(".reg");
    if (!in_register) expect(".param");
    uint64_t width = 1;
    Variable variable = attributes(Space::kParam, false, width);
    const Token& token = declarator(variable, width);
    if (in_register && variable.bytes != type_bytes(variable.type)) {
      fail(token.line, "a parameter in a register must be one number");
    }
    if (function != nullptr && in_register) {
      variable.register_index = add_register(*function, variable.name, variable.type);
      declare(token, variable.name, {Kind::kRegister, variable.register_index});
    } else if (function != nullptr) {
      declare(token, variable.name, {Kind::kVariable, static_cast<int>(prototype.parameters.size())});
    }
    prototype.parameters.push_back(std::move(variable));
  } while (accept(","));
  expect(")");
}

// Between parameters and body.
void Parser::directives(Function& function) {
  static const std::map<std::string_view, size_t> kEntry = {
      {".maxntid", 3},           {".reqntid", 3},        {".minnctapersm", 1},
      {".maxnctapersm", 1},      {".maxnreg", 1},        {".explicitcluster", 0},
      {".reqnctapercluster", 3}, {".maxclusterrank", 1}, {".blocksareclusters", 0}};
  static const std::map<std::string_view, size_t> kDevice = {
      {".noreturn", 0}, {".abi_preserve", 1}, {".abi_preserve_control", 1}};
  const auto& known = function.is_entry ? kEntry : kDevice;
  while (is(Token::Kind::kWord)) {
    if (is(".pragma")) {
      inert_statement();
      continue;
    }
    const auto directive = known.find(peek().text);
    if (directive == known.end()) fail("unknown directive " + std::string(peek().text));
    take(Token::Kind::kWord, "a directive");
    std::vector<uint32_t>& values = function.directives[std::string(directive->first.substr(1))];
    values.clear();
    while (values.size() < directive->second && (values.empty() || accept(","))) {
      const int line = peek().line;
      values.push_back(static_cast<uint32_t>(integer(INT32_MAX)));
      if (values.back() == 0 && function.is_entry) fail(line, "expected a positive number");
    }
  }
}

}  // namespace emulator
