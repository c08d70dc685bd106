// Which tile a CTA takes next, and which rows of A and B and which part of K are in it: all that tells a dense product
// from a grouped one.
#pragma once
#include "../../ptx/cluster.cuh"
#include "instance.cuh"

namespace fastfp8::gemm {

// Which CTA of its cluster this is, and how many there are: a pair takes two tiles at each index, a split one.
template <class I>
__device__ __forceinline__ int cluster_rank() {
  if constexpr (I::kCluster == Cluster::kNone) return 0;
  return static_cast<int>(ptx::cluster_rank());
}
template <class I>
__device__ __forceinline__ int cluster_size() {
  if constexpr (I::kCluster == Cluster::kNone) return 1;
  return static_cast<int>(ptx::cluster_size());
}

// Of `value` in the lanes of a warp up to this one, the largest.
__device__ __forceinline__ int largest_so_far(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffff, value, distance);
    if (lane >= distance) value = max(value, other);
  }
  return value;
}

// One tile of the output, [row, end) by `column` on, and the operands that it is the product of: rows of A from `a_row`
// on, of B from `b_row` on, of B's block scales `scale_row`, and of K the `segments` from k-block `first_block` on.
struct Tile {
  int row, end, column;
  int a_row, b_row, scale_row;
  int first_block;
  Segments segments;
};

// Every row of A by every row of B.
template <class I>
struct DenseScheduler {
  const Arguments& args;
  Segments segments;

  __device__ __forceinline__ DenseScheduler(const Arguments& args, Shared<I>)
      : args(args), segments(Segments::of(args.n, args.k, I::kScales, I::kOut)) {}

  __device__ __forceinline__ static void set_up(const Arguments&, Shared<I>) {}
  __device__ __forceinline__ int tiles() const { return args.order.tiles_m * args.order.tiles_n; }
  __device__ __forceinline__ Tile at(int index) const {
    const auto tile = args.order.at(index);
    const int m = I::kCluster == Cluster::kPair ? 2 * tile.m + cluster_rank<I>() : tile.m;
    const int row = m * I::kTile.m, column = tile.n * out_columns(I::kTile.n, I::kOut);
    return {row, args.m, column, row, column, column / 128, 0, segments};
  }
};

// Rows in groups, each by a B of its own. Where the groups end is in device memory; set_up makes of it, in shared
// memory, the end of each group's rows and of its tiles, so that each role finds its tiles by itself.
template <class I>
struct GroupedScheduler {
  // Tiles of a group, one below the other, that a cluster takes at once. They count as one; the last may be empty.
  static constexpr int kTogether = I::kCluster == Cluster::kPair ? 2 : 1;

  const Arguments& args;
  const int *row_ends, *tile_ends;
  Segments segments;

  __device__ __forceinline__ GroupedScheduler(const Arguments& args, Shared<I> shared)
      : args(args),
        row_ends(shared.groups()),
        tile_ends(shared.groups() + kMaxGroups),
        segments(Segments::of(args.n, args.k, I::kScales, I::kOut)) {}

