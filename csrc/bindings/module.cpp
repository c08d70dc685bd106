// fastfp8._C: planning and the driver for Python. The operators themselves are registered with torch (schema.cpp,
// *_op.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "../common/driver.h"
#include "../gemm/plan.h"
#include "backend.h"
#include "comm_module.h"

namespace py = pybind11;

namespace fastfp8 {
namespace {

DType dtype_named(const std::string& name) {
  for (DType type : {DType::kE4M3, DType::kBF16, DType::kF32, DType::kI32, DType::kI64}) {
    if (name == name_of(type)) return type;
  }
  return DType::kOther;
}

template <class Optional>
py::object optional_dtype(const Optional& type) {
  return type ? py::object(py::str(name_of(*type))) : py::object(py::none());
}

py::object slot_name(const char* slot) { return slot == nullptr ? py::object(py::none()) : py::object(py::str(slot)); }

template <class Argument>
py::object argument_of(const LaunchPlan& plan, const Argument& argument) {
  if constexpr (std::is_same_v<Argument, Constants>) {
    return py::bytes(reinterpret_cast<const char*>(plan.constants.data() + argument.at), argument.size);
  } else {
    return py::cast(argument);
  }
}

void bind_plan(py::module_& module) {
  py::class_<TensorSlot>(module, "TensorSlot", "The address of the tensor bound to `slot`; null where slot is None.")
      .def_property_readonly("slot", [](const TensorSlot& self) { return slot_name(self.slot); })
      .def("__repr__", [](const TensorSlot& self) { return py::str("TensorSlot({!r})").format(slot_name(self.slot)); });
  py::class_<TensorMapSlot>(module, "TensorMapSlot",
                            "A tensor map over the tensor bound to `slot`, innermost dimension first; all zero bytes "
                            "where slot is None.")
      .def_property_readonly("slot", [](const TensorMapSlot& self) { return slot_name(self.slot); })
      .def_property_readonly("dtype", [](const TensorMapSlot& self) { return name_of(self.map.dtype); })
      .def_property_readonly("dims", [](const TensorMapSlot& self) { return self.map.dims; })
      .def_property_readonly("pitch", [](const TensorMapSlot& self) { return self.map.pitch; })
      .def_property_readonly("box", [](const TensorMapSlot& self) { return self.map.box; })
      .def_property_readonly("swizzle", [](const TensorMapSlot& self) { return static_cast<int>(self.map.swizzle); })
      .def("__repr__", [](const TensorMapSlot& self) {
        if (self.slot == nullptr) return py::str("TensorMapSlot(None)");
        return py::str("TensorMapSlot({!r}, {}, dims={}, pitch={}, box={}, swizzle={})")
            .format(self.slot, name_of(self.map.dtype), self.map.dims, self.map.pitch, self.map.box,
                    static_cast<int>(self.map.swizzle));
      });
  py::class_<LaunchPlan>(module, "LaunchPlan", "A kernel launch as data.")
      .def_readonly("module", &LaunchPlan::module)
      .def_readonly("kernel", &LaunchPlan::kernel)
      .def_readonly("grid", &LaunchPlan::grid)
      .def_readonly("block", &LaunchPlan::block)
      .def_readonly("cluster", &LaunchPlan::cluster)
      .def_readonly("shared_bytes", &LaunchPlan::shared_bytes)
      .def_readonly("overlaps", &LaunchPlan::overlaps)
      .def_property_readonly("arguments",
                             [](const LaunchPlan& self) {
                               py::list list;
                               for (int i = 0; i < self.argument_count; ++i)
                                 std::visit([&](const auto& argument) { list.append(argument_of(self, argument)); },
                                            self.arguments[i]);
                               return list;
                             })
      .def("__repr__", [](py::object self) {
        return py::str("LaunchPlan({}.{}, grid={}, block={}, cluster={}, shared_bytes={}, arguments={})")
            .format(self.attr("module"), self.attr("kernel"), self.attr("grid"), self.attr("block"),
                    self.attr("cluster"), self.attr("shared_bytes"), self.attr("arguments"));
      });
}

void bind_gemm(py::module_& module) {
  using namespace gemm;
  py::class_<TensorView>(module, "TensorView", "A tensor as the planners see it.")
      .def(py::init([](const std::string& dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                       int device, uint64_t address) {
             TensorView view;
             view.dtype = dtype_named(dtype), view.device = device, view.address = address;
             view.dim = static_cast<int>(sizes.size());
             for (int i = 0; i < 2 && i < view.dim; ++i) view.sizes[i] = sizes[i], view.strides[i] = strides.at(i);
             return view;
           }),
           py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("device") = 0, py::arg("address") = 0);
  py::class_<GemmProblem>(module, "GemmProblem", "out[M, N] = A[M, K] B[N, K]^T (+ C): the question.")
      .def(py::init([](const TensorView& a, const TensorView& a_scale, const TensorView& b, const TensorView& b_scale,
                       const std::pair<int64_t, int64_t>& b_block, const std::string& out_dtype,
                       const std::optional<TensorView>& c, int num_sms, const std::string& machine) {
             return make_problem({a, a_scale, b, b_scale, c, b_block.first, b_block.second, dtype_named(out_dtype)},
                                 num_sms, Machine::named(machine));
           }),
           py::arg("a"), py::arg("a_scale"), py::arg("b"), py::arg("b_scale"), py::arg("b_block"), py::arg("out_dtype"),
           py::arg("c"), py::arg("num_sms"), py::arg("machine") = "H100")
      .def_static(
          "grouped",
          [](const TensorView& a, const TensorView& a_scale, const TensorView& b, const TensorView& b_scale,
             const TensorView& ends, int64_t groups, bool masked, const std::string& out_dtype, int num_sms,
             const std::string& machine) {
            const char* op = masked ? "masked_grouped_gemm" : "grouped_gemm";
            return make_problem(GroupedOperands{op, masked ? "counts" : "offsets", a, a_scale, b, b_scale, ends, groups,
                                                masked, dtype_named(out_dtype)},
                                num_sms, Machine::named(machine));
          },
          py::arg("a"), py::arg("a_scale"), py::arg("b"), py::arg("b_scale"), py::arg("ends"), py::arg("groups"),
          py::arg("masked"), py::arg("out_dtype"), py::arg("num_sms"), py::arg("machine") = "H100",
          "Rows of A in groups, each by a B of its own; tensors of three dimensions flattened to two.")
      .def(
          "with_swiglu",
          [](const GemmProblem& self, const std::optional<TensorView>& weight, std::optional<double> limit, bool pow2,
             double eps, bool gate_up, const std::optional<TensorView>& counters) {
            return with_swiglu(self, {"gemm_swiglu_quantize", weight, counters, limit, pow2, eps, gate_up}, 0);
          },
          py::arg("weight"), py::arg("limit"), py::arg("pow2"), py::arg("eps"), py::arg("gate_up"),
          py::arg("counters") = py::none(),
          "The same with SwiGLU and quantisation behind the product of gate and up; on device 0.")
      .def_static(
          "wgrad",
          [](const TensorView& grad_t, const TensorView& grad_t_scale, const TensorView& input_t,
             const TensorView& input_t_scale, const TensorView& offsets, const TensorView& out, bool accumulate,
             int num_sms, const std::string& machine) {
            return make_problem(WgradOperands{grad_t, grad_t_scale, input_t, input_t_scale, offsets, out, accumulate},
                                num_sms, Machine::named(machine));
          },
          py::arg("grad_t"), py::arg("grad_t_scale"), py::arg("input_t"), py::arg("input_t_scale"), py::arg("offsets"),
          py::arg("out"), py::arg("accumulate"), py::arg("num_sms"), py::arg("machine") = "H100",
          "K in groups, each with an output of its own; out [G, N, K] flattened to two dimensions.")
      .def_readonly("m", &GemmProblem::m)
      .def_readonly("groups", &GemmProblem::groups)
      .def_readonly("group_rows", &GemmProblem::group_rows)
      .def_readonly("n", &GemmProblem::n)
      .def_readonly("k", &GemmProblem::k)
      .def_property_readonly("out_dtype", [](const GemmProblem& self) { return name_of(self.out); })
      .def_property_readonly("c_dtype", [](const GemmProblem& self) { return optional_dtype(self.c); })
      .def_readonly("num_sms", &GemmProblem::num_sms)
      .def("__repr__", &GemmProblem::str);
  py::class_<GemmConfig>(module, "GemmConfig", "One kernel instance and its walk over the tiles: the answer.")
      .def_property_readonly("tile_m", [](const GemmConfig& self) { return self.tile.m; })
      .def_property_readonly("tile_n", [](const GemmConfig& self) { return self.tile.n; })
      .def_property_readonly("tile_k", [](const GemmConfig&) { return kTileK; })
      .def_property_readonly("name", &GemmConfig::name)
      .def_readonly("cluster", &GemmConfig::cluster)
      .def_property_readonly("segments", [](const GemmConfig& self) { return self.segments.count; })
      .def_readonly("stages", &GemmConfig::stages)
      .def_readonly("grid", &GemmConfig::grid)
      .def_property_readonly("cycles", [](const GemmConfig& self) { return self.cost.total; })
      .def_property_readonly("cost",
                             [](const GemmConfig& self) {
                               const Cost& cost = self.cost;
                               return std::map<std::string, double>{
                                   {"tensor", cost.tensor},   {"consumer", cost.consumer}, {"from_l2", cost.from_l2},
                                   {"into_sm", cost.into_sm}, {"latency", cost.latency},   {"block", cost.block},
                                   {"fill", cost.fill},       {"epilogue", cost.epilogue}, {"waves", cost.waves},
                                   {"hbm", cost.hbm},         {"total", cost.total}};
                             })
      .def_property_readonly("tiles",
                             [](const GemmConfig& self) { return std::pair(self.order.tiles_m, self.order.tiles_n); })
      .def_property_readonly("band", [](const GemmConfig& self) { return self.order.band; })
      .def(
          "tile_at",
          [](const GemmConfig& self, int index) {
            const TileOrder::Tile tile = self.order.at(index);
            return std::pair(tile.m, tile.n);
          },
          "The (row, column) of the index-th tile of the walk, in tiles.")
      .def("__repr__", &GemmConfig::str);
  module.def(
      "gemm_candidates",
      [](const GemmProblem& problem) {
        std::vector<std::pair<GemmConfig, std::string>> all;
        for (const Candidate& candidate : candidates(problem)) all.emplace_back(candidate.config, candidate.rejected);
        return all;
      },
      "Every config with the reason for its rejection, empty if it may be chosen.");
  module.def(
      "gemm_segments",
      [](int n, int k, const std::pair<int, int>& b_block) {
        const Segments segments = Segments::of(n, k, b_block.first == 1 ? BScales::kRow : BScales::kBlock);
        std::vector<int> firsts;
        for (int i = 0; i <= segments.count; ++i) firsts.push_back(segments.first(i));
        return firsts;
      },
      py::arg("n"), py::arg("k"), py::arg("b_block"),
      "The k-blocks at which the segments of K begin, and at which the last one ends.");
  module.def("gemm_select", &select, "The config that the sm_90a kernel runs this problem with.");
  module.def("gemm_plan", &plan, py::arg("problem"), py::arg("config"), "The launch of this problem with this config.");
  module.def("gemm_planned", &planned, "The launch with the selected config, which the thread remembers.");
}

}  // namespace
}  // namespace fastfp8

