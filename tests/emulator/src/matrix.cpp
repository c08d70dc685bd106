#include "matrix.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace emulator {
namespace {

constexpr int kColumns = 8;     // computed at a time
constexpr int kMostDepth = 32;  // elements of K
// The exponent of a zero: below every other, also with the largest exponent of a factor added.
constexpr int kNever = -20000;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

// Where a floating-point format has its fields.
struct Layout {
  int fraction_bits, bias, top;  // `top` is the exponent field of all ones
};
constexpr Layout kE4m3Layout{3, 7, 15}, kE5m2Layout{2, 15, 31}, kF16Layout{10, 15, 31}, kBf16Layout{7, 127, 255};
constexpr Layout kTf32Layout{10, 127, 255}, kF32Layout{23, 127, 255};

// A value with the exponent that its format gives it, which a subnormal does not lower.
struct Number {
  double value = 0;
  int exponent = kNever;
};

inline double power_of_two(int exponent) { return std::bit_cast<double>(static_cast<uint64_t>(1023 + exponent) << 52); }

Number number(const Layout& layout, uint32_t bits) {
  const uint32_t fraction = bits & ((1u << layout.fraction_bits) - 1);
  const int field = static_cast<int>(bits >> layout.fraction_bits) & layout.top;
  const bool negative = bits >> layout.fraction_bits & static_cast<uint32_t>(layout.top + 1);
  if (field == 0 && fraction == 0) return {};
  const int exponent = std::max(field, 1) - layout.bias;
  const double significand = fraction + (field ? 1u << layout.fraction_bits : 0u);
  const double value = significand * power_of_two(exponent - layout.fraction_bits);
  return {negative ? -value : value, exponent};
}

Number decode(Element element, uint32_t bits) {
  const auto ieee = [](const Layout& layout, uint32_t b) -> Number {
    const uint32_t magnitude = b & (((layout.top + 1u) << layout.fraction_bits) - 1);
    const uint32_t infinity = static_cast<uint32_t>(layout.top) << layout.fraction_bits;
    if (magnitude > infinity) return {kNotANumber};
    if (magnitude == infinity) return {magnitude == b ? kInfinity : -kInfinity};
    return number(layout, b);
  };
  switch (element) {
    case Element::kE4m3:
      if ((bits & 0x7f) == 0x7f) return {kNotANumber};  // and no infinity
      return number(kE4m3Layout, bits);
    case Element::kE5m2:
      return ieee(kE5m2Layout, bits);
    case Element::kF16:
      return ieee(kF16Layout, bits);
    case Element::kBf16:
      return ieee(kBf16Layout, bits);
    case Element::kTf32:
      return ieee(kTf32Layout, bits >> 13);  // the tensor core does not see the rest
    case Element::kS8:
      return {static_cast<double>(static_cast<int8_t>(bits)), 0};
    case Element::kU8:
      return {static_cast<double>(bits), 0};
  }
  return {};
}

using Codes = std::array<Number, 256>;
template <Element kElement>
const Codes& codes() {
  static const Codes all = [] {
    Codes numbers;
    for (int i = 0; i < 256; ++i) numbers[i] = decode(kElement, i);
    return numbers;
  }();
  return all;
}

const Codes* codes_of(Element element) {
  switch (element) {
    case Element::kE4m3:
      return &codes<Element::kE4m3>();
    case Element::kE5m2:
      return &codes<Element::kE5m2>();
    case Element::kS8:
      return &codes<Element::kS8>();
    case Element::kU8:
      return &codes<Element::kU8>();
    default:
      return nullptr;
  }
}

// Calls f(row, k, number) for each element of a matrix that is contiguous in K.
template <class F>
void for_elements(Element element, int rows, int row_bytes, const uint8_t* bytes, F&& f) {
  const int size = size_of(element), depth = row_bytes / size;
  const Codes* table = codes_of(element);
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < depth; ++k, bytes += size) {
      uint32_t bits = 0;
      std::memcpy(&bits, bytes, size);
      f(row, k, table != nullptr ? (*table)[bits] : decode(element, bits));
    }
  }
}

// The accumulator as an integer in quarters of the last place of an f32: kFullBits of fraction.
struct Accumulator {
  int64_t significand = 0;
  int exponent = kNever;
  double special = 0;  // an infinity or NaN
};

