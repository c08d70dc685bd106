#include "global_memory.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "machine.h"

namespace emulator {
namespace {

constexpr const char* kHeapName = "malloc";
constexpr size_t kMostPending = 512;  // granules of a CTA

uint16_t byte_mask(uint64_t address, uint32_t bytes) {
  return static_cast<uint16_t>(((1u << bytes) - 1) << address % kGranule);
}

uint16_t thread_of(const Context& c, int lane) { return static_cast<uint16_t>(c.warp.index * kLanes + lane); }

struct Writer {
  const Cta* cta;
  uint16_t thread;
  bool async, everywhere;
};

// Writes the bytes of `mask` in a granule to host memory, where all CTAs of the device can see them.
void publish(Machine& machine, const Writer& writer, uint64_t granule, const uint8_t* bytes, uint16_t mask) {
  auto* host = reinterpret_cast<uint8_t*>(granule * kGranule);
  GlobalMemory& memory = machine.memory;
  auto& version = memory.versions[granule];
  const int device = writer.cta->grid->device;
  // Bytes of the granule that nobody writes may lie outside of any buffer.
  for (uint32_t i = 0; i < kGranule; ++i) {
    version.old[i] = 0;
    if (mask >> i & 1) version.old[i] = host[i];
  }
  bool changed = false;
  for (uint32_t i = 0; i < kGranule; ++i) {
    if (!(mask >> i & 1)) continue;
    changed |= host[i] != bytes[i];
    host[i] = bytes[i];
  }
  version.mask = mask;
  version.time = ++memory.now;
  version.cta = writer.cta->uid;
  version.device = static_cast<uint32_t>(device);
  version.thread = writer.thread;
  version.async = writer.async;
  version.everywhere = writer.everywhere;
  if (!writer.everywhere) {
    auto& local = memory.local_to_device;
    if (local.size() <= static_cast<size_t>(device)) local.resize(device + 1);
    local[device].push_back(granule);
  }
  if (changed) machine.events++;
}

void publish(Machine& machine, const Cta& cta, uint64_t granule, const PendingStores::Entry& entry, bool everywhere) {
  publish(machine, {&cta, entry.thread, false, everywhere}, granule, entry.bytes, entry.mask);
}

// Later stores of the CTA to the same bytes take the place of earlier ones.
void take_over(std::vector<PendingStores::Entry>& entries, uint16_t mask) {
  for (auto& entry : entries) entry.mask &= ~mask;
  std::erase_if(entries, [](const PendingStores::Entry& entry) { return entry.mask == 0; });
}

void drain_granule(Machine& machine, Cta& cta, uint64_t granule, bool one) {
  const auto found = cta.stores.granules.find(granule);
  if (found == cta.stores.granules.end()) return;
  auto& entries = found->second;
  if (one && entries.size() > 1) {
    const size_t pick = machine.below(static_cast<uint32_t>(entries.size()));
    publish(machine, cta, granule, entries[pick], false);
    entries.erase(entries.begin() + static_cast<std::ptrdiff_t>(pick));
    return;
  }
  for (const auto& entry : entries) publish(machine, cta, granule, entry, false);
  cta.stores.granules.erase(found);
}

void drain_random(Machine& machine, Cta& cta) {
  auto& order = cta.stores.order;
  while (!order.empty()) {
    const size_t pick = machine.random() % order.size();
    const uint64_t granule = order[pick];
    if (cta.stores.granules.contains(granule)) return drain_granule(machine, cta, granule, machine.below(2) == 0);
    order[pick] = order.back();
    order.pop_back();
  }
}

// What a release by `lanes` of a warp covers: their own stores and those that barriers have told the warp of.
bool covers(const PendingStores::Entry& entry, const Warp& warp, uint32_t lanes) {
  const bool own = entry.thread / kLanes == warp.index && (lanes >> entry.thread % kLanes & 1);
  return own || (entry.known >> warp.index & 1);
}

void drain_known(Machine& machine, Cta& cta, const Warp& warp, uint32_t lanes, bool everywhere) {
  for (auto it = cta.stores.granules.begin(); it != cta.stores.granules.end();) {
    auto& entries = it->second;
    std::erase_if(entries, [&](const PendingStores::Entry& entry) {
      if (!covers(entry, warp, lanes)) return false;
      publish(machine, cta, it->first, entry, everywhere);
      return true;
    });
    it = entries.empty() ? cta.stores.granules.erase(it) : std::next(it);
  }
  if (!everywhere) return;
  // A release at .sys is cumulative over all that the device has seen.
  auto& local = machine.memory.local_to_device;
  const auto device = static_cast<size_t>(cta.grid->device);
  if (device >= local.size()) return;
  for (uint64_t granule : local[device]) {
    auto& version = machine.memory.versions[granule];
    if (version.device == device) version.everywhere = true;
  }
  local[device].clear();
}

// A release at .cta tells all warps, whether they acquire or not: they may then release it to others.
void release(Context& c, uint32_t lanes, Scope scope) {
  if (scope == Scope::kCta) {
    for (auto& [granule, entries] : c.cta.stores.granules) {
      for (auto& entry : entries)
        if (covers(entry, c.warp, lanes)) entry.known = ~0u;
    }
    mbarriers_told(c.cta.shared, 1u << c.warp.index, ~0u);
    return shared_tells(c.cta.shared, 1u << c.warp.index, ~0u);
  }
  mbarriers_released(c.cta.shared, c.warp.index);
  drain_known(c.machine, c.cta, c.warp, lanes, scope == Scope::kSys);
}

void acquire(Context& c, Scope scope) {
  if (scope == Scope::kCta) return;
  c.cta.observed.gpu = c.machine.memory.now;
  if (scope == Scope::kSys) c.cta.observed.sys = c.machine.memory.now;
}

// Whether this read, of what is not the newest value, may still return the one before it.
bool may_be_old(Context& c, uint64_t granule, GlobalMemory::Version& version, bool strong) {
  const Cta& cta = c.cta;
  if (version.cta == cta.uid) return false;
  const bool same_device = version.device == static_cast<uint32_t>(cta.grid->device);
  if (!same_device && !version.everywhere) {
    // Stored for the other device's own eyes: it comes across some time.
    if (c.machine.below(4) != 0) return true;
    version.everywhere = true;
    c.machine.events++;
  }
  if (strong || version.time <= (same_device ? cta.observed.gpu : cta.observed.sys)) return false;
  const auto seen = cta.observed.granules.find(granule);
  if (seen != cta.observed.granules.end() && seen->second >= version.time) return false;
  return c.machine.below(2) == 0;
}

// Puts back what the last change has changed.
void copy_old(const GlobalMemory::Version& version, uint64_t address, void* value, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; ++i) {
    const uint64_t at = address % kGranule + i;
    if (version.mask >> at & 1) static_cast<uint8_t*>(value)[i] = version.old[at];
  }
}

uint64_t thread_key(uint32_t cta, uint32_t thread) { return static_cast<uint64_t>(cta) << 16 | thread; }

[[noreturn]] void fail_unfenced(const GlobalMemory::Version& version, uint64_t address, const Who& who) {
  std::ostringstream text;
  text << who << ": the async proxy reads global memory at 0x" << std::hex << address << std::dec << ", which thread "
       << version.thread << " of CTA " << version.cta
       << " stored in this launch, and no fence.proxy.async lies in between";
  throw Error(text.str());
}

}  // namespace

