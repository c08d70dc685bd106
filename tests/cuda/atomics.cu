// Atomics, locks and flags between threads, blocks and grids.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/atomic>

template <class Word>
__device__ void all_operations(Word* words, Word v) {
  atomicAdd(&words[0], v);
  atomicSub(&words[1], v);
  atomicMin(&words[2], v);
  atomicMax(&words[3], v);
  atomicAnd(&words[4], ~(Word{1} << v % 32));
  atomicOr(&words[5], Word{1} << v % 32);
  atomicXor(&words[6], v * 0x9e3779b1u);
}

// words: 9 of global memory and, behind them, what the same operations made of shared memory.
extern "C" __global__ void atomics_u32(unsigned* words) {
  __shared__ unsigned local[9];
  if (threadIdx.x < 9) local[threadIdx.x] = words[9 + threadIdx.x];
  __syncthreads();
  const unsigned v = blockIdx.x * blockDim.x + threadIdx.x;
  all_operations(words, v);
  atomicInc(&words[7], 6);
  atomicDec(&words[8], 10);
  all_operations(local, v);
  atomicInc(&local[7], 6);
  atomicDec_block(&local[8], 10);
  __syncthreads();
  if (threadIdx.x < 9) words[9 + threadIdx.x] = local[threadIdx.x];
}

extern "C" __global__ void atomics_s32(int* words) {
  const int v = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) - 100;
  atomicMin(&words[0], v);
  atomicMax(&words[1], v);
  atomicAdd_system(&words[2], v);
}

extern "C" __global__ void atomics_u64(unsigned long long* words) {
  const unsigned long long v = blockIdx.x * blockDim.x + threadIdx.x + (1ull << 40);
  atomicAdd(&words[0], v);
  atomicMin(&words[1], v);
  atomicMax(&words[2], v);
  atomicAnd(&words[3], ~(1ull << v % 64));
  atomicOr(&words[4], 1ull << v % 64);
  atomicXor(&words[5], v * 0x9e3779b97f4a7c15u);
  atomicExch(&words[6], v);
}

// Old values: every ticket is handed out once, and what was exchanged comes out again.
extern "C" __global__ void old_values(unsigned* counter, unsigned* slot, unsigned* tickets, unsigned* swapped) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  tickets[i] = atomicAdd(counter, 1);
  swapped[i] = atomicExch(slot, i);
}

extern "C" __global__ void atomics_float(float* f, double* d, __half2* h, __nv_bfloat162* b, __half* h1,
                                         __nv_bfloat16* b1) {
  __shared__ float local;
  __shared__ double local_double;
  if (threadIdx.x == 0) local = 0, local_double = 0;
  __syncthreads();
  const int v = threadIdx.x % 4;
  atomicAdd(f, static_cast<float>(v));
  atomicAdd(d, v + 0.5);
  atomicAdd(h, __floats2half2_rn(v, -v));
  atomicAdd(b, __floats2bfloat162_rn(1, v % 2));
  atomicAdd(h1, __float2half(0.5f));
  atomicAdd(b1, __float2bfloat16(1.0f));
  atomicAdd(&local, static_cast<float>(v));
  atomicAdd(&local_double, 0.25 * v);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(f + 1, local), atomicAdd(d + 1, local_double);
}

// A maximum of floats by compare-and-swap.
extern "C" __global__ void cas_maximum(const float* x, unsigned* highest) {
  const float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  unsigned seen = *reinterpret_cast<volatile unsigned*>(highest);
  while (v > __uint_as_float(seen)) {
    const unsigned before = atomicCAS(highest, seen, __float_as_uint(v));
    if (before == seen) break;
    seen = before;
  }
}

extern "C" __global__ void cas_widths(unsigned short* halves, unsigned long long* words) {
  for (bool done = false; !done;) {
    const unsigned short seen = *const_cast<volatile unsigned short*>(halves);
    done = atomicCAS(halves, seen, static_cast<unsigned short>(seen + 3)) == seen;
  }
  for (bool done = false; !done;) {
    const unsigned long long seen = *const_cast<volatile unsigned long long*>(words);
    done = atomicCAS(words, seen, seen + (1ull << 33)) == seen;
  }
}

struct Lock {
  unsigned next, serving;
};

// A fair lock: what it guards is read and written by plain accesses.
extern "C" __global__ void ticket_lock(Lock* lock, int* total, int* order) {
  if (threadIdx.x) return;
  const unsigned mine = atomicAdd(&lock->next, 1);
  while (*const_cast<volatile unsigned*>(&lock->serving) != mine) __nanosleep(20);
  __threadfence();
  order[mine] = blockIdx.x;
  *total = *total * 2 + 1;
  __threadfence();
  atomicAdd(&lock->serving, 1);
}

// Block 0 makes the data, the others wait for its flag.
extern "C" __global__ void flag(int* data, int* ready, int* out) {
  const int i = threadIdx.x, n = blockDim.x;
  if (blockIdx.x == 0) {
    data[i] = i * i + 1;
    __threadfence();
    __syncthreads();
    if (i == 0) *const_cast<volatile int*>(ready) = 1;
    return;
  }
  if (i == 0) {
    while (*const_cast<volatile int*>(ready) == 0) {
    }
    __threadfence();
  }
  __syncthreads();
  out[(blockIdx.x - 1) * n + i] = *const_cast<volatile int*>(&data[n - 1 - i]);
}

// As above with the C++ memory model, and a message to and fro.
extern "C" __global__ void ping_pong(int* data, int* turn, int rounds) {
  if (threadIdx.x) return;
  cuda::atomic_ref<int, cuda::thread_scope_device> whose(*turn);
  for (int round = 0; round < rounds; ++round) {
    while (whose.load(cuda::memory_order_acquire) != static_cast<int>(blockIdx.x)) {
    }
    data[0] = data[0] * 3 + static_cast<int>(blockIdx.x) + 1;
    whose.store(1 - static_cast<int>(blockIdx.x), cuda::memory_order_release);
  }
}

// Every memory order that C++ has, by adding up.
extern "C" __global__ void memory_orders(unsigned* words) {
  cuda::atomic_ref<unsigned, cuda::thread_scope_block> block(words[0]);
  cuda::atomic_ref<unsigned, cuda::thread_scope_device> device(words[1]);
  cuda::atomic_ref<unsigned, cuda::thread_scope_system> system(words[2]);
  block.fetch_add(1, cuda::memory_order_relaxed);
  device.fetch_add(1, cuda::memory_order_acq_rel);
  system.fetch_add(1, cuda::memory_order_seq_cst);
  unsigned seen = device.load(cuda::memory_order_seq_cst);
  cuda::atomic_ref<unsigned, cuda::thread_scope_device> exchanged(words[3]);
  seen = exchanged.load(cuda::memory_order_relaxed);
  while (!exchanged.compare_exchange_weak(seen, seen + 2, cuda::memory_order_release, cuda::memory_order_relaxed)) {
  }
  cuda::atomic_thread_fence(cuda::memory_order_seq_cst, cuda::thread_scope_device);
}

// The block that comes last adds up what all of them left.
extern "C" __global__ void last_block(const int* in, int* partial, unsigned* finished, int* out) {
  __shared__ bool last;
  const int sum = __reduce_add_sync(0xffffffff, in[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  int total = 0;
  for (int i = threadIdx.x; i < gridDim.x; i += 32) total += *const_cast<volatile int*>(&partial[i]);
  total = __reduce_add_sync(0xffffffff, total);
  if (threadIdx.x == 0) *out = total;
}
