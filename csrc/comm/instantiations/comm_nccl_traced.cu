// Of comm_nccl.cu: they write down what their warps do. Built only where that is.
#include "../kernels/comm_sm90.cuh"
#include "../kernels/rail_nccl.cuh"

using namespace fastfp8::comm;

#define FASTFP8_COMM_NCCL_TRACED_KERNEL(NAME, MOST_THREADS, CALL, ...)                                  \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)                                         \
      NAME(FASTFP8_COMM_PARAMETERS, const __grid_constant__ NcclConstants constants, uint32_t* trace) { \
    FASTFP8_COMM_CONTEXT                                                                                \
    const WarpTrace traced(context, TracedCall::CALL, trace);                                           \
    __VA_ARGS__(context, NcclRail{context, constants}, traced, shared);                                 \
  }

FASTFP8_COMM_NCCL_TRACED_KERNEL(comm_exchange_nccl_traced, 512, kExchange, exchange<NcclRail>)
FASTFP8_COMM_NCCL_TRACED_KERNEL(comm_dispatch_quantize_nccl_traced, 512, kDispatch,
                                dispatch<Payload::kQuantize, NcclRail>)
FASTFP8_COMM_NCCL_TRACED_KERNEL(comm_dispatch_scaled_nccl_traced, 512, kDispatch, dispatch<Payload::kScaled, NcclRail>)
FASTFP8_COMM_NCCL_TRACED_KERNEL(comm_dispatch_plain_nccl_traced, 512, kDispatch, dispatch<Payload::kPlain, NcclRail>)
FASTFP8_COMM_NCCL_TRACED_KERNEL(comm_combine_nccl_traced, 512, kCombine, combine<NcclRail>)
