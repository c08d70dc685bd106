// Prints the signal of each flag that a rail sets, in any geometry: "flag signal", then "count signals". Flags are
// found as the rings' ends find them (csrc/comm/kernels/rings.cuh). For tests/test_comm_nccl.py.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../csrc/comm/layout.h"

using namespace fastfp8::comm;

int main(int, char** arguments) {
  const auto number = [&](int i) { return std::atoi(arguments[i]); };
  const Geometry g{number(1), number(2), number(3), number(1) * number(2) * 2, 2, 256, 8, 32, 2, number(4), 2};
  const WindowLayout window = WindowLayout::of(g);
  const SignalLayout signals = SignalLayout::of(g);
  const auto print = [&](int64_t flag) {
    std::printf("%lld %d %d\n", static_cast<long long>(flag), signals.of_flag(flag), signals.is_mail(flag));
  };
  for (RingKind kind : {RingKind::kDispatchRail, RingKind::kCombineRail}) {
    const RingShape shape = RingShape::of(g, kind);
    const WindowLayout::Ring& ring = window.rings[static_cast<int>(kind)];
    for (int stream = 0; stream < shape.streams; ++stream) {
      for (int slot = 0; slot < shape.slots; ++slot) {
        print(ring.filled + (int64_t{stream} * shape.slots + slot) * 4);
        print(ring.consumed + (int64_t{stream} * shape.slots + slot) * 4);
      }
    }
  }
  for (int parity = 0; parity < 2; ++parity) {
    for (int node = 0; node < g.nodes; ++node) print(window.mail_flags + 4 * (int64_t{parity} * g.nodes + node));
  }
  std::printf("count %d\n", signals.count);
  return 0;
}
