// Atomic operations and reductions on memory.
#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "memory.h"

namespace emulator {
namespace {

// The new value of an element from the old one and the operands.
using Apply = uint64_t (*)(uint64_t old, uint64_t b, uint64_t c);

template <class T>
Apply integer_operation(const std::string& op) {
  if (op == "add") return [](uint64_t old, uint64_t b, uint64_t) -> uint64_t { return old + b; };
  if (op == "min")
    return [](uint64_t old, uint64_t b, uint64_t) {
      return static_cast<uint64_t>(std::min(static_cast<T>(old), static_cast<T>(b)));
    };
  if (op == "max")
    return [](uint64_t old, uint64_t b, uint64_t) {
      return static_cast<uint64_t>(std::max(static_cast<T>(old), static_cast<T>(b)));
    };
  return nullptr;
}

template <class T>
Apply bit_operation(const std::string& op) {
  if (op == "and") return [](uint64_t old, uint64_t b, uint64_t) { return old & b; };
  if (op == "or") return [](uint64_t old, uint64_t b, uint64_t) { return old | b; };
  if (op == "xor") return [](uint64_t old, uint64_t b, uint64_t) { return old ^ b; };
  if (op == "exch") return [](uint64_t, uint64_t b, uint64_t) { return b; };
  if (op == "cas")
    return [](uint64_t old, uint64_t b, uint64_t c) { return static_cast<T>(old) == static_cast<T>(b) ? c : old; };
  return nullptr;
}

Apply wrapping_operation(const std::string& op) {
  if (op == "inc")
    return [](uint64_t old, uint64_t b, uint64_t) -> uint64_t { return old >= (b & 0xffffffff) ? 0 : old + 1; };
  if (op == "dec")
    return [](uint64_t old, uint64_t b, uint64_t) { return old == 0 || old > (b & 0xffffffff) ? b : old - 1; };
  return nullptr;
}

template <const Format& kFormat>
uint64_t sum(uint64_t a, uint64_t b, uint64_t) {
  const uint64_t all = 2 * kFormat.sign() - 1;
  return pack(kFormat, add(unpack(kFormat, a & all), unpack(kFormat, b & all), Rounding::kEven));
}

// The one that is a number, where the other is not; -0 is below +0.
template <const Format& kFormat, bool kHigher>
uint64_t extreme(uint64_t a, uint64_t b, uint64_t) {
  a &= 2 * kFormat.sign() - 1, b &= 2 * kFormat.sign() - 1;
  if (kFormat.is_nan(a) && kFormat.is_nan(b)) return kFormat.nan();
  if (kFormat.is_nan(a) || kFormat.is_nan(b)) return kFormat.is_nan(a) ? b : a;
  const int64_t x = kFormat.order(a), y = kFormat.order(b);
  const bool less = x < y || (x == y && a > b);
  return less == kHigher ? b : a;
}

template <const Format& kFormat>
Apply half_operation(const std::string& op) {
  if (op == "add") return sum<kFormat>;
  if (op == "min") return extreme<kFormat, false>;
  if (op == "max") return extreme<kFormat, true>;
  return nullptr;
}

// Null where the ISA has no such operation on the type.
Apply find_operation(const std::string& op, const std::string& type) {
  if (type == "b16" && op == "cas") return bit_operation<uint16_t>(op);
  if (type == "b32") return bit_operation<uint32_t>(op);
  if (type == "b64") return bit_operation<uint64_t>(op);
  if (type == "u32" && (op == "inc" || op == "dec")) return wrapping_operation(op);
  if (type == "u32") return integer_operation<uint32_t>(op);
  if (type == "s32") return integer_operation<int32_t>(op);
  if (type == "u64") return integer_operation<uint64_t>(op);
  if (type == "s64" && op != "add") return integer_operation<int64_t>(op);
  if (type == "f16" || type == "f16x2") return half_operation<kF16>(op);
  if (type == "bf16" || type == "bf16x2") return half_operation<kBf16>(op);
  if (op != "add") return nullptr;
  if (type == "f32") return sum<kF32>;
  if (type == "f64") return sum<kF64>;
  return nullptr;
}

// In global memory, adding f32 flushes subnormals; in shared memory it does not.
uint64_t add_flushing(uint64_t a, uint64_t b, uint64_t c) {
  const auto flushed = [](uint64_t value) { return kF32.flushed(value & 0xffffffff); };
  return flushed(sum<kF32>(flushed(a), flushed(b), c));
}

struct Atomic {
  Order order{.strong = true, .scope = Scope::kGpu};
  std::optional<Space> space;
  std::string op, type;
  Apply in_shared, in_global;
  uint32_t bytes, vector = 1;  // of what the operation works on, and how many
  bool compares;               // cas
  Address address;
  std::vector<int> results;  // none of a red
  std::vector<Source> b;     // of each element; two of them in one register for f16x2
  Source c;

