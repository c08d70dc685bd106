// From the question to the launch: problem -> candidates -> config -> plan. Pure host code, no GPU.
#pragma once
#include <string>
#include <vector>

#include "../common/launch_plan.h"
#include "problem.h"

namespace fastfp8::gemm {

// The answer: one kernel instance and how its grid walks the tiles.
struct GemmConfig {
  int tile_m, tile_n, tile_k;
  int stages;
  int cluster;  // CTAs that take tiles one below the other and share B
  int grid;     // CTAs of the persistent grid
  TileOrder order;
  double cycles;  // the model's estimate, for comparing configs of one problem only

  std::string str() const;
};

struct Candidate {
  GemmConfig config;
  std::string rejected;  // why not; empty for one that may be chosen
};

// Every config, those that cannot or should not serve with the reason.
std::vector<Candidate> candidates(const GemmProblem& problem);

// The cheapest candidate by the model.
GemmConfig select(const GemmProblem& problem);

// M, N and K must not be 0: such a product has nothing to launch.
LaunchPlan plan(const GemmProblem& problem, const GemmConfig& config);

}  // namespace fastfp8::gemm
