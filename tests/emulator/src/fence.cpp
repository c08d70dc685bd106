// Fences: of the memory model, and between proxies.
#include "copies.h"

namespace emulator {
namespace {

void end(const Decoder& d) {
  d.expect_done();
  d.operands(0);
}

Outcome next(Context&) { return Outcome::kNext; }

// fence.proxy.async orders all state spaces; .shared::cta and .global one of them. It is of this thread's writes only:
// each writer has to fence for itself.
Handler async_fence(const Decoder& d) {
  const bool only_shared = d.take("shared::cta") || d.take("shared::cluster");
  const bool only_global = !only_shared && d.take("global");
  end(d);
  return [=](Context& c) {
    if (!only_global) shared_fence(c.cta, c.warp.index, c.mask);
    if (!only_shared) global_proxy_fence(c);
    return Outcome::kNext;
  };
}

// fence.proxy.async::generic: in one direction, and of shared memory only.
Handler generic_fence(const Decoder& d) {
  const bool acquires = d.take("acquire") && d.take("sync_restrict::shared::cluster");
  const bool releases = !acquires && d.take("release") && d.take("sync_restrict::shared::cta");
  if (!(acquires || releases) || !d.take("cluster")) d.unknown("fence");
  end(d);
  // What the async proxy wrote needs no acquire here: whoever observed its completion sees it.
  if (acquires) return next;
  return [](Context& c) {
    shared_fence(c.cta, c.warp.index, c.mask);
    return Outcome::kNext;
  };
}

Handler proxy_fence(const Decoder& d) {
  if (d.take("tensormap::generic")) return decode_tensor_map_fence(d);
  if (d.take("async")) return async_fence(d);
  if (d.take("async::generic")) return generic_fence(d);
  if (!d.take("alias")) d.unknown("proxy");
  end(d);
  return next;  // no two addresses name the same memory here
}

Handler init_fence(const Decoder& d) {
  if (!(d.take("release") && d.take("cluster"))) d.unknown("fence");
  end(d);
  return [](Context& c) {
    mbarriers_released(c.cta.shared, c.warp.index);
    race_release(c, c.mask);
    return Outcome::kNext;
  };
}

// fence.{acquire.sync_restrict::shared::cluster, release.sync_restrict::shared::cta}.cluster: of shared memory only,
// where all is visible at once.
Handler restricted_fence(const Decoder& d, bool acquires) {
  if (!d.take("cluster")) d.unknown("scope");
  end(d);
  if (acquires) return next;
  return [](Context& c) {
    mbarriers_released(c.cta.shared, c.warp.index);
    return Outcome::kNext;
  };
}

Handler memory_fence(Order order) {
  return [order](Context& c) {
    if (order.release) race_release(c, c.mask);
    global_fence(c, order);
    if (order.acquire) race_acquire(c, c.mask);
    return Outcome::kNext;
  };
}

Handler fence(const Decoder& d) {
  if (d.take("proxy")) return proxy_fence(d);
  if (d.take("mbarrier_init")) return init_fence(d);
  Order order{.strong = true};
  order.acquire = d.take("acquire");
  order.release = !order.acquire && d.take("release");
  if (order.acquire && d.take("sync_restrict::shared::cluster")) return restricted_fence(d, true);
  if (order.release && d.take("sync_restrict::shared::cta")) return restricted_fence(d, false);
  if (!order.acquire && !order.release) {
    // .acq_rel is the default.
    if (!d.take("sc")) d.take("acq_rel");
    order.acquire = order.release = true;
  }
  order.scope = d.take("cta")       ? Scope::kCta
                : d.take("cluster") ? Scope::kCluster
                : d.take("gpu")     ? Scope::kGpu
                : d.take("sys")     ? Scope::kSys
                                    : (d.unknown("scope"), Scope::kCta);
  end(d);
  return memory_fence(order);
}

// membar.{cta,gl,sys}: fence.sc of that scope.
Handler membar(const Decoder& d) {
  if (d.take("proxy")) return proxy_fence(d);
  Order order{.strong = true, .acquire = true, .release = true};
  order.scope = d.take("cta") ? Scope::kCta : d.take("gl") ? Scope::kGpu : Scope::kSys;
  if (order.scope == Scope::kSys && !d.take("sys")) d.unknown("scope");
  end(d);
  return memory_fence(order);
}

}  // namespace

Handler decode_fence(const Decoder& d) {
  if (d.instruction.opcode != "fence" && d.instruction.opcode != "membar") return {};
  return d.instruction.opcode == "fence" ? fence(d) : membar(d);
}

}  // namespace emulator
