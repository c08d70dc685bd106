// What tensor cores compute, whatever instruction feeds them: formats, fragments and the bits of D = A * B + C.
//
// Floating point is MMA-Sim's model of Hopper (arXiv 2511.10909): all products of an instruction and the accumulator
// are aligned to the largest exponent among them, cut toward zero to some bits below it, summed exactly and rounded
// once. A zero never sets the largest exponent, and a sum of zero is +0.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace emulator {

enum class Element : uint8_t { kE4m3, kE5m2, kF16, kBf16, kTf32, kS8, kU8 };
enum class Result : uint8_t { kF32, kF16, kS32 };

// Bits below the largest exponent that a term keeps: FP8 in wgmma, and everything else.
constexpr int kFp8Bits = 13, kFullBits = 25;

struct MatrixFormat {
  Element a, b;
  Result d;
  int aligned_bits = kFullBits;  // or kFp8Bits; an f32 result has no more bits of fraction than this
  bool negated = false;          // D = -A * B + C
  bool saturated = false;        // of kS32, which wraps otherwise
};

// The format of .dtype.atype.btype, if sm_90a multiplies them, in wgmma and mma.sync alike.
std::optional<MatrixFormat> matrix_format(const std::string& dtype, const std::string& atype, const std::string& btype);
bool is_integer(Element element);
bool is_fp8(Element element);
int size_of(Element element);  // bytes

// D of [rows][columns] from A of [rows][row_bytes] and B of [columns][row_bytes], both contiguous in K. `columns` is a
// multiple of 8. Each element of D is one word, an f16 in the low half; `accumulate` adds what it holds.
void multiply(const MatrixFormat& format, int rows, int columns, int row_bytes, const uint8_t* a, const uint8_t* b,
              bool accumulate, uint32_t* d);

// The bits of an FP8 code as an f16, which represents each of them.
uint16_t fp8_to_f16(Element element, uint8_t code);
// The sum of two f16, rounded to nearest even.
uint16_t add_f16(uint16_t x, uint16_t y);

// Which element a lane holds. Accumulator v of a lane, of two on a row and two 8 rows below, for every 8 columns:
inline int accumulator_row(int lane, int v) { return lane / 4 + 8 * (v / 2 % 2); }
inline int accumulator_column(int lane, int v) { return 8 * (v / 4) + 2 * (lane % 4) + v % 2; }
// Four bytes of A in register r of a lane, for elements of every size; in B, r counts 16 bytes of K as well:
inline int a_row(int lane, int r) { return lane / 4 + 8 * (r % 2); }
inline int a_byte(int lane, int r) { return 16 * (r / 2) + 4 * (lane % 4); }
inline int b_column(int lane) { return lane / 4; }
inline int b_byte(int lane, int r) { return 16 * r + 4 * (lane % 4); }

}  // namespace emulator