template <Result kFormat>
constexpr Layout kLayout = kFormat == Result::kF32 ? kF32Layout : kF16Layout;

template <Result kFormat>
inline Accumulator accumulator(uint32_t bits) {
  constexpr Layout kFields = kLayout<kFormat>;
  const int field = static_cast<int>(bits >> kFields.fraction_bits) & kFields.top;
  const int64_t fraction = bits & ((1u << kFields.fraction_bits) - 1);
  const bool negative = (bits >> kFields.fraction_bits & static_cast<uint32_t>(kFields.top + 1)) != 0;
  if (field == kFields.top) return {0, kNever, fraction ? kNotANumber : negative ? -kInfinity : kInfinity};
  if (field == 0 && fraction == 0) return {};
  const int64_t significand = (fraction + (field ? 1ll << kFields.fraction_bits : 0))
                              << (kFullBits - kFields.fraction_bits);
  return {negative ? -significand : significand, std::max(field, 1) - kFields.bias};
}

inline int64_t shifted_toward_zero(int64_t value, int right) {
  const int64_t sign = value >> 63;
  return ((((value ^ sign) - sign) >> std::min(right, 63)) ^ sign) - sign;
}

template <Result kFormat>
uint32_t encode_special(double value) {
  if (std::isnan(value)) return kFormat == Result::kF32 ? 0x7fffffff : 0x7fff;
  constexpr uint32_t kPositive = static_cast<uint32_t>(kLayout<kFormat>.top) << kLayout<kFormat>.fraction_bits;
  return value > 0 ? kPositive : 2 * kPositive + (1u << kLayout<kFormat>.fraction_bits);
}

// total * 2^unit as an f16 rounded to nearest even, or as an f32 cut toward zero to `kept` bits of fraction. `total`
// has at most 41 bits.
template <Result kFormat>
inline uint32_t encode(int64_t total, int unit, int kept) {
  constexpr Layout kFields = kLayout<kFormat>;
  constexpr int kSmallest = 1 - kFields.bias;
  constexpr uint64_t kPositive = static_cast<uint64_t>(kFields.top) << kFields.fraction_bits;
  constexpr int kSpare = 23;  // bits below, so that there are always some to cut
  if (total == 0) return 0;
  const uint64_t magnitude = static_cast<uint64_t>(std::abs(total)) << kSpare;
  const int exponent = std::max(static_cast<int>(std::bit_width(magnitude)) - 1 + unit - kSpare, kSmallest);
  const int surplus = std::min(exponent - kept - unit + kSpare, 63);
  uint64_t significand = magnitude >> surplus;
  if constexpr (kFormat == Result::kF16) {
    const uint64_t half = 1ull << (surplus - 1), rest = magnitude & (2 * half - 1);
    significand += rest + (significand & 1) > half ? 1 : 0;
  }
  significand <<= kFields.fraction_bits - kept;
  // The leading one of a normal number adds itself to the exponent, and so does a carry of the rounding.
  const uint64_t bits = significand + (static_cast<uint64_t>(exponent - kSmallest) << kFields.fraction_bits);
  const uint64_t sign = total < 0 && significand ? kPositive + (1ull << kFields.fraction_bits) : 0;
  return static_cast<uint32_t>(std::min(bits, kPositive) | sign);
}

// B, with the columns that are computed together side by side.
template <class Real>
struct Panel {
  std::vector<Real> values;        // [k][column]; 0 for infinities and NaN
  std::vector<int16_t> exponents;  // [k][column]
  std::vector<uint8_t> special;    // [column], of an infinity or NaN anywhere
};

// A row of A without its zeros.
template <class Real>
struct Row {
  int count = 0;
  bool special = false;
  std::array<Real, kMostDepth> values;
  std::array<int16_t, kMostDepth> exponents;
  std::array<int, kMostDepth> ks;
};

using Exponents = std::array<int16_t, kColumns>;
using Sums = std::array<int32_t, kColumns>;

// For each of 8 columns the largest exponent of a product.
template <class Real>
inline Exponents largest_exponents(const Row<Real>& row, const Panel<Real>& panel, int columns, int first) {
  typedef int16_t Vector __attribute__((vector_size(sizeof(Exponents))));
  Vector largest = Vector{} + static_cast<int16_t>(kNever), other;
  for (int i = 0; i < row.count; ++i) {
    std::memcpy(&other, &panel.exponents[static_cast<size_t>(row.ks[i]) * columns + first], sizeof other);
    other += row.exponents[i];
    largest = largest > other ? largest : other;
  }
  return std::bit_cast<Exponents>(largest);
}

