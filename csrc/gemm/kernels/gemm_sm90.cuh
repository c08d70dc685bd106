// Dense FP8 GEMM with fine-grained scales for sm_90a: out[M, N] = A[M, K] B[N, K]^T (+ C).
//
// A persistent CTA walks tiles of kTileM x kTileN. One producer warp keeps a ring of stages full, two consumer
// warpgroups take 64 rows of the tile each:
//
//   producer warp      wait empty[s] -> expect bytes on full[s] -> TMA A, B, scales into stage s
//   consumer 0   ... | wait full[s] | 4 wgmma k32 from zero | wait | free s | promote      | wait full[s+1] | ...
//   consumer 1   ...   promote      | wait full[s] | 4 wgmma k32 from zero | wait | free s | promote        | ...
//
// Promotion is acc = fma(scale_a * scale_b, partial, acc) in FP32 on the CUDA cores, once for each 128 of K. The
// consumers share nothing but the tensor core, so that one promotes while the other's wgmma runs. The order of K is
// fixed, so the bits of a row depend neither on M nor on the tile.
//
// The ring's phase runs on from tile to tile, hence the producer loads the next tile under the epilogue of this one.
//
// A cluster of two CTAs takes two tiles one below the other. Both need the same rows of B: each loads half of them for
// both, which halves what B costs of L2's bandwidth. A stage is then free when the consumers of both CTAs are done with
// it, so they arrive on the empty barriers of both.
#pragma once
#include "../../ptx/cluster.cuh"
#include "../../ptx/tma.cuh"
#include "../../ptx/warp.cuh"
#include "../../ptx/wgmma.cuh"
#include "../config.h"

namespace fastfp8::gemm {

// Kernel parameters but for the tensor maps, which must stay __grid_constant__ parameters of the entry.
struct Arguments {
  const CUtensorMap *a, *b, *a_scale, *b_scale, *out_map;
  const float* b_block_scale;  // BScales::kBlock: [ceil(N / 128), ceil(K / 128)], row-major
  float* out;                  // FP32 output: [M, N], row-major
  const void* c;               // nullptr, or [M, N] of c_type with rows c_pitch elements apart
  int c_is_bf16, c_pitch;
  int m, n, k;
  TileOrder order;
};

// Position in the ring of stages. A barrier's first completion has parity 0: consumers wait for `phase`, the producer
// for the other one, which a fresh barrier grants at once.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

template <int kTileN, BScales kScales, DType kOut, int kCluster>
struct Kernel {
  static constexpr SharedPlan kPlan = SharedPlan::make(kTileN, kScales, kOut);
  static_assert(kPlan.stages >= 3 && kPlan.bytes <= kMaxShared);
  static_assert(kCluster == 1 || kCluster == 2);
  static_assert(128 % kTileN == 0, "a tile takes its B scale from one block of 128 rows");

  const Arguments& args;
  uint8_t* shared;

  __device__ __forceinline__ uint8_t* a_stage(int stage) const {
    return shared + kPlan.a + stage * SharedPlan::kAStage;
  }
  __device__ __forceinline__ uint8_t* b_stage(int stage) const {
    return shared + kPlan.b + stage * SharedPlan::b_stage(kTileN);
  }
  __device__ __forceinline__ float* a_scale_stage(int stage) const {
    return reinterpret_cast<float*>(shared + kPlan.a_scale + stage * SharedPlan::kAScaleStage);
  }
  __device__ __forceinline__ float* b_scale_stage(int stage) const {
    return reinterpret_cast<float*>(shared + kPlan.b_scale + stage * SharedPlan::b_scale_stage(kTileN, kScales));
  }
  __device__ __forceinline__ uint64_t* full() const { return reinterpret_cast<uint64_t*>(shared + kPlan.full); }
  __device__ __forceinline__ uint64_t* empty() const { return reinterpret_cast<uint64_t*>(shared + kPlan.empty); }

  __device__ __forceinline__ int tiles() const { return args.order.tiles_m * args.order.tiles_n; }
  // The walk of a CTA: its cluster takes kCluster tiles at each index.
  __device__ __forceinline__ int first() const { return blockIdx.x / kCluster; }
  __device__ __forceinline__ int step() const { return gridDim.x / kCluster; }
  __device__ __forceinline__ int rank() const {
    if constexpr (kCluster == 1) return 0;
    return static_cast<int>(ptx::cluster_rank());
  }
  __device__ __forceinline__ int k_blocks() const { return (args.k + kTileK - 1) / kTileK; }

