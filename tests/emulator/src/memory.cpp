// Addresses, loads and stores.
#include "memory.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <sstream>

#include "copies.h"

namespace emulator {
namespace {

std::string hex(uint64_t value) { return (std::ostringstream() << "0x" << std::hex << value).str(); }

Place locate_param(Context& c, int lane, uint64_t address, uint32_t bytes, bool write) {
  Place place{Space::kParam, nullptr};
  const bool frame = address & kFrameParam;
  const uint64_t at = frame ? address & ~kFrameParam : address;
  auto& memory = frame ? c.warp.params[lane] : c.grid.parameters;
  if (at > memory.size() || bytes > memory.size() - at) fail(c, "out of bounds: outside the parameters");
  if (write && !frame) fail(c, "the parameters of a kernel are read-only");
  place.host = memory.data() + at;
  return place;
}

}  // namespace

Place locate(Context& c, int lane, std::optional<Space> space, uint64_t address, uint32_t bytes, bool write) {
  if (address % bytes != 0)
    fail(c, "misaligned: address " + hex(address) + " is not a multiple of the " + std::to_string(bytes) +
                " bytes accessed");
  if (!space) {
    const uint64_t window = address & kWindowMask;
    space = window == kSharedWindow  ? Space::kShared
            : window == kLocalWindow ? Space::kLocal
            : window == kParamWindow ? Space::kParam
                                     : Space::kGlobal;
    if (space != Space::kGlobal) address &= ~kWindowMask;
  }
  switch (*space) {
    case Space::kShared: {
      const SharedPlace at = resolve_shared(c.cta, static_cast<uint32_t>(address), bytes, c);
      return {Space::kShared, nullptr, at.cta, at.offset};
    }
    case Space::kLocal: {
      auto& local = c.warp.local[lane];
      if (address > local.size() || bytes > local.size() - address) fail(c, "out of bounds: outside local memory");
      return {Space::kLocal, local.data() + address};
    }
    case Space::kParam:
      return locate_param(c, lane, address, bytes, write);
    default:
      return {Space::kGlobal, c.machine.memory.find(address, bytes, write, c), nullptr, 0, address};
  }
}

bool load(Context& c, int lane, const Place& place, void* out, uint32_t bytes, Order order) {
  bool defined = true;
  switch (place.space) {
    case Space::kShared:
      defined = shared_read(c, lane, *place.cta, place.offset, out, bytes, order.strong);
      break;
    case Space::kGlobal:
      global_load(c, lane, place.address, out, bytes, order);
      break;
    default:
      std::memcpy(out, place.host, bytes);
  }
  if (order.strong) race_acquire(c, 1u << lane);
  return defined;
}

void store(Context& c, int lane, const Place& place, const void* in, uint32_t bytes, Order order) {
  if (order.strong) race_release(c, 1u << lane);
  switch (place.space) {
    case Space::kShared:
      return shared_write(c, lane, *place.cta, place.offset, in, bytes, order.strong);
    case Space::kGlobal:
      return global_store(c, lane, place.address, in, bytes, order);
    default:
      std::memcpy(place.host, in, bytes);
      c.warp.private_writes++;
  }
}

Order take_order(const Decoder& d, bool load) {
  Order order;
  if (d.take("weak")) return order;
  if (d.take("volatile")) return {.strong = true, .scope = Scope::kSys};
  const bool mmio = d.take("mmio");
  order.acquire = d.take("acquire");
  order.release = !order.acquire && d.take("release");
  if (!order.acquire && !order.release && d.take("acq_rel")) order.acquire = order.release = true;
  order.strong = order.acquire || order.release || d.take("relaxed");
  if (mmio && !order.strong) d.unknown("order");
  if (!order.strong) return order;
  if (load ? order.release && !order.acquire : order.acquire && !order.release) d.unknown("order");
  order.scope = d.take("cta")       ? Scope::kCta
                : d.take("cluster") ? Scope::kCluster
                : d.take("gpu")     ? Scope::kGpu
                : d.take("sys")     ? Scope::kSys
                                    : (d.unknown("scope"), Scope::kCta);
  return order;
}

std::optional<Space> take_space(const Decoder& d) {
  if (d.take("global")) return Space::kGlobal;
  if (d.take("shared") || d.take("shared::cta") || d.take("shared::cluster")) return Space::kShared;
  if (d.take("local")) return Space::kLocal;
  if (d.take("param") || d.take("param::entry") || d.take("param::func")) return Space::kParam;
  if (d.take("const")) return Space::kConst;
  return std::nullopt;
}

Address address_of(const Decoder& d, const Operand& operand) {
  if (operand.kind != Operand::Kind::kMemory || operand.elements.size() != 1) d.unknown("address");
  return {d.source(operand.elements[0]), operand.integer};
}

void count_global(Context& c, const LaneAddresses& addresses, uint32_t lanes) {
  std::array<uint64_t, kLanes> sectors;
  size_t count = 0;
  for_lanes(lanes, [&](int lane) { sectors[count++] = addresses[lane] / 32; });
  std::sort(sectors.begin(), sectors.begin() + count);
  c.grid.counters.global_sectors += std::unique(sectors.begin(), sectors.begin() + count) - sectors.begin();
}

// 32 banks of 4 bytes: wider accesses go in two or four parts of the warp. Lanes at the same word share it.
void count_shared(Context& c, const LaneAddresses& offsets, uint32_t lanes, uint32_t bytes) {
  const uint32_t words = std::max(1u, bytes / 4), part = kLanes / words;
  for (uint32_t first = 0; first < kLanes; first += part) {
    std::array<std::array<uint64_t, kLanes>, 32> bank{};
    std::array<uint32_t, 32> used{};
    uint32_t most = 0;
    for (uint32_t lane = first; lane < first + part; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uint32_t word = offsets[lane] / 4; word < offsets[lane] / 4 + words; ++word) {
        auto& in = bank[word % 32];
        uint32_t& n = used[word % 32];
        if (std::find(in.begin(), in.begin() + n, word) == in.begin() + n) in[n++] = word;
        most = std::max(most, n);
      }
    }
    if (most > 1) c.grid.counters.shared_bank_conflicts += most - 1;
  }
}

