// What the kernels of NCCL's rail are given besides a Setup: made by nccl.cpp, read by rail_nccl.cuh. Only where NCCL's
// headers are: the structures are theirs, and of one version of NCCL.
#pragma once
#include <nccl.h>
#include <nccl_device.h>

#include "layout.h"

namespace fastfp8::comm {

struct NcclConstants {
  SignalLayout signals;
  ncclWindow_t window;  // all ranks' windows, under one handle
  ncclDevComm network;
};

}  // namespace fastfp8::comm
