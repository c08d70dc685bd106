// The state of a launch: devices, CTAs, warps, and the asynchronous operations in flight.
#pragma once
#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <random>
#include <set>

#include "ptx.h"
#include "tensor_map.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;
// User shared memory begins here in the 32-bit shared window: hardware reserves the first KB.
constexpr uint32_t kSharedBase = 0x400;
// Generic addresses of the spaces that are not host memory; bit 63 keeps them apart from it.
constexpr uint64_t kSharedWindow = 0x8100000000000000, kLocalWindow = 0x8200000000000000;
constexpr uint64_t kParamWindow = 0x8300000000000000, kWindowMask = 0xff00000000000000;

struct Cta;
struct Warp;
struct Grid;
struct Machine;

struct MemoryRange {
  uint64_t address, bytes;
  bool writable;
  std::string name;
};

struct Counters {
  uint64_t instructions = 0, wgmma_flops = 0, tma_bytes = 0, global_sectors = 0, shared_bank_conflicts = 0;
  uint64_t warp_stalls = 0;
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

// kNext: go on behind the instruction. kBlocked: the lanes stay and try again. kJumped: it has set the pcs itself.
enum class Outcome { kNext, kBlocked, kJumped };
using Handler = std::function<Outcome(Context&)>;

// A function of a module with a handler for each instruction.
struct Code {
  const Function* function;
  const Module* module;
  std::vector<Handler> handlers;
};

// Raises Error on an instruction or a modifier it does not know, with line and text.
std::shared_ptr<Code> decode(const Module& module, const Function& function);

// A bulk-async group of one thread: what wait_group and wait_group.read wait for.
struct BulkGroup {
  int unread = 0, unwritten = 0;
};

// wgmma of one warp that is not yet waited for.
struct WgmmaIssue {
  const Instruction* instruction;
  std::vector<int> registers;
  uint64_t a, b;
  bool accumulate;
  int n;
};

struct Warp {
  int index;                  // in the CTA
  uint32_t live = kAllLanes;  // lanes that exist and have not exited
  std::array<uint32_t, kLanes> pc{};
  std::vector<uint64_t> registers;  // [register][lane]
  std::vector<uint8_t> local;       // [lane][bytes]
  uint32_t sleep = 0;               // scheduler rounds to sit out
  // An aligned instruction that waits in steps keeps here what it waits for.
  bool waiting = false;
  uint64_t wait_token = 0;
  std::array<std::deque<std::shared_ptr<BulkGroup>>, kLanes> bulk_groups;
  std::array<std::shared_ptr<BulkGroup>, kLanes> open_group;
  // wgmma: issued but not retired, oldest first; values live in `shadow` until this warp waits.
  std::deque<WgmmaIssue> wgmma;
  uint64_t wgmma_issued = 0, wgmma_done = 0, wgmma_retired = 0;  // counts of instructions
  std::vector<uint64_t> wgmma_commits;                           // wgmma_issued at each commit not yet retired
  std::map<int, std::array<uint32_t, kLanes>> shadow;
  std::map<int, int> in_flight;
  bool wgmma_fenced = false;  // since the last wait, after which other instructions may have used the registers

  uint64_t* reg(int index) { return registers.data() + static_cast<size_t>(index) * kLanes; }
};

struct NamedBarrier {
  uint32_t arrived = 0, expected = 0;
  uint64_t generation = 0;
};

struct Cta {
  Grid* grid;
  std::array<uint32_t, 3> id;
  uint32_t cluster_rank = 0;
  std::vector<uint8_t> shared;
  // Thread + 1 that last wrote a byte by the generic proxy and has not fenced since; 0 for none.
  std::vector<uint16_t> unfenced;
  std::vector<Warp> warps;
  std::array<NamedBarrier, 16> barriers;
  std::vector<Cta*> cluster;  // by rank, itself included
  int live_warps = 0;
};

struct Grid {
  std::shared_ptr<Code> code;
  std::array<uint32_t, 3> grid, block, cluster;
  uint32_t shared_bytes = 0;  // dynamic
  std::vector<uint8_t> parameters;
  Counters counters;
  uint32_t next_cluster = 0, clusters = 0;
  std::list<std::unique_ptr<Cta>> ctas;  // resident
};

// One piece of an asynchronous copy; pieces of an operation run in random order, operations interleave.
using Piece = std::function<void()>;

struct Machine {
  explicit Machine(uint64_t seed) : random(seed) { highest_lane_elected = random() & 1; }

