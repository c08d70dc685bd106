// FP8 GEMM with fine-grained scales for sm_90a: out[M, N] = A[M, K] B[N, K]^T (+ C), dense or with the rows in groups
// that have a B each (scheduler.cuh).
//
// A persistent CTA walks tiles. One producer warp keeps a ring of stages full, two consumer warpgroups share each tile
// (TileShape):
//
//   producer warp      wait empty[s] -> expect bytes on full[s] -> TMA A, B, scales into stage s
//   consumer 0   ... | wait full[s] | 4 wgmma k32 from zero | wait | free s | promote      | wait full[s+1] | ...
//   consumer 1   ...   promote      | wait full[s] | 4 wgmma k32 from zero | wait | free s | promote        | ...
//
// Promotion is acc = fma(scale_a * scale_b, partial, acc) in FP32 on the CUDA cores, once for each 128 of K. The
// consumers share nothing but the tensor core, so that one promotes while the other's wgmma runs. The order of K is
// fixed (Segments), so the bits of a row depend neither on M nor on the tile.
//
// The ring's phase runs on from tile to tile, hence the producer loads the next tile under the epilogue of this one.
//
// Cluster::kPair: two CTAs take two tiles one below the other. Both need the same rows of B: each loads half of them
// for both, which halves what B costs of L2's bandwidth. A stage is then free when the consumers of both CTAs are done
// with it, so they arrive on the empty barriers of both.
//
// Cluster::kSplit: the CTAs of a cluster take one tile, each a segment of its K, and add their sums through distributed
// shared memory (Epilogue::exchange_and_store).
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

  using Scheduler = std::conditional_t<I::kRows == Rows::kGroups, GroupedScheduler<I>, DenseScheduler<I>>;

  // CTAs that walk together: a pair takes two tiles at each index, a split one.
  __device__ __forceinline__ static int ranks() {
    if constexpr (I::kCluster == Cluster::kNone) return 1;
    return static_cast<int>(ptx::cluster_size());
  }
  __device__ __forceinline__ static int rank() {
    if constexpr (I::kCluster == Cluster::kNone) return 0;
    return static_cast<int>(ptx::cluster_rank());
  }
  __device__ __forceinline__ Segments segments() const { return Segments::of(args.n, args.k, I::kScales); }

  // One elected thread.
  __device__ __forceinline__ void produce() const {
    constexpr int kShare = I::kTile.n / I::kSharers;  // rows of B that this CTA loads
    constexpr uint16_t kAll = (1 << I::kSharers) - 1;
    const Segments segments = this->segments();
    const int first = kSplit ? segments.first(rank()) : 0;
    const int last = kSplit ? segments.first(rank() + 1) : segments.blocks;
    const int begin = blockIdx.x / ranks(), step = gridDim.x / ranks();
    const Scheduler scheduler(args, shared, rank());
    const int tiles = scheduler.tiles();
    if (I::kRows == Rows::kAll && begin < tiles) {
      const int b_row = scheduler.at(begin).b_row + (I::kSharers > 1 ? rank() * kShare : 0);
      for (int block = first; block < last && block < first + I::kPlan.stages; ++block)
        ptx::tma_prefetch_2d(args.b, block * kTileK, b_row);
    }
    ptx::wait_for_grids_before();
    Ring<I::kPlan.stages> ring;
    for (int index = begin; index < tiles; index += step) {
      const Tile tile = scheduler.at(index);
      const int scales_row = tile.row / SharedPlan::kScaleAlignment * SharedPlan::kScaleAlignment;
      for (int block = first; block < last; ++block, ring.advance()) {
        const int stage = ring.stage, k = block * kTileK;
        uint64_t* full = shared.full(stage);
        wait(shared.empty(stage), ring.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, SharedPlan::stage_bytes(I::kTile, I::kScales, I::kRows));
        ptx::tma_load_2d(shared.a(stage), args.a, full, k, tile.row);
        if constexpr (I::kSharers == 1)
          ptx::tma_load_2d(shared.b(stage), args.b, full, k, tile.b_row);
        else
          ptx::tma_load_2d_multicast(shared.b(stage) + rank() * kShare * kTileK, args.b, full, k,
                                     tile.b_row + rank() * kShare, kAll);
        ptx::tma_load_2d(shared.a_scale(stage), args.a_scale, full, scales_row, block);
        if constexpr (I::kScales == BScales::kRow)
          ptx::tma_load_2d(shared.b_scale(stage), args.b_scale, full, tile.b_row, block);
      }
    }
    ptx::let_next_grid_start();
  }

  __device__ __forceinline__ void consume(int consumer) const {
    using Acc = Fragment<I::kColumns>;
    const Segments segments = this->segments();
    Mainloop<I> mainloop{shared, consumer, {}};
    Epilogue<I> epilogue{args, shared, consumer};
    ptx::wait_for_grids_before();
    const Scheduler scheduler(args, shared, rank());
    const int tiles = scheduler.tiles();
    for (int index = blockIdx.x / ranks(); index < tiles; index += gridDim.x / ranks()) {
      const Tile tile = scheduler.at(index);
      const int first = kSplit ? segments.first(rank()) : 0;
      const int last = kSplit ? segments.first(rank() + 1) : segments.blocks;
      const float* scales = args.b_block_scale + static_cast<int64_t>(tile.scale_row) * segments.blocks + first;
      BlockScales block_scales(scales, I::kScales == BScales::kBlock ? last - first : 0, Mainloop<I>::lane());
      Acc acc;
      if constexpr (kSplit) {
        mainloop.run(acc, block_scales, tile.row, 0, last - first);
        epilogue.exchange_and_store(acc, tile, rank(), ranks());
      } else {
#pragma unroll 1
        for (int segment = 0; segment < segments.count; ++segment) {
          Acc sum;
          mainloop.run(sum, block_scales, tile.row, segments.first(segment), segments.first(segment + 1));
#pragma unroll
          for (int v = 0; v < I::kColumns / 2; ++v)
            acc.value[v] = segment == 0 ? sum.value[v] : __fadd_rn(acc.value[v], sum.value[v]);
        }
        epilogue.store(acc, tile);
      }
    }
    epilogue.drain();
  }

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(args.a);
      ptx::prefetch_tensor_map(args.b);
      ptx::prefetch_tensor_map(args.a_scale);
      if (I::kScales == BScales::kRow) ptx::prefetch_tensor_map(args.b_scale);
      if (I::kOut == DType::kBF16 && !kSplit) ptx::prefetch_tensor_map(args.out_map);
