// From a tile's sums to the output: add C, round once, store. One for every kernel.
#pragma once
#include "../../ptx/cluster.cuh"
#include "../../ptx/warp.cuh"
#include "scheduler.cuh"

namespace fastfp8::gemm {

// Two neighbours of a row of C, in FP32.
__device__ __forceinline__ float2 load_c(const Arguments& args, int64_t row, int column) {
  const int64_t offset = row * args.c_pitch + column;
  if (!args.c_is_bf16) return *reinterpret_cast<const float2*>(static_cast<const float*>(args.c) + offset);
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(args.c) + offset);
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ __forceinline__ float load_c_element(const Arguments& args, int64_t row, int column) {
  const float2 pair = load_c(args, row, column / 2 * 2);
  return column % 2 ? pair.y : pair.x;
}

template <class I>
struct Epilogue {
  using Acc = Fragment<I::kColumns>;

  const Arguments& args;
  Shared<I> shared;
  int consumer;
  uint32_t exchange_phase = 0;

  __device__ __forceinline__ static int thread() { return threadIdx.x % 128; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  // The first row and column of this thread's fragment in a tile.
  __device__ __forceinline__ int fragment_row() const {
    return I::first_row(consumer) + thread() / 32 * 16 + lane() / 4;
  }
  __device__ __forceinline__ int fragment_column() const { return I::first_column(consumer) + 2 * (lane() % 4); }

  // A tile all of whose K is in acc.
  __device__ __forceinline__ void store(Acc& acc, const Tile& tile) const {
    const int row = tile.row + fragment_row(), column = tile.column + fragment_column();
    if constexpr (I::kGrouping != Grouping::kRows && !I::kSwapped) {
      if (args.c != nullptr) {
        // An empty group adds nothing: its C stays as it is, and it is where the output is.
        if (I::kGrouping == Grouping::kDepth && tile.segments.blocks == 0) return;
        add_c(acc, row, tile.end, column);
      }
    }
    if constexpr (I::kSwapped) {
      store_swapped(acc, tile);
    } else if constexpr (I::kOut == DType::kBF16) {
      const int first_column = tile.column + I::first_column(consumer);
#pragma unroll
      for (int pass = 0; pass < I::kPasses; ++pass)
        store_bf16(acc.value + pass * (I::kPassColumns / 2), tile.row + I::first_row(consumer), tile.end,
                   first_column + pass * I::kPassColumns);
    } else {
      store_f32(acc, row, tile.end, column);
    }
  }

  // acc += c, read in the fragment's layout: a quad of lanes reads 8 neighbours of a row.
  __device__ __forceinline__ void add_c(Acc& acc, int row, int end, int column) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= end) continue;
#pragma unroll
      for (int j = 0; j < I::kColumns / 8; ++j) {
        if (column + 8 * j >= args.n) continue;
        const float2 c = load_c(args, row + 8 * half, column + 8 * j);
        float* value = acc.value + 4 * j + 2 * half;
        value[0] = __fadd_rn(value[0], c.x);
        value[1] = __fadd_rn(value[1], c.y);
      }
    }
  }

  // FP32 goes straight to global memory: a quad of lanes writes one whole 32-byte sector, so staging would save
  // nothing.
  __device__ __forceinline__ void store_f32(const Acc& acc, int row, int end, int column) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= end) continue;
      float* out = static_cast<float*>(args.out) + static_cast<int64_t>(row + 8 * half) * args.n + column;
