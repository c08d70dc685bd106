// Comparisons, and what selects by them.
#include <algorithm>

#include "lanes.h"

namespace emulator {
namespace {

constexpr char kBitTypes[] = "b16 b32 b64", kUnsignedTypes[] = "u16 u32 u64", kSignedTypes[] = "s16 s32 s64";
constexpr char kFloatTypes[] = "f16 bf16 f16x2 bf16x2 f32 f64";

enum Relation : uint8_t { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };

// What of two numbers makes a comparison true, and for which types there is such a one.
struct Comparison {
  std::string_view name;
  uint8_t relations;
  bool of_bits, of_signed, of_unsigned, of_floats;
};
constexpr Comparison kComparisons[] = {
    {"eq", kEqual, true, true, true, true},
    {"ne", kLess | kGreater, true, true, true, true},
    {"lt", kLess, false, true, true, true},
    {"le", kLess | kEqual, false, true, true, true},
    {"gt", kGreater, false, true, true, true},
    {"ge", kGreater | kEqual, false, true, true, true},
    {"lo", kLess, false, false, true, false},
    {"ls", kLess | kEqual, false, false, true, false},
    {"hi", kGreater, false, false, true, false},
    {"hs", kGreater | kEqual, false, false, true, false},
    {"equ", kEqual | kUnordered, false, false, false, true},
    {"neu", kLess | kGreater | kUnordered, false, false, false, true},
    {"ltu", kLess | kUnordered, false, false, false, true},
    {"leu", kLess | kEqual | kUnordered, false, false, false, true},
    {"gtu", kGreater | kUnordered, false, false, false, true},
    {"geu", kGreater | kEqual | kUnordered, false, false, false, true},
    {"num", kLess | kEqual | kGreater, false, false, false, true},
    {"nan", kUnordered, false, false, false, true},
};

const Comparison& take_comparison(const Decoder& d) {
  const std::string name = d.next();
  const auto* comparison = std::ranges::find(kComparisons, name, &Comparison::name);
  if (comparison == std::end(kComparisons)) d.unknown("comparison");
  return *comparison;
}

Relation relation(const Type& type, bool flush, uint64_t a, uint64_t b) {
  if (type.is_float()) {
    const Format& format = *type.format;
    if (format.is_nan(a) || format.is_nan(b)) return kUnordered;
    const int64_t x = format.order(flush ? format.flushed(a) : a), y = format.order(flush ? format.flushed(b) : b);
    return x < y ? kLess : x > y ? kGreater : kEqual;
  }
  // The highest bit of a signed number counts the other way.
  const uint64_t flip = type.is_signed() ? 1ull << (type.bits - 1) : 0;
  return a == b ? kEqual : (a ^ flip) < (b ^ flip) ? kLess : kGreater;
}

enum class Boolean : uint8_t { kNone, kAnd, kOr, kXor };

Boolean take_boolean(const Decoder& d) {
  if (d.take("and")) return Boolean::kAnd;
  if (d.take("or")) return Boolean::kOr;
  return d.take("xor") ? Boolean::kXor : Boolean::kNone;
}

// What stands between the opcode and the types: comparison, operation with a predicate, flushing.
struct Condition {
  const Comparison& comparison;
  Boolean operation;
  bool flush;
};

Condition take_condition(const Decoder& d) {
  const Comparison& comparison = take_comparison(d);
  const Boolean operation = take_boolean(d);
  return {comparison, operation, d.take("ftz")};
}

const Type& take_compared(const Decoder& d, const Condition& condition) {
  const Comparison& c = condition.comparison;
  std::string allowed;
  if (condition.flush) return take_type(d, c.of_floats ? "f16 f16x2 f32" : "");
  if (c.of_bits) allowed += std::string(" ") + kBitTypes;
  if (c.of_signed) allowed += std::string(" ") + kSignedTypes;
  if (c.of_unsigned) allowed += std::string(" ") + kUnsignedTypes;
  if (c.of_floats) allowed += std::string(" ") + kFloatTypes;
  return take_type(d, allowed);
}

// The sources of set and setp, and what becomes of them.
class Test {
 public:
  Test(const Decoder& d, const Condition& condition, const Type& type)
      : type_(type),
        condition_(condition),
        a_(d, 1, type),
        b_(d, 2, type),
        other_(condition.operation == Boolean::kNone ? a_ : Input(d, 3, type_named("pred"))) {
    d.operands(condition.operation == Boolean::kNone ? 3 : 4);
  }

  bool operator()(Context& c, int lane, int element, bool complement) const {
    const int shift = type_.bits * element;
    const uint64_t mask = ~0ull >> (64 - type_.bits);
    const uint64_t a = a_.get(c, lane) >> shift & mask, b = b_.get(c, lane) >> shift & mask;
    const bool result =
        ((relation(type_, condition_.flush, a, b) & condition_.comparison.relations) != 0) != complement;
    switch (condition_.operation) {
      case Boolean::kAnd:
        return result && other_.get(c, lane);
      case Boolean::kOr:
        return result || other_.get(c, lane);
      case Boolean::kXor:
        return result != static_cast<bool>(other_.get(c, lane));
      default:
        return result;
    }
  }

