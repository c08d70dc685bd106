// Dispatch: tokens to the ranks of their experts.
//
//   source (n, g)                    rank in between (m, g)            experts' rank (m, h)
//   rail send ---------- chunks ----> rail forward ------ records ----> link receive -> rows of recv
//   link send -- records to the ranks of its own node ----------------> link receive
//
// Nobody waits for anybody who waits for him: receivers wait for data only and take what comes first, so their rings
// always empty; forwarders and link senders wait for room in those rings; rail senders wait for forwarders.
#pragma once
#include "move.cuh"
#include "serve.cuh"

namespace fastfp8::comm {

__device__ __forceinline__ uint32_t chunks_of(const Geometry& g, uint32_t records) {
  return (records + g.rail_chunk - 1) / g.rail_chunk;
}
__device__ __forceinline__ uint32_t records_in_chunk(const Geometry& g, uint32_t records, uint32_t chunk) {
  const uint32_t rest = records - chunk * g.rail_chunk;
  return rest < static_cast<uint32_t>(g.rail_chunk) ? rest : g.rail_chunk;
}

// The streams of a role that writes to this rank's fellows in other nodes, or reads what they write: a chunk a message.
template <RingKind kKind, bool kWrites, class Rail>
struct RailStreams {
  static constexpr Role kRole = is_dispatch(kKind) && kWrites ? Role::kRailSend : Role::kRailForward;

  Context& c;
  const Rail& network;
  const RoutingLayout& tables;

  __device__ RingEnd end_at(int node) const { return rail(c, kKind, kWrites, node); }
  __device__ int streams() const { return c.g.nodes; }
  __device__ uint32_t records(int node) const {
    const int table = is_dispatch(kKind) == kWrites ? tables.rail_out : tables.rail_in;
    return node == c.node ? 0 : c.table(table)[c.channel * c.g.nodes + node];
  }
  __device__ uint32_t count(int node) const { return chunks_of(c.g, records(node)); }
  __device__ bool ready(int node, uint32_t chunk) const {
    const RingEnd end = end_at(node);
    const Turn turn = end.turn(chunk);
    if (kWrites) return network.poll(end.consumed + 4 * turn.index) == turn.count;
    return network.poll(end.filled + 4 * turn.index) == turn.after();
  }
  __device__ bool give_up(int node, uint32_t chunk) const {
    return c.give_up(kRole, c.rank_of(node, c.gpu), chunk + 1, chunk);
  }
};

// Tokens of this rank to the fellow in each other node, quantised on the way.
template <Payload kPayload, class Rail>
struct DispatchRailSend : RailStreams<RingKind::kDispatchRail, true, Rail> {
  using Streams = RailStreams<RingKind::kDispatchRail, true, Rail>;
  using Streams::c, Streams::network, Streams::tables, Streams::records, Streams::end_at;

  __device__ bool run(int node, uint32_t chunk) const {
    const RingEnd end = end_at(node);
    const Turn turn = end.turn(chunk);
    const int64_t stage = end.stage + turn.index * end.slot_bytes;
    const int record_bytes = c.g.header_bytes() + payload_bytes(c.g, kPayload);
    const uint32_t count = records_in_chunk(c.g, records(node), chunk);
    const uint32_t* const tokens =
        c.table(tables.rail_tokens) + (c.channel * c.g.nodes + node) * c.g.channel_tokens() + chunk * c.g.rail_chunk;
    for (uint32_t i = 0; i < count; ++i) {
      const int token = static_cast<int>(tokens[i]);
      const Route route = Route::own(c, token);
      record_to<kPayload>(c, token, route.slot, c.window(c.rank) + stage + int64_t{i} * record_bytes, 1);
    }
    network.put(end.peer, end.data + turn.index * end.slot_bytes, stage, int64_t{count} * record_bytes,
                end.filled + 4 * turn.index, turn.after());
    return true;
  }
};

// To each rank of this node that a token of rank (source, c.gpu) goes to, once: `send(sink, sinks)` writes the record.
// Keeps in `via`, if there is one, where the copies went.
template <class Send>
__device__ bool to_ranks_of_node(Context& c, Role role, int source, const Route& route, uint32_t* via,
                                 const Send& send) {
  const bool here = route.node == c.node, leads = is_first(here, route.rank);
  const int to = here ? route.rank - c.node * c.g.gpus : 0;
  const uint32_t sinks = __ballot_sync(kAllLanes, leads);
  if (via != nullptr) {
    const int place = smaller_among(sinks, to);
    if (leads) via[place] = static_cast<uint32_t>(to) << kPositionBits | route.slot.link_position;
    if (c.lane < c.g.most_gpus() && c.lane >= __popc(sinks)) via[c.lane] = ~0u;
  }
  if (sinks == 0) return true;
  const LinkOut out(c, dispatch_link_to(c, source, to), leads ? route.slot.link_position : 0);
  if (!wait_in_all_lanes(c, role, route.rank, out.turn.count, [&] { return !leads || out.is_free(); })) return false;
  send(out.data, sinks);
  __syncwarp();
  if (leads) out.fill();
  return true;
}

// What comes from this rank's fellows in other nodes, on to the ranks of this node.
template <Payload kPayload, class Rail>
struct DispatchRailForward : RailStreams<RingKind::kDispatchRail, false, Rail> {
  using Streams = RailStreams<RingKind::kDispatchRail, false, Rail>;
  using Streams::c, Streams::network, Streams::tables, Streams::records, Streams::end_at;