const MemoryRange* GlobalMemory::nearest(uint64_t address) const {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                      [](uint64_t a, const MemoryRange& range) { return a < range.address; });
  return after == ranges.begin() ? nullptr : &*std::prev(after);
}

uint8_t* GlobalMemory::find(uint64_t address, uint64_t bytes, bool write, const Who& who) const {
  const MemoryRange* const nearest = this->nearest(address);
  if (nearest != nullptr && bytes <= nearest->bytes && address - nearest->address <= nearest->bytes - bytes &&
      (!write || nearest->writable))
    return reinterpret_cast<uint8_t*>(address);
  std::ostringstream text;
  text << who << ": out of bounds: " << (write ? "write of " : "read of ") << bytes << " bytes of global memory at 0x"
       << std::hex << address << std::dec;
  if (nearest == nullptr)
    text << ", below all buffers of the launch";
  else
    text << ", " << static_cast<int64_t>(address - nearest->address) << " bytes into '" << nearest->name << "' of "
         << nearest->bytes << " bytes" << (nearest->writable ? "" : ", which is read-only");
  throw Error(text.str());
}

uint64_t GlobalMemory::allocate(uint64_t bytes) {
  constexpr uint64_t kHeap = 8 << 20;  // CUDA's default
  if (bytes == 0 || bytes > kHeap - heap_used) return 0;
  heap_used += bytes;
  // Whole granules, with a zone before and behind that belongs to nobody.
  const uint64_t words = bytes / 8 + 8;
  const auto& storage = heap.emplace_back(words, ~0ull);
  const uint64_t address = (reinterpret_cast<uint64_t>(storage.data()) + 2 * kGranule - 1) / kGranule * kGranule;
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                      [](uint64_t a, const MemoryRange& range) { return a < range.address; });
  ranges.insert(after, {address, bytes, true, kHeapName});
  return address;
}

