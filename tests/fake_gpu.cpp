// A libcuda.so.1 for tests/test_silicon.py, whose memory is the host's. Its one kernel reports how it was launched.
#include <cuda.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

int shared_limit = -1, modules = 0, allocations = 0;

// The parameters of the test's kernel after the address of its report.
constexpr size_t kSizes[] = {8, 4, 8, 4, 8, 2, 12};

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = 40 + index;
  return index ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  if (device != 40) return CUDA_ERROR_INVALID_DEVICE;
  if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = 9;
  if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(0x7f0000000001);
  return device == 40 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  return context == reinterpret_cast<CUcontext>(0x7f0000000001) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, CUjit_option* options, void** values) {
  if (count != 2 || options[0] != CU_JIT_ERROR_LOG_BUFFER || options[1] != CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
    return CUDA_ERROR_INVALID_VALUE;
  if (std::strstr(static_cast<const char*>(image), "refuse me")) {
    std::snprintf(static_cast<char*>(values[0]), reinterpret_cast<size_t>(values[1]), "line 1: refused");
    return CUDA_ERROR_INVALID_PTX;
  }
  ++modules;
  *module = reinterpret_cast<CUmodule>(0x7f0000000002);
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  if (module != reinterpret_cast<CUmodule>(0x7f0000000002)) return CUDA_ERROR_INVALID_HANDLE;
  --modules;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (module != reinterpret_cast<CUmodule>(0x7f0000000002)) return CUDA_ERROR_INVALID_HANDLE;
  *function = reinterpret_cast<CUfunction>(0x7f0000000003);
  return std::strcmp(name, "kernel") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  shared_limit = value;
  return CUDA_SUCCESS;
}
CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  *address = reinterpret_cast<CUdeviceptr>(std::malloc(bytes));
  ++allocations;
  return CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr address) {
  std::free(reinterpret_cast<void*>(address));
  --allocations;
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  return CUDA_SUCCESS;
}

// Eleven words on the launch, what the second parameter points to, and the other parameters one after the other.
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (function != reinterpret_cast<CUfunction>(0x7f0000000003) || extra || config->hStream)
    return CUDA_ERROR_INVALID_HANDLE;
  if (static_cast<int>(config->sharedMemBytes) != shared_limit || config->numAttrs > 1) return CUDA_ERROR_INVALID_VALUE;
  CUlaunchAttribute attribute{};
  if (config->numAttrs) attribute = config->attrs[0];
  const auto& cluster = attribute.value.clusterDim;
  const unsigned words[] = {
      config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,     config->blockDimZ,
      cluster.x,        cluster.y,        cluster.z,        attribute.id,      config->sharedMemBytes};
  char* to = *static_cast<char**>(parameters[0]);
  std::memcpy(to, words, sizeof words);
  to += sizeof words;
  std::memcpy(to, *static_cast<char**>(parameters[1]), 8);
  to += 8;
  for (int i = 1; i < 7; ++i) {
    std::memcpy(to, parameters[i + 1], kSizes[i]);
    to += kSizes[i];
  }
  return CUDA_SUCCESS;
}

// For the test alone: what is still held, and how cuda.h lays the structures out.
void fake_held(int* out) {
  out[0] = modules;
  out[1] = allocations;
}
void fake_layout(size_t* out) {
  const size_t layout[] = {
      sizeof(CUlaunchAttribute),          offsetof(CUlaunchAttribute, value),  sizeof(CUlaunchConfig),
      offsetof(CUlaunchConfig, gridDimX), offsetof(CUlaunchConfig, blockDimX), offsetof(CUlaunchConfig, sharedMemBytes),
      offsetof(CUlaunchConfig, hStream),  offsetof(CUlaunchConfig, attrs),     offsetof(CUlaunchConfig, numAttrs)};
  std::memcpy(out, layout, sizeof layout);
}
}
