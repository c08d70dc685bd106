#include "reduce.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>

namespace emulator {
namespace {

// A binary format of 16 bits with `kFraction` bits of fraction. Sums of two values, rounded to float and then to the
// format, are those rounded once: float has more than twice the digits.
template <int kFraction>
struct Half {
  static constexpr int kExponentBits = 15 - kFraction, kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr int kLeast = 1 - kBias - kFraction;  // exponent of the smallest subnormal
  static constexpr uint64_t kInfinity = ((1u << kExponentBits) - 1) << kFraction, kNan = 0x7fff;

  static bool is_nan(uint64_t bits) { return (bits & 0x7fff) > kInfinity; }
  static float decode(uint64_t bits) {
    const auto field = static_cast<int>((bits & 0x7fff) >> kFraction);
    const auto fraction = static_cast<int>(bits & ((1u << kFraction) - 1));
    float magnitude = std::ldexp(static_cast<float>(fraction), kLeast);
    if (field > 0) magnitude = std::ldexp(static_cast<float>(fraction + (1 << kFraction)), kLeast + field - 1);
    if ((bits & 0x7fff) == kInfinity) magnitude = INFINITY;
    return bits & 0x8000 ? -magnitude : magnitude;
  }
  static uint64_t encode(float value) {
    if (std::isnan(value)) return kNan;
    const uint64_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (magnitude == 0 || std::isinf(magnitude)) return sign | (magnitude == 0 ? 0 : kInfinity);
    // In units of the last place, so that the default rounding of nearbyint is the format's. A carry moves on into the
    // exponent, and from the largest one into infinity.
    const int unit = std::max(std::ilogb(magnitude) - kFraction, kLeast);
    const auto significand = static_cast<uint64_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
    const uint64_t encoded = (static_cast<uint64_t>(unit - kLeast) << kFraction) + significand;
    return sign | std::min(encoded, kInfinity);
  }

  static uint64_t add(uint64_t a, uint64_t b) {
    if (is_nan(a) || is_nan(b)) return kNan;
    return encode(decode(a) + decode(b));
  }
  // Order of the values, with -0 below +0.
  static int order(uint64_t bits) {
    const int magnitude = static_cast<int>(bits & 0x7fff);
    return bits & 0x8000 ? -1 - magnitude : magnitude;
  }
  template <bool kMax>
  static uint64_t extreme(uint64_t a, uint64_t b) {
    if (is_nan(a)) return is_nan(b) ? kNan : b;
    if (is_nan(b)) return a;
    return (order(a) < order(b)) == kMax ? b : a;
  }
};

using F16 = Half<10>;
using Bf16 = Half<7>;

float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

uint64_t add_f32(uint64_t a, uint64_t b) {
  const auto decode = [](uint64_t bits) { return flushed(std::bit_cast<float>(static_cast<uint32_t>(bits))); };
  const float sum = flushed(decode(a) + decode(b));
  return std::isnan(sum) ? 0x7fffffff : std::bit_cast<uint32_t>(sum);
}

uint64_t add_f64(uint64_t a, uint64_t b) {
  return std::bit_cast<uint64_t>(std::bit_cast<double>(a) + std::bit_cast<double>(b));
}

template <class T>
uint64_t add(uint64_t a, uint64_t b) {
  return static_cast<T>(a + b);
}
template <class T>
uint64_t min(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(std::min(static_cast<T>(a), static_cast<T>(b)));
}
template <class T>
uint64_t max(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(std::max(static_cast<T>(a), static_cast<T>(b)));
}

// Counters from 0 to `limit`, and back.
uint64_t increment(uint64_t old, uint64_t limit) { return old >= limit ? 0 : old + 1; }
uint64_t decrement(uint64_t old, uint64_t limit) { return old == 0 || old > limit ? limit : old - 1; }

const std::map<std::string, Reduction> kReductions = {
    {"add.u32", {add<uint32_t>, 4, true}},
    {"add.s32", {add<uint32_t>, 4, true}},
    {"add.u64", {add<uint64_t>, 8, true}},
    {"add.f16", {F16::add, 2, false}},
    {"add.bf16", {Bf16::add, 2, false}},
    {"add.f32", {add_f32, 4, false}},
    {"add.f64", {add_f64, 8, false}},
    {"min.u32", {min<uint32_t>, 4, true}},
    {"min.s32", {min<int32_t>, 4, true}},
    {"min.u64", {min<uint64_t>, 8, false}},
    {"min.s64", {min<int64_t>, 8, false}},
    {"min.f16", {F16::extreme<false>, 2, false}},
    {"min.bf16", {Bf16::extreme<false>, 2, false}},
    {"max.u32", {max<uint32_t>, 4, true}},
    {"max.s32", {max<int32_t>, 4, true}},
    {"max.u64", {max<uint64_t>, 8, false}},
    {"max.s64", {max<int64_t>, 8, false}},
    {"max.f16", {F16::extreme<true>, 2, false}},
    {"max.bf16", {Bf16::extreme<true>, 2, false}},
    {"inc.u32", {increment, 4, true}},
    {"dec.u32", {decrement, 4, true}},
    {"and.b32", {[](uint64_t a, uint64_t b) { return a & b; }, 4, true}},
    {"or.b32", {[](uint64_t a, uint64_t b) { return a | b; }, 4, true}},
    {"xor.b32", {[](uint64_t a, uint64_t b) { return a ^ b; }, 4, true}},
    {"and.b64", {[](uint64_t a, uint64_t b) { return a & b; }, 8, false}},
    {"or.b64", {[](uint64_t a, uint64_t b) { return a | b; }, 8, false}},
    {"xor.b64", {[](uint64_t a, uint64_t b) { return a ^ b; }, 8, false}},
};

}  // namespace

const Reduction* find_reduction(const std::string& op, const std::string& type) {
  const auto found = kReductions.find(op + "." + type);
  return found == kReductions.end() ? nullptr : &found->second;
}

void reduce(const Reduction& reduction, uint8_t* target, const uint8_t* value, uint32_t first, uint32_t last) {
  for (uint32_t i = first; i < last; i += reduction.bytes) {
    uint64_t a = 0, b = 0;
    std::memcpy(&a, target + i, reduction.bytes);
    std::memcpy(&b, value + i, reduction.bytes);
    a = reduction.combine(a, b);
    std::memcpy(target + i, &a, reduction.bytes);
  }
}

}  // namespace emulator