 private:
  Type type_;
  Condition condition_;
  Input a_, b_, other_;
};

// p|q: of a packed type the results of both elements, else the result and what its complement gives.
Handler set_predicate(const Decoder& d) {
  const Condition condition = take_condition(d);
  const Type &type = take_compared(d, condition), &predicate = type_named("pred");
  d.expect_done();
  const Operand& to = d.operand(0);
  const bool pair = to.kind == Operand::Kind::kPair, packed = type.count == 2;
  if (packed ? !pair : pair && type.bits == 16 && type.is_float()) d.unknown("destination");
  int destinations[2] = {-1, -1}, count = 0;
  for (int i = 0; i < (pair ? 2 : 1); ++i) {
    const Operand& operand = pair ? to.elements[static_cast<size_t>(i)] : to;
    if (operand.kind == Operand::Kind::kSink) continue;
    destinations[i] = destination_of(d, operand, predicate), ++count;
  }
  if (pair && count == 0) d.unknown("destination");
  return [test = Test(d, condition, type), p = destinations[0], q = destinations[1], packed](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const bool first = test(c, lane, 0, false), second = q >= 0 && test(c, lane, packed, !packed);
      if (p >= 0) c.warp.reg(p)[lane] = first;
      if (q >= 0) c.warp.reg(q)[lane] = second;
    });
    return Outcome::kNext;
  };
}

// True is 1.0 of a floating-point type and all ones of another.
Handler set(const Decoder& d) {
  const Condition condition = take_condition(d);
  const Type* compared = last_type(d);
  if (compared == nullptr) d.unknown("type");
  std::string results = condition.flush ? "u32 s32 f32 f16" : "u32 s32 f32 f16 bf16";
  if (compared->is_float() && compared->bits == 16) {
    results = "u32 s32 " + std::string(compared->name) + (compared->count == 1 ? " u16 s16" : "");
    if (compared->format == &kF16 && compared->count == 1 && !condition.flush) results += " bf16";
  }
  const Type& to = take_type(d, results);
  const Type& type = take_compared(d, condition);
  d.expect_done();
  const int count = type.count, bits = to.width() / count;
  const uint64_t truth = to.is_float() ? to.format->one() : ~0ull >> (64 - bits);
  return assign(destination_of(d, 0, to), [=, test = Test(d, condition, type)](Context& c, int lane) {
    uint64_t result = 0;
    for (int i = 0; i < count; ++i) result |= test(c, lane, i, false) ? truth << bits * i : 0;
    return result;
  });
}

constexpr char kSelectable[] = "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64";

Handler select_by_predicate(const Decoder& d) {
  const Type& type = take_type(d, kSelectable);
  const auto pick = [](uint64_t a, uint64_t b, uint64_t p) { return p ? a : b; };
  return lanewise(d, type, pick, type, type, type_named("pred"));
}

// The first where the selector is not negative; -0.0 is not, NaN is.
Handler select_by_sign(const Decoder& d) {
  const bool flush = d.take("ftz");
  const Type& type = take_type(d, kSelectable);
  const Type& selector = take_type(d, flush ? "f32" : "s32 f32");
  const auto pick = [=](uint64_t a, uint64_t b, uint64_t c) {
    return relation(selector, flush, c, 0) & (kGreater | kEqual) ? a : b;
  };
  return lanewise(d, type, pick, type, type, selector);
}

struct Property {
  std::string_view name;
  bool (*holds)(const Format& format, uint64_t magnitude);
};
constexpr Property kProperties[] = {
    {"finite", [](const Format& format, uint64_t magnitude) { return magnitude < format.infinity(); }},
    {"infinite", [](const Format& format, uint64_t magnitude) { return magnitude == format.infinity(); }},
    {"number", [](const Format& format, uint64_t magnitude) { return magnitude <= format.infinity(); }},
    {"notanumber", [](const Format& format, uint64_t magnitude) { return magnitude > format.infinity(); }},
    {"normal",
     [](const Format& format, uint64_t magnitude) {
       return magnitude >> format.fraction_bits() != 0 && magnitude < format.infinity();
     }},
    {"subnormal", [](const Format& format, uint64_t magnitude) { return format.is_subnormal(magnitude); }},
};

Handler test_property(const Decoder& d) {
  const std::string name = d.next();
  const auto* property = std::ranges::find(kProperties, name, &Property::name);
  if (property == std::end(kProperties)) d.unknown("property");
  const Type& type = take_type(d, "f32 f64");
  const auto holds = [property, &format = *type.format](uint64_t a) {
    return property->holds(format, a & (format.sign() - 1));
  };
  return lanewise(d, type_named("pred"), holds, type);
}

}  // namespace

Handler decode_compare(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "setp") return set_predicate(d);
  if (op == "set") return set(d);
  if (op == "selp") return select_by_predicate(d);
  if (op == "slct") return select_by_sign(d);
  if (op == "testp") return test_property(d);
  return {};
}

}  // namespace emulator
