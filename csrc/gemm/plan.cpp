#include "plan.h"

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>

namespace fastfp8::gemm {
namespace {

struct Instance {
  Grouping grouping;
  BScales b_scales;
  DType out;
  TileShape tile;
  Cluster kind;
  const char *module, *kernel;
};

// Every kernel that csrc/gemm/instantiations defines.
#define FASTFP8_INSTANCE(SCALES, OUT, STEM, M, N, KIND, SUFFIX) \
  {Grouping::kNone,                                             \
   BScales::SCALES,                                             \
   DType::OUT,                                                  \
   {M, N},                                                      \
   Cluster::KIND,                                               \
   "gemm_" STEM,                                                \
   "gemm_sm90_" STEM "_" #M "x" #N SUFFIX}
#define FASTFP8_INSTANCES(SCALES, OUT, STEM)                                                                       \
  FASTFP8_INSTANCE(SCALES, OUT, STEM, 64, 64, kNone, ""), FASTFP8_INSTANCE(SCALES, OUT, STEM, 64, 128, kNone, ""), \
      FASTFP8_INSTANCE(SCALES, OUT, STEM, 128, 64, kNone, ""),                                                     \
      FASTFP8_INSTANCE(SCALES, OUT, STEM, 128, 128, kNone, ""),                                                    \
      FASTFP8_INSTANCE(SCALES, OUT, STEM, 128, 128, kPair, "_pair")
#define FASTFP8_BLOCK_ONLY(OUT, STEM)                                                                               \
  FASTFP8_INSTANCE(kBlock, OUT, STEM, 16, 128, kNone, ""), FASTFP8_INSTANCE(kBlock, OUT, STEM, 32, 128, kNone, ""), \
      FASTFP8_INSTANCE(kBlock, OUT, STEM, 64, 64, kSplit, "_split"),                                                \
      FASTFP8_INSTANCE(kBlock, OUT, STEM, 128, 256, kNone, ""),                                                     \
      FASTFP8_INSTANCE(kBlock, OUT, STEM, 128, 256, kPair, "_pair")
#define FASTFP8_GROUPED(OUT, STEM, M, N, KIND, SUFFIX) \
  {Grouping::kRows,                                    \
   BScales::kBlock,                                    \
   DType::OUT,                                         \
   {M, N},                                             \
   Cluster::KIND,                                      \
   "gemm_" STEM,                                       \
   "gemm_sm90_" STEM "_" #M "x" #N SUFFIX}
#define FASTFP8_GROUPS(OUT, STEM)                                                                      \
  FASTFP8_GROUPED(OUT, STEM, 16, 128, kNone, ""), FASTFP8_GROUPED(OUT, STEM, 32, 128, kNone, ""),      \
      FASTFP8_GROUPED(OUT, STEM, 64, 128, kNone, ""), FASTFP8_GROUPED(OUT, STEM, 128, 128, kNone, ""), \
      FASTFP8_GROUPED(OUT, STEM, 128, 256, kNone, ""), FASTFP8_GROUPED(OUT, STEM, 128, 256, kPair, "_pair")
#define FASTFP8_SWIGLU(GROUPING, STEM, KIND, SUFFIX) \
  {Grouping::GROUPING,                               \
   BScales::kBlock,                                  \
   DType::kE4M3,                                     \
   {128, 256},                                       \
   Cluster::KIND,                                    \
   "gemm_" STEM,                                     \
   "gemm_sm90_" STEM "_128x256" SUFFIX}
#define FASTFP8_DEPTH(OUT, STEM, KIND, SUFFIX) \
  {Grouping::kDepth,                           \
   BScales::kRow,                              \
   DType::OUT,                                 \
   {128, 128},                                 \
   Cluster::KIND,                              \
   "gemm_" STEM,                               \
   "gemm_sm90_" STEM "_128x128" SUFFIX}
constexpr Instance kInstances[] = {
    FASTFP8_INSTANCES(kBlock, kBF16, "block_bf16"),
    FASTFP8_INSTANCES(kBlock, kF32, "block_f32"),
    FASTFP8_INSTANCES(kRow, kBF16, "row_bf16"),
    FASTFP8_INSTANCES(kRow, kF32, "row_f32"),
    FASTFP8_BLOCK_ONLY(kBF16, "block_bf16"),
    FASTFP8_BLOCK_ONLY(kF32, "block_f32"),
    FASTFP8_GROUPS(kBF16, "grouped_bf16"),
    FASTFP8_GROUPS(kF32, "grouped_f32"),
    FASTFP8_DEPTH(kBF16, "wgrad_bf16", kNone, ""),
    FASTFP8_DEPTH(kBF16, "wgrad_bf16", kPair, "_pair"),
    FASTFP8_DEPTH(kF32, "wgrad_f32", kNone, ""),
    FASTFP8_DEPTH(kF32, "wgrad_f32", kPair, "_pair"),
    FASTFP8_SWIGLU(kNone, "swiglu", kNone, ""),
    FASTFP8_SWIGLU(kNone, "swiglu", kPair, "_pair"),
    FASTFP8_SWIGLU(kRows, "grouped_swiglu", kNone, ""),
    FASTFP8_SWIGLU(kRows, "grouped_swiglu", kPair, "_pair"),
};
#undef FASTFP8_DEPTH
#undef FASTFP8_INSTANCES
#undef FASTFP8_INSTANCE
#undef FASTFP8_BLOCK_ONLY
#undef FASTFP8_GROUPS
#undef FASTFP8_GROUPED
#undef FASTFP8_SWIGLU

const Instance& find_instance(const GemmProblem& problem, const GemmConfig& config) {
  for (const Instance& instance : kInstances) {
    if (instance.grouping == problem.grouping && instance.b_scales == problem.b_scales && instance.out == problem.out &&
        instance.tile.m == config.tile.m && instance.tile.n == config.tile.n && instance.kind == config.kind)
      return instance;
  }
  throw std::logic_error("no GEMM kernel of " + config.str() + " for " + problem.str());
}

// FP8 codes [rows, k] in boxes of one 128-byte swizzle span.
TensorMapSlot codes_map(const char* slot, int rows, int k, int64_t pitch, int tile_rows) {
  return {slot,
          {DType::kE4M3,
           {static_cast<uint64_t>(k), static_cast<uint64_t>(rows)},
           static_cast<uint64_t>(pitch),
           {kTileK, static_cast<uint32_t>(tile_rows)},
           Swizzle::k128B}};
}

// Column-major scales: one k-block's scales of a tile's rows in a box.
TensorMapSlot scale_map(const char* slot, int rows, int k, int64_t pitch, int tile_rows) {
  return {slot,
          {DType::kF32,
           {static_cast<uint64_t>(rows), static_cast<uint64_t>(ceil_div(k, kTileK))},
           static_cast<uint64_t>(pitch) * 4,
           {static_cast<uint32_t>(tile_rows), 1},
           Swizzle::kNone}};
}

// Output, 64 rows (one consumer's) by one panel, a row of which is one swizzle span.
TensorMapSlot panel_map(const char* slot, DType dtype, int m, int n, int panel_columns) {
  const int size = size_of(dtype);
  return {slot,
          {dtype,
           {static_cast<uint64_t>(n), static_cast<uint64_t>(m)},
           static_cast<uint64_t>(n) * size,
           {static_cast<uint32_t>(panel_columns), kWgmmaM},
           panel_columns * size == 128 ? Swizzle::k128B : Swizzle::k64B}};
}
TensorMapSlot out_map(int m, int n, TileShape tile) {
  return panel_map("out", DType::kBF16, m, n, out_panel_columns(tile.pass_columns()));
}

// All entries begin with these (kernels/gemm_sm90.cuh).
LaunchPlan begin_plan(const GemmProblem& problem, const GemmConfig& config) {
  if (problem.m == 0 || problem.n == 0 || problem.k == 0)
    throw std::logic_error("nothing to launch for " + problem.str());
  const Instance& instance = find_instance(problem, config);
  const int b_rows = b_box_rows(config.tile, config.kind == Cluster::kPair ? 2 : 1);
  LaunchPlan plan{};
  plan.module = instance.module, plan.kernel = instance.kernel;
  plan.grid = {config.grid, 1, 1}, plan.block = {kThreads, 1, 1}, plan.cluster = {config.cluster, 1, 1};
  plan.shared_bytes = SharedPlan::make(config.tile, problem.b_scales, problem.out, config.kind, problem.grouping).bytes;
  plan.overlaps = true;
  plan.add(codes_map("a", problem.m, problem.k, problem.a_pitch, config.tile.m));
  plan.add(codes_map("b", problem.n * problem.row_groups(), problem.k, problem.b_pitch, b_rows));
  plan.add(scale_map("a_scale", problem.m, problem.k, problem.a_scale_pitch,
                     SharedPlan::a_scales(config.tile, problem.grouping)));
  return plan;
}

LaunchPlan plan_grouped(const GemmProblem& problem, const GemmConfig& config) {
  const bool by_tma = stores_by_tma(config.tile, problem.out, config.kind);
  LaunchPlan plan = begin_plan(problem, config);
  plan.add(by_tma ? out_map(problem.m, problem.n, config.tile) : TensorMapSlot{});
  plan.add(TensorSlot{"b_scale"});
  plan.add(TensorSlot{"out"});  // by the map where a tile is full, by address where rows behind it are another group's
  plan.add(TensorSlot{"ends"});
  plan.add(TensorSlot{"error"});
  plan.add(int32_t{problem.groups});
  plan.add(int32_t{problem.group_rows});
  plan.add(int32_t{problem.m});
  plan.add(int32_t{problem.n});
  plan.add(int32_t{problem.k});
  plan.add(int32_t{config.order.tiles_n});
  plan.add(int32_t{config.order.band});
  return plan;
}

LaunchPlan plan_swiglu(const GemmProblem& problem, const GemmConfig& config) {
  const SwiGlu& swiglu = *problem.swiglu;
  LaunchPlan plan = begin_plan(problem, config);
  plan.add(panel_map("out", DType::kE4M3, problem.m, problem.n / 2, 128));
  plan.add(swiglu.gate_up ? panel_map("gate_up", DType::kBF16, problem.m, problem.n, 64) : TensorMapSlot{});
  plan.add(TensorSlot{"b_scale"});
  // By the map where a tile is full, by address where rows behind it are another group's.
  plan.add(TensorSlot{problem.groups ? "out" : nullptr});
  plan.add(TensorSlot{swiglu.gate_up ? "gate_up" : nullptr});
  plan.add(TensorSlot{"out_scale"});
  plan.add(TensorSlot{swiglu.weighted ? "weight" : nullptr});
  plan.add(TensorSlot{swiglu.counted ? "counters" : nullptr});
  plan.add(TensorSlot{problem.groups ? "ends" : nullptr});
  plan.add(TensorSlot{problem.groups ? "error" : nullptr});
  plan.add(int32_t{problem.groups});
  plan.add(int32_t{problem.m});
  plan.add(int32_t{problem.n});
  plan.add(int32_t{problem.k});
  plan.add(int32_t{config.order.tiles_m});
  plan.add(int32_t{config.order.tiles_n});
  plan.add(int32_t{config.order.band});
  plan.add(int32_t{swiglu.out_scale_pitch});
  plan.add(int32_t{swiglu.weight_stride});
  plan.add(swiglu.limit);
  plan.add(swiglu.floor);
  plan.add(int32_t{swiglu.pow2});
  return plan;
}

LaunchPlan plan_depth(const GemmProblem& problem, const GemmConfig& config) {
  LaunchPlan plan = begin_plan(problem, config);
  plan.add(scale_map("b_scale", problem.n, problem.k, problem.b_scale_pitch, config.tile.n));
  plan.add(problem.out == DType::kBF16 ? out_map(problem.groups * problem.m, problem.n, config.tile) : TensorMapSlot{});
  plan.add(TensorSlot{"out"});  // as in plan_grouped, and to accumulate
  plan.add(TensorSlot{"ends"});
  plan.add(TensorSlot{"error"});
  plan.add(int32_t{problem.c.has_value()});
  plan.add(int32_t{problem.groups});
  plan.add(int32_t{problem.m});
  plan.add(int32_t{problem.n});
  plan.add(int32_t{problem.k});
  plan.add(int32_t{config.order.tiles_m});
  plan.add(int32_t{config.order.tiles_n});
  plan.add(int32_t{config.order.band});
  return plan;
}

}  // namespace

LaunchPlan plan(const GemmProblem& problem, const GemmConfig& config) {
  if (problem.swiglu) return plan_swiglu(problem, config);
  if (problem.grouping == Grouping::kRows) return plan_grouped(problem, config);
  if (problem.grouping == Grouping::kDepth) return plan_depth(problem, config);
  const bool by_row = problem.b_scales == BScales::kRow;
  const bool by_tma = stores_by_tma(config.tile, problem.out, config.kind);
  LaunchPlan plan = begin_plan(problem, config);
  plan.add(by_row ? scale_map("b_scale", problem.n, problem.k, problem.b_scale_pitch, config.tile.n) : TensorMapSlot{});
  plan.add(by_tma ? out_map(problem.m, problem.n, config.tile) : TensorMapSlot{});
  plan.add(TensorSlot{by_row ? nullptr : "b_scale"});
  plan.add(TensorSlot{by_tma ? nullptr : "out"});
  plan.add(TensorSlot{problem.c ? "c" : nullptr});
  plan.add(int32_t{problem.c == DType::kBF16});
  plan.add(int32_t{problem.c_pitch});
  plan.add(int32_t{problem.m});
  plan.add(int32_t{problem.n});
  plan.add(int32_t{problem.k});
  plan.add(int32_t{config.order.tiles_m});
  plan.add(int32_t{config.order.tiles_n});
  plan.add(int32_t{config.order.band});
  return plan;
}

const LaunchPlan& planned(const GemmProblem& problem) {
  struct Entry {
    GemmProblem problem;
    LaunchPlan plan;
  };
  constexpr int kBits = 8;
  thread_local std::array<std::unique_ptr<const Entry>, 1 << kBits> entries;
  // Not all of the problem: those that differ elsewhere only are few, and take each other's place.
  uint64_t hash = 0;
  for (int value : {problem.m, problem.n, problem.k, problem.groups, static_cast<int>(problem.out)})
    hash = (hash + static_cast<uint32_t>(value)) * 0x9E3779B97F4A7C15;
  std::unique_ptr<const Entry>& entry = entries[hash >> (64 - kBits)];
  if (entry == nullptr || entry->problem != problem)
    entry = std::make_unique<const Entry>(problem, plan(problem, select(problem)));
  return entry->plan;
}

}  // namespace fastfp8::gemm
