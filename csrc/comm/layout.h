// Who talks to whom, and where everything lies: shared by planner and kernels.
//
// Ranks are GPUs of nodes: rank r is GPU r % gpus of node r / gpus. GPUs of a node reach each other's memory (the
// links, NVLink); to other nodes a rank speaks only with the GPU of its own index there (the rails, InfiniBand). A
// token from source s = (n, g) for an expert on d = (m, h) goes (n, g) -> (m, g) by rail, once for a node, and (m, g)
// -> (m, h) by link, once for a rank; combine takes the same way back. What a rank lets others read or write is its
// window; all have the same layout. A channel is a pair of CTAs with a share of the tokens of each rank, and rings of
// its own.
#pragma once
#include "../common/types.h"

namespace fastfp8::comm {

constexpr int kBlock = 128;        // elements under one scale
constexpr int kMaxTopK = 32;       // a lane for each slot of a token
constexpr int kTurnBits = 16;      // of a slot's count of fills: flags are compared modulo 2^16
constexpr int kPositionBits = 24;  // of a record's position in its stream; the rest is the GPU

// What a dispatched row is made of.
enum class Payload : uint8_t {
  kQuantize,  // BF16 in, e4m3 and scales on the wire and out
  kScaled,    // e4m3 and scales throughout
  kPlain      // BF16 throughout
};

// Fixed as long as the buffer lives.
struct Geometry {
  int nodes, gpus;  // GPUs of each node
  int channels;
  int experts, top_k;  // experts of all ranks: expert e is one of rank e / (experts / ranks)
  int hidden;
  int max_tokens;  // of one rank
  int capacity;    // rows that a rank can receive
  int link_slots;  // records in a ring between GPUs of a node
  int rail_slots;  // chunks in a ring between nodes
  int rail_chunk;  // records in a chunk

  constexpr int ranks() const { return nodes * gpus; }
  constexpr int local_experts() const { return experts / ranks(); }
  constexpr int blocks() const { return hidden / kBlock; }
  constexpr int channel_tokens() const { return (max_tokens + channels - 1) / channels; }  // at most
  constexpr int most_gpus() const { return top_k < gpus ? top_k : gpus; }  // of a node that one token goes to
  constexpr int header_bytes() const { return 16 * top_k; }                // a Slot each
  constexpr int row_bytes() const { return 2 * hidden; }                   // BF16; e4m3 and scales are less
  constexpr int record_bytes() const { return header_bytes() + row_bytes(); }
  constexpr int values_bytes() const { return (4 * top_k + 15) / 16 * 16; }  // a float for each slot
  constexpr int scale_pitch() const { return (capacity + 3) / 4 * 4; }       // of recv: floats from block to block
  // Words of the message by which a source tells a rank what it will send: rows for each of its experts, records in
  // each channel.
  constexpr int count_words() const { return local_experts() + channels; }
  // The same for all GPUs of a node, and the records on the rail in each channel; whole 16 bytes.
  constexpr int mail_words() const { return (gpus * count_words() + channels + 3) / 4 * 4; }
};

// One of a token's top_k, as it travels ahead of the token's data.
struct alignas(16) Slot {
  int expert;         // -1: none
  int place;          // among the rows of its source for this expert
  int link_position;  // of the record in the stream from its source to the expert's rank, in its channel
  float weight;
};

// A message in a ring's slot: a record, or on the rails a chunk of them. Its writer waits until the slot has been
// consumed as often as filled; its reader until it has been filled once more.
enum class RingKind : uint8_t { kDispatchLink, kDispatchRail, kCombineLink, kCombineRail };
constexpr int kRingKinds = 4;

constexpr bool is_link(RingKind kind) { return kind == RingKind::kDispatchLink || kind == RingKind::kCombineLink; }
constexpr bool is_dispatch(RingKind kind) { return kind == RingKind::kDispatchLink || kind == RingKind::kDispatchRail; }

// Rings of one kind at one rank, and the size of their slots.
struct RingShape {
  int streams, slots;  // streams of all channels
  int64_t slot_bytes;

  static constexpr RingShape of(const Geometry& g, RingKind kind) {
    const int64_t record = is_dispatch(kind) ? g.record_bytes() : g.row_bytes() + g.values_bytes();
    if (is_link(kind)) return {g.channels * g.ranks(), g.link_slots, record};
    return {g.channels * g.nodes, g.rail_slots, g.rail_chunk * record};
  }
  constexpr int64_t bytes() const { return int64_t{streams} * slots * slot_bytes; }
  constexpr int64_t flag_bytes() const { return int64_t{streams} * slots * 4; }
};

// Offsets in a window, in bytes. Rings are where they are read; `consumed` flags are where the writer is.
//
// Streams of a channel: a link ring at the rank that the token's experts are on (dispatch's reader, combine's writer)
// is numbered by the source rank; at the rank in between (the source's index in this node) by node of the source * gpus
// + GPU of the expert. A rail ring is numbered by the other node.
struct WindowLayout {
  struct Ring {
    int64_t data, filled, consumed, stage;  // stage: where the rail's writer puts a chunk together
  };
  Ring rings[kRingKinds];
  int64_t counts, counts_flags;  // [2][ranks][count_words], [2][ranks]: twice, for calls in turn
  int64_t mail, mail_flags;      // [2][nodes][mail_words], [2][nodes]
  int64_t mail_stage;            // as mail
  int64_t bytes;

