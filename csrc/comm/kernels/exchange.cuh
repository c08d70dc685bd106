// The exchange of counts, before a routing is used: what each source will send where. From it every rank knows where
// each row goes and how long each stream is, so placement is fixed and nothing waits for the host.
//
// One CTA for each channel numbers its tokens; the last one to end adds up, sends, waits for the others' counts, and
// makes the tables. Counts for another node go by rail to this rank's fellow there, who hands them on.
#pragma once
#include "rail.cuh"
#include "serve.cuh"

namespace fastfp8::comm {

// The positions of lanes in their bins, behind those counted before. A lane's element is that of lane `leader`; it
// counts once. By the lanes of `members`.
__device__ __forceinline__ uint32_t position_in(uint32_t members, int bin, int leader, uint32_t* counters) {
  const uint32_t same = ptx::match_any(members, bin);
  const uint32_t leaders = __ballot_sync(members, lane_index() == leader) & same;
  const uint32_t position = counters[bin] + __popc(leaders & ((1u << leader) - 1));
  __syncwarp(members);
  if (lane_index() == __ffs(same) - 1) counters[bin] += __popc(leaders);
  __syncwarp(members);
  return position;
}

// Numbers the slots of this channel's tokens; `counters`, in shared memory: of experts, ranks and nodes. By one warp.
__device__ inline void number_tokens(const Context& c, uint32_t* counters) {
  const Geometry& g = c.g;
  const RoutingLayout& tables = c.setup.routing;
  uint32_t *const experts = counters, *const ranks = experts + g.experts, *const nodes = ranks + g.ranks();
  uint32_t* const rail_tokens = c.table(tables.rail_tokens);
  const int together = 32 / g.top_k, last = c.first_token(c.channel + 1);
  for (int first = c.first_token(c.channel); first < last; first += together) {
    const int token = first + c.lane / g.top_k, at = token * g.top_k + c.lane % g.top_k;
    const bool exists = c.lane < together * g.top_k && token < last;
    const int expert = exists ? c.tensors.topk_idx[at] : -1;
    const bool used = expert >= 0 && expert < g.experts;
    if (expert < -1 || expert >= g.experts) c.report(Trouble::kBadExpert, Role::kExchange, token, expert, 0, 0);
    const uint32_t members = __ballot_sync(kAllLanes, used);
    if (used) {
      const int rank = c.rank_of_expert(expert), node = rank / g.gpus, nth = c.lane / g.top_k;
      c.table(tables.place)[at] = position_in(members, expert, c.lane, experts);
      const int of_rank = __ffs(ptx::match_any(members, nth * g.ranks() + rank)) - 1;
      c.table(tables.link_position)[at] = position_in(members, rank, of_rank, ranks);
      const int of_node = __ffs(ptx::match_any(members, nth * g.nodes + node)) - 1;
      const uint32_t position = position_in(members, node, of_node, nodes);
      c.table(tables.rail_position)[at] = position;
      if (of_node == c.lane) rail_tokens[(c.channel * g.nodes + node) * g.channel_tokens() + position] = token;
    }
    __syncwarp();
  }
}

// A warp's part of the messages and tables; `warp` of `warps`.
struct Exchange {
  Context& c;
  const RoutingLayout& tables;
  const WindowLayout& layout;
  uint32_t epoch;

  __device__ int64_t parity() const { return epoch & 1; }
  __device__ int64_t counts_at(int source) const {
    return layout.counts + 4 * (parity() * c.g.ranks() + source) * c.g.count_words();
  }
  __device__ int64_t counts_flag(int source) const {
    return layout.counts_flags + 4 * (parity() * c.g.ranks() + source);
  }
  __device__ int64_t mail_at(int node) const {
    return layout.mail + 4 * (parity() * c.g.nodes + node) * c.g.mail_words();
  }
  __device__ int64_t mail_flag(int node) const { return layout.mail_flags + 4 * (parity() * c.g.nodes + node); }

  // How often this exchange's half of the mail has been filled after it: flags of rails count fills.
  __device__ uint32_t mails() const { return (epoch + 1) / 2 & ((1u << kTurnBits) - 1); }

