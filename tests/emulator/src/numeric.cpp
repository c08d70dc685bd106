#include "numeric.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace emulator {
namespace {

constexpr int kTop = 124;  // of a normalised significand, so that a sum has room below 2^126

int width_of(Uint128 value) {
  const auto high = static_cast<uint64_t>(value >> 64);
  return high ? 128 - std::countl_zero(high) : 64 - std::countl_zero(static_cast<uint64_t>(value));
}

// Whatever is shifted out stays in the lowest bit.
Uint128 shift_right(Uint128 value, int by) {
  if (by == 0) return value;
  if (by >= 128) return value != 0;
  return value >> by | ((value & ((Uint128{1} << by) - 1)) != 0);
}

// The same value with bit `top` the highest one; `top` is not below where it is now.
Real normalised(Real a, int top) {
  const int by = top + 1 - width_of(a.significand);
  a.significand <<= by;
  a.exponent -= by;
  return a;
}

// The significand in units of 2^unit; where the unit is the finer one, the result must fit.
Uint128 rounded(const Real& a, int unit, Rounding rounding) {
  if (unit <= a.exponent) return a.significand << (a.exponent - unit);
  // Below 2^126, all of it is less than half a unit of 2^127.
  const int by = std::min(unit - a.exponent, 127);
  const Uint128 kept = a.significand >> by, half = Uint128{1} << (by - 1), lost = a.significand & (2 * half - 1);
  switch (rounding) {
    case Rounding::kEven:
      return kept + (lost > half || (lost == half && (kept & 1)));
    case Rounding::kAway:
      return kept + (lost >= half);
    case Rounding::kDown:
      return kept + (lost != 0 && a.negative);
    case Rounding::kUp:
      return kept + (lost != 0 && !a.negative);
    default:
      return kept;
  }
}

Real infinity(bool negative) { return {Real::Kind::kInfinity, negative}; }
Real zero(bool negative) { return {Real::Kind::kFinite, negative}; }
Real nan() { return {Real::Kind::kNan}; }

}  // namespace

Real unpack(const Format& format, uint64_t bits) {
  const bool negative = bits & format.sign();
  if (format.is_nan(bits)) return nan();
  const uint64_t magnitude = bits & (format.sign() - 1), hidden = 1ull << format.fraction_bits();
  if (format.has_infinity && magnitude == format.infinity()) return infinity(negative);
  const auto field = static_cast<int>(magnitude >> format.fraction_bits());
  const uint64_t fraction = magnitude & (hidden - 1);
  return {Real::Kind::kFinite, negative, std::max(field, 1) - format.bias - format.fraction_bits(),
          field ? fraction | hidden : fraction};
}

uint64_t pack(const Format& format, const Real& value, Rounding rounding, bool finite) {
  if (value.is_nan()) return format.nan();
  const uint64_t sign = value.negative ? format.sign() : 0;
  if (value.is_infinite()) return sign | (finite ? format.largest() : format.infinity());
  if (value.is_zero()) return sign;
  const int least = 1 - format.bias - format.fraction_bits();
  const int unit = std::max(value.exponent + width_of(value.significand) - format.precision, least);
  // What is carried out of the fraction goes into the exponent, where it belongs; so does the hidden bit.
  const auto significand = static_cast<uint64_t>(rounded(value, unit, rounding));
  const auto exponent = static_cast<uint64_t>(unit - least);
  if (exponent < 1ull << (format.bits - format.precision)) {
    const uint64_t magnitude = (exponent << format.fraction_bits()) + significand;
    if (magnitude <= format.largest()) return sign | magnitude;
  }
  const bool inwards = rounding == Rounding::kZero || rounding == (value.negative ? Rounding::kUp : Rounding::kDown);
  return sign | (finite || inwards ? format.largest() : format.infinity());
}

