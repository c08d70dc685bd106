// torch.ops.fastfp8.gemm_swiglu_quantize on CUDA tensors: tensors -> problem -> config -> plan -> launch; Triton where
// no kernel of ours fits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../common/driver.h"
#include "../gemm/plan.h"
#include "backend.h"
#include "tensors.h"

namespace fastfp8 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kOp = "gemm_swiglu_quantize";

uint64_t address_of(const Tensor& tensor) { return reinterpret_cast<uint64_t>(tensor.data_ptr()); }

// The scales of [rows, 128 * columns] in (1, 128) blocks, in their layout (fastfp8/layout.py).
Tensor empty_row_scale(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t padded[] = {columns, round_up(rows, 4)};
  Tensor scale = torch::stable::new_empty(like, {padded, 2}, ScalarType::Float);
  scale = torch::stable::narrow(scale, 1, 0, rows);
  return torch::stable::transpose(scale, 0, 1);
}

Outputs run(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
            const std::optional<Tensor>& offsets, const std::optional<Tensor>& error,
            const std::optional<Tensor>& weight, std::optional<double> limit, bool pow2, double eps,
            bool return_gate_up, const std::optional<Tensor>& counters) {
  const TensorView a_view = view_of(a), a_scale_view = view_of(a_scale);
  const TensorView b_view = offsets ? flattened(b, kOp, "b") : view_of(b);
  const TensorView b_scale_view = offsets ? flattened(b_scale, kOp, "b_scale") : view_of(b_scale);
  const int device = a_view.device;
  const bool ready = device >= 0 && gemm_sm90_unusable_reason(device).empty();
  const int num_sms = ready ? driver::device(device).num_sms : 1;
  const gemm::Machine& machine = gemm::Machine::of(ready ? driver::device(device).name : "");
  const gemm::GemmProblem product =
      offsets ? gemm::make_problem(gemm::GroupedOperands{kOp, "offsets", a_view, a_scale_view, b_view, b_scale_view,
                                                         view_of(*offsets), b.sizes()[0], false, DType::kBF16},
                                   num_sms, machine)
              : gemm::make_problem(gemm::GemmOperands{a_view, a_scale_view, b_view, b_scale_view, std::nullopt, 128,
                                                      128, DType::kBF16, kOp},
                                   num_sms, machine);
  gemm::SwiGluOperands operands{kOp, std::nullopt, std::nullopt, limit, pow2, eps, return_gate_up};
  if (weight) operands.weight = view_of(*weight);
  if (counters) operands.counters = view_of(*counters);
  const gemm::GemmProblem problem = gemm::with_swiglu(product, operands, device);
  const uint64_t error_word = error_address(error, kOp, "a", device);
  // Without K there is nothing to load, and the sums are zero. What weights make of zeros, and how many are counted,
  // the other kernel tells.
  if (!ready || (problem.k == 0 && (weight || counters))) {
    using torch::stable::detail::from;
    StableIValue stack[] = {
        from(a),      from(a_scale), from(b),    from(b_scale), from(offsets),        from(error),
        from(weight), from(limit),   from(pow2), from(eps),     from(return_gate_up), from(counters)};
    call_triton(kOp, "fastfp8::_gemm_swiglu_quantize_triton", device, stack);
    using torch::stable::detail::to;
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t shape[] = {problem.m, problem.n / 2}, both[] = {return_gate_up ? problem.m : 0, problem.n};
  Tensor out = torch::stable::new_empty(a, {shape, 2}, ScalarType::Float8_e4m3fn);
  Tensor out_scale = empty_row_scale(a, problem.m, problem.n / 256);
  Tensor gate_up = torch::stable::new_empty(a, {both, 2}, ScalarType::BFloat16);
  if (problem.m == 0 || problem.n == 0) return {out, out_scale, gate_up};
  if (problem.k == 0)
    return {torch::stable::zero_(out), torch::stable::fill_(out_scale, 1.0), torch::stable::zero_(gate_up)};
  const driver::Binding bindings[] = {
      {"a", a_view.address},
      {"a_scale", a_scale_view.address},
      {"b", b_view.address},
      {"b_scale", b_scale_view.address},
      {"out", address_of(out)},
      {"out_scale", address_of(out_scale)},
      {"gate_up", address_of(gate_up)},
      {"weight", weight ? address_of(*weight) : 0},
      {"counters", counters ? address_of(*counters) : 0},
      {"ends", offsets ? address_of(*offsets) : 0},
      {"error", error_word},
  };
  driver::launch(gemm::planned(problem), bindings, 11, current_stream(device));
  return {out, out_scale, gate_up};
}

Outputs gemm_swiglu_quantize_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                                  const std::optional<Tensor>& offsets, const std::optional<Tensor>& error,
                                  const std::optional<Tensor>& weight, std::optional<double> limit, bool pow2,
                                  double eps, bool return_gate_up) {
  return run(a, a_scale, b, b_scale, offsets, error, weight, limit, pow2, eps, return_gate_up, std::nullopt);
}

Outputs gemm_swiglu_quantize_counted_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                          const Tensor& b_scale, const std::optional<Tensor>& offsets,
                                          const std::optional<Tensor>& error, const std::optional<Tensor>& weight,
                                          std::optional<double> limit, bool pow2, double eps, bool return_gate_up,
                                          Tensor counters) {
  return run(a, a_scale, b, b_scale, offsets, error, weight, limit, pow2, eps, return_gate_up, counters);
}

}  // namespace
}  // namespace fastfp8

STABLE_TORCH_LIBRARY_IMPL(fastfp8, CUDA, library) {
  library.impl("gemm_swiglu_quantize", TORCH_BOX(&fastfp8::gemm_swiglu_quantize_cuda));
  library.impl("gemm_swiglu_quantize.counted", TORCH_BOX(&fastfp8::gemm_swiglu_quantize_counted_cuda));
}
