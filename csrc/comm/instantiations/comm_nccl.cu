// Built only where NCCL's headers are found (build_support/build_kernels.py).
#include "../kernels/comm_sm90.cuh"
#include "../kernels/rail_nccl.cuh"

using namespace fastfp8::comm;

#define FASTFP8_COMM_NCCL_KERNEL(NAME, MOST_THREADS, ...)                              \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)                        \
      NAME(FASTFP8_COMM_PARAMETERS, const __grid_constant__ NcclConstants constants) { \
    FASTFP8_COMM_CONTEXT                                                               \
    __VA_ARGS__(context, NcclRail{context, constants}, NoTrace{}, shared);             \
  }

FASTFP8_COMM_NCCL_KERNEL(comm_exchange_nccl, 512, exchange<NcclRail>)
FASTFP8_COMM_NCCL_KERNEL(comm_dispatch_quantize_nccl, 512, dispatch<Payload::kQuantize, NcclRail>)
FASTFP8_COMM_NCCL_KERNEL(comm_dispatch_scaled_nccl, 512, dispatch<Payload::kScaled, NcclRail>)
FASTFP8_COMM_NCCL_KERNEL(comm_dispatch_plain_nccl, 512, dispatch<Payload::kPlain, NcclRail>)
FASTFP8_COMM_NCCL_KERNEL(comm_combine_nccl, 512, combine<NcclRail>)