  // One elected thread.
  __device__ __forceinline__ void produce() const {
    constexpr int kShare = kTileN / kCluster;  // rows of B that this CTA loads
    constexpr uint16_t kAll = (1 << kCluster) - 1;
    Ring<kPlan.stages> ring;
    for (int index = first(); index < tiles(); index += step()) {
      const auto tile = args.order.at(index);
      const int row = (tile.m * kCluster + rank()) * kTileM, column = tile.n * kTileN;
      for (int block = 0; block < k_blocks(); ++block, ring.advance()) {
        const int stage = ring.stage;
        uint64_t* full_barrier = full() + stage;
        wait(empty() + stage, ring.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(full_barrier, SharedPlan::stage_bytes(kTileN, kScales));
        ptx::tma_load_2d(a_stage(stage), args.a, full_barrier, block * kTileK, row);
        if constexpr (kCluster == 1)
          ptx::tma_load_2d(b_stage(stage), args.b, full_barrier, block * kTileK, column);
        else
          ptx::tma_load_2d_multicast(b_stage(stage) + rank() * kShare * kTileK, args.b, full_barrier, block * kTileK,
                                     column + rank() * kShare, kAll);
        ptx::tma_load_2d(a_scale_stage(stage), args.a_scale, full_barrier, row, block);
        if constexpr (kScales == BScales::kRow)
          ptx::tma_load_2d(b_scale_stage(stage), args.b_scale, full_barrier, column, block);
      }
    }
  }

  // The accumulator fragment of a thread: two rows, kTileN / 4 columns of each. See wgmma_m64k32_e4m3.
  struct Fragment {
    float value[kTileN / 2];
  };

  // scale_b of each k-block of a tile column in BScales::kBlock: lane l holds that of k-block 32 i + l, loaded a chunk
  // of 32 ahead of its use, so that neither shared memory nor latency is spent on a value that is the same for the
  // whole tile.
  struct BlockScales {
    const float* row;
    int count;
    float now, next;

    __device__ __forceinline__ BlockScales(const float* row, int count, int lane) : row(row), count(count), now(0) {
      next = load(lane);
    }
    __device__ __forceinline__ float load(int block) const { return block < count ? __ldg(row + block) : 0.0f; }
    __device__ __forceinline__ float at(int block, int lane) {
      if (block % 32 == 0) {
        now = next;
        next = load(block + 32 + lane);
      }
      return __shfl_sync(0xffffffff, now, block % 32);
    }
  };

  // acc += scale_a * scale_b * partial, for the two rows of a thread.
  __device__ __forceinline__ static void promote(Fragment& acc, const Fragment& partial, const float (&row_scale)[2],
                                                 const float2 (&column_scale)[kTileN / 8]) {
#pragma unroll
    for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float scale = __fmul_rn(row_scale[v / 2], v % 2 ? column_scale[j].y : column_scale[j].x);
        acc.value[4 * j + v] = __fmaf_rn(scale, partial.value[4 * j + v], acc.value[4 * j + v]);
      }
    }
  }

  // The same where one scale_b serves all columns: two products in place of kTileN / 2.
  __device__ __forceinline__ static void promote(Fragment& acc, const Fragment& partial, const float (&row_scale)[2],
                                                 float block_scale) {
    const float scale[2] = {__fmul_rn(row_scale[0], block_scale), __fmul_rn(row_scale[1], block_scale)};
#pragma unroll
    for (int v = 0; v < kTileN / 2; ++v) acc.value[v] = __fmaf_rn(scale[v / 2 % 2], partial.value[v], acc.value[v]);
  }

