// Counts of what quantisation did to values: fastfp8/counters.py says what is counted, and where each count is kept.
#pragma once
#include <cstdint>

#include "../../common/counters.h"
#include "../../ptx/memory.cuh"

namespace fastfp8::gemm {

// What a warp counts between two sums of it: at most 2047 values a thread, for two counts share a word.
struct Counts {
  uint32_t small = 0;  // underflowed, and above them subnormal
  uint32_t large = 0;  // saturated, and above them not finite

  // Of the value `x`, whose code is `product` rounded.
  __device__ __forceinline__ void add(float x, float product) {
    constexpr float kMost = 464.0f, kUnderflows = 0x1p-10f, kNormal = 15 * 0x1p-10f;
    const float magnitude = fabsf(product);
    const bool is_finite = fabsf(x) < __int_as_float(0x7f800000);
    const uint32_t underflowed = magnitude <= kUnderflows && x != 0.0f;
    const uint32_t subnormal = magnitude > kUnderflows && magnitude < kNormal;
    small += underflowed | subnormal << 16;
    large += static_cast<uint32_t>(magnitude > kMost) | static_cast<uint32_t>(!is_finite) << 16;
  }

  // By all lanes of a warp, which has counted `values` of them in all: an atomic for each count that is not 0.
  __device__ __forceinline__ void add_to(int64_t* counters, int values) const {
    const uint32_t smalls = __reduce_add_sync(0xffffffff, small), larges = __reduce_add_sync(0xffffffff, large);
    const int lane = threadIdx.x % 32;
    const uint32_t pair = lane == 1 || lane == 4 ? larges : smalls;
    const int64_t count = lane == 0 ? values : lane < 3 ? pair & 0xffff : pair >> 16;
    if (lane < kCounterFields && count > 0)
      ptx::add_relaxed_gpu(counters + blockIdx.x % kCounterLanes * kCounterFields + lane, count);
  }
};

}  // namespace fastfp8::gemm
