// Rings of slots with a flag each, between a writer and a reader on two GPUs.
//
//   writer                                     reader
//   waits until consumed == turn               waits until filled == turn + 1
//   writes the slot                            reads the slot
//   filled = turn + 1   (release.sys)  ---->
//                                      <----   consumed = turn + 1   (release.sys)
//
// Message q of a stream lies in slot q % slots, in that slot's turn q / slots. Slots are independent of one another, so
// any warp may fill or empty any of them, in any order; both sides know from the counts what each message is.
#pragma once
#include "context.cuh"

namespace fastfp8::comm {

struct Turn {
  uint32_t index;  // of the slot
  uint32_t count;  // of its fills before

  __device__ uint32_t after() const { return (count + 1) & ((1u << kTurnBits) - 1); }
};

// One end of a stream. All windows have the same layout, so an offset serves at either end.
struct RingEnd {
  int peer;
  int64_t data, filled, consumed;  // offsets of the stream's first slot: at the reader, at the reader, at the writer
  int64_t stage;                   // rails: at the writer
  uint32_t base;                   // messages before this call
  int slots;
  int64_t slot_bytes;

  // `here` is the stream's number at this end, `there` at the other.
  __device__ static RingEnd make(const Context& c, RingKind kind, bool writes, int here, int there, int peer) {
    const RingShape& shape = c.setup.rings[static_cast<int>(kind)];
    const WindowLayout::Ring& ring = c.setup.window.rings[static_cast<int>(kind)];
    const StateLayout::Bases& bases = c.setup.state.bases[static_cast<int>(kind)];
    const int first = c.channel * (shape.streams / c.g.channels);
    const int64_t writer = first + (writes ? here : there), reader = first + (writes ? there : here);
    RingEnd end;
    end.peer = peer;
    end.data = ring.data + reader * shape.slots * shape.slot_bytes;
    end.filled = ring.filled + reader * shape.slots * 4;
    end.consumed = ring.consumed + writer * shape.slots * 4;
    end.stage = ring.stage + writer * shape.slots * shape.slot_bytes;
    end.base = c.tensors.state[(writes ? bases.write : bases.read) + first + here];
    end.slots = shape.slots, end.slot_bytes = shape.slot_bytes;
    return end;
  }

  __device__ Turn turn(uint32_t message) const {
    return {(base + message) % slots, (base + message) / slots & ((1u << kTurnBits) - 1)};
  }
};

__device__ __forceinline__ uint32_t* flag_at(char* window, int64_t offset, Turn turn) {
  return reinterpret_cast<uint32_t*>(window + offset) + turn.index;
}

// A slot of a link as its writer has it.
struct LinkOut {
  char* data;
  uint32_t *filled, *consumed;
  Turn turn;

  __device__ LinkOut(const Context& c, const RingEnd& end, uint32_t message) : turn(end.turn(message)) {
    char* const theirs = c.window(end.peer);
    data = theirs + end.data + turn.index * end.slot_bytes;
    filled = flag_at(theirs, end.filled, turn), consumed = flag_at(c.window(c.rank), end.consumed, turn);
  }
  __device__ bool is_free() const { return ptx::load_acquire_sys(consumed) == turn.count; }
  __device__ void fill() const { ptx::store_release_sys(filled, turn.after()); }
};

// A slot of a link as its reader has it.
struct LinkIn {
  const char* data;
  uint32_t *filled, *consumed;
  Turn turn;

  __device__ LinkIn(const Context& c, const RingEnd& end, uint32_t message) : turn(end.turn(message)) {
    char* const mine = c.window(c.rank);
    data = mine + end.data + turn.index * end.slot_bytes;
    filled = flag_at(mine, end.filled, turn), consumed = flag_at(c.window(end.peer), end.consumed, turn);
  }
  __device__ bool is_filled() const { return ptx::load_acquire_sys(filled) == turn.after(); }
  __device__ void release() const { ptx::store_release_sys(consumed, turn.after()); }
};

// Ends of the streams, by what the warp wants of them.

// Dispatch, at the rank in between: to GPU `to` of this node, tokens of the source of this index in node `source`.
__device__ __forceinline__ RingEnd dispatch_link_to(const Context& c, int source, int to) {
  return RingEnd::make(c, RingKind::kDispatchLink, true, source * c.g.gpus + to, c.rank_of(source, c.gpu),
                       c.rank_of(c.node, to));
}

// Dispatch, at the experts' rank: tokens of rank `source`.
__device__ __forceinline__ RingEnd dispatch_link_from(const Context& c, int source) {
  const int between = c.rank_of(c.node, source % c.g.gpus);
  return RingEnd::make(c, RingKind::kDispatchLink, false, source, source / c.g.gpus * c.g.gpus + c.gpu, between);
}

// Combine, at the experts' rank: sums for tokens of rank `source`.
__device__ __forceinline__ RingEnd combine_link_to(const Context& c, int source) {
  const int between = c.rank_of(c.node, source % c.g.gpus);
  return RingEnd::make(c, RingKind::kCombineLink, true, source, source / c.g.gpus * c.g.gpus + c.gpu, between);
}

// Combine, at the rank in between: from GPU `from` of this node, sums for the source of this index in node `source`.
__device__ __forceinline__ RingEnd combine_link_from(const Context& c, int source, int from) {
  return RingEnd::make(c, RingKind::kCombineLink, false, source * c.g.gpus + from, c.rank_of(source, c.gpu),
                       c.rank_of(c.node, from));
}

// Either way, between this rank and its fellow in another node.
__device__ __forceinline__ RingEnd rail(const Context& c, RingKind kind, bool writes, int other_node) {
  return RingEnd::make(c, kind, writes, other_node, c.node, c.rank_of(other_node, c.gpu));
}

}  // namespace fastfp8::comm