bool GlobalMemory::free(uint64_t address) {
  const auto found = std::find_if(ranges.begin(), ranges.end(), [&](const MemoryRange& range) {
    return range.address == address && range.name == kHeapName;
  });
  if (found == ranges.end()) return false;
  // The storage stays: stores may be on their way to it.
  heap_used -= found->bytes;
  ranges.erase(found);
  return true;
}

uint64_t GlobalMemory::last_change(uint64_t address, uint64_t bytes) const {
  uint64_t last = 0;
  for (uint64_t granule = address / kGranule; granule <= (address + bytes - 1) / kGranule; ++granule) {
    const auto found = versions.find(granule);
    if (found != versions.end()) last = std::max(last, found->second.time);
  }
  return last;
}

void global_load(Context& c, int, uint64_t address, void* out, uint32_t bytes, Order order) {
  GlobalMemory& memory = c.machine.memory;
  const uint64_t granule = address / kGranule, begin = address % kGranule;
  auto* to = static_cast<uint8_t*>(out);
  std::memcpy(to, reinterpret_cast<const uint8_t*>(address), bytes);
  if (!memory.versions.empty()) {
    const auto found = memory.versions.find(granule);
    if (found != memory.versions.end()) {
      auto& version = found->second;
      if (order.constant && version.time > c.grid.started)
        fail(c, "ld.global.nc of what is written while the kernel runs");
      if (may_be_old(c, granule, version, order.strong)) {
        copy_old(version, address, out, bytes);
      } else if (version.cta != c.cta.uid) {
        c.cta.observed.granules[granule] = version.time;
      }
    }
  }
  if (!c.cta.stores.granules.empty()) {
    const auto found = c.cta.stores.granules.find(granule);
    if (found != c.cta.stores.granules.end()) {
      if (order.constant) fail(c, "ld.global.nc of what is written while the kernel runs");
      for (const auto& entry : found->second) {
        for (uint32_t i = 0; i < bytes; ++i)
          if (entry.mask >> (begin + i) & 1) to[i] = entry.bytes[begin + i];
      }
    }
  }
  if (order.acquire) acquire(c, order.scope);
}

void global_store(Context& c, int lane, uint64_t address, const void* in, uint32_t bytes, Order order) {
  const uint64_t granule = address / kGranule, begin = address % kGranule;
  const uint16_t mask = byte_mask(address, bytes);
  PendingStores& stores = c.cta.stores;
  c.grid.counters.stored_bytes[c.machine.memory.nearest(address)->address] += bytes;
  if (order.release) release(c, 1u << lane, order.scope);
  PendingStores::Entry entry{{}, mask, thread_of(c, lane), 0};
  std::memcpy(entry.bytes + begin, in, bytes);
  if (order.strong && order.scope != Scope::kCta) {
    const auto found = stores.granules.find(granule);
    if (found != stores.granules.end()) take_over(found->second, mask);
    return publish(c.machine, c.cta, granule, entry, order.scope == Scope::kSys);
  }
  auto [found, fresh] = stores.granules.try_emplace(granule);
  if (fresh) {
    stores.order.push_back(granule);
  } else {
    take_over(found->second, mask);
    for (auto& other : found->second) {
      if (other.thread != entry.thread || other.known != 0) continue;
      std::memcpy(other.bytes + begin, in, bytes);
      other.mask |= mask;
      return;
    }
  }
  found->second.push_back(entry);
  while (stores.granules.size() > kMostPending) drain_random(c.machine, c.cta);
}

