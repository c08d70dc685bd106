// Logic, shifts, bit fields and permutations.
#include <algorithm>
#include <functional>

#include "lanes.h"

namespace emulator {
namespace {

constexpr char kBitTypes[] = "b16 b32 b64";

template <class Operation>
Handler logic(const Decoder& d, Operation operation) {
  const Type& type = take_type(d, std::string(kBitTypes) + " pred");
  return lanewise(d, type, operation, type, type);
}

Handler logical_not(const Decoder& d, bool of_number) {
  const Type& type = take_type(d, of_number ? kBitTypes : std::string(kBitTypes) + " pred");
  return lanewise(d, type, [=](uint64_t a) { return of_number ? uint64_t{a == 0} : ~a; }, type);
}

// Amounts beyond the width shift everything out.
Handler shift(const Decoder& d, bool right) {
  const Type& type = take_type(d, right ? "b16 b32 b64 u16 u32 u64 s16 s32 s64" : kBitTypes);
  const auto width = static_cast<uint64_t>(type.bits);
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t by) -> uint64_t {
        const bool negative = type.is_signed() && a >> (width - 1);
        if (by >= width) return right ? 0 - uint64_t{negative} : 0;
        if (!right) return a << by;
        return a >> by | (negative ? ~(type.mask() >> by) : 0);
      },
      type, type_named("u32"));
}

// {b, a} is shifted; the result is the half that takes bits of both.
Handler funnel_shift(const Decoder& d) {
  const bool right = take_one_of(d, "l r") == "r", clamp = take_one_of(d, "clamp wrap") == "clamp";
  const Type& type = take_type(d, "b32");
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t b, uint64_t amount) {
        const uint64_t by = clamp ? std::min<uint64_t>(amount, 32) : amount % 32, both = b << 32 | a;
        return right ? both >> by : both << by >> 32;
      },
      type, type, type_named("u32"));
}

// Bit i of the table is the result where the bits of a, b and c spell i.
uint64_t looked_up(uint64_t a, uint64_t b, uint64_t c, int table) {
  uint64_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result & 0xffffffff;
}

Handler any_logic(const Decoder& d) {
  const bool combines = !d.done() && d.instruction.modifiers[d.used] != "b32";
  const bool both = combines && take_one_of(d, "and or") == "and";
  const Type &type = take_type(d, "b32"), &predicate = type_named("pred");
  d.expect_done();
  d.operands(combines ? 6 : 5);
  const Operand &to = d.operand(0), &table = d.operand(4);
  if (table.kind != Operand::Kind::kInteger || table.integer < 0 || table.integer > 255) d.unknown("table of lop3");
  const Input a(d, 1, type), b(d, 2, type), c(d, 3, type);
  const auto value = [=, table = static_cast<int>(table.integer)](Context& context, int lane) {
    return looked_up(a.get(context, lane), b.get(context, lane), c.get(context, lane), table);
  };
  if (!combines) return assign(destination_of(d, to, type), value);
  if (to.kind != Operand::Kind::kPair) d.unknown("destination, which must be d|p");
  const bool sink = to.elements[0].kind == Operand::Kind::kSink;
  const int result = sink ? -1 : destination_of(d, to.elements[0], type);
  const int flag = destination_of(d, to.elements[1], predicate);
  return [=, q = Input(d, 5, predicate)](Context& context) {
    for_lanes(context.mask, [&](int lane) {
      const uint64_t bits = value(context, lane), other = q.get(context, lane);
      if (result >= 0) context.warp.reg(result)[lane] = bits;
      context.warp.reg(flag)[lane] = both ? (bits != 0) & other : (bits != 0) | other;
    });
    return Outcome::kNext;
  };
}

// The selectors of a mode, a nibble for each byte of the result, for the two low bits of the control operand.
uint64_t selectors(std::string_view mode, uint64_t control) {
  const uint64_t n = control & 3;
  uint64_t result = 0;
  for (uint64_t byte = 0; byte < 4; ++byte) {
    uint64_t from = n;  // rc8
    if (mode == "f4e") from = n + byte;
    if (mode == "b4e") from = (n - byte) & 7;
    if (mode == "ecl") from = std::max(n, byte);
    if (mode == "ecr") from = std::min(n, byte);
    if (mode == "rc16") from = (n & 1) * 2 + (byte & 1);
    result |= from << 4 * byte;
  }
  return result;
}

