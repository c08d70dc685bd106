// The state of a launch: devices, CTAs, warps, and the asynchronous operations in flight.
#pragma once
#include <array>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <set>

#include "decoder.h"
#include "global_memory.h"
#include "ptx.h"
#include "race.h"
#include "shared_memory.h"
#include "tensor_map.h"
#include "wgmma.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;
// Generic addresses of the spaces that are not host memory; bit 63 keeps them apart from it.
constexpr uint64_t kSharedWindow = 0x8100000000000000, kLocalWindow = 0x8200000000000000;
constexpr uint64_t kParamWindow = 0x8300000000000000, kFunctionWindow = 0x8400000000000000;
constexpr uint64_t kWindowMask = 0xff00000000000000;
// Marks, in Space::kParam, an offset into the lane's own frame: what calls pass.
constexpr uint64_t kFrameParam = 1ull << 40;

struct Cta;
struct Flight;
struct Warp;
struct Grid;
struct Machine;

struct Counters {
  uint64_t instructions = 0, thread_instructions = 0, wgmma_flops = 0, tma_bytes = 0, global_sectors = 0;
  uint64_t shared_bank_conflicts = 0, warp_stalls = 0;
  std::map<uint64_t, uint64_t> stored_bytes;  // by the address of the range
};

// What one instruction does to the lanes of `mask`. The lanes of `group` are at this instruction; those of `mask` pass
// its guard.
struct Context {
  Machine& machine;
  Grid& grid;
  Cta& cta;
  Warp& warp;
  const Instruction& instruction;
  uint32_t group, mask;
};

// A bulk-async group of one thread: what wait_group and wait_group.read wait for.
struct BulkGroup {
  int unread = 0, unwritten = 0;
  std::vector<std::shared_ptr<Flight>> flights;  // whose sources are held until a wait
};

// cp.async of one thread: since its last commit, and in groups, oldest first.
struct CopyGroups {
  std::vector<std::shared_ptr<Flight>> open;
  std::deque<std::vector<std::shared_ptr<Flight>>> committed;
};

// What a warp waits for, for the report of a deadlock.
struct Wait {
  enum class For : uint8_t {
    kNothing,
    kLanes,
    kBarrier,
    kClusterBarrier,
    kMbarrier,
    kBulkGroup,
    kWgmma,
    kRegisters,
    kGrid
  };
  For what = For::kNothing;
  Cta* cta = nullptr;
  uint64_t at = 0, value = 0;  // kBarrier: id; kMbarrier: offset and parity; kLanes: the members; kRegisters: how many
};

// A call of one lane that has not returned.
struct Frame {
  struct Result {
    int index;        // register of the caller, or -1
    uint64_t offset;  // in its parameters, else
    uint32_t bytes;
  };
  uint32_t return_pc, function;     // index of the callee in Code::functions
  uint32_t local_base, param_base;  // of the caller
  const std::vector<Result>* results;
  std::vector<uint64_t> saved;  // the callee's registers, where it is active already
};

// What a lane has brought to an instruction among the lanes of a warp, and what it gets from it.
struct Post {
  const Instruction* at;
  uint32_t members;
  std::array<uint64_t, 3> in;
  uint64_t out;
  bool flag;
};

// A warp at a barrier of its CTA. The warp counts once all its lanes have come.
struct Visit {
  uint32_t arrived = 0, released = 0;  // lanes that wait, and lanes that may go on
  uint32_t id = 0, expected = 0;
  bool all = false;                // no count was given: all threads that have not exited
  bool reduces = false;            // bar.red
  uint32_t votes = 0, voters = 0;  // for bar.red; those of all threads when the barrier is complete
};

struct Warp {
  int index;                  // in the CTA
  uint32_t live = kAllLanes;  // lanes that exist and have not exited
  std::array<uint32_t, kLanes> pc{};
  std::vector<uint64_t> registers;                  // [register][lane]
  std::vector<uint32_t> defined;                    // [register]: lanes that have written it
  uint32_t carry = 0;                               // lanes whose carry flag is set
  std::array<std::vector<uint8_t>, kLanes> local;   // stacks of local variables
  std::array<std::vector<uint8_t>, kLanes> params;  // stacks of what calls pass
  std::array<uint32_t, kLanes> local_base{}, param_base{};
  std::array<std::vector<Frame>, kLanes> frames;
  uint64_t private_writes = 0;  // to local memory: they tell two turns of a loop apart

  uint32_t sleep = 0;         // scheduler rounds to sit out
  bool slow = false;          // for a while
  uint32_t blocked_pc = ~0u;  // the group that could not go on last time
  Wait wait;
  uint32_t wait_pc = 0;  // where it is blocked
  // While the machine suspects a deadlock: a state that was seen, the polls until it is replaced, the lanes that have
  // stepped since, and whether the warp has come back to it.
  uint64_t anchor = 0;
  uint32_t patience = 1, patience_next = 1, tried = 0;
  bool stuck = false;
  // Lanes that wait at an aligned instruction for the others.
  uint32_t aligned_lanes = 0, aligned_pc = 0;
  Visit visit;
  uint32_t cluster_arrived = 0, cluster_released = 0;  // lanes at the cluster's barrier, as in Visit
  std::vector<Post> posts;                             // of each lane
  uint32_t posted = 0, served = 0;                     // lanes whose post waits for others, and that have their result
  int register_count = 0;                              // a thread, while setmaxnreg is in use
  size_t register_steps = 0;                           // setmaxnreg executed
  std::array<std::deque<std::shared_ptr<BulkGroup>>, kLanes> bulk_groups;
  std::array<std::shared_ptr<BulkGroup>, kLanes> open_group;
  std::array<CopyGroups, kLanes> async_copies;
  WgmmaState wgmma;

