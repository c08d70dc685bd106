// What a warp of a communication kernel knows: who it is, where the windows are, how long it may wait.
#pragma once
#include "../../ptx/memory.cuh"
#include "../layout.h"

namespace fastfp8::comm {

constexpr uint32_t kAllLanes = 0xffffffff;

// Pointers of a launch. Those after `windows` are of its first rank; its other ranks' tensors lie behind one another.
struct Tensors {
  const uint64_t* windows;  // [ranks]: addresses; of other nodes' ranks that the rails do not reach by address, 0
  uint32_t *state, *routing;
  const int* topk_idx;        // [tokens, top_k]
  const float* topk_weights;  // [tokens, top_k], or nullptr for ones
  const void* x;              // [tokens, hidden]
  const float* x_scale;       // kScaled: [tokens, blocks], tokens adjacent
  void* recv;                 // [capacity, hidden]
  float* recv_scale;          // [capacity, blocks], rows adjacent
  int* offsets;               // [local experts]
  const void* expert_out;     // BF16 [capacity, hidden]
  void* y;                    // BF16 [tokens, hidden]
  const float* row_values;    // [capacity]
  float* values;              // [tokens, top_k]
};

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }

struct Context {
  const Setup& setup;
  const Geometry& g;
  const CallOptions& options;
  Tensors tensors;  // of this rank
  int rank, node, gpu, channel, lane;
  uint64_t deadline;  // of the wait in progress, set when it starts

  __device__ Context(const Setup& of_call, const Tensors& of_launch)
      : setup(of_call), g(of_call.geometry), options(of_call.call), tensors(of_launch) {
    const int64_t which = blockIdx.y;
    rank = options.first_rank + static_cast<int>(which), node = rank / g.gpus, gpu = rank % g.gpus;
    channel = static_cast<int>(blockIdx.x / 2), lane = lane_index(), deadline = 0;
    const int64_t slots = int64_t{options.tokens} * g.top_k;
    tensors.state += which * setup.state.words;
    tensors.routing += which * setup.routing.words;
    tensors.topk_idx += which * slots;
    if (tensors.topk_weights != nullptr) tensors.topk_weights += which * slots;
    tensors.offsets += which * g.local_experts();
    tensors.recv_scale += which * g.blocks() * g.scale_pitch();
  }

  __device__ int rank_of(int of_node, int of_gpu) const { return of_node * g.gpus + of_gpu; }
  __device__ int rank_of_expert(int expert) const { return expert / g.local_experts(); }
  __device__ char* window(int of_rank) const { return reinterpret_cast<char*>(tensors.windows[of_rank]); }
  __device__ int first_token(int of_channel) const {
    return static_cast<int>(int64_t{options.tokens} * of_channel / g.channels);
  }

  __device__ uint32_t* table(int offset) const { return tensors.routing + offset; }
  // Rows of this rank in a tensor that holds `rows` of each rank.
  __device__ int64_t first_row_of(int rows) const { return int64_t{rank - options.first_rank} * rows; }

  __device__ void begin_wait() { deadline = ptx::global_timer() + uint64_t{1000} * options.timeout_us; }

  // Whether somebody has run out of time, now or in an earlier launch. Tables may not be made then, and rings not be
  // where both ends think they are.
  __device__ bool has_failed() const {
    const uint32_t trouble = ptx::load_relaxed_gpu(tensors.state + setup.state.status);
    return trouble == static_cast<uint32_t>(Trouble::kTimeout);
  }

  // To be asked by one or more lanes each time that they find nothing to do: whether the kernel is to end. Whoever runs
  // out of time first says what for.
  __device__ bool give_up(Role role, int peer, uint32_t head, uint32_t tail) const {
    if (has_failed()) return true;
    if (ptx::global_timer() < deadline) return false;
    report(Trouble::kTimeout, role, peer, head, tail, 0);
    return true;
  }

  __device__ void report(Trouble trouble, Role role, int peer, uint32_t head, uint32_t tail, uint32_t rows) const {
    uint32_t* const status = tensors.state + setup.state.status;
    const uint32_t found = ptx::atomic_replace_gpu(status, 0, static_cast<uint32_t>(trouble));
    // The first stays, but for what nothing survives: that is told in place of what a caller may go on after.
    if (found != 0 && (trouble != Trouble::kTimeout || found == static_cast<uint32_t>(Trouble::kTimeout) ||
                       ptx::atomic_replace_gpu(status, found, static_cast<uint32_t>(trouble)) != found))
      return;
    status[1] = channel, status[2] = static_cast<uint32_t>(role), status[3] = peer;
    status[4] = head, status[5] = tail, status[6] = rows;
  }
};

}  // namespace fastfp8::comm
