// The transport between nodes: what a rail can do. Links need none, their windows are memory.
//
// A rail's flags count how often what they stand for has been filled or consumed, modulo 2^kTurnBits: each put or
// signal adds 1. So a network may count signals where memory takes the value.
#pragma once
#include "context.cuh"

namespace fastfp8::comm {

// Another rank's window is memory here: of another virtual rank on this GPU, or of an emulated device. Messages may
// sleep on their way, so that they overtake one another as on a network.
struct LoopbackRail {
  const Context& c;

  // By a warp: `bytes`, a multiple of 16, from offset `from` of this rank's window to offset `to` of that of `peer`;
  // after them, the flag at offset `flag` there. What other warps wrote to `from` must have been acquired.
  __device__ void put(int peer, int64_t to, int64_t from, int64_t bytes, int64_t flag, uint32_t value) const {
    const char* const source = c.window(c.rank) + from;
    char* const target = c.window(peer) + to;
    __syncwarp();
    const uint64_t policy = ptx::evict_first();
    for (int64_t i = 16 * c.lane; i < bytes; i += 16 * 32)
      ptx::store_once(target + i, ptx::load_once(source + i), policy);
    signal(peer, flag, value);
  }

  // By a warp: the flag alone, after all that its lanes have done.
  __device__ void signal(int peer, int64_t flag, uint32_t value) const {
    __syncwarp();
    if (c.options.rail_delay > 0)
      ptx::sleep_ns(static_cast<uint32_t>(ptx::global_timer() * 2654435761u >> 8) % c.options.rail_delay);
    if (c.lane == 0) ptx::store_release_sys(reinterpret_cast<uint32_t*>(c.window(peer) + flag), value);
  }

  // By a lane: the value of a flag of this rank's window. What was put before it is seen after.
  __device__ uint32_t poll(int64_t flag) const {
    return ptx::load_acquire_sys(reinterpret_cast<const uint32_t*>(c.window(c.rank) + flag));
  }

  // By a warp: until what it has put needs its source no more.
  __device__ void flush() const {}
};

}  // namespace fastfp8::comm
