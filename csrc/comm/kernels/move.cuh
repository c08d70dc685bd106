// Moving tokens: 16 bytes a lane at a time, from one source to several places.
#pragma once
#include "../../common/block_scale.cuh"
#include "../../ptx/warp.cuh"
#include "rail.cuh"
#include "rings.cuh"

namespace fastfp8::comm {

constexpr int kUnroll = 4;  // 16-byte loads that a lane has in flight

__device__ __forceinline__ char* pointer_of(char* own, int lane) {
  return reinterpret_cast<char*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(own), lane));
}

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }

// Bytes of a token after its header on the wire.
__device__ __forceinline__ int payload_bytes(const Geometry& g, Payload payload) {
  return payload == Payload::kPlain ? 2 * g.hidden : g.hidden + (4 * g.blocks() + 15) / 16 * 16;
}

// Copies `bytes`, a multiple of 16, to each lane's `sink` whose bit is in `sinks`, by a warp.
__device__ __forceinline__ void copy_to(const char* source, int bytes, char* sink, uint32_t sinks) {
  const uint64_t policy = ptx::evict_first();
  for (int base = 0; base < bytes; base += 16 * 32 * kUnroll) {
    const int first = base + 16 * lane_index();
    uint4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + 512 * i < bytes) values[i] = ptx::load_once(source + first + 512 * i);
    }
    for (uint32_t left = sinks; left; left &= left - 1) {
      char* const to = pointer_of(sink, __ffs(left) - 1);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (first + 512 * i < bytes) ptx::store_once(to + first + 512 * i, values[i], policy);
      }
    }
  }
}

// Quantises a row of BF16 to each sink: codes, then scales. 8 lanes have a block of 128 elements.
__device__ __forceinline__ void quantize_to(const Context& c, const char* row, char* sink, uint32_t sinks) {
  const uint64_t policy = ptx::evict_first();
  const int hidden = c.g.hidden;
  for (int base = 0; base < hidden; base += 16 * 32) {
    const int first = base + 16 * c.lane;
    const bool inside = first < hidden;
    uint4 raw[2] = {};
    if (inside) raw[0] = ptx::load_once(row + 2 * first), raw[1] = ptx::load_once(row + 2 * first + 16);
    const uint32_t pairs[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w, raw[1].x, raw[1].y, raw[1].z, raw[1].w};
    float amax = 0.0f;
#pragma unroll
    for (uint32_t pair : pairs)
      amax = fmaxf(amax, fmaxf(finite_magnitude(low_bf16(pair)), finite_magnitude(high_bf16(pair))));
    for (int other = 1; other < 8; other *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, other));
    const BlockScale scale = block_scale_of(amax, kAmaxFloor, c.options.pow2 != 0);
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto two = [&](uint32_t pair) {
        return static_cast<uint32_t>(
            ptx::e4m3x2(__fmul_rn(low_bf16(pair), scale.multiplier), __fmul_rn(high_bf16(pair), scale.multiplier)));
      };
      codes[i] = two(pairs[2 * i]) | two(pairs[2 * i + 1]) << 16;
    }
    for (uint32_t left = sinks; left; left &= left - 1) {
      char* const to = pointer_of(sink, __ffs(left) - 1);
      if (inside) ptx::store_once(to + first, {codes[0], codes[1], codes[2], codes[3]}, policy);
      if (inside && c.lane % 8 == 0) reinterpret_cast<float*>(to + hidden)[first / kBlock] = scale.scale;
    }
  }
}

// A token's slots, one a lane.
struct Route {
  Slot slot;
  bool used;
  int rank, node;  // of the expert

  __device__ static Route of(const Context& c, const Slot& slot) {
    const bool used = slot.expert >= 0;
    const int rank = used ? c.rank_of_expert(slot.expert) : -1;
    return {slot, used, rank, used ? rank / c.g.gpus : -1};
  }

