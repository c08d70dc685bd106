// Conversions between types.
#include <algorithm>

#include "lanes.h"

namespace emulator {
namespace {

// cvt{.rounding}{.ftz}{.sat}{.satfinite}{.relu}.to.from
struct Conversion {
  std::string_view rounding_name;
  Rounding rounding = Rounding::kEven;
  bool flush = false, saturate = false, finite = false, relu = false;
  Type to, from;

  bool rounds_to_integer() const { return rounding_name.size() == 3 && rounding_name[2] == 'i'; }
  bool rounds() const { return rounding_name.size() == 2; }  // .rna is of TF32 alone
  bool plain() const { return !flush && !saturate && !finite && !relu; }
};

// Whether every number of `from` is one of `to`.
bool holds(const Type& to, const Type& from) {
  if (to.is_signed() == from.is_signed()) return to.bits >= from.bits;
  return to.is_signed() && to.bits > from.bits;
}

bool is_legal_float_to_float(const Conversion& c) {
  const std::string_view to = c.to.name, from = c.from.name;
  const bool upper = !c.rounding_name.empty(), nearest = c.rounding_name == "rn";
  const bool nearest_or_zero = nearest || c.rounding_name == "rz";
  if (c.to.format->bits == 8)
    return nearest && c.finite && !c.flush && !c.saturate && (from == "f32" || from == "f16x2");
  if (c.from.format->bits == 8) return to == "f16x2" && nearest && !c.flush && !c.saturate && !c.finite;
  if (c.to.count == 2) return from == "f32" && nearest_or_zero && !c.flush && !c.saturate;
  if (c.from.count == 2 || from == "tf32") return false;
  if (to == "tf32") {
    if (from != "f32" || c.flush || c.saturate) return false;
    return c.rounding_name == "rna" ? !c.relu : nearest_or_zero && !c.finite;
  }
  const bool has_f32 = to == "f32" || from == "f32", has_bf16 = to == "bf16" || from == "bf16";
  if ((c.flush && !has_f32) || (c.saturate && has_bf16)) return false;
  if (c.finite || c.relu) {
    return (to == "f16" || to == "bf16") && from == "f32" && nearest_or_zero && !c.flush && !c.saturate;
  }
  if (to == from) return to == "bf16" ? c.rounds_to_integer() : !upper || c.rounds_to_integer();
  // BF16 takes a rounding even where the result is exact.
  if (c.to.bits > c.from.bits) return !upper || (from == "bf16" && c.rounds());
  return c.rounds();
}

bool is_legal(const Conversion& c) {
  if (c.to.is_float() && c.from.is_float()) return is_legal_float_to_float(c);
  if (c.finite || c.relu) return false;
  if (c.to.is_float()) {
    if (c.to.count == 2 || c.to.format == &kTf32 || !c.rounds()) return false;
    if (c.to.name == "bf16") return c.plain() && c.from.bits > 8;
    return !c.flush || c.to.name == "f32";
  }
  if (c.from.is_float()) {
    if (c.from.count == 2 || c.from.format == &kTf32 || !c.rounds_to_integer()) return false;
    if (c.from.name == "bf16") return c.plain() && c.to.bits > 8;
    return !c.flush || c.from.name == "f32";
  }
  return c.rounding_name.empty() && !c.flush && !(c.saturate && holds(c.to, c.from));
}

Conversion take_conversion(const Decoder& d) {
  Conversion c;
  for (const char* name : {"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"}) {
    if (d.take(name)) {
      c.rounding_name = name;
      break;
    }
  }
  if (c.rounding_name == "rna") c.rounding = Rounding::kAway;
  if (c.rounding_name.starts_with("rz")) c.rounding = Rounding::kZero;
  if (c.rounding_name.starts_with("rm")) c.rounding = Rounding::kDown;
  if (c.rounding_name.starts_with("rp")) c.rounding = Rounding::kUp;
  c.flush = d.take("ftz");
  c.saturate = d.take("sat");
  c.finite = d.take("satfinite");
  c.relu = d.take("relu");
  if (!c.finite) c.finite = d.take("satfinite");
  const char* scalars = "u8 u16 u32 u64 s8 s16 s32 s64 f16 bf16 f32 f64 f16x2";
  c.to = take_type(d, std::string(scalars) + " bf16x2 tf32 e4m3x2 e5m2x2");
  c.from = take_type(d, std::string(scalars) + " e4m3x2 e5m2x2");
  d.expect_done();
  if (!is_legal(c)) d.unknown("conversion");
  return c;
}

Real number(const Type& type, uint64_t bits) {
  const bool negative = type.is_signed() && bits >> (type.bits - 1) & 1;
  return {Real::Kind::kFinite, negative, 0, negative ? (0 - bits) & type.mask() : bits};
}

uint64_t float_to_float(const Conversion& c, uint64_t bits) {
  const Format &to = *c.to.format, &from = *c.from.format;
  // .ftz is of FP32 alone.
  if (c.flush && from.bits == 32) bits = from.flushed(bits);
  Real value = unpack(from, bits);
  if (c.rounds_to_integer()) value = integral(value, c.rounding);
  uint64_t result = pack(to, value, c.rounding, c.finite);
  if (c.flush && to.bits == 32) result = to.flushed(result);
  if (c.saturate) {
    if (value.is_nan() || value.negative) return 0;
    return std::min(result, to.one());
  }
  if (c.relu && value.negative && !value.is_nan()) return 0;
  // TF32 is the upper bits of a register, but for NaN.
  return &to == &kTf32 ? (value.is_nan() ? kF32.nan() : result << (32 - to.bits)) : result;
}

uint64_t float_to_integer(const Conversion& c, uint64_t bits) {
  const Format& from = *c.from.format;
  if (from.is_nan(bits) && (from.bits == 64 || c.to.bits == 64)) return 1ull << (c.to.bits - 1);
  if (c.flush) bits = from.flushed(bits);
  return to_integer(unpack(from, bits), c.rounding, c.to.is_signed(), c.to.bits);
}

uint64_t integer_to_float(const Conversion& c, uint64_t bits) {
  const Format& to = *c.to.format;
  const Real value = number(c.from, bits);
  const uint64_t result = pack(to, value, c.rounding);
  if (c.saturate) return value.negative ? 0 : std::min(result, to.one());
  return result;
}

// Without .sat the upper bits are cut off.
uint64_t integer_to_integer(const Conversion& c, uint64_t bits) {
  const Real value = number(c.from, bits);
  if (c.saturate) return to_integer(value, Rounding::kEven, c.to.is_signed(), c.to.bits);
  const auto magnitude = static_cast<uint64_t>(value.significand);
  return (value.negative ? 0 - magnitude : magnitude) & c.to.mask();
}

uint64_t converted(const Conversion& c, uint64_t bits) {
  if (c.from.is_float()) return c.to.is_float() ? float_to_float(c, bits) : float_to_integer(c, bits);
  return c.to.is_float() ? integer_to_float(c, bits) : integer_to_integer(c, bits);
}

Handler convert(const Decoder& d) {
  const Conversion c = take_conversion(d);
  const int destination = destination_of(d, 0, c.to, Fit::kConvert);
  const Input a(d, 1, c.from, Fit::kConvert);
  // Two numbers become a pair, the first the upper one.
  if (c.to.count == 2 && c.from.count == 1) {
    d.operands(3);
    return assign(destination, [=, b = Input(d, 2, c.from, Fit::kConvert)](Context& context, int lane) {
      return converted(c, a.get(context, lane)) << c.to.bits | converted(c, b.get(context, lane));
    });
  }
  d.operands(2);
  if (c.to.count == 2) {
    return assign(destination, [=](Context& context, int lane) {
      const uint64_t pair = a.get(context, lane), mask = (1ull << c.from.bits) - 1;
      return converted(c, pair >> c.from.bits) << c.to.bits | converted(c, pair & mask);
    });
  }
  // A wider register gets the sign.
  const uint64_t all =
      type_named(d.placed.function->registers[static_cast<size_t>(destination - d.placed.first_register)].type).mask();
  return assign(destination, [=](Context& context, int lane) {
    const uint64_t result = converted(c, a.get(context, lane));
    const bool negative = c.to.is_signed() && result >> (c.to.bits - 1) & 1;
    return (negative ? result | ~c.to.mask() : result) & all;
  });
}

// cvt.pack.sat: b and above it a, saturated; the bits that are left above come from the lowest of c.
Handler convert_and_pack(const Decoder& d) {
  if (!d.take("pack") || !d.take("sat")) d.unknown("conversion");
  const Type& to = take_type(d, "u16 s16 u8 s8 u4 s4 u2 s2");
  const Type &from = take_type(d, "s32"), &word = type_named("b32");
  const auto pair = [=](uint64_t a, uint64_t b) {
    const auto part = [&](uint64_t x) { return to_integer(number(from, x), Rounding::kEven, to.is_signed(), to.bits); };
    return part(a) << to.bits | part(b);
  };
  if (to.bits == 16) return lanewise(d, word, pair, from, from);
  take_type(d, "b32");
  return lanewise(
      d, word, [=](uint64_t a, uint64_t b, uint64_t c) { return pair(a, b) | c << 2 * to.bits; }, from, from, word);
}

}  // namespace

Handler decode_convert(const Decoder& d) {
  if (d.instruction.opcode != "cvt") return decode_move(d);
  const auto& modifiers = d.instruction.modifiers;
  return !modifiers.empty() && modifiers[0] == "pack" ? convert_and_pack(d) : convert(d);
}

}  // namespace emulator
