// Tensor maps: where they may lie, how device code changes them, and the fences of the tensormap proxy.
#include <cstddef>
#include <cstring>

#include "copies.h"

namespace emulator {

bool is_global(uint64_t address) {
  const uint64_t window = address & kWindowMask;
  return window != kSharedWindow && window != kLocalWindow && window != kParamWindow && window != kFunctionWindow;
}

const uint8_t* find_tensor_map(Context& c, uint64_t address) {
  if (address % kMapAlignment) fail(c, "a tensor map lies at a multiple of 64 bytes");
  if (is_global(address)) return c.machine.memory.find(address, kMapBytes, false, c);
  const uint64_t offset = address & ~kWindowMask;
  const auto& parameters = c.grid.parameters;
  if ((address & kWindowMask) != kParamWindow)
    fail(c, "a tensor map lies among the parameters, in constant or in global memory");
  if (offset > parameters.size() || kMapBytes > parameters.size() - offset)
    fail(c, "no tensor map in the parameters there");
  return parameters.data() + offset;
}

std::shared_ptr<void> use_tensor_map(Machine& machine, uint64_t address) {
  if (!is_global(address)) return nullptr;
  auto& use = machine.maps_in_use[address];
  std::shared_ptr<void> mark = use.lock();
  if (!mark) use = mark = std::make_shared<char>();
  return mark;
}

void check_not_stale(Context& c, uint64_t address) {
  if (!is_global(address)) return;
  const GlobalMemory& memory = c.machine.memory;
  const auto acquired = c.cta.observed.tensor_maps.find(address);
  for (uint64_t granule = address / kGranule; granule < (address + kMapBytes) / kGranule; ++granule) {
    const auto found = memory.versions.find(granule);
    const bool pending = c.cta.stores.granules.contains(granule);
    if (!pending && (found == memory.versions.end() || found->second.time <= c.grid.started)) continue;
    const auto released = pending ? memory.map_releases.end() : memory.map_releases.find(found->second.cta);
    if (released == memory.map_releases.end() || released->second < found->second.time)
      fail(c, "stale tensor map: no fence.proxy.tensormap::generic.release since it was changed");
    if (acquired == c.cta.observed.tensor_maps.end() || acquired->second < found->second.time)
      fail(c, "stale tensor map: no fence.proxy.tensormap::generic.acquire of it by this CTA since it was changed");
  }
}

bool is_tensor_map_prefetch(const Instruction& instruction) {
  return instruction.opcode == "prefetch" && !instruction.modifiers.empty() &&
         instruction.modifiers.back() == "tensormap";
}

namespace {

void check_not_in_use(Context& c, const Place& place) {
  if (place.space != Space::kGlobal) return;
  const auto found = c.machine.maps_in_use.find(place.address);
  if (found != c.machine.maps_in_use.end() && !found->second.expired())
    fail(c, "it changes a tensor map that a copy in flight uses");
}

// A map that the generic proxy changes, or copies.
Place locate_map(Context& c, int lane, std::optional<Space> space, uint64_t address, bool write) {
  const Place place = locate(c, lane, space, address, kMapAlignment, write);
  if (place.space != Space::kShared && place.space != Space::kGlobal)
    fail(c, "a tensor map is changed in shared or global memory");
  locate(c, lane, space, address + kMapAlignment, kMapAlignment, write);
  if (place.cta != nullptr && place.cta != &c.cta) fail(c, "the tensor map is in another CTA's shared memory");
  if (write) check_not_in_use(c, place);
  return place;
}

// Part `i` of 16 bytes.
Place part(Place place, uint32_t i) {
  place.offset += i * kGranule, place.address += i * kGranule;
  return place;
}

using MapBytes = std::array<uint8_t, kMapBytes>;

MapBytes load_map(Context& c, int lane, const Place& place) {
  MapBytes bytes;
  for (uint32_t i = 0; i < kMapBytes / kGranule; ++i) {
    if (!load(c, lane, part(place, i), bytes.data() + i * kGranule, kGranule, {}))
      fail(c, "the tensor map's memory has not been written: clear its 128 bytes first");
  }
  return bytes;
}

void store_map(Context& c, int lane, const Place& place, const MapBytes& bytes) {
  for (uint32_t i = 0; i < kMapBytes / kGranule; ++i)
    store(c, lane, part(place, i), bytes.data() + i * kGranule, kGranule, {});
}

// What tensormap.replace can change: values from `least` to `most` in steps, stored less `least`.
struct Field {
  const char* name;
  int bytes;          // of the operand
  uint32_t ordinals;  // 0 where it takes none
  bool immediate;
  uint64_t least, most, step;
  size_t offset;
  uint32_t stored;  // bytes of each
};

constexpr uint64_t kAnyAddress = ~0ull, kMostElements = (1ull << 32) - 1;
const Field kFields[] = {
    {"global_address", 8, 0, false, 0, kAnyAddress, 16, offsetof(TensorMapBits, address), 8},
    {"rank", 4, 0, false, 0, kMaxRank - 1, 1, offsetof(TensorMapBits, rank), 1},
    {"box_dim", 4, kMaxRank, false, 1, kMaxBox, 1, offsetof(TensorMapBits, box), 2},
    {"global_dim", 4, kMaxRank, false, 1, kMostElements, 1, offsetof(TensorMapBits, dims), 4},
    {"global_stride", 8, kMaxRank - 1, false, 0, kMaxStride - 16, 16, offsetof(TensorMapBits, strides), 8},
    {"element_stride", 4, kMaxRank, false, 1, kMaxElementStride, 1, offsetof(TensorMapBits, element_strides), 1},
    {"elemtype", 4, 0, true, 0, kElementTypeCount - 1, 1, offsetof(TensorMapBits, element_type), 1},
    {"interleave_layout", 4, 0, true, 0, kMostInterleave, 1, offsetof(TensorMapBits, interleave), 1},
    {"swizzle_mode", 4, 0, true, 0, kMostSwizzle, 1, offsetof(TensorMapBits, swizzle), 1},
    {"fill_mode", 4, 0, true, 0, 1, 1, offsetof(TensorMapBits, fill_nan), 1},
};

const Field& take_field(const Decoder& d) {
  for (const Field& field : kFields)
    if (d.take(field.name)) return field;
  d.unknown("field of a tensor map");
}

// tensormap.replace.tile.FIELD{.global,.shared::cta}.b1024.TYPE [map]{, ordinal}, value
Handler replace(const Decoder& d) {
  if (!d.take("tile")) d.unknown("mode");
  const Field field = take_field(d);
  std::optional<Space> space;
  if (d.take("global")) space = Space::kGlobal;
  if (!space && d.take("shared::cta")) space = Space::kShared;
  if (!(d.take("b1024") && d.take(field.bytes == 8 ? "b64" : "b32"))) d.unknown("type");
  d.expect_done();
  d.operands(field.ordinals ? 3 : 2);
  const Address map = address_of(d, d.operand(0));
  size_t offset = field.offset;
  if (field.ordinals) {
    const Operand& ordinal = d.operand(1);
    if (ordinal.kind != Operand::Kind::kInteger || ordinal.integer < 0 || ordinal.integer >= field.ordinals)
      d.unknown("ordinal, which is 0 to " + std::to_string(field.ordinals - 1));
    offset += static_cast<size_t>(ordinal.integer) * field.stored;
  }
  const Operand& given = d.operand(field.ordinals ? 2 : 1);
  if (field.immediate && given.kind != Operand::Kind::kInteger) d.unknown("value, which is a constant");
  return [=, value = d.source(given)](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      uint64_t v = value.get(c, lane);
      if (field.bytes == 4) v &= 0xffffffff;
      if (v < field.least || v > field.most || v % field.step)
        fail(c, std::string(field.name) + " of " + std::to_string(v) + ": expected " + std::to_string(field.least) +
                    " to " + std::to_string(field.most) + " in steps of " + std::to_string(field.step));
      v -= field.least;
      const Place place = locate_map(c, lane, space, map.get(c, lane), true);
      MapBytes bytes = load_map(c, lane, place);
      std::memcpy(bytes.data() + offset, &v, field.stored);
      store_map(c, lane, place, bytes);
    });
    return Outcome::kNext;
  };
}