  std::mt19937_64 random;
  bool highest_lane_elected;
  std::vector<MemoryRange> memory;  // sorted by address
  std::vector<Piece> pieces;
  std::list<Grid> grids;
  uint64_t events = 0;  // rises with everything that can let a waiter go on
  uint64_t polls = 0;   // waits that were not over, since the last event

  void run();
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(random() % n); }
  // Host memory of [address, address + bytes) in a registered range, or an Error that names the nearest one.
  uint8_t* global(uint64_t address, uint64_t bytes, bool write, const std::string& who);
};

[[noreturn]] void fail(const Context& context, const std::string& what);
std::string where(const Context& context);

// memory.cpp: host memory behind an address of a lane, with its bounds checked. `bytes` at `address` of `space`;
// nullopt is a generic address.
struct Location {
  uint8_t* host;
  Cta* shared_of;   // set for shared memory
  uint32_t offset;  // in Cta::shared
};
Location locate(Context& context, int lane, std::optional<Space> space, uint64_t address, uint32_t bytes, bool write);
// Shared memory of `cta` at a 32-bit shared address of it.
uint32_t shared_offset(const Cta& cta, uint32_t address, uint64_t bytes, const std::string& who);
// Raises if a byte was written by the generic proxy and its writer has not fenced.
void check_fenced(const Cta& cta, uint32_t offset, uint32_t bytes, const std::string& who);

// An operand that is read: a register or a value known when decoding.
struct Source {
  int index = -1;
  bool negated = false;
  uint64_t constant = 0;
  int special = -1;  // into special.cpp's table

  uint64_t get(Context& context, int lane) const;
};

struct Decoder {
  const Module& module;
  const Function& function;
  const Instruction& instruction;
  mutable size_t used = 0;  // modifiers consumed

  [[noreturn]] void unknown(const std::string& what) const;
  // The modifiers must be consumed in order, so that none is passed over.
  bool take(const std::string& modifier) const;
  std::string next() const;
  bool done() const { return used == instruction.modifiers.size(); }
  void expect_done() const;
  const Operand& operand(size_t index) const;
  Source source(const Operand& operand) const;
  Source source(size_t index) const { return source(operand(index)); }
  int destination(const Operand& operand) const;  // register index, -1 for a sink
  int destination(size_t index) const { return destination(operand(index)); }
  void operands(size_t count) const;
};

// Families of instructions; each returns an empty Handler for an opcode that is not its own.
Handler decode_arithmetic(const Decoder& d);
Handler decode_convert(const Decoder& d);
Handler decode_memory(const Decoder& d);
Handler decode_control(const Decoder& d);
Handler decode_mbarrier(const Decoder& d);
Handler decode_copy(const Decoder& d);
Handler decode_wgmma(const Decoder& d);

// mbarrier: complete_tx by a copy that has written `bytes`.
void mbarrier_complete_tx(Machine& machine, Cta& cta, uint32_t offset, int64_t bytes, const std::string& who);

// Runs the oldest wgmma that all four warps of a warpgroup have issued; false if there is none.
bool wgmma_advance(Machine& machine, Cta& cta, int first_warp);

template <class F>
void for_lanes(uint32_t mask, F&& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

int bytes_of(const std::string& type);

// Shared memory before the dynamic part: the static variables, and the padding that an extern array asks for.
uint64_t static_shared_bytes(const Function& function);

}  // namespace emulator
