// Of comm_loopback.cu: they write down what their warps do.
#include "../kernels/comm_sm90.cuh"

using namespace fastfp8::comm;

FASTFP8_COMM_TRACED_KERNEL(comm_exchange_traced, 512, kExchange, exchange<LoopbackRail>)
FASTFP8_COMM_TRACED_KERNEL(comm_dispatch_quantize_traced, 512, kDispatch, dispatch<Payload::kQuantize, LoopbackRail>)
FASTFP8_COMM_TRACED_KERNEL(comm_dispatch_scaled_traced, 512, kDispatch, dispatch<Payload::kScaled, LoopbackRail>)
FASTFP8_COMM_TRACED_KERNEL(comm_dispatch_plain_traced, 512, kDispatch, dispatch<Payload::kPlain, LoopbackRail>)
FASTFP8_COMM_TRACED_KERNEL(comm_combine_traced, 512, kCombine, combine<LoopbackRail>)
