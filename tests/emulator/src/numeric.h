// Binary floating-point formats, and arithmetic that is exact until it is rounded, in any direction.
//
// The host's own arithmetic rounds to nearest even only: changing its mode would have to be hidden from the compiler,
// and it has no BF16, TF32 or FP8.
#pragma once
#include <bit>
#include <cstdint>

namespace emulator {

using Uint128 = unsigned __int128;

enum class Rounding : uint8_t { kEven, kAway, kZero, kDown, kUp };  // kAway: to nearest, ties away from zero

struct Format {
  int bits;       // of the encoding
  int precision;  // bits of the significand, with the hidden one
  int bias;
  bool has_infinity;  // E4M3 has none: its highest exponent holds numbers, and one NaN of either sign

  int fraction_bits() const { return precision - 1; }
  uint64_t sign() const { return 1ull << (bits - 1); }
  uint64_t infinity() const { return sign() - (1ull << fraction_bits()); }
  // What instructions make; each NaN of FP32 and narrower becomes this one.
  uint64_t nan() const { return bits == 64 ? 0xfff8000000000000 : sign() - 1; }
  uint64_t largest() const { return (has_infinity ? infinity() : nan()) - 1; }
  uint64_t one() const { return static_cast<uint64_t>(bias) << fraction_bits(); }
  bool is_nan(uint64_t value) const { return (value & (sign() - 1)) > (has_infinity ? infinity() : largest()); }
  bool is_subnormal(uint64_t value) const {
    const uint64_t magnitude = value & (sign() - 1);
    return magnitude != 0 && magnitude < 1ull << fraction_bits();
  }
  // Zero of the same sign for a subnormal number.
  uint64_t flushed(uint64_t value) const { return is_subnormal(value) ? value & sign() : value; }
  // Orders all numbers; -0 and +0 are equal.
  int64_t order(uint64_t value) const {
    const auto magnitude = static_cast<int64_t>(value & (sign() - 1));
    return value & sign() ? -magnitude : magnitude;
  }
};

inline constexpr Format kF16{16, 11, 15, true}, kBf16{16, 8, 127, true}, kF32{32, 24, 127, true},
    kF64{64, 53, 1023, true}, kE4m3{8, 4, 7, false}, kE5m2{8, 3, 15, true},
    kTf32{19, 11, 127, true};  // the upper bits of a register

// A number significand * 2^exponent, an infinity or a NaN. Of a result that does not fit, the lowest bit of the
// significand stands for all that lies below it, far below what rounding needs.
struct Real {
  enum class Kind : uint8_t { kFinite, kInfinity, kNan };
  Kind kind = Kind::kFinite;
  bool negative = false;
  int exponent = 0;
  Uint128 significand = 0;  // below 2^126

  bool is_nan() const { return kind == Kind::kNan; }
  bool is_infinite() const { return kind == Kind::kInfinity; }
  bool is_zero() const { return kind == Kind::kFinite && significand == 0; }
};

Real unpack(const Format& format, uint64_t bits);
// Beyond the largest number lies infinity, or that number: as the rounding says, or with `finite` always the number.
uint64_t pack(const Format& format, const Real& value, Rounding rounding = Rounding::kEven, bool finite = false);

Real add(const Real& a, const Real& b, Rounding rounding);  // which only picks the zero of x - x
Real multiply(const Real& a, const Real& b);
Real divide(const Real& a, const Real& b);
Real square_root(const Real& a);
Real integral(const Real& a, Rounding rounding);

// Clamped to `bits` bits; NaN is 0. A signed result is in two's complement.
uint64_t to_integer(const Real& value, Rounding rounding, bool is_signed, int bits);

double to_double(const Format& format, uint64_t bits);  // exact
uint64_t from_double(const Format& format, double value);

}  // namespace emulator
