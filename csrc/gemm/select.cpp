#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "plan.h"

namespace fastfp8::gemm {
namespace {

// Clocks of what a consumer does for a k-block beside its wgmma and its FFMA: barriers, scales, the wgmma's own
// latency.
constexpr double kConsumerOverhead = 90;
constexpr double kEpilogueFixed = 400;  // of one pass: barriers, and that the staging area has been read
constexpr double kStagedBytes = 128;    // of BF16 output that one SM writes to shared memory per clock
constexpr double kStoredBytes = 64;     // of FP32 output that one SM's warps write to global memory per clock
constexpr double kExchange = 1500;      // of a split: two meetings of the cluster, and reads of the peers
constexpr double kFp32PerClock = 128;   // FFMA or FMUL, one SM
constexpr double kNotHidden = 0.1;      // of the shorter of computing and HBM, the share that the longer does not cover
constexpr double kOperandBytes = 128;   // of shared memory that wgmma reads per clock
constexpr double kSwiGluWork = 48;      // instructions an element of SwiGLU's result, counted in the SASS

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

// Of output, an element of the product.
double out_bytes(const GemmProblem& problem) {
  if (problem.swiglu) return 0.5 * size_of(problem.out) + (problem.swiglu->gate_up ? size_of(DType::kBF16) : 0);
  return size_of(problem.out);
}

// The bytes that must come from HBM or go there.
double traffic(const GemmProblem& problem) {
  const double m = problem.m, n = problem.n, k = problem.k;
  const double b = n * k + (problem.b_scales == BScales::kRow ? n : n / 128) * k / 128 * 4;
  return m * k + m * k / 128 * 4 + problem.row_groups() * b +
         problem.depth_groups() * m * n * (out_bytes(problem) + (problem.c ? size_of(*problem.c) : 0));
}

// Of one group, as if all had as many; how many they have is in device memory.
int rows_of_group(const GemmProblem& problem) { return static_cast<int>(ceil_div(problem.m, problem.row_groups())); }
int64_t blocks_of_group(const GemmProblem& problem, const Segments& segments) {
  return ceil_div(segments.blocks, problem.depth_groups());
}

// Of the output. What a cluster takes at once is one.
int64_t tiles_of(const GemmProblem& problem, const GemmConfig& config) {
  return static_cast<int64_t>(problem.depth_groups()) * config.order.tiles_m * config.order.tiles_n;
}

Cost cost_of(const GemmProblem& problem, const GemmConfig& config) {
  const Machine& machine = *problem.machine;
  const int columns = config.tile.pass_columns(), passes = config.tile.passes();
  const double rows_a = std::min(rows_of_group(problem), config.tile.m);  // rows past M are filled, not read
  const bool split = config.kind == Cluster::kSplit, pair = config.kind == Cluster::kPair;
  Cost cost{};
  // A pass's wgmma takes the tensor core's time or that of reading A and B, of 64 and `columns` rows.
  const double wgmma =
      std::max(2.0 * kWgmmaM * columns * 32 / machine.tensor_flops, (kWgmmaM + columns) * 32 / kOperandBytes);
  const double own = kTileK / 32 * wgmma;
  const bool a_scale_a_column = problem.b_scales == BScales::kRow || config.tile.swapped();
  const double products = a_scale_a_column ? 2.0 : 1.0;  // FMUL and FFMA, or FFMA
  const double promotion = products * kWgmmaM * columns / kFp32PerClock;
  cost.tensor = kConsumers * passes * own;
  cost.consumer = passes * (own + promotion + kConsumerOverhead);
  cost.from_l2 = (rows_a + config.tile.n / (pair ? 2.0 : 1.0)) * kTileK * config.grid / machine.l2_bytes;
  cost.into_sm = (rows_a + config.tile.n) * kTileK / machine.sm_bytes;
  cost.latency = machine.latency / config.stages;
  cost.block = std::max({cost.tensor, cost.consumer, cost.from_l2, cost.into_sm, cost.latency});
  cost.fill = machine.latency + cost.block;
  const double staged = stores_by_tma(config.tile, problem.out, config.kind) ? kStagedBytes : kStoredBytes;
  const int stagings = !problem.swiglu ? passes : problem.swiglu->gate_up ? 5 : 1;
  cost.epilogue = split ? kExchange : stagings * kEpilogueFixed + rows_a * config.tile.n * out_bytes(problem) / staged;
  if (problem.swiglu) cost.epilogue += kSwiGluWork * rows_a * (config.tile.n / 2) / kFp32PerClock;
  const int clusters = std::max(problem.num_sms / config.cluster, 1);
  cost.waves = static_cast<double>(ceil_div(tiles_of(problem, config), clusters));
  cost.hbm = traffic(problem) / machine.hbm_bytes;
  const double blocks =
      split ? ceil_div(config.segments.blocks, config.segments.count) : blocks_of_group(problem, config.segments);
  // The producer fills the next tile's stages under the epilogue, so the pipeline fills once. A consumer's epilogue
  // runs under the other one's wgmma unless the consumers themselves are what takes longest; the last one's shows.
  const double shared = std::max({cost.tensor, cost.from_l2, cost.into_sm, cost.latency});
  const double tile = std::max(blocks * shared, blocks * cost.consumer + cost.epilogue);
  const double walk = (cost.waves - 1) * tile + blocks * cost.block + cost.epilogue;
  cost.total = cost.fill + std::max(walk, cost.hbm) + kNotHidden * std::min(walk, cost.hbm);
  return cost;
}

GemmConfig make_config(const GemmProblem& problem, TileShape tile, Cluster kind) {
  GemmConfig config{};
  config.tile = tile, config.kind = kind;
  config.segments = Segments::of(problem.n, problem.k, problem.b_scales, problem.out);
  config.cluster = kind == Cluster::kNone ? 1 : kind == Cluster::kPair ? 2 : config.segments.count;
  config.stages = SharedPlan::make(tile, problem.b_scales, problem.out, kind, problem.grouping).stages;
  const int rows = tile.m * (kind == Cluster::kPair ? 2 : 1);
  const int tiles_m = static_cast<int>(ceil_div(rows_of_group(problem), rows) * problem.row_groups()),
            tiles_n = static_cast<int>(ceil_div(problem.n, tile.n)), clusters = problem.num_sms / config.cluster;
  config.order = {tiles_m, tiles_n, band_of(tiles_m, rows, tile.n, std::max(clusters, 1))};
  // Groups of rows may have more tiles than these: the busiest of them, or many with a few rows in their last.
  const int64_t most = problem.grouping == Grouping::kRows ? clusters : tiles_of(problem, config);
  config.grid = static_cast<int>(std::min<int64_t>(most, clusters)) * config.cluster;
  config.cost = cost_of(problem, config);
  return config;
}

std::string_view reason_against(const GemmProblem& problem, const GemmConfig& config) {
  constexpr int kNarrowest = 64;
  if (config.kind == Cluster::kSplit && config.segments.count == 1) return "N and K make one segment only";
  if (config.cluster > problem.num_sms) return "a cluster needs more SMs than there are";
  if (problem.grouping == Grouping::kNone && config.tile.n > kNarrowest &&
      config.tile.n >= 2 * round_up(problem.n, kNarrowest))
    return "at least half of each tile lies past N";
  if (config.tile.swapped() && rows_of_group(problem) > config.tile.m)
    return "more rows than a tile of swapped operands";
  // Groups along K and SwiGLU have no lower tile to take instead.
  const bool lower = problem.grouping != Grouping::kDepth && !problem.swiglu;
  if (lower && config.tile.m > kWgmmaM && rows_of_group(problem) <= kWgmmaM) return "half of each tile lies past M";
  if (config.kind == Cluster::kPair && rows_of_group(problem) <= config.tile.m) return "half of each pair lies past M";
  if (config.tile.passes() > 1 && config.segments.count > 1) return "no registers for the sums of two segments of K";
  return "";
}

}  // namespace

std::vector<Candidate> candidates(const GemmProblem& problem) {
  constexpr TileShape kShapes[] = {{64, 64}, {64, 128}, {128, 64}, {128, 128}};
  std::vector<Candidate> all;
  const auto add = [&](TileShape tile, Cluster kind) {
    const GemmConfig config = make_config(problem, tile, kind);
    all.push_back({config, reason_against(problem, config)});
  };
  if (problem.swiglu) {
    for (Cluster kind : {Cluster::kNone, Cluster::kPair}) add({128, 256}, kind);
    return all;
  }
  if (problem.grouping == Grouping::kDepth) {
    for (Cluster kind : {Cluster::kNone, Cluster::kPair}) add({128, 128}, kind);
    return all;
  }
  if (problem.grouping == Grouping::kRows) {
    for (TileShape tile :
         {TileShape{16, 128}, TileShape{32, 128}, TileShape{64, 128}, TileShape{128, 128}, TileShape{128, 256}})
      add(tile, Cluster::kNone);
    add({128, 256}, Cluster::kPair);
    return all;
  }
  for (TileShape tile : kShapes) add(tile, Cluster::kNone);
  add({128, 128}, Cluster::kPair);
  if (problem.b_scales == BScales::kRow) return all;
  add({64, 64}, Cluster::kSplit);
  add({16, 128}, Cluster::kNone);
  add({32, 128}, Cluster::kNone);
  add({128, 256}, Cluster::kNone);
  add({128, 256}, Cluster::kPair);
  return all;
}

GemmConfig select(const GemmProblem& problem) {
  const GemmConfig* best = nullptr;
  const auto all = candidates(problem);
  for (const Candidate& candidate : all) {
    // A tie goes to the later one, which has fewer bytes go through L2.
    if (candidate.rejected.empty() && (best == nullptr || candidate.config.cost.total <= best->cost.total))
      best = &candidate.config;
  }
  if (best == nullptr) throw std::logic_error("no GEMM config for " + problem.str());
  return *best;
}

std::string GemmConfig::name() const {
  const std::string size = std::to_string(tile.m) + "x" + std::to_string(tile.n);
  return kind == Cluster::kNone ? size : size + (kind == Cluster::kPair ? " pair" : " split");
}

std::string GemmConfig::str() const {
  std::ostringstream text;
  text << "GemmConfig(" << name() << ", stages=" << stages << ", cluster=" << cluster << ", segments=" << segments.count
       << ", grid=" << grid << ", tiles=" << order.tiles_m << "x" << order.tiles_n << ", band=" << order.band
       << ", cycles=" << cost.total << ")";
  return text.str();
}

}  // namespace fastfp8::gemm
