// Names shared by host and device code.
#pragma once
#include <cstdint>

namespace fastfp8 {

enum class DType : uint8_t { kE4M3, kBF16, kF32, kI32, kI64, kOther };

constexpr int size_of(DType type) {
  return type == DType::kE4M3 ? 1 : type == DType::kBF16 ? 2 : type == DType::kI64 ? 8 : 4;
}

constexpr const char* name_of(DType type) {
  switch (type) {
    case DType::kE4M3:
      return "float8_e4m3fn";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF32:
      return "float32";
    case DType::kI32:
      return "int32";
    case DType::kI64:
      return "int64";
    default:
      return "another dtype";
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fastfp8
