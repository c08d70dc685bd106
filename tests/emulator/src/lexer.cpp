#include "lexer.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <set>

namespace emulator {
namespace {

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '$'; }
bool is_name(char c) { return is_letter(c) || is_digit(c); }

std::string on_one_line(std::string_view text) {
  std::string line;
  for (char c : text) {
    if (!is_space(c)) {
      line += c;
    } else if (!line.empty() && line.back() != ' ') {
      line += ' ';
    }
  }
  if (!line.empty() && line.back() == ' ') line.pop_back();
  return line;
}

template <typename T, typename... Base>
bool whole(std::string_view text, T& value, Base... base) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base...);
  return error == std::errc() && end == text.data() + text.size();
}

const Token kWarpSize = {Token::Kind::kNumber, "32", 0};

}  // namespace

uint64_t type_bytes(std::string_view type) {
  static const std::map<std::string_view, uint64_t> sizes = {
      {"b8", 1},    {"u8", 1},     {"s8", 1},   {"b16", 2}, {"u16", 2}, {"s16", 2},  {"f16", 2},
      {"bf16", 2},  {"b32", 4},    {"u32", 4},  {"s32", 4}, {"f32", 4}, {"b64", 8},  {"u64", 8},
      {"f16x2", 4}, {"bf16x2", 4}, {"tf32", 4}, {"s64", 8}, {"f64", 8}, {"b128", 16}};
  const auto found = sizes.find(type);
  return found == sizes.end() ? 0 : found->second;
}

bool is_special_register(std::string_view name) {
  static const std::set<std::string_view> scalars = {"laneid",
                                                     "warpid",
                                                     "nwarpid",
                                                     "smid",
                                                     "nsmid",
                                                     "gridid",
                                                     "cluster_ctarank",
                                                     "cluster_nctarank",
                                                     "lanemask_eq",
                                                     "lanemask_le",
                                                     "lanemask_lt",
                                                     "lanemask_ge",
                                                     "lanemask_gt",
                                                     "clock",
                                                     "clock_hi",
                                                     "clock64",
                                                     "globaltimer",
                                                     "globaltimer_lo",
                                                     "globaltimer_hi",
                                                     "is_explicit_cluster",
                                                     "total_smem_size",
                                                     "aggr_smem_size",
                                                     "dynamic_smem_size",
                                                     "reserved_smem_offset_begin",
                                                     "current_graph_exec",
                                                     "reserved_smem_offset_end",
                                                     "reserved_smem_offset_cap"};
  static const std::set<std::string_view> vectors = {"tid",       "ntid",       "ctaid",         "nctaid",
                                                     "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid"};
  name.remove_prefix(1);
  const size_t dot = name.find('.');
  if (dot != name.npos) {
    const std::string_view component = name.substr(dot + 1);
    return component.size() == 1 && component.find_first_of("xyzw") == 0 && vectors.contains(name.substr(0, dot));
  }
  if (scalars.contains(name) || vectors.contains(name)) return true;
  for (std::string_view family : {"envreg", "pm", "reserved_smem_offset_"}) {
    const std::string_view rest = name.substr(std::min(family.size(), name.size()));
    if (name.starts_with(family) && !rest.empty() && rest.find_first_not_of("0123456789") == rest.npos) return true;
  }
  return false;
}

Lexer::Lexer(const std::string& text) : text_(text), code_(text) {
  blank_comments();
  tokenize();
}

void Lexer::fail(int line, const std::string& what) const {
  size_t begin = 0;
  for (int i = 1; i < line; ++i) begin = text_.find('\n', begin) + 1;
  const std::string_view rest = std::string_view(text_).substr(begin);
  throw Error("line " + std::to_string(line) + ": " + what + ": " + on_one_line(rest.substr(0, rest.find('\n'))));
}

