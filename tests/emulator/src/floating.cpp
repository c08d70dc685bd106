// Floating-point arithmetic of all formats.
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace emulator {
namespace {

// What the modifiers of an instruction ask for.
struct Mode {
  Type type;
  Rounding rounding = Rounding::kEven;
  bool flush = false;     // .ftz
  bool saturate = false;  // to [0, 1]; NaN becomes 0
  bool relu = false;      // negative becomes 0

  const Format& format() const { return *type.format; }
  uint64_t input(uint64_t bits) const { return flush ? format().flushed(bits) : bits; }
  uint64_t result(uint64_t bits) const {
    if (flush) bits = format().flushed(bits);
    const bool is_nan = format().is_nan(bits);
    if (saturate) return is_nan || bits & format().sign() ? 0 : std::min(bits, format().one());
    return relu && bits & format().sign() && !is_nan ? 0 : bits;
  }
};

enum class Operation : uint8_t { kAdd, kSubtract, kMultiply, kMultiplyAdd, kDivide, kRoot };

template <class Number>
Number native(Operation operation, Number a, Number b, Number c) {
  switch (operation) {
    case Operation::kAdd:
      return a + b;
    case Operation::kSubtract:
      return a - b;
    case Operation::kMultiply:
      return a * b;
    case Operation::kMultiplyAdd:
      return std::fma(a, b, c);
    case Operation::kDivide:
      return a / b;
    default:
      return std::sqrt(a);
  }
}

Real exact(Operation operation, const Real& a, Real b, const Real& c, Rounding rounding) {
  switch (operation) {
    case Operation::kSubtract:
      b.negative = !b.negative;
      [[fallthrough]];
    case Operation::kAdd:
      return add(a, b, rounding);
    case Operation::kMultiply:
      return multiply(a, b);
    case Operation::kMultiplyAdd:
      return add(multiply(a, b), c, rounding);
    case Operation::kDivide:
      return divide(a, b);
    default:
      return square_root(a);
  }
}

// The host rounds FP32 and FP64 to nearest even as IEEE 754 asks; all else is done in integers.
uint64_t compute(const Mode& mode, Operation operation, uint64_t a, uint64_t b, uint64_t c) {
  const Format& format = mode.format();
  a = mode.input(a), b = mode.input(b), c = mode.input(c);
  // FP64 keeps the payload of a NaN, and makes it quiet.
  if (format.bits == 64) {
    for (const uint64_t value : {a, b, c}) {
      if (format.is_nan(value)) return value | 1ull << 51;
    }
  }
  uint64_t bits;
  if (mode.rounding == Rounding::kEven && format.bits == 32) {
    const auto number = [](uint64_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value)); };
    bits = std::bit_cast<uint32_t>(native(operation, number(a), number(b), number(c)));
  } else if (mode.rounding == Rounding::kEven && format.bits == 64) {
    const auto number = [](uint64_t value) { return std::bit_cast<double>(value); };
    bits = std::bit_cast<uint64_t>(native(operation, number(a), number(b), number(c)));
  } else {
    const Real result = exact(operation, unpack(format, a), unpack(format, b), unpack(format, c), mode.rounding);
    bits = pack(format, result, mode.rounding);
  }
  return mode.result(format.is_nan(bits) ? format.nan() : bits);
}

Rounding rounding_named(std::string_view name) {
  if (name == "rz") return Rounding::kZero;
  if (name == "rm") return Rounding::kDown;
  return name == "rp" ? Rounding::kUp : Rounding::kEven;
}

constexpr char kRoundings[] = "rn rz rm rp";

// {.rnd}{.ftz}{.sat, .relu}.type as add, sub, mul, fma and mad have them. FP32 has all, FP64 only the rounding, FP16
// rounds to nearest, BF16 takes neither .ftz nor .sat.
Mode take_mode(const Decoder& d, bool must_round, bool may_relu) {
  const bool rounds = must_round || (!d.done() && std::string_view(kRoundings).find(d.instruction.modifiers[d.used]) !=
                                                      std::string_view::npos);
  const std::string_view name = rounds ? take_one_of(d, kRoundings) : "rn";
  const bool flush = d.take("ftz"), saturate = d.take("sat"), relu = may_relu && !saturate && d.take("relu");
  std::string allowed = " f16 f16x2";
  if (!relu) allowed += " f32";
  if (!relu && !flush && !saturate) allowed += " f64";
  if (!flush && !saturate) allowed += " bf16 bf16x2";
  if (name != "rn") allowed = flush || saturate ? "f32" : "f32 f64";
  if (name != "rn" && relu) d.unknown("rounding");
  return {take_type(d, allowed), rounding_named(name), flush, saturate, relu};
}

