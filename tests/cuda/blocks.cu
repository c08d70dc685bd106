// Shared memory, barriers and what the lanes of a warp tell each other.

extern "C" __global__ void transpose(const float* in, float* out, int rows, int cols) {
  __shared__ float tile[32][33];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) {
    if (x < cols && y + j < rows) tile[threadIdx.y + j][threadIdx.x] = in[(y + j) * cols + x];
  }
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x, y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) {
    if (x < rows && y + j < cols) out[(y + j) * rows + x] = tile[threadIdx.x][threadIdx.y + j];
  }
}

extern "C" __global__ void block_sum(const int* in, int* out, int n) {
  __shared__ int partial[32];
  int sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
  for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Static and dynamic shared memory side by side: a reversal in two steps.
extern "C" __global__ void reverse(const double* in, double* out) {
  extern __shared__ double whole[];
  __shared__ double half[64];
  const int i = threadIdx.x, n = blockDim.x;
  whole[i] = in[i];
  if (i < 64) half[i] = in[n - 1 - i];
  __syncthreads();
  out[i] = i < 64 ? half[i] : whole[n - 1 - i];
}

// Results of lane l for question q in out[32 * q + l].
extern "C" __global__ void warp_questions(const int* in, unsigned* out) {
  const int lane = threadIdx.x, v = in[lane];
  const unsigned all = 0xffffffff;
  int same = 0;
  const unsigned answers[] = {
      __ballot_sync(all, v & 1),
      static_cast<unsigned>(__any_sync(all, v == 7)),
      static_cast<unsigned>(__all_sync(all, v >= 0)),
      __match_any_sync(all, v),
      __match_all_sync(all, v / 64, &same),
      static_cast<unsigned>(same),
      __reduce_add_sync(all, static_cast<unsigned>(v)),
      static_cast<unsigned>(__reduce_min_sync(all, v - 8)),
      __reduce_max_sync(all, static_cast<unsigned>(v - 8)),
      __reduce_and_sync(all, static_cast<unsigned>(v) | 2u),
      __reduce_or_sync(all, static_cast<unsigned>(v)),
      __reduce_xor_sync(all, static_cast<unsigned>(v)),
      static_cast<unsigned>(__shfl_sync(all, v, lane * 5, 8)),
      static_cast<unsigned>(__shfl_up_sync(all, v, 3, 16)),
      static_cast<unsigned>(__shfl_down_sync(all, v, 2, 4)),
  };
  for (int q = 0; q < 15; ++q) out[32 * q + lane] = answers[q];
  // Only some lanes take part.
  unsigned odd = 0, active = 0;
  long long wide = 0;
  if (lane % 2) {
    odd = __ballot_sync(0xaaaaaaaa, v & 2);
    active = __activemask();
    wide = __shfl_xor_sync(0xaaaaaaaa, static_cast<long long>(v) << 33, 2);
  }
  out[32 * 15 + lane] = odd;
  out[32 * 16 + lane] = (active & ~0xaaaaaaaau) == 0 && (lane % 2 == 0 || active >> lane & 1);
  out[32 * 17 + lane] = static_cast<unsigned>(wide >> 32);
}

extern "C" __global__ void barrier_counts(const int* in, int* out) {
  const int v = in[threadIdx.x];
  out[threadIdx.x] = __syncthreads_count(v & 1);
  out[blockDim.x + threadIdx.x] = __syncthreads_and(v < 100);
  out[2 * blockDim.x + threadIdx.x] = __syncthreads_or(v == 3);
}

extern "C" __global__ void indices(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  unsigned* mine = out + 4 * (block * threads + thread);
  mine[0] = blockIdx.x << 16 | blockIdx.y << 8 | blockIdx.z;
  mine[1] = threadIdx.x << 16 | threadIdx.y << 8 | threadIdx.z;
  mine[2] = gridDim.x << 16 | gridDim.y << 8 | gridDim.z;
  mine[3] = blockDim.x << 16 | blockDim.y << 8 | blockDim.z;
}
