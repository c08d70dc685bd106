#include "../kernels/comm_sm90.cuh"

using namespace fastfp8::comm;

FASTFP8_COMM_KERNEL(comm_exchange_loopback, 512, exchange<LoopbackRail>)
FASTFP8_COMM_KERNEL(comm_dispatch_quantize_loopback, 512, dispatch<Payload::kQuantize, LoopbackRail>)
FASTFP8_COMM_KERNEL(comm_dispatch_scaled_loopback, 512, dispatch<Payload::kScaled, LoopbackRail>)
FASTFP8_COMM_KERNEL(comm_dispatch_plain_loopback, 512, dispatch<Payload::kPlain, LoopbackRail>)
FASTFP8_COMM_KERNEL(comm_combine_loopback, 512, combine<LoopbackRail>)
