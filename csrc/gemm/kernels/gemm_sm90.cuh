// FP8 GEMM with fine-grained scales for sm_90a: out[M, N] = A[M, K] B[N, K]^T (+ C), dense, with the rows in groups
// that have a B each, or with K in groups that have an output each (scheduler.cuh).
//
// A persistent CTA walks tiles. One producer warp keeps a ring of stages full, two consumer warpgroups share each tile
// (TileShape):
//
//   producer warp      wait empty[s] -> expect bytes on full[s] -> TMA A, B, scales into stage s
//   consumer 0   ... | wait full[s] | 4 wgmma k32 from zero | wait | free s | promote      | wait full[s+1] | ...
//   consumer 1   ...   promote      | wait full[s] | 4 wgmma k32 from zero | wait | free s | promote        | ...
//
// With a scaler (has_scaler), one more warp stands between the producer and the consumers:
//
//   scaler           wait full[s] -> scale_a * scale_b of the stage's rows -> arrive on scaled[s], for which they wait
//
// Promotion is acc = fma(scale_a * scale_b, partial, acc) in FP32 on the CUDA cores, once for each 128 of K. The
// consumers share nothing but the tensor core, so that one promotes while the other's wgmma runs. The order of K is
// fixed (Segments), so the bits of a row depend neither on M nor on the tile.
//
// The ring's phase runs on from tile to tile, hence the producer loads the next tile under the epilogue of this one.
// Where there is a next tile, consumer 1 starts a k-block later: so does its epilogue, and each has the tensor cores
// busy under the other's (Mainloop::to_meet).
//
// Cluster::kPair: two CTAs take two tiles one below the other. Both need the same rows of B: each loads half of them
// for both, which halves what B costs of L2's bandwidth. A stage is then free when the consumers of both CTAs are done
// with it, so they arrive on the empty barriers of both.
//
// Cluster::kSplit: the CTAs of a cluster take one tile, each a segment of its K, and add their sums through distributed
// shared memory (Epilogue::exchange_and_store).
//
// With output in e4m3 (is_swiglu) a tile of 128 x 256 has gate in its first pass and up in its second, from rows of B
// half of N apart. SwiGLU and the quantisation of its result are then a matter of each thread and of its quad
// (Epilogue::store_swiglu).
//
// Launched to overlap with the grid before it, a CTA sets up and fetches B, which may be in L2 as well before as after,
// then waits: nothing else is read or written before the grids before it are done.
#pragma once
#include "../../ptx/cluster.cuh"
#include "../../ptx/grid.cuh"
#include "../../ptx/tma.cuh"
#include "../../ptx/warp.cuh"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "scheduler.cuh"

namespace fastfp8::gemm {

template <class I>
struct Kernel {
  static constexpr bool kSplit = I::kCluster == Cluster::kSplit;

  const Arguments& args;
  Shared<I> shared;

  using Scheduler =
      std::conditional_t<I::kGrouping == Grouping::kRows, GroupedScheduler<I>,
                         std::conditional_t<I::kGrouping == Grouping::kDepth, DepthScheduler<I>, DenseScheduler<I>>>;

  __device__ __forceinline__ static int rank() { return cluster_rank<I>(); }
  __device__ __forceinline__ static int ranks() { return cluster_size<I>(); }

  // The k-blocks of a tile that this CTA takes, counted from the tile's first.
  __device__ __forceinline__ static int first_block(const Tile& tile) {
    return kSplit ? tile.segments.first(rank()) : 0;
  }
  __device__ __forceinline__ static int last_block(const Tile& tile) {
    return kSplit ? tile.segments.first(rank() + 1) : tile.segments.blocks;
  }

  // The boxes of B's rows that this CTA loads, and where one lies in a stage and in B.
  __device__ __forceinline__ static int first_box() { return I::kSharers > 1 ? rank() * I::kBoxes : 0; }
  __device__ __forceinline__ int b_row(const Tile& tile, int box) const {
    return tile.b_row + box * (I::kSwiGlu ? args.n / 2 : I::kBoxRows);
  }

