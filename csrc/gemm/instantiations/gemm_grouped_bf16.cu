#include "../kernels/gemm_sm90.cuh"

FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_bf16_64x128, 64, 128, kBF16)
FASTFP8_GROUPED_GEMM_SM90(gemm_sm90_grouped_bf16_128x128, 128, 128, kBF16)
