// Addresses, loads and stores.
#include <algorithm>
#include <sstream>

#include "machine.h"

namespace emulator {

uint32_t shared_offset(const Cta& cta, uint32_t address, uint64_t bytes, const std::string& who) {
  const uint64_t offset = static_cast<uint64_t>(address & 0xffffff) - kSharedBase;
  if (offset + bytes > cta.shared.size() || (address & 0xffffff) < kSharedBase) {
    std::ostringstream text;
    text << who << ": " << bytes << " bytes at shared address 0x" << std::hex << address << std::dec
         << " lie outside the CTA's " << cta.shared.size() << " bytes, which begin at 0x400";
    throw Error(text.str());
  }
  return static_cast<uint32_t>(offset);
}

void check_fenced(const Cta& cta, uint32_t offset, uint32_t bytes, const std::string& who) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (cta.unfenced[i])
      throw Error(who + ": the async proxy reads shared byte " + std::to_string(i) + ", which thread " +
                  std::to_string(cta.unfenced[i] - 1) + " wrote without a fence.proxy.async since");
  }
}

Location locate(Context& context, int lane, std::optional<Space> space, uint64_t address, uint32_t bytes, bool write) {
  if (address % bytes != 0)
    fail(context, "address 0x" + (std::ostringstream() << std::hex << address).str() + " is not a multiple of the " +
                      std::to_string(bytes) + " bytes accessed");
  if (!space) {
    const uint64_t window = address & kWindowMask;
    if (window == kSharedWindow) return locate(context, lane, Space::kShared, address & 0xffffffff, bytes, write);
    if (window == kLocalWindow) return locate(context, lane, Space::kLocal, address & 0xffffffff, bytes, write);
    if (window == kParamWindow) return locate(context, lane, Space::kParam, address & 0xffffffff, bytes, write);
    space = Space::kGlobal;
  }
  switch (*space) {
    case Space::kShared: {
      // The top byte is 0 for the own CTA, and 1 + rank for an address that mapa made.
      const uint32_t rank = static_cast<uint32_t>(address) >> 24;
      if (rank > context.cta.cluster.size()) fail(context, "no CTA of this rank in the cluster");
      Cta& cta = rank == 0 ? context.cta : *context.cta.cluster[rank - 1];
      if (cta.live_warps == 0) fail(context, "access to the shared memory of a CTA that has exited");
      const uint32_t offset = shared_offset(cta, static_cast<uint32_t>(address), bytes, where(context));
      return {cta.shared.data() + offset, &cta, offset};
    }
    case Space::kLocal: {
      const uint64_t per_lane = context.warp.local.size() / kLanes;
      if (address + bytes > per_lane) fail(context, "outside local memory");
      return {context.warp.local.data() + lane * per_lane + address, nullptr, 0};
    }
    case Space::kParam:
      if (address + bytes > context.grid.parameters.size()) fail(context, "outside the parameters");
      if (write) fail(context, "parameters are read-only");
      return {context.grid.parameters.data() + address, nullptr, 0};
    default:
      return {context.machine.global(address, bytes, write, where(context)), nullptr, 0};
  }
}

