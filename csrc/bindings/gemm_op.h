// Which backend serves gemm on a CUDA device.
#pragma once
#include <string>

namespace fastfp8 {

// "" if the sm_90a kernels can run on this device; else why not.
std::string gemm_sm90_unusable_reason(int device);

// "" if the Triton backend can be imported; else why not. Python, which knows, says so at import.
void set_triton_unusable_reason(const std::string& reason);
const std::string& triton_unusable_reason();

}  // namespace fastfp8