  static constexpr WindowLayout of(const Geometry& g) {
    WindowLayout layout{};
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const int64_t begin = at;
      at = round_up(at + bytes, 128);
      return begin;
    };
    for (int kind = 0; kind < kRingKinds; ++kind) {
      const RingShape shape = RingShape::of(g, RingKind(kind));
      Ring& ring = layout.rings[kind];
      ring.data = take(shape.bytes());
      ring.stage = take(is_link(RingKind(kind)) ? 0 : shape.bytes());
      ring.filled = take(shape.flag_bytes());
      ring.consumed = take(shape.flag_bytes());
    }
    layout.counts = take(int64_t{8} * g.ranks() * g.count_words());
    layout.counts_flags = take(int64_t{8} * g.ranks());
    layout.mail = take(int64_t{8} * g.nodes * g.mail_words());
    layout.mail_flags = take(int64_t{8} * g.nodes);
    layout.mail_stage = take(int64_t{8} * g.nodes * g.mail_words());
    layout.bytes = at;
    return layout;
  }
};

// A network that counts signals by index has one for each flag that a rail sets in a window: those of the rails' rings
// and of the mail. Who signals and who polls use the same index; a signal's value is its flag's, modulo 2^kTurnBits.
struct SignalLayout {
  struct Range {
    int64_t flags;  // offset of the first flag in the window
    int first;      // its signal
  };
  static constexpr int kRanges = 5;
  Range ranges[kRanges];  // in ascending order of both
  int count;

  static constexpr SignalLayout of(const Geometry& g) {
    SignalLayout layout{};
    const WindowLayout window = WindowLayout::of(g);
    const auto& dispatch = window.rings[static_cast<int>(RingKind::kDispatchRail)];
    const auto& combine = window.rings[static_cast<int>(RingKind::kCombineRail)];
    const int slots = g.channels * g.nodes * g.rail_slots;
    layout.ranges[0] = {dispatch.filled, 0};
    layout.ranges[1] = {dispatch.consumed, slots};
    layout.ranges[2] = {combine.filled, 2 * slots};
    layout.ranges[3] = {combine.consumed, 3 * slots};
    layout.ranges[4] = {window.mail_flags, 4 * slots};
    layout.count = 4 * slots + 2 * g.nodes;
    return layout;
  }

  constexpr bool is_mail(int64_t flag) const { return flag >= ranges[kRanges - 1].flags; }

  constexpr int of_flag(int64_t flag) const {
    int i = kRanges - 1;
    while (i > 0 && flag < ranges[i].flags) --i;
    return ranges[i].first + static_cast<int>((flag - ranges[i].flags) / 4);
  }
};

// Why a role gave up, or what the exchange found; 0 while all is well. The first one stays, or a timeout.
enum class Trouble : uint32_t { kNone, kTimeout, kOverflow, kBadExpert };

// Those of dispatch first, in their order there.
enum class Role : uint32_t { kRailSend, kRailForward, kLinkSend, kLinkReceive, kExchange };

struct Status {
  uint32_t trouble;  // Trouble
  uint32_t channel, role, peer;
  uint32_t head, tail;  // what the role waited for, and what it had: fills of a slot, or the exchange's number
  uint32_t rows;        // kOverflow: rows that were to come
  uint32_t unused;
};

// What traced kernels write down, an event for each message of a stream and one for all that a warp did in its role.
enum class TracedCall : uint32_t { kExchange, kDispatch, kCombine };
constexpr uint32_t kWholePart = 0xffffffff;  // for stream and message

struct TraceEvent {
  uint64_t begin, end;  // nanoseconds
  uint32_t call, role, stream, message;
  uint32_t channel, cta, warp, sm;
};

// In words, of each rank: how many events there were, for how many there is room, two words unused; then those.
struct TraceLayout {
  static constexpr int kHeader = 4;
  static constexpr int kEvent = sizeof(TraceEvent) / 4;
  static constexpr int64_t words(uint32_t room) { return kHeader + int64_t{kEvent} * room; }
};

