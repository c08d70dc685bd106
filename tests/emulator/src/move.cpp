// Moves of registers, constants, addresses and vectors, and conversions between address spaces.
#include "lanes.h"

namespace emulator {
namespace {

// Parts of a register, the first the lowest.
struct Parts {
  const Operand& vector;
  const Type& type;  // of one
  size_t count;
};

Parts parts_of(const Decoder& d, const Operand& vector, const Type& whole) {
  const size_t count = vector.elements.size();
  if (count != 2 && count != 4) d.unknown("number of elements");
  const Type* type = find_type("b" + std::to_string(whole.bits / static_cast<int>(count)));
  if (type == nullptr) d.unknown("number of elements");
  return {vector, *type, count};
}

Handler pack_vector(const Decoder& d, const Type& type) {
  const auto [vector, part, count] = parts_of(d, d.operand(1), type);
  std::vector<Source> sources;
  for (const Operand& element : vector.elements) sources.push_back(source_of(d, element, part));
  return assign(destination_of(d, 0, type), [sources, bits = part.bits, mask = part.mask()](Context& c, int lane) {
    uint64_t value = 0;
    for (size_t i = sources.size(); i-- > 0;) value = value << bits | (sources[i].get(c, lane) & mask);
    return value;
  });
}

Handler unpack_vector(const Decoder& d, const Type& type) {
  const auto [vector, part, count] = parts_of(d, d.operand(0), type);
  std::vector<int> destinations;
  bool any = false;
  for (const Operand& element : vector.elements) {
    const bool sink = element.kind == Operand::Kind::kSink;
    destinations.push_back(sink ? -1 : destination_of(d, element, part));
    any |= !sink;
  }
  if (!any) d.unknown("vector of sinks only");
  return [destinations, a = Input(d, 1, type), bits = part.bits, mask = part.mask()](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      uint64_t value = a.get(c, lane);
      for (const int destination : destinations) {
        if (destination >= 0) c.warp.reg(destination)[lane] = value & mask;
        value >>= bits;
      }
    });
    return Outcome::kNext;
  };
}

Handler move(const Decoder& d) {
  const Type& type = take_type(d, "pred b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64");
  d.expect_done();
  d.operands(2);
  const bool to_vector = d.operand(0).kind == Operand::Kind::kVector;
  if (to_vector || d.operand(1).kind == Operand::Kind::kVector) {
    if (type.kind != Type::Kind::kBits) d.unknown("type");
    return to_vector ? unpack_vector(d, type) : pack_vector(d, type);
  }
  const Input a(d, 1, type, Fit::kMove);
  return assign(destination_of(d, 0, type), [=](Context& c, int lane) { return a.get(c, lane); });
}

Handler cvta(const Decoder& d) {
  const bool to = d.take("to");
  const std::string space = d.next();
  if (d.next() != "u64") d.unknown("address size");
  d.expect_done();
  d.operands(2);
  uint64_t window = 0;
  if (space == "shared" || space == "shared::cta" || space == "shared::cluster") window = kSharedWindow;
  if (space == "local") window = kLocalWindow;
  if (space == "param") window = kParamWindow;
  return assign(d.destination(0), [=, a = d.source(1)](Context& c, int lane) {
    const uint64_t v = a.get(c, lane);
    if (to && (v & kWindowMask & (window ? ~0ull : 0)) != window && window) fail(c, "the address is of another space");
    return to ? v - window : v + window;
  });
}

}  // namespace

Handler decode_move(const Decoder& d) {
  const std::string& op = d.instruction.opcode;
  if (op == "mov") return move(d);
  if (op == "cvta") return cvta(d);
  return {};
}

}  // namespace emulator
