// The consumers' main loop: wgmma on a stage, then promotion of its partial sums in FP32. One for every kernel.
#pragma once
#include "../../ptx/cluster.cuh"
#include "../../ptx/wgmma.cuh"
#include "instance.cuh"

namespace fastfp8::gemm {

// scale_b of each k-block of a tile in BScales::kBlock, for each pass: lane l holds that of the k-block in stage l of
// this turn of the ring, loaded a turn ahead, so that neither shared memory nor latency is spent on a value that is the
// same for the whole tile.
template <int kPasses, int kStages>
struct BlockScales {
  uint32_t block, count;  // the k-block of `next`; it is past count before the first, and in a lane that has no stage
  const float* from[kPasses];
  float now[kPasses]{}, next[kPasses]{};

  // For a tile of `count` k-blocks, the first of them in stage `stage`, whose scales are at `row` and, of the second
  // pass, `to_next_pass` elements further on.
  __device__ __forceinline__ BlockScales(const float* row, int to_next_pass, int count, int stage, int lane)
      : block(lane < kStages ? lane - stage : 1 << 30), count(count) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) from[pass] = row + pass * to_next_pass + (lane - stage);
    load();
    turn();
  }
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      if (block < count) next[pass] = __ldg(from[pass]);
  }
  // Where the ring comes round to its first stage.
  __device__ __forceinline__ void turn() {
    block += kStages;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) now[pass] = next[pass], from[pass] += kStages;
    load();
  }
  __device__ __forceinline__ float at(int stage, int pass) const { return __shfl_sync(0xffffffff, now[pass], stage); }
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

// The same where one scale_b serves all columns: `scale` is its product with the scale of each row.
template <int kColumns>
__device__ __forceinline__ void promote(float* acc, const Fragment<kColumns>& partial, float2 scale) {
#pragma unroll
  for (int v = 0; v < kColumns / 2; ++v) acc[v] = __fmaf_rn(v / 2 % 2 ? scale.y : scale.x, partial.value[v], acc[v]);
}

// The scaler's part of a k-block (has_scaler): scale_a * scale_b of a tile's rows, each row beside the one 8 further
// down that the same thread of a consumer promotes.
template <class I>
__device__ __forceinline__ void multiply_scales(const Shared<I>& shared, int stage, int behind, float block_scale) {
  const int lane = threadIdx.x % 32;
  const float* a_scales = shared.a_scale(stage) + behind;
#pragma unroll
  for (int pair = lane; pair < I::kTile.m / 2; pair += 32) {
    const int row = pair / 8 * 16 + pair % 8;
    // Two groups of 16 rows give their upper halves first: so the lanes of a load read 32 banks.
    const int first = pair / 16 % 2 * 8;
    const float x = __fmul_rn(a_scales[row + first], block_scale),
                y = __fmul_rn(a_scales[row + 8 - first], block_scale);
    shared.products(stage)[pair] = first == 0 ? float2{x, y} : float2{y, x};
  }
}

// One consumer warpgroup: its part of a tile, over a range of k-blocks.
//
// Whole turns of the ring are unrolled where a tile promotes enough for it to pay (Instance::kTurns): what is left
// beside wgmma and FFMA then has its addresses and its parity from a few registers. A tile's k-blocks before and behind
// its whole turns go one by one.
template <class I>
struct Mainloop {
  using Acc = Fragment<I::kColumns>;
  using Partial = Fragment<I::kPassColumns>;
  using Scales = BlockScales<I::kPasses, I::kPlan.stages>;
  static constexpr int kStages = I::kPlan.stages;

  Shared<I> shared;
  int consumer;
  // Of two consumers that are to be a k-block apart, so that one's epilogue runs under the other's wgmma: this one has
  // not yet met the other. The first arrives where its first k-block ends, the second waits there before its own.
  bool to_meet;
  Ring<kStages> ring{};
  // kPair: this lane's empty[0], of one CTA in even lanes and of the other in odd ones.
  uint32_t empty_0 = 0;