void take_scope(const Decoder& d) {
  if (!(d.take("cta") || d.take("cluster") || d.take("gpu") || d.take("sys"))) d.unknown("scope");
}

void expect_map_size(const Decoder& d, size_t index) {
  const Operand& size = d.operand(index);
  if (size.kind != Operand::Kind::kInteger || size.integer != kMapBytes) d.unknown("size, which is 128");
}

// What the lanes know of becomes visible to the device, whatever the scope, before the maps among it can be acquired.
void release_maps(Context& c) {
  global_fence(c, {.strong = true, .release = true, .scope = Scope::kGpu});
  c.machine.memory.map_releases[c.cta.uid] = c.machine.memory.now;
}

// tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.SCOPE.sync.aligned [to], [from], 128
Handler copy_and_fence(const Decoder& d) {
  if (!(d.take("global") && d.take("shared::cta") && d.take("tensormap::generic") && d.take("release")))
    d.unknown("tensormap.cp_fenceproxy");
  take_scope(d);
  if (!(d.take("sync") && d.take("aligned"))) d.unknown("tensormap.cp_fenceproxy");
  d.expect_done();
  d.operands(3);
  expect_map_size(d, 2);
  return [to = address_of(d, d.operand(0)), from = address_of(d, d.operand(1))](Context& c) {
    if (!converged(c)) return Outcome::kBlocked;
    const int first = __builtin_ctz(c.mask);
    const uint64_t target = to.get(c, first), source = from.get(c, first);
    for_lanes(c.mask, [&](int lane) {
      if (to.get(c, lane) != target || from.get(c, lane) != source) fail(c, "lanes give different addresses");
    });
    if (target % kMapBytes || source % kMapBytes) fail(c, "tensormap.cp_fenceproxy copies between multiples of 128");
    const Place place = locate_map(c, first, Space::kGlobal, target, true);
    store_map(c, first, place, load_map(c, first, locate_map(c, first, Space::kShared, source, false)));
    release_maps(c);
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_tensor_map(const Decoder& d) {
  if (d.take("replace")) return replace(d);
  if (d.take("cp_fenceproxy")) return copy_and_fence(d);
  d.unknown("instruction");
}

// fence.proxy.tensormap::generic.release.SCOPE, and .acquire.SCOPE [map], 128
Handler decode_tensor_map_fence(const Decoder& d) {
  const bool acquires = d.take("acquire");
  if (!acquires && !d.take("release")) d.unknown("fence");
  take_scope(d);
  d.expect_done();
  d.operands(acquires ? 2 : 0);
  if (!acquires)
    return [](Context& c) {
      release_maps(c);
      return Outcome::kNext;
    };
  expect_map_size(d, 1);
  return [map = address_of(d, d.operand(0))](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const uint64_t address = map.get(c, lane);
      if (!is_global(address)) fail(c, "the tensor map is not in global memory");
      find_tensor_map(c, address);
      c.cta.observed.tensor_maps[address] = c.machine.memory.now;
    });
    return Outcome::kNext;
  };
}

// prefetch{.param,.const}.tensormap [map]
Handler decode_tensor_map_prefetch(const Decoder& d) {
  const bool param = d.take("param");
  if (!param) d.take("const");
  if (!d.take("tensormap")) d.unknown("prefetch");
  d.expect_done();
  d.operands(1);
  return [=, map = address_of(d, d.operand(0))](Context& c) {
    for_lanes(c.mask, [&](int lane) { find_tensor_map(c, map.get(c, lane) | (param ? kParamWindow : 0)); });
    return Outcome::kNext;
  };
}

}  // namespace emulator
