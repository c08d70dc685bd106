#include "../kernels/gemm_sm90.cuh"

FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_64x64, 64, 64, kRow, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_64x128, 64, 128, kRow, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_128x64, 128, 64, kRow, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_128x128, 128, 128, kRow, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_row_bf16_128x128_pair, 128, 128, kRow, kBF16, kPair)
