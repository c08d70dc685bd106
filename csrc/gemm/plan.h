// From the question to the launch: problem -> candidates -> config -> plan. Pure host code, no GPU.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "../common/launch_plan.h"
#include "problem.h"

namespace fastfp8::gemm {

// What the model expects of a config, in clocks of an SM. For comparing configs of one problem: the constants behind it
// are others' (machine.h).
struct Cost {
  // Of one k-block in one CTA. They overlap: the largest counts.
  double tensor, consumer, from_l2, into_sm, latency;
  double block;           // that largest
  double fill, epilogue;  // of one tile
  double waves;           // tiles that the busiest CTA walks
  double hbm;             // all bytes once at HBM's rate
  double total;
};

// The answer: one kernel instance and how its grid walks the tiles.
struct GemmConfig {
  TileShape tile;
  Cluster kind;
  int cluster;  // CTAs of a cluster
  Segments segments;
  int stages;
  int grid;  // CTAs of the persistent grid
  TileOrder order;
  Cost cost;

  std::string name() const;  // "128x128 pair"
  std::string str() const;
};

struct Candidate {
  GemmConfig config;
  std::string_view rejected;  // why not; empty for one that may be chosen
};

// Every config, those that cannot or should not serve with the reason.
std::vector<Candidate> candidates(const GemmProblem& problem);

// The cheapest candidate by the model.
GemmConfig select(const GemmProblem& problem);

// M, N and K must not be 0: such a product has nothing to launch.
LaunchPlan plan(const GemmProblem& problem, const GemmConfig& config);

// The plan of the config that is selected. A thread remembers those of the problems that it asked last, since shapes
// recur from layer to layer and from step to step: selecting takes longer than all else before a launch. Until this
// thread's next call.
const LaunchPlan& planned(const GemmProblem& problem);

}  // namespace fastfp8::gemm
