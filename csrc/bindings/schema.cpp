// The schema of every op under torch.ops.fastfp8. Implementations: fastfp8/ops (CPU, Triton, fake), gemm_op.cpp
// (sm_90a).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastfp8, library) {
  // `rules` are those of a preset (fastfp8/presets.py), or ours.
  library.def(
      "quantize(Tensor x, int[2] block=[1, 128], bool pow2=False, float eps=0.0, str rules=\"\") -> "
      "(Tensor, Tensor)");
  library.def(
      "swiglu_quantize(Tensor gate_up, Tensor? weight=None, float? limit=None, bool pow2=False, float eps=0.0, "
      "Tensor? gate_up_scale=None) -> (Tensor, Tensor)");
  // An overload `counted` adds to `counters`, int64 [32, 5], what became of the values (fastfp8/counters.py).
  library.def(
      "quantize.counted(Tensor x, int[2] block=[1, 128], bool pow2=False, float eps=0.0, *, Tensor(a!) counters) -> "
      "(Tensor, Tensor)");
  library.def(
      "swiglu_quantize.counted(Tensor gate_up, Tensor? weight=None, float? limit=None, bool pow2=False, "
      "float eps=0.0, Tensor? gate_up_scale=None, *, Tensor(a!) counters) -> (Tensor, Tensor)");
  library.def(
      "dequantize(Tensor data, Tensor scale, int[2] block, ScalarType dtype=bfloat16, Tensor? add=None) -> Tensor");
  // Data and scale of x, then of its transpose, whose codes [K, tokens] are padded with zeros: to 16 tokens, or each
  // group to 128. Of groups also the token at which each ends there.
  library.def("quantize_both(Tensor x, bool pow2=False, float eps=0.0) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "quantize_both.counted(Tensor x, bool pow2=False, float eps=0.0, *, Tensor(a!) counters, "
      "Tensor(b!) counters_t) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "quantize_grouped_both(Tensor x, Tensor offsets, Tensor(a!)? error, bool pow2=False, float eps=0.0) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "quantize_grouped_both.counted(Tensor x, Tensor offsets, Tensor(a!)? error, bool pow2=False, float eps=0.0, *, "
      "Tensor(b!) counters, Tensor(c!) counters_t) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The activation (its scale without elements if it is dense), the gradient of gate_up and that turned, each data and
  // scale; the gradient of weight, without rows if there is none; where groups end in what is turned.
  library.def(
      "swiglu_backward_quantize(Tensor grad, Tensor gate_up, Tensor? gate_up_scale=None, Tensor? weight=None, "
      "float? limit=None, Tensor? offsets=None, Tensor(a!)? error=None, bool pow2=False, float eps=0.0, "
      "bool dense_activation=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "swiglu_backward_quantize.counted(Tensor grad, Tensor gate_up, Tensor? gate_up_scale=None, "
      "Tensor? weight=None, float? limit=None, Tensor? offsets=None, Tensor(a!)? error=None, bool pow2=False, "
      "float eps=0.0, bool dense_activation=False, *, Tensor(b!) activation_counters, Tensor(c!) counters, "
      "Tensor(d!) counters_t) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("requantize_transpose(Tensor data, Tensor scale) -> (Tensor, Tensor)");
  library.def("requantize_transpose.counted(Tensor data, Tensor scale, *, Tensor(a!) counters) -> (Tensor, Tensor)");
  library.def(
      "requantize_transpose.grouped(Tensor data, Tensor scale, Tensor offsets, Tensor(a!)? error) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "requantize_transpose.grouped_counted(Tensor data, Tensor scale, Tensor offsets, Tensor(a!)? error, *, "
      "Tensor(b!) counters) -> (Tensor, Tensor, Tensor)");
  // The last result is x + residual; without `residual` it has no rows.
  library.def(
      "rmsnorm_quantize(Tensor x, Tensor weight, float eps=1e-06, Tensor? residual=None, bool pow2=False, "
      "float amax_floor=0.0) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "rmsnorm_quantize_transpose(Tensor x, Tensor weight, Tensor rstd, bool pow2=False, float amax_floor=0.0) -> "
      "(Tensor, Tensor)");
  library.def(
      "rmsnorm_quantize.counted(Tensor x, Tensor weight, float eps=1e-06, Tensor? residual=None, bool pow2=False, "
      "float amax_floor=0.0, *, Tensor(a!) counters) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "rmsnorm_quantize_transpose.counted(Tensor x, Tensor weight, Tensor rstd, bool pow2=False, "
      "float amax_floor=0.0, *, Tensor(a!) counters) -> (Tensor, Tensor)");
  library.def(
      "rmsnorm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? residual_grad=None) -> "
      "(Tensor, Tensor)");
  library.def(
      "gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, int[2] b_block=[128, 128], "
      "ScalarType out_dtype=bfloat16, Tensor? c=None, int? num_sms=None) -> Tensor");
  // `error`, int32 [1], is where a kernel reports bad offsets or counts (fastfp8/error_word.py); None is nowhere.
  library.def(
      "grouped_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, Tensor(a!)? error, "
      "ScalarType out_dtype=bfloat16) -> Tensor");
  library.def(
      "masked_grouped_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor counts, Tensor(a!)? error, "
      "ScalarType out_dtype=bfloat16) -> Tensor");
  // The third result is gate and up; without `return_gate_up` it has no rows.
  library.def(
      "gemm_swiglu_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? offsets=None, "
      "Tensor(a!)? error=None, Tensor? weight=None, float? limit=None, bool pow2=False, float eps=0.0, "
      "bool return_gate_up=False) -> (Tensor, Tensor, Tensor)");
  library.def(
      "gemm_swiglu_quantize.counted(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? offsets=None, "
      "Tensor(a!)? error=None, Tensor? weight=None, float? limit=None, bool pow2=False, float eps=0.0, "
      "bool return_gate_up=False, *, Tensor(b!) counters) -> (Tensor, Tensor, Tensor)");
  library.def(
      "grouped_wgrad(Tensor grad_t, Tensor grad_t_scale, Tensor input_t, Tensor input_t_scale, Tensor offsets, "
      "Tensor(a!)? error, ScalarType out_dtype=float) -> Tensor");
  // Returns nothing, as torch.compile wants it of an op that writes an argument.
  library.def(
      "grouped_wgrad.out(Tensor grad_t, Tensor grad_t_scale, Tensor input_t, Tensor input_t_scale, Tensor offsets, "
      "Tensor(a!)? error, bool accumulate=False, *, Tensor(b!) out) -> ()");
  library.def(
      "route(Tensor logits, Tensor bias, *, int top_k, int groups=1, int top_groups=1, str score=\"sigmoid\", "
      "float scale=1.0) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "route_backward(Tensor? grad_weights, Tensor? grad_scores, Tensor topk_idx, Tensor scores, str score, "
      "float scale, ScalarType out_dtype) -> Tensor");
  library.def("row_map(Tensor topk_idx, int num_experts, Tensor(a!)? error) -> (Tensor, Tensor, Tensor)");
  library.def("permute(Tensor x, Tensor rows) -> Tensor");
  library.def("permute_scaled(Tensor x, Tensor x_scale, Tensor rows) -> (Tensor, Tensor)");
  library.def("permute_quantize(Tensor x, Tensor rows, bool pow2=False, float eps=0.0) -> (Tensor, Tensor)");
  library.def(
      "permute_quantize.counted(Tensor x, Tensor rows, bool pow2=False, float eps=0.0, *, Tensor(a!) counters) -> "
      "(Tensor, Tensor)");
  // `y` in FP8 with `y_scale`, or dense without.
  library.def(
      "unpermute(Tensor y, Tensor? y_scale, Tensor rows, Tensor? weights=None, ScalarType out_dtype=bfloat16) -> "
      "Tensor");
  library.def("unpermute_backward(Tensor grad, Tensor y, Tensor rows, Tensor weights) -> (Tensor, Tensor)");
  // 12 bits a value; `words` is int32, and `cols` tells how many codes of a row's last three words count.
  library.def("pack_e5m6(Tensor x, bool pow2=True, float eps=0.0, bool per_row=False) -> (Tensor, Tensor)");
  library.def(
      "unpack_e5m6(Tensor words, Tensor scale, SymInt cols, bool per_row=False, ScalarType dtype=bfloat16) -> Tensor");
  library.def(
      "requantize_e5m6(Tensor words, Tensor scale, SymInt cols, bool per_row=False, bool pow2=True) -> "
      "(Tensor, Tensor)");
  library.def(
      "requantize_e5m6.counted(Tensor words, Tensor scale, SymInt cols, bool per_row=False, bool pow2=True, *, "
      "Tensor(a!) counters) -> (Tensor, Tensor)");
  // A step of AdamW, in place. Of a parameter `masters` has none or one, `fp8` none or four: data, scale, both turned.
  // `counters` has none, or one for each parameter in FP8.
  library.def(
      "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] fp8, Tensor(f!)[] counters, int[] indices, int step, float lr, "
      "float[2] betas, float eps, float weight_decay, bool stochastic_rounding=False, int seed=0) -> ()");
  // The same on a CUDA device that is not sm_90, arguments checked already: the ops above hand over to these.
  library.def(
      "_gemm_triton(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, int[2] b_block, ScalarType out_dtype, "
      "Tensor? c, int? num_sms=None) -> Tensor");
  library.def(
      "_grouped_gemm_triton(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, Tensor(a!)? error, "
      "ScalarType out_dtype=bfloat16) -> Tensor");
  library.def(
      "_masked_grouped_gemm_triton(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor counts, "
      "Tensor(a!)? error, ScalarType out_dtype=bfloat16) -> Tensor");
  library.def(
      "_gemm_swiglu_quantize_triton(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? offsets, "
      "Tensor(a!)? error, Tensor? weight, float? limit, bool pow2, float eps, bool return_gate_up, "
      "Tensor(b!)? counters=None) -> (Tensor, Tensor, Tensor)");
  library.def(
      "_grouped_wgrad_triton(Tensor grad_t, Tensor grad_t_scale, Tensor input_t, Tensor input_t_scale, Tensor offsets, "
      "Tensor(a!)? error, Tensor(b!) out, bool accumulate) -> ()");
}
