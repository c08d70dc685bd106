// torch.ops.fastfp8.grouped_wgrad and grouped_wgrad.out on CUDA tensors: tensors -> problem -> config -> plan ->
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

constexpr const char* kOp = "grouped_wgrad";

// Checked arguments of a call, but for the output.
struct Call {
  const Tensor &grad_t, &grad_t_scale, &input_t, &input_t_scale, &offsets;
  const std::optional<Tensor>& error;
  gemm::GemmProblem problem;
  int device;
  bool ready;  // for the sm_90a kernel
  uint64_t error_word;

  Call(const Tensor& grad_t, const Tensor& grad_t_scale, const Tensor& input_t, const Tensor& input_t_scale,
       const Tensor& offsets, const std::optional<Tensor>& error, const TensorView& out, bool accumulate)
      : grad_t(grad_t),
        grad_t_scale(grad_t_scale),
        input_t(input_t),
        input_t_scale(input_t_scale),
        offsets(offsets),
        error(error) {
    const gemm::WgradOperands operands{
        view_of(grad_t), view_of(grad_t_scale), view_of(input_t), view_of(input_t_scale), view_of(offsets), out,
        accumulate};
    device = operands.grad_t.device;
    ready = device >= 0 && gemm_sm90_unusable_reason(device).empty();
    problem = gemm::make_problem(operands, ready ? driver::device(device).num_sms : 1,
                                 gemm::Machine::of(ready ? driver::device(device).name : ""));
    error_word = error_address(error, kOp, "grad_t", device);
  }

  void launch_into(Tensor& out) const {
    const bool accumulate = problem.c.has_value();
    if (!ready) {
      using torch::stable::detail::from;
      StableIValue stack[] = {from(grad_t),  from(grad_t_scale), from(input_t), from(input_t_scale),
                              from(offsets), from(error),        from(out),     from(accumulate)};
      return call_triton(kOp, "fastfp8::_grouped_wgrad_triton", device, stack);
    }
    const torch::stable::accelerator::DeviceGuard guard(device);
    if (problem.m == 0 || problem.n == 0) return;
    if (problem.k == 0) {  // all groups are empty
      if (!accumulate) torch::stable::zero_(out);
      return;
    }
    const auto address = [](const Tensor& t) { return reinterpret_cast<uint64_t>(t.data_ptr()); };
    const driver::Binding bindings[] = {
        {"a", address(grad_t)},  {"a_scale", address(grad_t_scale)},
        {"b", address(input_t)}, {"b_scale", address(input_t_scale)},
        {"out", address(out)},   {"ends", address(offsets)},
        {"error", error_word},
    };
    driver::launch(gemm::planned(problem), bindings, 7, current_stream(device));
  }
};

Tensor grouped_wgrad_cuda(const Tensor& grad_t, const Tensor& grad_t_scale, const Tensor& input_t,
                          const Tensor& input_t_scale, const Tensor& offsets, const std::optional<Tensor>& error,
                          ScalarType out_dtype) {
  // What the output will be; that grad_t, input_t and offsets have these sizes is checked with the rest.
  const TensorView rows = view_of(grad_t), columns = view_of(input_t), groups = view_of(offsets);
  TensorView view;
  view.dtype = dtype_of(out_dtype), view.dim = 2, view.device = rows.device;
  view.sizes = {groups.sizes[0] * rows.sizes[0], columns.sizes[0]};
  view.strides = {columns.sizes[0], 1};
  const Call call(grad_t, grad_t_scale, input_t, input_t_scale, offsets, error, view, false);
  const int64_t shape[] = {call.problem.groups, call.problem.m, call.problem.n};
  Tensor out = torch::stable::new_empty(grad_t, {shape, 3}, out_dtype);
  call.launch_into(out);
  return out;
}

void grouped_wgrad_out_cuda(const Tensor& grad_t, const Tensor& grad_t_scale, const Tensor& input_t,
                            const Tensor& input_t_scale, const Tensor& offsets, const std::optional<Tensor>& error,
                            bool accumulate, Tensor out) {
  const TensorView view = flattened(out, kOp, "out");
  const Call call(grad_t, grad_t_scale, input_t, input_t_scale, offsets, error, view, accumulate);
  const int64_t groups = call.problem.groups, n = call.problem.m;
  FASTFP8_CHECK_ARGUMENT(out.sizes()[0] == groups && out.sizes()[1] == n, kOp, "out",
                         "shape (" << groups << ", " << n << ", " << call.problem.n << ")",
                         "shape (" << out.sizes()[0] << ", " << out.sizes()[1] << ", " << out.sizes()[2] << ")");
  call.launch_into(out);
}

}  // namespace
}  // namespace fastfp8

STABLE_TORCH_LIBRARY_IMPL(fastfp8, CUDA, library) {
  library.impl("grouped_wgrad", TORCH_BOX(&fastfp8::grouped_wgrad_cuda));
  library.impl("grouped_wgrad.out", TORCH_BOX(&fastfp8::grouped_wgrad_out_cuda));
}
