// The schema of every op under torch.ops.fastfp8. Implementations: fastfp8/ops (CPU, Triton, fake), gemm_op.cpp
// (sm_90a).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastfp8, library) {
  library.def("quantize(Tensor x, int[2] block=[1, 128], bool pow2=False, float eps=0.0) -> (Tensor, Tensor)");
  library.def("dequantize(Tensor data, Tensor scale, int[2] block, ScalarType dtype=bfloat16) -> Tensor");
  library.def(
      "gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, int[2] b_block=[128, 128], "
      "ScalarType out_dtype=bfloat16, Tensor? c=None) -> Tensor");
  // gemm on a CUDA device that is not sm_90, its arguments checked already: gemm hands over to it.
  library.def(
      "_gemm_triton(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, int[2] b_block, ScalarType out_dtype, "
      "Tensor? c) -> Tensor");
}
