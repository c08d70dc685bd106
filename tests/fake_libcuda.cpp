// A libcuda.so.1 with one pretended H200 that writes down what it is asked to do, one line a call, on stderr, unless
// FAKE_CUDA_QUIET is set. tests/test_driver.py compiles it and lets fastfp8's driver.cpp open it; bench/host.py too.
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

// cuTensorMapEncodeTiled leaves its arguments in the 128 bytes, so that the launch can print the map it was given.
struct Map {
  uint64_t address, dims[2], pitch;
  uint32_t box[2], element_strides[2];
  int type, rank, interleave, swizzle, promotion, fill;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

bool set(const char* variable) { return std::getenv(variable) != nullptr; }

bool quiet() {
  static const bool asked = set("FAKE_CUDA_QUIET");
  return asked;
}

void print_map(const void* parameter) {
  Map map;
  std::memcpy(&map, parameter, sizeof map);
  std::fprintf(stderr, "map %llu %llu %llu %llu %u %u %u %u type=%d rank=%d interleave=%d swizzle=%d fill=%d\n",
               (unsigned long long)map.address, (unsigned long long)map.dims[0], (unsigned long long)map.dims[1],
               (unsigned long long)map.pitch, map.box[0], map.box[1], map.element_strides[0], map.element_strides[1],
               map.type, map.rank, map.interleave, map.swizzle, map.fill);
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  const char* text = std::getenv("FAKE_CUDA_VERSION");
  *version = text ? std::atoi(text) : 13000;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "a pretended failure";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  std::snprintf(name, size, "Fake H200");
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  const char* major = std::getenv("FAKE_CUDA_MAJOR");
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? (major ? std::atoi(major) : 9)
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
                                                                       : 132;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuLibraryLoadFromFile(CUlibrary* library, const char* path, CUjit_option*, void**, unsigned, CUlibraryOption*,
                               void**, unsigned) {
  if (!quiet()) std::fprintf(stderr, "load %s\n", path);
  *library = reinterpret_cast<CUlibrary>(1);
  return CUDA_SUCCESS;
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) {
  if (!quiet()) std::fprintf(stderr, "kernel %s\n", name);
  *kernel = reinterpret_cast<CUkernel>(2);
  return CUDA_SUCCESS;
}
CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel, CUdevice) {
  if (!quiet()) std::fprintf(stderr, "attribute %d %d\n", static_cast<int>(attribute), value);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* pitches, const cuuint32_t* box,
                                const cuuint32_t* strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const Map map{reinterpret_cast<uint64_t>(address),
                {dims[0], dims[1]},
                pitches[0],
                {box[0], box[1]},
                {strides[0], strides[1]},
                type,
                static_cast<int>(rank),
                interleave,
                swizzle,
                promotion,
                fill};
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void** parameters, void**) {
  static const bool fails = set("FAKE_CUDA_FAIL");
  if (fails) return CUDA_ERROR_INVALID_VALUE;
  if (quiet()) return CUDA_SUCCESS;
  std::fprintf(stderr, "launch %u %u %u %u shared=%u stream=%llu attributes=%u\n", config->gridDimX, config->gridDimY,
               config->blockDimX, config->blockDimY, config->sharedMemBytes,
               (unsigned long long)reinterpret_cast<uint64_t>(config->hStream), config->numAttrs);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& cluster = config->attrs[i].value.clusterDim;
    std::fprintf(stderr, "launch attribute %u: %u %u %u\n", static_cast<unsigned>(config->attrs[i].id), cluster.x,
                 cluster.y, cluster.z);
  }
  // The parameters of the GEMM entry: five tensor maps, three addresses, eight integers.
  for (int i = 0; i < 5; ++i) print_map(parameters[i]);
  for (int i = 5; i < 8; ++i)
    std::fprintf(stderr, "address %llu\n", (unsigned long long)*static_cast<uint64_t*>(parameters[i]));
  for (int i = 8; i < 16; ++i) std::fprintf(stderr, "int %d\n", *static_cast<int*>(parameters[i]));
  return CUDA_SUCCESS;
}
}
