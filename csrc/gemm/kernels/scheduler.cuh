// Which tile a CTA takes next, and which rows of A and B are in it: all that tells a dense product from a grouped one.
#pragma once
#include "instance.cuh"

namespace fastfp8::gemm {

// One tile. Rows of A and of the output from `row` up to `end`, of B from `b_row`, of B's block scales `scale_row`.
struct Tile {
  int row, end;
  int column;  // of the output
  int b_row, scale_row;
};

// Every row of A by every row of B.
template <class I>
struct DenseScheduler {
  const Arguments& args;
  int rank;  // in the cluster

  __device__ __forceinline__ DenseScheduler(const Arguments& args, Shared<I>, int rank) : args(args), rank(rank) {}

  __device__ __forceinline__ static void set_up(const Arguments&, Shared<I>) {}
  __device__ __forceinline__ int tiles() const { return args.order.tiles_m * args.order.tiles_n; }
  __device__ __forceinline__ Tile at(int index) const {
    const auto tile = args.order.at(index);
    const int m = I::kCluster == Cluster::kPair ? 2 * tile.m + rank : tile.m;
    const int column = tile.n * I::kTile.n;
    return {m * I::kTile.m, args.m, column, column, column / 128};
  }
};

// Rows in groups, each by a B of its own. Where the groups end is in device memory; set_up makes of it, in shared
// memory, the end of each group's rows and of its tiles, so that each role finds its tiles by itself.
template <class I>
struct GroupedScheduler {
  const Arguments& args;
  const int *row_ends, *tile_ends;

  __device__ __forceinline__ GroupedScheduler(const Arguments& args, Shared<I> shared, int)
      : args(args), row_ends(shared.groups()), tile_ends(shared.groups() + kMaxGroups) {}

  // By the first warp; what it writes is for after the next barrier of the CTA. Values that no group can have are
  // clamped, so that nothing is read or written out of bounds, and reported in the error word.
  __device__ __forceinline__ static void set_up(const Arguments& args, Shared<I> shared) {
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
        end = max(min(given, args.m), last_row);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const int other = __shfl_up_sync(0xffffffff, end, distance);
          if (lane >= distance) end = max(end, other);
        }
        bad |= exists && end != given;
        begin = __shfl_up_sync(0xffffffff, end, 1);
        if (lane == 0) begin = last_row;
        last_row = __shfl_sync(0xffffffff, end, 31);
      }
      int count = exists ? (end - begin + I::kTile.m - 1) / I::kTile.m : 0;
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
      atomicOr(args.error, args.group_rows > 0 ? kBadCounts : kBadEnds);
  }

  __device__ __forceinline__ int tiles() const { return tile_ends[args.groups - 1] * args.order.tiles_n; }

  __device__ __forceinline__ Tile at(int index) const {
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
    const int column = tile.n * I::kTile.n;
    const int b_blocks = (args.n + 127) / 128;
    return {begin + tile.m * I::kTile.m, row_ends[group], column, group * args.n + column,
            group * b_blocks + column / 128};
  }
};

}  // namespace fastfp8::gemm
