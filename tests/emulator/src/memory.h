// What lanes read and write by the generic proxy, in any space.
#pragma once
#include <array>
#include <optional>

#include "machine.h"

namespace emulator {

// An address of a lane with its space found out and its bounds and alignment checked.
struct Place {
  Space space;
  uint8_t* host;         // but for shared memory
  Cta* cta = nullptr;    // of shared memory
  uint32_t offset = 0;   // in it
  uint64_t address = 0;  // in global memory
};
// nullopt is a generic address.
Place locate(Context& context, int lane, std::optional<Space> space, uint64_t address, uint32_t bytes, bool write);

// At most 16 bytes. A read says whether all of them are defined.
bool load(Context& context, int lane, const Place& place, void* out, uint32_t bytes, Order order);
void store(Context& context, int lane, const Place& place, const void* in, uint32_t bytes, Order order);

// Consumes ".relaxed.gpu" and the like; `d` stands at them, or at what follows where there is none.
Order take_order(const Decoder& d, bool load);
// Consumes a state space; nullopt where there is none.
std::optional<Space> take_space(const Decoder& d);

// [base + offset].
struct Address {
  Source base;
  int64_t offset = 0;

  uint64_t get(Context& context, int lane) const { return base.get(context, lane) + static_cast<uint64_t>(offset); }
};
Address address_of(const Decoder& d, const Operand& operand);

// Lane by lane in a random order, as the hardware may serve those of one atomic instruction.
template <class F>
void for_shuffled(Context& c, F f) {
  std::array<int, kLanes> lanes;
  uint32_t count = 0;
  for_lanes(c.mask, [&](int lane) { lanes[count++] = lane; });
  for (; count > 0; --count) {
    std::swap(lanes[c.machine.below(count)], lanes[count - 1]);
    f(lanes[count - 1]);
  }
}

using LaneAddresses = std::array<uint64_t, kLanes>;
// Counts the 32-byte sectors, or the bank conflicts, of one access by `lanes`.
void count_global(Context& context, const LaneAddresses& addresses, uint32_t lanes);
void count_shared(Context& context, const LaneAddresses& offsets, uint32_t lanes, uint32_t bytes);

}  // namespace emulator