void Lexer::blank_comments() {
  int line = 1;
  for (size_t i = 0; i < code_.size(); ++i) {
    const std::string_view rest = std::string_view(code_).substr(i);
    size_t size = 1;
    if (rest.starts_with("//")) {
      size = std::min(rest.find('\n'), rest.size());
    } else if (rest.starts_with("/*")) {
      const size_t end = rest.find("*/", 2);
      if (end == rest.npos) fail(line, "comment without an end");
      size = end + 2;
    } else {
      if (rest[0] == '\n') ++line;
      if (rest[0] != '"') continue;
      const size_t end = rest.find_first_of("\"\n", 1);
      if (end == rest.npos || rest[end] == '\n') fail(line, "string without an end");
      i += end;
      continue;
    }
    for (size_t j = i; j < i + size; ++j) {
      if (code_[j] == '\n') {
        ++line;
      } else {
        code_[j] = ' ';
      }
    }
    i += size - 1;
  }
}

void Lexer::tokenize() {
  const std::string_view code = code_;
  const auto at = [&](size_t i) { return i < code.size() ? code[i] : '\0'; };
  int line = 1;
  for (size_t i = 0; i < code.size();) {
    const char c = code[i];
    if (is_space(c)) {
      if (c == '\n') ++line;
      ++i;
      continue;
    }
    size_t end = i + 1;
    Token::Kind kind = Token::Kind::kPunctuation;
    if (c == '"') {
      kind = Token::Kind::kString;
      end = code.find('"', end) + 1;
    } else if (is_digit(c) || (c == '.' && is_digit(at(end)))) {
      kind = Token::Kind::kNumber;
      while (is_name(at(end)) || at(end) == '.') ++end;
    } else if (is_letter(c) || ((c == '.' || c == '%') && is_letter(at(end)))) {
      kind = Token::Kind::kWord;
      end = word_end(i);
    } else if (std::string_view("{}[]()<>,;:|!@=+-").find(c) == std::string_view::npos) {
      fail(line, std::string("character '") + c + "' has no meaning here");
    }
    tokens_.push_back({kind, code.substr(i, end - i), line});
    i = end;
  }
  // The line of the last token: a file that breaks off is quoted where it does.
  tokens_.push_back({Token::Kind::kEnd, code.substr(code.size()), tokens_.empty() ? 1 : tokens_.back().line});
}

size_t Lexer::word_end(size_t begin) const {
  const auto at = [&](size_t i) { return i < code_.size() ? code_[i] : '\0'; };
  size_t end = begin + 1;
  while (true) {
    if (is_name(at(end))) {
      ++end;
    } else if (at(end) == ':' && at(end + 1) == ':' && is_name(at(end + 2))) {
      end += 2;  // shared::cta, while a single colon ends a label
    } else if (at(end) == '.' && at(begin) != '.' && is_name(at(end + 1))) {
      ++end;  // add.s32 and %tid.x are one word, .reg.b32 is two
    } else {
      return end;
    }
  }
}

const Token& Lexer::peek(size_t ahead) const { return tokens_[std::min(position_ + ahead, tokens_.size() - 1)]; }

bool Lexer::is(std::string_view text) const { return peek().text == text; }

bool Lexer::accept(std::string_view text) {
  if (!is(text)) return false;
  ++position_;
  return true;
}

void Lexer::unexpected(const std::string& wanted) const {
  const std::string found = is(Token::Kind::kEnd) ? "the end of the text" : std::string(peek().text);
  fail("expected " + wanted + " before " + found);
}

void Lexer::expect(std::string_view text) {
  if (!accept(text)) unexpected(std::string(text));
}

const Token& Lexer::take(Token::Kind kind, const char* what) {
  if (!is(kind)) unexpected(what);
  const Token& token = peek();
  if (kind != Token::Kind::kEnd) ++position_;
  return token;
}

const Token& Lexer::name(const char* what) {
  if (peek().text.find_first_of(".:") != std::string_view::npos) unexpected(what);
  return take(Token::Kind::kWord, what);
}

std::string Lexer::since(const Token& first) const {
  const std::string_view last = tokens_[position_ - 1].text;
  return on_one_line({first.text.data(), last.data() + last.size()});
}

