// Which backend serves a GEMM on a CUDA device, and what the CUDA ops share.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>

namespace fastfp8 {

// "" if the sm_90a kernels can run on this device; else why not.
std::string gemm_sm90_unusable_reason(int device);

// "" if the Triton backend can be imported; else why not. Python, which knows, says so at import.
void set_triton_unusable_reason(const std::string& reason);
const std::string& triton_unusable_reason();

// torch's current stream on the device. Only where the sm_90a kernels can run.
void* current_stream(int device);

// The op of this name, whose arguments are in the stack and then its results. Raises where no backend can serve the
// device, with each one's reason.
void call_triton(const char* op, const char* triton_op, int device, StableIValue* stack);

}  // namespace fastfp8