  uint32_t total() const { return bytes * vector; }
};

bool take_semantics(const Decoder& d, Order& order, bool reduction) {
  if (d.take("relaxed")) return true;
  if (!reduction && d.take("acquire")) return order.acquire = true;
  if (d.take("release")) return order.release = true;
  if (!reduction && d.take("acq_rel")) return order.acquire = order.release = true;
  return false;
}

bool take_scope(const Decoder& d, Order& order) {
  if (d.take("cta")) return order.scope = Scope::kCta, true;
  if (d.take("cluster")) return order.scope = Scope::kCluster, true;
  if (d.take("sys")) return order.scope = Scope::kSys, true;
  return d.take("gpu");
}

bool take_name(const Decoder& d, std::string& name, const std::set<std::string>& names) {
  if (d.done() || !names.contains(d.instruction.modifiers[d.used])) return false;
  name = d.next();
  return true;
}

// A vector is followed by the type of its elements.
bool take_vector(const Decoder& d, Atomic& a, const std::set<std::string>& types) {
  a.vector = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
  if (a.vector == 1) return false;
  if (!take_name(d, a.type, types)) d.unknown("vector");
  return true;
}

// Compilers write these modifiers in many orders, and ptxas takes them. Whether a cache policy is given.
bool take_modifiers(const Decoder& d, Atomic& a, bool reduction) {
  static const std::set<std::string> kOperations = {"add", "min",  "max", "and", "or",
                                                    "xor", "exch", "cas", "inc", "dec"};
  static const std::set<std::string> kTypes = {"b16", "b32", "b64", "u32",  "u64",   "s32",   "s64",
                                               "f32", "f64", "f16", "bf16", "f16x2", "bf16x2"};
  bool semantics = false, scope = false, space = false, noftz = false, policy = false;
  while (!d.done()) {
    const size_t before = d.used;
    semantics = semantics || take_semantics(d, a.order, reduction);
    scope = scope || take_scope(d, a.order);
    if (!space) a.space = take_space(d), space = a.space.has_value();
    if (a.op.empty()) take_name(d, a.op, kOperations);
    noftz = noftz || d.take("noftz");
    policy = policy || d.take("L2::cache_hint");
    if (a.type.empty()) take_vector(d, a, kTypes);
    if (a.type.empty()) take_name(d, a.type, kTypes);
    if (d.used == before) d.expect_done();
  }
  if (a.op.empty() || a.type.empty()) d.unknown("atomic operation");
  if (a.space && *a.space != Space::kGlobal && *a.space != Space::kShared) d.unknown("state space");
  a.compares = a.op == "cas";
  a.in_shared = a.in_global = find_operation(a.op, a.type);
  const bool half = a.type.starts_with("f16") || a.type.starts_with("bf16");
  const bool flushes = half && a.op == "add";
  if (a.in_shared == nullptr || (noftz ? !half : flushes) || (policy && a.compares))
    d.unknown("operation on ." + a.type);
  if (a.type == "f32") a.in_global = add_flushing;
  a.bytes = static_cast<uint32_t>(bytes_of(a.type));
  const bool vectors = half || a.type == "f32";
  if (a.vector > 1 && (!vectors || a.total() > 16 || a.space == Space::kShared)) d.unknown("vector");
  if (a.vector == 1 && half && a.op != "add") d.unknown("operation, which is for vectors,");
  return policy;
}

Atomic decode_operation(const Decoder& d, bool reduction) {
  Atomic a;
  const bool policy = take_modifiers(d, a, reduction);
  if (reduction && (a.op == "exch" || a.compares)) d.unknown("reduction");
  const size_t first = reduction ? 0 : 1;
  d.operands(first + 2 + a.compares + policy);
  const auto for_elements = [&](const Operand& operand, auto add) {
    if (a.vector == 1) return add(operand);
    if (operand.kind != Operand::Kind::kVector || operand.elements.size() != a.vector) d.unknown("vector");
    for (const Operand& element : operand.elements) add(element);
  };
  if (!reduction && d.operand(0).kind != Operand::Kind::kSink)
    for_elements(d.operand(0), [&](const Operand& element) { a.results.push_back(d.destination(element)); });
  a.address = address_of(d, d.operand(first));
  for_elements(d.operand(first + 1), [&](const Operand& element) { a.b.push_back(d.source(element)); });
  if (a.compares) a.c = d.source(first + 2);
  if (policy) d.source(first + 2);
  return a;
}

// The new bytes from the old ones.
void apply(Context& c, int lane, const Atomic& a, Apply operation, const uint8_t* old, uint8_t* now) {
  const uint32_t parts = a.type.ends_with("x2") ? 2 : 1, width = a.bytes / parts;
  for (uint32_t i = 0; i < a.vector * parts; ++i) {
    uint64_t value = 0;
    std::memcpy(&value, old + i * width, width);
    const uint64_t b = a.b[i / parts].get(c, lane) >> 16 * (i % parts);
    value = operation(value, b & mask_of(static_cast<int>(width)), a.c.get(c, lane));
    std::memcpy(now + i * width, &value, width);
  }
}

void on_shared(Context& c, int lane, const Atomic& a, const Place& place, uint8_t* old, uint8_t* now) {
  Context own = c;
  own.mask = 1u << lane;
  Order order = a.order;
  order.acquire = false;
  if (order.release) global_fence(own, order), race_release(own, own.mask);
  if (!shared_read(c, lane, *place.cta, place.offset, old, a.total(), true))
    fail(c, "an atomic operation on uninitialised shared memory");
  apply(c, lane, a, a.in_shared, old, now);
  if (!a.compares || std::memcmp(old, now, a.total()) != 0)
    shared_write(c, lane, *place.cta, place.offset, now, a.total(), true);
  order = a.order;
  order.release = false;
  if (order.acquire) global_fence(own, order), race_acquire(own, own.mask);
}

void on_global(Context& c, int lane, const Atomic& a, const Place& place, uint8_t* old, uint8_t* now) {
  global_atomic_begin(c, lane, place.address, old, a.total(), a.order);
  apply(c, lane, a, a.in_global, old, now);
  global_atomic_end(c, lane, place.address, now, a.total(), a.order);
}

}  // namespace

Handler decode_atomic(const Decoder& d) {
  const bool reduction = d.instruction.opcode == "red";
  if (!reduction && d.instruction.opcode != "atom") return {};
  return [a = decode_operation(d, reduction)](Context& c) {
    std::array<std::array<uint8_t, 16>, kLanes> old;
    LaneAddresses addresses{};
    uint32_t shared = 0, global = 0;
    bool changed = false;
    for_shuffled(c, [&](int lane) {
      std::array<uint8_t, 16> now{};
      const Place place = locate(c, lane, a.space, a.address.get(c, lane), a.total(), true);
      if (place.space == Space::kGlobal) {
        on_global(c, lane, a, place, old[lane].data(), now.data());
        addresses[lane] = place.address, global |= 1u << lane;
      } else if (place.space == Space::kShared && a.vector == 1) {
        on_shared(c, lane, a, place, old[lane].data(), now.data());
        addresses[lane] = place.offset, shared |= 1u << lane;
      } else {
        fail(c, "an atomic operation on another space than global and shared memory, or a vector outside of global");
      }
      changed |= std::memcmp(old[lane].data(), now.data(), a.total()) != 0;
    });
    // Before the registers change: a loop that spins here comes back to the same state.
    if (!changed) c.machine.note_poll(c.warp);
    for_lanes(c.mask, [&](int lane) {
      for (size_t i = 0; i < a.results.size(); ++i) {
        if (a.results[i] < 0) continue;
        uint64_t value = 0;
        std::memcpy(&value, old[lane].data() + i * a.bytes, a.bytes);
        c.warp.reg(a.results[i])[lane] = value;
      }
    });
    if (shared) count_shared(c, addresses, shared, a.bytes);
    if (global) count_global(c, addresses, global);
    return Outcome::kNext;
  };
}

}  // namespace emulator
