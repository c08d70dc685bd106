#include "problem.h"

#include <limits>
#include <sstream>

#include "../common/check.h"

namespace fastfp8::gemm {
namespace {

constexpr int64_t kAlignment = 16;  // bytes: of addresses and of row pitches, for TMA

void check_tensor(const char* op, const char* name, const TensorView& tensor, DType dtype, int device) {
  FASTFP8_CHECK_ARGUMENT(tensor.dtype == dtype, op, name, "dtype " << name_of(dtype), name_of(tensor.dtype));
  FASTFP8_CHECK_ARGUMENT(tensor.dim == 2, op, name, "2 dimensions", tensor.dim);
  FASTFP8_CHECK_ARGUMENT(
      tensor.device == device, op, name, "a tensor on the device of 'a' (cuda:" << device << ")",
      (tensor.device < 0 ? "one that is not on a CUDA device" : "one on cuda:" + std::to_string(tensor.device)));
  FASTFP8_CHECK_ARGUMENT(tensor.address % kAlignment == 0, op, name, "data at a multiple of 16 bytes",
                         "an address " << tensor.address % kAlignment << " bytes past one");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 128;
  FASTFP8_CHECK_ARGUMENT(tensor.sizes[0] <= kMost && tensor.sizes[1] <= kMost, op, name, "sizes below 2^31 - 128",
                         PrintPair{tensor.sizes});
}

// Bytes from row to row of a row-major tensor; `columns` stands in where there is no second row to go to.
int64_t check_row_major(const char* op, const char* name, const TensorView& tensor) {
  const int64_t size = size_of(tensor.dtype);
  const bool contiguous = tensor.sizes[1] <= 1 || tensor.strides[1] == 1;
  const bool aligned = tensor.sizes[0] <= 1 || tensor.sizes[1] == 0 || tensor.strides[0] * size % kAlignment == 0;
  FASTFP8_CHECK_ARGUMENT(contiguous && aligned && tensor.strides[0] >= 0, op, name,
                         "row-major data, rows 16 bytes apart or a multiple", "stride " << PrintPair{tensor.strides});
  return tensor.sizes[0] <= 1 ? round_up(tensor.sizes[1] * size, kAlignment) : tensor.strides[0] * size;
}

// Floats from one k-block to the next of a (1, 128) scale [rows, k_blocks].
int64_t check_row_scale(const char* op, const char* name, const TensorView& scale, int64_t rows, int64_t k_blocks) {
  const std::array<int64_t, 2> shape{rows, k_blocks};
  FASTFP8_CHECK_ARGUMENT(scale.sizes == shape, op, name,
                         "shape " << PrintPair{shape} << ", one scale for each (1, 128) block",
                         "shape " << PrintPair{scale.sizes});
  if (rows * k_blocks == 0) return 0;
  const bool inner = rows <= 1 || scale.strides[0] == 1;
  const bool outer = k_blocks <= 1 || (scale.strides[1] % 4 == 0 && scale.strides[1] >= rows);
  FASTFP8_CHECK_ARGUMENT(inner && outer, op, name, "stride (1, a multiple of 4 not below the number of rows)",
                         "stride " << PrintPair{scale.strides});
  return k_blocks <= 1 ? round_up(rows, 4) : scale.strides[1];
}

// `matrices` of [rows, ...] one below the other, each in blocks of its own.
int64_t check_block_scale(const char* op, const char* name, const TensorView& scale, int64_t rows, int64_t k_blocks,
                          int64_t matrices = 1) {
  const std::array<int64_t, 2> shape{ceil_div(rows, 128) * matrices, k_blocks};
  FASTFP8_CHECK_ARGUMENT(scale.sizes == shape, op, name,
                         "shape " << PrintPair{shape} << ", one scale for each (128, 128) block",
                         "shape " << PrintPair{scale.sizes});
  if (shape[0] * k_blocks == 0) return 0;
  const bool contiguous = (k_blocks <= 1 || scale.strides[1] == 1) && (shape[0] <= 1 || scale.strides[0] == k_blocks);
  FASTFP8_CHECK_ARGUMENT(contiguous, op, name, "a contiguous tensor", "stride " << PrintPair{scale.strides});
  return k_blocks;
}

// What dense and grouped products ask of A, B and their scales. n is that of one of `matrices` of B.
GemmProblem check_operands(const char* op, const TensorView& a, const TensorView& a_scale, const TensorView& b,
                           const TensorView& b_scale, BScales b_scales, DType out, int64_t matrices = 1) {
  FASTFP8_CHECK_ARGUMENT(out == DType::kBF16 || out == DType::kF32, op, "out_dtype", "bfloat16 or float32",
                         name_of(out));
  FASTFP8_CHECK_ARGUMENT(a.device >= 0, op, "a", "a tensor on a CUDA device", "one elsewhere");
  check_tensor(op, "a", a, DType::kE4M3, a.device);
  check_tensor(op, "a_scale", a_scale, DType::kF32, a.device);
  check_tensor(op, "b", b, DType::kE4M3, a.device);
  check_tensor(op, "b_scale", b_scale, DType::kF32, a.device);
  const int64_t m = a.sizes[0], k = a.sizes[1], n = b.sizes[0] / matrices;
  FASTFP8_CHECK_ARGUMENT(b.sizes[1] == k, op, "b", "K = " << k << " columns, as 'a' has",
                         "shape " << PrintPair{b.sizes});
  FASTFP8_CHECK_ARGUMENT(k % 16 == 0, op, "a", "K a multiple of 16", "K = " << k);
  FASTFP8_CHECK_ARGUMENT(n % 8 == 0, op, "b", "N a multiple of 8", "N = " << n);
  GemmProblem problem{};
  problem.m = static_cast<int>(m), problem.n = static_cast<int>(n), problem.k = static_cast<int>(k);
  problem.b_scales = b_scales, problem.out = out;
  problem.a_pitch = check_row_major(op, "a", a);
  problem.b_pitch = check_row_major(op, "b", b);
  FASTFP8_CHECK_ARGUMENT(problem.a_pitch >= k, op, "a", "rows that do not overlap", "stride " << PrintPair{a.strides});
  FASTFP8_CHECK_ARGUMENT(problem.b_pitch >= k, op, "b", "rows that do not overlap", "stride " << PrintPair{b.strides});
  const int64_t k_blocks = ceil_div(k, kTileK);
  problem.a_scale_pitch = check_row_scale(op, "a_scale", a_scale, m, k_blocks);
  problem.b_scale_pitch = b_scales == BScales::kRow ? check_row_scale(op, "b_scale", b_scale, n, k_blocks)
                                                    : check_block_scale(op, "b_scale", b_scale, n, k_blocks, matrices);
  return problem;
}

}  // namespace

GemmProblem make_problem(const GemmOperands& operands, int num_sms, const Machine& machine) {
  constexpr const char* kOp = "gemm";
  const bool by_row = operands.b_block_rows == 1;
  FASTFP8_CHECK_ARGUMENT(operands.b_block_columns == 128 && (by_row || operands.b_block_rows == 128), kOp, "b_block",
                         "(128, 128) or (1, 128)",
                         "(" << operands.b_block_rows << ", " << operands.b_block_columns << ")");
  GemmProblem problem = check_operands(kOp, operands.a, operands.a_scale, operands.b, operands.b_scale,
                                       by_row ? BScales::kRow : BScales::kBlock, operands.out);
  if (operands.c) {
    const TensorView& c = *operands.c;
    FASTFP8_CHECK_ARGUMENT(c.dtype == DType::kBF16 || c.dtype == DType::kF32, kOp, "c", "dtype bfloat16 or float32",
                           name_of(c.dtype));
    check_tensor(kOp, "c", c, c.dtype, operands.a.device);
    const std::array<int64_t, 2> shape{problem.m, problem.n};
    FASTFP8_CHECK_ARGUMENT(c.sizes == shape, kOp, "c", "shape " << PrintPair{shape}, "shape " << PrintPair{c.sizes});
    const int64_t pitch = check_row_major(kOp, "c", c) / size_of(c.dtype);
    FASTFP8_CHECK_ARGUMENT(pitch <= std::numeric_limits<int32_t>::max(), kOp, "c", "rows less than 2^31 elements apart",
                           "stride " << PrintPair{c.strides});
    problem.c = c.dtype;
    problem.c_pitch = static_cast<int>(pitch);
  }
  problem.num_sms = num_sms;
  problem.machine = &machine;
  return problem;
}

GemmProblem make_problem(const GroupedOperands& operands, int num_sms, const Machine& machine) {
  const char* op = operands.op;
  const TensorView &a = operands.a, &b = operands.b, &ends = operands.group_ends;
  const int64_t groups = operands.groups;
  FASTFP8_CHECK_ARGUMENT(groups >= 1 && groups <= kMaxGroups, op, "b", "1 to " << kMaxGroups << " groups",
                         groups << " groups");
  GemmProblem problem =
      check_operands(op, a, operands.a_scale, b, operands.b_scale, BScales::kBlock, operands.out, groups);
  FASTFP8_CHECK_ARGUMENT(ends.dtype == DType::kI32, op, operands.ends, "dtype int32", name_of(ends.dtype));
  FASTFP8_CHECK_ARGUMENT(ends.dim == 1 && ends.sizes[0] == groups, op, operands.ends,
                         "one number for each of " << groups << " groups",
                         ends.dim << " dimensions, the first of " << ends.sizes[0]);
  FASTFP8_CHECK_ARGUMENT(groups <= 1 || ends.strides[0] == 1, op, operands.ends, "a contiguous tensor",
                         "stride " << ends.strides[0]);
  FASTFP8_CHECK_ARGUMENT(ends.device == a.device, op, operands.ends, "a tensor on the device of 'a'", "one elsewhere");
  problem.groups = static_cast<int>(groups);
  problem.group_rows = operands.masked ? problem.m / problem.groups : 0;
  problem.num_sms = num_sms;
  problem.machine = &machine;
  return problem;
}

std::string GemmProblem::str() const {
  std::ostringstream text;
  text << "GemmProblem(m=" << m << ", n=" << n << ", k=" << k
       << ", b_scales=" << (b_scales == BScales::kRow ? "row" : "block") << ", out=" << name_of(out)
       << ", c=" << (c ? name_of(*c) : "None") << (groups ? ", groups=" + std::to_string(groups) : "")
       << ", num_sms=" << num_sms << ", machine=" << machine->name << ")";
  return text.str();
}

}  // namespace fastfp8::gemm
