// Which family of asynchronous copies an instruction belongs to.
#include "copies.h"

namespace emulator {

Handler decode_copy(const Decoder& d) {
  if (d.instruction.opcode == "tensormap") return decode_tensor_map(d);
  if (is_tensor_map_prefetch(d.instruction)) return decode_tensor_map_prefetch(d);
  if (d.instruction.opcode != "cp") return {};
  if (d.take("reduce")) {
    if (!(d.take("async") && d.take("bulk"))) d.unknown("reduction");
    return d.take("tensor") ? decode_tensor_reduce(d) : decode_bulk_reduce(d);
  }
  if (!d.take("async")) d.unknown("copy");
  return d.take("bulk") ? decode_bulk_copy(d) : decode_async_copy(d);
}

}  // namespace emulator
