#include "backend.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "../common/driver.h"

namespace fastfp8 {
namespace {

// Present in the CUDA builds of torch from 2.11 on, hence looked up rather than linked.
using GetCurrentStream = int (*)(int32_t device, void** stream);
GetCurrentStream get_current_stream() {
  static const auto function =
      reinterpret_cast<GetCurrentStream>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  return function;
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

void* current_stream(int device) {
  void* stream = nullptr;
  if (get_current_stream()(device, &stream) != 0) throw std::runtime_error("fastfp8: torch gave no current stream");
  return stream;
}

void call_triton(const char* op, const char* triton_op, int device, StableIValue* stack) {
  if (!triton_unusable_reason().empty()) {
    const std::string reason = gemm_sm90_unusable_reason(device);
    throw std::runtime_error(std::string("fastfp8.") + op + ": no backend can serve cuda:" + std::to_string(device) +
                             ". sm_90a kernel: " + (reason.empty() ? "not for these arguments" : reason) +
                             ". Triton: " + triton_unusable_reason());
  }
  if (torch_call_dispatcher(triton_op, "", stack, TORCH_ABI_VERSION) != 0)
    throw std::runtime_error(std::string("fastfp8.") + op + ": the Triton kernel failed; torch has printed why above");
}

}  // namespace fastfp8
