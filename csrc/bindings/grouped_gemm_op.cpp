// torch.ops.fastfp8.grouped_gemm and masked_grouped_gemm on CUDA tensors: tensors -> problem -> config -> plan ->
// launch; Triton where no kernel of ours fits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../common/driver.h"
#include "../gemm/plan.h"
#include "backend.h"
#include "tensors.h"

namespace fastfp8 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor grouped(bool masked, const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
               const Tensor& ends, const std::optional<Tensor>& error, ScalarType out_dtype) {
  const char *op = masked ? "masked_grouped_gemm" : "grouped_gemm", *ends_name = masked ? "counts" : "offsets";
  const auto rows_of = [&](const Tensor& t, const char* name) { return masked ? flattened(t, op, name) : view_of(t); };
  const gemm::GroupedOperands operands{op,
                                       ends_name,
                                       rows_of(a, "a"),
                                       rows_of(a_scale, "a_scale"),
                                       flattened(b, op, "b"),
                                       flattened(b_scale, op, "b_scale"),
                                       view_of(ends),
                                       b.sizes()[0],
                                       masked,
                                       dtype_of(out_dtype)};
  const int device = operands.a.device;
  const bool ready = device >= 0 && gemm_sm90_unusable_reason(device).empty();
  if (masked)
    FASTFP8_CHECK_ARGUMENT(a.sizes()[0] == operands.groups, op, "a", "as many groups as 'b' has, " << operands.groups,
                           a.sizes()[0] << " groups");
  const uint64_t error_word = error_address(error, op, "a", device);
  const gemm::GemmProblem problem = gemm::make_problem(operands, ready ? driver::device(device).num_sms : 1,
                                                       gemm::Machine::of(ready ? driver::device(device).name : ""));
  if (!ready) {
    using torch::stable::detail::from;
    StableIValue stack[] = {from(a), from(a_scale), from(b), from(b_scale), from(ends), from(error), from(out_dtype)};
    call_triton(op, masked ? "fastfp8::_masked_grouped_gemm_triton" : "fastfp8::_grouped_gemm_triton", device, stack);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t matrices[] = {operands.groups, problem.group_rows, problem.n}, rows[] = {problem.m, problem.n};
  Tensor out = masked ? torch::stable::new_empty(a, {matrices, 3}, out_dtype)
                      : torch::stable::new_empty(a, {rows, 2}, out_dtype);
  if (problem.m == 0 || problem.n == 0) return out;
  if (problem.k == 0) return torch::stable::zero_(out);
  const driver::Binding bindings[] = {
      {"a", operands.a.address},
      {"a_scale", operands.a_scale.address},
      {"b", operands.b.address},
      {"b_scale", operands.b_scale.address},
      {"out", reinterpret_cast<uint64_t>(out.data_ptr())},
      {"ends", operands.group_ends.address},
      {"error", error_word},
  };
  driver::launch(gemm::planned(problem), bindings, 7, current_stream(device));
  return out;
}

Tensor grouped_gemm_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                         const Tensor& offsets, const std::optional<Tensor>& error, ScalarType out_dtype) {
  return grouped(false, a, a_scale, b, b_scale, offsets, error, out_dtype);
}

Tensor masked_grouped_gemm_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                                const Tensor& counts, const std::optional<Tensor>& error, ScalarType out_dtype) {
  return grouped(true, a, a_scale, b, b_scale, counts, error, out_dtype);
}

}  // namespace
}  // namespace fastfp8

STABLE_TORCH_LIBRARY_IMPL(fastfp8, CUDA, library) {
  library.impl("grouped_gemm", TORCH_BOX(&fastfp8::grouped_gemm_cuda));
  library.impl("masked_grouped_gemm", TORCH_BOX(&fastfp8::masked_grouped_gemm_cuda));
}
