// What one GEMM kernel instance is: its tile, its shared-memory plan, its barriers. Shared by host and device.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace fastfp8::gemm {

constexpr int kTileM = 128;  // rows of A in a tile: 64 for each consumer warpgroup
constexpr int kTileK = 128;  // one scale block, one promotion: four wgmma of k = 32
constexpr int kTileNs[] = {32, 64, 128};
constexpr int kMaxCluster = 2;  // CTAs that share loads of B; there are such kernels for the widest tile only

constexpr int kConsumers = 2;                     // warpgroups that run wgmma and promote
constexpr int kThreads = 128 * (1 + kConsumers);  // the first warpgroup is the producer
constexpr int kProducerRegisters = 40;            // 40 * 128 + 232 * 256 = 64512 = the 168 * 384 of the launch
constexpr int kConsumerRegisters = 232;
constexpr int kMaxShared = 232448;  // 227 KB: the most one CTA of sm_90 may have
constexpr int kMaxStages = 8;

// How the scales of B are blocked: by 128 rows and 128 columns of K (weights), or by row (operands of Wgrad).
enum class BScales : uint8_t { kBlock, kRow };

// Columns of BF16 output in one TMA store: a row of the box is one swizzle span of 64 or 128 bytes.
constexpr int out_panel_columns(int tile_n) { return tile_n < 64 ? tile_n : 64; }

// Byte offsets in dynamic shared memory, whose base is 1024-aligned as 128-byte swizzle wants. A stage s of an array
// lies s * (its bytes per stage) further on. full[s]: the producer's arrival plus the bytes of the stage; empty[s]: one
// arrival of each consumer warp of the cluster.
struct SharedPlan {
  int stages;
  int a, b, out, a_scale, b_scale, full, empty;
  int bytes;

  static constexpr int kAStage = kTileM * kTileK;
  static constexpr int kAScaleStage = kTileM * 4;
  static constexpr int b_stage(int tile_n) { return tile_n * kTileK; }
  static constexpr int b_scale_stage(int tile_n, BScales scales) { return scales == BScales::kRow ? tile_n * 4 : 0; }
  // Bytes that one stage's TMA loads complete on full[s].
  static constexpr int stage_bytes(int tile_n, BScales scales) {
    return kAStage + b_stage(tile_n) + kAScaleStage + b_scale_stage(tile_n, scales);
  }

  // As many stages as fit. FP32 output goes from registers to global memory and needs no staging: see the epilogue.
  static constexpr SharedPlan make(int tile_n, BScales scales, DType out) {
    const int out_bytes = out == DType::kBF16 ? kTileM * tile_n * 2 : 0;
    const int per_stage = stage_bytes(tile_n, scales) + 2 * 8;
    const int fit = (kMaxShared - out_bytes) / per_stage;
    const int stages = fit < kMaxStages ? fit : kMaxStages;
    SharedPlan plan{};
    plan.stages = stages;
    plan.a = 0;
    plan.b = plan.a + stages * kAStage;
    plan.out = plan.b + stages * b_stage(tile_n);
    plan.a_scale = plan.out + out_bytes;
    plan.b_scale = plan.a_scale + stages * kAScaleStage;
    plan.full = plan.b_scale + stages * b_scale_stage(tile_n, scales);
    plan.empty = plan.full + stages * 8;
    plan.bytes = plan.empty + stages * 8;
    return plan;
  }
};

// The order in which a persistent grid walks the tiles: bands of `band` tile rows, column by column within a band, so
// that the tiles in flight share rows of A and of B in L2. The tiles that a cluster takes at once, one below the other,
// count as one here.
struct TileOrder {
  int tiles_m, tiles_n, band;

  struct Tile {
    int m, n;
  };

  constexpr Tile at(int index) const {
    const int per_band = band * tiles_n;
    const int first = index / per_band * band;
    const int rows = tiles_m - first < band ? tiles_m - first : band;
    const int within = index % per_band;
    return {first + within % rows, within / rows};
  }
};

}  // namespace fastfp8::gemm
