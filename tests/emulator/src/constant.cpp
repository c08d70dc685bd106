// Constant expressions, by the rules of the PTX ISA: 64-bit integers, signed or unsigned, and doubles.
#include <bit>
#include <charconv>
#include <span>

#include "lexer.h"

namespace emulator {
namespace {

constexpr int kDeepest = 64;

// Binary operators, the loosest first.
constexpr std::string_view kOr[] = {"||"}, kAnd[] = {"&&"}, kBitOr[] = {"|"}, kBitXor[] = {"^"}, kBitAnd[] = {"&"},
                           kEqual[] = {"==", "!="}, kOrder[] = {"<=", ">=", "<", ">"}, kShift[] = {"<<", ">>"},
                           kSum[] = {"+", "-"}, kProduct[] = {"*", "/", "%"};
constexpr std::span<const std::string_view> kLevels[] = {kOr,    kAnd,   kBitOr, kBitXor, kBitAnd,
                                                         kEqual, kOrder, kShift, kSum,    kProduct};

template <typename T, typename... Base>
bool whole(std::string_view text, T& value, Base... base) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base...);
  return error == std::errc() && end == text.data() + text.size();
}

Constant integer_of(uint64_t bits, bool is_unsigned) { return {Constant::Kind::kInteger, is_unsigned, false, bits}; }

Constant double_of(double value) { return {Constant::Kind::kDouble, false, true, std::bit_cast<uint64_t>(value)}; }

// Of what compares: integers of either sign, or doubles.
template <typename T>
bool compare(std::string_view op, T a, T b) {
  if (op == "==") return a == b;
  if (op == "!=") return a != b;
  if (op == "<") return a < b;
  if (op == "<=") return a <= b;
  return op == ">" ? a > b : a >= b;
}

bool is_comparison(std::string_view op) {
  return op == "==" || op == "!=" || op == "<" || op == "<=" || op == ">" || op == ">=";
}

// Division truncates; the one quotient that does not fit wraps.
uint64_t quotient(uint64_t a, uint64_t b, bool is_unsigned) {
  if (is_unsigned) return a / b;
  const auto x = static_cast<int64_t>(a), y = static_cast<int64_t>(b);
  return y == -1 ? 0 - a : static_cast<uint64_t>(x / y);
}

}  // namespace

uint64_t Lexer::integer(uint64_t limit) {
  const Token& token = peek();
  const Constant value = is(Token::Kind::kNumber) ? literal() : Constant{Constant::Kind::kDouble};
  if (value.kind != Constant::Kind::kInteger || value.bits > limit) {
    fail(token.line, "bad number " + std::string(token.text));
  }
  return value.bits;
}

int64_t Lexer::integer_constant(const char* what) {
  const int line = peek().line;
  const Constant value = constant();
  if (value.kind != Constant::Kind::kInteger) fail(line, std::string(what) + " must be an integer");
  return static_cast<int64_t>(value.bits);
}

bool Lexer::at_constant() const {
  const auto begins = [](const Token& token) {
    return token.kind == Token::Kind::kNumber || token.text == "(" || token.text == "-" || token.text == "+" ||
           token.text == "~" || token.text == "WARP_SZ";
  };
  return begins(peek()) || (is("!") && (begins(peek(1)) || peek(1).text == "!"));
}

Constant Lexer::conditional(int depth) {
  const int line = peek().line;
  if (depth > kDeepest) fail(line, "constant expression too deep");
  const Constant condition = binary(0, depth);
  if (!accept("?")) return condition;
  if (condition.kind != Constant::Kind::kInteger) fail(line, "the condition before ? must be an integer");
  const Constant yes = conditional(depth + 1);
  expect(":");
  const Constant no = conditional(depth + 1);
  return condition.bits != 0 ? yes : no;
}

Constant Lexer::binary(int level, int depth) {
  if (level == static_cast<int>(std::size(kLevels))) return unary(depth);
  Constant value = binary(level + 1, depth);
  while (true) {
    const int line = peek().line;
    std::string_view op;
    for (const std::string_view candidate : kLevels[level]) {
      if (op.empty() && accept(candidate)) op = candidate;
    }
    if (op.empty()) return value;
    value = apply(op, value, binary(level + 1, depth), line);
  }
}

