// The scale of a block and the multiplier that quantises it: the operations of fastfp8/reference/quantize.py in their
// order. Every one has its rounding in its name, so that nvcc contracts none.
#pragma once
#include <cstdint>

namespace fastfp8 {

constexpr float kAmaxFloor = 0x1p-110f;  // below it 448 / amax would leave FP32's normal range

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

}  // namespace fastfp8
