#include "driver.h"

#include <cuda.h>
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace fastfp8::driver {
namespace {

constexpr int kCudaOfCubins = CUDA_VERSION / 1000 * 1000;  // a cubin runs on every driver of its CUDA major version

#define FASTFP8_DRIVER_FUNCTIONS(X) \
  X(cuInit)                         \
  X(cuDriverGetVersion)             \
  X(cuGetErrorName)                 \
  X(cuGetErrorString)               \
  X(cuDeviceGetCount)               \
  X(cuDeviceGet)                    \
  X(cuDeviceGetName)                \
  X(cuDeviceGetAttribute)           \
  X(cuCtxGetDevice)                 \
  X(cuLibraryLoadFromFile)          \
  X(cuLibraryGetKernel)             \
  X(cuKernelSetAttribute)           \
  X(cuTensorMapEncodeTiled)         \
  X(cuLaunchKernelEx)

struct Functions {
#define X(NAME) decltype(&::NAME) NAME = nullptr;
  FASTFP8_DRIVER_FUNCTIONS(X)
#undef X
};

struct Driver {
  Functions call;
  int version = 0;
  std::vector<DeviceInfo> devices;
  std::string unusable;
};

// Opens libcuda and asks it for what it has. Leaves the reason in `unusable` where something is missing.
Driver open_driver() {
  Driver driver;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    driver.unusable = "no NVIDIA driver: libcuda.so.1 cannot be opened";
    return driver;
  }
  Functions& call = driver.call;
  call.cuInit = reinterpret_cast<decltype(&::cuInit)>(dlsym(library, "cuInit"));
  call.cuDriverGetVersion = reinterpret_cast<decltype(&::cuDriverGetVersion)>(dlsym(library, "cuDriverGetVersion"));
  if (call.cuInit == nullptr || call.cuDriverGetVersion == nullptr) {
    driver.unusable = "libcuda.so.1 is not an NVIDIA driver: it has no cuInit";
    return driver;
  }
  call.cuDriverGetVersion(&driver.version);
  if (driver.version < kCudaOfCubins) {
    driver.unusable = "the driver supports CUDA " + std::to_string(driver.version / 1000) + "." +
                      std::to_string(driver.version % 1000 / 10) + ", the kernels were built for CUDA " +
                      std::to_string(kCudaOfCubins / 1000) +
                      ".0: update the driver (580 or newer for CUDA 13), or build fastfp8 with an nvcc of its version";
    return driver;
  }
#define X(NAME)                                                           \
  call.NAME = reinterpret_cast<decltype(&::NAME)>(dlsym(library, #NAME)); \
  if (call.NAME == nullptr && driver.unusable.empty())                    \
    driver.unusable = "libcuda.so.1 of CUDA " + std::to_string(driver.version / 1000) + " has no " #NAME;
  FASTFP8_DRIVER_FUNCTIONS(X)
#undef X
  if (!driver.unusable.empty()) return driver;
  int count = 0;
  if (call.cuInit(0) != CUDA_SUCCESS || call.cuDeviceGetCount(&count) != CUDA_SUCCESS || count == 0) {
    driver.unusable = "the driver finds no GPU";
    return driver;
  }
  for (int index = 0; index < count; ++index) {
    CUdevice device = 0;
    char name[256] = "";
    DeviceInfo info{};
    call.cuDeviceGet(&device, index);
    call.cuDeviceGetName(name, sizeof name, device);
    call.cuDeviceGetAttribute(&info.major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
    call.cuDeviceGetAttribute(&info.minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
    call.cuDeviceGetAttribute(&info.num_sms, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
    info.name = name;
    driver.devices.push_back(info);
  }
  return driver;
}

const Driver& get() {
  static const Driver driver = open_driver();
  return driver;
}

[[noreturn]] void fail(CUresult result, const std::string& doing) {
  const char *name = "an unknown error", *text = "";
  get().call.cuGetErrorName(result, &name);
  get().call.cuGetErrorString(result, &text);
  throw std::runtime_error("fastfp8: " + doing + ": " + name + " (" + text + ")");
}

// `doing` makes the words: only a call that fails pays for them.
template <class Doing>
void check(CUresult result, const Doing& doing) {
  if (result != CUDA_SUCCESS) [[unlikely]]
    fail(result, doing());
}

std::string& kernel_directory() {
  static std::string directory;
  return directory;
}

// Kernels by device and by the plan's symbol pointer, which is a literal and so the same for every plan of an instance.
// cuLibrary loads a cubin once for all contexts; the shared-memory limit is an attribute of kernel and device.
CUkernel get_kernel(const LaunchPlan& plan) {
  static std::mutex mutex;
  static std::map<std::string, CUlibrary> libraries;
  static std::map<std::pair<CUdevice, const char*>, CUkernel> kernels;
  const Functions& call = get().call;
  CUdevice device = 0;
  check(call.cuCtxGetDevice(&device), [] { return "no CUDA context is current"; });
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = kernels.find({device, plan.kernel});
  if (found != kernels.end()) return found->second;
  CUlibrary& library = libraries[plan.module];
  if (library == nullptr) {
    const std::string path = kernel_directory() + "/" + plan.module + ".cubin";
    check(call.cuLibraryLoadFromFile(&library, path.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0),
          [&] { return "loading " + path; });
  }
  CUkernel kernel = nullptr;
  check(call.cuLibraryGetKernel(&kernel, library, plan.kernel),
        [&] { return std::string("finding ") + plan.kernel + " in " + plan.module + ".cubin"; });
  check(
      call.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, plan.shared_bytes, kernel, device),
      [&] { return "asking for " + std::to_string(plan.shared_bytes) + " bytes of shared memory for " + plan.kernel; });
  kernels[{device, plan.kernel}] = kernel;
  return kernel;
}

CUtensorMap encode(const TensorMap& map, uint64_t address, const char* slot) {
  CUtensorMap encoded;
  const CUtensorMapDataType type = map.dtype == DType::kE4M3   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : map.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUtensorMapSwizzle swizzle = map.swizzle == Swizzle::k128B  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : map.swizzle == Swizzle::k64B ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : map.swizzle == Swizzle::k32B ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  const cuuint64_t dims[2] = {map.dims[0], map.dims[1]}, pitches[1] = {map.pitch};
  const cuuint32_t element_strides[2] = {1, 1};
  check(get().call.cuTensorMapEncodeTiled(&encoded, type, 2, reinterpret_cast<void*>(address), dims, pitches,
                                          map.box.data(), element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        [&] { return std::string("encoding the tensor map of '") + slot + "'"; });
  return encoded;
}

}  // namespace

const std::string& unusable_reason() { return get().unusable; }

int version() { return get().version; }

int device_count() { return static_cast<int>(get().devices.size()); }

const DeviceInfo& device(int index) {
  if (index < 0 || index >= device_count())
    throw std::runtime_error("fastfp8: there is no CUDA device " + std::to_string(index) +
                             (unusable_reason().empty() ? "" : " (" + unusable_reason() + ")"));
  return get().devices[index];
}

void set_kernel_directory(const std::string& directory) { kernel_directory() = directory; }

void launch(const LaunchPlan& plan, const Binding* bindings, int binding_count, void* stream) {
  if (!unusable_reason().empty()) throw std::runtime_error("fastfp8: " + unusable_reason());
  const auto address_of = [&](const char* slot) -> uint64_t {
    for (int i = 0; i < binding_count; ++i) {
      if (slot != nullptr && std::strcmp(bindings[i].slot, slot) == 0) return bindings[i].address;
    }
    if (slot != nullptr) throw std::logic_error(std::string("no tensor is bound to slot '") + slot + "'");
    return 0;
  };
  // cuLaunchKernelEx copies the parameters before it returns.
  union Parameter {
    int32_t i;
    float f;
    uint64_t address;
    CUtensorMap map;
  };
  Parameter parameters[LaunchPlan::kMaxArguments];
  void* pointers[LaunchPlan::kMaxArguments];
  for (int i = 0; i < plan.argument_count; ++i) {
    Parameter& parameter = parameters[i];
    pointers[i] = &parameter;
    const LaunchArgument& argument = plan.arguments[i];
    if (const auto* integer = std::get_if<int32_t>(&argument)) {
      parameter.i = *integer;
    } else if (const auto* number = std::get_if<float>(&argument)) {
      parameter.f = *number;
    } else if (const auto* tensor = std::get_if<TensorSlot>(&argument)) {
      parameter.address = address_of(tensor->slot);
    } else if (const auto* constants = std::get_if<Constants>(&argument)) {
      pointers[i] = const_cast<std::byte*>(plan.constants.data() + constants->at);
    } else {
      const auto& slot = std::get<TensorMapSlot>(argument);
      if (slot.slot == nullptr)
        std::memset(&parameter.map, 0, sizeof parameter.map);
      else
        parameter.map = encode(slot.map, address_of(slot.slot), slot.slot);
    }
  }
  const CUkernel kernel = get_kernel(plan);
  CUlaunchAttribute attributes[2]{};
  unsigned attribute_count = 0;
  if (plan.cluster[0] * plan.cluster[1] * plan.cluster[2] > 1) {
    CUlaunchAttribute& attribute = attributes[attribute_count++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = plan.cluster[0];
    attribute.value.clusterDim.y = plan.cluster[1];
    attribute.value.clusterDim.z = plan.cluster[2];
  }
  if (plan.overlaps) {
    CUlaunchAttribute& attribute = attributes[attribute_count++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  CUlaunchConfig config{};
  config.gridDimX = plan.grid[0], config.gridDimY = plan.grid[1], config.gridDimZ = plan.grid[2];
  config.blockDimX = plan.block[0], config.blockDimY = plan.block[1], config.blockDimZ = plan.block[2];
  config.sharedMemBytes = plan.shared_bytes;
  config.hStream = static_cast<CUstream>(stream);
  config.attrs = attributes;
  config.numAttrs = attribute_count;
  check(get().call.cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel), pointers, nullptr),
        [&] { return std::string("launching ") + plan.kernel; });
}

}  // namespace fastfp8::driver
