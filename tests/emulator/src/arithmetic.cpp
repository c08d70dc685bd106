// Integer and floating-point arithmetic, comparisons, moves and conversions.
#include <bit>
#include <cmath>

#include "machine.h"

namespace emulator {
namespace {

constexpr uint32_t kNan32 = 0x7fffffff;

uint64_t mask_of(int bytes) { return bytes == 8 ? ~0ull : (1ull << 8 * bytes) - 1; }
int64_t sign_extend(uint64_t value, int bytes) {
  const int shift = 64 - 8 * bytes;
  return static_cast<int64_t>(value << shift) >> shift;
}
float f32(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }
// The hardware has one NaN.
uint64_t bits_of(float value) { return std::isnan(value) ? kNan32 : std::bit_cast<uint32_t>(value); }

using Value = std::function<uint64_t(Context&, int)>;

// d = value(...) in each lane.
Handler assign(int destination, Value value) {
  return [=](Context& c) {
    uint64_t results[kLanes];
    for_lanes(c.mask, [&](int lane) { results[lane] = value(c, lane); });
    if (destination >= 0) {
      uint64_t* d = c.warp.reg(destination);
      for_lanes(c.mask, [&](int lane) { d[lane] = results[lane]; });
    }
    return Outcome::kNext;
  };
}

template <class F>
Handler binary(const Decoder& d, F f) {
  d.operands(3);
  return assign(d.destination(0), [a = d.source(1), b = d.source(2), f](Context& c, int lane) {
    return f(a.get(c, lane), b.get(c, lane));
  });
}

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
  if (op == "add") return binary(d, [](uint64_t a, uint64_t b) { return bits_of(f32(a) + f32(b)); });
  if (op == "sub") return binary(d, [](uint64_t a, uint64_t b) { return bits_of(f32(a) - f32(b)); });
  if (op == "mul") return binary(d, [](uint64_t a, uint64_t b) { return bits_of(f32(a) * f32(b)); });
  return {};
}

Handler setp(const Decoder& d) {
  const std::string comparison = d.next(), type = d.next();
  d.expect_done();
  d.operands(3);
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

// Rounds to nearest even; NaN becomes the one that cvt makes.
uint64_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

Handler convert(const Decoder& d) {
  const bool rounded = d.take("rn");
  const std::string to = d.next(), from = d.next();
  d.expect_done();
  if (to == "bf16x2" && from == "f32" && rounded) {
    d.operands(3);
    return binary(d, [](uint64_t high, uint64_t low) { return to_bf16(f32(high)) << 16 | to_bf16(f32(low)); });
  }
  const auto is_integer = [](const std::string& t) { return t[0] == 'u' || t[0] == 's'; };
  if (rounded || !is_integer(to) || !is_integer(from)) d.unknown("conversion");
  d.operands(2);
  const int in = bytes_of(from), out = bytes_of(to);
  const bool sign = from[0] == 's';
  return assign(d.destination(0), [=, a = d.source(1)](Context& c, int lane) {
    const uint64_t v = a.get(c, lane) & mask_of(in);
    return (sign ? static_cast<uint64_t>(sign_extend(v, in)) : v) & mask_of(out);
  });
}

Handler mov(const Decoder& d) {
  const std::string type = d.next();
  d.expect_done();
  d.operands(2);
  const Operand &to = d.operand(0), &from = d.operand(1);
  if (to.kind == Operand::Kind::kVector || from.kind == Operand::Kind::kVector) d.unknown("vector move");
  const uint64_t all = type == "pred" ? 1 : mask_of(bytes_of(type));
  return assign(d.destination(to), [a = d.source(from), all](Context& c, int lane) { return a.get(c, lane) & all; });
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

Handler decode_arithmetic(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "setp") return setp(d);
  if (op == "cvt") return convert(d);
  if (op == "mov") return mov(d);
  if (op == "cvta") return cvta(d);
  if (op == "selp") {
    const std::string type = d.next();
    d.expect_done();
    d.operands(4);
    return assign(d.destination(0), [a = d.source(1), b = d.source(2), p = d.source(3)](Context& c, int lane) {
      return (p.get(c, lane) & 1 ? a : b).get(c, lane);
    });
  }
  static const std::set<std::string> kOpcodes = {"add", "sub", "mul", "mad", "fma", "div", "rem", "and", "or",
                                                 "xor", "not", "neg", "abs", "min", "max", "shl", "shr"};
  if (!kOpcodes.contains(op)) return {};
  if (Handler handler = integer(Decoder{d.module, d.function, d.instruction})) return handler;
  return floating(Decoder{d.module, d.function, d.instruction});
}

}  // namespace emulator
