// Moves, conversions between types and between address spaces.
#include "lanes.h"

namespace emulator {
namespace {

// Rounds to nearest even; NaN becomes the one that cvt makes.
uint64_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

uint64_t to_f16(float value) {
  return std::isnan(value) ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}

float from_f16(uint64_t bits) { return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits))); }

// To nearest even; what lies beyond 448 becomes 448.
uint64_t to_e4m3(float value) {
  if (std::isnan(value)) return 0x7f;
  const uint64_t sign = std::signbit(value) ? 0x80 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 448) return sign | 0x7e;
  if (magnitude < 0x1p-6) return sign | static_cast<uint64_t>(std::nearbyint(magnitude * 0x1p9));
  int exponent = std::ilogb(magnitude);
  auto significand = static_cast<uint64_t>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  if (significand == 16) significand = 8, ++exponent;
  return sign | static_cast<uint64_t>(exponent + 7) << 3 | (significand - 8);
}

uint64_t e4m3_to_f16(uint64_t code) {
  if ((code & 0x7f) == 0x7f) return 0x7fff;
  const int field = code >> 3 & 15, fraction = code & 7;
  const double magnitude = field ? std::ldexp(8 + fraction, field - 10) : std::ldexp(fraction, -9);
  return to_f16(static_cast<float>(code & 0x80 ? -magnitude : magnitude));
}

// cvt between floating-point types; an empty Handler for others.
Handler convert_float(const Decoder& d, bool rounded, bool saturated, const std::string& to, const std::string& from) {
  using To = uint64_t (*)(float);
  const To narrow = to.starts_with("bf16") ? to_bf16 : to.starts_with("f16") ? to_f16 : to_e4m3;
  const bool pair = to.ends_with("x2") && from == "f32";
  if (pair && rounded && saturated == (to == "e4m3x2")) {
    const int bits = to == "e4m3x2" ? 8 : 16;
    if (to != "e4m3x2" && to != "bf16x2" && to != "f16x2") return {};
    return binary(d, [=](uint64_t high, uint64_t low) { return narrow(f32(high)) << bits | narrow(f32(low)); });
  }
  if (to == "f16x2" && from == "e4m3x2" && rounded)
    return unary(d, [](uint64_t a) { return e4m3_to_f16(a >> 8 & 255) << 16 | e4m3_to_f16(a & 255); });
  if ((to == "bf16" || to == "f16") && from == "f32" && rounded && !saturated)
    return unary(d, [=](uint64_t a) { return narrow(f32(a)); });
  if (to == "f32" && from == "bf16" && !rounded) return unary(d, [](uint64_t a) { return (a & 0xffff) << 16; });
  if (to == "f32" && from == "f16" && !rounded) return unary(d, [](uint64_t a) { return bits_of(from_f16(a)); });
  return {};
}

Handler convert(const Decoder& d) {
  const bool rounded = d.take("rn"), saturated = d.take("satfinite");
  const std::string to = d.next(), from = d.next();
  d.expect_done();
  if (Handler handler = convert_float(d, rounded, saturated, to, from)) return handler;
  const auto is_integer = [](const std::string& t) { return t[0] == 'u' || t[0] == 's'; };
  if (rounded || saturated || !is_integer(to) || !is_integer(from)) d.unknown("conversion");
  const int in = bytes_of(from), out = bytes_of(to);
  const bool sign = from[0] == 's';
  return unary(d, [=](uint64_t a) {
    const uint64_t v = a & mask_of(in);
    return (sign ? static_cast<uint64_t>(sign_extend(v, in)) : v) & mask_of(out);
  });
}

// mov.b32 {%rs1, %rs2}, %r1 and the reverse: the first element is the lowest.
Handler mov_vector(const Decoder& d, int bytes) {
  const Operand &to = d.operand(0), &from = d.operand(1);
  const bool unpack = to.kind == Operand::Kind::kVector;
  const Operand& vector = unpack ? to : from;
  if (from.kind == to.kind) d.unknown("move");
  const int count = static_cast<int>(vector.elements.size()), each = bytes / count;
  if (count * each != bytes) d.unknown("move");
  if (!unpack) {
    std::vector<Source> parts;
    for (const Operand& element : vector.elements) parts.push_back(d.source(element));
    return assign(d.destination(to), [=](Context& c, int lane) {
      uint64_t value = 0;
      for (int i = 0; i < count; ++i) value |= (parts[i].get(c, lane) & mask_of(each)) << 8 * each * i;
      return value;
    });
  }
  std::vector<int> parts;
  for (const Operand& element : vector.elements) parts.push_back(d.destination(element));
  return [=, a = d.source(from)](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const uint64_t value = a.get(c, lane);
      for (int i = 0; i < count; ++i)
        if (parts[i] >= 0) c.warp.reg(parts[i])[lane] = value >> 8 * each * i & mask_of(each);
    });
    return Outcome::kNext;
  };
}

Handler mov(const Decoder& d) {
  const std::string type = d.next();
  d.expect_done();
  d.operands(2);
  const Operand &to = d.operand(0), &from = d.operand(1);
  if (to.kind == Operand::Kind::kVector || from.kind == Operand::Kind::kVector) return mov_vector(d, bytes_of(type));
  const uint64_t all = type == "pred" ? 1 : mask_of(bytes_of(type));
  return unary(d, [all](uint64_t a) { return a & all; });
}

Handler cvta(const Decoder& d) {
  const bool to = d.take("to");
  const std::string space = d.next();
  if (d.next() != "u64") d.unknown("address size");
  d.expect_done();
  d.operands(2);
  uint64_t window = 0;
  if (space == "shared" || space == "shared::cta" || space == "shared::cluster") window = kSharedWindow;
  if (space == "local") window = kLocalWindow;
  if (space == "param") window = kParamWindow;
  return assign(d.destination(0), [=, a = d.source(1)](Context& c, int lane) {
    const uint64_t v = a.get(c, lane);
    if (to && (v & kWindowMask & (window ? ~0ull : 0)) != window && window) fail(c, "the address is of another space");
    return to ? v - window : v + window;
  });
}

}  // namespace

Handler decode_convert(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "cvt") return convert(d);
  if (op == "mov") return mov(d);
  if (op == "cvta") return cvta(d);
  return {};
}

}  // namespace emulator