Constant Lexer::unary(int depth) {
  const Token& token = peek();
  if (depth > kDeepest) fail(token.line, "constant expression too deep");
  const bool is_cast = is("(") && (peek(1).text == ".s64" || peek(1).text == ".u64") && peek(2).text == ")";
  if (is_cast) {
    const bool is_unsigned = peek(1).text == ".u64";
    position_ += 3;
    const Constant value = unary(depth + 1);
    if (value.kind != Constant::Kind::kInteger) fail(token.line, "only an integer can be cast");
    return integer_of(value.bits, is_unsigned);
  }
  if (accept("(")) {
    const Constant value = conditional(depth + 1);
    expect(")");
    return value;
  }
  const char op = token.text.empty() ? '\0' : token.text[0];
  if (token.kind != Token::Kind::kPunctuation || token.text.size() != 1 ||
      std::string_view("-+~!").find(op) == std::string_view::npos) {
    return literal();
  }
  accept(token.text);
  const Constant value = unary(depth + 1);
  if (value.kind == Constant::Kind::kInteger) {
    if (op == '-') return integer_of(0 - value.bits, value.is_unsigned);
    if (op == '~') return integer_of(~value.bits, true);
    return op == '!' ? integer_of(value.bits == 0, false) : value;
  }
  if (value.kind == Constant::Kind::kSingle || op == '~' || op == '!') {
    fail(token.line, std::string("no operand for ") + op);
  }
  return op == '-' ? double_of(-std::bit_cast<double>(value.bits)) : value;
}

Constant Lexer::apply(std::string_view op, const Constant& a, const Constant& b, int line) const {
  if (a.kind != b.kind || a.kind == Constant::Kind::kSingle) fail(line, "no operands for " + std::string(op));
  if (a.kind == Constant::Kind::kDouble) {
    const auto x = std::bit_cast<double>(a.bits), y = std::bit_cast<double>(b.bits);
    if (op == "+") return double_of(x + y);
    if (op == "-") return double_of(x - y);
    if (op == "*") return double_of(x * y);
    if (op == "/") return double_of(x / y);
    if (is_comparison(op)) return integer_of(compare(op, x, y), false);
    fail(line, "no floating-point operands for " + std::string(op));
  }
  const bool is_unsigned = a.is_unsigned || b.is_unsigned;
  if (op == "<<" || op == ">>") {
    if (b.bits >= 64) fail(line, "shift by 64 bits or more");
    if (op == "<<") return integer_of(a.bits << b.bits, a.is_unsigned);
    return integer_of(a.is_unsigned ? a.bits >> b.bits : static_cast<uint64_t>(static_cast<int64_t>(a.bits) >> b.bits),
                      a.is_unsigned);
  }
  if (op == "||") return integer_of(a.bits != 0 || b.bits != 0, false);
  if (op == "&&") return integer_of(a.bits != 0 && b.bits != 0, false);
  if (is_comparison(op)) {
    return integer_of(is_unsigned ? compare(op, a.bits, b.bits)
                                  : compare(op, static_cast<int64_t>(a.bits), static_cast<int64_t>(b.bits)),
                      false);
  }
  if ((op == "/" || op == "%") && b.bits == 0) fail(line, "division by zero");
  switch (op[0]) {
    case '+':
      return integer_of(a.bits + b.bits, is_unsigned);
    case '-':
      return integer_of(a.bits - b.bits, is_unsigned);
    case '*':
      return integer_of(a.bits * b.bits, is_unsigned);
    case '/':
      return integer_of(quotient(a.bits, b.bits, is_unsigned), is_unsigned);
    case '%':  // of unsigned numbers, whatever the operands are
      return integer_of(a.bits % b.bits, true);
    case '&':
      return integer_of(a.bits & b.bits, is_unsigned);
    case '|':
      return integer_of(a.bits | b.bits, is_unsigned);
    default:
      return integer_of(a.bits ^ b.bits, is_unsigned);
  }
}

Constant Lexer::literal() {
  if (accept("WARP_SZ")) return integer_of(32, false);
  const Token& token = take(Token::Kind::kNumber, "a number");
  std::string_view digits = token.text;
  const char letter = digits.size() > 2 && digits[0] == '0' ? static_cast<char>(digits[1] | 0x20) : '\0';
  Constant result;
  bool good = false;
  if (letter == 'f' || letter == 'd') {
    const size_t length = letter == 'f' ? 8 : 16;
    result.kind = letter == 'f' ? Constant::Kind::kSingle : Constant::Kind::kDouble;
    good = digits.size() == 2 + length && whole(digits.substr(2), result.bits, 16);
  } else if (letter != 'x' && digits.find_first_of(".eE") != digits.npos) {
    double value = 0;
    good = whole(digits, value);
    result = double_of(value);
  } else {
    const bool suffix = digits.back() == 'U';
    if (suffix) digits.remove_suffix(1);
    if (letter == 'x' || letter == 'b') {
      good = whole(digits.substr(2), result.bits, letter == 'x' ? 16 : 2);
    } else {
      good = whole(digits, result.bits, digits.size() > 1 && digits[0] == '0' ? 8 : 10);
    }
    result.is_unsigned = suffix || result.bits > INT64_MAX;
  }
  if (!good) fail(token.line, "bad number " + std::string(token.text));
  return result;
}

}  // namespace emulator
