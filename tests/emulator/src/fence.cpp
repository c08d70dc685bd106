// Fences: of the memory model, and between proxies.
#include "copies.h"

namespace emulator {
namespace {

Outcome next(Context&) { return Outcome::kNext; }

// fence.proxy.async orders all state spaces; .shared::cta and .global one of them.
Handler proxy_fence(const Decoder& d) {
  if (d.take("tensormap::generic")) return decode_tensor_map_fence(d);
  if (!d.take("async")) d.unknown("proxy");
  const bool only_shared = d.take("shared::cta") || d.take("shared::cluster"), only_global = d.take("global");
  d.expect_done();
  return [=](Context& c) {
    // Of this thread's writes only: each writer has to fence for itself.
    if (!only_global) shared_fence(c.cta, c.warp.index, c.mask);
    if (!only_shared) global_proxy_fence(c);
    return Outcome::kNext;
  };
}

Handler fence(const Decoder& d) {
  if (d.take("proxy")) return proxy_fence(d);
  if (d.take("mbarrier_init")) {
    if (!(d.take("release") && d.take("cluster"))) d.unknown("fence");
    d.expect_done();
    return next;
  }
  Order order{.strong = true, .acquire = true, .release = true};
  if (!d.take("sc")) {
    const bool both = d.take("acq_rel");
    order.acquire = both || d.take("acquire");
    order.release = both || (!order.acquire && d.take("release"));
    if (!order.acquire && !order.release) d.unknown("fence");
  }
  order.scope = d.take("cta")       ? Scope::kCta
                : d.take("cluster") ? Scope::kCluster
                : d.take("gpu")     ? Scope::kGpu
                : d.take("sys")     ? Scope::kSys
                                    : (d.unknown("scope"), Scope::kCta);
  d.expect_done();
  return [=](Context& c) {
    global_fence(c, order);
    if (order.release) race_release(c, c.mask);
    if (order.acquire) race_acquire(c, c.mask);
    return Outcome::kNext;
  };
}

// membar.{cta,gl,sys}: fence.sc of that scope.
Handler membar(const Decoder& d) {
  Order order{.strong = true, .acquire = true, .release = true};
  order.scope = d.take("cta") ? Scope::kCta : d.take("gl") ? Scope::kGpu : Scope::kSys;
  if (order.scope == Scope::kSys && !d.take("sys")) d.unknown("scope");
  d.expect_done();
  return [=](Context& c) {
    global_fence(c, order);
    if (order.release) race_release(c, c.mask);
    if (order.acquire) race_acquire(c, c.mask);
    return Outcome::kNext;
  };
}

}  // namespace

Handler decode_fence(const Decoder& d) {
  if (d.instruction.opcode == "fence") return fence(d);
  if (d.instruction.opcode == "membar") return membar(d);
  return {};
}

}  // namespace emulator
