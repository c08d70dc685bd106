#include "nccl.h"

#include <stdexcept>

#include "plan.h"

#ifdef FASTFP8_NCCL

#include <dlfcn.h>

#include <cstring>

#include "nccl_constants.h"

namespace fastfp8::comm::nccl {
namespace {

#define FASTFP8_NCCL_FUNCTIONS(X) \
  X(ncclGetVersion)               \
  X(ncclGetErrorString)           \
  X(ncclGetLastError)             \
  X(ncclCommQueryProperties)      \
  X(ncclCommWindowRegister)       \
  X(ncclCommWindowDeregister)     \
  X(ncclDevCommCreate)            \
  X(ncclDevCommDestroy)           \
  X(ncclGetLsaDevicePointer)

// From here on a structure says which version it is of, and a newer library takes it.
constexpr int kVersioned = NCCL_VERSION(2, 31, 0);
constexpr int kOldest = NCCL_VERSION(2, 30, 7);

struct Functions {
#define X(NAME) decltype(&::NAME) NAME = nullptr;
  FASTFP8_NCCL_FUNCTIONS(X)
#undef X
};

struct Library {
  Functions call;
  std::string unusable;
};

std::string version_name(int code) {
  return std::to_string(code / 10000) + "." + std::to_string(code / 100 % 100) + "." + std::to_string(code % 100);
}

// Asks for the library that is there: a second copy could not serve the first one's communicators.
Library open_library() {
  Library library;
  void* const opened = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (opened == nullptr) {
    library.unusable = "no libnccl.so.2 has been opened in this process; a CUDA build of torch that links it does so";
    return library;
  }
  Functions& call = library.call;
  call.ncclGetVersion = reinterpret_cast<decltype(&::ncclGetVersion)>(dlsym(opened, "ncclGetVersion"));
  int version = 0;
  if (call.ncclGetVersion != nullptr) call.ncclGetVersion(&version);
  if (version < kOldest) {
    library.unusable = "the rails need NCCL " + version_name(kOldest) +
                       " or newer, the library in this process is NCCL " + version_name(version) +
                       "; torch 2.14 and newer bring one that serves";
    return library;
  }
  if (version != NCCL_VERSION_CODE && (NCCL_VERSION_CODE < kVersioned || version < NCCL_VERSION_CODE)) {
    library.unusable = "fastfp8 was built with the headers of NCCL " + headers_version() +
                       ", the library in this process is NCCL " + version_name(version) +
                       (NCCL_VERSION_CODE < kVersioned ? ": before 2.31 they must be of one version"
                                                       : ": it must not be older than the headers") +
                       "; build fastfp8 again beside this torch";
    return library;
  }
#define X(NAME)                                                          \
  call.NAME = reinterpret_cast<decltype(&::NAME)>(dlsym(opened, #NAME)); \
  if (call.NAME == nullptr && library.unusable.empty())                  \
    library.unusable = "libnccl.so.2 of NCCL " + version_name(version) + " has no " #NAME;
  FASTFP8_NCCL_FUNCTIONS(X)
#undef X
  return library;
}

void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::runtime_error("fastfp8.comm.Buffer: " + sentence);
}

}  // namespace

struct Connection::State {
  Library library;
  ncclComm_t communicator;
  ncclWindow_t window = nullptr;
  bool connected = false;
  NcclConstants given{};
  std::vector<std::byte> constants;
  std::vector<uint64_t> windows;

  const Functions& call() const { return library.call; }

  void check(ncclResult_t result, const std::string& doing) const {
    if (result == ncclSuccess) return;
    const char *text = call().ncclGetErrorString(result), *last = call().ncclGetLastError(communicator);
    require(false, doing + ": NCCL says " + (text == nullptr ? "nothing" : text) +
                       (last == nullptr || *last == '\0' ? "" : std::string(" (") + last + ")"));
  }

  void check_ranks(const Geometry& g) const {
    ncclCommProperties_t properties = NCCL_COMM_PROPERTIES_INITIALIZER;
    check(call().ncclCommQueryProperties(communicator, &properties), "asking for the communicator's properties");
    require(properties.deviceApiSupport, "NCCL's device API is not supported by this communicator");
    require(properties.nRanks == g.ranks(), "the communicator has " + std::to_string(properties.nRanks) +
                                                " ranks, the buffer " + std::to_string(g.ranks()));
    require(properties.nLsaTeams == g.nodes,
            "NCCL finds " + std::to_string(properties.nLsaTeams) +
                " groups of GPUs that reach each other's memory; with ranks_per_node = " + std::to_string(g.gpus) +
                " there are " + std::to_string(g.nodes));
    require(g.nodes == 1 || properties.railedGinType != NCCL_GIN_TYPE_NONE,
            "NCCL has no GPU-initiated networking between the nodes (NCCL_DEBUG=INFO says why)");
  }