// For each of 8 columns the sum of products, each in units of 1 / scale and cut toward zero: at most 2^27 each, and
// fewer than 2^31 together. All the products and powers of two are exact.
template <class Real>
inline Sums truncated_products(const Row<Real>& row, const Panel<Real>& panel, int columns, int first,
                               const std::array<Real, kColumns>& scale) {
  constexpr int kLanes = 16 / sizeof(Real), kParts = kColumns / kLanes;
  typedef Real Reals __attribute__((vector_size(16)));
  typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
  Reals scales[kParts], others[kParts];
  Integers sums[kParts] = {};
  std::memcpy(scales, scale.data(), sizeof scales);
  for (int i = 0; i < row.count; ++i) {
    std::memcpy(others, &panel.values[static_cast<size_t>(row.ks[i]) * columns + first], sizeof others);
    for (int part = 0; part < kParts; ++part)
      sums[part] += __builtin_convertvector(others[part] * row.values[i] * scales[part], Integers);
  }
  Sums out;
  std::memcpy(out.data(), sums, sizeof out);
  return out;
}

// A sum with an infinity or NaN in it: IEEE 754 decides, and finite terms are of no account.
double special_sum(const MatrixFormat& format, int row_bytes, const uint8_t* a, const uint8_t* b, double accumulated) {
  double total = accumulated;
  std::array<double, kMostDepth> left;
  for_elements(format.a, 1, row_bytes, a, [&](int, int k, const Number& x) { left[k] = x.value; });
  for_elements(format.b, 1, row_bytes, b,
               [&](int, int k, const Number& y) { total += format.negated ? -left[k] * y.value : left[k] * y.value; });
  return total;
}

template <class Real>
Panel<Real> decode_panel(Element element, int columns, int row_bytes, const uint8_t* b) {
  const size_t size = static_cast<size_t>(row_bytes) / size_of(element) * columns;
  Panel<Real> panel{std::vector<Real>(size), std::vector<int16_t>(size), std::vector<uint8_t>(columns)};
  for_elements(element, columns, row_bytes, b, [&](int column, int k, const Number& y) {
    const bool finite = std::isfinite(y.value);
    panel.values[k * columns + column] = finite ? static_cast<Real>(y.value) : 0;
    panel.exponents[k * columns + column] = static_cast<int16_t>(y.exponent);
    if (!finite) panel.special[column] = 1;
  });
  return panel;
}

template <class Real>
Row<Real> decode_row(const MatrixFormat& format, int row_bytes, const uint8_t* a) {
  Row<Real> row;
  for_elements(format.a, 1, row_bytes, a, [&](int, int k, const Number& x) {
    if (!std::isfinite(x.value)) row.special = true;
    if (!std::isfinite(x.value) || x.value == 0) return;
    row.values[row.count] = static_cast<Real>(format.negated ? -x.value : x.value);
    row.exponents[row.count] = static_cast<int16_t>(x.exponent);
    row.ks[row.count++] = k;
  });
  return row;
}

