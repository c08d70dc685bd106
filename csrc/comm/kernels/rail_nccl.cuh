// The rails over the network, by NCCL's device API (GIN): puts from window to window, and signals that count.
//
// Untested on silicon: it compiles, no machine has run it. The emulator cannot: GIN talks to a network card.
//
// Only what each back end of NCCL has is used: put and signal with an indexed weak signal, readSignal, flush. A weak
// signal says that its own put has arrived and nothing of others: enough, for each slot of a ring has a signal of its
// own, and a chunk is one put (plan.cpp keeps it below the size at which NCCL would make two of it).
#pragma once
#include "../nccl_constants.h"
#include "context.cuh"

namespace fastfp8::comm {

struct NcclRail {
  const Context& c;
  const NcclConstants& constants;

  // By a warp, as LoopbackRail::put; `value` is what the signal will have come to.
  //
  // The lanes have written the source with plain stores. put() begins with __syncwarp, by which lane 0 sees them all,
  // and releases them by the scope asked for, unless one says that it has been done; device scope, for the network card
  // reads this GPU's memory through the same L2. (Back ends that write descriptors to host memory go beyond that by
  // themselves.) It ends with __syncwarp too. What it waits for is a place in NCCL's queue, without our time limit.
  __device__ void put(int peer, int64_t to, int64_t from, int64_t bytes, int64_t flag, uint32_t) const {
    gin(flag).put(ncclTeamRail(constants.network), peer / c.g.gpus, constants.window, to, constants.window, from, bytes,
                  ncclGin_WeakSignalInc{signal_of(flag)}, ncclGin_None{}, ncclCoopWarp{}, ncclGin_None{},
                  cuda::thread_scope_thread, cuda::thread_scope_device);
  }

  // By a warp, as LoopbackRail::signal. The same release, so that nothing comes into a slot that a lane still reads:
  // the answer to this signal is a put to this GPU's memory.
  __device__ void signal(int peer, int64_t flag, uint32_t) const {
    gin(flag).signal(ncclTeamRail(constants.network), peer / c.g.gpus, ncclGin_WeakSignalInc{signal_of(flag)},
                     ncclCoopWarp{}, ncclGin_None{}, cuda::thread_scope_thread, cuda::thread_scope_device);
  }

  // By a lane, as LoopbackRail::poll. An acquiring load of system scope, which is NCCL's default: what came before the
  // signal is what the network card wrote.
  __device__ uint32_t poll(int64_t flag) const {
    return static_cast<uint32_t>(gin(flag).readSignal(signal_of(flag), kTurnBits, cuda::memory_order_acquire));
  }

  // By a warp: until what this channel has put needs its source no more. Rings do without: a slot that its reader has
  // released has been read from its stage.
  __device__ void flush() const { channel_gin(c.channel).flush(ncclCoopWarp{}); }

 private:
  __device__ ncclGinSignal_t signal_of(int64_t flag) const { return constants.signals.of_flag(flag); }

  // Signals are of one context of the network: both ends must take the same, so the exchange's, which any CTA may run,
  // has the first. CTAs share the others, a channel's in turn.
  __device__ ncclGin gin(int64_t flag) const { return channel_gin(constants.signals.is_mail(flag) ? 0 : c.channel); }
  __device__ ncclGin channel_gin(int channel) const {
    return ncclGin(constants.network, channel % static_cast<int>(constants.network.ginContextCount));
  }
};

}  // namespace fastfp8::comm
