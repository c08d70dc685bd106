// Integer arithmetic, with the carry flag.
#include <algorithm>

#include "lanes.h"

namespace emulator {
namespace {

using Int128 = __int128;

constexpr char kIntegers[] = "u16 s16 u32 s32 u64 s64", kMixedIntegers[] = "u16 s16 u32 s32 u64 s64 u16x2 s16x2";

Int128 number(const Type& type, uint64_t bits) {
  const int unused = 64 - type.bits;
  bits <<= unused;
  return type.is_signed() ? Int128{static_cast<int64_t>(bits) >> unused} : Int128{bits >> unused};
}

// Modulo 2^128, so that no operands overflow.
Uint128 product(Int128 a, Int128 b) { return static_cast<Uint128>(a) * static_cast<Uint128>(b); }

uint64_t saturated(Int128 value) {
  return static_cast<uint64_t>(std::clamp(value, Int128{INT32_MIN}, Int128{INT32_MAX}));
}

void set_carry(Context& c, int lane, bool carry) {
  c.warp.carry = (c.warp.carry & ~(1u << lane)) | uint32_t{carry} << lane;
}

// add, sub, addc, subc. CC.CF is the carry out of an addition; a subtraction is one of the complement, which carries
// where it does not borrow.
Handler sum(const Decoder& d, bool subtract, bool with_carry) {
  const bool saturate = !with_carry && d.take("sat"), sets_carry = !saturate && d.take("cc");
  const bool extended = with_carry || sets_carry;
  const Type& type = take_type(d, saturate   ? "s32"
                                  : extended ? "u32 s32 u64 s64"
                                  : subtract ? kIntegers
                                             : kMixedIntegers);
  if (saturate) {
    return lanewise(
        d, type,
        [=](uint64_t a, uint64_t b) {
          return saturated(subtract ? number(type, a) - number(type, b) : number(type, a) + number(type, b));
        },
        type, type);
  }
  if (!extended) {
    const auto plain = by_element(type, [=](uint64_t a, uint64_t b) { return subtract ? a - b : a + b; });
    return lanewise(d, type, plain, type, type);
  }
  return lanewise_in(
      d, type,
      [=](Context& c, int lane, uint64_t a, uint64_t b) {
        const uint64_t carry = with_carry ? c.warp.carry >> lane & 1 : subtract;
        const Uint128 result = Uint128{a} + (subtract ? ~b & type.mask() : b) + carry;
        if (sets_carry) set_carry(c, lane, result >> type.bits & 1);
        return static_cast<uint64_t>(result);
      },
      type, type);
}

struct Wideness {
  bool wide, high;
};

Wideness take_wideness(const Decoder& d, const std::string& allowed) {
  const std::string_view part = take_one_of(d, allowed);
  return {part == "wide", part == "hi"};
}

const Type& double_width(const Type& type) {
  return type_named(std::string(type.is_signed() ? "s" : "u") + std::to_string(2 * type.bits));
}

Handler multiply(const Decoder& d) {
  const auto [wide, high] = take_wideness(d, "lo hi wide");
  const Type& type = take_type(d, wide ? "u16 s16 u32 s32" : kIntegers);
  const int shift = high ? type.bits : 0;
  return lanewise(
      d, wide ? double_width(type) : type,
      [=](uint64_t a, uint64_t b) { return static_cast<uint64_t>(product(number(type, a), number(type, b)) >> shift); },
      type, type);
}

// mad and madc: the carry is that of the addition, after the product has been cut.
Handler multiply_add(const Decoder& d, bool with_carry) {
  const auto [wide, high] = take_wideness(d, with_carry ? "lo hi" : "lo hi wide");
  const bool saturate = high && !with_carry && d.take("sat"), sets_carry = !wide && !saturate && d.take("cc");
  const Type& type = take_type(d, saturate                   ? "s32"
                                  : with_carry || sets_carry ? "u32 s32 u64 s64"
                                  : wide                     ? "u16 s16 u32 s32"
                                                             : kIntegers);
  const Type& result_type = wide ? double_width(type) : type;
  const int shift = high ? type.bits : 0;
  return lanewise_in(
      d, result_type,
      [=](Context& c, int lane, uint64_t a, uint64_t b, uint64_t addend) {
        const Uint128 part = product(number(type, a), number(type, b)) >> shift;
        if (saturate) return saturated(number(type, static_cast<uint64_t>(part)) + number(type, addend));
        const uint64_t carry = with_carry ? c.warp.carry >> lane & 1 : 0;
        const Uint128 result = (part & result_type.mask()) + addend + carry;
        if (sets_carry) set_carry(c, lane, result >> type.bits & 1);
        return static_cast<uint64_t>(result);
      },
      type, type, result_type);
}

// The low 24 bits of the factors; hi is bits 16 to 47 of the product.
Handler multiply_24(const Decoder& d, bool accumulate) {
  const auto [wide, high] = take_wideness(d, "lo hi");
  const bool saturate = accumulate && high && d.take("sat");
  const Type& type = take_type(d, saturate ? "s32" : "u32 s32");
  const int shift = high ? 16 : 0;
  const auto part = [=](uint64_t a, uint64_t b) {
    Type narrow = type;
    narrow.bits = 24;
    return static_cast<uint64_t>(product(number(narrow, a), number(narrow, b)) >> shift) & type.mask();
  };
  if (!accumulate) return lanewise(d, type, part, type, type);
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t b, uint64_t addend) {
        const uint64_t value = part(a, b);
        return saturate ? saturated(number(type, value) + number(type, addend)) : value + addend;
      },
      type, type, type);
}

