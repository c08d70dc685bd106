// The kernels' entries: who does what in a channel, and what stays for the next call.
#pragma once
#include "combine.cuh"
#include "exchange.cuh"

namespace fastfp8::comm {

// Messages that have passed, for the next call's turns. By the CTA of the channel that ends last.
__device__ inline void end_channel(const Context& c, bool dispatches, uint32_t* shared) {
  const Geometry& g = c.g;
  const StateLayout& state = c.setup.state;
  const RoutingLayout& tables = c.setup.routing;
  __syncthreads();
  if (threadIdx.x == 0) shared[0] = ptx::atomic_add_acq_rel_gpu(c.tensors.state + state.tickets + c.channel, 1);
  __syncthreads();
  if (shared[0] % 2 == 0) return;
  const auto advance = [&](RingKind kind, bool writes, int stream, uint32_t messages) {
    const RingShape& shape = c.setup.rings[static_cast<int>(kind)];
    const StateLayout::Bases& bases = state.bases[static_cast<int>(kind)];
    uint32_t& base =
        c.tensors.state[(writes ? bases.write : bases.read) + c.channel * (shape.streams / g.channels) + stream];
    base = (base + messages) % (static_cast<uint32_t>(shape.slots) << kTurnBits);
  };
  const RingKind link = dispatches ? RingKind::kDispatchLink : RingKind::kCombineLink;
  const RingKind rails = dispatches ? RingKind::kDispatchRail : RingKind::kCombineRail;
  for (int i = threadIdx.x; i < g.ranks(); i += blockDim.x) {
    advance(link, dispatches, i, c.table(tables.link_via)[c.channel * g.ranks() + i]);
    advance(link, !dispatches, i, c.table(tables.link_in)[c.channel * g.ranks() + i]);
  }
  for (int i = threadIdx.x; i < g.nodes; i += blockDim.x) {
    if (i == c.node) continue;
    advance(rails, dispatches, i, chunks_of(g, c.table(tables.rail_out)[c.channel * g.nodes + i]));
    advance(rails, !dispatches, i, chunks_of(g, c.table(tables.rail_in)[c.channel * g.nodes + i]));
  }
}

// What passes in this channel, by table.
struct Loads {
  uint32_t rail_out, rail_in, link_out, link_via, link_in;