// Each nibble picks one of the 8 bytes of {b, a}; its high bit spreads the sign of that byte.
uint64_t permuted(uint64_t a, uint64_t b, uint64_t nibbles) {
  const uint64_t bytes = b << 32 | a;
  uint64_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t nibble = nibbles >> 4 * i & 15;
    uint64_t byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

Handler permute(const Decoder& d) {
  const Type& type = take_type(d, "b32");
  if (d.done()) return lanewise(d, type, permuted, type, type, type);
  std::array<uint64_t, 4> tables;
  const std::string_view mode = take_one_of(d, "f4e b4e rc8 ecl ecr rc16");
  for (uint64_t i = 0; i < 4; ++i) tables[i] = selectors(mode, i);
  return lanewise(
      d, type, [=](uint64_t a, uint64_t b, uint64_t c) { return permuted(a, b, tables[c & 3]); }, type, type, type);
}

Handler count_bits(const Decoder& d, bool leading_zeros) {
  const Type &type = take_type(d, "b32 b64"), &result = type_named("u32");
  const int unused = 64 - type.bits;
  return lanewise(
      d, result,
      [=](uint64_t a) {
        return static_cast<uint64_t>(leading_zeros ? std::countl_zero(a) - unused : std::popcount(a));
      },
      type);
}

Handler reverse(const Decoder& d) {
  const Type& type = take_type(d, "b32 b64");
  return lanewise(
      d, type,
      [=](uint64_t a) {
        uint64_t result = 0;
        for (int i = 0; i < type.bits; ++i) result |= (a >> i & 1) << (type.bits - 1 - i);
        return result;
      },
      type);
}

// The highest bit that is no sign.
Handler find_bit(const Decoder& d) {
  const bool shift_amount = d.take("shiftamt");
  const Type &type = take_type(d, "u32 s32 u64 s64"), &result = type_named("u32");
  return lanewise(
      d, result,
      [=](uint64_t a) -> uint64_t {
        const uint64_t bits = type.is_signed() && a >> (type.bits - 1) ? ~a & type.mask() : a;
        if (bits == 0) return ~0ull;
        const int position = 63 - std::countl_zero(bits);
        return static_cast<uint64_t>(shift_amount ? type.bits - 1 - position : position);
      },
      type);
}

// `count` ones from bit `first` on; both may be up to 255.
uint64_t ones(uint64_t first, uint64_t count) {
  if (first >= 64) return 0;
  return (count >= 64 ? ~0ull : (1ull << count) - 1) << first;
}

// Bits past the top are zero, or the sign: that of the field, or of the value where the field sticks out.
Handler extract(const Decoder& d) {
  const Type &type = take_type(d, "u32 s32 u64 s64"), &amount = type_named("u32");
  const auto width = static_cast<uint64_t>(type.bits);
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t b, uint64_t c) -> uint64_t {
        const uint64_t first = b & 255, count = c & 255;
        if (count == 0) return 0;
        const bool negative = type.is_signed() && a >> (std::min(first + count, width) - 1) & 1;
        const uint64_t field = first >= width ? 0 : a >> first & ones(0, count);
        const uint64_t kept = first >= width ? 0 : std::min(count, width - first);
        return negative ? field | ~ones(0, kept) : field;
      },
      type, amount, amount);
}

Handler insert(const Decoder& d) {
  const Type &type = take_type(d, "b32 b64"), &amount = type_named("u32");
  return lanewise(
      d, type,
      [](uint64_t a, uint64_t b, uint64_t c, uint64_t length) {
        const uint64_t first = c & 255, field = ones(first, length & 255);
        return field == 0 ? b : (b & ~field) | (a << first & field);
      },
      type, type, amount, amount);
}

Handler mask_of_bits(const Decoder& d) {
  const bool clamp = take_one_of(d, "clamp wrap") == "clamp";
  const Type &type = take_type(d, "b32"), &amount = type_named("u32");
  return lanewise(
      d, type,
      [=](uint64_t first, uint64_t count) {
        return clamp ? ones(std::min<uint64_t>(first, 32), std::min<uint64_t>(count, 32))
                     : ones(first % 32, count % 32);
      },
      amount, amount);
}

Handler extend(const Decoder& d) {
  const bool clamp = take_one_of(d, "clamp wrap") == "clamp";
  const Type &type = take_type(d, "u32 s32"), &amount = type_named("u32");
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t b) -> uint64_t {
        const uint64_t count = clamp ? std::min<uint64_t>(b, 32) : b % 32;
        if (count == 0) return 0;
        const bool negative = type.is_signed() && a >> (count - 1) & 1;
        return negative ? a | ~ones(0, count) : a & ones(0, count);
      },
      type, amount);
}

// The position of the n-th one from `base` on, upwards or for a negative n downwards, itself included.
Handler find_nth(const Decoder& d) {
  const Type &type = take_type(d, "b32"), &offset = type_named("s32");
  return lanewise_in(
      d, type,
      [](Context& c, int, uint64_t mask, uint64_t base, uint64_t nth) -> uint64_t {
        if (base > 31) fail(c, "the base of fns must be below 32");
        const auto n = static_cast<int64_t>(static_cast<int32_t>(nth));
        if (n == 0) return mask >> base & 1 ? base : ~0ull;
        int64_t left = n < 0 ? -n : n;
        for (auto at = static_cast<int64_t>(base); at >= 0 && at < 32; at += n < 0 ? -1 : 1) {
          if ((mask >> at & 1) && --left == 0) return static_cast<uint64_t>(at);
        }
        return ~0ull;
      },
      type, type, offset);
}

}  // namespace

Handler decode_bits(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "and") return logic(d, std::bit_and<uint64_t>());
  if (op == "or") return logic(d, std::bit_or<uint64_t>());
  if (op == "xor") return logic(d, std::bit_xor<uint64_t>());
  if (op == "not" || op == "cnot") return logical_not(d, op == "cnot");
  if (op == "shl" || op == "shr") return shift(d, op == "shr");
  if (op == "shf") return funnel_shift(d);
  if (op == "lop3") return any_logic(d);
  if (op == "prmt") return permute(d);
  if (op == "popc" || op == "clz") return count_bits(d, op == "clz");
  if (op == "brev") return reverse(d);
  if (op == "bfind") return find_bit(d);
  if (op == "bfe") return extract(d);
  if (op == "bfi") return insert(d);
  if (op == "bmsk") return mask_of_bits(d);
  if (op == "szext") return extend(d);
  if (op == "fns") return find_nth(d);
  return {};
}

}  // namespace emulator