#pragma unroll
      for (int stage = 0; stage < I::kPlan.stages; ++stage) {
        ptx::mbarrier_init(shared.full(stage), 1);
        ptx::mbarrier_init(shared.empty(stage), kConsumers * 4 * I::kSharers);
      }
      if constexpr (kSplit) {
        ptx::mbarrier_init(shared.ready(), ranks());
        ptx::mbarrier_init(shared.drained(), ranks());
      }
      ptx::fence_mbarrier_init();
    }
    if constexpr (I::kRows == Rows::kGroups) {
      // The ends may come from the grid before.
      ptx::wait_for_grids_before();
      if (threadIdx.x < 32) Scheduler::set_up(args, shared);
    }
    sync_all();
    // Warp-uniform for the compiler too: setmaxnreg and wgmma must not sit under divergent control flow.
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
      ptx::setmaxnreg_dec<kProducerRegisters>();
      if (threadIdx.x < 32 && ptx::elect_one()) produce();
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
#define FASTFP8_GROUPED_GEMM_SM90(NAME, TILE_M, TILE_N, OUT)                                                          \
  extern "C" __global__ void FASTFP8_CLUSTER_kNone NAME(                                                              \
      const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                                   \
      const __grid_constant__ CUtensorMap a_scale, const __grid_constant__ CUtensorMap out_map,                       \
      const float* b_block_scale, void* out, const int* ends, int* error, int groups, int group_rows, int m, int n,   \
      int k, int tiles_n, int band) {                                                                                 \
    extern __shared__ __align__(1024) uint8_t shared[];                                                               \
    const fastfp8::gemm::Arguments args{                                                                              \
        &a, &b, &a_scale, nullptr, &out_map,           b_block_scale, out,    nullptr,    0,                          \
        0,  m,  n,        k,       {0, tiles_n, band}, ends,          groups, group_rows, error};                     \
    using namespace fastfp8;                                                                                          \
    using Shape =                                                                                                     \
        gemm::Instance<TILE_M, TILE_N, gemm::BScales::kBlock, DType::OUT, gemm::Cluster::kNone, gemm::Rows::kGroups>; \
    gemm::Kernel<Shape>{args, {shared}}.run();                                                                        \
  }
