#include "comm_module.h"

#include <pybind11/stl.h>

#include "../comm/nccl.h"
#include "../comm/plan.h"

namespace py = pybind11;

namespace fastfp8 {
namespace {

comm::RailPlan rail_plan(const std::string& name, const py::bytes& constants, bool traced) {
  const std::string_view given = constants;
  const auto* const first = reinterpret_cast<const std::byte*>(given.data());
  return {name, {first, first + given.size()}, traced};
}

void bind_nccl(py::module_& module) {
  using comm::nccl::Connection;
  py::class_<Connection>(module, "CommNccl", "The rails of one rank over NCCL's device API. Untested on silicon.")
      .def(py::init<uint64_t, const comm::Geometry&, uint64_t>(), py::call_guard<py::gil_scoped_release>(),
           py::kw_only(), py::arg("communicator"), py::arg("geometry"), py::arg("address"),
           "By all ranks: an ncclComm_t, and the address of window_bytes of memory that NCCL can register.")
      .def_property_readonly(
          "constants",
          [](const Connection& self) {
            return py::bytes(reinterpret_cast<const char*>(self.constants().data()), self.constants().size());
          },
          "What the plans' rail_constants want.")
      .def_property_readonly("windows", &Connection::windows, "Addresses of the ranks' windows, 0 of other nodes'.")
      .def("close", &Connection::close, py::call_guard<py::gil_scoped_release>(),
           "By all ranks, when no kernel runs on any of them.");
  module.def("comm_nccl_headers", &comm::nccl::headers_version, "Version of the headers built with, '' without.");
  module.def("comm_nccl_unusable_reason", &comm::nccl::unusable_reason, "'' if CommNccl can serve in this process.");
}

}  // namespace

void bind_comm(py::module_& module) {
  using namespace comm;
  py::class_<Geometry>(module, "CommGeometry", "Ranks, channels and rings of a comm.Buffer, and what it can carry.")
      .def(py::init([](int nodes, int gpus, int channels, int experts, int top_k, int hidden, int max_tokens,
                       int capacity, int link_slots, int rail_slots, int rail_chunk) {
             const Geometry geometry{nodes,      gpus,     channels,   experts,    top_k,     hidden,
                                     max_tokens, capacity, link_slots, rail_slots, rail_chunk};
             check(geometry);
             return geometry;
           }),
           py::kw_only(), py::arg("nodes"), py::arg("gpus"), py::arg("channels"), py::arg("experts"), py::arg("top_k"),
           py::arg("hidden"), py::arg("max_tokens"), py::arg("capacity"), py::arg("link_slots"), py::arg("rail_slots"),
           py::arg("rail_chunk"))
      .def_property_readonly("ranks", &Geometry::ranks)
      .def_property_readonly("local_experts", &Geometry::local_experts)
      .def_readonly("nodes", &Geometry::nodes)
      .def_readonly("gpus", &Geometry::gpus)
      .def_readonly("hidden", &Geometry::hidden)
      .def_readonly("top_k", &Geometry::top_k)
      .def_readonly("capacity", &Geometry::capacity)
      .def_readonly("max_tokens", &Geometry::max_tokens)
      .def_readonly("channels", &Geometry::channels)
      .def_property_readonly("scale_pitch", &Geometry::scale_pitch)
      .def_property_readonly(
          "window_bytes", [](const Geometry& self) { return WindowLayout::of(self).bytes; },
          "What a rank lets others read and write; zero at first, and at the same offsets on each.")
      .def_property_readonly(
          "state_words", [](const Geometry& self) { return StateLayout::of(self).words; },
          "32-bit words that a rank keeps from call to call; zero at first.")
      .def_property_readonly(
          "routing_words", [](const Geometry& self) { return RoutingLayout::of(self).words; },
          "32-bit words of a handle.")
      .def_property_readonly(
          "weight_at", [](const Geometry& self) { return RoutingLayout::of(self).weight; },
          "Where in a handle's words the FP32 weights of the rows are.")
      .def_property_readonly(
          "status_at", [](const Geometry& self) { return StateLayout::of(self).status; },
          "Where in the state's words the status is: 6 words as comm_status takes them.");

  const auto call = [](int first_rank, int tokens, int scale_pitch, bool pow2, bool weighted, bool sums, bool values,
                       int timeout_us, int rail_delay) {
    return CallOptions{first_rank, tokens, scale_pitch, pow2, weighted, sums, values, timeout_us, rail_delay};
  };
  py::class_<CallOptions>(module, "CommCall", "One call of dispatch or combine.")
      .def(py::init(call), py::kw_only(), py::arg("first_rank"), py::arg("tokens"), py::arg("scale_pitch") = 0,
           py::arg("pow2") = false, py::arg("weighted") = true, py::arg("sums") = true, py::arg("values") = false,
           py::arg("timeout_us") = 100'000'000, py::arg("rail_delay") = 0);
  module.def(
      "comm_exchange_plan",
      [](const Geometry& g, const CallOptions& options, int ranks, int warps, const std::string& rail,
         const py::bytes& constants,
         bool traced) { return plan_exchange(g, options, {ranks, warps}, rail_plan(rail, constants, traced)); },
      py::arg("geometry"), py::arg("call"), py::arg("ranks") = 1, py::arg("warps") = 16, py::arg("rail") = "loopback",
      py::arg("rail_constants") = py::bytes(), py::arg("traced") = false);
  module.def(
      "comm_dispatch_plan",
      [](const Geometry& g, const CallOptions& options, const std::string& payload, int ranks, int warps,
         const std::string& rail, const py::bytes& constants, bool traced) {
        const Payload kind = payload == "quantize" ? Payload::kQuantize
                             : payload == "scaled" ? Payload::kScaled
                                                   : Payload::kPlain;
        return plan_dispatch(g, options, {ranks, warps}, kind, rail_plan(rail, constants, traced));
      },
      py::arg("geometry"), py::arg("call"), py::arg("payload"), py::arg("ranks") = 1, py::arg("warps") = 16,
      py::arg("rail") = "loopback", py::arg("rail_constants") = py::bytes(), py::arg("traced") = false);
  module.def(
      "comm_combine_plan",
      [](const Geometry& g, const CallOptions& options, int ranks, int warps, const std::string& rail,
         const py::bytes& constants,
         bool traced) { return plan_combine(g, options, {ranks, warps}, rail_plan(rail, constants, traced)); },
      py::arg("geometry"), py::arg("call"), py::arg("ranks") = 1, py::arg("warps") = 16, py::arg("rail") = "loopback",
      py::arg("rail_constants") = py::bytes(), py::arg("traced") = false);
  module.def(
      "comm_status",
      [](const std::vector<uint32_t>& words) -> py::object {
        const auto trouble = static_cast<Trouble>(words.at(0));
        if (trouble == Trouble::kNone) return py::none();
        return py::dict(py::arg("trouble") = name_of(trouble), py::arg("channel") = words.at(1),
                        py::arg("role") = name_of(static_cast<Role>(words.at(2))), py::arg("peer") = words.at(3),
                        py::arg("head") = words.at(4), py::arg("tail") = words.at(5), py::arg("rows") = words.at(6));
      },
      "What a status says, None where all is well.");
  std::vector<std::string> roles, calls = {"exchange", "dispatch", "combine"};
  for (int role = 0; role <= static_cast<int>(Role::kExchange); ++role)
    roles.push_back(name_of(static_cast<Role>(role)));
  module.attr("comm_roles") = py::cast(roles);
  module.attr("comm_traced_calls") = py::cast(calls);  // of TracedCall
  bind_nccl(module);
}

}  // namespace fastfp8