Handler binary(const Decoder& d, const Mode& mode, Operation operation) {
  const auto value = [=](uint64_t a, uint64_t b) { return compute(mode, operation, a, b, 0); };
  return lanewise(d, mode.type, by_element(mode.type, value), mode.type, mode.type);
}

Handler multiply_add(const Decoder& d, bool is_fma) {
  const Mode mode = take_mode(d, true, is_fma);
  if (!is_fma && mode.type.bits == 16) d.unknown("type");
  const auto value = [=](uint64_t a, uint64_t b, uint64_t c) {
    return compute(mode, Operation::kMultiplyAdd, a, b, c);
  };
  return lanewise(d, mode.type, by_element(mode.type, value), mode.type, mode.type, mode.type);
}

// An approximation: exact functions in double, rounded once. The hardware's differ from it by the bounds of the ISA.
using Function = double (*)(double);

Handler approximation(const Decoder& d, const Mode& mode, Function function) {
  const Format& format = mode.format();
  const auto value = [=](uint64_t a) {
    return mode.result(from_double(format, function(to_double(format, mode.input(a)))));
  };
  return lanewise(d, mode.type, by_element(mode.type, value), mode.type);
}

// rcp and rsqrt .approx.ftz.f64 see and make only the upper word.
Handler upper_word(const Decoder& d, const Mode& mode, Function function) {
  return lanewise(
      d, mode.type,
      [=](uint64_t a) -> uint64_t {
        constexpr uint64_t kUpper = 0xffffffff00000000;
        a = mode.input(a & kUpper);
        const double result = function(std::bit_cast<double>(a));
        if (std::isnan(result)) return 0x7fffffff00000000;
        return mode.result((std::bit_cast<uint64_t>(result) + 0x80000000) & kUpper);
      },
      mode.type);
}

double reciprocal(double a) { return 1 / a; }
double reciprocal_root(double a) { return 1 / std::sqrt(a); }

Handler divide(const Decoder& d) {
  const std::string_view name = take_one_of(d, "approx full rn rz rm rp");
  const bool flush = d.take("ftz"), approximate = name == "approx" || name == "full";
  const Type& type = take_type(d, flush || approximate ? "f32" : "f32 f64");
  const Mode mode{type, rounding_named(name), flush};
  if (!approximate) return binary(d, mode, Operation::kDivide);
  // div.approx multiplies by the reciprocal, which is lost where it would be subnormal.
  const double limit = name == "approx" ? 0x1p126 : INFINITY;
  return lanewise(
      d, type,
      [=](uint64_t a, uint64_t b) {
        const double x = to_double(kF32, mode.input(a)), y = to_double(kF32, mode.input(b));
        const double quotient = std::fabs(y) > limit ? x * std::copysign(0.0, y) : x / y;
        return mode.result(from_double(kF32, quotient));
      },
      type, type);
}

// rcp and sqrt, rounded or approximate.
Handler reciprocal_or_root(const Decoder& d, bool root) {
  const std::string_view name = take_one_of(d, "approx rn rz rm rp");
  const bool flush = d.take("ftz"), approximate = name == "approx";
  const bool has_f64 = approximate ? flush && !root : !flush;
  const Type& type = take_type(d, has_f64 ? "f32 f64" : "f32");
  const Mode mode{type, rounding_named(name), flush};
  if (approximate && type.bits == 64) return upper_word(d, mode, reciprocal);
  if (approximate) return approximation(d, mode, root ? static_cast<Function>(std::sqrt) : reciprocal);
  return lanewise(
      d, type,
      [=, one = type.format->one()](uint64_t a) {
        return root ? compute(mode, Operation::kRoot, a, 0, 0) : compute(mode, Operation::kDivide, one, a, 0);
      },
      type);
}