  __device__ static Loads of(const Context& c) {
    const Geometry& g = c.g;
    const RoutingLayout& tables = c.setup.routing;
    const uint32_t own = c.table(tables.rail_out)[c.channel * g.nodes + c.node];
    const uint32_t all_via = sum_of(c.table(tables.link_via) + c.channel * g.ranks(), g.ranks());
    const uint32_t own_via = sum_of(c.table(tables.link_via) + (c.channel * g.nodes + c.node) * g.gpus, g.gpus);
    return {sum_of(c.table(tables.rail_out) + c.channel * g.nodes, g.nodes) - own,
            sum_of(c.table(tables.rail_in) + c.channel * g.nodes, g.nodes), own_via, all_via - own_via,
            sum_of(c.table(tables.link_in) + c.channel * g.ranks(), g.ranks())};
  }
};

template <Payload kPayload, class Rail, class Trace>
__device__ void dispatch(Context& c, const Rail& network, const Trace& trace, uint32_t* shared) {
  const RoutingLayout& tables = c.setup.routing;
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  uint32_t* const next = shared + warp * c.g.ranks();
  const Loads loads = Loads::of(c);
  // A token that is quantised takes 4 rounds of loads for each one of a copy; on one node the links bound both, and it
  // is better to have more receivers (fastfp8.comm.simulation; not measured).
  const uint32_t work = kPayload == Payload::kQuantize && c.g.nodes > 1 ? 3 : 1;
  const uint32_t by_role[] = {work * loads.rail_out, loads.rail_in + loads.link_via, work * loads.link_out,
                              loads.link_in};
  const Share share = share_of(static_cast<int>(blockIdx.x % 2) * warps + warp, 2 * warps, by_role);
  const auto begin = trace.now();
  if (share.role == 0) serve(c, DispatchRailSend<kPayload, Rail>{{c, network, tables}}, trace, share, next);
  if (share.role == 1) serve(c, DispatchRailForward<kPayload, Rail>{{c, network, tables}}, trace, share, next);
  if (share.role == 2) serve(c, DispatchLinkSend<kPayload>{c}, trace, share, next);
  if (share.role == 3) serve(c, DispatchLinkReceive<kPayload>{c, tables}, trace, share, next);
  if (share.role >= 0) trace.part(begin, static_cast<Role>(share.role));  // of which the first four are dispatch's
  end_channel(c, true, shared);
}

template <class Rail, class Trace>
__device__ void combine(Context& c, const Rail& network, const Trace& trace, uint32_t* shared) {
  const RoutingLayout& tables = c.setup.routing;
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  uint32_t* const next = shared + warp * c.g.ranks();
  const Loads loads = Loads::of(c);
  const uint32_t tokens = c.first_token(c.channel + 1) - c.first_token(c.channel);
  const uint32_t by_role[] = {loads.link_in, loads.rail_in + loads.link_via, tokens + loads.link_out + loads.rail_out};
  const Share share = share_of(static_cast<int>(blockIdx.x % 2) * warps + warp, 2 * warps, by_role);
  const auto begin = trace.now();
  if (share.role == 0) serve(c, CombineLinkSend{c, tables}, trace, share, next);
  if (share.role == 1) serve(c, CombineRailForward<Rail>{{c, network, tables}}, trace, share, next);
  if (share.role == 2) serve(c, CombineReceive<Rail>{c, network, tables}, trace, share, next);
  const Role others = share.role == 1 ? Role::kRailForward : Role::kLinkReceive;
  if (share.role >= 0) trace.part(begin, share.role == 0 ? Role::kLinkSend : others);
  end_channel(c, false, shared);
}

}  // namespace fastfp8::comm

// What the kernels of every rail are given. Their names are in plan.cpp, their slots in Tensors.
#define FASTFP8_COMM_PARAMETERS                                                                                    \
  const __grid_constant__ fastfp8::comm::Setup setup, const uint64_t *windows, uint32_t *state, uint32_t *routing, \
      const int *topk_idx, const float *topk_weights, const void *x, const float *x_scale, void *recv,             \
      float *recv_scale, int *offsets, const void *expert_out, void *y, const float *row_values, float *values

// After a timeout, whose tables and rings are not to be used, there is nothing but to end.
#define FASTFP8_COMM_CONTEXT                                                                                \
  extern __shared__ uint32_t shared[];                                                                      \
  fastfp8::comm::Context context(setup, {windows, state, routing, topk_idx, topk_weights, x, x_scale, recv, \
                                         recv_scale, offsets, expert_out, y, row_values, values});          \
  if (context.has_failed()) return;

// By a rail that needs nothing else.
#define FASTFP8_COMM_KERNEL(NAME, MOST_THREADS, ...)                                              \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) NAME(FASTFP8_COMM_PARAMETERS) {   \
    FASTFP8_COMM_CONTEXT                                                                          \
    __VA_ARGS__(context, fastfp8::comm::LoopbackRail{context}, fastfp8::comm::NoTrace{}, shared); \
  }

// The same, and what its warps did when goes to `trace`. CALL: of TracedCall.
#define FASTFP8_COMM_TRACED_KERNEL(NAME, MOST_THREADS, CALL, ...)                                                \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) NAME(FASTFP8_COMM_PARAMETERS, uint32_t* trace) { \
    FASTFP8_COMM_CONTEXT                                                                                         \
    const fastfp8::comm::WarpTrace traced(context, fastfp8::comm::TracedCall::CALL, trace);                      \
    __VA_ARGS__(context, fastfp8::comm::LoopbackRail{context}, traced, shared);                                  \
  }