  __device__ __forceinline__ static int thread() { return threadIdx.x % 128; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  // Descriptors of the first slices along K of what this warpgroup multiplies. Sums of 64 bits cost one instruction
  // each; of 32 bits two, for the upper half is then set again before each wgmma.
  struct Operands {
    uint64_t a, b;
  };

  // acc = the sum over k-blocks [first, last) of those that `block_scales` counts from 0, for the tile whose
  // rows of A begin at `a_row`.
  __device__ __forceinline__ void run(Acc& acc, Scales& block_scales, int a_row, int first, int last) {
    const int behind = I::kGrouping == Grouping::kRows ? a_row % SharedPlan::kScaleAlignment : 0;
    Operands operands = {ptx::wgmma_descriptor_k_major_128b(shared.a(0) + I::first_row(consumer) * kTileK),
                         ptx::wgmma_descriptor_k_major_128b(shared.b(0) + I::first_column(consumer) * kTileK)};
    ptx::pin_register(operands.a), ptx::pin_register(operands.b);
    if constexpr (I::kSharers > 1) empty_0 = ptx::remote_address(shared.empty(0), lane() % I::kSharers);
    if (to_meet && consumer > 0) {
      ptx::named_barrier_sync(kLeadBarrier, kConsumers * 128);
      to_meet = false;
    }
#pragma unroll
    for (float& value : acc.value) value = 0.0f;
    int left = last - first;
#pragma unroll 1
    while (left > 0) {
      if (I::kTurns && ring.stage == 0 && left >= kStages && !to_meet) {
#pragma unroll 1
        do {
#pragma unroll
          for (int stage = 0; stage < kStages; ++stage) multiply(acc, block_scales, operands, behind, stage);
          ring.turn();
          block_scales.turn();
          left -= kStages;
        } while (left >= kStages);
        continue;
      }
      multiply(acc, block_scales, operands, behind, ring.stage);
      ring.advance();
      if (ring.stage == 0) block_scales.turn();
      --left;
      if (to_meet) {
        ptx::named_barrier_arrive(kLeadBarrier, kConsumers * 128);
        to_meet = false;
      }
    }
  }

  // acc += the product of the k-block in a stage, of the operands in stage 0. Scales of A lie `behind` elements behind
  // where they were loaded.
  __device__ __forceinline__ void multiply(Acc& acc, const Scales& block_scales, const Operands& operands, int behind,
                                           int stage) const {
    const int fragment_row = I::first_row(consumer) + thread() / 32 * 16 + lane() / 4;
    const uint64_t a = operands.a + static_cast<uint32_t>(stage * (SharedPlan::a_stage(I::kTile) >> 4));
    const uint64_t b = operands.b + static_cast<uint32_t>(stage * (SharedPlan::b_stage(I::kTile) >> 4));
    const uint64_t rows = I::kSwapped ? b : a, columns = I::kSwapped ? a : b;
    // What the scaler has told of was told of to the scaler.
    wait(I::kScaler ? shared.scaled(stage) : shared.full(stage), ring.phase);
    float row_scale[2];
#pragma unroll
    for (int pass = 0; pass < I::kPasses; ++pass) {
      Partial partial;
      ptx::pin_registers(partial.value);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileK / 32; ++k)  // 32 bytes further along K
        ptx::wgmma_m64k32_e4m3<I::kPassColumns>(partial.value, rows + 2 * k,
                                                columns + (pass * I::kPassColumns * kTileK >> 4) + 2 * k, k > 0);
      ptx::wgmma_commit_group();
      // Under the wgmma, and before the stage is given back.
      float* sums = acc.value + pass * (I::kPassColumns / 2);
      if (pass == 0 && !I::kSwapped && !I::kScaler) {
        const float* a_scales = shared.a_scale(stage) + fragment_row + behind;
        row_scale[0] = a_scales[0], row_scale[1] = a_scales[8];
      }
      if constexpr (I::kScaler) {
        const float2 scale = shared.products(stage)[fragment_row / 16 * 8 + fragment_row % 8];
        finish(partial, stage, true);
        promote(sums, partial, scale);
      } else if constexpr (I::kScales == BScales::kBlock && !I::kSwapped) {
        const float block_scale = block_scales.at(stage, pass);
        finish(partial, stage, pass == I::kPasses - 1);
        promote(sums, partial, {__fmul_rn(row_scale[0], block_scale), __fmul_rn(row_scale[1], block_scale)});
      } else {  // a scale for each column: of B, or where the operands are swapped of A
        if constexpr (I::kSwapped) row_scale[0] = row_scale[1] = block_scales.at(stage, pass);
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

  // The partial product is there, and after the last pass this warp is done with the stage.
  __device__ __forceinline__ void finish(Partial& partial, int stage, bool done) const {
    ptx::wgmma_wait_group<0>();
    ptx::pin_registers(partial.value);
    if (!done) return;
    __syncwarp();  // one lane arrives for the reads of scales of all
    if constexpr (I::kSharers == 1) {
      if (lane() == 0) ptx::mbarrier_arrive(shared.empty(stage));
    } else {
      if (lane() < I::kSharers) ptx::mbarrier_arrive_remote(empty_0 + stage * static_cast<int>(sizeof(uint64_t)));
    }
  }
};

}  // namespace fastfp8::gemm
