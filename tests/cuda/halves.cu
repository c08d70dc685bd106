// Types of 16 and 8 bits: one kernel an operation.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#define ELEMENTWISE(name, type, expression)                                                    \
  extern "C" __global__ void name(const type* xs, const type* ys, const type* zs, type* out) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                                       \
    [[maybe_unused]] const type x = xs[i], y = ys[i], z = zs[i];                               \
    out[i] = expression;                                                                       \
  }
#define CONVERSION(name, type, result, expression)               \
  extern "C" __global__ void name(const type* xs, result* out) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;         \
    const type x = xs[i];                                        \
    out[i] = expression;                                         \
  }

ELEMENTWISE(f16_add, __half, __hadd(x, y))
ELEMENTWISE(f16_sub, __half, __hsub_rn(x, y))
ELEMENTWISE(f16_mul, __half, x* y)
ELEMENTWISE(f16_fma, __half, __hfma(x, y, z))
ELEMENTWISE(f16_fma_sat, __half, __hfma_sat(x, y, z))
ELEMENTWISE(f16_fma_relu, __half, __hfma_relu(x, y, z))
ELEMENTWISE(f16_divide, __half, x / y)
ELEMENTWISE(f16_minimum, __half, __hmin(x, y))
ELEMENTWISE(f16_maximum_nan, __half, __hmax_nan(x, y))
ELEMENTWISE(f16_magnitude, __half, __habs(__hneg(x)))
ELEMENTWISE(f16_sqrt, __half, hsqrt(__habs(x)))
ELEMENTWISE(f16_exp2, __half, hexp2(x))
ELEMENTWISE(f16_select, __half, __hlt(x, y) ? x : __hgeu(y, z) ? y : z)
ELEMENTWISE(f16x2_fma, __half2, __hfma2(x, y, z))
ELEMENTWISE(f16x2_add_sat, __half2, __hadd2_sat(x, y))
ELEMENTWISE(f16x2_maximum, __half2, __hmax2(x, __hmin2(y, z)))
ELEMENTWISE(f16x2_less, __half2, __hlt2(x, y))
ELEMENTWISE(f16x2_swap, __half2, __halves2half2(__high2half(x), __low2half(y)))

ELEMENTWISE(bf16_add, __nv_bfloat16, __hadd(x, y))
ELEMENTWISE(bf16_mul, __nv_bfloat16, __hmul_rn(x, y))
ELEMENTWISE(bf16_fma, __nv_bfloat16, __hfma(x, y, z))
ELEMENTWISE(bf16_divide, __nv_bfloat16, x / y)
ELEMENTWISE(bf16_maximum, __nv_bfloat16, __hmax(x, y))
ELEMENTWISE(bf16_minimum_nan, __nv_bfloat16, __hmin_nan(x, y))
ELEMENTWISE(bf16x2_fma, __nv_bfloat162, __hfma2(x, y, z))
ELEMENTWISE(bf16x2_fma_relu, __nv_bfloat162, __hfma2_relu(x, y, z))
ELEMENTWISE(bf16x2_magnitude, __nv_bfloat162, __habs2(__hneg2(x)))

CONVERSION(f32_to_f16, float, __half, __float2half_rn(x))
CONVERSION(f32_to_f16_rz, float, __half, __float2half_rz(x))
CONVERSION(f32_to_f16_ru, float, __half, __float2half_ru(x))
CONVERSION(f32_to_bf16, float, __nv_bfloat16, __float2bfloat16_rn(x))
CONVERSION(f32_to_bf16_rz, float, __nv_bfloat16, __float2bfloat16_rz(x))
CONVERSION(f64_to_f16, double, __half, __double2half(x))
CONVERSION(f16_to_f32, __half, float, __half2float(x))
CONVERSION(bf16_to_f32, __nv_bfloat16, float, __bfloat162float(x))
CONVERSION(f16_to_s32, __half, int, __half2int_rn(x))
CONVERSION(f16_to_s16, __half, short, __half2short_rz(x))
CONVERSION(bf16_to_u32, __nv_bfloat16, unsigned, __bfloat162uint_rd(x))
CONVERSION(s32_to_f16, int, __half, __int2half_rn(x))
CONVERSION(s32_to_bf16, int, __nv_bfloat16, __int2bfloat16_rn(x))
CONVERSION(f32_to_e4m3, float, __nv_fp8_e4m3, __nv_fp8_e4m3(x))
CONVERSION(f32_to_e5m2, float, __nv_fp8_e5m2, __nv_fp8_e5m2(x))
CONVERSION(f16_to_e4m3, __half, __nv_fp8_e4m3, __nv_fp8_e4m3(x))
CONVERSION(bf16_to_e5m2, __nv_bfloat16, __nv_fp8_e5m2, __nv_fp8_e5m2(x))
CONVERSION(f64_to_e4m3, double, __nv_fp8_e4m3, __nv_fp8_e4m3(x))
CONVERSION(f32x2_to_e4m3x2, float2, __nv_fp8x2_e4m3, __nv_fp8x2_e4m3(x))
CONVERSION(f32x4_to_e5m2x4, float4, __nv_fp8x4_e5m2, __nv_fp8x4_e5m2(x))
CONVERSION(e4m3_to_f32, __nv_fp8_e4m3, float, static_cast<float>(x))
CONVERSION(e5m2_to_f16, __nv_fp8_e5m2, __half, static_cast<__half>(x))
CONVERSION(e4m3x2_to_f16x2, __nv_fp8x2_e4m3, __half2, static_cast<__half2>(x))
CONVERSION(e4m3_to_bf16, __nv_fp8_e4m3, __nv_bfloat16, static_cast<__nv_bfloat16>(x))