// Real holds each product exactly: float for those of FP8, f16 and 8-bit integers, double for bf16 and tf32.
template <class Real, Result kFormat>
void multiply_as(const MatrixFormat& format, int rows, int columns, int row_bytes, const uint8_t* a, const uint8_t* b,
                 bool accumulate, uint32_t* d) {
  const Panel<Real> panel = decode_panel<Real>(format.b, columns, row_bytes, b);
  for (int m = 0; m < rows; ++m, a += row_bytes) {
    const Row<Real> row = decode_row<Real>(format, row_bytes, a);
    for (int first = 0; first < columns; first += kColumns, d += kColumns) {
      std::array<Real, kColumns> scale;
      scale.fill(1);
      if constexpr (kFormat == Result::kS32) {
        const Sums sums = truncated_products(row, panel, columns, first, scale);
        for (int i = 0; i < kColumns; ++i) {
          int64_t sum = sums[i] + (accumulate ? static_cast<int64_t>(static_cast<int32_t>(d[i])) : 0);
          if (format.saturated) sum = std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX);
          d[i] = static_cast<uint32_t>(sum);
        }
      } else {
        const int kept = std::min(format.aligned_bits, kLayout<kFormat>.fraction_bits);
        const Exponents largest = largest_exponents(row, panel, columns, first);
        std::array<Accumulator, kColumns> terms{};
        std::array<int, kColumns> units;
        for (int i = 0; i < kColumns; ++i) {
          if (accumulate) terms[i] = accumulator<kFormat>(d[i]);
          units[i] = std::max<int>(largest[i], terms[i].exponent) - format.aligned_bits;
          // Where the limit holds, no product is left whose size could matter.
          const int exponent = std::min(-units[i], std::numeric_limits<Real>::max_exponent - 1);
          scale[i] = static_cast<Real>(power_of_two(exponent));
        }
        const Sums sums = truncated_products(row, panel, columns, first, scale);
        for (int i = 0; i < kColumns; ++i) {
          const Accumulator& term = terms[i];
          if (row.special || panel.special[first + i] || term.special != 0) {
            const uint8_t* column = b + (first + i) * row_bytes;
            d[i] = encode_special<kFormat>(special_sum(format, row_bytes, a, column, term.special));
          } else {
            const int64_t aligned = shifted_toward_zero(term.significand, units[i] + kFullBits - term.exponent);
            d[i] = encode<kFormat>(sums[i] + aligned, units[i], kept);
          }
        }
      }
    }
  }
}

// An exact multiple of 2^-24, an infinity or NaN as an f16.
uint16_t to_f16(double value) {
  if (!std::isfinite(value)) return static_cast<uint16_t>(encode_special<Result::kF16>(value));
  return static_cast<uint16_t>(encode<Result::kF16>(static_cast<int64_t>(std::ldexp(value, 24)), -24, 10));
}

}  // namespace

std::optional<MatrixFormat> matrix_format(const std::string& dtype, const std::string& atype,
                                          const std::string& btype) {
  constexpr std::pair<const char*, Element> kElements[] = {
      {"e4m3", Element::kE4m3}, {"e5m2", Element::kE5m2}, {"f16", Element::kF16}, {"bf16", Element::kBf16},
      {"tf32", Element::kTf32}, {"s8", Element::kS8},     {"u8", Element::kU8}};
  std::optional<Element> a, b;
  for (const auto& [name, element] : kElements) {
    if (atype == name) a = element;
    if (btype == name) b = element;
  }
  if (!a || !b) return std::nullopt;
  if (is_integer(*a) && is_integer(*b) && dtype == "s32") return MatrixFormat{*a, *b, Result::kS32};
  if (is_integer(*a) || (*a != *b && !(is_fp8(*a) && is_fp8(*b)))) return std::nullopt;
  if (dtype == "f32") return MatrixFormat{*a, *b, Result::kF32};
  if (dtype == "f16" && (is_fp8(*a) || *a == Element::kF16)) return MatrixFormat{*a, *b, Result::kF16};
  return std::nullopt;
}

bool is_integer(Element element) { return element == Element::kS8 || element == Element::kU8; }
bool is_fp8(Element element) { return element == Element::kE4m3 || element == Element::kE5m2; }

int size_of(Element element) {
  if (element == Element::kTf32) return 4;
  return element == Element::kF16 || element == Element::kBf16 ? 2 : 1;
}

void multiply(const MatrixFormat& format, int rows, int columns, int row_bytes, const uint8_t* a, const uint8_t* b,
              bool accumulate, uint32_t* d) {
  const bool wide = format.a == Element::kBf16 || format.a == Element::kTf32;
  const auto as = wide                       ? multiply_as<double, Result::kF32>
                  : format.d == Result::kF32 ? multiply_as<float, Result::kF32>
                  : format.d == Result::kF16 ? multiply_as<float, Result::kF16>
                                             : multiply_as<float, Result::kS32>;
  as(format, rows, columns, row_bytes, a, b, accumulate, d);
}

uint16_t fp8_to_f16(Element element, uint8_t code) { return to_f16(decode(element, code).value); }

uint16_t add_f16(uint16_t x, uint16_t y) {
  return to_f16(decode(Element::kF16, x).value + decode(Element::kF16, y).value);
}

}  // namespace emulator
