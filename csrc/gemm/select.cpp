#include <algorithm>
#include <iterator>
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
int band_of(int tiles_m, int tile_m, int tile_n, int clusters) {
  int best = 1;
  double least = 1e30;
  for (int band : {1, 2, 4, 8, 16}) {
    const double rows = std::min(band, tiles_m), columns = clusters / rows;
    const double bytes = rows * tile_m + columns * tile_n;
    if (bytes < least) least = bytes, best = band;
  }
  return best;
}

GemmConfig make_config(const GemmProblem& problem, int tile_n, int cluster) {
  GemmConfig config{};
  config.tile_m = kTileM, config.tile_n = tile_n, config.tile_k = kTileK, config.cluster = cluster;
  config.stages = SharedPlan::make(tile_n, problem.b_scales, problem.out).stages;
  const int tiles_m = static_cast<int>(ceil_div(problem.m, kTileM * cluster)),
            tiles_n = static_cast<int>(ceil_div(problem.n, tile_n)), clusters = problem.num_sms / cluster;
  config.order = {tiles_m, tiles_n, band_of(tiles_m, kTileM * cluster, tile_n, clusters)};
  const int64_t tiles = static_cast<int64_t>(tiles_m) * tiles_n;
  config.grid = static_cast<int>(std::min<int64_t>(tiles, clusters)) * cluster;
  const double waves = static_cast<double>(ceil_div(tiles, std::max(clusters, 1)));
  const double tensor = 2.0 * kTileM * tile_n * kTileK / kTensorFlopsPerClock;
  const double rows_a = std::min(problem.m, kTileM);  // rows past M are filled, not read
  const double from_l2 = (rows_a + tile_n / cluster) * kTileK * config.grid / kL2BytesPerClock;
  const double into_sm = (rows_a + tile_n) * kTileK / kSmBytesPerClock;
  const double load = std::max(from_l2, into_sm);
  config.cycles = waves * (ceil_div(problem.k, kTileK) * (std::max(tensor, load) + kStageLatency) + kTileOverhead);
  return config;
}

}  // namespace

std::vector<Candidate> candidates(const GemmProblem& problem) {
  constexpr int kWidest = std::end(kTileNs)[-1];
  std::vector<Candidate> all;
  for (int tile_n : kTileNs) {
    for (int cluster = 1; cluster <= (tile_n == kWidest ? kMaxCluster : 1); ++cluster) {
      Candidate candidate{make_config(problem, tile_n, cluster), ""};
      if (tile_n > kTileNs[0] && tile_n >= 2 * round_up(problem.n, kTileNs[0]))
        candidate.rejected = "at least half of each tile lies past N";
      else if (cluster > 1 && problem.m <= kTileM)
        candidate.rejected = "half of each cluster lies past M";
      else if (cluster > problem.num_sms)
        candidate.rejected = "a cluster needs more SMs than there are";
      all.push_back(candidate);
    }
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
  text << "GemmConfig(tile=" << tile_m << "x" << tile_n << "x" << tile_k << ", stages=" << stages
       << ", cluster=" << cluster << ", grid=" << grid << ", tiles=" << order.tiles_m << "x" << order.tiles_n
       << ", band=" << order.band << ", cycles=" << cycles << ")";
  return text.str();
}

}  // namespace fastfp8::gemm
