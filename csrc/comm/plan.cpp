#include "plan.h"

#include <algorithm>
#include <initializer_list>
#include <string_view>

#include "../common/check.h"

namespace fastfp8::comm {
namespace {

constexpr const char* kOp = "comm.Buffer";
constexpr int64_t kMostWords = int64_t{1} << 31;
constexpr int64_t kMostBytesOfAPut = int64_t{1} << 30;  // NCCL makes several of a larger one

struct Kernels {
  const char *rail, *module, *exchange, *quantize, *scaled, *plain, *combine;
};

constexpr Kernels kKernels[] = {
    {"loopback", "comm_loopback", "comm_exchange_loopback", "comm_dispatch_quantize_loopback",
     "comm_dispatch_scaled_loopback", "comm_dispatch_plain_loopback", "comm_combine_loopback"},
    {"nccl", "comm_nccl", "comm_exchange_nccl", "comm_dispatch_quantize_nccl", "comm_dispatch_scaled_nccl",
     "comm_dispatch_plain_nccl", "comm_combine_nccl"}};

constexpr Kernels kTraced[] = {
    {"loopback", "comm_traced", "comm_exchange_traced", "comm_dispatch_quantize_traced", "comm_dispatch_scaled_traced",
     "comm_dispatch_plain_traced", "comm_combine_traced"},
    {"nccl", "comm_nccl_traced", "comm_exchange_nccl_traced", "comm_dispatch_quantize_nccl_traced",
     "comm_dispatch_scaled_nccl_traced", "comm_dispatch_plain_nccl_traced", "comm_combine_nccl_traced"}};

bool is_nccl(const RailPlan& rail) { return rail.name == kKernels[1].rail; }

const Kernels& kernels_of(const RailPlan& rail) {
  FASTFP8_CHECK_ARGUMENT(is_nccl(rail) || rail.name == kKernels[0].rail, kOp, "rail", "'loopback' or 'nccl'",
                         rail.name);
  FASTFP8_CHECK_ARGUMENT(is_nccl(rail) != rail.constants.empty(), kOp, "rail_constants",
                         (is_nccl(rail) ? "those of a connection for 'nccl'" : "none for 'loopback'"),
                         rail.constants.size() << " bytes");
  return (rail.traced ? kTraced : kKernels)[is_nccl(rail)];
}

// `tensors`: those of Tensors (kernels/context.cuh) that the kernel touches, by name.
LaunchPlan plan(const RailPlan& rail, const char* kernel, const Geometry& g, const CallOptions& call, LaunchShape shape,
                int ctas, int shared_bytes, std::initializer_list<std::string_view> tensors) {
  check(g);
  const Kernels& kernels = kernels_of(rail);
  if (is_nccl(rail)) {
    check_for_nccl(g);
    FASTFP8_CHECK_ARGUMENT(shape.ranks == 1, kOp, "ranks", "1, for NCCL has a GPU for each", shape.ranks);
  }
  FASTFP8_CHECK_ARGUMENT(shape.warps >= kFewestWarps && shape.warps <= kMostWarps, kOp, "warps",
                         "from " << kFewestWarps << " to " << kMostWarps, shape.warps);
  FASTFP8_CHECK_ARGUMENT(call.tokens >= 0 && call.tokens <= g.max_tokens, kOp, "tokens",
                         "at most max_tokens = " << g.max_tokens, call.tokens);
  LaunchPlan plan{};
  plan.module = kernels.module, plan.kernel = kernel;
  plan.grid = {ctas, shape.ranks, 1}, plan.block = {32 * shape.warps, 1, 1}, plan.cluster = {1, 1, 1};
  plan.shared_bytes = shared_bytes;
  plan.add_constants(Setup::of(g, call));
  for (const char* slot : {"windows", "state", "routing", "topk_idx", "topk_weights", "x", "x_scale", "recv",
                           "recv_scale", "offsets", "expert_out", "y", "row_values", "values"}) {
    const bool touched = std::find(tensors.begin(), tensors.end(), slot) != tensors.end();
    plan.add(TensorSlot{touched ? slot : nullptr});
  }
  if (!rail.constants.empty()) plan.add_constants(rail.constants.data(), rail.constants.size());
  if (rail.traced) plan.add(TensorSlot{"trace"});
  return plan;
}

// A word for each stream of each warp's share.
int shares_bytes(const Geometry& g, LaunchShape shape) { return 4 * shape.warps * g.ranks(); }

}  // namespace

void check(const Geometry& g) {
  const auto from_one = [](const char* name, int value, int64_t most) {
    FASTFP8_CHECK_ARGUMENT(value >= 1 && value <= most, kOp, name, "from 1 to " << most, value);
  };
  from_one("nodes", g.nodes, 1 << 15);
  from_one("ranks_per_node", g.gpus, 1 << (32 - kPositionBits - 1));
  from_one("channels", g.channels, 1 << 10);
  from_one("top_k", g.top_k, kMaxTopK);
  from_one("max_tokens", g.max_tokens, (1 << kPositionBits) - 1);
  from_one("capacity", g.capacity, kMostWords - 1);
  from_one("link_slots", g.link_slots, 1 << 15);
  from_one("rail_slots", g.rail_slots, 1 << 15);
  from_one("rail_chunk", g.rail_chunk, 1 << 15);
  FASTFP8_CHECK_ARGUMENT(g.hidden >= kBlock && g.hidden % kBlock == 0, kOp, "hidden", "a multiple of " << kBlock,
                         g.hidden);
  FASTFP8_CHECK_ARGUMENT(g.experts >= g.ranks() && g.experts % g.ranks() == 0, kOp, "num_experts",
                         "a multiple of the " << g.ranks() << " ranks", g.experts);
  // Tables are addressed by 32-bit words.
  const int64_t tokens = int64_t{g.channels} * g.channel_tokens();
  const int64_t words = tokens * (g.ranks() + int64_t{g.nodes} * (1 + g.most_gpus())) +
                        3 * int64_t{g.max_tokens} * g.top_k + 2 * int64_t{g.capacity} +
                        int64_t{g.channels} * (g.experts + 3 * int64_t{g.ranks()} + 2 * g.nodes);
  FASTFP8_CHECK_ARGUMENT(words < kMostWords, kOp, "max_tokens", "tables below 2^31 words", words << " words");
  const int64_t shared = 4 * int64_t{kMostWarps} * g.ranks();
  FASTFP8_CHECK_ARGUMENT(shared <= 227 * 1024, kOp, "ranks", "at most 3632", g.ranks());
}

void check_for_nccl(const Geometry& g) {
  const int64_t chunk = std::max(RingShape::of(g, RingKind::kDispatchRail).slot_bytes,
                                 RingShape::of(g, RingKind::kCombineRail).slot_bytes);
  FASTFP8_CHECK_ARGUMENT(chunk <= kMostBytesOfAPut, kOp, "rail_chunk", "chunks of at most 2^30 bytes, a put of NCCL's",
                         g.rail_chunk << " records, " << chunk << " bytes");
  const int64_t slots = int64_t{g.channels} * g.nodes * g.rail_slots;
  FASTFP8_CHECK_ARGUMENT(4 * slots + 2 * g.nodes < kMostWords, kOp, "rail_slots", "fewer than 2^31 signals",
                         g.rail_slots);
}

LaunchPlan plan_exchange(const Geometry& g, const CallOptions& call, LaunchShape shape, const RailPlan& rail) {
  return plan(rail, kernels_of(rail).exchange, g, call, shape, g.channels, 4 * (g.experts + g.ranks() + g.nodes),
              {"windows", "state", "routing", "topk_idx", "offsets"});
}

LaunchPlan plan_dispatch(const Geometry& g, const CallOptions& call, LaunchShape shape, Payload payload,
                         const RailPlan& rail) {
  const Kernels& kernels = kernels_of(rail);
  const char* const kernel = payload == Payload::kQuantize ? kernels.quantize
                             : payload == Payload::kScaled ? kernels.scaled
                                                           : kernels.plain;
  return plan(rail, kernel, g, call, shape, 2 * g.channels, shares_bytes(g, shape),
              {"windows", "state", "routing", "topk_idx", call.weighted ? "topk_weights" : "", "x",
               payload == Payload::kScaled ? "x_scale" : "", "recv", payload == Payload::kPlain ? "" : "recv_scale"});
}

LaunchPlan plan_combine(const Geometry& g, const CallOptions& call, LaunchShape shape, const RailPlan& rail) {
  return plan(rail, kernels_of(rail).combine, g, call, shape, 2 * g.channels, shares_bytes(g, shape),
              {"windows", "state", "routing", "topk_idx", call.sums ? "expert_out" : "", call.sums ? "y" : "",
               call.values ? "row_values" : "", call.values ? "values" : ""});
}

std::string name_of(Trouble trouble) {
  constexpr const char* kNames[] = {"none", "timeout", "overflow", "bad expert"};
  return kNames[static_cast<int>(trouble)];
}

std::string name_of(Role role) {
  constexpr const char* kNames[] = {"rail send", "rail forward", "link send", "link receive", "exchange"};
  return kNames[static_cast<int>(role)];
}

}  // namespace fastfp8::comm
