#include "shared_memory.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "machine.h"

namespace emulator {
namespace {

constexpr size_t kMostRanges = 1024;  // of a warp's unfenced stores before they are taken for all of the memory

std::string in_flight(const SharedMemory::Hold& hold) {
  return hold.by == nullptr ? "" : " (line " + std::to_string(hold.by->line) + ": " + hold.by->text.substr(0, 70) + ")";
}

// f(hold, mask): each Hold of the range, with the bytes of it that are in the range.
template <class F>
void for_holds(SharedMemory& shared, uint32_t offset, uint32_t bytes, F f) {
  const uint32_t end = offset + bytes;
  for (uint32_t i = offset / kHold; i * kHold < end; ++i) {
    const uint32_t first = std::max(offset, i * kHold) % kHold, last = std::min(end - i * kHold, kHold);
    f(shared.holds[i], static_cast<uint16_t>((1u << last) - (1u << first)));
  }
}

// Raises where bytes from `offset` on belong to an mbarrier that is in use.
void check_mbarriers(const SharedMemory& shared, uint32_t hold, uint32_t offset, uint32_t bytes, const Who& who) {
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t at = hold * kHold + half * 8;
    if ((shared.holds[hold].mbarriers >> half & 1) && offset < at + 8 && at < offset + bytes)
      throw Error(who + ": it overwrites the mbarrier at shared offset " + std::to_string(at) +
                  ", which has had no mbarrier.inval");
  }
}

// Generic accesses to what asynchronous work of any thread still writes, or reads.
void check_generic(const Context& c, Cta& cta, uint32_t offset, uint32_t bytes, bool write) {
  for_holds(cta.shared, offset, bytes, [&](const SharedMemory::Hold& hold, uint16_t mask) {
    if ((hold.writes & mask) || hold.reductions)
      fail(c, "shared memory in which a copy in flight still writes" + in_flight(hold));
    if (write && hold.reads)
      fail(c, "store to shared memory that is still being read asynchronously" + in_flight(hold));
    if (write && hold.mbarriers)
      check_mbarriers(cta.shared, static_cast<uint32_t>(&hold - cta.shared.holds.data()), offset, bytes, c);
  });
}

void check_not_written(const SharedMemory::Hold& hold, uint16_t mask, const Who& who) {
  if ((hold.writes & mask) || hold.reductions)
    throw Error(who + ": it reads shared memory in which a copy in flight still writes" + in_flight(hold));
}

void check_not_read(const SharedMemory::Hold& hold, const Who& who) {
  if (hold.reads)
    throw Error(who + ": it overwrites shared memory that is still being read asynchronously" + in_flight(hold));
}

void count_writes(SharedMemory& shared, int delta) {
  shared.writes_in_flight += static_cast<uint64_t>(static_cast<int64_t>(delta));
}

}  // namespace

void SharedMemory::allocate(uint64_t size, size_t warps) {
  bytes.assign(size, 0xff);  // NaN in every format: nothing may be read before it is written
  defined.assign(size, 0);
  unfenced.assign(size, 0);
  holds.assign((size + kHold - 1) / kHold, {});
  written.assign(warps, {});
}

SharedPlace resolve_shared(const Cta& from, uint32_t address, uint64_t bytes, const Who& who) {
  const uint32_t rank = address >> kRankShift;
  std::ostringstream text;
  if (rank >= from.cluster.size()) {
    text << who << ": shared address 0x" << std::hex << address << std::dec << " is of rank " << rank
         << " in a cluster of " << from.cluster.size() << " CTAs";
    throw Error(text.str());
  }
  Cta& cta = *from.cluster[rank];
  const uint64_t within = address & kOffsetMask;
  if (within < kSharedBase || within - kSharedBase + bytes > cta.shared.size()) {
    text << who << ": out of bounds: " << bytes << " bytes at shared address 0x" << std::hex << address << std::dec
         << " lie outside the CTA's " << cta.shared.size() << " bytes, which begin at 0x400";
    throw Error(text.str());
  }
  if (cta.live_warps == 0) throw Error(who + ": access to the shared memory of a CTA that has exited");
  return {&cta, static_cast<uint32_t>(within - kSharedBase)};
}

uint32_t shared_offset(const Cta& cta, uint32_t address, uint64_t bytes, const Who& who) {
  return resolve_shared(cta, (address & kOffsetMask) | cta.cluster_rank << kRankShift, bytes, who).offset;
}

bool shared_read(Context& c, int lane, Cta& cta, uint32_t offset, void* out, uint32_t bytes, bool strong) {
  check_generic(c, cta, offset, bytes, false);
  race_read(c, lane, cta, offset, bytes, strong);
  std::memcpy(out, cta.shared.bytes.data() + offset, bytes);
  const auto* defined = cta.shared.defined.data() + offset;
  return std::find(defined, defined + bytes, 0) == defined + bytes;
}

