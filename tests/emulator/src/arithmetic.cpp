// Integer and floating-point arithmetic and comparisons.
#include "lanes.h"

namespace emulator {
namespace {

Handler integer(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "mul" || op == "mad") {
    const bool wide = d.take("wide"), high = !wide && d.take("hi");
    if (!wide && !high && !d.take("lo")) return {};
    const std::string type = d.next();
    d.expect_done();
    const int bytes = bytes_of(type);
    const bool sign = type[0] == 's', add = op == "mad";
    d.operands(add ? 4 : 3);
    const Source a = d.source(1), b = d.source(2), addend = add ? d.source(3) : Source{};
    return assign(d.destination(0), [=](Context& c, int lane) -> uint64_t {
      const uint64_t x = a.get(c, lane), y = b.get(c, lane);
      const auto product =
          sign ? static_cast<unsigned __int128>(static_cast<__int128>(sign_extend(x, bytes)) * sign_extend(y, bytes))
               : static_cast<unsigned __int128>(x & mask_of(bytes)) * (y & mask_of(bytes));
      const auto result = static_cast<uint64_t>(high ? product >> 8 * bytes : product) + addend.get(c, lane);
      return result & mask_of(wide ? 2 * bytes : bytes);
    });
  }
  if (d.instruction.modifiers.size() != 1) return {};
  const std::string type = d.next();
  if (type[0] == 'f' || type.starts_with("bf")) return {};
  const bool pred = type == "pred", sign = type[0] == 's';
  const int bytes = bytes_of(type);
  const uint64_t all = pred ? 1 : mask_of(bytes);
  const auto as = [=](uint64_t v) { return sign ? sign_extend(v, bytes) : static_cast<int64_t>(v & all); };
  if (op == "add") return binary(d, [=](uint64_t a, uint64_t b) { return (a + b) & all; });
  if (op == "sub") return binary(d, [=](uint64_t a, uint64_t b) { return (a - b) & all; });
  if (op == "and") return binary(d, [=](uint64_t a, uint64_t b) { return a & b & all; });
  if (op == "or") return binary(d, [=](uint64_t a, uint64_t b) { return (a | b) & all; });
  if (op == "xor") return binary(d, [=](uint64_t a, uint64_t b) { return (a ^ b) & all; });
  if (op == "not") {
    d.operands(2);
    return assign(d.destination(0), [a = d.source(1), all](Context& c, int lane) { return ~a.get(c, lane) & all; });
  }
  if (op == "neg" || op == "abs") {
    d.operands(2);
    const bool keep_positive = op == "abs";
    return assign(d.destination(0), [=, a = d.source(1)](Context& c, int lane) {
      const int64_t v = as(a.get(c, lane));
      return static_cast<uint64_t>(keep_positive && v >= 0 ? v : -v) & all;
    });
  }
  if (op == "min" || op == "max") {
    const bool low = op == "min";
    return binary(d, [=](uint64_t a, uint64_t b) {
      const bool less = sign ? as(a) < as(b) : (a & all) < (b & all);
      return (less == low ? a : b) & all;
    });
  }
  if (op == "div" || op == "rem") {
    const bool quotient = op == "div";
    return binary(d, [=](uint64_t a, uint64_t b) -> uint64_t {
      if ((b & all) == 0) return all;
      if (sign) return static_cast<uint64_t>(quotient ? as(a) / as(b) : as(a) % as(b)) & all;
      return quotient ? (a & all) / (b & all) : (a & all) % (b & all);
    });
  }
  if (op == "bfe") {
    d.operands(4);
    return assign(d.destination(0), [=, a = d.source(1), b = d.source(2), n = d.source(3)](Context& c, int lane) {
      const uint64_t bits = 8 * bytes, first = b.get(c, lane) & 255, count = n.get(c, lane) & 255;
      const uint64_t v = a.get(c, lane) & all;
      if (count == 0) return uint64_t{0};
      // Bits past the top are zero, or the sign: that of the field, or of the value where the field sticks out.
      const uint64_t top = std::min(first + count, bits) - 1;
      const uint64_t field = first >= bits ? 0 : v >> first & (count >= 64 ? ~0ull : (1ull << count) - 1);
      const bool negative = sign && (v >> top & 1);
      const uint64_t kept = first >= bits ? 0 : std::min(count, bits - first);
      return static_cast<uint64_t>((negative ? field | (kept >= 64 ? 0 : ~0ull << kept) : field) & all);
    });
  }
  if (op == "shl" || op == "shr") {
    const bool left = op == "shl";
    return binary(d, [=](uint64_t a, uint64_t b) -> uint64_t {
      const uint64_t by = b & 0xffffffff, bits = 8 * bytes;
      if (left) return by >= bits ? 0 : a << by & all;
      if (sign) return static_cast<uint64_t>(as(a) >> (by >= bits ? bits - 1 : by)) & all;
      return by >= bits ? 0 : (a & all) >> by;
    });
  }
  return {};
}

Handler floating(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  const bool rounded = d.take("rn");
  if (!d.take("f32")) return {};
  d.expect_done();
  if (op == "fma") {
    if (!rounded) d.unknown("rounding");
    d.operands(4);
    return assign(d.destination(0), [a = d.source(1), b = d.source(2), z = d.source(3)](Context& c, int lane) {
      return bits_of(std::fma(f32(a.get(c, lane)), f32(b.get(c, lane)), f32(z.get(c, lane))));
    });
  }
  if (op == "div") {
    if (!rounded) d.unknown("division");
    return binary(d, [](uint64_t a, uint64_t b) { return bits_of(f32(a) / f32(b)); });
  }
  if (op == "abs") return unary(d, [](uint64_t a) { return a & 0x7fffffff; });
  if (op == "neg") return unary(d, [](uint64_t a) { return (a ^ 0x80000000) & 0xffffffff; });
  // The one that is no NaN; -0 is below +0.
  if (op == "min" || op == "max") {
    const bool low = op == "min";
    return binary(d, [low](uint64_t a, uint64_t b) {
      const float x = f32(a), y = f32(b);
      if (std::isnan(x) || std::isnan(y)) return bits_of(std::isnan(x) ? y : x);
      const bool less = x < y || (x == y && std::signbit(x) && !std::signbit(y));
      return bits_of(less == low ? x : y);
    });
  }
  if (op == "add") return binary(d, [](uint64_t a, uint64_t b) { return bits_of(f32(a) + f32(b)); });
  if (op == "sub") return binary(d, [](uint64_t a, uint64_t b) { return bits_of(f32(a) - f32(b)); });
  if (op == "mul") return binary(d, [](uint64_t a, uint64_t b) { return bits_of(f32(a) * f32(b)); });
  return {};
}

// Ordered comparisons are false with a NaN, those that end in u true.
Handler setp_f32(const Decoder& d, const std::string& comparison) {
  const std::string kinds[] = {"eq", "ne", "lt", "le", "gt", "ge", "num"};
  const bool unordered = comparison == "nan" || (comparison.size() == 3 && comparison != "num");
  const std::string plain = unordered && comparison != "nan" ? comparison.substr(0, 2) : comparison;
  int kind = 0;
  while (kind < 7 && kinds[kind] != plain) ++kind;
  if (kind == 7 && comparison != "nan") d.unknown("comparison");
  return binary(d, [=](uint64_t a, uint64_t b) -> uint64_t {
    const float x = f32(a), y = f32(b);
    if (std::isnan(x) || std::isnan(y)) return unordered;
    const bool results[] = {x == y, x != y, x<y, x <= y, x> y, x >= y, true, false};
    return results[kind];
  });
}

Handler setp(const Decoder& d) {
  const std::string comparison = d.next(), type = d.next();
  d.expect_done();
  d.operands(3);
  if (type == "f32") return setp_f32(d, comparison);
  if (type[0] == 'f') d.unknown("comparison");
  const int bytes = bytes_of(type);
  const bool sign = type[0] == 's';
  const std::string kinds[] = {"eq", "ne", "lt", "le", "gt", "ge"};
  int kind = 0;
  while (kind < 6 && kinds[kind] != comparison) ++kind;
  if (kind == 6) d.unknown("comparison");
  return assign(d.destination(0), [=, a = d.source(1), b = d.source(2)](Context& c, int lane) -> uint64_t {
    const uint64_t x = a.get(c, lane) & mask_of(bytes), y = b.get(c, lane) & mask_of(bytes);
    const bool less = sign ? sign_extend(x, bytes) < sign_extend(y, bytes) : x < y;
    switch (kind) {
      case 0:
        return x == y;
      case 1:
        return x != y;
      case 2:
        return less;
      case 3:
        return less || x == y;
      case 4:
        return !less && x != y;
      default:
        return !less;
    }
  });
}

// prmt.b32 d, a, b, c: each nibble of c picks one of the 8 bytes of {b, a}; its high bit spreads that byte's sign.
Handler permute(const Decoder& d) {
  if (!d.take("b32")) d.unknown("type");
  d.expect_done();
  d.operands(4);
  return assign(d.destination(0), [a = d.source(1), b = d.source(2), s = d.source(3)](Context& c, int lane) {
    const uint64_t bytes = b.get(c, lane) << 32 | (a.get(c, lane) & 0xffffffff), selectors = s.get(c, lane);
    uint64_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint64_t selector = selectors >> 4 * i & 15;
      uint64_t byte = bytes >> 8 * (selector & 7) & 255;
      if (selector & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * i;
    }
    return result;
  });
}

}  // namespace

Handler decode_arithmetic(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "setp") return setp(d);
  if (op == "selp") {
    const std::string type = d.next();
    d.expect_done();
    d.operands(4);
    return assign(d.destination(0), [a = d.source(1), b = d.source(2), p = d.source(3)](Context& c, int lane) {
      return (p.get(c, lane) & 1 ? a : b).get(c, lane);
    });
  }
  if (op == "prmt") return permute(d);
  static const std::set<std::string> kOpcodes = {"add", "sub", "mul", "mad", "fma", "div", "rem", "and", "or",
                                                 "xor", "not", "neg", "abs", "min", "max", "shl", "shr", "bfe"};
  if (!kOpcodes.contains(op)) return {};
  if (Handler handler = integer(d.restart())) return handler;
  return floating(d.restart());
}

}  // namespace emulator
