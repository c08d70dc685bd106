// What the parts of a GEMM kernel share: its template parameters in one type, its arguments, its shared memory.
#pragma once
#include "../../ptx/tma.cuh"
#include "../config.h"

namespace fastfp8::gemm {

// Kernel parameters but for the tensor maps, which must stay __grid_constant__ parameters of the entry.
struct Arguments {
  const CUtensorMap *a, *b, *a_scale, *b_scale, *out_map;
  const float* b_block_scale;  // BScales::kBlock: [ceil(N / 128), ceil(K / 128)], row-major
  void* out;                   // [M, N] of kOut, row-major; nullptr where out_map serves
  const void* c;               // nullptr, or [M, N] of c_type with rows c_pitch elements apart
  int c_is_bf16, c_pitch;
  int m, n, k;
  TileOrder order;
  // Groups only.
  const int* ends;     // [groups]: the end of each group's rows or k, or where group_rows > 0 the number of rows
  int groups;          // kRows: n is of one group's B, m the rows of A in all; kDepth: m and n are of each output
  int group_rows = 0;  // 0, or how many rows of A lie from group to group
  int* error = nullptr;
  // SwiGLU only. `out` is e4m3 [M, n / 2].
  const CUtensorMap* gate_up_map = nullptr;
  void* gate_up = nullptr;        // BF16 [M, n], or nullptr for none
  float* out_scale = nullptr;     // [M, n / 256], column-major, columns out_scale_pitch floats apart
  const float* weight = nullptr;  // nullptr, or one for each row, weight_stride floats apart
  int64_t* counters = nullptr;    // nullptr, or [kCounterLanes, kCounterFields], to which is added
  int out_scale_pitch = 0, weight_stride = 0;
  float limit = 0, floor = 0;  // of gate and up, infinite for none; of amax
  int pow2 = 0;
};

template <int kTileM, int kTileN, BScales kScalesOfB, DType kOutType, Cluster kClusterOf,
          Grouping kGroupingOf = Grouping::kNone>
struct Instance {
  static constexpr TileShape kTile{kTileM, kTileN};
  static constexpr BScales kScales = kScalesOfB;
  static constexpr DType kOut = kOutType;
  static constexpr Cluster kCluster = kClusterOf;
  static constexpr Grouping kGrouping = kGroupingOf;
  static constexpr bool kSwiGlu = is_swiglu(kOut);
  static constexpr int kColumns = kTile.consumer_columns();
  static constexpr bool kSwapped = kTile.swapped();
  static constexpr bool kStoresByTma = stores_by_tma(kTile, kOut, kCluster);
  static constexpr int kPasses = kTile.passes();
  static constexpr int kPassColumns = kTile.pass_columns();
  static constexpr SharedPlan kPlan = SharedPlan::make(kTile, kScales, kOut, kCluster, kGrouping);
  // A constexpr object has no address in device code, so these make one.
  static constexpr int first_row(int consumer) { return TileShape{kTileM, kTileN}.first_row(consumer); }
  static constexpr int first_column(int consumer) { return TileShape{kTileM, kTileN}.first_column(consumer); }
  // CTAs that share loads, and with them the stages' barriers. A CTA loads `kBoxes` boxes of rows of B a stage.
  static constexpr int kSharers = kCluster == Cluster::kPair ? 2 : 1;
  static constexpr int kBoxRows = b_box_rows(kTile, kSharers);
  static constexpr int kBoxes = kTile.n / kSharers / kBoxRows;

  static constexpr bool kScaler = has_scaler(kTile, kScales);
  // A CTA of a split mostly has fewer k-blocks than stages.
  static constexpr bool kTurns = kCluster != Cluster::kSplit;

  static_assert(kPlan.stages >= 3 && kPlan.bytes <= kMaxShared);
  static_assert(128 % kPassColumns == 0, "a pass takes its B scale from one block of 128 rows");
  static_assert(kPasses == 1 || kScales == BScales::kBlock, "no registers are left for a scale a column");
  static_assert(kSwapped ? kScales == BScales::kBlock && kTileN == kConsumers * kWgmmaM
                         : kTileM == kWgmmaM || kTileM == kConsumers * kWgmmaM);
  static_assert(!kSwiGlu || (kTileM == kConsumers * kWgmmaM && kTileN == 256 && kBoxRows == 128));
};

// Named barriers. 0 is __syncthreads.
constexpr uint32_t kConsumerBarrier = 1;           // and 2: one a consumer
constexpr uint32_t kTileBarrier = 1 + kConsumers;  // all consumers
constexpr uint32_t kLeadBarrier = kTileBarrier + 1;

// The accumulator fragment of a thread: two rows, kColumns / 4 columns of each. See wgmma_m64k32_e4m3.
template <int kColumns>
struct Fragment {
  float value[kColumns / 2];
};

// The shared memory of a CTA by SharedPlan's names.
template <class I>
struct Shared {
  uint8_t* base;

  static constexpr SharedPlan kPlan = I::kPlan;

  __device__ __forceinline__ uint8_t* a(int stage) const {
    return base + kPlan.a + stage * SharedPlan::a_stage(I::kTile);
  }
  __device__ __forceinline__ uint8_t* b(int stage) const {
    return base + kPlan.b + stage * SharedPlan::b_stage(I::kTile);
  }
  __device__ __forceinline__ float* a_scale(int stage) const {
    return reinterpret_cast<float*>(base + kPlan.a_scale + stage * SharedPlan::a_scale_stage(I::kTile, I::kGrouping));
  }
  __device__ __forceinline__ float* b_scale(int stage) const {
    return reinterpret_cast<float*>(base + kPlan.b_scale + stage * SharedPlan::b_scale_stage(I::kTile, I::kScales));
  }
  __device__ __forceinline__ float2* products(int stage) const {
    return reinterpret_cast<float2*>(base + kPlan.products + stage * SharedPlan::product_stage(I::kTile, I::kScales));
  }
  __device__ __forceinline__ int* groups() const { return reinterpret_cast<int*>(base + kPlan.groups); }
  __device__ __forceinline__ uint8_t* out() const { return base + kPlan.out; }
  __device__ __forceinline__ uint64_t* full(int stage) const { return barrier(kPlan.full) + stage; }
  __device__ __forceinline__ uint64_t* empty(int stage) const { return barrier(kPlan.empty) + stage; }
  __device__ __forceinline__ uint64_t* scaled(int stage) const { return barrier(kPlan.scaled) + stage; }
  __device__ __forceinline__ uint64_t* ready() const { return barrier(kPlan.ready); }
  __device__ __forceinline__ uint64_t* drained() const { return barrier(kPlan.drained); }

  __device__ __forceinline__ uint64_t* barrier(int offset) const { return reinterpret_cast<uint64_t*>(base + offset); }
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
      turn();
    }
  }
  // By as many stages as there are.
  __device__ __forceinline__ void turn() { phase ^= 1; }
};

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

}  // namespace fastfp8::gemm
