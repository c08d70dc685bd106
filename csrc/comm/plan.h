// From a geometry and a call to launches. Pure host code, no GPU.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "../common/launch_plan.h"
#include "layout.h"

namespace fastfp8::comm {

// Warps of a CTA, at most; and of a channel's two CTAs together at least as many as dispatch has roles.
constexpr int kMostWarps = 16, kFewestWarps = 2;

// Raises std::runtime_error that names the field that cannot be.
void check(const Geometry& geometry);

// Ranks of a launch: one where each GPU is a rank, several where one GPU stands for all.
struct LaunchShape {
  int ranks, warps;  // warps of a CTA
};

// What lies between nodes: which module has the kernels, and what they take besides.
struct RailPlan {
  std::string name = "loopback";     // where all windows are memory; or "nccl"
  std::vector<std::byte> constants;  // nccl: a structure that the kernels take besides (nccl.h)
  bool traced = false;               // they write down what their warps do, to the slot "trace" (TraceLayout)
};

// Raises std::runtime_error that names the field that NCCL's rails cannot serve.
void check_for_nccl(const Geometry& geometry);

// The slots are those of Tensors (kernels/context.cuh) by name.
LaunchPlan plan_exchange(const Geometry& geometry, const CallOptions& call, LaunchShape shape,
                         const RailPlan& rail = {});
LaunchPlan plan_dispatch(const Geometry& geometry, const CallOptions& call, LaunchShape shape, Payload payload,
                         const RailPlan& rail = {});
LaunchPlan plan_combine(const Geometry& geometry, const CallOptions& call, LaunchShape shape,
                        const RailPlan& rail = {});

std::string name_of(Trouble trouble);
std::string name_of(Role role);

}  // namespace fastfp8::comm