Real add(const Real& a, const Real& b, Rounding rounding) {
  if (a.is_nan() || b.is_nan()) return nan();
  if (a.is_infinite()) return b.is_infinite() && a.negative != b.negative ? nan() : a;
  if (b.is_infinite()) return b;
  const Real cancelled = zero(rounding == Rounding::kDown);
  if (a.is_zero() && b.is_zero()) return a.negative == b.negative ? a : cancelled;
  if (a.is_zero()) return b;
  if (b.is_zero()) return a;
  Real high = normalised(a, kTop), low = normalised(b, kTop);
  if (high.exponent < low.exponent) std::swap(high, low);
  // Bits are lost only where the exponents are further apart than a product has room, and then the difference has its
  // highest bit at kTop or next to it: the lowest bit decides nothing but which side of a tie it is.
  const Uint128 aligned = shift_right(low.significand, high.exponent - low.exponent);
  if (high.negative == low.negative) {
    high.significand += aligned;
  } else if (high.significand >= aligned) {
    high.significand -= aligned;
  } else {
    high.significand = aligned - high.significand;
    high.negative = low.negative;
  }
  return high.significand == 0 ? cancelled : high;
}

Real multiply(const Real& a, const Real& b) {
  const bool negative = a.negative != b.negative;
  if (a.is_nan() || b.is_nan()) return nan();
  if (a.is_infinite() || b.is_infinite()) return a.is_zero() || b.is_zero() ? nan() : infinity(negative);
  return {Real::Kind::kFinite, negative, a.exponent + b.exponent, a.significand * b.significand};
}

Real divide(const Real& a, const Real& b) {
  const bool negative = a.negative != b.negative;
  if (a.is_nan() || b.is_nan() || (a.is_zero() && b.is_zero()) || (a.is_infinite() && b.is_infinite())) return nan();
  if (a.is_infinite() || b.is_zero()) return infinity(negative);
  if (b.is_infinite() || a.is_zero()) return zero(negative);
  const Real dividend = normalised(a, kTop);
  const Uint128 quotient = dividend.significand / b.significand, rest = dividend.significand % b.significand;
  return {Real::Kind::kFinite, negative, dividend.exponent - b.exponent, quotient | (rest != 0)};
}

Real square_root(const Real& a) {
  if (a.is_nan() || a.is_zero()) return a;
  if (a.negative) return nan();
  if (a.is_infinite()) return a;
  Real radicand = normalised(a, kTop);
  if (radicand.exponent % 2 != 0) radicand.significand <<= 1, --radicand.exponent;
  // Digit by digit, from the highest: `root` so far, with its square taken off `rest`.
  Uint128 rest = radicand.significand, root = 0;
  for (Uint128 digit = Uint128{1} << kTop; digit; digit >>= 2) {
    const bool fits = rest >= root + digit;
    if (fits) rest -= root + digit;
    root = root >> 1 | (fits ? digit : 0);
  }
  return {Real::Kind::kFinite, false, radicand.exponent / 2, root | (rest != 0)};
}

Real integral(const Real& a, Rounding rounding) {
  if (a.kind != Real::Kind::kFinite || a.exponent >= 0) return a;
  return {Real::Kind::kFinite, a.negative, 0, rounded(a, 0, rounding)};
}

uint64_t to_integer(const Real& value, Rounding rounding, bool is_signed, int bits) {
  if (value.is_nan()) return 0;
  const uint64_t all = ~0ull >> (64 - bits), highest = is_signed ? all >> 1 : all;
  const uint64_t limit = !value.negative ? highest : is_signed ? highest + 1 : 0;
  const bool beyond = value.is_infinite() || value.exponent + width_of(value.significand) > 64;
  const Uint128 magnitude = beyond ? limit : std::min<Uint128>(rounded(value, 0, rounding), limit);
  const auto result = static_cast<uint64_t>(magnitude);
  return (value.negative ? 0 - result : result) & all;
}

double to_double(const Format& format, uint64_t bits) {
  if (format.bits == 64) return std::bit_cast<double>(bits);
  if (format.bits == 32) return std::bit_cast<float>(static_cast<uint32_t>(bits));
  return std::bit_cast<double>(pack(kF64, unpack(format, bits)));
}

uint64_t from_double(const Format& format, double value) {
  if (std::isnan(value)) return format.nan();
  const auto bits = std::bit_cast<uint64_t>(value);
  if (format.bits == 64) return bits;
  if (format.bits == 32) return std::bit_cast<uint32_t>(static_cast<float>(value));
  return pack(format, unpack(kF64, bits));
}

}  // namespace emulator
