#include "../kernels/gemm_sm90.cuh"

FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_bf16_16x128, 16, 128, kBF16, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_bf16_32x128, 32, 128, kBF16, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_bf16_64x128, 64, 128, kBF16, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_bf16_128x128, 128, 128, kBF16, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_bf16_128x256, 128, 256, kBF16, kNone)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_bf16_128x256_pair, 128, 256, kBF16, kPair)