  // One elected thread.
  __device__ __forceinline__ void produce() const {
    constexpr uint16_t kAll = (1 << I::kSharers) - 1;
    const int begin = blockIdx.x / ranks(), step = gridDim.x / ranks(), box_0 = first_box();
    const Scheduler scheduler(args, shared);
    const int tiles = scheduler.tiles();
    if (I::kGrouping == Grouping::kNone && begin < tiles) {
      const Tile tile = scheduler.at(begin);
      const int first = first_block(tile), last = min(last_block(tile), first + I::kPlan.stages);
      for (int block = first; block < last; ++block)
#pragma unroll
        for (int i = 0; i < I::kBoxes; ++i) ptx::tma_prefetch_2d(args.b, block * kTileK, b_row(tile, box_0 + i));
    }
    ptx::wait_for_grids_before();
    Ring<I::kPlan.stages> ring;
    for (int index = begin; index < tiles; index += step) {
      const Tile tile = scheduler.at(index);
      const int scales_row = tile.a_row / SharedPlan::kScaleAlignment * SharedPlan::kScaleAlignment;
      const int last = tile.first_block + last_block(tile);
      for (int block = tile.first_block + first_block(tile); block < last; ++block, ring.advance()) {
        const int stage = ring.stage, k = block * kTileK;
        uint64_t* full = shared.full(stage);
        wait(shared.empty(stage), ring.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, SharedPlan::stage_bytes(I::kTile, I::kScales, I::kGrouping));
        ptx::tma_load_2d(shared.a(stage), args.a, full, k, tile.a_row);
#pragma unroll
        for (int box = box_0; box < box_0 + I::kBoxes; ++box) {
          uint8_t* rows = shared.b(stage) + box * (I::kBoxRows * kTileK);
          if constexpr (I::kSharers == 1)
            ptx::tma_load_2d(rows, args.b, full, k, b_row(tile, box));
          else
            ptx::tma_load_2d_multicast(rows, args.b, full, k, b_row(tile, box), kAll);
        }
        ptx::tma_load_2d(shared.a_scale(stage), args.a_scale, full, scales_row, block);
        if constexpr (I::kScales == BScales::kRow)
          ptx::tma_load_2d(shared.b_scale(stage), args.b_scale, full, tile.b_row, block);
      }
    }
    ptx::let_next_grid_start();
  }

  // One warp, where has_scaler.
  __device__ __forceinline__ void scale() const {
    ptx::wait_for_grids_before();
    const Scheduler scheduler(args, shared);
    const int tiles = scheduler.tiles(), begin = blockIdx.x / ranks(), step = gridDim.x / ranks();
    Ring<I::kPlan.stages> ring;
    for (int index = begin; index < tiles; index += step) {
      const Tile tile = scheduler.at(index);
      const int behind = I::kGrouping == Grouping::kRows ? tile.a_row % SharedPlan::kScaleAlignment : 0;
      const int first = first_block(tile), blocks = last_block(tile) - first;
      auto block_scales = this->block_scales(tile, first, blocks, ring.stage);
      for (int block = 0; block < blocks; ++block) {
        wait(shared.full(ring.stage), ring.phase);
        multiply_scales<I>(shared, ring.stage, behind, block_scales.at(ring.stage, 0));
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.scaled(ring.stage));
        ring.advance();
        if (ring.stage == 0) block_scales.turn();
      }
    }
  }

  __device__ __forceinline__ void consume(int consumer) const {
    using Acc = Fragment<I::kColumns>;
    Epilogue<I> epilogue{args, shared, consumer};
    ptx::wait_for_grids_before();
    const Scheduler scheduler(args, shared);
    const int tiles = scheduler.tiles(), begin = blockIdx.x / ranks(), step = gridDim.x / ranks();
    Mainloop<I> mainloop{shared, consumer, begin + step < tiles};
    for (int index = begin; index < tiles; index += step) {
      const Tile tile = scheduler.at(index);
      const int first = first_block(tile), blocks = last_block(tile) - first;
      auto block_scales = this->block_scales(tile, first, I::kScaler ? 0 : blocks, mainloop.ring.stage);
      Acc acc;
      if constexpr (kSplit) {
        mainloop.run(acc, block_scales, tile.a_row, 0, blocks);
        epilogue.exchange_and_store(acc, tile, rank(), ranks());
      } else if constexpr (I::kPasses > 1) {  // its sums of two segments would not fit: the planner gives it one
        mainloop.run(acc, block_scales, tile.a_row, 0, blocks);
        epilogue.store(acc, tile);
      } else {
#pragma unroll 1
        for (int segment = 0; segment < tile.segments.count; ++segment) {
          Acc sum;
          mainloop.run(sum, block_scales, tile.a_row, tile.segments.first(segment), tile.segments.first(segment + 1));
#pragma unroll
          for (int v = 0; v < I::kColumns / 2; ++v)
            acc.value[v] = segment == 0 ? sum.value[v] : __fadd_rn(acc.value[v], sum.value[v]);
        }
        epilogue.store(acc, tile);
      }
    }
    epilogue.drain();
  }

