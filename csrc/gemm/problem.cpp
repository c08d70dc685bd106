#include "problem.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "../common/check.h"
#include "../common/counters.h"

namespace fastfp8::gemm {
namespace {

constexpr int64_t kAlignment = 16;  // bytes: of addresses and of row pitches, for TMA

// What an op calls its operands and their extents.
struct Names {
  const char *op, *a, *a_scale, *b, *b_scale, *n, *k;
};
constexpr Names names_of_gemm(const char* op) { return {op, "a", "a_scale", "b", "b_scale", "N", "K"}; }

// `device` is that of argument `first`.
void check_tensor(const char* op, const char* name, const TensorView& tensor, DType dtype, int device,
                  const char* first = "a") {
  FASTFP8_CHECK_ARGUMENT(tensor.dtype == dtype, op, name, "dtype " << name_of(dtype), name_of(tensor.dtype));
  FASTFP8_CHECK_ARGUMENT(tensor.dim == 2, op, name, "2 dimensions", tensor.dim);
  FASTFP8_CHECK_ARGUMENT(
      tensor.device == device, op, name, "a tensor on the device of '" << first << "' (cuda:" << device << ")",
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
GemmProblem check_operands(const Names& names, const TensorView& a, const TensorView& a_scale, const TensorView& b,
                           const TensorView& b_scale, BScales b_scales, DType out, int64_t matrices = 1) {
  const char* op = names.op;
  FASTFP8_CHECK_ARGUMENT(out == DType::kBF16 || out == DType::kF32, op, "out_dtype", "bfloat16 or float32",
                         name_of(out));
  FASTFP8_CHECK_ARGUMENT(a.device >= 0, op, names.a, "a tensor on a CUDA device", "one elsewhere");
  check_tensor(op, names.a, a, DType::kE4M3, a.device, names.a);
  check_tensor(op, names.a_scale, a_scale, DType::kF32, a.device, names.a);
  check_tensor(op, names.b, b, DType::kE4M3, a.device, names.a);
  check_tensor(op, names.b_scale, b_scale, DType::kF32, a.device, names.a);
  const int64_t m = a.sizes[0], k = a.sizes[1], n = b.sizes[0] / matrices;
  FASTFP8_CHECK_ARGUMENT(b.sizes[1] == k, op, names.b, names.k << " = " << k << " columns, as '" << names.a << "' has",
                         "shape " << PrintPair{b.sizes});
  FASTFP8_CHECK_ARGUMENT(k % 16 == 0, op, names.a, names.k << " a multiple of 16", names.k << " = " << k);
  FASTFP8_CHECK_ARGUMENT(n % 8 == 0, op, names.b, names.n << " a multiple of 8", names.n << " = " << n);
  GemmProblem problem{};
  problem.m = static_cast<int>(m), problem.n = static_cast<int>(n), problem.k = static_cast<int>(k);
  problem.b_scales = b_scales, problem.out = out;
  problem.a_pitch = check_row_major(op, names.a, a);
  problem.b_pitch = check_row_major(op, names.b, b);
  FASTFP8_CHECK_ARGUMENT(problem.a_pitch >= k, op, names.a, "rows that do not overlap",
                         "stride " << PrintPair{a.strides});
  FASTFP8_CHECK_ARGUMENT(problem.b_pitch >= k, op, names.b, "rows that do not overlap",
                         "stride " << PrintPair{b.strides});
  const int64_t k_blocks = ceil_div(k, kTileK);
  problem.a_scale_pitch = check_row_scale(op, names.a_scale, a_scale, m, k_blocks);
  problem.b_scale_pitch = b_scales == BScales::kRow
                              ? check_row_scale(op, names.b_scale, b_scale, n, k_blocks)
                              : check_block_scale(op, names.b_scale, b_scale, n, k_blocks, matrices);
  return problem;
}

// Ends of groups, or counts of their rows: read by ordinary loads, so that any address will do.
void check_ends(const char* op, const char* name, const TensorView& ends, int64_t groups, int device,
                const char* first) {
  FASTFP8_CHECK_ARGUMENT(ends.dtype == DType::kI32, op, name, "dtype int32", name_of(ends.dtype));
  FASTFP8_CHECK_ARGUMENT(ends.dim == 1 && ends.sizes[0] == groups, op, name,
                         "one number for each of " << groups << " groups",
                         ends.dim << " dimensions, the first of " << ends.sizes[0]);
  FASTFP8_CHECK_ARGUMENT(groups <= 1 || ends.strides[0] == 1, op, name, "a contiguous tensor",
                         "stride " << ends.strides[0]);
  FASTFP8_CHECK_ARGUMENT(ends.device == device, op, name, "a tensor on the device of '" << first << "'",
                         "one elsewhere");
}

}  // namespace

GemmProblem make_problem(const GemmOperands& operands, int num_sms, const Machine& machine) {
  const char* op = operands.op;
  const bool by_row = operands.b_block_rows == 1;
  FASTFP8_CHECK_ARGUMENT(operands.b_block_columns == 128 && (by_row || operands.b_block_rows == 128), op, "b_block",
                         "(128, 128) or (1, 128)",
                         "(" << operands.b_block_rows << ", " << operands.b_block_columns << ")");
  GemmProblem problem = check_operands(names_of_gemm(op), operands.a, operands.a_scale, operands.b, operands.b_scale,
                                       by_row ? BScales::kRow : BScales::kBlock, operands.out);
  if (operands.c) {
    const TensorView& c = *operands.c;
    FASTFP8_CHECK_ARGUMENT(c.dtype == DType::kBF16 || c.dtype == DType::kF32, op, "c", "dtype bfloat16 or float32",
                           name_of(c.dtype));
    check_tensor(op, "c", c, c.dtype, operands.a.device);
    const std::array<int64_t, 2> shape{problem.m, problem.n};
    FASTFP8_CHECK_ARGUMENT(c.sizes == shape, op, "c", "shape " << PrintPair{shape}, "shape " << PrintPair{c.sizes});
    const int64_t pitch = check_row_major(op, "c", c) / size_of(c.dtype);
    FASTFP8_CHECK_ARGUMENT(pitch <= std::numeric_limits<int32_t>::max(), op, "c", "rows less than 2^31 elements apart",
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
  GemmProblem problem = check_operands(names_of_gemm(op), a, operands.a_scale, b, operands.b_scale, BScales::kBlock,
                                       operands.out, groups);
  check_ends(op, operands.ends, ends, groups, a.device, "a");
  problem.grouping = Grouping::kRows;
  problem.groups = static_cast<int>(groups);
  problem.group_rows = operands.masked ? problem.m / problem.groups : 0;
  problem.num_sms = num_sms;
  problem.machine = &machine;
  return problem;
}

GemmProblem with_swiglu(GemmProblem product, const SwiGluOperands& operands, int device) {
  const char* op = operands.op;
  constexpr double kMost = 0x1p100;
  FASTFP8_CHECK_ARGUMENT(product.n % 256 == 0, op, "b", "2 F rows, F a multiple of 128", product.n << " rows");
  FASTFP8_CHECK_ARGUMENT(!operands.limit || (*operands.limit >= 1 / kMost && *operands.limit <= kMost), op, "limit",
                         "a positive number from 2**-100 to 2**100", *operands.limit);
  FASTFP8_CHECK_ARGUMENT(operands.eps >= 0 && operands.eps < kMost, op, "eps", "a number from 0 up to 2**100",
                         operands.eps);
  constexpr double kAmaxFloor = 0x1p-110;  // fastfp8/reference/quantize.py
  SwiGlu swiglu{};
  if (operands.weight) {
    const TensorView& weight = *operands.weight;
    FASTFP8_CHECK_ARGUMENT(weight.dtype == DType::kF32, op, "weight", "dtype float32", name_of(weight.dtype));
    FASTFP8_CHECK_ARGUMENT(weight.dim == 1 && weight.sizes[0] == product.m, op, "weight",
                           "one number for each of " << product.m << " rows",
                           weight.dim << " dimensions, the first of " << weight.sizes[0]);
    FASTFP8_CHECK_ARGUMENT(weight.device == device, op, "weight", "a tensor on the device of 'a'", "one elsewhere");
    FASTFP8_CHECK_ARGUMENT(weight.strides[0] <= std::numeric_limits<int32_t>::max(), op, "weight",
                           "elements less than 2^31 apart", "stride " << weight.strides[0]);
    swiglu.weighted = true, swiglu.weight_stride = static_cast<int>(weight.strides[0]);
  }
  if (operands.counters) {
    const TensorView& counters = *operands.counters;
    constexpr std::array<int64_t, 2> kShape{kCounterLanes, kCounterFields}, kStride{kCounterFields, 1};
    FASTFP8_CHECK_ARGUMENT(counters.dtype == DType::kI64, op, "counters", "dtype int64", name_of(counters.dtype));
    FASTFP8_CHECK_ARGUMENT(counters.dim == 2 && counters.sizes == kShape, op, "counters", "shape " << PrintPair{kShape},
                           counters.dim << " dimensions, the first two " << PrintPair{counters.sizes});
    FASTFP8_CHECK_ARGUMENT(counters.strides == kStride, op, "counters", "a contiguous tensor",
                           "stride " << PrintPair{counters.strides});
    FASTFP8_CHECK_ARGUMENT(counters.device == device, op, "counters", "a tensor on the device of 'a'", "one elsewhere");
    swiglu.counted = true;
  }
  swiglu.gate_up = operands.gate_up, swiglu.pow2 = operands.pow2;
  swiglu.limit = operands.limit ? static_cast<float>(*operands.limit) : std::numeric_limits<float>::infinity();
  swiglu.floor = static_cast<float>(std::max(operands.eps, kAmaxFloor));
  swiglu.out_scale_pitch = static_cast<int>(round_up(product.m, 4));
  product.out = DType::kE4M3;
  product.swiglu = swiglu;
  return product;
}

GemmProblem make_problem(const WgradOperands& operands, int num_sms, const Machine& machine) {
  constexpr Names kNames{"grouped_wgrad", "grad_t", "grad_t_scale", "input_t", "input_t_scale", "K", "T"};
  const TensorView &out = operands.out, &offsets = operands.offsets;
  GemmProblem problem = check_operands(kNames, operands.grad_t, operands.grad_t_scale, operands.input_t,
                                       operands.input_t_scale, BScales::kRow, out.dtype);
  const int device = operands.grad_t.device;
  const int64_t groups = offsets.dim == 1 ? offsets.sizes[0] : 1;
  check_ends(kNames.op, "offsets", offsets, groups, device, kNames.a);
  FASTFP8_CHECK_ARGUMENT(groups >= 1 && groups <= kMaxGroups, kNames.op, "offsets", "1 to " << kMaxGroups << " groups",
                         groups << " groups");
  const std::array<int64_t, 2> shape{groups * problem.m, problem.n};
  FASTFP8_CHECK_ARGUMENT(out.sizes == shape, kNames.op, "out",
                         "shape (" << groups << ", " << problem.m << ", " << problem.n << ")",
                         "shape " << PrintPair{out.sizes} << ", matrices one below the other");
  check_tensor(kNames.op, "out", out, out.dtype, device, kNames.a);
  const bool contiguous = out.sizes[1] <= 1 || out.strides[1] == 1;
  const bool rows_follow = out.sizes[0] <= 1 || out.sizes[1] == 0 || out.strides[0] == out.sizes[1];
  FASTFP8_CHECK_ARGUMENT(contiguous && rows_follow, kNames.op, "out", "a contiguous tensor",
                         "rows of stride " << PrintPair{out.strides});
  problem.grouping = Grouping::kDepth;
  problem.groups = static_cast<int>(groups);
  if (operands.accumulate) problem.c = out.dtype, problem.c_pitch = problem.n;
  problem.num_sms = num_sms;
  problem.machine = &machine;
  return problem;
}

std::string GemmProblem::str() const {
  std::ostringstream text;
  text << "GemmProblem(m=" << m << ", n=" << n << ", k=" << k
       << ", b_scales=" << (b_scales == BScales::kRow ? "row" : "block") << ", out=" << name_of(out)
       << ", c=" << (c ? name_of(*c) : "None") << (groups ? ", groups=" + std::to_string(groups) : "")
       << (swiglu ? swiglu->gate_up ? ", swiglu and gate_up" : ", swiglu" : "") << ", num_sms=" << num_sms
       << ", machine=" << machine->name << ")";
  return text.str();
}

}  // namespace fastfp8::gemm
