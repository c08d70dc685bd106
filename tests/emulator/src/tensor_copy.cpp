// TMA: bulk copies and reductions of tiles of tensors, as tensor maps describe them.
#include <cstring>

#include "copies.h"

namespace emulator {
namespace {

constexpr uint32_t kAlignment = 128;

[[noreturn]] void bad_map(const Context& c, const std::string& field, const std::string& expected, uint64_t got) {
  fail(c, "tensor map: " + field + ": expected " + expected + ", got " + std::to_string(got));
}

// The limits of cuTensorMapEncodeTiled, by the names of its arguments: bytes that others have written may be anything.
void check_map(const Context& c, const TensorMapBits& map) {
  const auto expect = [&](bool ok, const char* field, const std::string& expected, uint64_t got) {
    if (!ok) bad_map(c, field, expected, got);
  };
  const auto expect_each = [&](bool ok, const std::string& field, uint32_t i, const std::string& range, uint64_t got) {
    if (!ok) bad_map(c, field + "[" + std::to_string(i) + "]", range, got);
  };
  expect(map.rank < kMaxRank, "tensorRank", "1 to 5", map.rank + 1u);
  expect(map.element_type < kElementTypeCount, "tensorDataType", "0 to 12", map.element_type);
  const ElementType& type = kElementTypes[map.element_type];
  if (std::strchr(type.name, '.') || std::strcmp(type.name, "tf32") == 0)
    fail(c, "tensor map: elements of type ." + std::string(type.name) + " are not emulated");
  expect(map.interleave == 0, "interleave", "none, as others are not emulated", map.interleave);
  expect(map.swizzle <= kMostSwizzle, "swizzle", "0 to 3", map.swizzle);
  expect(map.fill_nan <= 1, "oobFill", "0 or 1", map.fill_nan);
  expect(!map.fill_nan || type.is_float, "oobFill", std::string("zeros, with elements of type .") + type.name, 1);
  expect(map.address % 16 == 0, "globalAddress", "a multiple of 16", map.address);
  for (uint32_t i = 0; i <= map.rank; ++i) {
    expect_each(map.box[i] < kMaxBox, "boxDim", i, "1 to 256 elements", map.box[i] + 1u);
    expect_each(map.element_strides[i] < kMaxElementStride, "elementStrides", i, "1 to 8", map.element_strides[i] + 1u);
    if (i == 0) continue;
    const uint64_t stride = map.strides[i - 1];
    expect_each(stride % 16 == 0 && stride < kMaxStride, "globalStrides", i - 1, "a multiple of 16 below 2^40", stride);
  }
  const uint32_t inner = (map.box[0] + 1u) * type.bytes, span = 16u << map.swizzle;
  expect(inner % 16 == 0, "boxDim[0]", "a multiple of 16 bytes", inner);
  expect(map.swizzle == 0 || inner <= span, "boxDim[0]", "at most the swizzle's " + std::to_string(span) + " bytes",
         inner);
  // Whether rows of a narrower box lie at its own pitch or at the pattern's is not documented.
  if (map.swizzle != 0 && inner != span)
    fail(c, "a swizzled box has rows of exactly the swizzle's " + std::to_string(span) + " bytes, this one of " +
                std::to_string(inner));
}

struct TensorOperands : BulkOperands {
  Address map;
  std::vector<Source> coordinates;

  // The copy but for its place in shared memory.
  Bulk bulk(Context& c, int lane) const {
    const uint64_t address = map.get(c, lane);
    Bulk bulk = bulk_of(c);
    Box& box = bulk.box.emplace();
    std::memcpy(&box.map, find_tensor_map(c, address), sizeof box.map);
    check_not_stale(c, address);
    check_map(c, box.map);
    if (box.rank() != coordinates.size())
      fail(c, "the tensor map has rank " + std::to_string(box.rank()) + ", not " + std::to_string(coordinates.size()));
    for (uint32_t i = 0; i < box.rank(); ++i) {
      box.start[i] = static_cast<int32_t>(coordinates[i].get(c, lane));
      // Without interleave the hardware ignores the innermost stride.
      const uint32_t step = i == 0 ? 1 : box.map.element_strides[i] + 1u;
      box.extent[i] = (box.map.box[i] + step) / step;
    }
    if (box.start[0] * box.type().bytes % 16)
      fail(c, "the box starts at an address that is no multiple of 16: " + std::to_string(box.start[0]) +
                  " elements of " + std::to_string(box.type().bytes) + " bytes into a row");
    if (box.bytes() > kOffsetMask) fail(c, "a box of " + std::to_string(box.bytes()) + " bytes");
    bulk.bytes = static_cast<uint32_t>(box.bytes());
    bulk.map = use_tensor_map(c.machine, address);
    return bulk;
  }

