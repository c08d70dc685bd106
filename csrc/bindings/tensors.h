// Between torch's stable ABI and the planners.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "../common/tensor_view.h"

namespace fastfp8 {

inline DType dtype_of(torch::headeronly::ScalarType type) {
  switch (type) {
    case torch::headeronly::ScalarType::Float8_e4m3fn:
      return DType::kE4M3;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBF16;
    case torch::headeronly::ScalarType::Float:
      return DType::kF32;
    default:
      return DType::kOther;
  }
}

inline TensorView view_of(const torch::stable::Tensor& tensor) {
  TensorView view;
  view.dtype = dtype_of(tensor.scalar_type());
  view.dim = static_cast<int>(tensor.dim());
  for (int i = 0; i < view.dim && i < 2; ++i) {
    view.sizes[i] = tensor.sizes()[i];
    view.strides[i] = tensor.strides()[i];
  }
  view.device = tensor.is_cuda() ? tensor.get_device_index() : -1;
  view.address = reinterpret_cast<uint64_t>(tensor.data_ptr());
  return view;
}

}  // namespace fastfp8
