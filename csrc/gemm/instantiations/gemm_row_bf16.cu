#include "../kernels/gemm_sm90.cuh"

FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_n32, 32, kRow, kBF16, 1)
FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_n64, 64, kRow, kBF16, 1)
FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_n128, 128, kRow, kBF16, 1)
FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_n128_c2, 128, kRow, kBF16, 2)
