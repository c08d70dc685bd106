// The extents of a tensor of counters (fastfp8/counters.py): int64 [kCounterLanes, kCounterFields].
#pragma once

namespace fastfp8 {

constexpr int kCounterLanes = 32, kCounterFields = 5;

}  // namespace fastfp8
