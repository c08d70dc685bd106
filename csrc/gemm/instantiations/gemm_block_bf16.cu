#include "../kernels/gemm_sm90.cuh"

FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_n32, 32, kBlock, kBF16, 1)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_n64, 64, kBlock, kBF16, 1)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_n128, 128, kBlock, kBF16, 1)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_n128_c2, 128, kBlock, kBF16, 2)