  // The block scales of a tile whose first k-block is to lie in `stage`. A pass past N has none of its own and takes
  // the first one's: nothing of it is stored. That of up, half of N further on, is never past N.
  __device__ __forceinline__ typename Mainloop<I>::Scales block_scales(const Tile& tile, int first, int blocks,
                                                                       int stage) const {
    const float* row = args.b_block_scale + static_cast<int64_t>(tile.scale_row) * tile.segments.blocks + first;
    const int next_pass = I::kSwiGlu ? args.n / 2 : I::kPassColumns;
    const int to_next_pass = tile.column + next_pass < args.n ? next_pass / 128 * tile.segments.blocks : 0;
    return {row, to_next_pass, I::kScales == BScales::kBlock ? blocks : 0, stage, Mainloop<I>::lane()};
  }

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(args.a);
      ptx::prefetch_tensor_map(args.b);
      ptx::prefetch_tensor_map(args.a_scale);
      if (I::kScales == BScales::kRow) ptx::prefetch_tensor_map(args.b_scale);
      if (I::kStoresByTma) ptx::prefetch_tensor_map(args.out_map);
#pragma unroll
      for (int stage = 0; stage < I::kPlan.stages; ++stage) {
        ptx::mbarrier_init(shared.full(stage), 1);
        ptx::mbarrier_init(shared.empty(stage), kConsumers * 4 * I::kSharers);
        if (I::kScaler) ptx::mbarrier_init(shared.scaled(stage), 1);
      }
      if constexpr (kSplit) {
        ptx::mbarrier_init(shared.ready(), ranks());
        ptx::mbarrier_init(shared.drained(), ranks());
      }
      ptx::fence_mbarrier_init();
    }
    if constexpr (I::kGrouping != Grouping::kNone) {
      // The ends may come from the grid before.
      ptx::wait_for_grids_before();
      if (threadIdx.x < 32) Scheduler::set_up(args, shared);
    }
    sync_all();
    // Warp-uniform for the compiler too: setmaxnreg and wgmma must not sit under divergent control flow.
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
      ptx::setmaxnreg_dec<kProducerRegisters>();
      if (threadIdx.x < 32) {
        if (ptx::elect_one()) produce();
      } else if (I::kScaler && threadIdx.x < 64) {
        scale();
      }
    } else {
      ptx::setmaxnreg_inc<kConsumerRegisters>();
      consume(warpgroup - 1);
    }
    // A peer may still write here, read or arrive.
    if constexpr (I::kCluster != Cluster::kNone) sync_all();
  }

  __device__ __forceinline__ static void sync_all() {
    if constexpr (I::kCluster == Cluster::kNone) {
      __syncthreads();
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
};

}  // namespace fastfp8::gemm

// How many CTAs a cluster has: two in a pair; of a split the launch says, and the kernel must know that there may be.
#define FASTFP8_CLUSTER_kNone __launch_bounds__(fastfp8::gemm::kThreads, 1)
#define FASTFP8_CLUSTER_kPair __cluster_dims__(2, 1, 1) __launch_bounds__(fastfp8::gemm::kThreads, 1)
#define FASTFP8_CLUSTER_kSplit __launch_bounds__(fastfp8::gemm::kThreads, 1, fastfp8::gemm::kMaxSplit)

// The entry of one instance. The launch plan lists its arguments in this order (csrc/gemm/plan.cpp).
#define FASTFP8_GEMM_SM90(NAME, TILE_M, TILE_N, SCALES, OUT, CLUSTER)                                        \
  extern "C" __global__ void FASTFP8_CLUSTER_##CLUSTER NAME(                                                 \
      const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                          \
      const __grid_constant__ CUtensorMap a_scale, const __grid_constant__ CUtensorMap b_scale,              \
      const __grid_constant__ CUtensorMap out_map, const float* b_block_scale, void* out, const void* c,     \
      int c_is_bf16, int c_pitch, int m, int n, int k, int tiles_m, int tiles_n, int band) {                 \
    extern __shared__ __align__(1024) uint8_t shared[];                                                      \
    const fastfp8::gemm::Arguments args{                                                                     \
        &a,        &b,      &a_scale, &b_scale, &out_map, b_block_scale,           out, c,                   \
        c_is_bf16, c_pitch, m,        n,        k,        {tiles_m, tiles_n, band}};                         \
    using namespace fastfp8;                                                                                 \
    using Shape = gemm::Instance<TILE_M, TILE_N, gemm::BScales::SCALES, DType::OUT, gemm::Cluster::CLUSTER>; \
    gemm::Kernel<Shape>{args, {shared}}.run();                                                               \
  }

