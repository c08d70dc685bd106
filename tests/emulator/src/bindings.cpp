// The private Python module `_emulator`; the public interface is in emulator/__init__.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "module.h"

namespace py = pybind11;

namespace emulator {
namespace {

using Memory = std::vector<std::tuple<uint64_t, uint64_t, bool, std::string>>;
using Triple = std::array<uint32_t, 3>;
using LaunchTuple = std::tuple<std::shared_ptr<LoadedModule>, std::string, Triple, Triple, Triple, uint32_t,
                               std::vector<std::string>, int, bool>;

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
  all["stored_bytes"] = c.stored_bytes;
  return all;
}

// What each launch did, and what printf printed.
std::pair<std::vector<py::dict>, std::string> launch_all(uint64_t seed, const std::vector<LaunchTuple>& tuples,
                                                         const Memory& memory) {
  Machine machine(seed);
  for (const auto& [address, bytes, writable, name] : memory)
    machine.memory.ranges.push_back({address, bytes, writable, name});
  std::vector<Launch> launches;
  for (const LaunchTuple& tuple : tuples) launches.push_back(std::make_from_tuple<Launch>(tuple));
  add_launches(machine, launches);
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
  py::class_<LoadedModule, std::shared_ptr<LoadedModule>>(module, "LoadedModule")
      .def_property_readonly("kernels",
                             [](const LoadedModule& self) {
                               std::vector<std::string> names;
                               for (const auto& entry : self.kernels) names.push_back(entry.first);
                               return names;
                             })
      .def("parameters", [](const LoadedModule& self, const std::string& kernel) {
        std::vector<std::pair<std::string, uint64_t>> out;
        for (const Variable& v : self.kernels.at(kernel)->function->parameters) out.emplace_back(v.type, v.bytes);
        return out;
      });
  module.def("parse", [](const std::string& text) { return std::make_shared<LoadedModule>(text); });
  module.def("describe", [](const std::string& text) { return describe(parse(text)); });
  module.def("launch", &launch_all);
}
