// NCCL's device API on the host: the only place that talks to libnccl, the one that torch has opened. Nothing links it.
//
// Untested on silicon: tests let it talk to a pretended library.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "layout.h"

namespace fastfp8::comm::nccl {

// "2.30.7": of the headers that this was compiled with. "" without: then nothing else here works.
std::string headers_version();

// "" if the rails can go over NCCL in this process; else a sentence that says what is missing. torch opens its libnccl
// when it is imported, so that the answer is of after that.
std::string unusable_reason();

// A rank's window in an existing communicator, and a device communicator for the rails. The communicator's ranks are
// the geometry's, by number.
class Connection {
 public:
  // `communicator`: an ncclComm_t. `address`: 4096-byte aligned memory of ncclMemAlloc or the like, WindowLayout::bytes
  // long, zero at first. Called by all ranks at the same time. Raises std::runtime_error.
  Connection(uint64_t communicator, const Geometry& geometry, uint64_t address);
  ~Connection();

  // Gives back what the constructor took. By all ranks, after the last kernel on each of them has ended. Without it
  // that stays until the communicator ends.
  void close();

  // NcclConstants (nccl_constants.h), for RailPlan.
  const std::vector<std::byte>& constants() const;
  // [ranks]: the windows' addresses, for the kernels' slot `windows`; 0 for ranks of other nodes.
  const std::vector<uint64_t>& windows() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fastfp8::comm::nccl
