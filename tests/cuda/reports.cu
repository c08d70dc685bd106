// What a kernel tells the host beside its results: failures, text, clocks.
#include <cassert>
#include <cstdio>

extern "C" __global__ void check_positive(const int* x) { assert(x[threadIdx.x] > 0 && "every element"); }

extern "C" __global__ void trap_on_zero(const int* x) {
  if (x[threadIdx.x] == 0) __trap();
}

extern "C" __global__ void print(const int* x, const char* name) {
  if (threadIdx.x == 2)
    printf("%s: %d of %u, %5.2f %c%% %lld %#x\n", name, x[2], blockDim.x, x[2] / 4.0, 'z', -5ll, 255);
}

extern "C" __global__ void print_each(int* returned) { returned[threadIdx.x] = printf("thread %d\n", threadIdx.x); }

extern "C" __global__ void clocks(long long* out) {
  const long long start = clock64();
  const int low = clock();
  unsigned long long time, later;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  __nanosleep(100);
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(later));
  out[0] = clock64() - start;
  out[1] = clock() - low;
  out[2] = static_cast<long long>(later - time);
}
