// Global memory as PTX's memory model lets several CTAs and devices see it.
//
// A weak store is visible in its own CTA at once. For others it waits in the CTA's PendingStores, from which stores
// leave in random order, or where a release, a fence or the CTA's end flushes them. A weak load may return what a
// location held before its last change, if that came after the CTA's last acquire.
#pragma once
#include <cstdint>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

#include "who.h"

namespace emulator {

struct Cta;
struct Context;
struct Machine;

constexpr uint32_t kGranule = 16;  // bytes; no access of a lane crosses one

enum class Scope : uint8_t { kCta, kCluster, kGpu, kSys };

struct Order {
  bool strong = false, acquire = false, release = false;
  bool constant = false;  // ld.global.nc: nobody writes there as long as the kernel runs
  Scope scope = Scope::kCta;
};

struct MemoryRange {
  uint64_t address, bytes;
  bool writable;
  std::string name;
};

struct PendingStores {
  struct Entry {
    uint8_t bytes[kGranule];
    uint16_t mask;    // of bytes
    uint16_t thread;  // that stored them
    uint32_t known;   // warps that a barrier has told of them: their release covers them too
  };
  std::unordered_map<uint64_t, std::vector<Entry>> granules;
  std::vector<uint64_t> order;  // granules to pick from at random; some may be gone
};

// What a CTA is sure to see.
struct Observed {
  uint64_t gpu = 0, sys = 0;                           // time of the last acquire
  uint64_t proxy_fence = 0;                            // time of the last fence.proxy.async that covers global memory
  std::unordered_map<uint64_t, uint64_t> granules;     // time of the newest value seen
  std::unordered_map<uint64_t, uint64_t> tensor_maps;  // time of the last acquire, by address
};

struct GlobalMemory {
  // The last change of a granule.
  struct Version {
    uint8_t old[kGranule];
    uint16_t mask;  // of bytes, in `old`
    uint64_t time;  // 0: never
    uint32_t cta, device;
    uint16_t thread;
    bool async;       // by the async proxy
    bool everywhere;  // released at .sys: other devices see it
  };
  std::vector<MemoryRange> ranges;  // sorted by address
  std::unordered_map<uint64_t, Version> versions;
  std::unordered_map<uint32_t, uint64_t> map_releases;  // time of each CTA's last release to the tensormap proxy
  std::unordered_map<uint64_t, uint64_t> proxy_fences;  // time of each thread's last; the key is CTA and thread
  std::vector<std::vector<uint64_t>> local_to_device;   // granules not visible everywhere, by device
  uint64_t now = 0;
  std::list<std::vector<uint64_t>> heap;  // of malloc
  uint64_t heap_used = 0;

  // Host memory of [address, address + bytes) in a registered range, or an Error that names the nearest one.
  uint8_t* find(uint64_t address, uint64_t bytes, bool write, const Who& who) const;
  const MemoryRange* nearest(uint64_t address) const;  // the last one that begins at or before the address
  uint64_t allocate(uint64_t bytes);                   // 0 where the heap is full
  bool free(uint64_t address);                         // false for what is not from allocate
  uint64_t last_change(uint64_t address, uint64_t bytes) const;
};

// The generic proxy, for one lane; at most 16 bytes, aligned to their number.
void global_load(Context& context, int lane, uint64_t address, void* out, uint32_t bytes, Order order);
void global_store(Context& context, int lane, uint64_t address, const void* in, uint32_t bytes, Order order);
// Before and after an atomic operation on the bytes: what it finds there, and what it leaves.
void global_atomic_begin(Context& context, int lane, uint64_t address, void* value, uint32_t bytes, Order order);
void global_atomic_end(Context& context, int lane, uint64_t address, const void* value, uint32_t bytes, Order order);
void global_fence(Context& context, Order order);

// fence.proxy.async that covers global memory.
void global_proxy_fence(Context& context);
// The async proxy.
void async_read_global(Machine& machine, const Cta& cta, uint64_t address, void* out, uint32_t bytes, const Who& who);
void async_write_global(Machine& machine, const Cta& cta, uint64_t address, const void* in, uint32_t bytes,
                        const Who& who);

// A barrier among `warps` of the CTA: what one of them knows, all know. `lanes` are those of a single warp.
void barrier_tells(Cta& cta, uint32_t warps);
void warp_tells(Cta& cta, int warp, uint32_t lanes);
// Makes some pending stores visible, or all.
void drain_some(Machine& machine, Cta& cta);
void drain_all(Machine& machine, Cta& cta);

}  // namespace emulator
