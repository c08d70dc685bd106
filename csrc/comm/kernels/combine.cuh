// Combine: the sums of the experts' outputs, back to the tokens.
//
//   experts' rank (m, h)              rank in between (m, g)              source (n, g)
//   link send: sum of a rank ------> rail forward: sum of a node ------> receive: sum of all nodes
//   link send (own node) ----------------------------------------------> receive
//
// Sums are FP32 in a fixed order: a rank's over the token's slots in ascending order, a node's over its GPUs, the last
// over nodes; each is rounded to BF16 once, before it travels or is stored.
//
// Nobody waits for room: who finds none looks at another stream. So each stream's first message always gets its slot,
// and who waits for data waits for senders that wait for nobody.
#pragma once
#include "dispatch.cuh"

namespace fastfp8::comm {

constexpr int kPerLane = 8;     // BF16 values in 16 bytes
constexpr int kRowsAtOnce = 4;  // whose loads a lane has in flight

// acc = fma(weight, value, acc) for the 8 values of `raw`.
__device__ __forceinline__ void accumulate(float (&acc)[kPerLane], uint4 raw, float weight) {
  const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    acc[2 * i] = __fmaf_rn(weight, low_bf16(pairs[i]), acc[2 * i]);
    acc[2 * i + 1] = __fmaf_rn(weight, high_bf16(pairs[i]), acc[2 * i + 1]);
  }
}

__device__ __forceinline__ uint4 rounded(const float (&acc)[kPerLane]) {
  return {ptx::bf16x2(acc[0], acc[1]), ptx::bf16x2(acc[2], acc[3]), ptx::bf16x2(acc[4], acc[5]),
          ptx::bf16x2(acc[6], acc[7])};
}

// The sum of `count` rows of BF16 at 16 bytes' offset `at`: lane i holds where row i is, and its weight. The loads of
// kRowsAtOnce rows are in flight together; rows are added in order all the same.
__device__ __forceinline__ uint4 sum_of_rows(const char* source, float weight, int count, int at, bool inside) {
  float acc[kPerLane] = {};
  for (int first = 0; first < count; first += kRowsAtOnce) {
    uint4 raw[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (first + i >= count) break;
      const char* const row = pointer_of(const_cast<char*>(source), first + i);
      if (inside) raw[i] = ptx::load_once(row + at);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (first + i >= count) break;
      const float by = __shfl_sync(kAllLanes, weight, first + i);
      if (inside) accumulate(acc, raw[i], by);
    }
  }
  return rounded(acc);
}

// The same, of whole rows, to `target`.
__device__ __forceinline__ void sum_to(const Context& c, const char* source, float weight, int count, char* target) {
  const uint64_t policy = ptx::evict_first();
  for (int base = 0; base < c.g.row_bytes(); base += 16 * 32) {
    const int at = base + 16 * c.lane;
    const bool inside = at < c.g.row_bytes();
    const uint4 sum = sum_of_rows(source, weight, count, at, inside);
    if (inside) ptx::store_once(target + at, sum, policy);
  }
}

// What travels for a token: the sum of its rows, the values of its slots, or both.
struct Parts {
  int sums, bytes;  // of the former; in all

  __device__ explicit Parts(const Context& c)
      : sums(c.options.sums ? c.g.row_bytes() : 0), bytes(sums + (c.options.values ? c.g.values_bytes() : 0)) {}
};

// This lane's slot's value in the parts at `count` places, each held by a lane. All but one have 0 there.
__device__ __forceinline__ float value_of(const Context& c, const char* source, int count, int at) {
  float value = 0.0f;
  for (int i = 0; i < count; ++i) {
    const char* const part = pointer_of(const_cast<char*>(source), i) + at;
    if (c.lane < c.g.top_k) value += reinterpret_cast<const float*>(part)[c.lane];
  }
  return value;
}

__device__ __forceinline__ void put_value(const Context& c, char* part, float value) {
  if (c.lane < c.g.top_k) reinterpret_cast<float*>(part)[c.lane] = value;
}

// Sums of this rank's experts, to the rank in between.
struct CombineLinkSend {
  static constexpr Role kRole = Role::kLinkSend;

  Context& c;
  const RoutingLayout& tables;