void Lexer::skip_section() {
  expect("{");
  for (int depth = 1; depth > 0; ++position_) {
    if (is(Token::Kind::kEnd)) unexpected("}");
    depth += is("{") ? 1 : is("}") ? -1 : 0;
  }
}

uint64_t Lexer::integer(uint64_t limit) {
  const Token& token = peek();
  const Operand value = is("-") ? Operand{} : literal();
  if (value.kind != Operand::Kind::kInteger || static_cast<uint64_t>(value.integer) > limit) {
    fail(token.line, "bad number " + std::string(token.text));
  }
  return static_cast<uint64_t>(value.integer);
}

Operand Lexer::literal() {
  const bool negative = accept("-");
  const Token& token = accept("WARP_SZ") ? kWarpSize : take(Token::Kind::kNumber, "a number");
  std::string_view digits = token.text;
  const char letter = digits.size() > 2 && digits[0] == '0' ? static_cast<char>(digits[1] | 0x20) : '\0';
  Operand result{};
  uint64_t bits = 0;
  bool good = false;
  if (letter == 'f' || letter == 'd' || digits.find('.') != digits.npos) {
    result.kind = Operand::Kind::kFloat;
    result.bytes = letter == 'f' ? 4 : 8;
    if (letter == 'f' || letter == 'd') {
      good = digits.size() == 2 + 2 * static_cast<size_t>(result.bytes) && whole(digits.substr(2), bits, 16);
    } else {
      double value = 0;
      good = whole(digits, value);
      bits = std::bit_cast<uint64_t>(value);
    }
    if (negative) bits ^= 1ull << (8 * result.bytes - 1);
  } else {
    result.kind = Operand::Kind::kInteger;
    if (digits.back() == 'U') digits.remove_suffix(1);
    if (letter == 'x' || letter == 'b') {
      good = whole(digits.substr(2), bits, letter == 'x' ? 16 : 2);
    } else {
      good = whole(digits, bits, digits.size() > 1 && digits[0] == '0' ? 8 : 10);
    }
    if (negative) bits = 0 - bits;
  }
  if (!good) fail(token.line, "bad number " + std::string(token.text));
  result.integer = static_cast<int64_t>(bits);
  return result;
}

// What says nothing about the run: .pragma, .file, .loc, .section.
bool Lexer::inert_statement() {
  if (accept(".pragma")) {
    do take(Token::Kind::kString, "a string");
    while (accept(","));
    expect(";");
  } else if (accept(".file")) {
    integer();
    take(Token::Kind::kString, "a file name");
    while (accept(",")) integer();
  } else if (accept(".loc")) {
    for (int i = 0; i < 3; ++i) integer();
    while (accept(",")) {
      if (accept("function_name")) {
        name("a label");
        if (accept("+")) integer();
      } else {
        expect("inlined_at");
        for (int i = 0; i < 3; ++i) integer();
      }
    }
  } else if (accept(".section")) {
    take(Token::Kind::kWord, "a section name");
    skip_section();
  } else {
    return false;
  }
  return true;
}

std::map<std::string, std::vector<uint32_t>> Lexer::function_directives() {
  static const std::set<std::string_view> known = {
      ".maxntid",         ".reqntid",           ".minnctapersm",   ".maxnctapersm",      ".maxnreg",
      ".explicitcluster", ".reqnctapercluster", ".maxclusterrank", ".blocksareclusters", ".noreturn"};
  std::map<std::string, std::vector<uint32_t>> directives;
  while (true) {
    if (is(".pragma")) {
      inert_statement();
      continue;
    }
    if (!is(Token::Kind::kWord)) return directives;
    if (!known.contains(peek().text)) fail("unknown directive " + std::string(peek().text));
    const Token& directive = take(Token::Kind::kWord, "a directive");
    std::vector<uint32_t>& values = directives[std::string(directive.text.substr(1))];
    if (!is(Token::Kind::kNumber)) continue;
    do values.push_back(static_cast<uint32_t>(integer(UINT32_MAX)));
    while (accept(","));
  }
}