void shared_write(Context& c, int lane, Cta& cta, uint32_t offset, const void* in, uint32_t bytes, bool strong) {
  SharedMemory& shared = cta.shared;
  check_generic(c, cta, offset, bytes, true);
  race_write(c, lane, cta, offset, in, bytes, strong);
  if (std::memcmp(shared.bytes.data() + offset, in, bytes) != 0) c.machine.events++;
  std::memcpy(shared.bytes.data() + offset, in, bytes);
  std::fill_n(shared.defined.begin() + offset, bytes, static_cast<uint8_t>(1));
  // A store from another CTA is nobody's to fence here: 0 is no thread.
  const auto thread = static_cast<uint16_t>(&cta == &c.cta ? c.warp.index * kLanes + lane + 1 : 0);
  std::fill_n(shared.unfenced.begin() + offset, bytes, thread);
  if (thread == 0) return;
  auto& ranges = shared.written[c.warp.index];
  if (!ranges.empty() && ranges.back().known == 0 && ranges.back().offset + ranges.back().bytes == offset) {
    ranges.back().bytes += bytes;
  } else if (ranges.size() < kMostRanges) {
    ranges.push_back({offset, bytes, 0});
  } else {
    ranges.assign(1, {0, static_cast<uint32_t>(shared.size()), 0});
  }
}

void shared_fence(Cta& cta, int warp, uint32_t lanes) {
  SharedMemory& shared = cta.shared;
  for (size_t writer = 0; writer < shared.written.size(); ++writer) {
    auto& ranges = shared.written[writer];
    const bool own = static_cast<int>(writer) == warp;
    const uint32_t first = static_cast<uint32_t>(writer) * kLanes + 1;
    for (const auto& range : ranges) {
      const bool told = lanes == kAllLanes && (range.known >> warp & 1);
      if (!own && !told) continue;
      for (uint32_t i = range.offset; i < range.offset + range.bytes; ++i) {
        const uint32_t lane = shared.unfenced[i] - first;  // huge where the writer is of another warp, or there is none
        if (lane < kLanes && (told || (lanes >> lane & 1))) shared.unfenced[i] = 0;
      }
    }
    std::erase_if(ranges, [&](const auto& range) { return lanes == kAllLanes && (own || (range.known >> warp & 1)); });
  }
}

void shared_tells(SharedMemory& shared, uint32_t from, uint32_t to) {
  for (size_t writer = 0; writer < shared.written.size(); ++writer) {
    for (auto& range : shared.written[writer])
      if ((range.known | 1u << writer) & from) range.known |= to;
  }
}

void check_async_read(const Cta& cta, uint32_t offset, uint32_t bytes, const Who& who) {
  const SharedMemory& shared = cta.shared;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (shared.unfenced[i])
      throw Error(who + ": the async proxy reads shared byte " + std::to_string(i) + ", which thread " +
                  std::to_string(shared.unfenced[i] - 1) + " wrote without a fence.proxy.async since");
    if (!shared.defined[i])
      throw Error(who + ": the async proxy reads shared byte " + std::to_string(i) + ", which nobody has written");
  }
}

void async_read_shared(const Cta& cta, uint32_t offset, void* out, uint32_t bytes, const Who& who) {
  check_async_read(cta, offset, bytes, who);
  std::memcpy(out, cta.shared.bytes.data() + offset, bytes);
}

void async_write_shared(Cta& cta, uint32_t offset, const void* in, uint32_t bytes) {
  SharedMemory& shared = cta.shared;
  std::memcpy(shared.bytes.data() + offset, in, bytes);
  std::fill_n(shared.defined.begin() + offset, bytes, static_cast<uint8_t>(1));
  std::fill_n(shared.unfenced.begin() + offset, bytes, static_cast<uint16_t>(0));
}

void hold_reads(Cta& cta, uint32_t offset, uint32_t bytes, int delta, const Instruction* by, const Who& who) {
  for_holds(cta.shared, offset, bytes, [&](SharedMemory::Hold& hold, uint16_t mask) {
    if (delta > 0) check_not_written(hold, mask, who), hold.by = by;
    hold.reads = static_cast<uint16_t>(hold.reads + delta);
  });
}

void hold_writes(Cta& cta, uint32_t offset, uint32_t bytes, int delta, const Instruction* by, const Who& who) {
  for_holds(cta.shared, offset, bytes, [&](SharedMemory::Hold& hold, uint16_t mask) {
    if (delta < 0) {
      hold.writes &= static_cast<uint16_t>(~mask);
      return;
    }
    check_not_read(hold, who);
    if ((hold.writes & mask) || hold.reductions)
      throw Error(who + ": two copies in flight write the same shared memory" + in_flight(hold));
    hold.writes |= mask, hold.by = by;
  });
  count_writes(cta.shared, delta);
}

void hold_reductions(Cta& cta, uint32_t offset, uint32_t bytes, int delta, const Instruction* by, const Who& who) {
  for_holds(cta.shared, offset, bytes, [&](SharedMemory::Hold& hold, uint16_t mask) {
    if (delta > 0) {
      check_not_read(hold, who);
      if (hold.writes & mask)
        throw Error(who + ": two copies in flight write the same shared memory" + in_flight(hold));
      if (hold.mbarriers)
        check_mbarriers(cta.shared, static_cast<uint32_t>(&hold - cta.shared.holds.data()), offset, bytes, who);
      hold.by = by;
    }
    hold.reductions = static_cast<uint16_t>(hold.reductions + delta);
  });
  count_writes(cta.shared, delta);
}

}  // namespace emulator