  __device__ int streams() const { return c.g.ranks(); }
  __device__ uint32_t count(int source) const { return c.table(tables.link_in)[c.channel * c.g.ranks() + source]; }
  __device__ bool ready(int source, uint32_t record) const {
    return LinkOut(c, combine_link_to(c, source), record).is_free();
  }
  __device__ bool give_up(int source, uint32_t record) const { return c.give_up(kRole, source, record + 1, record); }
  __device__ bool run(int source, uint32_t record) const {
    const LinkOut out(c, combine_link_to(c, source), record);
    int next =
        static_cast<int>(c.table(tables.first_row)[(c.channel * c.g.ranks() + source) * c.g.channel_tokens() + record]);
    int row = 0, rows = 0;
    for (; next >= 0 && rows < c.g.top_k; ++rows) {
      if (c.lane == rows) row = next;
      next = static_cast<int>(c.table(tables.next_row)[next]);
    }
    const bool holds = c.lane < rows;
    const Parts parts(c);
    if (parts.sums > 0) {
      const float weight = c.options.weighted && holds ? __uint_as_float(c.table(tables.weight)[row]) : 1.0f;
      const char* const from =
          static_cast<const char*>(c.tensors.expert_out) + (c.first_row_of(c.g.capacity) + row) * c.g.row_bytes();
      sum_to(c, from, weight, rows, out.data);
    }
    if (c.options.values) {
      const int slot = holds ? static_cast<int>(c.table(tables.slot)[row]) : -1;
      const float of_row = holds ? c.tensors.row_values[c.first_row_of(c.g.capacity) + row] : 0.0f;
      float value = 0.0f;
      for (int i = 0; i < rows; ++i) {
        const float other = __shfl_sync(kAllLanes, of_row, i);
        if (__shfl_sync(kAllLanes, slot, i) == c.lane) value = other;
      }
      put_value(c, out.data + parts.sums, value);
    }
    __syncwarp();
    if (c.lane == 0) out.fill();
    return true;
  }
};

// Sums of the ranks of this node, to this rank's fellow in another.
template <class Rail>
struct CombineRailForward : RailStreams<RingKind::kCombineRail, true, Rail> {
  using Streams = RailStreams<RingKind::kCombineRail, true, Rail>;
  using Streams::c, Streams::network, Streams::tables, Streams::records, Streams::end_at;

  __device__ bool run(int node, uint32_t chunk) const {
    const RingEnd end = end_at(node);
    const Turn turn = end.turn(chunk);
    const int64_t stage = end.stage + turn.index * end.slot_bytes;
    const uint32_t count = records_in_chunk(c.g, records(node), chunk);
    const int most = c.g.most_gpus();
    const Parts parts(c);
    const uint32_t* const via =
        c.table(tables.via) +
        (int64_t{c.channel * c.g.nodes + node} * c.g.channel_tokens() + chunk * c.g.rail_chunk) * most;
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t copy = c.lane < most ? via[i * most + c.lane] : ~0u;
      const bool used = copy != ~0u;
      const int from = used ? static_cast<int>(copy >> kPositionBits) : 0;
      const LinkIn in(c, combine_link_from(c, node, from), used ? copy & ((1u << kPositionBits) - 1) : 0);
      const auto there = [&] { return !used || in.is_filled(); };
      if (!wait_in_all_lanes(c, Streams::kRole, c.rank_of(c.node, from), in.turn.count, there)) return false;
      const int rows = __popc(__ballot_sync(kAllLanes, used));
      char* const target = c.window(c.rank) + stage + int64_t{i} * parts.bytes;
      if (parts.sums > 0) sum_to(c, in.data, 1.0f, rows, target);
      if (c.options.values) put_value(c, target + parts.sums, value_of(c, in.data, rows, parts.sums));
      __syncwarp();
      if (used) in.release();
    }
    network.put(end.peer, end.data + turn.index * end.slot_bytes, stage, int64_t{count} * parts.bytes,
                end.filled + 4 * turn.index, turn.after());
    return true;
  }
};

// The sums of all nodes, to y.
template <class Rail>
struct CombineReceive {
  static constexpr Role kRole = Role::kLinkReceive;

  Context& c;
  const Rail& network;
  const RoutingLayout& tables;

  __device__ int streams() const { return 1; }
  __device__ uint32_t count(int) const { return c.first_token(c.channel + 1) - c.first_token(c.channel); }
  __device__ bool ready(int, uint32_t) const { return true; }
  __device__ bool give_up(int, uint32_t) const { return false; }

