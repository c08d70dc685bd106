// Loading: variables get memory, addresses among initial values are filled in, kernels are decoded.
#include "module.h"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

constexpr uint32_t kMostThreads = 1024, kMostSharedBytes = 232448;

// Gives the variables of the module memory that lives as long as the module.
void allocate(LoadedModule& loaded) {
  for (Variable& variable : loaded.module.variables) {
    if (variable.space != Space::kGlobal && variable.space != Space::kConst) continue;
    const uint64_t alignment = std::max<uint64_t>(variable.alignment, kGranule);
    auto& words = loaded.storage.emplace_back((variable.bytes + 2 * alignment) / 8 + 2, 0);
    const auto base = reinterpret_cast<uint64_t>(words.data());
    variable.address = (base + alignment - 1) / alignment * alignment;
    std::copy(variable.initial.begin(), variable.initial.end(), reinterpret_cast<uint8_t*>(variable.address));
    loaded.ranges.push_back({variable.address, variable.bytes, variable.space == Space::kGlobal, variable.name});
  }
}

uint64_t address_of(const Module& module, const Relocation& relocation) {
  if (relocation.variable < 0) return function_pointer(module, relocation.function) + relocation.addend;
  const Variable& variable = module.variables[relocation.variable];
  uint64_t address = variable.address;
  if (variable.space == Space::kShared) {
    address = kSharedBase + variable.offset;
    if (relocation.is_generic) address += kSharedWindow;
  }
  return address + relocation.addend;
}

void relocate(const Module& module) {
  for (const Variable& variable : module.variables) {
    for (const Relocation& relocation : variable.relocations) {
      const uint64_t address = address_of(module, relocation) >> relocation.shift;
      std::memcpy(reinterpret_cast<uint8_t*>(variable.address) + relocation.offset, &address, relocation.bytes);
    }
  }
}

uint64_t most_threads(const Function& function) {
  const auto found = function.directives.find("maxntid");
  if (found == function.directives.end()) return kMostThreads;
  uint64_t threads = 1;
  for (uint32_t extent : found->second) threads = std::min<uint64_t>(threads * extent, kMostThreads);
  return threads;
}

void pass_arguments(Grid& grid, const Function& function, const std::vector<std::string>& arguments) {
  if (arguments.size() != function.parameters.size())
    throw Error(function.name + " takes " + std::to_string(function.parameters.size()) + " arguments");
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Variable& parameter = function.parameters[i];
    if (arguments[i].size() != parameter.bytes)
      throw Error(function.name + ": argument " + std::to_string(i) + " has another size");
    grid.parameters.resize(std::max<size_t>(grid.parameters.size(), parameter.offset + parameter.bytes));
    std::copy(arguments[i].begin(), arguments[i].end(), grid.parameters.data() + parameter.offset);
  }
}

void add_launch(Machine& machine, const Launch& launch) {
  const std::string& name = launch.kernel;
  const auto found = launch.module->kernels.find(name);
  if (found == launch.module->kernels.end()) throw Error("no kernel '" + name + "' in this module");
  const Function& function = *found->second->function;
  Grid& grid = machine.grids.emplace_back();
  grid.code = found->second;
  grid.grid = launch.grid, grid.block = launch.block, grid.cluster = launch.cluster;
  grid.shared_bytes = launch.shared_bytes, grid.device = launch.device;
  grid.executed.assign(grid.code->instructions.size(), 0);
  if (launch.programmatic) {
    for (Grid& other : machine.grids)
      if (&other != &grid && other.device == launch.device) grid.after = &other;
  }
  grid.clusters = 1;
  for (int i = 0; i < 3; ++i) {
    if (launch.cluster[i] == 0 || launch.grid[i] % launch.cluster[i])
      throw Error(name + ": the grid is no multiple of the cluster");
    grid.clusters *= launch.grid[i] / launch.cluster[i];
  }
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  if (threads == 0 || threads > kMostThreads) throw Error(name + ": a block has 1 to 1024 threads");
  if (threads > most_threads(function)) throw Error(name + ": more threads than .maxntid allows");
  if (static_shared_bytes(function) + launch.shared_bytes > kMostSharedBytes)
    throw Error(name + ": more than 227 KB of shared memory");
  pass_arguments(grid, function, launch.arguments);
}

}  // namespace

LoadedModule::LoadedModule(const std::string& text) : module(parse(text)) {
  allocate(*this);
  relocate(module);
  for (const auto& [name, function] : module.functions) {
    if (function.is_entry && function.is_defined) kernels[name] = decode(module, function);
  }
}

void add_launches(Machine& machine, const std::vector<Launch>& launches) {
  auto& ranges = machine.memory.ranges;
  std::set<const LoadedModule*> modules;
  for (const Launch& launch : launches) {
    add_launch(machine, launch);
    const LoadedModule& loaded = *launch.module;
    if (modules.insert(&loaded).second) ranges.insert(ranges.end(), loaded.ranges.begin(), loaded.ranges.end());
  }
  std::ranges::sort(ranges, {}, &MemoryRange::address);
}

}  // namespace emulator