namespace {

struct Access {
  std::optional<Space> space;
  Order order;
  int bytes, vector = 1;
  bool sign;
  std::vector<int> registers;   // of a load, -1 for a sink
  std::vector<Source> sources;  // of a store
  Address address;

  uint32_t total() const { return static_cast<uint32_t>(bytes * vector); }
};

// What says how caches treat the access: without meaning here. Whether a cache policy is among the operands.
bool take_hints(const Decoder& d, Access& access, bool load) {
  bool policy = false;
  while (!d.done()) {
    const std::string& m = d.instruction.modifiers[d.used];
    const bool cached = m == "cg" || m == "cs" || (load ? m == "ca" || m == "lu" || m == "cv" : m == "wb" || m == "wt");
    if (load && m == "nc") {
      access.order.constant = true;
    } else if (m == "L2::cache_hint") {
      policy = true;
    } else if (m == "cv") {
      access.order.strong = true, access.order.scope = Scope::kSys;
    } else if (!cached && !m.starts_with("L1::") && m != "L2::64B" && m != "L2::128B" && m != "L2::256B") {
      break;
    }
    d.used++;
  }
  return policy;
}

Access decode_access(const Decoder& d, bool load) {
  Access access{};
  access.order = take_order(d, load);
  access.space = take_space(d);
  if (access.space == Space::kConst) {
    if (!load) d.unknown("store");
    access.space = Space::kGlobal;
  }
  const bool policy = take_hints(d, access, load);
  if (access.order.constant && access.space != Space::kGlobal) d.unknown("state space");
  if (d.take("v2")) access.vector = 2;
  if (d.take("v4")) access.vector = 4;
  const std::string type = d.next();
  access.bytes = bytes_of(type);
  access.sign = type[0] == 's';
  if (access.total() > 16 || access.bytes > 8 || type == "pred" || type.ends_with("x2")) d.unknown("type");
  d.expect_done();
  d.operands(policy ? 3 : 2);
  const Operand &memory = d.operand(load ? 1 : 0), &value = d.operand(load ? 0 : 1);
  access.address = address_of(d, memory);
  if (policy) d.source(2);
  const auto add = [&](const Operand& operand) {
    if (load)
      access.registers.push_back(d.destination(operand));
    else
      access.sources.push_back(d.source(operand));
  };
  if (value.kind == Operand::Kind::kVector)
    for (const Operand& element : value.elements) add(element);
  else
    add(value);
  if ((load ? access.registers.size() : access.sources.size()) != static_cast<size_t>(access.vector))
    d.unknown("number of registers");
  return access;
}

void count(Context& c, const LaneAddresses& addresses, uint32_t shared, uint32_t global, uint32_t bytes) {
  if (shared) count_shared(c, addresses, shared, bytes);
  if (global) count_global(c, addresses, global);
}

Handler decode_load(const Decoder& d) {
  d.touched.defines = true;
  return [a = decode_access(d, true)](Context& c) {
    LaneAddresses addresses{};
    uint32_t shared = 0, global = 0;
    std::array<std::array<uint8_t, 16>, kLanes> values;
    std::array<bool, kLanes> defined;
    for_lanes(c.mask, [&](int lane) {
      const Place place = locate(c, lane, a.space, a.address.get(c, lane), a.total(), false);
      defined[lane] = load(c, lane, place, values[lane].data(), a.total(), a.order);
      addresses[lane] = place.space == Space::kShared ? place.offset : place.address;
      if (place.space == Space::kShared) shared |= 1u << lane;
      if (place.space == Space::kGlobal) global |= 1u << lane;
    });
    // Before the registers change: a loop that spins here comes back to the same state.
    if (shared | global) c.machine.note_poll(c.warp);
    for_lanes(c.mask, [&](int lane) {
      for (int i = 0; i < a.vector; ++i) {
        if (a.registers[i] < 0) continue;
        uint64_t value = 0;
        std::memcpy(&value, values[lane].data() + i * a.bytes, a.bytes);
        if (a.sign && a.bytes < 8 && (value >> (8 * a.bytes - 1) & 1)) value |= ~0ull << 8 * a.bytes;
        c.warp.reg(a.registers[i])[lane] = value;
        uint32_t& known = c.warp.defined[a.registers[i]];
        known = defined[lane] ? known | 1u << lane : known & ~(1u << lane);
      }
    });
    count(c, addresses, shared, global, a.total());
    return Outcome::kNext;
  };
}

Handler decode_store(const Decoder& d) {
  return [a = decode_access(d, false)](Context& c) {
    LaneAddresses addresses{};
    uint32_t shared = 0, global = 0;
    for_lanes(c.mask, [&](int lane) {
      const Place place = locate(c, lane, a.space, a.address.get(c, lane), a.total(), true);
      uint8_t bytes[16];
      for (int i = 0; i < a.vector; ++i) {
        const uint64_t value = a.sources[i].get(c, lane);
        std::memcpy(bytes + i * a.bytes, &value, a.bytes);
      }
      store(c, lane, place, bytes, a.total(), a.order);
      addresses[lane] = place.space == Space::kShared ? place.offset : place.address;
      if (place.space == Space::kShared) shared |= 1u << lane;
      if (place.space == Space::kGlobal) global |= 1u << lane;
    });
    count(c, addresses, shared, global, a.total());
    return Outcome::kNext;
  };
}

// createpolicy.fractional.L2::evict_x{.L2::evict_unchanged}.b64 policy{, fraction}: a hint for L2 without meaning here.
// The bits are those that ptxas computes.
Handler create_policy(const Decoder& d) {
  static const std::map<std::string, uint64_t> kPolicies = {{"L2::evict_unchanged", 0x1000000000000000},
                                                            {"L2::evict_first", 0x1200000000000000},
                                                            {"L2::evict_last", 0x1400000000000000},
                                                            {"L2::evict_normal", 0x1600000000000000}};
  if (!d.take("fractional")) d.unknown("policy");
  const auto found = kPolicies.find(d.next());
  if (found == kPolicies.end()) d.unknown("policy");
  if (!d.take("L2::evict_unchanged")) d.take("L2::evict_first");
  if (!d.take("b64")) d.unknown("type");
  d.expect_done();
  const bool whole = d.instruction.operands.size() == 1;
  d.operands(whole ? 1 : 2);
  const Source fraction = whole ? Source{} : d.source(1);
  return [=, policy = found->second, to = d.destination(0)](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const float share = whole ? 1 : std::bit_cast<float>(static_cast<uint32_t>(fraction.get(c, lane)));
      if (!(share > 0 && share <= 1)) fail(c, "a fraction is above 0 and at most 1");
      if (to >= 0) c.warp.reg(to)[lane] = policy | (std::max<uint64_t>(1, static_cast<uint64_t>(16 * share)) - 1) << 52;
    });
    return Outcome::kNext;
  };
}

