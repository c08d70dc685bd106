// PTX text cut into tokens, its constant expressions, and the messages that quote it.
#pragma once
#include <cstddef>
#include <cstdint>
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

// Whether "%tid.x" and the like name a special register.
bool is_special_register(std::string_view name);

// The value of a constant expression: an integer of 64 bits, or a floating-point number.
struct Constant {
  enum class Kind {
    kInteger,  // `bits`, signed or not
    kDouble,   // `bits` of a double, written in decimal or as 0d
    kSingle,   // `bits` of a float, written as 0f
  };
  Kind kind = Kind::kInteger;
  bool is_unsigned = false;
  bool is_decimal = false;  // a number whose size only the type of the instruction tells
  uint64_t bits = 0;
};

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
  void skip_group(std::string_view open, std::string_view close);  // what these enclose, nested ones as well
  uint64_t integer(uint64_t limit = UINT64_MAX);                   // one literal
  bool at_constant() const;
  Constant constant() { return conditional(0); }  // an expression
  int64_t integer_constant(const char* what);

  // All from token `first` up to here, without comments, on one line.
  std::string since(const Token& first) const;

  [[noreturn]] void fail(int line, const std::string& what) const;
  [[noreturn]] void fail(const std::string& what) const { fail(peek().line, what); }
  [[noreturn]] void unexpected(const std::string& wanted) const;

 private:
  void blank_comments();
  void tokenize();
  size_t word_end(size_t begin) const;
  size_t number_end(size_t begin) const;
  // constant.cpp; `depth` bounds the recursion.
  Constant conditional(int depth);
  Constant binary(int level, int depth);
  Constant unary(int depth);
  Constant literal();
  Constant apply(std::string_view op, const Constant& a, const Constant& b, int line) const;

  std::string text_;
  std::string code_;  // text_ with spaces for comments
  std::vector<Token> tokens_;
  size_t position_ = 0;
};

}  // namespace emulator