  __device__ bool run(int node, uint32_t chunk) const {
    const RingEnd end = end_at(node);
    const Turn turn = end.turn(chunk);
    const char* const data = c.window(c.rank) + end.data + turn.index * end.slot_bytes;
    const int record_bytes = c.g.header_bytes() + payload_bytes(c.g, kPayload);
    const uint32_t count = records_in_chunk(c.g, records(node), chunk);
    uint32_t* const via =
        c.table(tables.via) + int64_t{c.channel * c.g.nodes + node} * c.g.channel_tokens() * c.g.most_gpus();
    for (uint32_t i = 0; i < count; ++i) {
      const char* const record = data + int64_t{i} * record_bytes;
      const bool goes_on = to_ranks_of_node(
          c, Streams::kRole, node, Route::of_record(c, record), via + (chunk * c.g.rail_chunk + i) * c.g.most_gpus(),
          [&](char* sink, uint32_t sinks) { copy_to(record, record_bytes, sink, sinks); });
      if (!goes_on) return false;
    }
    network.signal(end.peer, end.consumed + 4 * turn.index, turn.after());
    return true;
  }
};

// Tokens of this rank to the ranks of its node, itself too.
template <Payload kPayload>
struct DispatchLinkSend {
  static constexpr Role kRole = Role::kLinkSend;

  Context& c;

  __device__ int streams() const { return 1; }
  __device__ uint32_t count(int) const { return c.first_token(c.channel + 1) - c.first_token(c.channel); }
  __device__ bool ready(int, uint32_t) const { return true; }
  __device__ bool give_up(int, uint32_t) const { return false; }
  __device__ bool run(int, uint32_t message) const {
    const int token = c.first_token(c.channel) + static_cast<int>(message);
    const Route route = Route::own(c, token);
    return to_ranks_of_node(c, kRole, c.node, route, nullptr, [&](char* sink, uint32_t sinks) {
      record_to<kPayload>(c, token, route.slot, sink, sinks);
    });
  }
};

// What comes from any source, to its rows of recv.
template <Payload kPayload>
struct DispatchLinkReceive {
  static constexpr Role kRole = Role::kLinkReceive;

  Context& c;
  const RoutingLayout& tables;

  __device__ int streams() const { return c.g.ranks(); }
  __device__ uint32_t count(int source) const { return c.table(tables.link_in)[c.channel * c.g.ranks() + source]; }
  __device__ bool ready(int source, uint32_t record) const {
    return LinkIn(c, dispatch_link_from(c, source), record).is_filled();
  }
  __device__ bool give_up(int source, uint32_t record) const { return c.give_up(kRole, source, record + 1, record); }
  __device__ bool run(int source, uint32_t message) const {
    const LinkIn in(c, dispatch_link_from(c, source), message);
    const Route route = Route::of_record(c, in.data);
    int row = -1;
    if (route.rank == c.rank) {
      const int expert = route.slot.expert - c.rank * c.g.local_experts();
      row = static_cast<int>(c.table(tables.row_base)[source * c.g.local_experts() + expert]) + route.slot.place;
      if (row >= c.g.capacity) row = -1;
    }
    const uint32_t rows = __ballot_sync(kAllLanes, row >= 0);
    chain(source, message, row, rows, route.slot.weight);
    const int row_bytes = kPayload == Payload::kPlain ? 2 * c.g.hidden : c.g.hidden;
    char* const sink = static_cast<char*>(c.tensors.recv) + (c.first_row_of(c.g.capacity) + row) * row_bytes;
    const char* const data = in.data + c.g.header_bytes();
    copy_to(data, row_bytes, sink, rows);
    if constexpr (kPayload != Payload::kPlain) {
      scatter_scales(reinterpret_cast<const float*>(data + c.g.hidden), row, rows);
    }
    __syncwarp();
    if (c.lane == 0) in.release();
    return true;
  }

  // Keeps which rows the record became, in the order of the token's slots, for combine.
  __device__ void chain(int source, uint32_t message, int row, uint32_t rows, float weight) const {
    const uint32_t later = rows & ~((2u << c.lane) - 1);
    const int next = __shfl_sync(kAllLanes, row, later ? __ffs(later) - 1 : 0);
    if (row >= 0) {
      c.table(tables.next_row)[row] = later ? next : -1;
      c.table(tables.slot)[row] = c.lane;
      c.table(tables.weight)[row] = __float_as_uint(weight);
    }
    const int first = __shfl_sync(kAllLanes, row, rows ? __ffs(rows) - 1 : 0);
    if (c.lane == 0)
      c.table(tables.first_row)[(c.channel * c.g.ranks() + source) * c.g.channel_tokens() + message] =
          rows ? first : -1;
  }

  __device__ void scatter_scales(const float* scales, int row, uint32_t rows) const {
    for (int base = 0; base < c.g.blocks(); base += 32) {
      const int block = base + c.lane;
      const float scale = block < c.g.blocks() ? scales[block] : 0.0f;
      for (uint32_t left = rows; left; left &= left - 1) {
        const int to = __shfl_sync(kAllLanes, row, __ffs(left) - 1);
        if (block < c.g.blocks()) c.tensors.recv_scale[to + int64_t{block} * c.g.scale_pitch()] = scale;
      }
    }
  }
};

}  // namespace fastfp8::comm
