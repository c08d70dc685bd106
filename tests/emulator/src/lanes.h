// What handlers of one result a lane are made of.
#pragma once
#include <array>
#include <concepts>
#include <utility>

#include "types.h"

namespace emulator {

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

// An operand of a type; a register may hold anything above the type's bits.
struct Input {
  Source source;
  uint64_t mask;

  Input(const Decoder& d, size_t index, const Type& type, Fit fit = Fit::kExact)
      : source(source_of(d, index, type, fit)), mask(type.mask()) {}
  uint64_t get(Context& c, int lane) const { return source.get(c, lane) & mask; }
};

// d = f(context, lane, a, b, ...) for an instruction that has these operands and no more modifiers.
template <class F, std::same_as<Type>... From>
Handler lanewise_in(const Decoder& d, const Type& to, F f, const From&... from) {
  d.expect_done();
  d.operands(sizeof...(From) + 1);
  size_t index = 0;
  const std::array<Input, sizeof...(From)> inputs{Input(d, ++index, from)...};
  return assign(destination_of(d, 0, to), [=, mask = to.mask()](Context& c, int lane) -> uint64_t {
    return mask & std::apply([&](const auto&... input) { return f(c, lane, input.get(c, lane)...); }, inputs);
  });
}

// d = f(a, b, ...).
template <class F, std::same_as<Type>... From>
Handler lanewise(const Decoder& d, const Type& to, F f, const From&... from) {
  return lanewise_in(
      d, to, [=](Context&, int, auto... values) { return static_cast<uint64_t>(f(values...)); }, from...);
}

// f on each element of packed values.
template <class F>
auto by_element(const Type& type, F f) {
  return [f, bits = type.bits, count = type.count](auto... values) {
    if (count == 1) return static_cast<uint64_t>(f(values...));
    uint64_t result = 0;
    const uint64_t mask = (1ull << bits) - 1;
    for (int i = 0; i < count; ++i) result |= (f((values >> bits * i & mask)...) & mask) << bits * i;
    return result;
  };
}

// Parts of decode_arithmetic and decode_convert.
Handler decode_integer(const Decoder& d);
Handler decode_bits(const Decoder& d);
Handler decode_compare(const Decoder& d);
Handler decode_float(const Decoder& d);
Handler decode_move(const Decoder& d);

}  // namespace emulator