// All ones where the divisor is zero, which is what the compiler's expansions give.
Handler divide(const Decoder& d, bool remainder) {
  const Type& type = take_type(d, kIntegers);
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t b) {
        const Int128 x = number(type, a), y = number(type, b);
        return y == 0 ? ~0ull : static_cast<uint64_t>(remainder ? x % y : x / y);
      },
      type, type);
}

// The headers of CUDA write .relu behind the type.
Handler minimum(const Decoder& d, bool high) {
  const bool relu_first = d.take("relu");
  const Type& type = take_type(d, relu_first ? "s32 s16x2" : kMixedIntegers);
  const bool relu = relu_first || ((type.name == "s32" || type.name == "s16x2") && d.take("relu"));
  const auto pick = by_element(type, [=](uint64_t a, uint64_t b) {
    const uint64_t picked = (number(type, a) < number(type, b)) != high ? a : b;
    return relu && number(type, picked) < 0 ? 0 : picked;
  });
  return lanewise(d, type, pick, type, type);
}

Handler absolute(const Decoder& d, bool negate) {
  const Type& type = take_type(d, "s16 s32 s64");
  return lanewise(d, type, [=](uint64_t a) { return negate || number(type, a) < 0 ? 0 - a : a; }, type);
}

Handler sum_of_absolute_differences(const Decoder& d) {
  const Type& type = take_type(d, kIntegers);
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t b, uint64_t addend) {
        return addend + (number(type, a) < number(type, b) ? b - a : a - b);
      },
      type, type, type);
}

// dp4a and dp2a: the dot product of the fields of a, of 8 or 16 bits, with as many bytes of b.
Handler dot_product(const Decoder& d, int count) {
  const int first = count == 2 && take_one_of(d, "lo hi") == "hi" ? 2 : 0;
  const Type &a_type = take_type(d, "u32 s32"), &b_type = take_type(d, "u32 s32");
  const Type& type = type_named(a_type.is_signed() || b_type.is_signed() ? "s32" : "u32");
  Type a_field = a_type, b_field = b_type;
  a_field.bits = 32 / count;
  b_field.bits = 8;
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t b, uint64_t result) {
        for (int i = 0; i < count; ++i) {
          const Uint128 term = product(number(a_field, a >> a_field.bits * i), number(b_field, b >> 8 * (first + i)));
          result += static_cast<uint64_t>(term);
        }
        return result;
      },
      a_type, b_type, type);
}

// vabsdiff4.u32.u32.u32{.add}: |a - b| of each byte, or with .add their sum and c. It is the one video instruction that
// CUDA's headers still use.
Handler byte_differences(const Decoder& d) {
  const Type& type = take_type(d, "u32");
  take_type(d, "u32");
  take_type(d, "u32");
  const bool sum = d.take("add");
  return lanewise(
      d, type,
      [sum](uint64_t a, uint64_t b, uint64_t c) {
        uint64_t packed = 0, total = c;
        for (int i = 0; i < 32; i += 8) {
          const auto x = static_cast<int>(a >> i & 255), y = static_cast<int>(b >> i & 255);
          const auto difference = static_cast<uint64_t>(x > y ? x - y : y - x);
          packed |= difference << i, total += difference;
        }
        return sum ? total : packed;
      },
      type, type, type);
}

}  // namespace

Handler decode_integer(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "add" || op == "sub") return sum(d, op == "sub", false);
  if (op == "addc" || op == "subc") return sum(d, op == "subc", true);
  if (op == "mul") return multiply(d);
  if (op == "mad" || op == "madc") return multiply_add(d, op == "madc");
  if (op == "mul24" || op == "mad24") return multiply_24(d, op == "mad24");
  if (op == "div" || op == "rem") return divide(d, op == "rem");
  if (op == "min" || op == "max") return minimum(d, op == "max");
  if (op == "abs" || op == "neg") return absolute(d, op == "neg");
  if (op == "sad") return sum_of_absolute_differences(d);
  if (op == "vabsdiff4") return byte_differences(d);
  if (op == "dp4a" || op == "dp2a") return dot_product(d, op == "dp4a" ? 4 : 2);
  return {};
}

}  // namespace emulator