  void connect(const Geometry& g, uint64_t address) {
    // Puts are relaxed, in any order: signals by index lie in memory of NCCL's that it registers as strictly ordered.
    check(call().ncclCommWindowRegister(communicator, reinterpret_cast<void*>(address), WindowLayout::of(g).bytes,
                                        &window, NCCL_WIN_COLL_SYMMETRIC),
          "registering the window");
    given.signals = SignalLayout::of(g), given.window = window;
    ncclDevCommRequirements_t requirements = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
    requirements.railGinBarrierCount = 0;
    if (g.nodes > 1) {
      requirements.ginContextCount = g.channels;  // a hint
      requirements.ginSignalCount = given.signals.count;
      requirements.ginConnectionType = NCCL_GIN_CONNECTION_RAIL;
    }
    requirements.ginStrongSignalsRequired = false;
    requirements.ginVaSignalsRequired = false;
    check(call().ncclDevCommCreate(communicator, &requirements, &given.network), "creating the device communicator");
    connected = true;
    const ncclDevComm_t& network = given.network;
    require(network.lsaSize == g.gpus && network.lsaRank == network.rank % g.gpus,
            "rank " + std::to_string(network.rank) + " is GPU " + std::to_string(network.lsaRank) + " of " +
                std::to_string(network.lsaSize) +
                " that reach each other's memory; ranks of a node must follow one another, ranks_per_node = " +
                std::to_string(g.gpus));
    require(g.nodes == 1 || network.ginContextCount > 0, "NCCL gave the device communicator no network context");
    windows.assign(g.ranks(), 0);
    for (int gpu = 0; gpu < g.gpus; ++gpu) {
      void* pointer = nullptr;
      check(call().ncclGetLsaDevicePointer(window, 0, gpu, &pointer), "asking for a neighbour's window");
      windows[network.rank - network.lsaRank + gpu] = reinterpret_cast<uint64_t>(pointer);
    }
    constants.resize(sizeof given);
    std::memcpy(constants.data(), &given, sizeof given);
  }

  // Gives back what there is, whatever fails. Returns the first failure.
  ncclResult_t disconnect() {
    ncclResult_t first = ncclSuccess;
    const auto keep = [&first](ncclResult_t result) {
      if (first == ncclSuccess) first = result;
    };
    if (connected) keep(call().ncclDevCommDestroy(communicator, &given.network));
    if (window != nullptr) keep(call().ncclCommWindowDeregister(communicator, window));
    connected = false, window = nullptr;
    return first;
  }
};

std::string headers_version() { return version_name(NCCL_VERSION_CODE); }

std::string unusable_reason() { return open_library().unusable; }

Connection::Connection(uint64_t communicator, const Geometry& geometry, uint64_t address)
    : state_(std::make_unique<State>()) {
  check_for_nccl(geometry);
  require(communicator != 0, "the group has no NCCL communicator yet");
  require(address != 0 && address % NCCL_WIN_REQUIRED_ALIGNMENT == 0,
          "the window must be at a multiple of " + std::to_string(NCCL_WIN_REQUIRED_ALIGNMENT) + " bytes, it is at " +
              std::to_string(address));
  state_->library = open_library();
  require(state_->library.unusable.empty(), state_->library.unusable);
  state_->communicator = reinterpret_cast<ncclComm_t>(communicator);
  state_->check_ranks(geometry);
  try {
    state_->connect(geometry, address);
  } catch (...) {
    state_->disconnect();
    throw;
  }
}

// Not on all ranks at the same time: what close() has not given back stays until the communicator ends.
Connection::~Connection() = default;

void Connection::close() { state_->check(state_->disconnect(), "closing the rails"); }

}  // namespace fastfp8::comm::nccl

#else  // FASTFP8_NCCL

namespace fastfp8::comm::nccl {

struct Connection::State {
  std::vector<std::byte> constants;
  std::vector<uint64_t> windows;
};

std::string headers_version() { return ""; }

std::string unusable_reason() {
  return "fastfp8 was built without the headers of NCCL 2.30.7 or newer (PyPI: nvidia-nccl-cu13): build it again in an "
         "environment that has them";
}

Connection::Connection(uint64_t, const Geometry& geometry, uint64_t) {
  check_for_nccl(geometry);
  throw std::runtime_error("fastfp8.comm.Buffer: " + unusable_reason());
}

Connection::~Connection() = default;

void Connection::close() {}

}  // namespace fastfp8::comm::nccl

#endif  // FASTFP8_NCCL

namespace fastfp8::comm::nccl {

const std::vector<std::byte>& Connection::constants() const { return state_->constants; }

const std::vector<uint64_t>& Connection::windows() const { return state_->windows; }

}  // namespace fastfp8::comm::nccl
