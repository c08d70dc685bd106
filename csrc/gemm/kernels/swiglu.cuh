// SwiGLU: the operations of fastfp8/reference/activation.py in their order. Every one has its rounding in its name, so
// that nvcc contracts none.
#pragma once
#include <cstdint>

#include "../../common/block_scale.cuh"
#include "../../ptx/warp.cuh"

namespace fastfp8::gemm {

// e^x as 2^n * exp(r). Selects in place of fmin and fmax let a NaN pass.
__device__ __forceinline__ float exp(float x) {
  constexpr float kLeast = -88.0f, kMost = 89.0f, kLog2E = 0x1.715476p+0f, kRounder = 12582912.0f;
  constexpr float kLn2High = 0x1.62e430p-1f, kLn2Low = -0x1.05c610p-29f;
  x = x < kLeast ? kLeast : x > kMost ? kMost : x;
  const float shifted = __fmaf_rn(x, kLog2E, kRounder);
  const float n = __fsub_rn(shifted, kRounder);
  const float r = __fmaf_rn(n, -kLn2Low, __fmaf_rn(n, -kLn2High, x));
  float p = __fmaf_rn(r, 0x1.6a23d0p-10f, 0x1.123a20p-7f);
  p = __fmaf_rn(p, r, 0x1.5558f2p-5f);
  p = __fmaf_rn(p, r, 0x1.555492p-3f);
  p = __fmaf_rn(p, r, 0x1.fffffcp-2f);
  p = __fmaf_rn(p, r, 1.0f);
  p = __fmaf_rn(p, r, 1.0f);
  return __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) + 127) << 23));
}

__device__ __forceinline__ float silu(float x) {
  x = x < -89.0f ? -89.0f : x;  // whose exponential is infinite: -0, of -infinity too
  return __fdiv_rn(x, __fadd_rn(exp(-x), 1.0f));
}

// silu(gate) * up, clamped by `limit` first, which may be infinite.
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return __fmul_rn(silu(gate), up);
}

}  // namespace fastfp8::gemm
