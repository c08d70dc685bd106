// The consumers' main loop: wgmma on a stage, then promotion of its partial sums in FP32. One for every kernel.
#pragma once
#include "../../ptx/cluster.cuh"
#include "../../ptx/wgmma.cuh"
#include "instance.cuh"

namespace fastfp8::gemm {

// scale_b of each k-block of a tile in BScales::kBlock, for each pass: lane l holds that of k-block 32 i + l, loaded a
// chunk of 32 ahead of its use, so that neither shared memory nor latency is spent on a value that is the same for the
// whole tile.
template <int kPasses>
struct BlockScales {
  const float* row;  // of the first pass
  int to_next_pass;  // elements
  int count;
  float now[kPasses], next[kPasses];

  __device__ __forceinline__ BlockScales(const float* row, int to_next_pass, int count, int lane)
      : row(row), to_next_pass(to_next_pass), count(count) {
    load(lane);
  }
  __device__ __forceinline__ void load(int block) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      next[pass] = block < count ? __ldg(row + pass * to_next_pass + block) : 0.0f;
  }
  // To be asked for each block in turn, and for each pass in turn.
  __device__ __forceinline__ float at(int block, int pass, int lane) {
    const uint32_t within = static_cast<uint32_t>(block) % 32;
    if (pass == 0 && within == 0) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) now[p] = next[p];
      load(block + 32 + lane);
    }
    return __shfl_sync(0xffffffff, now[pass], within);
  }
};

// acc += scale_a * scale_b * partial, for the two rows of a thread. acc: of the columns of a pass.
template <int kColumns>
__device__ __forceinline__ void promote(float* acc, const Fragment<kColumns>& partial, const float (&row_scale)[2],
                                        const float2 (&column_scale)[kColumns / 8]) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float scale = __fmul_rn(row_scale[v / 2], v % 2 ? column_scale[j].y : column_scale[j].x);
      acc[4 * j + v] = __fmaf_rn(scale, partial.value[4 * j + v], acc[4 * j + v]);
    }
  }
}

// The same where one scale_b serves all columns: two products in place of kColumns / 2.
template <int kColumns>
__device__ __forceinline__ void promote(float* acc, const Fragment<kColumns>& partial, const float (&row_scale)[2],
                                        float block_scale) {
  const float scale[2] = {__fmul_rn(row_scale[0], block_scale), __fmul_rn(row_scale[1], block_scale)};
#pragma unroll
  for (int v = 0; v < kColumns / 2; ++v) acc[v] = __fmaf_rn(scale[v / 2 % 2], partial.value[v], acc[v]);
}

// One consumer warpgroup: its part of a tile, over a range of k-blocks.
template <class I>
struct Mainloop {
  using Acc = Fragment<I::kColumns>;
  using Partial = Fragment<I::kPassColumns>;

  Shared<I> shared;
  int consumer;
  // Of two consumers that are to be a k-block apart, so that one's epilogue runs under the other's wgmma: this one has
  // not yet met the other. The first arrives where its first k-block ends, the second waits there before its own.
  bool to_meet;
  Ring<I::kPlan.stages> ring{};

  __device__ __forceinline__ static int thread() { return threadIdx.x % 128; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  // acc = the sum over k-blocks [first, last) of those that `block_scales` counts from 0, for the tile whose
  // rows of A begin at `a_row`.
  __device__ __forceinline__ void run(Acc& acc, BlockScales<I::kPasses>& block_scales, int a_row, int first, int last) {
    const int behind = I::kGrouping == Grouping::kRows ? a_row % SharedPlan::kScaleAlignment : 0;
    const int fragment_row = I::first_row(consumer) + thread() / 32 * 16 + lane() / 4 + behind;
    const uint32_t a_stage_0 = ptx::wgmma_address(shared.a(0) + I::first_row(consumer) * kTileK);
    const uint32_t b_stage_0 = ptx::wgmma_address(shared.b(0) + I::first_column(consumer) * kTileK);
    if (to_meet && consumer > 0) {
      ptx::named_barrier_sync(kLeadBarrier, kConsumers * 128);
      to_meet = false;
    }
#pragma unroll
    for (float& value : acc.value) value = 0.0f;
    int block = first;
#pragma unroll 1
    for (int stop = to_meet ? min(first + 1, last) : last;; stop = last) {
      for (; block < stop; ++block, ring.advance()) {
        const int stage = ring.stage;
        wait(shared.full(stage), ring.phase);
        const uint32_t a = a_stage_0 + stage * (SharedPlan::a_stage(I::kTile) >> 4);
        const uint32_t b = b_stage_0 + stage * (SharedPlan::b_stage(I::kTile) >> 4);
        const uint32_t rows = I::kSwapped ? b : a, columns = I::kSwapped ? a : b;
        float row_scale[2];
#pragma unroll
        for (int pass = 0; pass < I::kPasses; ++pass) {
          Partial partial;
          ptx::pin_registers(partial.value);
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < kTileK / 32; ++k)  // 32 bytes further along K
            ptx::wgmma_m64k32_e4m3<I::kPassColumns>(
                partial.value, ptx::wgmma_descriptor_k_major_128b(rows + 2 * k),
                ptx::wgmma_descriptor_k_major_128b(columns + (pass * I::kPassColumns * kTileK >> 4) + 2 * k), k > 0);
          ptx::wgmma_commit_group();
          // Under the wgmma, and before the stage is given back.
          float* sums = acc.value + pass * (I::kPassColumns / 2);
          if (pass == 0 && !I::kSwapped) {
            const float* a_scales = shared.a_scale(stage) + fragment_row;
            row_scale[0] = a_scales[0], row_scale[1] = a_scales[8];
          }
          if constexpr (I::kScales == BScales::kBlock && !I::kSwapped) {
            const float block_scale = block_scales.at(block, pass, lane());
            finish(partial, stage, pass == I::kPasses - 1);
            promote(sums, partial, row_scale, block_scale);
          } else {  // a scale for each column: of B, or where the operands are swapped of A
            if constexpr (I::kSwapped) row_scale[0] = row_scale[1] = block_scales.at(block, pass, lane());
            const float* scales =
                I::kSwapped ? shared.a_scale(stage) + behind : shared.b_scale(stage) + I::first_column(consumer);
            float2 column_scale[I::kColumns / 8];
#pragma unroll
            for (int j = 0; j < I::kColumns / 8; ++j) {
              const float* pair = scales + 8 * j + 2 * (lane() % 4);
              column_scale[j] = {pair[0], pair[1]};
            }
            finish(partial, stage, true);
            promote(sums, partial, row_scale, column_scale);
          }
        }
      }
      if (to_meet) {
        ptx::named_barrier_arrive(kLeadBarrier, kConsumers * 128);
        to_meet = false;
      }
      if (block == last) return;
    }
  }

  // The partial product is there, and after the last pass this warp is done with the stage.
  __device__ __forceinline__ void finish(Partial& partial, int stage, bool done) const {
    ptx::wgmma_wait_group<0>();
    ptx::pin_registers(partial.value);
    if (!done) return;
    __syncwarp();  // one lane arrives for the reads of scales of all
    if constexpr (I::kSharers == 1) {
      if (lane() == 0) ptx::mbarrier_arrive(shared.empty(stage));
    } else {
      if (lane() < I::kSharers) ptx::mbarrier_arrive_remote(shared.empty(stage), lane());
    }
  }
};

}  // namespace fastfp8::gemm
