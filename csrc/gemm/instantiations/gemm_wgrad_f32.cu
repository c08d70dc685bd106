#include "../kernels/gemm_sm90.cuh"

FASTFP8_DEPTH_GEMM_SM90(gemm_sm90_wgrad_f32_128x128, 128, 128, kF32, kNone)
FASTFP8_DEPTH_GEMM_SM90(gemm_sm90_wgrad_f32_128x128_pair, 128, 128, kF32, kPair)
