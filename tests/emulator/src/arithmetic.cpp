// Sorts arithmetic by what it works on: several opcodes serve integers and floating-point numbers alike.
#include "lanes.h"

namespace emulator {

Handler decode_arithmetic(const Decoder& d) {
  const Type* type = last_type(d);
  for (auto* family : {decode_compare, decode_bits, type && type->is_float() ? decode_float : decode_integer}) {
    if (Handler handler = family(d)) return handler;
  }
  return {};
}

}  // namespace emulator