  // Word i of what this source tells `rank`. The counts of a channel's experts are those before it by now.
  __device__ uint32_t word_for(int rank, int i, const uint32_t* totals) const {
    const int local = c.g.local_experts();
    if (i < local) return totals[rank * local + i];
    return c.table(tables.link_out)[(i - local) * c.g.ranks() + rank];
  }

  __device__ void send_in_node(int gpu, const uint32_t* totals) const {
    const int rank = c.rank_of(c.node, gpu);
    uint32_t* const words = reinterpret_cast<uint32_t*>(c.window(rank) + counts_at(c.rank));
    for (int i = c.lane; i < c.g.count_words(); i += 32) words[i] = word_for(rank, i, totals);
    __syncwarp();
    if (c.lane == 0) ptx::store_release_sys(reinterpret_cast<uint32_t*>(c.window(rank) + counts_flag(c.rank)), epoch);
  }

  template <class Rail>
  __device__ void send_to_node(int node, const uint32_t* totals, const Rail& network) const {
    const int64_t stage = layout.mail_stage + (mail_at(node) - layout.mail);
    uint32_t* const words = reinterpret_cast<uint32_t*>(c.window(c.rank) + stage);
    const int each = c.g.count_words();
    for (int i = c.lane; i < c.g.gpus * each + c.g.channels; i += 32) {
      const int gpu = i / each;
      words[i] = gpu < c.g.gpus ? word_for(c.rank_of(node, gpu), i % each, totals)
                                : c.table(tables.rail_out)[(i - c.g.gpus * each) * c.g.nodes + node];
    }
    network.put(c.rank_of(node, c.gpu), mail_at(c.node), stage, int64_t{4} * c.g.mail_words(), mail_flag(c.node),
                mails());
  }

  // The counts of this rank's fellow in `node`, handed on to the ranks here.
  template <class Rail>
  __device__ bool hand_on(int node, const Rail& network) {
    const auto there = [&] { return network.poll(mail_flag(node)) == mails(); };
    if (!wait_in_all_lanes(c, Role::kExchange, c.rank_of(node, c.gpu), epoch - 1, there)) return false;
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(c.window(c.rank) + mail_at(node));
    const int each = c.g.count_words(), source = c.rank_of(node, c.gpu);
    for (int gpu = 0; gpu < c.g.gpus; ++gpu) {
      char* const to = c.window(c.rank_of(c.node, gpu));
      uint32_t* const target = reinterpret_cast<uint32_t*>(to + counts_at(source));
      for (int i = c.lane; i < each; i += 32) target[i] = words[gpu * each + i];
      for (int channel = c.lane; channel < c.g.channels; channel += 32)
        c.table(tables.link_via)[(channel * c.g.nodes + node) * c.g.gpus + gpu] =
            words[gpu * each + c.g.local_experts() + channel];
      __syncwarp();
      if (c.lane == 0) ptx::store_release_sys(reinterpret_cast<uint32_t*>(to + counts_flag(source)), epoch);
    }
    for (int channel = c.lane; channel < c.g.channels; channel += 32)
      c.table(tables.rail_in)[channel * c.g.nodes + node] = words[c.g.gpus * each + channel];
    return true;
  }

  __device__ bool receive(int source) {
    const uint32_t* const flag = reinterpret_cast<const uint32_t*>(c.window(c.rank) + counts_flag(source));
    const auto there = [&] { return ptx::load_acquire_sys(flag) == epoch; };
    if (!wait_in_all_lanes(c, Role::kExchange, source, epoch - 1, there)) return false;
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(c.window(c.rank) + counts_at(source));
    const int local = c.g.local_experts();
    for (int i = c.lane; i < local; i += 32) c.table(tables.row_base)[source * local + i] = words[i];
    for (int channel = c.lane; channel < c.g.channels; channel += 32)
      c.table(tables.link_in)[channel * c.g.ranks() + source] = words[local + channel];
    return true;
  }

