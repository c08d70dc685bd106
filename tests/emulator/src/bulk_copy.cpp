// cp.async.bulk and cp.reduce.async.bulk of contiguous bytes, and the groups of bulk copies.
#include "copies.h"

namespace emulator {
namespace {

constexpr uint32_t kAlignment = 16;

struct Operands : BulkOperands {
  Address global;
  Source size;
  const Reduction* reduction = nullptr;

  Bulk bulk(Context& c, int lane) const {
    Bulk bulk = bulk_of(c);
    bulk.bytes = static_cast<uint32_t>(size.get(c, lane));
    bulk.reduction = reduction;
    if (bulk.bytes % kPiece) fail(c, "a size of " + std::to_string(bulk.bytes) + " bytes is no multiple of 16");
    return bulk;
  }
  // As above, with the range of global memory.
  Bulk bulk_of_range(Context& c, int lane, bool write) const {
    Bulk range = bulk(c, lane);
    range.address = global.get(c, lane);
    if (range.address % kAlignment) fail(c, "the global address is no multiple of 16");
    if (!is_global(range.address)) fail(c, "the address is not in global memory");
    c.machine.memory.find(range.address, range.bytes, write, range.who);
    return range;
  }
};

Handler load(const Decoder& d, bool cluster) {
  Operands o;
  o.cluster = cluster;
  take_mbarrier(d, o);
  const bool hint = take_cache_hint(d);
  expect_operands(d, o.multicast ? 5 : 4, hint);
  o.shared = address_of(d, d.operand(0)), o.global = address_of(d, d.operand(1));
  o.size = d.source(2), o.barrier = address_of(d, d.operand(3));
  if (o.multicast) o.mask = d.source(4);
  return [o](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const Bulk bulk = o.bulk_of_range(c, lane, false);
      issue_load(bulk, o.destinations(c, lane, bulk.bytes, kAlignment));
    });
    return Outcome::kNext;
  };
}

// Consumes the operation and the type of a reduction.
const Reduction* take_reduction(const Decoder& d, bool shared) {
  const std::string op = d.next();
  const bool noftz = d.take("noftz");
  const std::string type = d.next();
  const Reduction* reduction = find_reduction(op, type);
  if (reduction == nullptr || (shared && !reduction->into_shared)) d.unknown("reduction");
  if (noftz != (op == "add" && reduction->bytes == 2)) d.unknown("reduction: .noftz belongs to 16-bit sums");
  return reduction;
}

// Shared memory to that of a CTA of the cluster.
Handler send(const Decoder& d, bool reduces) {
  Operands o, from;
  if (!d.take("shared::cta")) d.unknown("source");
  take_mbarrier(d, o);
  o.cluster = true;
  if (reduces) o.reduction = take_reduction(d, true);
  expect_operands(d, 4, false);
  o.shared = address_of(d, d.operand(0)), from.shared = address_of(d, d.operand(1));
  o.size = d.source(2), o.barrier = address_of(d, d.operand(3));
  return [o, from](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const Bulk bulk = o.bulk(c, lane);
      const uint32_t source = from.source(c, lane, bulk.bytes, kAlignment);
      issue_send(bulk, source, o.destinations(c, lane, bulk.bytes, kAlignment).front());
    });
    return Outcome::kNext;
  };
}

Handler store(const Decoder& d, bool reduces) {
  Operands o;
  if (!(d.take("shared::cta") && d.take("bulk_group"))) d.unknown("bulk copy");
  const bool hint = take_cache_hint(d);
  if (reduces) o.reduction = take_reduction(d, false);
  expect_operands(d, 3, hint);
  o.global = address_of(d, d.operand(0)), o.shared = address_of(d, d.operand(1)), o.size = d.source(2);
  return [o](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      const Bulk bulk = o.bulk_of_range(c, lane, true);
      issue_store(c, lane, bulk, o.source(c, lane, bulk.bytes, kAlignment));
    });
    return Outcome::kNext;
  };
}

// Into the L2 cache, which is not modelled: the range is checked.
Handler fetch(const Decoder& d) {
  Operands o;
  if (!(d.take("L2") && d.take("global"))) d.unknown("prefetch");
  const bool hint = take_cache_hint(d);
  expect_operands(d, 2, hint);
  o.global = address_of(d, d.operand(0)), o.size = d.source(1);
  return [o](Context& c) {
    for_lanes(c.mask, [&](int lane) { o.bulk_of_range(c, lane, false); });
    return Outcome::kNext;
  };
}

Handler commit(const Decoder& d) {
  d.expect_done();
  d.operands(0);
  return [](Context& c) {
    for_lanes(c.mask, [&](int lane) {
      auto& group = c.warp.open_group[lane];
      c.warp.bulk_groups[lane].push_back(group ? group : std::make_shared<BulkGroup>());
      group = nullptr;
    });
    return Outcome::kNext;
  };
}

Handler wait(const Decoder& d) {
  const bool read = d.take("read");
  d.expect_done();
  d.operands(1);
  const Operand& count = d.operand(0);
  if (count.kind != Operand::Kind::kInteger || count.integer < 0) d.unknown("number of groups");
  const auto pending = static_cast<size_t>(count.integer);
  return [=](Context& c) {
    bool blocked = false;
    for_lanes(c.mask, [&](int lane) {
      const auto& groups = c.warp.bulk_groups[lane];
      for (size_t i = 0; i + pending < groups.size(); ++i)
        blocked |= (read ? groups[i]->unread : groups[i]->unwritten) > 0;
    });
    if (blocked) {
      c.warp.wait = {Wait::For::kBulkGroup, &c.cta, 0, 0};
      return Outcome::kBlocked;
    }
    for_lanes(c.mask, [&](int lane) {
      auto& groups = c.warp.bulk_groups[lane];
      for (size_t i = 0; i + pending < groups.size(); ++i) {
        for (const auto& flight : groups[i]->flights) release(*flight);
        groups[i]->flights.clear();
      }
      while (groups.size() > pending && groups.front()->unwritten == 0) groups.pop_front();
    });
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_bulk_copy(const Decoder& d) {
  if (d.take("commit_group")) return commit(d);
  if (d.take("wait_group")) return wait(d);
  if (d.take("tensor")) return decode_tensor_copy(d);
  if (d.take("prefetch")) return d.take("tensor") ? decode_tensor_fetch(d) : fetch(d);
  if (d.take("global")) return store(d, false);
  const bool cluster = d.take("shared::cluster");
  if (!cluster && !d.take("shared::cta")) d.unknown("bulk copy");
  if (d.take("global")) return load(d, cluster);
  if (!cluster) d.unknown("source");
  return send(d, false);
}

Handler decode_bulk_reduce(const Decoder& d) {
  if (d.take("global")) return store(d, true);
  if (!d.take("shared::cluster")) d.unknown("reduction");
  return send(d, true);
}

}  // namespace emulator
