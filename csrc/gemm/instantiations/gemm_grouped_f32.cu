#include "../kernels/gemm_sm90.cuh"

FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_f32_16x128, 16, 128, kF32, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_f32_32x128, 32, 128, kF32, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_f32_64x128, 64, 128, kF32, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_f32_128x128, 128, 128, kF32, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_f32_128x256, 128, 256, kF32, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_f32_128x256_pair, 128, 256, kF32, kPair)
