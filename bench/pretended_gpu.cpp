// A GPU for a CPU build of torch that is only there to be asked: tensors on "cuda:0" whose memory nobody touches, so
// that an op of ours goes all its way from Python to the launch, which a pretended libcuda (tests/fake_libcuda.cpp)
// then does not make. bench/host.py compiles it, loads it before fastfp8 and times the way.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/library.h>

#include <chrono>
#include <cstdlib>

namespace {

constexpr c10::DeviceType kCuda = c10::DeviceType::CUDA;

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

// Every tensor lies at one place: an allocation costs what torch spends round it.
struct Allocator : c10::Allocator {
  c10::DataPtr allocate(size_t) override {
    static void* const place = std::aligned_alloc(256, 256);
    return {place, nullptr, [](void*) {}, c10::Device(kCuda, 0)};
  }
  void copy_data(void*, const void*, size_t) const override {}
};

Allocator allocator;

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype.value_or(at::kFloat));
}

// An op with the schema of fastfp8::gemm, through torch's stable ABI like it.
using Stable = torch::stable::Tensor;
Stable nothing(const Stable& a, const Stable&, const Stable&, const Stable&, torch::headeronly::IntHeaderOnlyArrayRef,
               at::ScalarType, const std::optional<Stable>&, std::optional<int64_t>) {
  return a;
}

at::Tensor matrix(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, at::ScalarType dtype) {
  return empty_strided(c10::fromIntArrayRefSlow({rows, columns}), c10::fromIntArrayRefSlow({row_stride, column_stride}),
                       dtype, {}, {}, {});
}

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(Hooks);
}
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<kCuda>);
}
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
}

STABLE_TORCH_LIBRARY(fastfp8_pretended, library) {
  library.def(
      "nothing(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, int[2] b_block=[128, 128], "
      "ScalarType out_dtype=bfloat16, Tensor? c=None, int? num_sms=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastfp8_pretended, CUDA, library) { library.impl("nothing", TORCH_BOX(&nothing)); }

#define EXPORTED extern "C" __attribute__((visibility("default")))

// What fastfp8._C asks of a CUDA build of torch, in place of libtorch's own, which a CPU build refuses or has not.
EXPORTED int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
EXPORTED AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  const c10::Device device(kCuda, static_cast<c10::DeviceIndex>(index));
  *guard = reinterpret_cast<DeviceGuardHandle>(new c10::DeviceGuard(device));
  return 0;
}
EXPORTED AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  delete reinterpret_cast<c10::DeviceGuard*>(guard);
  return 0;
}

// Seconds a call of torch.ops.fastfp8.gemm through torch's dispatcher, from C++.
EXPORTED double seconds_of_gemm(int m, int n, int k, int calls) {
  const int64_t blocks = (k + 127) / 128;
  const at::Tensor a = matrix(m, k, k, 1, at::kFloat8_e4m3fn), b = matrix(n, k, k, 1, at::kFloat8_e4m3fn);
  const at::Tensor a_scale = matrix(m, blocks, 1, (m + 3) / 4 * 4, at::kFloat);
  const at::Tensor b_scale = matrix((n + 127) / 128, blocks, blocks, 1, at::kFloat);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastfp8::gemm", "");
  torch::jit::Stack arguments{
      a, a_scale, b, b_scale, c10::List<int64_t>({128, 128}), static_cast<int64_t>(at::kBFloat16)};
  const auto& schema = op.schema().arguments();
  for (size_t i = arguments.size(); i < schema.size(); ++i) arguments.push_back(schema[i].default_value().value());
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) {
    torch::jit::Stack stack = arguments;
    op.callBoxed(stack);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls;
}
