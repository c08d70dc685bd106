// What handlers of one result a lane are made of.
#pragma once
#include <bit>
#include <cmath>

#include "machine.h"

namespace emulator {

constexpr uint32_t kNan32 = 0x7fffffff;

inline uint64_t mask_of(int bytes) { return bytes == 8 ? ~0ull : (1ull << 8 * bytes) - 1; }
inline int64_t sign_extend(uint64_t value, int bytes) {
  const int shift = 64 - 8 * bytes;
  return static_cast<int64_t>(value << shift) >> shift;
}
inline float f32(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }
// The hardware has one NaN.
inline uint64_t bits_of(float value) { return std::isnan(value) ? kNan32 : std::bit_cast<uint32_t>(value); }

// d = value(context, lane) in each lane; -1 is a sink.
template <class Value>
Handler assign(int destination, Value value) {
  return [=](Context& c) {
    uint64_t results[kLanes];
    for_lanes(c.mask, [&](int lane) { results[lane] = value(c, lane); });
    if (destination >= 0) {
      uint64_t* d = c.warp.reg(destination);
      for_lanes(c.mask, [&](int lane) { d[lane] = results[lane]; });
    }
    return Outcome::kNext;
  };
}

// d = f(a, b).
template <class F>
Handler binary(const Decoder& d, F f) {
  d.operands(3);
  return assign(d.destination(0), [a = d.source(1), b = d.source(2), f](Context& c, int lane) -> uint64_t {
    return f(a.get(c, lane), b.get(c, lane));
  });
}

// d = f(a).
template <class F>
Handler unary(const Decoder& d, F f) {
  d.operands(2);
  return assign(d.destination(0), [a = d.source(1), f](Context& c, int lane) -> uint64_t { return f(a.get(c, lane)); });
}

}  // namespace emulator