  // By the first warp; what it writes is for after the next barrier of the CTA. Values that no group can have are
  // clamped, so that nothing is read or written out of bounds, and reported in the error word.
  __device__ __forceinline__ static void set_up(const Arguments& args, Shared<I> shared) {
    __builtin_assume(args.groups > 0);  // a predicate less to keep
    int *rows = shared.groups(), *tiles = shared.groups() + kMaxGroups;
    const int lane = threadIdx.x;
    int last_row = 0, last_tile = 0;  // of the groups before this chunk of 32
    bool bad = false;
    for (int first = 0; first < args.groups; first += 32) {
      const int group = first + lane;
      const bool exists = group < args.groups;
      const int given = exists ? args.ends[group] : 0;
      int begin, end;
      if (args.group_rows > 0) {  // a number of rows, from the group's own first one
        const int count = min(max(given, 0), args.group_rows);
        bad |= exists && count != given;
        begin = group * args.group_rows;
        end = begin + count;
      } else {  // the end of the rows; a group begins where the one before it ends
        end = largest_so_far(max(min(given, args.m), last_row));
        bad |= exists && end != given;
        begin = __shfl_up_sync(0xffffffff, end, 1);
        if (lane == 0) begin = last_row;
        last_row = __shfl_sync(0xffffffff, end, 31);
      }
      int count = exists ? (end - begin + kTogether * I::kTile.m - 1) / (kTogether * I::kTile.m) : 0;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffff, count, distance);
        if (lane >= distance) count += other;
      }
      count += last_tile;
      last_tile = __shfl_sync(0xffffffff, count, 31);
      if (exists) {
        rows[group] = end;
        tiles[group] = count;
      }
    }
    if (bad && args.error != nullptr && blockIdx.x == 0)
      atomicOr(args.error, I::kSwiGlu ? kBadSwiGluEnds : args.group_rows > 0 ? kBadCounts : kBadEnds);
  }

  __device__ __forceinline__ int tiles() const { return tile_ends[args.groups - 1] * args.order.tiles_n; }

  __device__ __forceinline__ Tile at(int index) const {
    __builtin_assume(args.groups > 0);
    // The first group whose tiles end behind this one.
    int group = 0;
    for (int left = args.groups; left > 0;) {
      const int half = left / 2;
      if (tile_ends[group + half] * args.order.tiles_n <= index) {
        group += half + 1;
        left -= half + 1;
      } else {
        left = half;
      }
    }
    const int first_tile = group == 0 ? 0 : tile_ends[group - 1];
    const int tiles_m = tile_ends[group] - first_tile;
    const TileOrder order{tiles_m, args.order.tiles_n, min(args.order.band, tiles_m)};
    const auto tile = order.at(index - first_tile * args.order.tiles_n);
    const int begin = args.group_rows > 0 ? group * args.group_rows : group == 0 ? 0 : row_ends[group - 1];
    const int m = kTogether * tile.m + (kTogether > 1 ? cluster_rank<I>() : 0);
    const int row = begin + m * I::kTile.m, column = tile.n * out_columns(I::kTile.n, I::kOut);
    const int b_blocks = (args.n + 127) / 128;
    return {row, row_ends[group], column, row, group * args.n + column, group * b_blocks + column / 128, 0, segments};
  }
};

// K in groups, each of which has an output of its own: every row of A by every row of B, over the group's k-blocks.
// Each group begins with a k-block, at the first one behind the group before it; what follows its end in its last block
// is zero. The tiles of a group lie one behind the other, as deep as each other, and all groups have as many.
template <class I>
struct DepthScheduler {
  const Arguments& args;
  const int* block_ends;

  __device__ __forceinline__ DepthScheduler(const Arguments& args, Shared<I> shared)
      : args(args), block_ends(shared.groups()) {}

  // As GroupedScheduler's, of where the groups end along K.
  __device__ __forceinline__ static void set_up(const Arguments& args, Shared<I> shared) {
    __builtin_assume(args.groups > 0);
    int last = 0;  // end of the groups before this chunk of 32
    bool bad = false;
    for (int first = 0; first < args.groups; first += 32) {
      const int group = first + threadIdx.x;
      const bool exists = group < args.groups;
      const int given = exists ? args.ends[group] : 0;
      const int end = largest_so_far(max(min(given, args.k), last));
      bad |= exists && end != given;
      last = __shfl_sync(0xffffffff, end, 31);
      if (exists) shared.groups()[group] = (end + kTileK - 1) / kTileK;
    }
    if (bad && args.error != nullptr && blockIdx.x == 0) atomicOr(args.error, kBadTokenEnds);
  }

  __device__ __forceinline__ int tiles() const { return args.groups * args.order.tiles_m * args.order.tiles_n; }

  __device__ __forceinline__ Tile at(int index) const {
    const int tiles_of_group = args.order.tiles_m * args.order.tiles_n;
    const int group = index / tiles_of_group;
    const auto tile = args.order.at(index - group * tiles_of_group);
    const int m = I::kCluster == Cluster::kPair ? 2 * tile.m + cluster_rank<I>() : tile.m;
    const int a_row = m * I::kTile.m, column = tile.n * I::kTile.n, row = group * args.m;
    const int first = group == 0 ? 0 : block_ends[group - 1];
    return {row + a_row, row + args.m, column, a_row, column, 0, first, {block_ends[group] - first, 1}};
  }
};

}  // namespace fastfp8::gemm
