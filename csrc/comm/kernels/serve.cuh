// Roles: which warps of a channel do which part, and how a warp goes about the streams of its part.
#pragma once
#include "rings.cuh"
#include "trace.cuh"

namespace fastfp8::comm {

// This warp among those of its role.
struct Share {
  int role, index, count;
};

__device__ __forceinline__ uint32_t sum_of_lanes(uint32_t value) {
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(kAllLanes, value, other);
  return value;
}

// The sum of `count` words, by a warp.
__device__ __forceinline__ uint32_t sum_of(const uint32_t* words, int count) {
  uint32_t sum = 0;
  for (int i = lane_index(); i < count; i += 32) sum += words[i];
  return sum_of_lanes(sum);
}

// Shares the `warps` of a channel out among the roles by their loads: one for each role that has any, and the others in
// proportion. The last role with a load takes what division leaves.
template <int kRoles>
__device__ Share share_of(int warp, int warps, const uint32_t (&loads)[kRoles]) {
  uint64_t total = 0;
  int active = 0, last = 0;
  for (int role = 0; role < kRoles; ++role) {
    total += loads[role];
    if (loads[role] > 0) ++active, last = role;
  }
  int first = 0;
  for (int role = 0; role < kRoles; ++role) {
    if (loads[role] == 0) continue;
    const int more = static_cast<int>(loads[role] * uint64_t(warps - active) / total);
    const int count = role == last ? warps - first : 1 + more;
    if (warp < first + count) return {role, warp - first, count};
    first += count;
  }
  return {-1, 0, 0};
}

// Does all messages of this warp's share of a role's streams, in order within a stream. Several warps take the messages
// of a stream in turns, or one takes several streams. It never waits at one stream while another can go on: that is
// what keeps the roles free of deadlock (dispatch.cuh, combine.cuh).
//
// A role says which it is (kRole), how many `streams()` it has, the `count(stream)` of messages, whether message q is
// `ready(stream, q)` (asked by one lane), and does `run(stream, q)` by the whole warp; false if the kernel is to end.
// `next`, in shared memory, has a word for each stream.
template <class Work, class Trace>
__device__ void serve(Context& c, const Work& work, const Trace& trace, Share share, uint32_t* next) {
  const int streams = work.streams();
  // Streams share.index, + share.count, ...: one only, if there are warps enough for several to share it.
  const int step = share.count < streams ? share.count : streams, first = share.index % step;
  const int own = (streams - first + step - 1) / step;
  const int abreast = (share.count - first + step - 1) / step;  // warps at each of them
  for (int i = c.lane; i < own; i += 32) next[i] = share.index / step;
  __syncwarp();
  c.begin_wait();
  while (true) {
    bool remains = false, progress = false;
    int waits_for = 0;
    for (int base = 0; base < own; base += 32) {
      const int stream = first + (base + c.lane) * step;
      const bool exists = base + c.lane < own;
      const uint32_t message = exists ? next[base + c.lane] : 0;
      const bool open = exists && message < work.count(stream);
      uint32_t ready = __ballot_sync(kAllLanes, open && work.ready(stream, message));
      const uint32_t opens = __ballot_sync(kAllLanes, open);
      if (opens) remains = true, waits_for = __shfl_sync(kAllLanes, stream, __ffs(opens) - 1);
      __syncwarp();  // what the lanes have acquired, all may read
      for (; ready; ready &= ready - 1) {
        const int from = __ffs(ready) - 1;
        const int of = __shfl_sync(kAllLanes, stream, from);
        const uint32_t which = __shfl_sync(kAllLanes, message, from);
        const auto begin = trace.now();
        const bool goes_on = work.run(of, which);
        trace.message(begin, Work::kRole, of, which);
        if (!goes_on) return;
        if (c.lane == from) next[base + from] = message + abreast;
        progress = true;
      }
      __syncwarp();
    }
    if (!remains) return;
    if (progress)
      c.begin_wait();
    else if (__any_sync(kAllLanes, work.give_up(waits_for, next[(waits_for - first) / step])))
      return;
  }
}

// Until `ready()` holds in every lane; false if the kernel is to end. `waits_for` and `tail` are for the report.
template <class Ready>
__device__ bool wait_in_all_lanes(Context& c, Role role, int waits_for, uint32_t tail, const Ready& ready) {
  c.begin_wait();
  bool done = false;
  while (true) {
    done = done || ready();
    if (__all_sync(kAllLanes, done)) break;
    const bool ends = !done && c.give_up(role, waits_for, tail + 1, tail);
    if (__any_sync(kAllLanes, ends)) return false;
  }
  __syncwarp();  // what the lanes have acquired, all may read
  return true;
}

}  // namespace fastfp8::comm
