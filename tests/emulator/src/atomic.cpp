// Atomic operations and reductions on memory.
#include "memory.h"

namespace emulator {

Handler decode_atomic(const Decoder&) { return {}; }

}  // namespace emulator
