#include "../kernels/gemm_sm90.cuh"

FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_16x128, 16, 128, kBlock, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_32x128, 32, 128, kBlock, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_64x64, 64, 64, kBlock, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_64x128, 64, 128, kBlock, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_128x64, 128, 64, kBlock, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_128x128, 128, 128, kBlock, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_128x128_pair, 128, 128, kBlock, kBF16, kPair)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_64x64_split, 64, 64, kBlock, kBF16, kSplit)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_128x256, 128, 256, kBlock, kBF16, kNone)
FASTFP8_GEMM_SM90(gemm_sm90_block_bf16_128x256_pair, 128, 256, kBlock, kBF16, kPair)
