#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "plan.h"

namespace fastfp8::gemm {
namespace {

// Clocks per k-block of one CTA on an SM of its own (reference numbers of H100 SXM, 132 SMs).
constexpr double kTensorFlopsPerClock = 8192;  // dense FP8, one SM
constexpr double kL2BytesPerClock = 4500;      // whole chip, measured by others at 4200 to 4800
constexpr double kSmBytesPerClock = 64;        // what one SM can take from L2
constexpr double kStageLatency = 64;           // barrier round trip and promotion not hidden by the other consumer
constexpr double kTileOverhead = 1200;         // pipeline fill and epilogue

// How many tile rows one band of the walk has: the tiles in flight should cover a region close to a square in bytes.
int band_of(int tiles_m, int tile_n, int num_sms) {
  int best = 1;
  double least = 1e30;
  for (int band : {1, 2, 4, 8, 16}) {
    const double rows = std::min(band, tiles_m), columns = static_cast<double>(num_sms) / rows;
    const double bytes = rows * kTileM + columns * tile_n;
    if (bytes < least) least = bytes, best = band;
  }
  return best;
}

GemmConfig make_config(const GemmProblem& problem, int tile_n) {
  GemmConfig config{};
  config.tile_m = kTileM, config.tile_n = tile_n, config.tile_k = kTileK;
  config.stages = SharedPlan::make(tile_n, problem.b_scales, problem.out).stages;
  const int tiles_m = static_cast<int>(ceil_div(problem.m, kTileM)),
            tiles_n = static_cast<int>(ceil_div(problem.n, tile_n));
  config.order = {tiles_m, tiles_n, band_of(tiles_m, tile_n, problem.num_sms)};
  const int64_t tiles = static_cast<int64_t>(tiles_m) * tiles_n;
  config.grid = static_cast<int>(std::min<int64_t>(tiles, problem.num_sms));
  const double waves = static_cast<double>(ceil_div(tiles, problem.num_sms));
  const double tensor = 2.0 * kTileM * tile_n * kTileK / kTensorFlopsPerClock;
  const double rows_read = std::min(problem.m, kTileM) + tile_n;  // rows past M are filled, not read
  const double load = rows_read * kTileK / std::min(kL2BytesPerClock / config.grid, kSmBytesPerClock);
  config.cycles = waves * (ceil_div(problem.k, kTileK) * (std::max(tensor, load) + kStageLatency) + kTileOverhead);
  return config;
}

}  // namespace

std::vector<Candidate> candidates(const GemmProblem& problem) {
  std::vector<Candidate> all;
  for (int tile_n : kTileNs) {
    Candidate candidate{make_config(problem, tile_n), ""};
    if (tile_n > kTileNs[0] && tile_n >= 2 * round_up(problem.n, kTileNs[0]))
      candidate.rejected = "at least half of each tile lies past N";
    all.push_back(candidate);
  }
  return all;
}

GemmConfig select(const GemmProblem& problem) {
  const GemmConfig* best = nullptr;
  const auto all = candidates(problem);
  for (const Candidate& candidate : all) {
    // A tie goes to the wider tile: fewer bytes through L2.
    if (candidate.rejected.empty() && (best == nullptr || candidate.config.cycles <= best->cycles))
      best = &candidate.config;
  }
  if (best == nullptr) throw std::logic_error("no GEMM config for " + problem.str());
  return *best;
}

std::string GemmConfig::str() const {
  std::ostringstream text;
  text << "GemmConfig(tile=" << tile_m << "x" << tile_n << "x" << tile_k << ", stages=" << stages << ", grid=" << grid
       << ", tiles=" << order.tiles_m << "x" << order.tiles_n << ", band=" << order.band << ", cycles=" << cycles
       << ")";
  return text.str();
}

}  // namespace fastfp8::gemm
