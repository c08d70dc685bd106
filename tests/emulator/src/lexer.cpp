#include "lexer.h"

#include <algorithm>
#include <map>
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

// For messages, which must be text whatever the PTX was.
std::string printable(std::string_view text, size_t longest) {
  std::string result;
  for (char c : text.substr(0, longest)) {
    if (c >= ' ' && c <= '~') {
      result += c;
    } else {
      constexpr char kDigits[] = "0123456789abcdef";
      result += std::string("\\x") + kDigits[(c >> 4) & 15] + kDigits[c & 15];
    }
  }
  return text.size() > longest ? result + "..." : result;
}

constexpr size_t kLongestText = 16 << 20, kLongestMessage = 2000, kLongestQuote = 200;

}  // namespace

uint64_t type_bytes(std::string_view type) {
  static const std::map<std::string_view, uint64_t> sizes = {
      {"b8", 1},  {"u8", 1},  {"s8", 1},  {"b16", 2}, {"u16", 2}, {"s16", 2}, {"f16", 2}, {"f16x2", 4}, {"b32", 4},
      {"u32", 4}, {"s32", 4}, {"f32", 4}, {"b64", 8}, {"u64", 8}, {"s64", 8}, {"f64", 8}, {"b128", 16}};
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
  if (text.size() > kLongestText) throw Error("a PTX text of more than 16 MiB");
  blank_comments();
  tokenize();
}

void Lexer::fail(int line, const std::string& what) const {
  size_t begin = 0;
  for (int i = 1; i < line; ++i) begin = text_.find('\n', begin) + 1;
  const std::string_view rest = std::string_view(text_).substr(begin);
  const std::string quoted = on_one_line(rest.substr(0, rest.find('\n')));
  throw Error("line " + std::to_string(line) + ": " + printable(what, kLongestMessage) + ": " +
              printable(quoted, kLongestQuote));
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
  static const std::set<std::string_view> kOperators = {"<<", ">>", "<=", ">=", "==", "!=", "&&", "||"};
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
      end = number_end(i);
    } else if (is_letter(c) || ((c == '.' || c == '%') && is_letter(at(end)))) {
      kind = Token::Kind::kWord;
      end = word_end(i);
    } else if (kOperators.contains(code.substr(i, 2))) {
      ++end;
    } else if (std::string_view("{}[]()<>,;:|!@=+-~*/%&^?").find(c) == std::string_view::npos) {
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

size_t Lexer::number_end(size_t begin) const {
  const auto at = [&](size_t i) { return i < code_.size() ? code_[i] : '\0'; };
  size_t end = begin + 1;
  while (is_name(at(end)) || at(end) == '.') ++end;
  const std::string_view number = std::string_view(code_).substr(begin, end - begin);
  const bool exponent = (number.back() == 'e' || number.back() == 'E') &&
                        number.substr(0, number.size() - 1).find_first_not_of("0123456789.") == number.npos;
  if (exponent && (at(end) == '+' || at(end) == '-') && is_digit(at(end + 1))) {  // 1.5e-3
    ++end;
    while (is_digit(at(end))) ++end;
  }
  return end;
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

void Lexer::skip_group(std::string_view open, std::string_view close) {
  expect(open);
  for (int depth = 1; depth > 0; ++position_) {
    if (is(Token::Kind::kEnd)) unexpected(std::string(close));
    depth += is(open) ? 1 : is(close) ? -1 : 0;
  }
}

}  // namespace emulator