Handler transcendental(const Decoder& d, Function function) {
  const std::string& op = d.instruction.opcode;
  if (!d.take("approx")) d.unknown("precision");
  const bool flush = op != "tanh" && d.take("ftz");
  std::string allowed = "f32";
  if (op == "tanh") allowed = "f16 f16x2 bf16 bf16x2 f32";
  if (op == "ex2") allowed = flush ? "f32 bf16 bf16x2" : "f32 f16 f16x2";
  if (op == "rsqrt") allowed = "f32 f64";
  const Mode mode{take_type(d, allowed), Rounding::kEven, flush};
  if (flush && mode.type.bits == 64) return upper_word(d, mode, function);
  return approximation(d, mode, function);
}

struct Extremum {
  Mode mode;
  bool high, propagates, xor_signs;

  uint64_t operator()(uint64_t a, uint64_t b) const {
    const Format& format = mode.format();
    const uint64_t sign = (a ^ b) & format.sign();
    a = mode.input(a), b = mode.input(b);
    if (format.is_nan(a) && (format.is_nan(b) || propagates)) return format.nan();
    if (format.is_nan(b) && propagates) return format.nan();
    if (xor_signs) a &= ~format.sign(), b &= ~format.sign();
    const bool less = format.order(a) < format.order(b) || (format.order(a) == format.order(b) && a & format.sign());
    const uint64_t picked = format.is_nan(a) ? b : format.is_nan(b) ? a : less != high ? a : b;
    return xor_signs ? picked | sign : picked;
  }
};

Handler extremum(const Decoder& d) {
  const bool flush = d.take("ftz"), propagates = d.take("NaN"), xor_signs = d.take("xorsign");
  if (xor_signs) take_one_of(d, "abs");
  std::string allowed = "f16 f16x2 f32";
  if (!flush) allowed += " bf16 bf16x2";
  if (!flush && !propagates && !xor_signs) allowed += " f64";
  const Type& type = take_type(d, allowed);
  const Extremum pick{{type, Rounding::kEven, flush}, d.instruction.opcode == "max", propagates, xor_signs};
  return lanewise(d, type, by_element(type, pick), type, type);
}

Handler change_sign(const Decoder& d) {
  const bool flush = d.take("ftz"), negate = d.instruction.opcode == "neg";
  const Type& type = take_type(d, flush ? "f16 f16x2 f32" : "f16 f16x2 bf16 bf16x2 f32 f64");
  const Mode mode{type, Rounding::kEven, flush};
  const auto value = [=](uint64_t a) {
    const Format& format = mode.format();
    // abs.f64 passes a NaN through; of all others it is not specified, so they keep their bits.
    if (!negate && format.bits == 64 && format.is_nan(a)) return a;
    a = mode.input(a);
    return negate ? a ^ format.sign() : a & ~format.sign();
  };
  return lanewise(d, type, by_element(type, value), type);
}

Handler copy_sign(const Decoder& d) {
  const Type& type = take_type(d, "f32 f64");
  const uint64_t sign = type.format->sign();
  return lanewise(d, type, [=](uint64_t a, uint64_t b) { return (a & sign) | (b & ~sign); }, type, type);
}

}  // namespace

Handler decode_float(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "add") return binary(d, take_mode(d, false, false), Operation::kAdd);
  if (op == "sub") return binary(d, take_mode(d, false, false), Operation::kSubtract);
  if (op == "mul") return binary(d, take_mode(d, false, false), Operation::kMultiply);
  if (op == "fma" || op == "mad") return multiply_add(d, op == "fma");
  if (op == "div") return divide(d);
  if (op == "rcp" || op == "sqrt") return reciprocal_or_root(d, op == "sqrt");
  if (op == "rsqrt") return transcendental(d, reciprocal_root);
  if (op == "ex2") return transcendental(d, std::exp2);
  if (op == "lg2") return transcendental(d, std::log2);
  if (op == "sin") return transcendental(d, std::sin);
  if (op == "cos") return transcendental(d, std::cos);
  if (op == "tanh") return transcendental(d, std::tanh);
  if (op == "min" || op == "max") return extremum(d);
  if (op == "abs" || op == "neg") return change_sign(d);
  if (op == "copysign") return copy_sign(d);
  return {};
}

}  // namespace emulator
