// Copies that run beside the threads, and the barriers that tell of their end.
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cuda_pipeline.h>

// A barrier in shared memory has no initial value: init() gives it one.
#pragma nv_diag_suppress static_var_with_dynamic_init

#include <cuda/barrier>

namespace cg = cooperative_groups;
using Barrier = cuda::barrier<cuda::thread_scope_block>;

// Two stages of 16 bytes a thread: the next one flies while this one is added up.
extern "C" __global__ void pipeline(const int4* in, int* out, int stages) {
  __shared__ int4 buffer[2][64];
  const int i = threadIdx.x;
  __pipeline_memcpy_async(&buffer[0][i], &in[i], 16);
  __pipeline_commit();
  int sum = 0;
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) __pipeline_memcpy_async(&buffer[(stage + 1) % 2][i], &in[(stage + 1) * 64 + i], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    const int4 v = buffer[stage % 2][63 - i];
    sum += v.x + 2 * v.y + 3 * v.z + 4 * v.w;
    __syncthreads();
  }
  out[i] = sum;
}

// 4 and 8 bytes, and a tail of zeros.
extern "C" __global__ void narrow_copies(const int* in, int* out) {
  __shared__ int buffer[96];
  const int i = threadIdx.x;
  __pipeline_memcpy_async(&buffer[i], &in[i], 4);
  if (i < 16) __pipeline_memcpy_async(&buffer[32 + 2 * i], &in[32 + 2 * i], 8);
  if (i < 8) __pipeline_memcpy_async(&buffer[64 + 4 * i], &in[64 + 4 * i], 16, 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  for (int k = 0; k < 3; ++k) out[32 * k + i] = buffer[32 * k + 31 - i];
}

extern "C" __global__ void group_copy(const float* in, float* out) {
  __shared__ float buffer[256];
  cg::thread_block block = cg::this_thread_block();
  cg::memcpy_async(block, buffer, in, sizeof(buffer));
  cg::wait(block);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) out[i] = buffer[255 - i];
}

// cuda::memcpy_async on a cuda::barrier; a bulk copy where alignment is known.
extern "C" __global__ void barrier_copy(const int* in, int* out, int rounds) {
  __shared__ alignas(16) int buffer[128];
  __shared__ Barrier barrier;
  if (threadIdx.x == 0) init(&barrier, blockDim.x);
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    cuda::memcpy_async(cg::this_thread_block(), buffer, in + 128 * round, cuda::aligned_size_t<16>(sizeof(buffer)),
                       barrier);
    barrier.arrive_and_wait();
    sum = sum * 3 + buffer[127 - threadIdx.x];
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Producers and consumers of one block; tokens of arrivals.
extern "C" __global__ void hand_over(int* out, int rounds) {
  __shared__ int slot[32];
  __shared__ Barrier full, empty;
  if (threadIdx.x == 0) init(&full, blockDim.x), init(&empty, blockDim.x);
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 32) {
      slot[threadIdx.x] = round * 100 + threadIdx.x;
      (void)full.arrive();
      empty.arrive_and_wait();
    } else {
      full.arrive_and_wait();
      sum += slot[63 - threadIdx.x];
      (void)empty.arrive();
    }
  }
  if (threadIdx.x >= 32) out[threadIdx.x - 32] = sum;
}
