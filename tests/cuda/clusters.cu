// Clusters of blocks and their distributed shared memory.
#include <cooperative_groups.h>

namespace cg = cooperative_groups;

// A histogram spread over the shared memory of a cluster.
extern "C" __global__ void histogram(const int* in, int n, int bins, int* out) {
  extern __shared__ int mine[];
  cg::cluster_group cluster = cg::this_cluster();
  const int each = bins / static_cast<int>(cluster.num_blocks());
  for (int i = threadIdx.x; i < each; i += blockDim.x) mine[i] = 0;
  cluster.sync();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    int* theirs = cluster.map_shared_rank(mine, in[i] / each);
    atomicAdd(theirs + in[i] % each, 1);
  }
  cluster.sync();
  int* whole = out + each * static_cast<int>(cluster.block_rank());
  for (int i = threadIdx.x; i < each; i += blockDim.x) atomicAdd(&whole[i], mine[i]);
}

// Each block reads its neighbour's value, and says which block of which cluster it is.
extern "C" __global__ void __cluster_dims__(4, 1, 1) ring(int* out) {
  __shared__ int value;
  cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0) value = 100 + blockIdx.x;
  cluster.sync();
  const int rank = cluster.block_rank();
  if (threadIdx.x == 0) out[blockIdx.x] = *cluster.map_shared_rank(&value, (rank + 1) % 4);
  if (threadIdx.x == 1) out[gridDim.x + blockIdx.x] = cluster.query_shared_rank(cluster.map_shared_rank(&value, 3));
  cluster.sync();
}

// Tiles and their collectives; partitions of a warp.
extern "C" __global__ void groups(const int* in, int* out) {
  cg::thread_block block = cg::this_thread_block();
  cg::thread_block_tile<8> tile = cg::tiled_partition<8>(block);
  int sum = in[block.thread_rank()];
  for (int offset = 4; offset; offset /= 2) sum += tile.shfl_xor(sum, offset);
  int count = 0;
  if (in[block.thread_rank()] % 3 == 0) count = cg::coalesced_threads().size();
  block.sync();
  out[block.thread_rank()] = sum;
  out[blockDim.x + block.thread_rank()] = count;
}
