// Jumps, calls, local memory, divergence.

struct Pair {
  int first;
  long long second;
  float third[3];
};

// Dense cases that do different things, so that nvcc makes a jump table.
extern "C" __global__ void jump_table(const int* x, unsigned* out) {
  const unsigned i = threadIdx.x;
  unsigned v = i;
#pragma unroll 1
  for (int step = 0; step < 4; ++step) {
    switch (x[4 * i + step]) {
      case 0:
        v = v * 3 + out[i];
        break;
      case 1:
        v = ~v;
        out[i] += 1;
        break;
      case 2:
        while (v > 100) v /= 2;
        break;
      case 3:
        out[i] ^= v;
        break;
      case 4:
        v = __popc(v) + (v << 3);
        break;
      case 5:
        for (unsigned k = 0; k < i % 5; ++k) v = v * v + k;
        break;
      case 6:
        out[i] = v;
        v = 0;
        break;
      case 7:
        v += 7;  // falls through
      case 8:
        v ^= 0x55;
        break;
      default:
        v = v / 3 + 1;
    }
  }
  out[i] += v;
}

__device__ __noinline__ Pair rotate(Pair p, int by) {
  Pair q;
  q.first = static_cast<int>(p.second) + by;
  q.second = static_cast<long long>(p.first) << 32;
  for (int k = 0; k < 3; ++k) q.third[k] = p.third[(k + by) % 3];
  return q;
}

extern "C" __global__ void structs(Pair start, const int* by, Pair* out) {
  Pair p = start;
  p.first += threadIdx.x;
  out[threadIdx.x] = rotate(p, by[threadIdx.x]);
}

__device__ __noinline__ unsigned ackermann(unsigned m, unsigned n) {
  if (m == 0) return n + 1;
  if (n == 0) return ackermann(m - 1, 1);
  return ackermann(m - 1, ackermann(m, n - 1));
}

extern "C" __global__ void recursion(const unsigned* m, unsigned* out) {
  out[threadIdx.x] = ackermann(m[threadIdx.x], threadIdx.x % 4);
}

__device__ __noinline__ float twice(float x) { return x + x; }
__device__ __noinline__ float square(float x) { return x * x; }
__device__ __noinline__ float negative(float x) { return -x; }
__device__ float (*const kOperations[])(float) = {twice, square, negative};

// Lanes of a warp call different functions.
extern "C" __global__ void function_pointers(const int* which, const float* x, float* out) {
  out[threadIdx.x] = kOperations[which[threadIdx.x]](x[threadIdx.x]);
}

struct Shape {
  __device__ virtual int corners() const { return 0; }
  int size;
};
struct Triangle : Shape {
  __device__ int corners() const override { return 3 * size; }
};
struct Square : Shape {
  __device__ int corners() const override { return 4 * size; }
};

extern "C" __global__ void virtual_functions(const int* which, int* out) {
  Triangle triangle;
  Square square;
  triangle.size = threadIdx.x, square.size = threadIdx.x + 100;
  const Shape* shape = which[threadIdx.x] ? static_cast<const Shape*>(&triangle) : &square;
  out[threadIdx.x] = shape->corners();
}

// A stack in local memory with an index known only when it runs.
extern "C" __global__ void local_array(const int* order, const int* x, unsigned* out) {
  int values[16];
  for (int k = 0; k < 16; ++k) values[k] = k * 100 + threadIdx.x;
  for (int k = 0; k < 16; ++k) values[order[(k + threadIdx.x) % 16]] += x[k];
  unsigned sum = 0;
  for (int k = 0; k < 16; ++k) sum = sum * 31 + values[order[k]];
  out[threadIdx.x] = sum;
}

// Each lane runs its own number of rounds with an own path; then the warp meets again.
extern "C" __global__ void divergence(int* rounds, unsigned* met) {
  unsigned n = threadIdx.x * 2654435761u % 97 + 1;
  int count = 0;
  while (n != 1) {
    n = n & 1 ? 3 * n + 1 : n / 2;
    if (++count > 200) break;
  }
  rounds[threadIdx.x] = count;
  __syncwarp();
  met[threadIdx.x] = __ballot_sync(0xffffffff, count & 1);
}

// Both halves of a warp wait for each other's flag inside of a branch: needs independent progress of lanes.
extern "C" __global__ void lanes_wait_for_lanes(int* out) {
  __shared__ volatile int flags[2];
  if (threadIdx.x < 2) flags[threadIdx.x] = 0;
  __syncwarp();
  if (threadIdx.x < 16) {
    if (threadIdx.x == 0) flags[0] = 1;
    while (flags[1] == 0) {
    }
  } else {
    while (flags[0] == 0) {
    }
    if (threadIdx.x == 16) flags[1] = 2;
  }
  __syncwarp();
  out[threadIdx.x] = flags[0] + flags[1];
}
