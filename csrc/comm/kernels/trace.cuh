// When each warp did what. Instances that write it down are kernels of their own (fastfp8/comm/timeline.py); in the
// others nothing is left of it.
#pragma once
#include "context.cuh"

namespace fastfp8::comm {

struct NoTrace {
  struct Time {};

  __device__ Time now() const { return {}; }
  __device__ void message(Time, Role, int, uint32_t) const {}
  __device__ void part(Time, Role) const {}
};

struct WarpTrace {
  using Time = uint64_t;

  const Context& c;
  TracedCall call;
  uint32_t* words;  // of this rank: a header, then events

  __device__ WarpTrace(const Context& of_warp, TracedCall of_kernel, uint32_t* of_launch)
      : c(of_warp), call(of_kernel), words(of_launch + int64_t{blockIdx.y} * TraceLayout::words(of_launch[1])) {}

  __device__ Time now() const { return ptx::global_timer(); }

  // By a warp: that it did one message of a role's stream since `begin`.
  __device__ void message(Time begin, Role role, int stream, uint32_t message) const {
    write(begin, role, static_cast<uint32_t>(stream), message);
  }

  // By a warp: that it had this role since `begin`.
  __device__ void part(Time begin, Role role) const { write(begin, role, kWholePart, kWholePart); }

 private:
  __device__ void write(Time begin, Role role, uint32_t stream, uint32_t message) const {
    __syncwarp();
    if (c.lane != 0) return;
    const Time end = now();
    const uint32_t place = ptx::atomic_add_acq_rel_gpu(words, 1);
    if (place >= words[1]) return;  // counted, not kept
    const auto low = [](Time t) { return static_cast<uint32_t>(t); };
    const auto high = [](Time t) { return static_cast<uint32_t>(t >> 32); };
    uint4* const event = reinterpret_cast<uint4*>(words + TraceLayout::kHeader) + 3 * int64_t{place};
    event[0] = {low(begin), high(begin), low(end), high(end)};
    event[1] = {static_cast<uint32_t>(call), static_cast<uint32_t>(role), stream, message};
    event[2] = {static_cast<uint32_t>(c.channel), blockIdx.x, threadIdx.x / 32, ptx::sm_index()};
  }
};

}  // namespace fastfp8::comm