  void check_pattern(const Context& c, const Bulk& bulk, uint32_t offset) const {
    const uint32_t pattern = 128u << bulk.box->map.swizzle;
    if (bulk.box->map.swizzle && offset % pattern)
      fail(c, "the box does not start where its swizzle pattern does, at a multiple of " + std::to_string(pattern));
  }

  // A map with coordinates, [map, {c0, c1, ...}].
  void take_tensor(const Decoder& d, size_t index, size_t rank) {
    const Operand& tensor = d.operand(index);
    if (tensor.kind != Operand::Kind::kMemory || tensor.elements.size() != rank + 1) d.unknown("number of coordinates");
    map = {d.source(tensor.elements[0]), tensor.integer};
    for (size_t i = 1; i <= rank; ++i) coordinates.push_back(d.source(tensor.elements[i]));
  }
};

size_t take_rank(const Decoder& d) {
  const std::string dimensions = d.next();
  if (dimensions.size() != 2 || dimensions[0] < '1' || dimensions[0] > '5' || dimensions[1] != 'd') d.unknown("rank");
  return static_cast<size_t>(dimensions[0] - '0');
}

Handler load(const Decoder& d, size_t rank, bool cluster) {
  if (!d.take("global")) d.unknown("source");
  d.take("tile");
  TensorOperands o;
  o.cluster = cluster;
  take_mbarrier(d, o);
  const bool hint = take_cache_hint(d);
  expect_operands(d, o.multicast ? 4 : 3, hint);
  o.shared = address_of(d, d.operand(0)), o.barrier = address_of(d, d.operand(2));
  o.take_tensor(d, 1, rank);
  if (o.multicast) o.mask = d.source(3);
  return [o](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const Bulk bulk = o.bulk(c, lane);
      const auto destinations = o.destinations(c, lane, bulk.bytes, kAlignment);
      o.check_pattern(c, bulk, destinations.front().offset);
      issue_load(bulk, destinations);
    });
    return Outcome::kNext;
  };
}

const Reduction* reduction_of(const Context& c, const std::string& op, const ElementType& type) {
  const bool logic = op == "and" || op == "or" || op == "xor";
  const Reduction* reduction = find_reduction(op, logic ? type.bits : type.name);
  if (reduction == nullptr || std::strcmp(type.name, "f64") == 0)
    fail(c, "no reduction ." + op + " of a tensor with elements of type ." + type.name);
  return reduction;
}

// `op` is empty for a plain store.
Handler store(const Decoder& d, size_t rank, const std::string& op) {
  d.take("tile");
  if (!d.take("bulk_group")) d.unknown("completion");
  const bool hint = take_cache_hint(d);
  expect_operands(d, 2, hint);
  TensorOperands o;
  o.take_tensor(d, 0, rank);
  o.shared = address_of(d, d.operand(1));
  return [o, op](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      Bulk bulk = o.bulk(c, lane);
      if (!op.empty()) bulk.reduction = reduction_of(c, op, bulk.box->type());
      for (int64_t start : bulk.box->start)
        if (start < 0) fail(c, "a store may not start at a negative coordinate");
      const uint32_t source = o.source(c, lane, bulk.bytes, kAlignment);
      o.check_pattern(c, bulk, source);
      issue_store(c, lane, bulk, source);
    });
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_tensor_copy(const Decoder& d) {
  const size_t rank = take_rank(d);
  if (d.take("shared::cluster")) return load(d, rank, true);
  if (d.take("shared::cta")) return load(d, rank, false);
  if (!(d.take("global") && d.take("shared::cta"))) d.unknown("bulk copy");
  return store(d, rank, "");
}

Handler decode_tensor_reduce(const Decoder& d) {
  static const std::set<std::string> kOps = {"add", "min", "max", "inc", "dec", "and", "or", "xor"};
  const size_t rank = take_rank(d);
  if (!(d.take("global") && d.take("shared::cta"))) d.unknown("reduction");
  const std::string op = d.next();
  if (!kOps.contains(op)) d.unknown("reduction");
  return store(d, rank, op);
}

// Into the L2 cache, which is not modelled: map and coordinates are checked.
Handler decode_tensor_fetch(const Decoder& d) {
  const size_t rank = take_rank(d);
  if (!(d.take("L2") && d.take("global"))) d.unknown("prefetch");
  d.take("tile");
  const bool hint = take_cache_hint(d);
  expect_operands(d, 1, hint);
  TensorOperands o;
  o.take_tensor(d, 0, rank);
  return [o](Context& c) {
    for_lanes(c.mask, [&](int lane) { o.bulk(c, lane); });
    return Outcome::kNext;
  };
}

}  // namespace emulator
