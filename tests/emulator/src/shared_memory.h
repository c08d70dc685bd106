// Shared memory of a CTA, with what the generic proxy, the async proxy and copies in flight have done to each byte.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ptx.h"
#include "who.h"

namespace emulator {

struct Cta;
struct Context;

// User shared memory begins here in the 32-bit shared window: hardware reserves the first KB. The CTA's rank in its
// cluster is in the top byte.
constexpr uint32_t kSharedBase = 0x400;
constexpr uint32_t kRankShift = 24, kOffsetMask = (1u << kRankShift) - 1;
constexpr uint32_t kHold = 16;  // bytes that share a Hold

struct SharedMemory {
  struct Hold {
    uint16_t reads = 0;               // asynchronous ones in flight
    uint16_t writes = 0;              // mask of bytes
    uint16_t reductions = 0;          // which do not exclude each other
    uint8_t mbarriers = 0;            // that live in it: bit 0 for the first 8 bytes, bit 1 for the others
    const Instruction* by = nullptr;  // the last that came
  };
  struct Range {
    uint32_t offset, bytes;
    uint32_t known;  // warps that a barrier has told of it
  };
  // An mbarrier between init and inval; its counts are in the memory itself.
  struct Mbarrier {
    uint32_t known;         // warps that know of the init
    bool released = false;  // to other CTAs
    uint32_t phases = 0;    // completed
  };

  std::vector<uint8_t> bytes;
  std::vector<uint8_t> defined;    // 1 where something was written
  std::vector<uint16_t> unfenced;  // 1 + the thread that last wrote it by the generic proxy and has not fenced since
  std::vector<Hold> holds;         // of each 16 bytes
  std::vector<std::vector<Range>> written;  // by warp: where unfenced bytes may be
  std::map<uint32_t, Mbarrier> mbarriers;   // by offset
  uint64_t writes_in_flight = 0;

  void allocate(uint64_t size, size_t warps);
  size_t size() const { return bytes.size(); }
};

// The CTA of the cluster and the offset in its shared memory that a 32-bit address names.
struct SharedPlace {
  Cta* cta;
  uint32_t offset;
};
SharedPlace resolve_shared(const Cta& from, uint32_t address, uint64_t bytes, const Who& who);
// As above, where only the own CTA is legal.
uint32_t shared_offset(const Cta& cta, uint32_t address, uint64_t bytes, const Who& who);

// The generic proxy: hazards with asynchronous work in flight raise, and races. A read says whether all bytes are
// defined.
bool shared_read(Context& context, int lane, Cta& cta, uint32_t offset, void* out, uint32_t bytes, bool strong = false);
void shared_write(Context& context, int lane, Cta& cta, uint32_t offset, const void* in, uint32_t bytes,
                  bool strong = false);
// fence.proxy.async by `lanes` of the warp covers their own stores; by the whole warp, also those of others that a
// barrier has told it of (what Triton relies on, whose consumers fence behind the barrier).
void shared_fence(Cta& cta, int warp, uint32_t lanes);
// A barrier: what one of `from` knows, all of `to` know.
void shared_tells(SharedMemory& shared, uint32_t from, uint32_t to);

// What a warp among `from` knows of mbarriers' inits, `to` know too; and other CTAs, once such a warp releases it.
void mbarriers_told(SharedMemory& shared, uint32_t from, uint32_t to);
void mbarriers_released(SharedMemory& shared, int warp);
// The phase of an mbarrier is complete: the copies that signalled it are known to be over.
void release_holds(Cta& cta, uint32_t mbarrier);

// The async proxy: reads find what is defined and fenced, or raise.
void check_async_read(const Cta& cta, uint32_t offset, uint32_t bytes, const Who& who);
void async_read_shared(const Cta& cta, uint32_t offset, void* out, uint32_t bytes, const Who& who);
void async_write_shared(Cta& cta, uint32_t offset, const void* in, uint32_t bytes);
// Work in flight: +1 at issue, -1 once it is known to be over. What it collides with raises at issue.
void hold_reads(Cta& cta, uint32_t offset, uint32_t bytes, int delta, const Instruction* by, const Who& who);
void hold_writes(Cta& cta, uint32_t offset, uint32_t bytes, int delta, const Instruction* by, const Who& who);
void hold_reductions(Cta& cta, uint32_t offset, uint32_t bytes, int delta, const Instruction* by, const Who& who);

}  // namespace emulator