  uint64_t* reg(int index) { return registers.data() + static_cast<size_t>(index) * kLanes; }
};

struct NamedBarrier {
  uint32_t arrived = 0, expected = 0;  // threads
  uint32_t warps = 0, waiting = 0;     // that have arrived, and those of them that wait
  bool all = false, reduces = false;   // as in Visit
  uint32_t votes = 0, voters = 0;
};

struct Cta {
  Grid* grid;
  std::array<uint32_t, 3> id;
  uint32_t uid;  // in the launch
  uint32_t cluster_rank = 0, cluster_index = 0;
  SharedMemory shared;
  PendingStores stores;
  Observed observed;
  Races races;
  std::vector<Warp> warps;
  std::array<NamedBarrier, 16> barriers;
  std::vector<Cta*> cluster;  // by rank, itself included
  int live_warps = 0;
  bool slow = false;   // for a while
  uint32_t sends = 0;  // copies in flight from its shared memory into that of the cluster
  // Copies that have arrived, by the mbarrier of which a phase tells of them.
  std::unordered_map<uint32_t, std::vector<std::shared_ptr<Flight>>> landed;
  bool releases_dependents = false;                               // griddepcontrol.launch_dependents
  int registers = 0, registers_free = 0;                          // of the CTA's pool, while setmaxnreg is in use
  std::map<int, std::vector<const Instruction*>> register_steps;  // setmaxnreg of each warpgroup
};

struct Grid {
  std::shared_ptr<Code> code;
  std::array<uint32_t, 3> grid, block, cluster;
  uint32_t shared_bytes = 0;  // dynamic
  int device = 0;
  std::vector<uint8_t> parameters;
  Counters counters;
  std::vector<uint64_t> executed;  // warp instructions, by pc
  uint32_t next_cluster = 0, clusters = 0, resident = 0;
  std::list<std::unique_ptr<Cta>> ctas;  // resident
  uint64_t started = 0;                  // time of the memory
  bool finished = false;
  // Programmatic dependent launch: the grid that this one waits for.
  Grid* after = nullptr;
  bool may_be_overtaken() const;
};

// One piece of an asynchronous copy; pieces of an operation run in random order, operations interleave.
using Piece = std::function<void()>;

struct Machine {
  explicit Machine(uint64_t seed) : random(seed) { highest_lane_elected = random() & 1; }

  std::mt19937_64 random;
  bool highest_lane_elected;
  GlobalMemory memory;
  std::vector<Piece> pieces;
  std::unordered_map<uint64_t, std::weak_ptr<void>> maps_in_use;  // tensor maps in global memory, by address
  std::list<Grid> grids;
  uint64_t events = 0;  // rises with everything that can let a waiter go on
  uint64_t ticks = 0;   // instructions executed: the clock
  uint32_t next_uid = 1;
  bool suspicious = false;  // nothing has happened for long: look for a deadlock
  uint64_t step_limit = 0;  // instructions after which a launch is stopped; 0 for none
  std::string output;       // of printf

  void run();
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(random() % n); }
  // To be called where a warp can only go on by what others do: behind a vain poll, or at a jump back.
  void note_poll(Warp& warp);
};

[[noreturn]] void fail(const Context& context, const std::string& what);
std::string where(const Context& context);

// For the report of a deadlock.
std::string describe(const Wait& wait);
std::string describe_mbarrier(const Cta& cta, uint32_t offset);

// mbarrier: complete_tx by a copy that has written `bytes`; `from` is the CTA that issued it.
void mbarrier_complete_tx(Machine& machine, Cta& cta, uint32_t offset, int64_t bytes, const Who& who,
                          const Cta* from = nullptr);
// Raises where bytes announced to an mbarrier of the CTA have not come, or bytes came that nobody announced.
void mbarriers_check_exit(const Context& context);

// Whether all live lanes are at this aligned instruction; else it must wait for them. Raises where they cannot come.
bool converged(Context& context);
// To be called when lanes of the warp have exited: barriers do not wait for them.
void threads_exited(Context& context);
void cta_barriers_after_exit(Context& context);
// mbarrier: `arrivals` more to come, or, negative, that have come.
void mbarrier_add_pending(Machine& machine, Cta& cta, uint32_t offset, int64_t arrivals, const Who& who);
// A phase of the mbarrier is complete: the copies that it tells of no longer hold their shared memory.
void release_holds(Cta& cta, uint32_t barrier);

// Runs the oldest wgmma that all four warps of a warpgroup have issued; false if there is none.
bool wgmma_advance(Machine& machine, Cta& cta, int first_warp);

// Bytes of an activation of a function, in local memory and in what calls pass.
inline uint32_t local_frame(const Function& function) {
  return static_cast<uint32_t>(function.local_bytes + 15) & ~15u;
}
inline uint32_t param_frame(const Function& function) {
  return static_cast<uint32_t>(function.param_bytes + 15) & ~15u;
}

template <class F>
void for_lanes(uint32_t mask, F&& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

// Shared memory before the dynamic part: the static variables, and the padding that an extern array asks for.
uint64_t static_shared_bytes(const Function& function);

uint64_t source_slow(const Source& source, Context& context, int lane);

inline uint64_t Source::get(Context& context, int lane) const {
  if (index < 0) return base == Base::kNone ? constant : source_slow(*this, context, lane);
  const uint64_t value = context.warp.registers[static_cast<size_t>(index) * kLanes + lane];
  return negated ? (value & 1) ^ 1 : value;
}

}  // namespace emulator
