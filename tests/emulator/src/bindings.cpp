// The private Python module `_emulator`; the public interface is in emulator/__init__.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace py = pybind11;

namespace emulator {
namespace {

struct ParsedModule {
  std::unique_ptr<Module> module;
  std::map<std::string, std::shared_ptr<Code>> kernels;
  std::vector<std::vector<uint64_t>> storage;  // of .global and .const variables, in whole granules
  std::vector<MemoryRange> ranges;
};

// Gives the variables of the module memory that lives as long as the module.
void allocate(ParsedModule& parsed) {
  for (Variable& variable : parsed.module->variables) {
    if (variable.space != Space::kGlobal && variable.space != Space::kConst) continue;
    const uint64_t alignment = std::max<uint64_t>(variable.alignment, kGranule);
    auto& words = parsed.storage.emplace_back((variable.bytes + 2 * alignment) / 8 + 2, 0);
    const auto base = reinterpret_cast<uint64_t>(words.data());
    variable.address = (base + alignment - 1) / alignment * alignment;
    std::copy(variable.initial.begin(), variable.initial.end(), reinterpret_cast<uint8_t*>(variable.address));
    parsed.ranges.push_back({variable.address, variable.bytes, variable.space == Space::kGlobal, variable.name});
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

void relocate(ParsedModule& parsed) {
  for (const Variable& variable : parsed.module->variables) {
    for (const Relocation& relocation : variable.relocations) {
      const uint64_t address = address_of(*parsed.module, relocation) >> relocation.shift;
      std::memcpy(reinterpret_cast<uint8_t*>(variable.address) + relocation.offset, &address, relocation.bytes);
    }
  }
}

std::shared_ptr<ParsedModule> parse_module(const std::string& text) {
  auto parsed = std::make_shared<ParsedModule>();
  parsed->module = std::make_unique<Module>(parse(text));
  allocate(*parsed);
  relocate(*parsed);
  for (const auto& [name, function] : parsed->module->functions) {
    if (function.is_entry && function.is_defined) parsed->kernels[name] = decode(*parsed->module, function);
  }
  return parsed;
}

using Triple = std::array<uint32_t, 3>;
using Launch = std::tuple<std::shared_ptr<ParsedModule>, std::string, Triple, Triple, Triple, uint32_t,
                          std::vector<py::bytes>, int, bool>;

void prepare(Machine& machine, const Launch& launch) {
  const auto& [module, name, grid_size, block, cluster, shared_bytes, arguments, device, programmatic] = launch;
  const auto found = module->kernels.find(name);
  if (found == module->kernels.end()) throw Error("no kernel '" + name + "' in this module");
  const Function& function = *found->second->function;
  Grid& grid = machine.grids.emplace_back();
  grid.code = found->second;
  grid.grid = grid_size, grid.block = block, grid.cluster = cluster;
  grid.shared_bytes = shared_bytes, grid.device = device;
  grid.executed.assign(grid.code->instructions.size(), 0);
  if (programmatic) {
    for (Grid& other : machine.grids)
      if (&other != &grid && other.device == device) grid.after = &other;
  }
  grid.clusters = 1;
  for (int i = 0; i < 3; ++i) {
    if (cluster[i] == 0 || grid_size[i] % cluster[i]) throw Error(name + ": the grid is no multiple of the cluster");
    grid.clusters *= grid_size[i] / cluster[i];
  }
  const auto maximum = function.directives.find("maxntid");
  const uint32_t threads = block[0] * block[1] * block[2];
  if (threads == 0 || threads > 1024) throw Error(name + ": a block has 1 to 1024 threads");
  if (maximum != function.directives.end() && threads > maximum->second.at(0))
    throw Error(name + ": more threads than .maxntid allows");
  if (static_shared_bytes(function) + shared_bytes > 232448) throw Error(name + ": more than 227 KB of shared memory");
  if (arguments.size() != function.parameters.size())
    throw Error(name + " takes " + std::to_string(function.parameters.size()) + " arguments");
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Variable& parameter = function.parameters[i];
    const std::string bytes = arguments[i];
    if (bytes.size() != parameter.bytes) throw Error(name + ": argument " + std::to_string(i) + " has another size");
    grid.parameters.resize(std::max<size_t>(grid.parameters.size(), parameter.offset + parameter.bytes));
    std::memcpy(grid.parameters.data() + parameter.offset, bytes.data(), bytes.size());
  }
}

using Memory = std::vector<std::tuple<uint64_t, uint64_t, bool, std::string>>;

py::dict counters_of(const Grid& grid) {
  const Counters& c = grid.counters;
  std::map<std::string, uint64_t> opcodes;
  for (size_t pc = 0; pc < grid.executed.size(); ++pc)
    if (grid.executed[pc]) opcodes[grid.code->instructions[pc]->opcode] += grid.executed[pc];
  py::dict all;
  all["instructions"] = c.instructions;
  all["thread_instructions"] = c.thread_instructions;
  all["opcodes"] = opcodes;
  all["wgmma_flops"] = c.wgmma_flops;
  all["tma_bytes"] = c.tma_bytes;
  all["global_sectors"] = c.global_sectors;
  all["shared_bank_conflicts"] = c.shared_bank_conflicts;
  all["warp_stalls"] = c.warp_stalls;
  return all;
}

// What each launch did, and what printf printed.
std::pair<std::vector<py::dict>, std::string> launch_all(uint64_t seed, const std::vector<Launch>& launches,
                                                         const Memory& memory) {
  Machine machine(seed);
  auto& ranges = machine.memory.ranges;
  for (const auto& [address, bytes, writable, name] : memory) ranges.push_back({address, bytes, writable, name});
  std::set<const ParsedModule*> modules;
  for (const Launch& launch : launches) {
    prepare(machine, launch);
    const auto& parsed = std::get<0>(launch);
    if (modules.insert(parsed.get()).second) ranges.insert(ranges.end(), parsed->ranges.begin(), parsed->ranges.end());
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const MemoryRange& a, const MemoryRange& b) { return a.address < b.address; });
  {
    py::gil_scoped_release release;
    machine.run();
  }
  std::vector<py::dict> all;
  for (const Grid& grid : machine.grids) all.push_back(counters_of(grid));
  return {all, machine.output};
}

}  // namespace
}  // namespace emulator

PYBIND11_MODULE(_emulator, module) {
  using namespace emulator;
  py::register_exception<Error>(module, "EmulationError", PyExc_RuntimeError);
  py::class_<ParsedModule, std::shared_ptr<ParsedModule>>(module, "ParsedModule")
      .def_property_readonly("kernels",
                             [](const ParsedModule& self) {
                               std::vector<std::string> names;
                               for (const auto& entry : self.kernels) names.push_back(entry.first);
                               return names;
                             })
      .def("parameters", [](const ParsedModule& self, const std::string& kernel) {
        std::vector<std::pair<std::string, uint64_t>> out;
        for (const Variable& v : self.kernels.at(kernel)->function->parameters) out.emplace_back(v.type, v.bytes);
        return out;
      });
  module.def("parse", &parse_module);
  module.def("describe", [](const std::string& text) { return describe(parse(text)); });
  module.def("launch", &launch_all);
}