// The same of a grouped product (csrc/gemm/plan.cpp).
#define FASTFP8_GROUPED_GEMM_SM90(NAME, TILE_M, TILE_N, OUT, CLUSTER)                                               \
  extern "C" __global__ void FASTFP8_CLUSTER_##CLUSTER NAME(                                                        \
      const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                                 \
      const __grid_constant__ CUtensorMap a_scale, const __grid_constant__ CUtensorMap out_map,                     \
      const float* b_block_scale, void* out, const int* ends, int* error, int groups, int group_rows, int m, int n, \
      int k, int tiles_n, int band) {                                                                               \
    extern __shared__ __align__(1024) uint8_t shared[];                                                             \
    const fastfp8::gemm::Arguments args{                                                                            \
        &a, &b, &a_scale, nullptr, &out_map,           b_block_scale, out,    nullptr,    0,                        \
        0,  m,  n,        k,       {0, tiles_n, band}, ends,          groups, group_rows, error};                   \
    using namespace fastfp8;                                                                                        \
    using Shape = gemm::Instance<TILE_M, TILE_N, gemm::BScales::kBlock, DType::OUT, gemm::Cluster::CLUSTER,         \
                                 gemm::Grouping::kRows>;                                                            \
    gemm::Kernel<Shape>{args, {shared}}.run();                                                                      \
  }

// The same of a product with K in groups: the output has m rows for each, and `accumulate` adds it to what it was.
#define FASTFP8_DEPTH_GEMM_SM90(NAME, TILE_M, TILE_N, OUT, CLUSTER)                                                    \
  extern "C" __global__ void FASTFP8_CLUSTER_##CLUSTER NAME(                                                           \
      const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                                    \
      const __grid_constant__ CUtensorMap a_scale, const __grid_constant__ CUtensorMap b_scale,                        \
      const __grid_constant__ CUtensorMap out_map, void* out, const int* ends, int* error, int accumulate, int groups, \
      int m, int n, int k, int tiles_m, int tiles_n, int band) {                                                       \
    extern __shared__ __align__(1024) uint8_t shared[];                                                                \
    using namespace fastfp8;                                                                                           \
    const gemm::Arguments args{&a,                                                                                     \
                               &b,                                                                                     \
                               &a_scale,                                                                               \
                               &b_scale,                                                                               \
                               &out_map,                                                                               \
                               nullptr,                                                                                \
                               out,                                                                                    \
                               accumulate ? out : nullptr,                                                             \
                               DType::OUT == DType::kBF16,                                                             \
                               n,                                                                                      \
                               m,                                                                                      \
                               n,                                                                                      \
                               k,                                                                                      \
                               {tiles_m, tiles_n, band},                                                               \
                               ends,                                                                                   \
                               groups,                                                                                 \
                               0,                                                                                      \
                               error};                                                                                 \
    using Shape = gemm::Instance<TILE_M, TILE_N, gemm::BScales::kRow, DType::OUT, gemm::Cluster::CLUSTER,              \
                                 gemm::Grouping::kDepth>;                                                              \
    gemm::Kernel<Shape>{args, {shared}}.run();                                                                         \
  }

// SwiGLU, dense or grouped: a dense one has neither ends nor groups (csrc/gemm/plan.cpp).
#define FASTFP8_SWIGLU_SM90(NAME, GROUPING, CLUSTER)                                                                   \
  extern "C" __global__ void FASTFP8_CLUSTER_##CLUSTER NAME(                                                           \
      const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                                    \
      const __grid_constant__ CUtensorMap a_scale, const __grid_constant__ CUtensorMap out_map,                        \
      const __grid_constant__ CUtensorMap gate_up_map, const float* b_block_scale, void* out, void* gate_up,           \
      float* out_scale, const float* weight, int64_t* counters, const int* ends, int* error, int groups, int m, int n, \
      int k, int tiles_m, int tiles_n, int band, int out_scale_pitch, int weight_stride, float limit, float floor,     \
      int pow2) {                                                                                                      \
    extern __shared__ __align__(1024) uint8_t shared[];                                                                \
    const fastfp8::gemm::Arguments args{&a,                                                                            \
                                        &b,                                                                            \
                                        &a_scale,                                                                      \
                                        nullptr,                                                                       \
                                        &out_map,                                                                      \
                                        b_block_scale,                                                                 \
                                        out,                                                                           \
                                        nullptr,                                                                       \
                                        0,                                                                             \
                                        0,                                                                             \
                                        m,                                                                             \
                                        n,                                                                             \
                                        k,                                                                             \
                                        {tiles_m, tiles_n, band},                                                      \
                                        ends,                                                                          \
                                        groups,                                                                        \
                                        0,                                                                             \
                                        error,                                                                         \
                                        &gate_up_map,                                                                  \
                                        gate_up,                                                                       \
                                        out_scale,                                                                     \
                                        weight,                                                                        \
                                        counters,                                                                      \
                                        out_scale_pitch,                                                               \
                                        weight_stride,                                                                 \
                                        limit,                                                                         \
                                        floor,                                                                         \
                                        pow2};                                                                         \
    using namespace fastfp8;                                                                                           \
    using Shape = gemm::Instance<128, 256, gemm::BScales::kBlock, DType::kE4M3, gemm::Cluster::CLUSTER,                \
                                 gemm::Grouping::GROUPING>;                                                            \
    gemm::Kernel<Shape>{args, {shared}}.run();                                                                         \
  }