void global_atomic_begin(Context& c, int lane, uint64_t address, void* value, uint32_t bytes, Order order) {
  if (order.release) release(c, 1u << lane, order.scope);
  const uint64_t granule = address / kGranule;
  drain_granule(c.machine, c.cta, granule, false);
  std::memcpy(value, reinterpret_cast<const uint8_t*>(address), bytes);
  // Of another device, with a scope that does not reach here: the two are not atomic for each other.
  const auto found = c.machine.memory.versions.find(granule);
  if (found != c.machine.memory.versions.end() && may_be_old(c, granule, found->second, true))
    copy_old(found->second, address, value, bytes);
}

void global_atomic_end(Context& c, int lane, uint64_t address, const void* value, uint32_t bytes, Order order) {
  if (std::memcmp(reinterpret_cast<const void*>(address), value, bytes) != 0) {
    PendingStores::Entry entry{{}, byte_mask(address, bytes), thread_of(c, lane), 0};
    std::memcpy(entry.bytes + address % kGranule, value, bytes);
    publish(c.machine, c.cta, address / kGranule, entry, order.scope == Scope::kSys);
  }
  if (order.acquire) acquire(c, order.scope);
}

void global_fence(Context& c, Order order) {
  if (order.release) release(c, c.mask, order.scope);
  if (order.acquire) acquire(c, order.scope);
}

void global_proxy_fence(Context& c) {
  GlobalMemory& memory = c.machine.memory;
  drain_known(c.machine, c.cta, c.warp, c.mask, false);
  c.cta.observed.proxy_fence = memory.now;
  for_lanes(c.mask, [&](int lane) { memory.proxy_fences[thread_key(c.cta.uid, thread_of(c, lane))] = memory.now; });
}

void async_read_global(Machine& machine, const Cta& cta, uint64_t address, void* out, uint32_t bytes, const Who& who) {
  const uint8_t* host = machine.memory.find(address, bytes, false, who);
  std::memcpy(out, host, bytes);
  for (uint64_t granule = address / kGranule; granule <= (address + bytes - 1) / kGranule; ++granule) {
    const auto found = machine.memory.versions.find(granule);
    if (found == machine.memory.versions.end()) continue;
    const auto& version = found->second;
    if (version.async || version.time <= cta.observed.proxy_fence || version.time <= cta.grid->started) continue;
    const auto fence = machine.memory.proxy_fences.find(thread_key(version.cta, version.thread));
    if (fence == machine.memory.proxy_fences.end() || fence->second < version.time)
      fail_unfenced(version, granule * kGranule, who);
  }
}

void async_write_global(Machine& machine, const Cta& cta, uint64_t address, const void* in, uint32_t bytes,
                        const Who& who) {
  machine.memory.find(address, bytes, true, who);
  const auto* from = static_cast<const uint8_t*>(in);
  for (uint32_t done = 0; done < bytes;) {
    const uint64_t at = address + done, begin = at % kGranule;
    const uint32_t count = std::min<uint32_t>(bytes - done, kGranule - static_cast<uint32_t>(begin));
    uint8_t padded[kGranule] = {};
    std::memcpy(padded + begin, from + done, count);
    publish(machine, {&cta, 0, true, false}, at / kGranule, padded, byte_mask(at, count));
    done += count;
  }
}

void barrier_tells(Cta& cta, uint32_t warps) {
  mbarriers_told(cta.shared, warps, warps);
  shared_tells(cta.shared, warps, warps);
  for (auto& [granule, entries] : cta.stores.granules) {
    for (auto& entry : entries) {
      const uint32_t knows = entry.known | 1u << entry.thread / kLanes;
      if (knows & warps) entry.known |= warps;
    }
  }
}

void warp_tells(Cta& cta, int warp, uint32_t lanes) {
  for (auto& [granule, entries] : cta.stores.granules) {
    for (auto& entry : entries) {
      if (entry.thread / kLanes == warp && (lanes >> entry.thread % kLanes & 1)) entry.known |= 1u << warp;
    }
  }
}

void drain_some(Machine& machine, Cta& cta) {
  if (!cta.stores.granules.empty() && machine.below(4) == 0) drain_random(machine, cta);
}

void drain_all(Machine& machine, Cta& cta) {
  for (const auto& [granule, entries] : cta.stores.granules) {
    for (const auto& entry : entries) publish(machine, cta, granule, entry, false);
  }
  cta.stores = {};
}

}  // namespace emulator
