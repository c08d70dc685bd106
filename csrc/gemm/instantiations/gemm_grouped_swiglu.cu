#include "../kernels/gemm_sm90.cuh"

FASTFP8_SWIGLU_SM90(gemm_sm90_grouped_swiglu_128x256, kRows, kNone)
FASTFP8_SWIGLU_SM90(gemm_sm90_grouped_swiglu_128x256_pair, kRows, kPair)
