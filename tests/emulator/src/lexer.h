// PTX text cut into tokens, what of it can be read without knowing names, and the messages that quote it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ptx.h"

namespace emulator {

struct Token {
  enum class Kind {
    kWord,    // a name, a directive with its dot, or an opcode with all its modifiers
    kNumber,  // not yet checked
    kString,  // with its quotes
    kPunctuation,
    kEnd,
  };
  Kind kind;
  std::string_view text;
  int line;
};

// Sizes of the types of variables and registers; 0 for all else, .pred included.
uint64_t type_bytes(std::string_view type);

// Whether "%tid.x" and the like name a special register.
bool is_special_register(std::string_view name);

// The tokens and a position among them.
class Lexer {
 public:
  explicit Lexer(const std::string& text);
  Lexer(const Lexer&) = delete;  // tokens point into it
  Lexer& operator=(const Lexer&) = delete;

  const Token& peek(size_t ahead = 0) const;
  bool is(std::string_view text) const;
  bool is(Token::Kind kind) const { return peek().kind == kind; }

  // These step over what they return; what is not there is an error, but for accept().
  const Token& take(Token::Kind kind, const char* what);
  const Token& name(const char* what);
  bool accept(std::string_view text);
  void expect(std::string_view text);
  uint64_t integer(uint64_t limit = UINT64_MAX);
  Operand literal();  // kInteger or kFloat

  // What of a declaration can be read without knowing any name. These leave the offset to the parser.
  Variable attributes(Space space, bool is_extern, uint64_t& width);   // of `bytes` for an element of `width` numbers
  const Token& declarator(Variable& variable, uint64_t width);         // name, extents and initial values
  std::map<std::string, std::vector<uint32_t>> function_directives();  // between parameters and body
  bool inert_statement();  // whether there was one: .pragma, .file, .loc, .section

  // All from token `first` up to here, without comments, on one line.
  std::string since(const Token& first) const;

  [[noreturn]] void fail(int line, const std::string& what) const;
  [[noreturn]] void fail(const std::string& what) const { fail(peek().line, what); }
  [[noreturn]] void unexpected(const std::string& wanted) const;

 private:
  void blank_comments();
  void tokenize();
  size_t word_end(size_t begin) const;
  void skip_section();
  uint32_t alignment();
  void initial_values(Variable& variable, std::span<const uint64_t> extents, uint64_t at);
  void initial_value(Variable& variable, uint64_t at);

  std::string text_;
  std::string code_;  // text_ with spaces for comments
  std::vector<Token> tokens_;
  size_t position_ = 0;
};

}  // namespace emulator
