// The scheduler: which warp steps next, and what happens asynchronously in between.
#include "machine.h"

#include <algorithm>
#include <sstream>
#include <utility>

namespace emulator {
namespace {

// CTAs of a cluster start together; clusters in order of their index, as many as may be resident.
constexpr uint32_t kResident = 16, kMostResident = 132;
// Instructions without an event after which the machine looks for a deadlock, and after which it gives up.
// How seldom a CTA or warp changes its pace, and how much slower the slow ones are.
constexpr uint32_t kMood = 512, kSlowness = 64;
// Instructions that a turn of a warp has at most, and about as many as it takes.
constexpr uint32_t kBurst = 24;
constexpr uint64_t kSuspect = 50'000, kMostIdle = 400'000'000;

void start_cta(Machine& machine, Grid& grid, Cta& cta) {
  const Code& code = *grid.code;
  const Function& function = *code.function;
  const uint32_t threads = grid.block[0] * grid.block[1] * grid.block[2];
  cta.grid = &grid;
  cta.uid = machine.next_uid++;
  cta.warps.resize((threads + kLanes - 1) / kLanes);
  cta.live_warps = static_cast<int>(cta.warps.size());
  cta.shared.allocate(static_shared_bytes(function) + grid.shared_bytes, cta.warps.size());
  const uint32_t local = local_frame(function), params = param_frame(function);
  for (size_t i = 0; i < cta.warps.size(); ++i) {
    Warp& warp = cta.warps[i];
    warp.index = static_cast<int>(i);
    const uint32_t left = threads - static_cast<uint32_t>(i) * kLanes;
    warp.live = left >= kLanes ? kAllLanes : (1u << left) - 1;
    warp.registers.assign(static_cast<size_t>(code.registers) * kLanes, 0xfff7dead7fc0dead);
    warp.defined.assign(code.registers, 0);
    for (int lane = 0; lane < kLanes; ++lane) {
      warp.local[lane].assign(local, 0xff);
      warp.params[lane].assign(params, 0xff);
    }
  }
  machine.events++;
}

void start_clusters(Machine& machine, Grid& grid) {
  const uint32_t per_cluster = grid.cluster[0] * grid.cluster[1] * grid.cluster[2];
  while (grid.next_cluster < grid.clusters && (grid.ctas.empty() || grid.ctas.size() + per_cluster <= grid.resident)) {
    const uint32_t index = grid.next_cluster++;
    const uint32_t across = grid.grid[0] / grid.cluster[0], down = grid.grid[1] / grid.cluster[1];
    const uint32_t cx = index % across, cy = index / across % down, cz = index / across / down;
    std::vector<Cta*> members;
    for (uint32_t rank = 0; rank < per_cluster; ++rank) {
      auto cta = std::make_unique<Cta>();
      const uint32_t x = rank % grid.cluster[0], y = rank / grid.cluster[0] % grid.cluster[1];
      const uint32_t z = rank / grid.cluster[0] / grid.cluster[1];
      cta->id = {cx * grid.cluster[0] + x, cy * grid.cluster[1] + y, cz * grid.cluster[2] + z};
      cta->cluster_rank = rank, cta->cluster_index = index;
      start_cta(machine, grid, *cta);
      members.push_back(cta.get());
      grid.ctas.push_back(std::move(cta));
    }
    for (Cta* member : members) member->cluster = members;
  }
}

// The lanes that step next: those deepest in calls, then those at the lowest pc, which makes diverged lanes meet again
// where their paths join; now and then others, so that lanes that spin cannot starve the ones they wait for.
uint32_t pick_group(Machine& machine, Warp& warp) {
  const uint32_t avoided = std::exchange(warp.blocked_pc, ~0u);
  const uint32_t first = __builtin_ctz(warp.live);
  bool together = true;
  for_lanes(warp.live, [&](int lane) { together &= warp.pc[lane] == warp.pc[first]; });
  if (together) return warp.live;
  uint32_t candidates = 0;
  for_lanes(warp.live, [&](int lane) { candidates |= (warp.pc[lane] != avoided ? 1u : 0u) << lane; });
  if (candidates == 0) candidates = warp.live;
  int chosen = -1;
  if (machine.below(64) == 0) {
    int skip = static_cast<int>(machine.below(__builtin_popcount(candidates)));
    for_lanes(candidates, [&](int lane) {
      if (skip-- == 0) chosen = lane;
    });
  } else {
    for_lanes(candidates, [&](int lane) {
      if (chosen < 0) return void(chosen = lane);
      const size_t depth = warp.frames[lane].size(), best = warp.frames[chosen].size();
      if (depth > best || (depth == best && warp.pc[lane] < warp.pc[chosen])) chosen = lane;
    });
  }
  uint32_t group = 0;
  for_lanes(warp.live, [&](int lane) { group |= (warp.pc[lane] == warp.pc[chosen] ? 1u : 0u) << lane; });
  return group;
}

std::string lanes_text(uint32_t mask) { return (std::ostringstream() << "0x" << std::hex << mask).str(); }

// The lanes of `mask` in which the result of an instruction that handles undefined values is undefined.
uint32_t check_reads(const Context& c, const Touched& touched) {
  if (touched.undefined == Touched::Undefined::kIgnored) return 0;
  uint32_t some = 0, all = c.mask;
  for (int index : touched.reads) {
    const uint32_t missing = c.mask & ~c.warp.defined[index];
    some |= missing, all &= missing;
    if (missing != 0 && touched.undefined == Touched::Undefined::kRaises)
      fail(c, "it reads " + c.grid.code->register_name(index) + ", uninitialised in lanes " + lanes_text(missing));
  }
  if (touched.undefined == Touched::Undefined::kSpreads || touched.reads.empty()) return some;
  return some ? all : 0;
}

// Registers that the tensor core may still read or write are nobody else's.
void check_wgmma(const Context& c, const std::vector<int>& registers) {
  for (int index : registers) {
    if (c.warp.wgmma.holds(index)) fail(c, c.warp.wgmma.holder(*c.grid.code, index));
    c.warp.wgmma.touched(index);
  }
}

void exit_warp(Machine& machine, Context& c) {
  Cta& cta = c.cta;
  cta.live_warps--;
  machine.events++;
  if (cta.live_warps == 0 && cta.shared.writes_in_flight > 0)
    fail(c, "the CTA exits while copies into its shared memory are in flight");
  if (cta.live_warps == 0 && cta.sends > 0)
    fail(c, "the CTA exits while copies from its shared memory into the cluster's are in flight");
  if (cta.live_warps == 0) mbarriers_check_exit(c);
}

void step(Machine& machine, Grid& grid, Cta& cta, Warp& warp) {
  const uint32_t group = pick_group(machine, warp);
  const uint32_t pc = warp.pc[__builtin_ctz(group)];
  const Code& code = *grid.code;
  const Instruction& instruction = *code.instructions[pc];
  const Touched& touched = code.touched[pc];
  Context context{machine, grid, cta, warp, instruction, group, group};
  if (instruction.guard >= 0) {
    const int guard = touched.reads.back();
    if (group & ~warp.defined[guard]) fail(context, "its guard is uninitialised in some lanes");
    const uint64_t* value = warp.reg(guard);
    for_lanes(group, [&](int lane) {
      if (((value[lane] & 1) != 0) == instruction.guard_negated) context.mask &= ~(1u << lane);
    });
  }
  warp.tried |= group;
  const uint32_t mask = context.mask;
  if (mask && !touched.owns && warp.wgmma.watches()) {
    check_wgmma(context, touched.reads);
    check_wgmma(context, touched.writes);
  }
  Outcome outcome = Outcome::kNext;
  if (mask) {
    const uint32_t undefined = touched.owns ? 0 : check_reads(context, touched);
    outcome = code.handlers[pc](context);
    if (outcome == Outcome::kBlocked) {
      grid.counters.warp_stalls++;
      warp.blocked_pc = warp.wait_pc = pc;
      // Those that the guard stopped have nothing to do with it.
      for_lanes(group & ~mask, [&](int lane) { warp.pc[lane]++; });
      warp.sleep = machine.below(8);
      return machine.note_poll(warp);
    }
    if (!touched.defines)
      for (int index : touched.writes) warp.defined[index] = (warp.defined[index] | mask) & ~undefined;
  }
  // A wait for an mbarrier is a loop of polls: the one that succeeds ends it.
  if (warp.wait.what != Wait::For::kMbarrier) warp.wait.what = Wait::For::kNothing;
  machine.ticks++;
  grid.executed[pc]++;
  grid.counters.instructions++;
  grid.counters.thread_instructions += __builtin_popcount(mask);
  // A handler that jumps sets the pcs of `mask`; the lanes that the guard stopped go on behind it.
  const uint32_t on = outcome == Outcome::kJumped ? group & ~mask : group;
  for_lanes(on & warp.live, [&](int lane) { warp.pc[lane]++; });
  if (!warp.live) exit_warp(machine, context);
}

void advance_async(Machine& machine, Cta& cta) {
  for (uint32_t n = machine.below(24); n > 0 && !machine.pieces.empty(); --n) {
    const size_t pick = machine.random() % machine.pieces.size();
    std::swap(machine.pieces[pick], machine.pieces.back());
    const Piece piece = std::move(machine.pieces.back());
    machine.pieces.pop_back();
    piece();
    machine.events++;
  }
  if (machine.below(4) == 0 && cta.warps.size() >= 4)
    wgmma_advance(machine, cta, static_cast<int>(machine.below(static_cast<uint32_t>(cta.warps.size() / 4))) * 4);
  drain_some(machine, cta);
}

std::string report(Machine& machine, const std::string& what) {
  std::ostringstream text;
  text << "the launch hangs: " << what << ". Lanes are at:";
  int shown = 0;
  for (Grid& grid : machine.grids) {
    for (auto& cta : grid.ctas) {
      for (Warp& warp : cta->warps) {
        std::map<uint32_t, uint32_t> groups;
        for_lanes(warp.live, [&](int lane) { groups[warp.pc[lane]] |= 1u << lane; });
        for (const auto& [pc, lanes] : groups) {
          if (shown++ >= 64) continue;
          const Instruction& at = *grid.code->instructions[pc];
          text << "\n  " << grid.code->function->name << " CTA (" << cta->id[0] << ", " << cta->id[1] << ", "
               << cta->id[2] << ") warp " << warp.index << " lanes " << lanes_text(lanes) << ": line " << at.line
               << ": " << at.text.substr(0, 120);
          if (warp.wait.what == Wait::For::kMbarrier || warp.wait_pc == pc) text << describe(warp.wait);
        }
      }
    }
  }
  if (shown > 64) text << "\n  and " << shown - 64 << " more";
  return text.str();
}

template <class F>
void for_warps(Machine& machine, F f) {
  for (Grid& grid : machine.grids)
    for (auto& cta : grid.ctas)
      for (Warp& warp : cta->warps) f(warp);
}

void suspect(Machine& machine, bool suspicious) {
  machine.suspicious = suspicious;
  for_warps(machine, [](Warp& warp) {
    warp.stuck = false, warp.anchor = 0, warp.tried = 0, warp.patience = warp.patience_next = 1;
  });
  if (!suspicious) return;
  for (Grid& grid : machine.grids) {
    grid.resident = kMostResident;
    for (auto& cta : grid.ctas) drain_all(machine, *cta);
  }
}

void check_deadlock(Machine& machine) {
  bool stuck = machine.pieces.empty();
  for_warps(machine, [&](Warp& warp) { stuck &= warp.live == 0 || warp.stuck; });
  if (stuck) throw Error(report(machine, "a deadlock: no warp can go on, and nothing is in flight"));
}

// Some CTAs and warps fall far behind the others for a while: few bugs show among equals.
bool sits_out(Machine& machine, bool& slow) {
  if (machine.below(kMood) == 0) slow = machine.below(3) == 0;
  return slow && machine.below(kSlowness) != 0;
}

// Whether the cluster of the CTA is over; it then leaves.
bool retire(Machine& machine, Grid& grid, Cta& cta) {
  // A CTA of a cluster stays until all are done: peers may still reach into its shared memory.
  if (std::any_of(cta.cluster.begin(), cta.cluster.end(), [](Cta* c) { return c->live_warps > 0; })) return false;
  if (!machine.pieces.empty()) {
    advance_async(machine, cta);
    return true;
  }
  const std::vector<Cta*> members = cta.cluster;
  for (Cta* member : members) {
    drain_all(machine, *member);
    grid.ctas.remove_if([&](const std::unique_ptr<Cta>& c) { return c.get() == member; });
  }
  machine.events++;
  return true;
}

void take_turn(Machine& machine, Grid& grid, Cta& cta) {
  if (sits_out(machine, cta.slow)) return advance_async(machine, cta);
  if (retire(machine, grid, cta)) return;
  Warp& warp = cta.warps[machine.below(static_cast<uint32_t>(cta.warps.size()))];
  if (warp.sleep > 0) {
    warp.sleep--;
  } else if (!sits_out(machine, warp.slow)) {
    const uint32_t burst = 1 + machine.below(kBurst);
    for (uint32_t i = 0; i < burst && warp.live && warp.sleep == 0; ++i) step(machine, grid, cta, warp);
  }
  advance_async(machine, cta);
}

}  // namespace

void Machine::note_poll(Warp& warp) {
  if (!suspicious || warp.stuck) return;
  uint64_t hash = 0xcbf29ce484222325 ^ warp.private_writes;
  const auto mix = [&](uint64_t word) { hash = (hash ^ word) * 0x9e3779b97f4a7c15, hash ^= hash >> 29; };
  for_lanes(warp.live, [&](int lane) { mix(warp.pc[lane]); });
  for (uint64_t word : warp.registers) mix(word);
  // Brent's way to find a cycle: compare with a state that is replaced at ever longer distances.
  if (hash == warp.anchor && (warp.tried & warp.live) == warp.live) {
    warp.stuck = true;
  } else if (--warp.patience == 0 || warp.anchor == 0) {
    warp.anchor = hash, warp.tried = 0;
    warp.patience_next = std::min(2 * warp.patience_next, 1u << 20);
    warp.patience = warp.patience_next;
  }
}

void Machine::run() {
  uint64_t seen = events, since = 0;
  for (Grid& grid : grids) grid.resident = kResident;
  while (true) {
    Grid* grid = nullptr;
    uint32_t candidates = 0;
    for (Grid& g : grids) {
      if (g.finished) continue;
      if (g.after == nullptr || g.after->finished || g.after->may_be_overtaken()) start_clusters(*this, g);
      g.finished = g.ctas.empty() && g.next_cluster == g.clusters;
      if (!g.ctas.empty() && below(++candidates) == 0) grid = &g;
    }
    if (grid == nullptr) break;
    auto it = std::next(grid->ctas.begin(), below(static_cast<uint32_t>(grid->ctas.size())));
    take_turn(*this, *grid, **it);
    since += kBurst / 2;
    if (events != seen) {
      seen = events, since = 0;
      if (suspicious) suspect(*this, false);
    } else if (suspicious) {
      if (below(64) == 0) check_deadlock(*this);
    } else if (since > kSuspect) {
      suspect(*this, true);
      seen = events;
    }
    if (since > kMostIdle) throw Error(report(*this, "for long, no instruction has had an effect on others"));
    if (step_limit && ticks > step_limit) throw Error(report(*this, "it has run into its limit of instructions"));
  }
  if (!pieces.empty()) throw Error("the launch ended with asynchronous copies in flight");
}

bool Grid::may_be_overtaken() const {
  return next_cluster == clusters && std::all_of(ctas.begin(), ctas.end(), [](const auto& cta) {
           return cta->releases_dependents || !cta->live_warps;
         });
}

uint64_t static_shared_bytes(const Function& function) {
  uint64_t bytes = function.shared_bytes;
  for (const Variable& variable : function.variables) {
    if (variable.space == Space::kShared && variable.is_extern) bytes = std::max(bytes, variable.offset);
  }
  return bytes;
}

std::string source_name(const Context& context) {
  const auto& files = context.grid.code->module->files;
  const auto index = static_cast<size_t>(context.instruction.source_file);
  return index < files.size() ? files[index] : "?";
}

std::string where(const Context& context) {
  std::ostringstream text;
  const Instruction& at = context.instruction;
  text << context.grid.code->function->name << " line " << at.line;
  if (at.source_line > 0) text << " (" << source_name(context) << ":" << at.source_line << ")";
  text << ", CTA (" << context.cta.id[0] << ", " << context.cta.id[1] << ", " << context.cta.id[2] << ") warp "
       << context.warp.index << " lanes " << lanes_text(context.mask) << ": " << at.text;
  return text.str();
}

std::string Who::str() const { return (context_ ? where(*context_) : std::string(text_)) + part_; }

void fail(const Context& context, const std::string& what) { throw Error(where(context) + ": " + what); }

namespace {

int threads_to_arrive(const Cta& cta) {
  int threads = 0;
  for (const Cta* member : cta.cluster)
    for (const Warp& warp : member->warps) threads += __builtin_popcount(warp.live & ~warp.cluster_arrived);
  return threads;
}

}  // namespace

std::string describe(const Wait& wait) {
  std::ostringstream text;
  switch (wait.what) {
    case Wait::For::kLanes:
      text << ": waits for the lanes " << lanes_text(static_cast<uint32_t>(wait.value)) << " to come here";
      break;
    case Wait::For::kBarrier: {
      const auto& barrier = wait.cta->barriers[wait.at];
      text << ": waits for barrier " << wait.at << ", at which " << barrier.arrived << " of " << barrier.expected
           << " threads have arrived";
      break;
    }
    case Wait::For::kClusterBarrier:
      text << ": waits for the cluster's barrier, to which " << threads_to_arrive(*wait.cta)
           << " threads have not come";
      break;
    case Wait::For::kMbarrier:
      text << ": waits for parity " << wait.value << " of the "
           << describe_mbarrier(*wait.cta, static_cast<uint32_t>(wait.at));
      break;
    case Wait::For::kBulkGroup:
      text << ": waits for bulk copies of its own";
      break;
    case Wait::For::kWgmma:
      text << ": waits for wgmma, which all four warps of the warpgroup must issue";
      break;
    case Wait::For::kRegisters:
      text << ": waits for " << wait.value << " registers, of which " << wait.cta->registers_free << " are free";
      break;
    case Wait::For::kGrid:
      text << ": waits for the launch before this one to end";
      break;
    case Wait::For::kNothing:
      break;
  }
  return text.str();
}

}  // namespace emulator
