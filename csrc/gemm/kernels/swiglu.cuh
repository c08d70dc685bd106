// SwiGLU and the quantisation of its result: the operations of fastfp8/reference/activation.py and quantize.py in their
// order. Every one has its rounding in its name, so that nvcc contracts none.
#pragma once
#include <cstdint>

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

// What counts for amax: the magnitude, but 0 of an infinity or a NaN.
__device__ __forceinline__ float finite_magnitude(float x) {
  return fabsf(x) < __int_as_float(0x7f800000) ? fabsf(x) : 0.0f;
}

struct BlockScale {
  float scale, multiplier;  // the one dequantises, the other quantises
};

__device__ __forceinline__ BlockScale block_scale_of(float amax, float floor, bool pow2) {
  if (amax == 0.0f) return {1.0f, 1.0f};
  const float floored = fmaxf(amax, floor), scale = __fdiv_rn(floored, 448.0f);
  if (!pow2) return {scale, __fdiv_rn(448.0f, floored)};
  // Round up to a power of two: the carry out of a non-zero mantissa increments the exponent field.
  const uint32_t exponent = (__float_as_uint(scale) + 0x7fffff) >> 23;
  return {__uint_as_float(exponent << 23), __uint_as_float((254 - exponent) << 23)};
}

}  // namespace fastfp8::gemm