namespace {

bool is_hint(const std::string& modifier) {
  return modifier.starts_with("L1::") || modifier.starts_with("L2::") || modifier == "nc";
}

uint64_t load_bits(const uint8_t* host, int bytes, bool sign) {
  uint64_t value = 0;
  std::memcpy(&value, host, bytes);
  if (sign && bytes < 8 && (value >> (8 * bytes - 1) & 1)) value |= ~0ull << (8 * bytes);
  return value;
}

// Sectors of 32 bytes that a warp's access to global memory touches.
void count_sectors(Context& context, const std::set<uint64_t>& sectors) {
  context.grid.counters.global_sectors += sectors.size();
}

struct Access {
  std::optional<Space> space;
  int bytes, vector = 1;
  bool sign;
  std::vector<int> registers;   // of a load, -1 for a sink
  std::vector<Source> sources;  // of a store
  Source base;
  int64_t offset;
};

Access decode_access(const Decoder& d, bool load) {
  Access access{};
  while (d.take("relaxed") || d.take("acquire") || d.take("release") || d.take("volatile") || d.take("weak") ||
         d.take("cta") || d.take("cluster") || d.take("gpu") || d.take("sys")) {
  }
  if (d.take("global")) {
    access.space = Space::kGlobal;
  } else if (d.take("shared") || d.take("shared::cta") || d.take("shared::cluster")) {
    access.space = Space::kShared;
  } else if (d.take("local")) {
    access.space = Space::kLocal;
  } else if (d.take("param")) {
    access.space = Space::kParam;
  } else if (d.take("const")) {
    access.space = Space::kGlobal;
  }
  while (!d.done() && is_hint(d.instruction.modifiers[d.used])) d.used++;
  if (d.take("v2")) access.vector = 2;
  if (d.take("v4")) access.vector = 4;
  const std::string type = d.next();
  access.bytes = bytes_of(type);
  access.sign = type[0] == 's';
  d.expect_done();
  d.operands(2);
  const Operand &memory = d.operand(load ? 1 : 0), &value = d.operand(load ? 0 : 1);
  if (memory.kind != Operand::Kind::kMemory || memory.elements.size() != 1) d.unknown("address");
  access.base = d.source(memory.elements[0]);
  access.offset = memory.integer;
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

Handler decode_load(const Decoder& d) {
  return [a = decode_access(d, true)](Context& c) {
    std::set<uint64_t> sectors;
    for_lanes(c.mask, [&](int lane) {
      const uint64_t address = a.base.get(c, lane) + a.offset;
      const Location at = locate(c, lane, a.space, address, a.bytes * a.vector, false);
      for (int i = 0; i < a.vector; ++i) {
        if (a.registers[i] >= 0) c.warp.reg(a.registers[i])[lane] = load_bits(at.host + i * a.bytes, a.bytes, a.sign);
      }
      if (a.space == Space::kGlobal) sectors.insert(address / 32);
    });
    count_sectors(c, sectors);
    return Outcome::kNext;
  };
}

Handler decode_store(const Decoder& d) {
  return [a = decode_access(d, false)](Context& c) {
    std::set<uint64_t> sectors;
    for_lanes(c.mask, [&](int lane) {
      const uint64_t address = a.base.get(c, lane) + a.offset;
      const Location at = locate(c, lane, a.space, address, a.bytes * a.vector, true);
      for (int i = 0; i < a.vector; ++i) {
        const uint64_t value = a.sources[i].get(c, lane);
        std::memcpy(at.host + i * a.bytes, &value, a.bytes);
      }
      if (at.shared_of != nullptr) {
        const auto thread = static_cast<uint16_t>(c.warp.index * kLanes + lane + 1);
        std::fill_n(at.shared_of->unfenced.begin() + at.offset, a.bytes * a.vector, thread);
      }
      if (a.space == Space::kGlobal) sectors.insert(address / 32);
    });
    count_sectors(c, sectors);
    c.machine.events++;
    return Outcome::kNext;
  };
}

// stmatrix.sync.aligned.m8n8.x{1,2,4}.shared{::cta}.b16
Handler decode_stmatrix(const Decoder& d) {
  if (!(d.take("sync") && d.take("aligned"))) d.unknown("stmatrix");
  int count = 0;
  const auto count_modifier = [&] {
    for (int n : {1, 2, 4}) {
      if (d.take("x" + std::to_string(n))) count = n;
    }
  };
  count_modifier();
  if (!d.take("m8n8")) d.unknown("shape");
  if (count == 0) count_modifier();
  const bool transposed = d.take("trans");
  if (!(d.take("shared") || d.take("shared::cta")) || !d.take("b16") || count == 0) d.unknown("stmatrix");
  d.expect_done();
  const Source base = d.source(d.operand(0).elements[0]);
  const int64_t offset = d.operand(0).integer;
  std::vector<Source> values;
  if (d.operand(1).kind == Operand::Kind::kVector)
    for (const Operand& element : d.operand(1).elements) values.push_back(d.source(element));
  else
    values.push_back(d.source(1));
  return [=](Context& c) {
    if (c.mask != kAllLanes) fail(c, "an aligned instruction needs all lanes of the warp");
    for (int matrix = 0; matrix < count; ++matrix) {
      uint32_t banks[32] = {};
      for (int row = 0; row < 8; ++row) {
        const int owner = matrix * 8 + row;
        const Location at = locate(c, owner, Space::kShared, base.get(c, owner) + offset, 16, true);
        for (int column = 0; column < 8; ++column) {
          const int lane = transposed ? column * 4 + row / 2 : row * 4 + column / 2;
          const uint32_t pair = static_cast<uint32_t>(values[matrix].get(c, lane));
          const uint16_t half = static_cast<uint16_t>(pair >> 16 * (transposed ? row % 2 : column % 2));
          std::memcpy(at.host + column * 2, &half, 2);
        }
        std::fill_n(c.cta.unfenced.begin() + at.offset, 16, static_cast<uint16_t>(c.warp.index * kLanes + owner + 1));
        for (int word = 0; word < 4; ++word) banks[(at.offset / 4 + word) % 32]++;
      }
      c.grid.counters.shared_bank_conflicts += *std::max_element(banks, banks + 32) - 1;
    }
    return Outcome::kNext;
  };
}

// ldmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared{::cta}.b16
Handler decode_ldmatrix(const Decoder& d) {
  if (!(d.take("sync") && d.take("aligned") && d.take("m8n8"))) d.unknown("ldmatrix");
  const int count = d.take("x4") ? 4 : d.take("x2") ? 2 : d.take("x1") ? 1 : 0;
  const bool transposed = d.take("trans");
  if (!(d.take("shared") || d.take("shared::cta")) || !d.take("b16") || count == 0) d.unknown("ldmatrix");
  d.expect_done();
  const Source base = d.source(d.operand(1).elements[0]);
  const int64_t offset = d.operand(1).integer;
  std::vector<int> registers;
  if (d.operand(0).kind == Operand::Kind::kVector)
    for (const Operand& element : d.operand(0).elements) registers.push_back(d.destination(element));
  else
    registers.push_back(d.destination(0));
  if (registers.size() != static_cast<size_t>(count)) d.unknown("number of registers");
  return [=](Context& c) {
    if (c.mask != kAllLanes) fail(c, "an aligned instruction needs all lanes of the warp");
    std::vector<std::array<uint64_t, kLanes>> values(count);
    for (int matrix = 0; matrix < count; ++matrix) {
      uint16_t halves[8][8];
      for (int row = 0; row < 8; ++row) {
        const int owner = matrix * 8 + row;
        const Location at = locate(c, owner, Space::kShared, base.get(c, owner) + offset, 16, false);
        std::memcpy(halves[row], at.host, 16);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const int major = lane / 4, minor = 2 * (lane % 4);
        const uint64_t low = transposed ? halves[minor][major] : halves[major][minor];
        const uint64_t high = transposed ? halves[minor + 1][major] : halves[major][minor + 1];
        values[matrix][lane] = high << 16 | low;
      }
    }
    // After all reads: the address register may be among the results.
    for (int matrix = 0; matrix < count; ++matrix)
      std::copy(values[matrix].begin(), values[matrix].end(), c.warp.reg(registers[matrix]));
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_memory(const Decoder& d) {
  if (d.instruction.opcode == "ld") return decode_load(d);
  if (d.instruction.opcode == "st") return decode_store(d);
  if (d.instruction.opcode == "stmatrix") return decode_stmatrix(d);
  if (d.instruction.opcode == "ldmatrix") return decode_ldmatrix(d);
  if (d.instruction.opcode == "prefetch") {
    while (!d.done()) d.used++;
    return [](Context&) { return Outcome::kNext; };
  }
  return {};
}

}  // namespace emulator
