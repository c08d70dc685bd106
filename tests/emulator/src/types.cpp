#include "types.h"

namespace emulator {
namespace {

using Kind = Type::Kind;

constexpr Type kTypes[] = {
    {"b8", Kind::kBits, 8, 1},
    {"b16", Kind::kBits, 16, 1},
    {"b32", Kind::kBits, 32, 1},
    {"b64", Kind::kBits, 64, 1},
    {"u2", Kind::kUnsigned, 2, 1},
    {"u4", Kind::kUnsigned, 4, 1},
    {"u8", Kind::kUnsigned, 8, 1},
    {"u16", Kind::kUnsigned, 16, 1},
    {"u32", Kind::kUnsigned, 32, 1},
    {"u64", Kind::kUnsigned, 64, 1},
    {"s2", Kind::kSigned, 2, 1},
    {"s4", Kind::kSigned, 4, 1},
    {"s8", Kind::kSigned, 8, 1},
    {"s16", Kind::kSigned, 16, 1},
    {"s32", Kind::kSigned, 32, 1},
    {"s64", Kind::kSigned, 64, 1},
    {"u16x2", Kind::kUnsigned, 16, 2},
    {"s16x2", Kind::kSigned, 16, 2},
    {"f16", Kind::kFloat, 16, 1, &kF16},
    {"bf16", Kind::kFloat, 16, 1, &kBf16},
    {"f32", Kind::kFloat, 32, 1, &kF32},
    {"f64", Kind::kFloat, 64, 1, &kF64},
    {"tf32", Kind::kFloat, 32, 1, &kTf32},
    {"f16x2", Kind::kFloat, 16, 2, &kF16},
    {"bf16x2", Kind::kFloat, 16, 2, &kBf16},
    {"e4m3x2", Kind::kFloat, 8, 2, &kE4m3},
    {"e5m2x2", Kind::kFloat, 8, 2, &kE5m2},
    {"pred", Kind::kPredicate, 1, 1},
};

[[noreturn]] void mismatch(const Decoder& d, const Type& type) {
  d.unknown("operand where one of ." + std::string(type.name) + " belongs");
}

bool agrees(const Type& type, const Type& of_register, Fit fit) {
  const bool predicate = type.kind == Kind::kPredicate;
  if (predicate || of_register.kind == Kind::kPredicate) return predicate && of_register.kind == Kind::kPredicate;
  const bool exact = fit != Fit::kConvert || type.count > 1 || type.format == &kBf16 || type.format == &kTf32;
  if (exact ? of_register.width() != type.width() : of_register.width() < type.width()) return false;
  if (of_register.kind == Kind::kBits || type.kind == Kind::kBits) return true;
  if (of_register.is_float() || type.is_float()) return of_register.name == type.name;
  return true;
}

bool register_agrees(const Decoder& d, const Operand& operand, const Type& type, Fit fit) {
  const Type* of_register = find_type(d.placed.function->registers[static_cast<size_t>(operand.index)].type);
  return of_register != nullptr && agrees(type, *of_register, fit);
}

// A float constant as a value of `type`.
Operand converted(const Decoder& d, Operand operand, const Type& type) {
  if (type.kind == Kind::kBits) {
    if (type.width() != 8 * operand.bytes) mismatch(d, type);
    return operand;
  }
  if (type.format != &kF32 && type.format != &kF64) mismatch(d, type);
  const Format& from = operand.bytes == 4 ? kF32 : kF64;
  const auto bits = static_cast<uint64_t>(operand.integer);
  if (from.bits != type.bits) operand.integer = static_cast<int64_t>(pack(*type.format, unpack(from, bits)));
  return operand;
}

}  // namespace

const Type* find_type(std::string_view name) {
  for (const Type& type : kTypes) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

const Type& type_named(std::string_view name) {
  if (const Type* type = find_type(name)) return *type;
  throw Error("there is no type " + std::string(name));
}

const Type* last_type(const Decoder& d) {
  const auto& modifiers = d.instruction.modifiers;
  return modifiers.empty() ? nullptr : find_type(modifiers.back());
}

std::string_view take_one_of(const Decoder& d, const std::string& allowed) {
  if (d.done()) d.unknown("instruction, which ends too early");
  const std::string& modifier = d.instruction.modifiers[d.used];
  const bool known = !modifier.empty() && (" " + allowed + " ").find(" " + modifier + " ") != std::string::npos;
  if (!known) d.unknown("modifier ." + modifier);
  d.next();
  return modifier;
}

const Type& take_type(const Decoder& d, const std::string& allowed) { return type_named(take_one_of(d, allowed)); }

Source source_of(const Decoder& d, const Operand& operand, const Type& type, Fit fit) {
  Operand checked = operand;
  switch (operand.kind) {
    case Operand::Kind::kRegister:
      if (!register_agrees(d, operand, type, fit)) mismatch(d, type);
      if (operand.negated && type.kind != Kind::kPredicate) mismatch(d, type);
      break;
    case Operand::Kind::kInteger:
      if (type.is_float()) mismatch(d, type);
      if (type.kind == Kind::kPredicate) checked.integer = operand.integer != 0;
      break;
    case Operand::Kind::kFloat:
      checked = converted(d, operand, type);
      break;
    case Operand::Kind::kSpecial:
      if (fit == Fit::kExact || type.is_float()) mismatch(d, type);
      break;
    default:  // an address
      if (type.is_float() || type.width() < 32) mismatch(d, type);
  }
  return d.source(checked);
}

int destination_of(const Decoder& d, const Operand& operand, const Type& type, Fit fit) {
  if (operand.kind != Operand::Kind::kRegister || operand.negated || !register_agrees(d, operand, type, fit)) {
    mismatch(d, type);
  }
  return d.destination(operand);
}

}  // namespace emulator
