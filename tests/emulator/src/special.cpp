#include "special.h"

#include "machine.h"

namespace emulator {
namespace {

using Value = uint64_t (*)(Context&, int);

uint32_t thread_of(const Context& c, int lane) { return c.warp.index * kLanes + lane; }

// Clocks run by one tick an instruction and differ from SM to SM.
uint64_t clock(const Context& c) { return c.machine.ticks + c.cta.uid * 1013; }

template <int I>
constexpr Value kTid = [](Context& c, int lane) -> uint64_t {
  const uint32_t thread = thread_of(c, lane);
  const auto& block = c.grid.block;
  return I == 0 ? thread % block[0] : I == 1 ? thread / block[0] % block[1] : thread / block[0] / block[1];
};
template <int I>
constexpr Value kNtid = [](Context& c, int) -> uint64_t { return c.grid.block[I]; };
template <int I>
constexpr Value kCtaid = [](Context& c, int) -> uint64_t { return c.cta.id[I]; };
template <int I>
constexpr Value kNctaid = [](Context& c, int) -> uint64_t { return c.grid.grid[I]; };
template <int I>
constexpr Value kClusterCtaid = [](Context& c, int) -> uint64_t { return c.cta.id[I] % c.grid.cluster[I]; };
template <int I>
constexpr Value kClusterNctaid = [](Context& c, int) -> uint64_t { return c.grid.cluster[I]; };
template <int I>
constexpr Value kClusterid = [](Context& c, int) -> uint64_t { return c.cta.id[I] / c.grid.cluster[I]; };
template <int I>
constexpr Value kNclusterid = [](Context& c, int) -> uint64_t { return c.grid.grid[I] / c.grid.cluster[I]; };

constexpr struct {
  const char* name;
  Value value;
} kSpecials[] = {
    {"%tid.x", kTid<0>},
    {"%tid.y", kTid<1>},
    {"%tid.z", kTid<2>},
    {"%ntid.x", kNtid<0>},
    {"%ntid.y", kNtid<1>},
    {"%ntid.z", kNtid<2>},
    {"%ctaid.x", kCtaid<0>},
    {"%ctaid.y", kCtaid<1>},
    {"%ctaid.z", kCtaid<2>},
    {"%nctaid.x", kNctaid<0>},
    {"%nctaid.y", kNctaid<1>},
    {"%nctaid.z", kNctaid<2>},
    {"%cluster_ctaid.x", kClusterCtaid<0>},
    {"%cluster_ctaid.y", kClusterCtaid<1>},
    {"%cluster_ctaid.z", kClusterCtaid<2>},
    {"%cluster_nctaid.x", kClusterNctaid<0>},
    {"%cluster_nctaid.y", kClusterNctaid<1>},
    {"%cluster_nctaid.z", kClusterNctaid<2>},
    {"%clusterid.x", kClusterid<0>},
    {"%clusterid.y", kClusterid<1>},
    {"%clusterid.z", kClusterid<2>},
    {"%nclusterid.x", kNclusterid<0>},
    {"%nclusterid.y", kNclusterid<1>},
    {"%nclusterid.z", kNclusterid<2>},
    {"%cluster_ctarank", [](Context& c, int) -> uint64_t { return c.cta.cluster_rank; }},
    {"%cluster_nctarank", [](Context& c, int) -> uint64_t { return c.cta.cluster.size(); }},
    {"%is_explicit_cluster", [](Context& c, int) -> uint64_t { return c.cta.cluster.size() > 1; }},
    {"%laneid", [](Context&, int lane) -> uint64_t { return lane; }},
    {"%warpid", [](Context& c, int) -> uint64_t { return c.warp.index; }},
    {"%nwarpid", [](Context&, int) -> uint64_t { return 64; }},
    {"%smid", [](Context& c, int) -> uint64_t { return c.cta.uid % 132; }},
    {"%nsmid", [](Context&, int) -> uint64_t { return 132; }},
    {"%gridid", [](Context&, int) -> uint64_t { return 1; }},
    {"%lanemask_eq", [](Context&, int lane) -> uint64_t { return 1u << lane; }},
    {"%lanemask_lt", [](Context&, int lane) -> uint64_t { return (1u << lane) - 1; }},
    {"%lanemask_le", [](Context&, int lane) -> uint64_t { return (2ull << lane) - 1; }},
    {"%lanemask_gt", [](Context&, int lane) -> uint64_t { return ~((2ull << lane) - 1) & kAllLanes; }},
    {"%lanemask_ge", [](Context&, int lane) -> uint64_t { return ~((1ull << lane) - 1) & kAllLanes; }},
    {"%clock", [](Context& c, int) -> uint64_t { return clock(c) & 0xffffffff; }},
    {"%clock_hi", [](Context& c, int) -> uint64_t { return clock(c) >> 32; }},
    {"%clock64", [](Context& c, int) -> uint64_t { return clock(c); }},
    {"%globaltimer", [](Context& c, int) -> uint64_t { return c.machine.ticks; }},
    {"%globaltimer_lo", [](Context& c, int) -> uint64_t { return c.machine.ticks & 0xffffffff; }},
    {"%globaltimer_hi", [](Context& c, int) -> uint64_t { return c.machine.ticks >> 32; }},
    {"%dynamic_smem_size", [](Context& c, int) -> uint64_t { return c.grid.shared_bytes; }},
    {"%total_smem_size", [](Context& c, int) -> uint64_t { return c.cta.shared.size(); }},
    {"%aggr_smem_size", [](Context& c, int) -> uint64_t { return c.cta.shared.size() + kSharedBase; }},
};

}  // namespace

int special_index(const std::string& name) {
  for (size_t i = 0; i < std::size(kSpecials); ++i)
    if (name == kSpecials[i].name) return static_cast<int>(i);
  return -1;
}

uint64_t special_value(int index, Context& context, int lane) { return kSpecials[index].value(context, lane); }

}  // namespace emulator
