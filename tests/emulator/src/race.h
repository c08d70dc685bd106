// Races in shared memory: accesses of different threads to the same bytes, one of them a write, that nothing orders.
//
// Each access is an epoch, its thread with the machine's time; a thread's clock says up to which time it knows of each
// other thread's accesses (vector clocks, after FastTrack). Synchronisation hands clocks on: barriers of the CTA, of
// the warp and of the cluster, mbarriers, fences, and strong accesses. Those are more lenient than PTX: each counts as
// a release or an acquire, of whatever location. Atomic operations order others only by .release, .acquire or fences.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "ptx.h"

namespace emulator {

struct Context;
struct Cta;
struct Machine;

// By thread of the cluster, and last for bulk copies into it.
using Clock = std::vector<uint64_t>;
using Known = std::shared_ptr<const Clock>;

// What those that arrive at a barrier hand to those that it lets go.
struct Meeting {
  Clock open;    // of all arrivals
  Known closed;  // of those up to the last completed phase
};

// Of a CTA.
struct Races {
  // By lanes of one warp in one instruction.
  struct Access {
    const Instruction* by;
    uint64_t time;
    uint32_t lanes;
    uint16_t warp;   // in the cluster
    uint16_t bytes;  // mask within the granule
    bool write, strong;
  };
  std::vector<std::vector<Access>> granules;  // of 16 bytes: accesses that later ones may race with
  std::vector<Known> known;                   // by thread
  std::array<Meeting, 16> barriers;
  std::map<uint32_t, Meeting> mbarriers;  // by offset
  Meeting strong, cluster;  // of the cluster's rank 0 for all: of strong accesses and fences, and its barrier
};

// Accesses by the generic proxy of one lane, before they are made. `in` is what it writes.
void race_read(Context& context, int lane, Cta& cta, uint32_t offset, uint32_t bytes, bool strong = false);
void race_write(Context& context, int lane, Cta& cta, uint32_t offset, const void* in, uint32_t bytes,
                bool strong = false);
// A bulk copy that the lane issues, and that fills these bytes, or reads them.
void race_copy_in(Context& context, int lane, Cta& cta, uint32_t offset, uint32_t bytes);
void race_copy_out(Context& context, int lane, Cta& cta, uint32_t offset, uint32_t bytes);

// Strong stores and releasing fences, before them; strong loads and acquiring fences, after them.
void race_release(Context& context, uint32_t lanes);
void race_acquire(Context& context, uint32_t lanes);
// bar.warp.sync.
void race_warp_sync(Context& context, uint32_t lanes);

// Barriers: `lanes` arrive; the phase is complete; `lanes` go on behind it.
void race_arrive(Context& context, uint32_t lanes, Meeting& meeting);
void race_complete(Meeting& meeting);
void race_leave(Context& context, uint32_t lanes, const Meeting& meeting);
Meeting& cluster_meeting(Cta& cta);
// The initialisation of an mbarrier by a lane, any other operation on it, and its phase's completion.
void race_init_mbarrier(Context& context, int lane, Cta& cta, uint32_t offset);
void race_use_mbarrier(Context& context, int lane, Cta& cta, uint32_t offset);
void race_complete_mbarrier(Machine& machine, Cta& cta, uint32_t offset);

}  // namespace emulator
