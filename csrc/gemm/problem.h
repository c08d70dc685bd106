// The question that a GEMM call asks.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "../common/tensor_view.h"
#include "config.h"
#include "machine.h"

namespace fastfp8::gemm {

// What SwiGLU takes beside gate and up, and which outputs it has.
struct SwiGlu {
  bool gate_up;  // gate and up in BF16 too
  bool weighted;
  bool counted;  // what became of the results' values
  int weight_stride;
  float limit, floor;  // of gate and up, infinite for none; of amax
  bool pow2;
  int out_scale_pitch;  // floats from one column of the result's scales to the next

  bool operator==(const SwiGlu&) const = default;
};

// out[M, N] = A[M, K] B[N, K]^T (+ C), checked: every number here is one that the kernels can serve.
struct GemmProblem {
  int m, n, k;
  BScales b_scales;
  DType out;                             // kBF16 or kF32; kE4M3 with swiglu, which makes [M, N / 2] of the product
  std::optional<DType> c;                // kBF16 or kF32, if there is one
  int64_t a_pitch, b_pitch;              // bytes from row to row of the codes
  int64_t a_scale_pitch, b_scale_pitch;  // floats from one k-block to the next ((1, 128) scales are column-major)
  int c_pitch;                           // elements from row to row
  int num_sms;
  const Machine* machine;  // for the cost model
  // kRows: n is of one group's B, of which there are `groups` one below the other. kDepth: m and n are of one group's
  // output, of which there are `groups` one below the other; C is that output, before.
  Grouping grouping = Grouping::kNone;
  int groups = 0;
  int group_rows = 0;  // kRows: rows of A from group to group; 0 where the ends of the groups' rows are given
  std::optional<SwiGlu> swiglu;

  int row_groups() const { return grouping == Grouping::kRows ? groups : 1; }
  int depth_groups() const { return grouping == Grouping::kDepth ? groups : 1; }

  bool operator==(const GemmProblem&) const = default;

  std::string str() const;
};

struct GemmOperands {
  TensorView a, a_scale, b, b_scale;
  std::optional<TensorView> c;
  int64_t b_block_rows, b_block_columns;
  DType out;
  const char* op = "gemm";  // for messages
};

// Rows of A in groups, each multiplied by a B of its own. Tensors of three dimensions come flattened to [G * rows, K].
struct GroupedOperands {
  const char* op;    // for messages
  const char* ends;  // the name of the argument that says where the groups end
  TensorView a, a_scale, b, b_scale, group_ends;
  int64_t groups;
  bool masked;  // groups lie a fixed number of rows apart, and group_ends counts rows
  DType out;
};

// What becomes of a product of gate and up.
struct SwiGluOperands {
  const char* op;  // for messages
  std::optional<TensorView> weight, counters;
  std::optional<double> limit;
  bool pow2;
  double eps;
  bool gate_up;
};

// Wgrad of a grouped linear layer, in the op's own names: out[g][N, K] (+)= grad_t[N, T of g] input_t[K, T of g]^T.
struct WgradOperands {
  TensorView grad_t, grad_t_scale, input_t, input_t_scale, offsets;
  TensorView out;  // [G * N, K]; without an address while there is none yet
  bool accumulate;
};

// Raises std::runtime_error that names the argument unless the operands fit together and the kernels can read them.
GemmProblem make_problem(const GemmOperands& operands, int num_sms, const Machine& machine);
GemmProblem make_problem(const GroupedOperands& operands, int num_sms, const Machine& machine);
GemmProblem make_problem(const WgradOperands& operands, int num_sms, const Machine& machine);
// Of a product with BF16 output, the same with SwiGLU and quantisation behind it.
GemmProblem with_swiglu(GemmProblem product, const SwiGluOperands& operands, int device);

}  // namespace fastfp8::gemm