PYBIND11_MODULE(_C, module) {
  using namespace fastfp8;
  module.attr("version") = FASTFP8_VERSION;
  bind_plan(module);
  bind_gemm(module);
  bind_comm(module);
  module.def("driver_version", &driver::version, "CUDA version of the driver as 1000 major + 10 minor, 0 without one.");
  module.def("driver_unusable_reason", &driver::unusable_reason, "'' if our cubins can run with this driver.");
  module.def(
      "devices",
      [] {
        py::list list;
        for (int i = 0; i < driver::device_count(); ++i) {
          const driver::DeviceInfo& info = driver::device(i);
          list.append(py::make_tuple(info.name, info.major, info.minor, info.num_sms));
        }
        return list;
      },
      "(name, compute capability major, minor, SMs) of each GPU.");
  module.def(
      "launch",
      [](const LaunchPlan& plan, const std::map<std::string, uint64_t>& addresses, uint64_t stream) {
        std::vector<driver::Binding> bindings;
        for (const auto& [slot, address] : addresses) bindings.push_back({slot.c_str(), address});
        driver::launch(plan, bindings.data(), static_cast<int>(bindings.size()), reinterpret_cast<void*>(stream));
      },
      py::arg("plan"), py::arg("addresses"), py::arg("stream") = 0,
      "Launch a plan with these device addresses bound to its slots, on a CUstream of the current context.");
  module.def("gemm_sm90_unusable_reason", &gemm_sm90_unusable_reason, "'' if the sm_90a GEMM runs on this device.");
  module.def("set_triton_unusable_reason", &set_triton_unusable_reason);
  module.def("set_kernel_directory", &driver::set_kernel_directory);
}
