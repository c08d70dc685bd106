// Variables of a module: constants, initialised globals, pointers among them.

__constant__ float weights[4] = {0.5f, -1.25f, 3.0f, 1e-3f};
__constant__ unsigned char table[256] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ int counters[8] = {10, 20, 30};
__device__ double untouched[3];
__device__ int* second = &counters[2];
__device__ const char* words[] = {"warp", "block", "grid"};
struct Node {
  int value;
  const Node* next;
};
__device__ Node last = {13, nullptr};
__device__ Node middle = {11, &last};
__device__ Node chain[2] = {{7, &middle}, {5, &last}};

extern "C" __global__ void read_constants(const int* index, float* out) {
  out[threadIdx.x] = weights[index[threadIdx.x] % 4] * table[index[threadIdx.x]];
}

extern "C" __global__ void count_up(int* out) {
  atomicAdd(second, 1);
  __syncthreads();
  if (threadIdx.x < 8) out[threadIdx.x] = counters[threadIdx.x];
  if (threadIdx.x < 3) out[8 + threadIdx.x] = untouched[threadIdx.x] == 0.0;
}

extern "C" __global__ void follow(int* out) {
  int sum = 0;
  for (const Node* node = &chain[threadIdx.x]; node; node = node->next) sum = sum * 100 + node->value;
  out[threadIdx.x] = sum;
}

extern "C" __global__ void letters(char* out) {
  const char* word = words[threadIdx.x];
  for (int i = 0; i < 6; ++i) {
    out[6 * threadIdx.x + i] = *word;
    if (*word) ++word;
  }
}

struct Settings {
  char tag;
  double factor;
  short offsets[3];
  const float* source;
};

// A structure by value, read at an index known only when it runs.
extern "C" __global__ void settings(Settings s, float* out) {
  out[threadIdx.x] = s.source[threadIdx.x] * static_cast<float>(s.factor) + s.offsets[threadIdx.x % 3] + s.tag;
}