uint32_t Lexer::alignment() {
  const int line = peek().line;
  const uint64_t value = integer(1 << 20);
  if (!std::has_single_bit(value)) fail(line, "an alignment must be a power of two");
  return static_cast<uint32_t>(value);
}

// Type and alignment; `bytes` of an element, which has `width` numbers.
Variable Lexer::attributes(Space space, bool is_extern, uint64_t& width) {
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

const Token& Lexer::declarator(Variable& variable, uint64_t width) {
  const Token& token = name("the name of a variable");
  variable.name = token.text;
  std::vector<uint64_t> extents;
  while (accept("[")) {
    const bool open = extents.empty() && is("]");
    extents.push_back(open ? 0 : integer(UINT32_MAX));
    if (__builtin_mul_overflow(variable.bytes, extents.back(), &variable.bytes)) fail("too large an array");
    expect("]");
  }
  const bool may_start = variable.space == Space::kGlobal || variable.space == Space::kConst;
  const bool open = !extents.empty() && extents[0] == 0;
  if (may_start && !variable.is_extern && accept("=")) {
    if (open) extents[0] = UINT32_MAX;
    if (width > 1) extents.push_back(width);
    initial_values(variable, extents, 0);
    uint64_t row = type_bytes(variable.type);
    for (size_t i = 1; i < extents.size(); ++i) row *= extents[i];
    if (row == 0) fail("too large or too small an array");
    if (open) variable.bytes = (variable.initial.size() + row - 1) / row * row;
    variable.initial.resize(variable.bytes);
  } else if (open && !variable.is_extern && variable.space != Space::kParam) {
    fail("an array without a size");
  }
  return token;
}

void Lexer::initial_values(Variable& variable, std::span<const uint64_t> extents, uint64_t at) {
  if (extents.empty()) return initial_value(variable, at);
  const uint64_t number = type_bytes(variable.type);
  if (extents.size() == 1 && number == 1 && is(Token::Kind::kString)) {
    const std::string_view text = peek().text.substr(1, peek().text.size() - 2);
    if (text.size() > extents[0]) fail("too many initial values");
    if (text.find('\\') != text.npos) fail("escapes in strings are unknown");
    variable.initial.resize(std::max<size_t>(variable.initial.size(), at + text.size()));
    std::copy(text.begin(), text.end(), variable.initial.begin() + static_cast<std::ptrdiff_t>(at));
    take(Token::Kind::kString, "a string");
    return;
  }
  uint64_t stride = number;
  for (uint64_t extent : extents.subspan(1)) stride *= extent;
  expect("{");
  if (accept("}")) return;
  for (uint64_t i = 0; i == 0 || accept(","); ++i) {
    if (i == extents[0]) fail("too many initial values");
    initial_values(variable, extents.subspan(1), at + i * stride);
  }
  expect("}");
}

void Lexer::initial_value(Variable& variable, uint64_t at) {
  if (is(Token::Kind::kWord)) fail("an address as initial value is not supported");
  const Token& token = peek();
  const Operand value = literal();
  const uint64_t size = type_bytes(variable.type);
  int64_t bits = value.integer;
  const bool is_float = variable.type == "f32" || variable.type == "f64";
  if (is_float && (value.kind == Operand::Kind::kInteger || value.bytes == 8)) {
    const double number =
        value.kind == Operand::Kind::kInteger ? static_cast<double>(bits) : std::bit_cast<double>(bits);
    bits = size == 8 ? std::bit_cast<int64_t>(number) : std::bit_cast<int32_t>(static_cast<float>(number));
  } else if (value.kind == Operand::Kind::kFloat && static_cast<uint64_t>(value.bytes) != size) {
    fail(token.line, "initial value of another size than " + variable.type);
  } else if (size < 8 && (bits >> (8 * size) > 0 || bits >> (8 * size - 1) < -1)) {
    fail(token.line, "initial value too large for " + variable.type);
  }
  variable.initial.resize(std::max(variable.initial.size(), at + size));
  std::memcpy(variable.initial.data() + at, &bits, std::min(size, sizeof bits));
}

}  // namespace emulator