  // Counts of rows to first rows, and the ends of the experts' rows. By one warp.
  __device__ void place_rows() const {
    const int local = c.g.local_experts(), ranks = c.g.ranks();
    uint32_t* const base = c.table(tables.row_base);
    uint32_t before = 0;
    for (int expert = 0; expert < local; ++expert) {
      for (int first = 0; first < ranks; first += 32) {
        const int source = first + c.lane;
        const uint32_t rows = source < ranks ? base[source * local + expert] : 0;
        uint32_t sum = rows;
        for (int by = 1; by < 32; by *= 2) {
          const uint32_t below = __shfl_up_sync(kAllLanes, sum, by);
          if (c.lane >= by) sum += below;
        }
        if (source < ranks) base[source * local + expert] = before + sum - rows;
        before += __shfl_sync(kAllLanes, sum, 31);
      }
      const uint32_t capacity = c.g.capacity;
      if (c.lane == 0) c.tensors.offsets[expert] = static_cast<int>(before < capacity ? before : capacity);
    }
    if (c.lane == 0 && before > static_cast<uint32_t>(c.g.capacity))
      c.report(Trouble::kOverflow, Role::kExchange, c.rank, 0, 0, before);
  }
};

// Counts of a channel's experts become those of the channels before; `totals`, in shared memory: of all. By a CTA.
__device__ inline void add_channels(const Context& c, uint32_t* totals) {
  uint32_t* const counts = c.table(c.setup.routing.expert_counts);
  for (int expert = threadIdx.x; expert < c.g.experts; expert += blockDim.x) {
    uint32_t before = 0;
    for (int channel = 0; channel < c.g.channels; ++channel) {
      uint32_t& here = counts[channel * c.g.experts + expert];
      const uint32_t rows = here;
      here = before, before += rows;
    }
    totals[expert] = before;
  }
}

template <class Rail, class Trace>
__device__ void exchange(Context& c, const Rail& network, const Trace& trace, uint32_t* shared) {
  const Geometry& g = c.g;
  c.channel = static_cast<int>(blockIdx.x);
  const RoutingLayout& tables = c.setup.routing;
  const StateLayout& state = c.setup.state;
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  const auto begin = trace.now();
  const int bins = g.experts + g.ranks() + g.nodes;
  for (int i = threadIdx.x; i < bins; i += blockDim.x) shared[i] = 0;
  __syncthreads();
  if (warp == 0) number_tokens(c, shared);
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) {
    const int rank = i - g.experts, node = rank - g.ranks();
    if (rank < 0)
      c.table(tables.expert_counts)[c.channel * g.experts + i] = shared[i];
    else if (node < 0)
      c.table(tables.link_out)[c.channel * g.ranks() + rank] = shared[i];
    else
      c.table(tables.rail_out)[c.channel * g.nodes + node] = shared[i];
  }
  __syncthreads();
  uint32_t* const ticket = c.tensors.state + state.exchange_ticket;
  if (threadIdx.x == 0) shared[0] = ptx::atomic_add_acq_rel_gpu(ticket, 1);
  __syncthreads();
  const bool is_last = shared[0] % g.channels == static_cast<uint32_t>(g.channels) - 1;
  __syncthreads();
  if (!is_last) {
    trace.part(begin, Role::kExchange);
    return;
  }

  add_channels(c, shared);
  uint32_t* const epochs = c.tensors.state + state.epoch;
  Exchange work{c, tables, c.setup.window, *epochs + 1};
  __syncthreads();
  if (threadIdx.x == 0) *epochs = work.epoch;
  for (int gpu = warp; gpu < g.gpus; gpu += warps) work.send_in_node(gpu, shared);
  for (int node = warp; node < g.nodes; node += warps) {
    if (node != c.node) work.send_to_node(node, shared, network);
  }
  // Of this node nobody hands on: what goes through here is what this rank sends.
  for (int i = threadIdx.x; i < g.channels * g.gpus; i += blockDim.x) {
    const int channel = i / g.gpus, gpu = i % g.gpus;
    c.table(tables.link_via)[(channel * g.nodes + c.node) * g.gpus + gpu] =
        c.table(tables.link_out)[channel * g.ranks() + c.rank_of(c.node, gpu)];
    c.table(tables.rail_in)[channel * g.nodes + c.node] = 0;
  }
  bool goes_on = true;
  for (int node = warp; node < g.nodes && goes_on; node += warps)
    goes_on = node == c.node || work.hand_on(node, network);
  for (int source = warp; source < g.ranks() && goes_on; source += warps) goes_on = work.receive(source);
  __syncthreads();
  if (warp == 0) work.place_rows();
  trace.part(begin, Role::kExchange);
}

}  // namespace fastfp8::comm
