// torch.ops.fastfp8.gemm on CUDA tensors: tensors -> problem -> config -> plan -> launch; Triton where no kernel of
// ours fits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../common/check.h"
#include "../common/driver.h"
#include "../gemm/plan.h"
#include "backend.h"
#include "tensors.h"

namespace fastfp8 {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor gemm_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                 IntHeaderOnlyArrayRef b_block, ScalarType out_dtype, const std::optional<Tensor>& c,
                 std::optional<int64_t> num_sms) {
  gemm::GemmOperands operands{view_of(a),   view_of(a_scale), view_of(b), view_of(b_scale),
                              std::nullopt, b_block[0],       b_block[1], dtype_of(out_dtype)};
  if (c) operands.c = view_of(*c);
  const int device = operands.a.device;
  const bool ready = device >= 0 && gemm_sm90_unusable_reason(device).empty();
  FASTFP8_CHECK_ARGUMENT(!num_sms || *num_sms >= 1, "gemm", "num_sms", "None or at least 1", *num_sms);
  const int64_t sms = ready ? driver::device(device).num_sms : 1;
  const gemm::GemmProblem problem = gemm::make_problem(operands, static_cast<int>(std::min(sms, num_sms.value_or(sms))),
                                                       gemm::Machine::of(ready ? driver::device(device).name : ""));
  if (!ready) {
    using torch::stable::detail::from;
    StableIValue stack[] = {from(a),       from(a_scale),   from(b), from(b_scale),
                            from(b_block), from(out_dtype), from(c), from(num_sms)};
    call_triton("gemm", "fastfp8::_gemm_triton", device, stack);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = empty_cuda(problem.m, problem.n, problem.out, device);
  if (problem.m == 0 || problem.n == 0) return out;
  if (problem.k == 0) return c ? torch::stable::copy_(out, *c) : torch::stable::zero_(out);
  const driver::Binding bindings[] = {
      {"a", operands.a.address},
      {"a_scale", operands.a_scale.address},
      {"b", operands.b.address},
      {"b_scale", operands.b_scale.address},
      {"out", reinterpret_cast<uint64_t>(out.data_ptr())},
      {"c", operands.c ? operands.c->address : 0},
  };
  driver::launch(gemm::planned(problem), bindings, 6, current_stream(device));
  return out;
}

}  // namespace
}  // namespace fastfp8

STABLE_TORCH_LIBRARY_IMPL(fastfp8, CUDA, library) { library.impl("gemm", TORCH_BOX(&fastfp8::gemm_cuda)); }
