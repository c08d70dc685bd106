#include "machine.h"

#include <algorithm>
#include <sstream>

namespace emulator {
namespace {

// A launch counts as hung after so many vain waits, or instructions (it may spin on a flag), without an event.
constexpr uint64_t kMostPolls = 100'000, kMostInstructions = 40'000'000;
constexpr int kResidentClusters = 4;

void start_cta(Machine& machine, Grid& grid, Cta& cta) {
  const Function& function = *grid.code->function;
  const uint32_t threads = grid.block[0] * grid.block[1] * grid.block[2];
  const uint64_t shared = static_shared_bytes(function) + grid.shared_bytes;
  cta.grid = &grid;
  cta.shared.assign(shared, 0xff);  // NaN in every format: nothing may be read before it is written
  cta.unfenced.assign(shared, 0);
  uint64_t local = 0;
  for (const Variable& variable : function.variables) {
    if (variable.space == Space::kLocal) local = std::max(local, variable.offset + variable.bytes);
  }
  cta.warps.resize((threads + kLanes - 1) / kLanes);
  cta.live_warps = static_cast<int>(cta.warps.size());
  for (size_t i = 0; i < cta.warps.size(); ++i) {
    Warp& warp = cta.warps[i];
    warp.index = static_cast<int>(i);
    const uint32_t left = threads - static_cast<uint32_t>(i) * kLanes;
    warp.live = left >= kLanes ? kAllLanes : (1u << left) - 1;
    warp.registers.assign(function.registers.size() * kLanes, 0xfff7dead7fc0dead);
    warp.local.assign(local * kLanes, 0xff);
  }
  machine.events++;
}

// CTAs of a cluster start together; clusters in order of their index, as many as may be resident.
void start_clusters(Machine& machine, Grid& grid) {
  const uint32_t per_cluster = grid.cluster[0] * grid.cluster[1] * grid.cluster[2];
  while (grid.next_cluster < grid.clusters && grid.ctas.size() < kResidentClusters * per_cluster) {
    const uint32_t index = grid.next_cluster++;
    const uint32_t across = grid.grid[0] / grid.cluster[0], down = grid.grid[1] / grid.cluster[1];
    const uint32_t cx = index % across, cy = index / across % down, cz = index / across / down;
    std::vector<Cta*> members;
    for (uint32_t rank = 0; rank < per_cluster; ++rank) {
      auto cta = std::make_unique<Cta>();
      const uint32_t x = rank % grid.cluster[0], y = rank / grid.cluster[0] % grid.cluster[1];
      const uint32_t z = rank / grid.cluster[0] / grid.cluster[1];
      cta->id = {cx * grid.cluster[0] + x, cy * grid.cluster[1] + y, cz * grid.cluster[2] + z};
      cta->cluster_rank = rank;
      start_cta(machine, grid, *cta);
      members.push_back(cta.get());
      grid.ctas.push_back(std::move(cta));
    }
    for (Cta* member : members) member->cluster = members;
  }
}

// The lanes that step next: those at the lowest pc, which makes diverged lanes meet again where their paths join; now
// and then those at another, so that lanes that spin cannot starve the ones they wait for.
uint32_t pick_group(Machine& machine, Warp& warp) {
  uint32_t chosen = 0xffffffff;
  if (machine.below(64) == 0) {
    int skip = static_cast<int>(machine.below(__builtin_popcount(warp.live)));
    for_lanes(warp.live, [&](int lane) {
      if (skip-- == 0) chosen = warp.pc[lane];
    });
  } else {
    for_lanes(warp.live, [&](int lane) { chosen = std::min(chosen, warp.pc[lane]); });
  }
  uint32_t group = 0;
  for_lanes(warp.live, [&](int lane) { group |= (warp.pc[lane] == chosen ? 1u : 0u) << lane; });
  return group;
}

void step(Machine& machine, Grid& grid, Cta& cta, Warp& warp) {
  const uint32_t group = pick_group(machine, warp);
  const uint32_t pc = warp.pc[__builtin_ctz(group)];
  const Instruction& instruction = grid.code->function->instructions[pc];
  uint32_t mask = group;
  if (instruction.guard >= 0) {
    const uint64_t* guard = warp.reg(instruction.guard);
    for_lanes(group, [&](int lane) {
      if (((guard[lane] & 1) != 0) == instruction.guard_negated) mask &= ~(1u << lane);
    });
  }
  Context context{machine, grid, cta, warp, instruction, group, mask};
  Outcome outcome = Outcome::kNext;
  if (mask) outcome = grid.code->handlers[pc](context);
  if (outcome == Outcome::kBlocked) {
    grid.counters.warp_stalls++;
    machine.polls++;
    warp.sleep = machine.below(8);
    return;
  }
  grid.counters.instructions++;
  // A handler that jumps sets the pcs of `mask`; the lanes that the guard stopped go on behind it.
  const uint32_t on = outcome == Outcome::kJumped ? group & ~mask : group;
  for_lanes(on & warp.live, [&](int lane) { warp.pc[lane]++; });
  if (!warp.live) {
    cta.live_warps--;
    machine.events++;
  }
}

std::string hung(Machine& machine) {
  std::ostringstream text;
  text << "the launch hangs: nothing has happened for long. Lanes are at:";
  std::map<std::string, int> places;
  for (Grid& grid : machine.grids) {
    for (auto& cta : grid.ctas) {
      for (Warp& warp : cta->warps) {
        std::set<uint32_t> pcs;
        for_lanes(warp.live, [&](int lane) { pcs.insert(warp.pc[lane]); });
        for (uint32_t pc : pcs) {
          const Instruction& at = grid.code->function->instructions[pc];
          std::ostringstream place;
          place << "\n  CTA " << cta->id[0] << " warp " << warp.index << ": line " << at.line << ": " << at.text;
          places[place.str()]++;
        }
      }
    }
  }
  int shown = 0;
  for (const auto& [place, count] : places) {
    if (shown++ < 40) text << place;
  }
  return text.str();
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
}

}  // namespace

void Machine::run() {
  uint64_t idle = 0, seen = events;
  while (true) {
    Grid* grid = nullptr;
    uint32_t candidates = 0;
    for (Grid& g : grids) {
      start_clusters(*this, g);
      if (!g.ctas.empty() && below(++candidates) == 0) grid = &g;
    }
    if (grid == nullptr) break;
    auto it = std::next(grid->ctas.begin(), below(static_cast<uint32_t>(grid->ctas.size())));
    Cta& cta = **it;
    // A CTA of a cluster stays until all are done: peers may still reach into its shared memory.
    const bool finished =
        std::all_of(cta.cluster.begin(), cta.cluster.end(), [](Cta* c) { return c->live_warps == 0; });
    if (finished) {
      if (!pieces.empty()) {
        advance_async(*this, cta);
        continue;
      }
      const std::vector<Cta*> members = cta.cluster;
      for (Cta* member : members)
        grid->ctas.remove_if([&](const std::unique_ptr<Cta>& c) { return c.get() == member; });
      continue;
    }
    Warp& warp = cta.warps[below(static_cast<uint32_t>(cta.warps.size()))];
    const uint32_t burst = 1 + below(24);
    if (warp.sleep > 0) {
      warp.sleep--;
      idle++;
    } else {
      for (uint32_t i = 0; i < burst && warp.live && warp.sleep == 0; ++i, ++idle) step(*this, *grid, cta, warp);
    }
    advance_async(*this, cta);
    if (events != seen) seen = events, idle = polls = 0;
    if (idle > kMostInstructions || polls > kMostPolls) throw Error(hung(*this));
  }
  if (!pieces.empty()) throw Error("the launch ended with asynchronous copies in flight");
}

uint8_t* Machine::global(uint64_t address, uint64_t bytes, bool write, const std::string& who) {
  auto after = std::upper_bound(memory.begin(), memory.end(), address,
                                [](uint64_t a, const MemoryRange& range) { return a < range.address; });
  const MemoryRange* nearest = after == memory.begin() ? nullptr : &*std::prev(after);
  if (nearest != nullptr && address + bytes <= nearest->address + nearest->bytes && (!write || nearest->writable))
    return reinterpret_cast<uint8_t*>(address);
  std::ostringstream text;
  text << who << ": " << (write ? "write of " : "read of ") << bytes << " bytes of global memory at 0x" << std::hex
       << address << std::dec;
  if (nearest == nullptr)
    text << ", below all buffers of the launch";
  else
    text << ", " << static_cast<int64_t>(address - nearest->address) << " bytes into '" << nearest->name << "' of "
         << nearest->bytes << " bytes" << (nearest->writable ? "" : ", which is read-only");
  throw Error(text.str());
}

uint64_t static_shared_bytes(const Function& function) {
  uint64_t bytes = function.shared_bytes;
  for (const Variable& variable : function.variables) {
    if (variable.space == Space::kShared && variable.is_extern) bytes = std::max(bytes, variable.offset);
  }
  return bytes;
}

std::string where(const Context& context) {
  std::ostringstream text;
  text << context.grid.code->function->name << " line " << context.instruction.line << ", CTA (" << context.cta.id[0]
       << ", " << context.cta.id[1] << ", " << context.cta.id[2] << ") warp " << context.warp.index << ": "
       << context.instruction.text;
  return text.str();
}

void fail(const Context& context, const std::string& what) { throw Error(where(context) + ": " + what); }

}  // namespace emulator
