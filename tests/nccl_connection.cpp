// Connects fastfp8's rails to the libnccl of argv[1], if any, and prints what comes of it. For tests/test_comm_nccl.py.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>

#include "../csrc/comm/nccl.h"
#include "../csrc/comm/nccl_constants.h"

namespace comm = fastfp8::comm;

int main(int count, char** arguments) {
  if (count > 1 && dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) == nullptr) {
    std::printf("%s\n", dlerror());
    return 2;
  }
  std::printf("headers %s: '%s'\n", comm::nccl::headers_version().c_str(), comm::nccl::unusable_reason().c_str());
  const comm::Geometry geometry{2, 2, 3, 8, 2, 256, 8, 32, 2, 5, 2};  // 3 channels, rings of 5 chunks
  try {
    comm::nccl::Connection connection(0x1234, geometry, 4096);
    comm::NcclConstants given;
    if (connection.constants().size() != sizeof given) return 3;
    std::memcpy(&given, connection.constants().data(), sizeof given);
    std::printf("window %zx rank %d contexts %d signals %d\n", reinterpret_cast<size_t>(given.window),
                given.network.rank, static_cast<int>(given.network.ginContextCount), given.signals.count);
    for (uint64_t address : connection.windows()) std::printf("%zx ", static_cast<size_t>(address));
    std::printf("\nconstants %zu\nbytes %lld\n", sizeof given,
                static_cast<long long>(comm::WindowLayout::of(geometry).bytes));
    connection.close();
    connection.close();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}