  // One warpgroup, 64 rows of one tile: all of K into acc.
  __device__ __forceinline__ void mainloop(Fragment& acc, Ring<kPlan.stages>& ring, int consumer, int column) const {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int fragment_row = consumer * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
    for (float& value : acc.value) value = 0.0f;
    const int blocks = k_blocks();
    BlockScales block_scales(args.b_block_scale + static_cast<int64_t>(column / 128) * blocks,
                             kScales == BScales::kBlock ? blocks : 0, lane);
    for (int block = 0; block < blocks; ++block, ring.advance()) {
      const int stage = ring.stage;
      wait(full() + stage, ring.phase);
      Fragment partial;
      const uint64_t a = ptx::wgmma_descriptor_k_major_128b(a_stage(stage) + consumer * 64 * kTileK);
      const uint64_t b = ptx::wgmma_descriptor_k_major_128b(b_stage(stage));
      ptx::pin_registers(partial.value);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileK / 32; ++k)  // 32 bytes further along K: 2 in the descriptor's units of 16
        ptx::wgmma_m64k32_e4m3<kTileN>(partial.value, a + 2 * k, b + 2 * k, k > 0);
      ptx::wgmma_commit_group();
      // Under the wgmma, and before the stage is given back.
      const float* a_scales = a_scale_stage(stage) + fragment_row;
      const float row_scale[2] = {a_scales[0], a_scales[8]};
      if constexpr (kScales == BScales::kRow) {
        float2 column_scale[kTileN / 8];
#pragma unroll
        for (int j = 0; j < kTileN / 8; ++j)
          column_scale[j] = *reinterpret_cast<const float2*>(b_scale_stage(stage) + 8 * j + 2 * (lane % 4));
        finish(partial, stage, lane);
        promote(acc, partial, row_scale, column_scale);
      } else {
        const float block_scale = block_scales.at(block, lane);
        finish(partial, stage, lane);
        promote(acc, partial, row_scale, block_scale);
      }
    }
  }

  // The partial product is there, and this warp is done with the stage.
  __device__ __forceinline__ void finish(Fragment& partial, int stage, int lane) const {
    ptx::wgmma_wait_group<0>();
    ptx::pin_registers(partial.value);
    __syncwarp();  // one lane arrives for the reads of scales of all
    if constexpr (kCluster == 1) {
      if (lane == 0) ptx::mbarrier_arrive(empty() + stage);
    } else {
      if (lane < kCluster) ptx::mbarrier_arrive_remote(empty() + stage, lane);
    }
  }

  // acc += c, read in the fragment's layout: a quad of lanes reads 8 neighbours of a row.
  __device__ __forceinline__ void add_c(Fragment& acc, int row, int column) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= args.m) continue;
      const int64_t offset = static_cast<int64_t>(row + 8 * half) * args.c_pitch + column;
#pragma unroll
      for (int j = 0; j < kTileN / 8; ++j) {
        if (column + 8 * j >= args.n) continue;
        float low, high;
        if (args.c_is_bf16) {
          const uint32_t pair =
              *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(args.c) + offset + 8 * j);
          low = __uint_as_float(pair << 16);
          high = __uint_as_float(pair & 0xffff0000u);
        } else {
          const float2 pair = *reinterpret_cast<const float2*>(static_cast<const float*>(args.c) + offset + 8 * j);
          low = pair.x;
          high = pair.y;
        }
        acc.value[4 * j + 2 * half] = __fadd_rn(acc.value[4 * j + 2 * half], low);
        acc.value[4 * j + 2 * half + 1] = __fadd_rn(acc.value[4 * j + 2 * half + 1], high);
      }
    }
  }

  // FP32 goes straight to global memory: a quad of lanes writes one whole 32-byte sector, so staging would save
  // nothing.
  __device__ __forceinline__ void store_f32(const Fragment& acc, int row, int column) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= args.m) continue;
      float* out = args.out + static_cast<int64_t>(row + 8 * half) * args.n + column;
