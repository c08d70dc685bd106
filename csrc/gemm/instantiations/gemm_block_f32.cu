#include "../kernels/gemm_sm90.cuh"

FASTFP8_GEMM_SM90(gemm_sm90_block_f32_n32, 32, kBlock, kF32, 1)
FASTFP8_GEMM_SM90(gemm_sm90_block_f32_n64, 64, kBlock, kF32, 1)
FASTFP8_GEMM_SM90(gemm_sm90_block_f32_n128, 128, kBlock, kF32, 1)
FASTFP8_GEMM_SM90(gemm_sm90_block_f32_n128_c2, 128, kBlock, kF32, 2)
