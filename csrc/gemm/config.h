// What one GEMM kernel instance is: its tile, its shared-memory plan, its barriers. Shared by host and device.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace fastfp8::gemm {

constexpr int kTileK = 128;   // one scale block, one promotion: four wgmma of k = 32
constexpr int kWgmmaM = 64;   // rows of one consumer's wgmma
constexpr int kMaxSplit = 8;  // CTAs of a cluster that share a tile's K: the largest portable cluster

constexpr int kConsumers = 2;                     // warpgroups that run wgmma and promote
constexpr int kThreads = 128 * (1 + kConsumers);  // the first warpgroup is the producer
constexpr int kProducerRegisters = 40;            // 40 * 128 + 232 * 256 = 64512 = the 168 * 384 of the launch
constexpr int kConsumerRegisters = 232;
constexpr int kMaxShared = 232448;  // 227 KB: the most one CTA of sm_90 may have
constexpr int kMaxStages = 8;

// How the scales of B are blocked: by 128 rows and 128 columns of K (weights), or by row (operands of Wgrad).
enum class BScales : uint8_t { kBlock, kRow };

// One kernel instance. A tile of 128 rows gives each consumer 64 rows and all columns; one of 64 rows, for small M,
// gives both all rows and half of the columns each, so that there too one promotes under the other's wgmma.
//
// A tile of 16 or 32 rows swaps A and B: wgmma's 64 rows are rows of B, of which each consumer has 64, and its columns
// are the tile's few rows of A. So no multiplication is spent on rows that are not there, which pays where tensor cores
// and not loads are what binds. It takes the same sums in the same order: no bit changes.
//
// A consumer takes its columns in passes of at most 128, one after the other through the same 64 registers of partial
// sums: with 256 columns, 128 registers of sums, 64 of partial sums and the rest fit into kConsumerRegisters.
struct TileShape {
  int m, n;

  constexpr bool swapped() const { return m < kWgmmaM; }
  // The columns of wgmma that one consumer has: of the output, or where the operands are swapped its rows.
  constexpr int consumer_columns() const { return swapped() ? m : m == kWgmmaM ? n / kConsumers : n; }
  constexpr int pass_columns() const { return consumer_columns() < kMaxPass ? consumer_columns() : kMaxPass; }
  constexpr int passes() const { return consumer_columns() / pass_columns(); }
  static constexpr int kMaxPass = 128;  // as many columns as one row of B's block scales serves
  constexpr int first_row(int consumer) const { return m <= kWgmmaM ? 0 : consumer * kWgmmaM; }
  constexpr int first_column(int consumer) const { return m <= kWgmmaM ? consumer * (n / kConsumers) : 0; }
};

// How CTAs of a cluster work together. kPair: two take tiles one below the other and load each half of the rows of B
// that both need. kSplit: all take one tile, and each a segment of K.
enum class Cluster : uint8_t { kNone, kPair, kSplit };

// kNone: a dense product. kRows: each group of rows of A has a B of its own. kDepth: each group of k-blocks has an
// output of its own (Wgrad).
enum class Grouping : uint8_t { kNone, kRows, kDepth };

constexpr int kMaxGroups = 1024;
// Bits of the error word (fastfp8/error_word.py).
constexpr int kBadEnds = 1, kBadCounts = 2, kBadTokenEnds = 4, kBadSwiGluEnds = 8;

// Output in e4m3 is that of SwiGLU: B has the rows of gate, then as many of up, and one quantisation block of the
// result is a row of 128 columns. A tile takes 128 rows of each, so that a thread has gate in its first pass and up in
// its second, at the same places.
constexpr bool is_swiglu(DType out) { return out == DType::kE4M3; }
constexpr int out_columns(int product_columns, DType out) {
  return is_swiglu(out) ? product_columns / 2 : product_columns;
}

// K is cut into segments whose sums are added in ascending order: that is part of an output's value, so it depends on N
// and K alone, never on M or the GPU. Whether the CTAs of a cluster take a segment each or one CTA takes them all is
// the config's choice and changes no bit. Segments pay where the tiles of a small M would leave most of kSegmentSms
// idle; half of them can still ask for all that HBM gives, so less than kFewest segments are none.
struct Segments {
  int blocks, count;  // k-blocks in all, and a power of two

  // The first k-block of a segment, for segment = count that of the end.
  constexpr int first(int segment) const { return static_cast<int>(static_cast<int64_t>(blocks) * segment / count); }

  static constexpr int kSegmentSms = 132, kTileN = 64, kMinBlocks = 4, kFewest = 4;

  static constexpr Segments of(int n, int k, BScales scales) {
    const int blocks = (k + kTileK - 1) / kTileK, tiles = (n + kTileN - 1) / kTileN;
    int count = 1;
    while (scales == BScales::kBlock && 2 * count <= kMaxSplit && 2 * count * tiles <= kSegmentSms &&
           2 * count * kMinBlocks <= blocks)
      count *= 2;
    return {blocks, count < kFewest ? 1 : count};
  }

  // Of a problem or an instance: the two passes of SwiGLU leave no registers for the sums of a second segment.
  static constexpr Segments of(int n, int k, BScales scales, DType out) {
    return is_swiglu(out) ? Segments{(k + kTileK - 1) / kTileK, 1} : of(n, k, scales);
  }
};

