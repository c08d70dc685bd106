// A libnccl.so.2 that writes down what it is asked to do, one line a call, on stderr. It pretends to be a rank of two
// nodes of two GPUs, FAKE_NCCL_RANK or 3. tests/test_comm_nccl.py compiles it and lets fastfp8's nccl.cpp find it.
#include <nccl.h>
#include <nccl_device.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

int number(const char* variable, int otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}

ncclResult_t result_of(const char* function) {
  const char* const failing = std::getenv("FAKE_NCCL_FAIL");
  return failing != nullptr && std::strcmp(failing, function) == 0 ? ncclInvalidUsage : ncclSuccess;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = number("FAKE_NCCL_VERSION", NCCL_VERSION_CODE);
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t) { return "a pretended failure"; }
const char* ncclGetLastError(ncclComm_t) { return "the cable is pretended too"; }
ncclResult_t ncclCommQueryProperties(ncclComm_t communicator, ncclCommProperties_t* properties) {
  std::fprintf(stderr, "properties of %zx: size %d, version %d\n", reinterpret_cast<size_t>(communicator),
               properties->size == sizeof *properties, properties->version == NCCL_VERSION_CODE);
  properties->rank = number("FAKE_NCCL_RANK", 3), properties->nRanks = number("FAKE_NCCL_RANKS", 4);
  properties->deviceApiSupport = number("FAKE_NCCL_DEVICE_API", 1);
  properties->nLsaTeams = number("FAKE_NCCL_TEAMS", 2);
  properties->railedGinType = static_cast<ncclGinType_t>(number("FAKE_NCCL_GIN", NCCL_GIN_TYPE_PROXY));
  return result_of("ncclCommQueryProperties");
}
ncclResult_t ncclCommWindowRegister(ncclComm_t, void* buffer, size_t size, ncclWindow_t* window, int flags) {
  std::fprintf(stderr, "register %zx %zu flags=%d\n", reinterpret_cast<size_t>(buffer), size, flags);
  *window = reinterpret_cast<ncclWindow_t>(0x77);
  return result_of("ncclCommWindowRegister");
}
ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t window) {
  std::fprintf(stderr, "deregister %zx\n", reinterpret_cast<size_t>(window));
  return result_of("ncclCommWindowDeregister");
}
ncclResult_t ncclDevCommCreate(ncclComm_t, const ncclDevCommRequirements_t* asked, ncclDevComm_t* network) {
  std::fprintf(stderr,
               "create signals=%d counters=%d contexts=%d connection=%d strong=%d va=%d barriers=%d%d%d%d force=%d\n",
               asked->ginSignalCount, asked->ginCounterCount, asked->ginContextCount, asked->ginConnectionType,
               asked->ginStrongSignalsRequired, asked->ginVaSignalsRequired, asked->barrierCount,
               asked->lsaBarrierCount, asked->railGinBarrierCount, asked->worldGinBarrierCount, asked->ginForceEnable);
  if (result_of("ncclDevCommCreate") != ncclSuccess) return ncclInvalidUsage;
  *network = ncclDevComm_t{};
  network->rank = number("FAKE_NCCL_RANK", 3), network->nRanks = 4;
  network->lsaSize = number("FAKE_NCCL_LSA", 2), network->lsaRank = network->rank % 2;
  network->ginContextCount = number("FAKE_NCCL_CONTEXTS", asked->ginContextCount);
  return ncclSuccess;
}
ncclResult_t ncclDevCommDestroy(ncclComm_t, const ncclDevComm_t* network) {
  std::fprintf(stderr, "destroy rank %d\n", network->rank);
  return result_of("ncclDevCommDestroy");
}
ncclResult_t ncclGetLsaDevicePointer(ncclWindow_t window, size_t offset, int gpu, void** pointer) {
  std::fprintf(stderr, "pointer %zx %zu %d\n", reinterpret_cast<size_t>(window), offset, gpu);
  *pointer = reinterpret_cast<void*>(static_cast<size_t>(0x10000) * (gpu + 1));
  return result_of("ncclGetLsaDevicePointer");
}
}
