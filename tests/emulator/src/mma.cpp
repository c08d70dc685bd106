// mma.sync: one warp multiplies matrices that lie in its registers.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "matrix.h"

namespace emulator {
namespace {

constexpr int kRows = 16, kColumns = 8;
constexpr int kMostBytes = 32;  // of a row along K
using Matrix = std::array<uint32_t, kRows * kColumns>;
using BytesA = std::array<uint8_t, kRows * kMostBytes>;
using BytesB = std::array<uint8_t, kColumns * kMostBytes>;

uint32_t add_f32(uint32_t x, uint32_t y) {
  const float sum = std::bit_cast<float>(x) + std::bit_cast<float>(y);
  return std::isnan(sum) ? 0x7fffffff : std::bit_cast<uint32_t>(sum);
}

// sm_90a has no FP8 in mma.sync: ptxas converts to f16, multiplies the lower two bytes of each register, adds the
// product of the upper two, and only then adds C, rounding it to nearest.
void multiply_fp8(const MatrixFormat& format, int row_bytes, const BytesA& a, const BytesB& b, Matrix& d) {
  const Matrix c = d;
  const auto halves = [](Element element, const auto& from, int upper, auto& to) {
    for (size_t i = 0; i < from.size() / 4; ++i) {
      for (size_t j = 0; j < 2; ++j) {
        const uint16_t half = fp8_to_f16(element, from[4 * i + 2 * upper + j]);
        std::memcpy(&to[4 * i + 2 * j], &half, sizeof half);
      }
    }
  };
  const MatrixFormat converted{Element::kF16, Element::kF16, format.d, kFullBits};
  for (int upper = 0; upper < 2; ++upper) {
    BytesA left;
    BytesB right;
    halves(format.a, a, upper, left);
    halves(format.b, b, upper, right);
    multiply(converted, kRows, kColumns, row_bytes, left.data(), right.data(), upper == 1, d.data());
  }
  for (size_t i = 0; i < d.size(); ++i) {
    d[i] = format.d == Result::kF32 ? add_f32(d[i], c[i])
                                    : add_f16(static_cast<uint16_t>(d[i]), static_cast<uint16_t>(c[i]));
  }
}

// The elements of a vector operand.
const std::vector<Operand>& elements(const Decoder& d, size_t index, size_t count) {
  const Operand& operand = d.operand(index);
  if (operand.kind != Operand::Kind::kVector || operand.elements.size() != count)
    d.unknown("operand " + std::to_string(index) + ", which is a vector of " + std::to_string(count));
  return operand.elements;
}

std::vector<Source> sources(const Decoder& d, size_t index, size_t count) {
  std::vector<Source> out;
  for (const Operand& element : elements(d, index, count)) out.push_back(d.source(element));
  return out;
}

struct Shape {
  MatrixFormat format;
  int row_bytes;
};

// .sync.aligned.shape.row.col{.satfinite}.dtype.atype.btype.ctype{.satfinite}
Shape decode_shape(const Decoder& d) {
  if (!(d.take("sync") && d.take("aligned"))) d.unknown("mma");
  const std::string shape = d.next();
  if (!(d.take("row") && d.take("col"))) d.unknown("layout");
  bool saturated = d.take("satfinite");
  const std::string dtype = d.next(), atype = d.next(), btype = d.next(), ctype = d.next();
  saturated = d.take("satfinite") || saturated;
  d.expect_done();
  const auto format = matrix_format(dtype, atype, btype);
  if (!format || ctype != dtype || (saturated && format->d != Result::kS32)) d.unknown("combination of types");
  Shape out{*format, 0};
  out.format.saturated = saturated;
  for (int row_bytes : {16, kMostBytes}) {
    if (shape == "m16n8k" + std::to_string(row_bytes / size_of(format->a))) out.row_bytes = row_bytes;
  }
  if (out.row_bytes == 0) d.unknown("shape");
  return out;
}

}  // namespace

Handler decode_mma(const Decoder& d) {
  if (d.instruction.opcode != "mma") return {};
  const Shape shape = decode_shape(d);
  const size_t words = shape.format.d == Result::kF16 ? 2 : 4, parts = shape.row_bytes / 16;
  d.operands(4);
  std::vector<int> results;
  for (const Operand& element : elements(d, 0, words)) results.push_back(d.destination(element));
  return [=, a = sources(d, 1, 2 * parts), b = sources(d, 2, parts), c_sources = sources(d, 3, words)](Context& c) {
    if (c.warp.live != kAllLanes) fail(c, "mma.sync is executed by all lanes of a warp, and some have exited");
    if (!converged(c)) return Outcome::kBlocked;
    BytesA left{};
    BytesB right{};
    Matrix matrix;
    const auto put = [](uint8_t* to, uint64_t word) { std::memcpy(to, &word, 4); };
    const bool half = words == 2;
    const auto element = [&](int lane, int v) -> uint32_t& {
      return matrix[accumulator_row(lane, v) * kColumns + accumulator_column(lane, v)];
    };
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int r = 0; r < static_cast<int>(a.size()); ++r)
        put(&left[a_row(lane, r) * shape.row_bytes + a_byte(lane, r)], a[r].get(c, lane));
      for (int r = 0; r < static_cast<int>(b.size()); ++r)
        put(&right[b_column(lane) * shape.row_bytes + b_byte(lane, r)], b[r].get(c, lane));
      for (int v = 0; v < 4; ++v) {
        const auto word = static_cast<uint32_t>(c_sources[half ? v / 2 : v].get(c, lane));
        element(lane, v) = half ? word >> 16 * (v % 2) & 0xffff : word;
      }
    }
    if (is_fp8(shape.format.a))
      multiply_fp8(shape.format, shape.row_bytes, left, right, matrix);
    else
      multiply(shape.format, kRows, kColumns, shape.row_bytes, left.data(), right.data(), true, matrix.data());
    for (size_t i = 0; i < words; ++i) {
      if (results[i] < 0) continue;
      uint64_t* lanes = c.warp.reg(results[i]);
      const int v = static_cast<int>(half ? 2 * i : i);
      for (int lane = 0; lane < kLanes; ++lane)
        lanes[lane] = half ? element(lane, v) | element(lane, v + 1) << 16 : element(lane, v);
    }
    return Outcome::kNext;
  };
}

}  // namespace emulator