#pragma unroll
      for (int j = 0; j < kTileN / 8; ++j) {
        if (column + 8 * j >= args.n) continue;
        *reinterpret_cast<float2*>(out + 8 * j) = {acc.value[4 * j + 2 * half], acc.value[4 * j + 2 * half + 1]};
      }
    }
  }

  // BF16 through shared memory, in panels of one swizzle span: stmatrix writes them without a bank conflict, and one
  // TMA store a panel writes them out and clips at M and N. Each consumer stages and stores its own 64 rows.
  __device__ __forceinline__ void store_bf16(const Fragment& acc, int consumer, int tile_row, int tile_column) const {
    constexpr int kColumns = out_panel_columns(kTileN), kRowBytes = kColumns * 2, kPanelBytes = 64 * kRowBytes;
    constexpr int kChunks = kRowBytes / 16;  // of 16 bytes; the swizzle permutes them within a row
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const uint32_t barrier = 1 + consumer;  // 0 is __syncthreads
    uint8_t* panels = shared + kPlan.out + consumer * (64 * kTileN * 2);

    // The thread that stores is the one whose bulk groups tell when the last tile's panels have been read.
    const bool storer = warp == 0 && ptx::elect_one();
    if (storer) ptx::bulk_wait_group_read<0>();
    ptx::named_barrier_sync(barrier, 128);
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < kTileN / 16; ++j) {
      const int chunk = 2 * j + lane / 16;
      const int offset = row * kRowBytes + chunk % kChunks * 16;
      const int swizzled = offset ^ (offset >> 7 & (kChunks - 1)) << 4;
      const float* v = acc.value + 8 * j;
      ptx::stmatrix_x4(panels + chunk / kChunks * kPanelBytes + swizzled, ptx::bf16x2(v[0], v[1]),
                       ptx::bf16x2(v[2], v[3]), ptx::bf16x2(v[4], v[5]), ptx::bf16x2(v[6], v[7]));
    }
    ptx::fence_proxy_async_shared();  // by every writer, before the barrier that lets the storer go
    ptx::named_barrier_sync(barrier, 128);
    if (!storer) return;
    const int first_row = tile_row + consumer * 64;
    if (first_row < args.m) {
#pragma unroll
      for (int panel = 0; panel < kTileN / kColumns; ++panel) {
        const int column = tile_column + panel * kColumns;
        if (column < args.n) ptx::tma_store_2d(args.out_map, panels + panel * kPanelBytes, column, first_row);
      }
    }
    ptx::bulk_commit_group();
  }

  __device__ __forceinline__ void consume(int consumer) const {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    Ring<kPlan.stages> ring;
    for (int index = first(); index < tiles(); index += step()) {
      const auto tile = args.order.at(index);
      const int tile_row = (tile.m * kCluster + rank()) * kTileM, tile_column = tile.n * kTileN;
      const int row = tile_row + consumer * 64 + thread / 32 * 16 + lane / 4, column = tile_column + 2 * (lane % 4);
      Fragment acc;
      mainloop(acc, ring, consumer, tile_column);
      if (args.c != nullptr) add_c(acc, row, column);
      if constexpr (kOut == DType::kBF16)
        store_bf16(acc, consumer, tile_row, tile_column);
      else
        store_f32(acc, row, column);
    }
    // Shared memory must outlive the reads of the last stores.
    if (kOut == DType::kBF16 && thread < 32 && ptx::elect_one()) ptx::bulk_wait_group_read<0>();
  }

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(args.a);
      ptx::prefetch_tensor_map(args.b);
      ptx::prefetch_tensor_map(args.a_scale);
      if (kScales == BScales::kRow) ptx::prefetch_tensor_map(args.b_scale);
      if (kOut == DType::kBF16) ptx::prefetch_tensor_map(args.out_map);
#pragma unroll
      for (int stage = 0; stage < kPlan.stages; ++stage) {
        ptx::mbarrier_init(full() + stage, 1);
        ptx::mbarrier_init(empty() + stage, kConsumers * 4 * kCluster);
      }
      ptx::fence_mbarrier_init();
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
    // A peer may still write here, or arrive.
    if constexpr (kCluster > 1) sync_all();
  }

  __device__ __forceinline__ static void sync_all() {
    if constexpr (kCluster == 1) {
      __syncthreads();
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
};

}  // namespace fastfp8::gemm

#define FASTFP8_CLUSTER_1
#define FASTFP8_CLUSTER_2 __cluster_dims__(2, 1, 1)

// The entry of one instance. The launch plan lists its arguments in this order (csrc/gemm/plan.cpp).
#define FASTFP8_GEMM_SM90(NAME, TILE_N, SCALES, OUT, CLUSTER)                                                        \
  extern "C" __global__ void FASTFP8_CLUSTER_##CLUSTER __launch_bounds__(fastfp8::gemm::kThreads, 1)                 \
      NAME(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                             \
           const __grid_constant__ CUtensorMap a_scale, const __grid_constant__ CUtensorMap b_scale,                 \
           const __grid_constant__ CUtensorMap out_map, const float* b_block_scale, float* out, const void* c,       \
           int c_is_bf16, int c_pitch, int m, int n, int k, int tiles_m, int tiles_n, int band) {                    \
    extern __shared__ __align__(1024) uint8_t shared[];                                                              \
    const fastfp8::gemm::Arguments args{                                                                             \
        &a,        &b,      &a_scale, &b_scale, &out_map, b_block_scale,           out, c,                           \
        c_is_bf16, c_pitch, m,        n,        k,        {tiles_m, tiles_n, band}};                                 \
    fastfp8::gemm::Kernel<TILE_N, fastfp8::gemm::BScales::SCALES, fastfp8::DType::OUT, CLUSTER>{args, shared}.run(); \
  }
