// From a tile's sums to the output: add C, round once, store; or SwiGLU and quantisation. One for every kernel.
#pragma once
#include "../../ptx/cluster.cuh"
#include "../../ptx/warp.cuh"
#include "counters.cuh"
#include "scheduler.cuh"
#include "swiglu.cuh"

namespace fastfp8::gemm {

// Two neighbours of a row of C, in FP32.
__device__ __forceinline__ float2 load_c(const Arguments& args, int64_t row, int column) {
  const int64_t offset = row * args.c_pitch + column;
  if (!args.c_is_bf16) return *reinterpret_cast<const float2*>(static_cast<const float*>(args.c) + offset);
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(args.c) + offset);
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Where panels of shared memory go: by its map, or by address where the warps write themselves.
struct Destination {
  const CUtensorMap* map;
  void* address;
  int columns;
};

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
    } else if constexpr (I::kSwiGlu) {
      store_swiglu(acc, tile);
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

  // Output goes through shared memory, in panels of 64 rows of one swizzle span: stmatrix writes them without a bank
  // conflict, and one TMA store a panel writes them out and clips at M and N. Each consumer stages and stores its own
  // part of the tile, the columns of one pass at a time. Where the rows behind a group's last are another's, the warps
  // write theirs themselves.
  __device__ __forceinline__ void store_bf16(const float* sums, int first_row, int end, int first_column) const {
    constexpr int kColumns = I::kPassColumns, kPanel = out_panel_columns(kColumns);
    uint8_t* panels = shared.out() + consumer * (kWgmmaM * kColumns * 2);
    const bool storer = begin_staging();
    stage_bf16<kColumns>(panels, sums);
    send<2 * kPanel, kColumns / kPanel, 2>(panels, {args.out_map, args.out, args.n}, first_row, end, first_column,
                                           storer);
  }

  // Waits until the panels may be written. True in the thread that will store them: its bulk groups tell when the
  // panels stored last have been read.
  __device__ __forceinline__ bool begin_staging() const {
    const bool storer = thread() < 32 && ptx::elect_one();
    if (storer) ptx::bulk_wait_group_read<0>();
    ptx::named_barrier_sync(kConsumerBarrier + consumer, 128);
    return storer;
  }

  // Byte `at` of row `row` of a panel, 16 bytes of which stay together: the swizzle permutes them within a row.
  template <int kRowBytes>
  __device__ __forceinline__ static int swizzled(int row, int at) {
    const int offset = row * kRowBytes + at;
    return offset ^ (offset >> 7 & (kRowBytes / 16 - 1)) << 4;
  }

  // `kColumns` neighbouring columns of this consumer's fragment, rounded to BF16.
  template <int kColumns>
  __device__ __forceinline__ static void stage_bf16(uint8_t* panels, const float* values) {
    constexpr int kRowBytes = out_panel_columns(kColumns) * 2, kChunks = kRowBytes / 16;
    const int row = thread() / 32 * 16 + lane() % 16;
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      const int chunk = 2 * j + lane() / 16;
      const float* v = values + 8 * j;
      ptx::stmatrix_x4(
          panels + chunk / kChunks * (kWgmmaM * kRowBytes) + swizzled<kRowBytes>(row, chunk % kChunks * 16),
          ptx::bf16x2(v[0], v[1]), ptx::bf16x2(v[2], v[3]), ptx::bf16x2(v[4], v[5]), ptx::bf16x2(v[6], v[7]));
    }
  }

  // Staged panels of elements of kSize bytes to rows from `first_row` up to `end` and columns from `first_column` on.
  template <int kRowBytes, int kPanels, int kSize>
  __device__ __forceinline__ void send(const uint8_t* panels, const Destination& to, int first_row, int end,
                                       int first_column, bool storer) const {
    if (I::kGrouping != Grouping::kNone && first_row + kWgmmaM > end) {
      __syncwarp();  // a warp reads its own sixteen rows only
      copy_rows<kRowBytes, kPanels, kSize>(panels, to, first_row, end, first_column);
      return;
    }
    ptx::fence_proxy_async_shared();  // by every writer, before the barrier that lets the storer go
    ptx::named_barrier_sync(kConsumerBarrier + consumer, 128);
    if (!storer) return;
    if (first_row < end) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int column = first_column + panel * (kRowBytes / kSize);
        if (column < to.columns) ptx::tma_store_2d(to.map, panels + panel * (kWgmmaM * kRowBytes), column, first_row);
      }
    }
    ptx::bulk_commit_group();
  }

  // A warp's sixteen rows from the panels, 16 bytes a lane, as far as they are the group's.
  template <int kRowBytes, int kPanels, int kSize>
  __device__ __forceinline__ void copy_rows(const uint8_t* panels, const Destination& to, int first_row, int end,
                                            int first_column) const {
    constexpr int kChunks = kRowBytes / 16, kChunksOfRow = kPanels * kChunks;
#pragma unroll
    for (int i = lane(); i < 16 * kChunksOfRow; i += 32) {
      const int row = thread() / 32 * 16 + i / kChunksOfRow, chunk = i % kChunksOfRow;
      const int column = first_column + 16 / kSize * chunk;
      if (first_row + row >= end || column >= to.columns) continue;
      const auto* from =
          panels + chunk / kChunks * (kWgmmaM * kRowBytes) + swizzled<kRowBytes>(row, chunk % kChunks * 16);
      auto* address =
          static_cast<uint8_t*>(to.address) + (static_cast<int64_t>(first_row + row) * to.columns + column) * kSize;
      *reinterpret_cast<uint4*>(address) = *reinterpret_cast<const uint4*>(from);
    }
  }

  // SwiGLU: gate is the first pass of acc, up the second. A row's 128 results are one quantisation block, and a quad of
  // lanes has them all. The e4m3 and, one after the other, the panels of gate and up take turns in the same 64 rows of
  // 128 bytes of shared memory.
  __device__ __forceinline__ void store_swiglu(Acc& acc, const Tile& tile) const {
    constexpr int kPairs = I::kPassColumns / 4, kRowBytes = 128, kPanelColumns = kRowBytes / 2;
    const int first_row = tile.row + I::first_row(consumer), row = tile.row + fragment_row();
    uint8_t* panel = shared.out() + consumer * (kWgmmaM * kRowBytes);
    if (args.gate_up != nullptr) {
#pragma unroll
      for (int i = 0; i < I::kColumns / kPanelColumns; ++i) {
        constexpr int kOfPass = I::kPassColumns / kPanelColumns;
        const bool storer = begin_staging();
        stage_bf16<kPanelColumns>(panel, acc.value + i * (kPanelColumns / 2));
        send<kRowBytes, 1, 2>(panel, {args.gate_up_map, args.gate_up, args.n}, first_row, tile.end,
                              i / kOfPass * (args.n / 2) + tile.column + i % kOfPass * kPanelColumns, storer);
      }
    }
    float weight[2] = {1.0f, 1.0f}, amax[2] = {0.0f, 0.0f};
    if (args.weight != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (row + 8 * half < tile.end)
          weight[half] = args.weight[static_cast<int64_t>(row + 8 * half) * args.weight_stride];
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {  // the rows of a thread take turns
      float *gate = acc.value + 2 * pair, *up = gate + I::kPassColumns / 2;
      const uint32_t gates = ptx::bf16x2(gate[0], gate[1]), ups = ptx::bf16x2(up[0], up[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t g = i ? gates & 0xffff0000u : gates << 16, u = i ? ups & 0xffff0000u : ups << 16;
        gate[i] = __fmul_rn(swiglu(__uint_as_float(g), __uint_as_float(u), args.limit), weight[pair % 2]);
        amax[pair % 2] = fmaxf(amax[pair % 2], finite_magnitude(gate[i]));
      }
    }
    float multiplier[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        amax[half] = fmaxf(amax[half], __shfl_xor_sync(0xffffffff, amax[half], distance));
      const BlockScale block = block_scale_of(amax[half], args.floor, args.pow2);
      multiplier[half] = block.multiplier;
      if (lane() % 4 == 0 && row + 8 * half < tile.end)
        args.out_scale[static_cast<int64_t>(tile.column / 128) * args.out_scale_pitch + row + 8 * half] = block.scale;
    }
    const bool storer = begin_staging();
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const float* value = acc.value + 2 * pair;
      const float by = multiplier[pair % 2];
      const int panel_row = thread() / 32 * 16 + lane() / 4 + pair % 2 * 8, column = pair / 2 * 8 + 2 * (lane() % 4);
      *reinterpret_cast<uint16_t*>(panel + swizzled<kRowBytes>(panel_row, column)) =
          ptx::e4m3x2(__fmul_rn(value[0], by), __fmul_rn(value[1], by));
    }
    send<kRowBytes, 1, 1>(panel, {args.out_map, args.out, args.n / 2}, first_row, tile.end, tile.column, storer);
    if (args.counters != nullptr) count(acc, multiplier, row, tile.end);
  }

  // Counts the results of SwiGLU in the first pass of acc, each warp its sixteen rows as far as they are before `end`.
  __device__ __forceinline__ void count(const Acc& acc, const float (&multiplier)[2], int row, int end) const {
    constexpr int kPairs = I::kPassColumns / 4;
    Counts counts;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= end) continue;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float value = acc.value[i / 2 * 4 + 2 * half + i % 2];
        counts.add(value, __fmul_rn(value, multiplier[half]));
      }
    }
    const int rows = min(max(end - (row - lane() / 4), 0), 16);
    counts.add_to(args.counters, rows * I::kPassColumns);
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
    if (first_warp && lane() < ranks) ptx::mbarrier_arrive_remote(ptx::remote_address(shared.drained(), lane()));
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
