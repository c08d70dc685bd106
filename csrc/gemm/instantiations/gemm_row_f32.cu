#include "../kernels/gemm_sm90.cuh"

FASTFP8_GEMM_SM90(gemm_sm90_row_f32_n32, 32, kRow, kF32, 1)
FASTFP8_GEMM_SM90(gemm_sm90_row_f32_n64, 64, kRow, kF32, 1)
FASTFP8_GEMM_SM90(gemm_sm90_row_f32_n128, 128, kRow, kF32, 1)
FASTFP8_GEMM_SM90(gemm_sm90_row_f32_n128_c2, 128, kRow, kF32, 2)