#pragma unroll
      for (int j = 0; j < I::kColumns / 8; ++j) {
        if (column + 8 * j >= args.n) continue;
        *reinterpret_cast<float2*>(out + 8 * j) = {acc.value[4 * j + 2 * half], acc.value[4 * j + 2 * half + 1]};
      }
    }
  }

  // Operands swapped: the fragment's rows are columns of the output. They are so few that each thread writes its own:
  // eight lanes have eight neighbours of a row.
  __device__ __forceinline__ void store_swapped(const Acc& acc, const Tile& tile) const {
    const int first_column = tile.column + I::first_column(consumer) + thread() / 32 * 16 + lane() / 4;
#pragma unroll
    for (int v = 0; v < I::kColumns / 2; ++v) {
      const int row = tile.row + v / 4 * 8 + 2 * (lane() % 4) + v % 2, column = first_column + v / 2 % 2 * 8;
      if (row >= tile.end || column >= args.n) continue;
      float value = acc.value[v];
      if constexpr (I::kGrouping == Grouping::kNone)
        if (args.c != nullptr) value = __fadd_rn(value, load_c_element(args, row, column));
      const int64_t offset = static_cast<int64_t>(row) * args.n + column;
      if constexpr (I::kOut == DType::kBF16)
        static_cast<uint16_t*>(args.out)[offset] = static_cast<uint16_t>(ptx::bf16x2(value, 0.0f));
      else
        static_cast<float*>(args.out)[offset] = value;
    }
  }

  // BF16 through shared memory, in panels of one swizzle span: stmatrix writes them without a bank conflict, and one
  // TMA store a panel writes them out and clips at M and N. Each consumer stages and stores its own part of the tile,
  // the columns of one pass at a time. Where the rows behind a group's last are another's, the warps write theirs
  // themselves.
  __device__ __forceinline__ void store_bf16(const float* sums, int first_row, int end, int first_column) const {
    constexpr int kColumns = I::kPassColumns, kPanel = out_panel_columns(kColumns);
    constexpr int kRowBytes = kPanel * 2, kPanelBytes = kWgmmaM * kRowBytes;
    constexpr int kChunks = kRowBytes / 16;  // of 16 bytes; the swizzle permutes them within a row
    const int warp = thread() / 32;
    const uint32_t barrier = kConsumerBarrier + consumer;
    uint8_t* panels = shared.out() + consumer * (kWgmmaM * kColumns * 2);

    // The thread that stores is the one whose bulk groups tell when the panels stored last have been read.
    const bool storer = warp == 0 && ptx::elect_one();
    if (storer) ptx::bulk_wait_group_read<0>();
    ptx::named_barrier_sync(barrier, 128);
    const int row = warp * 16 + lane() % 16;
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      const int chunk = 2 * j + lane() / 16;
      const int offset = row * kRowBytes + chunk % kChunks * 16;
      const int swizzled = offset ^ (offset >> 7 & (kChunks - 1)) << 4;
      const float* v = sums + 8 * j;
      ptx::stmatrix_x4(panels + chunk / kChunks * kPanelBytes + swizzled, ptx::bf16x2(v[0], v[1]),
                       ptx::bf16x2(v[2], v[3]), ptx::bf16x2(v[4], v[5]), ptx::bf16x2(v[6], v[7]));
    }
    if (I::kGrouping != Grouping::kNone && first_row + kWgmmaM > end) {
      __syncwarp();  // a warp reads its own sixteen rows only
      store_rows<kPanel>(panels, first_row, end, first_column);
      return;
    }
    ptx::fence_proxy_async_shared();  // by every writer, before the barrier that lets the storer go
    ptx::named_barrier_sync(barrier, 128);
    if (!storer) return;
    if (first_row < end) {
#pragma unroll
      for (int panel = 0; panel < kColumns / kPanel; ++panel) {
        const int column = first_column + panel * kPanel;
        if (column < args.n) ptx::tma_store_2d(args.out_map, panels + panel * kPanelBytes, column, first_row);
      }
    }
    ptx::bulk_commit_group();
  }

  // A warp's sixteen rows from the panels, 16 bytes a lane, as far as they are the group's.
  template <int kPanel>
  __device__ __forceinline__ void store_rows(const uint8_t* panels, int first_row, int end, int first_column) const {
    constexpr int kRowBytes = kPanel * 2, kChunks = kRowBytes / 16, kChunksOfRow = I::kPassColumns * 2 / 16;
#pragma unroll
    for (int i = lane(); i < 16 * kChunksOfRow; i += 32) {
      const int row = thread() / 32 * 16 + i / kChunksOfRow, chunk = i % kChunksOfRow;
      const int column = first_column + 8 * chunk;
      if (first_row + row >= end || column >= args.n) continue;
      const int offset = row * kRowBytes + chunk % kChunks * 16;
      const int swizzled = offset ^ (offset >> 7 & (kChunks - 1)) << 4;
      const auto* from = panels + chunk / kChunks * (kWgmmaM * kRowBytes) + swizzled;
      uint16_t* to = static_cast<uint16_t*>(args.out) + static_cast<int64_t>(first_row + row) * args.n + column;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    }
  }

  // Shared memory must outlive the reads of the last stores.
  __device__ __forceinline__ void drain() const {
    if (I::kStoresByTma && thread() < 32 && ptx::elect_one()) ptx::bulk_wait_group_read<0>();
  }

  // Cluster::kSplit: acc has one segment of K. Each CTA leaves its sums in its shared memory, adds a share of those of
  // all in the order of the segments, and stores that share: pairs of neighbours, as the fragment has them.
  __device__ __forceinline__ void exchange_and_store(const Acc& acc, const Tile& tile, int rank, int ranks) {
    constexpr int kPairs = I::kColumns / 4;
    constexpr int kStride = kConsumers * 128;  // a warp's float2 lie side by side
    static_assert(kPairs % kMaxSplit == 0);
    float2* mine = reinterpret_cast<float2*>(shared.out()) + consumer * 128 + thread();
    const bool first_warp = threadIdx.x / 32 == 4;  // of the consumers

    wait(shared.drained(), exchange_phase ^ 1);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) mine[pair * kStride] = {acc.value[2 * pair], acc.value[2 * pair + 1]};
    ptx::named_barrier_sync(kTileBarrier, kStride);
    if (first_warp && lane() < ranks) ptx::mbarrier_publish_remote(shared.ready(), lane());
    while (!ptx::mbarrier_try_wait_cluster(shared.ready(), exchange_phase)) {
    }
    const int share = kPairs / ranks;
    for (int pair = rank * share; pair < (rank + 1) * share; ++pair) {
      float2 sums[kMaxSplit];
#pragma unroll
      for (int peer = 0; peer < kMaxSplit; ++peer)
        if (peer < ranks) sums[peer] = ptx::load_remote(mine + pair * kStride, peer);
#pragma unroll
      for (int peer = 1; peer < kMaxSplit; ++peer)
        if (peer < ranks) {
          sums[0].x = __fadd_rn(sums[0].x, sums[peer].x);
          sums[0].y = __fadd_rn(sums[0].y, sums[peer].y);
        }
      store_pair(sums[0], tile.row + fragment_row() + pair % 2 * 8, tile.column + fragment_column() + pair / 2 * 8);
    }
    ptx::named_barrier_sync(kTileBarrier, kStride);
    if (first_warp && lane() < ranks) ptx::mbarrier_arrive_remote(shared.drained(), lane());
    exchange_phase ^= 1;
  }

  __device__ __forceinline__ void store_pair(float2 value, int row, int column) const {
    if (row >= args.m || column >= args.n) return;
    if (args.c != nullptr) {
      const float2 c = load_c(args, row, column);
      value = {__fadd_rn(value.x, c.x), __fadd_rn(value.y, c.y)};
    }
    const int64_t offset = static_cast<int64_t>(row) * args.n + column;
    if constexpr (I::kOut == DType::kBF16)
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(args.out) + offset) = ptx::bf16x2(value.x, value.y);
    else
      *reinterpret_cast<float2*>(static_cast<float*>(args.out) + offset) = value;
  }
};

}  // namespace fastfp8::gemm