  __device__ bool run(int, uint32_t message) const {
    const int token = c.first_token(c.channel) + static_cast<int>(message);
    const Route route = Route::own(c, token);
    // Of this node a row from each rank, of another one a row in all.
    const bool here = route.node == c.node, leads_rank = is_first(here, route.rank);
    const bool leads_node = is_first(route.used && !here, route.node);
    const LinkIn in(c, combine_link_from(c, c.node, here ? route.rank % c.g.gpus : 0),
                    leads_rank ? route.slot.link_position : 0);
    const uint32_t at = c.lane < c.g.top_k ? c.table(tables.rail_position)[token * c.g.top_k + c.lane] : 0;
    const uint32_t position = leads_node ? at : 0, chunk = position / c.g.rail_chunk;
    const RingEnd end = rail(c, RingKind::kCombineRail, false, leads_node ? route.node : c.node);
    const Turn turn = end.turn(chunk);
    const auto there = [&] {
      if (leads_rank) return in.is_filled();
      return !leads_node || network.poll(end.filled + 4 * turn.index) == turn.after();
    };
    const int waits_for = leads_rank ? route.rank : end.peer;
    if (!wait_in_all_lanes(c, kRole, waits_for, leads_rank ? in.turn.count : turn.count, there)) return false;

    const char* const sum_of_node =
        c.window(c.rank) + end.data + turn.index * end.slot_bytes + int64_t{position % c.g.rail_chunk} * Parts(c).bytes;
    add(token, route, leads_rank, in.data, leads_node, sum_of_node);
    __syncwarp();
    if (leads_rank) in.release();
    for (uint32_t left = __ballot_sync(kAllLanes, leads_node); left; left &= left - 1) {
      const int leader = __ffs(left) - 1;
      release_rail(__shfl_sync(kAllLanes, route.node, leader), __shfl_sync(kAllLanes, chunk, leader));
    }
    return true;
  }

  __device__ void add(int token, const Route& route, bool leads_rank, const char* sum_of_rank, bool leads_node,
                      const char* sum_of_node) const {
    const uint32_t ranks = __ballot_sync(kAllLanes, leads_rank), others = __ballot_sync(kAllLanes, leads_node);
    const int count = __popc(ranks), nodes = __popc(others);
    const int rank_lane = lane_of_place(leads_rank, smaller_among(ranks, route.rank));
    const int node_lane = lane_of_place(leads_node, smaller_among(others, route.node));
    const char* const rank_row = pointer_of(const_cast<char*>(sum_of_rank), rank_lane < 0 ? 0 : rank_lane);
    const char* const node_row = pointer_of(const_cast<char*>(sum_of_node), node_lane < 0 ? 0 : node_lane);
    const int before = __popc(__ballot_sync(kAllLanes, leads_node && route.node < c.node));
    if (c.options.values) {
      const int at = Parts(c).sums;
      const float value = value_of(c, rank_row, count, at) + value_of(c, node_row, nodes, at);
      const int64_t first = (c.first_row_of(c.options.tokens) + token) * c.g.top_k;
      if (c.lane < c.g.top_k) c.tensors.values[first + c.lane] = value;
    }
    if (!c.options.sums) return;
    char* const y = static_cast<char*>(c.tensors.y) + (c.first_row_of(c.options.tokens) + token) * c.g.row_bytes();
    const uint64_t policy = ptx::evict_first();
    for (int base = 0; base < c.g.row_bytes(); base += 16 * 32) {
      const int at = base + 16 * c.lane;
      const bool inside = at < c.g.row_bytes();
      const uint4 own = sum_of_rows(rank_row, 1.0f, count, at, inside);
      float acc[kPerLane] = {};
      for (int i = 0; i <= nodes; ++i) {
        if (i == before && count > 0) accumulate(acc, own, 1.0f);
        if (i == nodes) break;
        const char* const row = pointer_of(const_cast<char*>(node_row), i);
        if (inside) accumulate(acc, ptx::load_once(row + at), 1.0f);
      }
      if (inside) ptx::store_once(y + at, rounded(acc), policy);
    }
  }

  // A chunk's records are read by warps of both CTAs; the last one frees it.
  __device__ void release_rail(int node, uint32_t chunk) const {
    const RingEnd end = rail(c, RingKind::kCombineRail, false, node);
    const Turn turn = end.turn(chunk);
    const uint32_t count = records_in_chunk(c.g, c.table(tables.rail_out)[c.channel * c.g.nodes + node], chunk);
    uint32_t* const reads =
        c.tensors.state + c.setup.state.rail_reads + (c.channel * c.g.nodes + node) * c.g.rail_slots + turn.index;
    uint32_t before = 0;
    if (c.lane == 0) before = ptx::atomic_add_acq_rel_gpu(reads, 1);
    if (__shfl_sync(kAllLanes, before, 0) + 1 != count) return;
    if (c.lane == 0) *reads = 0;
    network.signal(end.peer, end.consumed + 4 * turn.index, turn.after());
  }
};

}  // namespace fastfp8::comm