// Whether a warp beside the producer, the scaler, multiplies the scales of a stage for the consumers, each of whose
// threads then reads its two products at once. With that their main loop has instructions beside wgmma and FFMA for
// less than 30 % of its FFMA. A wider tile has so many FFMA that it needs no scaler, and no place for the products;
// tiles of 64 rows or columns and fewer mostly wait for memory, to which the scaler would add its own latency.
constexpr bool has_scaler(TileShape tile, BScales scales) {
  return scales == BScales::kBlock && tile.m == kConsumers * kWgmmaM && tile.n == TileShape::kMaxPass;
}

// Rows of B in one TMA load of a CTA, of which `sharers` load for each other: never more than one pass has.
constexpr int b_box_rows(TileShape tile, int sharers) {
  const int rows = tile.n / sharers;
  return rows < TileShape::kMaxPass ? rows : TileShape::kMaxPass;
}

// Whether output is staged in shared memory and goes from there by TMA.
constexpr bool stores_by_tma(TileShape tile, DType out, Cluster cluster) {
  return out != DType::kF32 && cluster != Cluster::kSplit && !tile.swapped();
}

// Columns of BF16 output in one TMA store: a row of the box is one swizzle span of 64 or 128 bytes.
constexpr int out_panel_columns(int pass_columns) { return pass_columns < 64 ? pass_columns : 64; }

// Byte offsets in dynamic shared memory, whose base is 1024-aligned as 128-byte swizzle wants. A stage s of an array
// lies s * (its bytes per stage) further on. full[s]: the producer's arrival plus the bytes of the stage; empty[s]: one
// arrival of each consumer warp of the cluster. With a scaler, `products` holds what it makes of a stage's scales, and
// on scaled[s] it arrives when they are there.
//
// In Grouping::kRows, a tile may begin at any row, but a load of scales only at a multiple of four of them (16 bytes):
// up to three more come along, and the tile's own begin behind them. `groups` holds the ends of rows and of tiles, in
// kDepth those of k-blocks.
//
// In kSplit, `out` holds this CTA's partial sums in FP32 for its peers to read; ready and drained guard it: on ready
// each CTA of the tile arrives when its sums are there, on drained when it has read those here.
struct SharedPlan {
  int stages;
  int a, b, out, a_scale, b_scale, products, groups, full, empty, scaled, ready, drained;
  int bytes;

  static constexpr int a_stage(TileShape tile) { return tile.m * kTileK; }
  static constexpr int b_stage(TileShape tile) { return tile.n * kTileK; }
  static constexpr int kScaleAlignment = 4;  // floats
  static constexpr int a_scales(TileShape tile, Grouping grouping) {
    return tile.m + (grouping == Grouping::kRows ? kScaleAlignment : 0);
  }
  static constexpr int a_scale_stage(TileShape tile, Grouping grouping) {
    return (a_scales(tile, grouping) * 4 + 127) / 128 * 128;  // TMA writes at multiples of 128 bytes
  }
  static constexpr int b_scale_stage(TileShape tile, BScales scales) {
    return scales == BScales::kRow ? tile.n * 4 : 0;
  }
  static constexpr int product_stage(TileShape tile, BScales scales) {
    return has_scaler(tile, scales) ? tile.m * 4 : 0;
  }
  // Bytes that one stage's TMA loads complete on full[s].
  static constexpr int stage_bytes(TileShape tile, BScales scales, Grouping grouping) {
    return a_stage(tile) + b_stage(tile) + a_scales(tile, grouping) * 4 + b_scale_stage(tile, scales);
  }

  // As many stages as fit. BF16 output is staged a pass at a time; FP32 output, and that of swapped operands, goes from
  // registers to global memory and needs no staging: see the epilogue. SwiGLU stages its e4m3 and, panel after panel,
  // its BF16 in the same place.
  static constexpr SharedPlan make(TileShape tile, BScales scales, DType out, Cluster cluster, Grouping grouping) {
    const int out_bytes = kConsumers * kWgmmaM * tile.pass_columns() *
                          (cluster == Cluster::kSplit          ? 4
                           : stores_by_tma(tile, out, cluster) ? size_of(out)
                                                               : 0);
    const int group_bytes = kMaxGroups * 4 * (grouping == Grouping::kRows ? 2 : grouping == Grouping::kDepth ? 1 : 0);
    const int barriers = has_scaler(tile, scales) ? 3 : 2;
    const int per_stage = a_stage(tile) + b_stage(tile) + a_scale_stage(tile, grouping) + b_scale_stage(tile, scales) +
                          product_stage(tile, scales) + barriers * 8;
    const int fit = (kMaxShared - out_bytes - group_bytes - 2 * 8) / per_stage;
    const int stages = fit < kMaxStages ? fit : kMaxStages;
    SharedPlan plan{};
    plan.stages = stages;
    plan.a = 0;
    plan.b = plan.a + stages * a_stage(tile);
    plan.out = plan.b + stages * b_stage(tile);
    plan.a_scale = plan.out + out_bytes;
    plan.b_scale = plan.a_scale + stages * a_scale_stage(tile, grouping);
    plan.products = plan.b_scale + stages * b_scale_stage(tile, scales);
    plan.groups = plan.products + stages * product_stage(tile, scales);
    plan.full = plan.groups + group_bytes;
    plan.empty = plan.full + stages * 8;
    plan.scaled = plan.empty + stages * 8;
    plan.ready = plan.full + stages * barriers * 8;
    plan.drained = plan.ready + 8;
    plan.bytes = plan.drained + 8;
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
