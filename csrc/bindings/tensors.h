// Between torch's stable ABI and the planners.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/check.h"
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
    case torch::headeronly::ScalarType::Int:
      return DType::kI32;
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

// A tensor of three dimensions, whose matrices lie one below the other, as the matrix of all their rows.
inline TensorView flattened(const torch::stable::Tensor& tensor, const char* op, const char* argument) {
  TensorView view = view_of(tensor);
  FASTFP8_CHECK_ARGUMENT(view.dim == 3, op, argument, "3 dimensions", view.dim);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const bool follow = sizes[0] <= 1 || sizes[1] <= 1 || strides[0] == sizes[1] * strides[1];
  FASTFP8_CHECK_ARGUMENT(follow, op, argument, "matrices whose rows follow each other's",
                         "stride (" << strides[0] << ", " << strides[1] << ", " << strides[2] << ")");
  view.dim = 2;
  view.sizes = {sizes[0] * sizes[1], sizes[2]};
  view.strides = {sizes[1] == 1 ? strides[0] : strides[1], strides[2]};
  return view;
}

// The address of the error word, null where there is none. `device` is that of argument `first`.
inline uint64_t error_address(const std::optional<torch::stable::Tensor>& error, const char* op, const char* first,
                              int device) {
  if (!error) return 0;
  const TensorView view = view_of(*error);
  FASTFP8_CHECK_ARGUMENT(view.dtype == DType::kI32 && view.device == device && error->numel() == 1, op, "error",
                         "one int32 on the device of '" << first << "'", "another tensor");
  return view.address;
}

}  // namespace fastfp8
