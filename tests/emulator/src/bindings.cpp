// The private Python module `_emulator`; the public interface is in emulator/__init__.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "machine.h"

namespace py = pybind11;

namespace emulator {
namespace {

struct ParsedModule {
  std::unique_ptr<Module> module;
  std::map<std::string, std::shared_ptr<Code>> kernels;
};

std::shared_ptr<ParsedModule> parse_module(const std::string& text) {
  auto parsed = std::make_shared<ParsedModule>();
  parsed->module = std::make_unique<Module>(parse(text));
  for (const auto& [name, function] : parsed->module->functions) {
    if (function.is_entry) parsed->kernels[name] = decode(*parsed->module, function);
  }
  return parsed;
}

using Triple = std::array<uint32_t, 3>;
using Launch = std::tuple<std::shared_ptr<ParsedModule>, std::string, Triple, Triple, Triple, uint32_t,
                          std::vector<py::bytes>, int>;

void prepare(Machine& machine, const Launch& launch) {
  const auto& [module, name, grid_size, block, cluster, shared_bytes, arguments, device] = launch;
  if (device != 0) throw Error("one device is emulated so far");
  const auto found = module->kernels.find(name);
  if (found == module->kernels.end()) throw Error("no kernel '" + name + "' in this module");
  const Function& function = *found->second->function;
  Grid& grid = machine.grids.emplace_back();
  grid.code = found->second;
  grid.grid = grid_size, grid.block = block, grid.cluster = cluster;
  grid.shared_bytes = shared_bytes;
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

std::vector<std::map<std::string, uint64_t>> launch_all(
    uint64_t seed, const std::vector<Launch>& launches,
    const std::vector<std::tuple<uint64_t, uint64_t, bool, std::string>>& memory) {
  Machine machine(seed);
  for (const auto& [address, bytes, writable, name] : memory)
    machine.memory.push_back({address, bytes, writable, name});
  std::sort(machine.memory.begin(), machine.memory.end(),
            [](const MemoryRange& a, const MemoryRange& b) { return a.address < b.address; });
  for (const Launch& launch : launches) prepare(machine, launch);
  {
    py::gil_scoped_release release;
    machine.run();
  }
  std::vector<std::map<std::string, uint64_t>> all;
  for (const Grid& grid : machine.grids) {
    const Counters& c = grid.counters;
    all.push_back({{"instructions", c.instructions},
                   {"wgmma_flops", c.wgmma_flops},
                   {"tma_bytes", c.tma_bytes},
                   {"global_sectors", c.global_sectors},
                   {"shared_bank_conflicts", c.shared_bank_conflicts},
                   {"warp_stalls", c.warp_stalls}});
  }
  return all;
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
  module.def("launch", &launch_all);
}