  // Of a token of this rank, by its number.
  __device__ static Route own(const Context& c, int token) {
    Slot slot{-1, 0, 0, 0.0f};
    if (c.lane < c.g.top_k) {
      const RoutingLayout& tables = c.setup.routing;
      const int at = token * c.g.top_k + c.lane, expert = c.tensors.topk_idx[at];
      if (expert >= 0 && expert < c.g.experts) {
        const uint32_t before = c.table(tables.expert_counts)[c.channel * c.g.experts + expert];
        slot.expert = expert;
        slot.place = static_cast<int>(c.table(tables.place)[at] + before);
        slot.link_position = static_cast<int>(c.table(tables.link_position)[at]);
        slot.weight = c.tensors.topk_weights == nullptr ? 1.0f : c.tensors.topk_weights[at];
      }
    }
    return of(c, slot);
  }

  // Out of the header of a record.
  __device__ static Route of_record(const Context& c, const char* record) {
    Slot slot{-1, 0, 0, 0.0f};
    if (c.lane < c.g.top_k) {
      const uint4 raw = ptx::load_once(record + 16 * c.lane);
      slot = {static_cast<int>(raw.x), static_cast<int>(raw.y), static_cast<int>(raw.z), __uint_as_float(raw.w)};
    }
    return of(c, slot);
  }
};

// Whether this lane is the first of those with its key, among the lanes where `counts` holds.
__device__ __forceinline__ bool is_first(bool counts, int key) {
  const uint32_t same = ptx::match_any(kAllLanes, counts ? static_cast<uint32_t>(key) : 0x80000000u + lane_index());
  return counts && __ffs(same) - 1 == lane_index();
}

// How many of the lanes in `others` have a smaller key.
__device__ __forceinline__ int smaller_among(uint32_t others, int key) {
  int smaller = 0;
  for (; others; others &= others - 1) smaller += __shfl_sync(kAllLanes, key, __ffs(others) - 1) < key;
  return smaller;
}

// Of the lanes where `counts` holds, the one of `place` i, in lane i; -1 behind the last.
__device__ __forceinline__ int lane_of_place(bool counts, int place) {
  int found = -1;
  for (int i = 0; i < 32; ++i) {
    const uint32_t there = __ballot_sync(kAllLanes, counts && place == i);
    if (there == 0) break;
    if (lane_index() == i) found = __ffs(there) - 1;
  }
  return found;
}

// A record of a token of this rank, to each sink: its header and its data, quantised on the way if the call says so.
template <Payload kPayload>
__device__ __forceinline__ void record_to(const Context& c, int token, const Slot& slot, char* sink, uint32_t sinks) {
  const uint64_t policy = ptx::evict_first();
  const int header = c.g.header_bytes(), hidden = c.g.hidden;
  for (uint32_t left = sinks; left; left &= left - 1) {
    char* const to = pointer_of(sink, __ffs(left) - 1);
    const uint4 raw = {static_cast<uint32_t>(slot.expert), static_cast<uint32_t>(slot.place),
                       static_cast<uint32_t>(slot.link_position), __float_as_uint(slot.weight)};
    if (c.lane < c.g.top_k) ptx::store_once(to + 16 * c.lane, raw, policy);
  }
  const int64_t row = c.first_row_of(c.options.tokens) + token;
  const int row_bytes = kPayload == Payload::kScaled ? hidden : 2 * hidden;
  const char* const data = static_cast<const char*>(c.tensors.x) + row * row_bytes;
  if constexpr (kPayload == Payload::kQuantize) {
    quantize_to(c, data, sink + header, sinks);
  } else {
    copy_to(data, row_bytes, sink + header, sinks);
  }
  if constexpr (kPayload == Payload::kScaled) {
    const int64_t first = c.first_row_of(c.g.blocks()) * c.options.scale_pitch + token;
    for (int base = 0; base < c.g.blocks(); base += 32) {
      const int block = base + c.lane;
      const bool inside = block < c.g.blocks();
      const float scale = inside ? c.tensors.x_scale[first + int64_t{block} * c.options.scale_pitch] : 0.0f;
      for (uint32_t left = sinks; left; left &= left - 1) {
        char* const to = pointer_of(sink, __ffs(left) - 1) + header + hidden;
        if (inside) reinterpret_cast<float*>(to)[block] = scale;
      }
    }
  }
}

}  // namespace fastfp8::comm
