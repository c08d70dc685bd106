#include "../kernels/gemm_sm90.cuh"

FASTFP8_SWIGLU_SM90(gemm_sm90_swiglu_128x256, kNone, kNone)
FASTFP8_SWIGLU_SM90(gemm_sm90_swiglu_128x256_pair, kNone, kPair)