// Offsets in the state that a rank keeps from call to call, in words. All zero at first.
struct StateLayout {
  struct Bases {
    int write, read;  // [streams]: messages that have passed, modulo slots * 2^kTurnBits
  };
  Bases bases[kRingKinds];
  int rail_reads;       // [channels * nodes * rail_slots]: records of combine's chunk that have been read
  int tickets;          // [channels]: CTAs of the channel that have ended, in all launches
  int exchange_ticket;  // the same of the exchange's grid
  int epoch;            // exchanges so far
  int status;           // a Status
  int words;

  static constexpr StateLayout of(const Geometry& g) {
    StateLayout layout{};
    int at = 0;
    const auto take = [&at](int words) {
      const int begin = at;
      at += words;
      return begin;
    };
    for (int kind = 0; kind < kRingKinds; ++kind) {
      const int streams = RingShape::of(g, RingKind(kind)).streams;
      layout.bases[kind].write = take(streams);
      layout.bases[kind].read = take(streams);
    }
    layout.rail_reads = take(g.channels * g.nodes * g.rail_slots);
    layout.tickets = take(g.channels);
    layout.exchange_ticket = take(1);
    layout.epoch = take(1);
    layout.status = take(static_cast<int>(sizeof(Status) / 4));
    layout.words = at;
    return layout;
  }
};

// Offsets in what a handle keeps of one routing, in words. `C` channels, `t` tokens of a channel at most.
struct RoutingLayout {
  int place, link_position, rail_position;  // [max_tokens][top_k]: see Slot; position on the rail to the expert's node
  int expert_counts;                        // [C][experts]: rows of this source, then those of the channels before
  int link_out;                             // [C][ranks]: records that this source sends
  int rail_out;                             // [C][nodes]
  int rail_tokens;                          // [C][nodes][t]: which tokens
  int link_via;   // [C][nodes][gpus]: records from the source of this index in a node to a GPU here, through here
  int rail_in;    // [C][nodes]
  int via;        // [C][nodes][t][most_gpus]: GPU and position of each copy that went on by link, -1 for none
  int link_in;    // [C][ranks]: records that come here from a source
  int row_base;   // [ranks][local experts]: the first row of a source for an expert
  int first_row;  // [C][ranks][t]: of a record
  int next_row;   // [capacity]: of the same record, -1 for none
  int slot;       // [capacity]: of its token, that it is of
  int weight;     // [capacity], FP32
  int words;

  static constexpr RoutingLayout of(const Geometry& g) {
    RoutingLayout layout{};
    int at = 0;
    const auto take = [&at](int words) {
      const int begin = at;
      at += (words + 3) / 4 * 4;
      return begin;
    };
    const int slots = g.max_tokens * g.top_k, tokens = g.channels * g.channel_tokens();
    layout.place = take(slots);
    layout.link_position = take(slots);
    layout.rail_position = take(slots);
    layout.expert_counts = take(g.channels * g.experts);
    layout.link_out = take(g.channels * g.ranks());
    layout.rail_out = take(g.channels * g.nodes);
    layout.rail_tokens = take(tokens * g.nodes);
    layout.link_via = take(g.channels * g.ranks());
    layout.rail_in = take(g.channels * g.nodes);
    layout.via = take(tokens * g.nodes * g.most_gpus());
    layout.link_in = take(g.channels * g.ranks());
    layout.row_base = take(g.experts);
    layout.first_row = take(tokens * g.ranks());
    layout.next_row = take(g.capacity);
    layout.slot = take(g.capacity);
    layout.weight = take(g.capacity);
    layout.words = at;
    return layout;
  }
};

// Of one call.
struct CallOptions {
  int first_rank;    // of the launch: CTAs of blockIdx.y = i are those of rank first_rank + i
  int tokens;        // of each rank of the launch
  int scale_pitch;   // kScaled: floats from block to block of x's scales
  int pow2;          // kQuantize: scales are powers of two
  int weighted;      // dispatch sends topk_weights, else ones; combine multiplies by what came
  int sums, values;  // what combine brings back: the sums of rows, and for each slot the value of its row
  int timeout_us;    // a wait longer than this is a Timeout
  int rail_delay;    // loopback: messages between nodes sleep up to so many nanoseconds
};

// What a kernel is given besides addresses, by value: it stays in constant memory.
struct Setup {
  Geometry geometry;
  CallOptions call;
  RingShape rings[kRingKinds];
  WindowLayout window;
  StateLayout state;
  RoutingLayout routing;

  static constexpr Setup of(const Geometry& g, const CallOptions& call) {
    Setup setup{g, call, {}, WindowLayout::of(g), StateLayout::of(g), RoutingLayout::of(g)};
    for (int kind = 0; kind < kRingKinds; ++kind) setup.rings[kind] = RingShape::of(g, RingKind(kind));
    return setup;
  }
};

}  // namespace fastfp8::comm
