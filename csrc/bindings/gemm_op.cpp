// torch.ops.fastfp8.gemm on CUDA tensors: tensors -> problem -> config -> plan -> launch; Triton where no kernel of
// ours fits.
#include "gemm_op.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <stdexcept>

#include "../common/driver.h"
#include "../gemm/plan.h"
#include "tensors.h"

namespace fastfp8 {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Present in the CUDA builds of torch from 2.11 on, hence looked up rather than linked.
using GetCurrentStream = int (*)(int32_t device, void** stream);
GetCurrentStream get_current_stream() {
  static const auto function =
      reinterpret_cast<GetCurrentStream>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  return function;
}

Tensor call_triton(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                   IntHeaderOnlyArrayRef b_block, ScalarType out_dtype, const std::optional<Tensor>& c) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(a), from(a_scale), from(b), from(b_scale), from(b_block), from(out_dtype), from(c)};
  if (torch_call_dispatcher("fastfp8::_gemm_triton", "", stack, TORCH_ABI_VERSION) != 0)
    throw std::runtime_error("fastfp8.gemm: the Triton kernel failed; torch has printed why above");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor gemm_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                 IntHeaderOnlyArrayRef b_block, ScalarType out_dtype, const std::optional<Tensor>& c) {
  gemm::GemmOperands operands{view_of(a),   view_of(a_scale), view_of(b), view_of(b_scale),
                              std::nullopt, b_block[0],       b_block[1], dtype_of(out_dtype)};
  if (c) operands.c = view_of(*c);
  const int device = operands.a.device;
  const bool ready = device >= 0 && gemm_sm90_unusable_reason(device).empty();
  const gemm::GemmProblem problem = gemm::make_problem(operands, ready ? driver::device(device).num_sms : 1,
                                                       gemm::Machine::of(ready ? driver::device(device).name : ""));
  if (!ready) {
    if (!triton_unusable_reason().empty())
      throw std::runtime_error("fastfp8.gemm: no backend can serve cuda:" + std::to_string(device) +
                               ". sm_90a kernel: " + gemm_sm90_unusable_reason(device) +
                               ". Triton: " + triton_unusable_reason());
    return call_triton(a, a_scale, b, b_scale, b_block, out_dtype, c);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t shape[] = {problem.m, problem.n};
  Tensor out = torch::stable::new_empty(a, {shape, 2}, out_dtype);
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
  void* stream = nullptr;
  if (get_current_stream()(device, &stream) != 0)
    throw std::runtime_error("fastfp8.gemm: torch gave no current stream");
  driver::launch(gemm::plan(problem, gemm::select(problem)), bindings, 6, stream);
  return out;
}

std::string& triton_reason() {
  static std::string reason = "fastfp8 is not imported";
  return reason;
}

}  // namespace

std::string gemm_sm90_unusable_reason(int device) {
  if (!driver::unusable_reason().empty()) return driver::unusable_reason();
  const driver::DeviceInfo& info = driver::device(device);
  if (info.major != 9 || info.minor != 0)
    return "built for sm_90a, this GPU is sm_" + std::to_string(info.major) + std::to_string(info.minor);
  if (get_current_stream() == nullptr)
    return "needs a CUDA build of torch, 2.11 or newer, to ask for the current stream";
  return "";
}

void set_triton_unusable_reason(const std::string& reason) { triton_reason() = reason; }
const std::string& triton_unusable_reason() { return triton_reason(); }

}  // namespace fastfp8

STABLE_TORCH_LIBRARY_IMPL(fastfp8, CUDA, library) { library.impl("gemm", TORCH_BOX(&fastfp8::gemm_cuda)); }
