// The types that instructions name, and operands checked against them.
#pragma once
#include <string_view>

#include "machine.h"
#include "numeric.h"

namespace emulator {

struct Type {
  enum class Kind : uint8_t { kBits, kUnsigned, kSigned, kFloat, kPredicate };
  std::string_view name;
  Kind kind;
  int bits;   // of an element
  int count;  // of elements in a register: 2 for f16x2
  const Format* format = nullptr;

  int width() const { return bits * count; }
  uint64_t mask() const { return ~0ull >> (64 - width()); }
  bool is_float() const { return kind == Kind::kFloat; }
  bool is_signed() const { return kind == Kind::kSigned; }
  bool is_integer() const { return kind == Kind::kSigned || kind == Kind::kUnsigned; }
};

// Null where there is no such type.
const Type* find_type(std::string_view name);
const Type& type_named(std::string_view name);  // of one that exists
// The type that ends the modifiers, or null.
const Type* last_type(const Decoder& d);
// Takes the next modifier, which must be one of `allowed`: names with spaces between them.
std::string_view take_one_of(const Decoder& d, const std::string& allowed);
const Type& take_type(const Decoder& d, const std::string& allowed);

// Which registers and constants ptxas takes for an operand of a type: all of the type's width that do not mix integers
// with floats. cvt takes wider registers, too; only mov and cvt read special registers.
enum class Fit : uint8_t { kExact, kMove, kConvert };
Source source_of(const Decoder& d, const Operand& operand, const Type& type, Fit fit = Fit::kExact);
int destination_of(const Decoder& d, const Operand& operand, const Type& type, Fit fit = Fit::kExact);
inline Source source_of(const Decoder& d, size_t index, const Type& type, Fit fit = Fit::kExact) {
  return source_of(d, d.operand(index), type, fit);
}
inline int destination_of(const Decoder& d, size_t index, const Type& type, Fit fit = Fit::kExact) {
  return destination_of(d, d.operand(index), type, fit);
}

}  // namespace emulator
