// A tensor as planners see it: no Torch below the bindings.
#pragma once
#include <array>
#include <cstdint>
#include <ostream>

#include "types.h"

namespace fastfp8 {

struct TensorView {
  DType dtype = DType::kOther;
  int dim = 0;                       // as the tensor has it; sizes and strides are filled in for the first two
  std::array<int64_t, 2> sizes{};    // elements
  std::array<int64_t, 2> strides{};  // elements
  int device = -1;                   // CUDA device index; -1 for a tensor elsewhere
  uint64_t address = 0;
};

struct PrintPair {
  const std::array<int64_t, 2>& values;
};
inline std::ostream& operator<<(std::ostream& out, PrintPair pair) {
  return out << "(" << pair.values[0] << ", " << pair.values[1] << ")";
}

}  // namespace fastfp8