// prefetch, prefetchu, discard and applypriority: of a cache line, without effect here.
Handler touch_line(const Decoder& d) {
  static const std::set<std::string> kForms = {"prefetch.L1",
                                               "prefetch.L2",
                                               "prefetch.global.L1",
                                               "prefetch.global.L2",
                                               "prefetch.local.L1",
                                               "prefetch.local.L2",
                                               "prefetch.global.L2::evict_last",
                                               "prefetch.global.L2::evict_normal",
                                               "prefetchu.L1",
                                               "discard.L2",
                                               "discard.global.L2",
                                               "applypriority.L2::evict_normal",
                                               "applypriority.global.L2::evict_normal"};
  std::string form = d.instruction.opcode;
  while (!d.done()) form += "." + d.next();
  if (!kForms.contains(form)) d.unknown("modifier");
  d.operands(form.starts_with("prefetch") ? 1 : 2);
  address_of(d, d.operand(0));
  return [](Context&) { return Outcome::kNext; };
}

}  // namespace

Handler decode_memory(const Decoder& d) {
  if (d.instruction.opcode == "ld" || d.instruction.opcode == "ldu") return decode_load(d);
  if (d.instruction.opcode == "st") return decode_store(d);
  if (is_tensor_map_prefetch(d.instruction)) return {};
  static const std::set<std::string> kLines = {"prefetch", "prefetchu", "discard", "applypriority"};
  if (kLines.contains(d.instruction.opcode)) return touch_line(d);
  if (d.instruction.opcode == "createpolicy") return create_policy(d);
  return {};
}

}  // namespace emulator
