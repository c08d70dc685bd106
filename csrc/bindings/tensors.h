// Between torch's stable ABI and the planners.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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
    case torch::headeronly::ScalarType::Long:
      return DType::kI64;
    default:
      return DType::kOther;
  }
}

// Codes of the running torch. Each is a call through the C ABI, and asking a Tensor for its ScalarType goes through all
// that come before it, so they are asked for once.
struct TorchCodes {
  int32_t cuda = aoti_torch_device_type_cuda();
  int32_t e4m3 = aoti_torch_dtype_float8_e4m3fn(), bf16 = aoti_torch_dtype_bfloat16();
  int32_t f32 = aoti_torch_dtype_float32(), i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64();

  static const TorchCodes& get() {
    static const TorchCodes codes;
    return codes;
  }
  DType dtype(int32_t code) const {
    return code == e4m3   ? DType::kE4M3
           : code == f32  ? DType::kF32
           : code == bf16 ? DType::kBF16
           : code == i32  ? DType::kI32
           : code == i64  ? DType::kI64
                          : DType::kOther;
  }
};

// By the C ABI itself: torch::stable::Tensor asks twice for each size and stride.
inline TensorView view_of(const torch::stable::Tensor& tensor) {
  const AtenTensorHandle handle = tensor.get();
  const TorchCodes& codes = TorchCodes::get();
  int32_t dtype, device_type, device_index;
  int64_t dim, *sizes, *strides;
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
  TensorView view;
  view.dtype = codes.dtype(dtype);
  view.dim = static_cast<int>(dim);
  for (int i = 0; i < dim && i < 2; ++i) view.sizes[i] = sizes[i], view.strides[i] = strides[i];
  view.device = device_type == codes.cuda ? device_index : -1;
  view.address = reinterpret_cast<uint64_t>(data);
  return view;
}

// A new row-major matrix of BF16 or FP32 on a CUDA device. torch::stable::new_empty goes through two more ops.
inline torch::stable::Tensor empty_cuda(int64_t rows, int64_t columns, DType dtype, int device) {
  const TorchCodes& codes = TorchCodes::get();
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, dtype == DType::kF32 ? codes.f32 : codes.bf16,
                                                  codes.cuda, device, &made));
  return torch::stable::Tensor(made);
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
