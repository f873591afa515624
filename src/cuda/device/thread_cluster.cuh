// Thread-block clusters, and what stands for them where there are none: clusters of one block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spectralkv::cuda {

__device__ inline int cluster_size() {
#if __CUDA_ARCH__ >= 900
  std::uint32_t size = 0;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  std::uint32_t rank = 0;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

/// Every thread of the cluster arrives and then waits. What was written before is seen after.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

/// Writes to the copy that block `rank` of the cluster has of `address` in its shared memory.
__device__ inline void store_remote(std::uint64_t* address, int rank, std::uint64_t value) {
#if __CUDA_ARCH__ >= 900
  const auto local = static_cast<std::uint32_t>(__cvta_generic_to_shared(address));
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "st.shared::cluster.u64 [remote], %2;\n\t}"
      :
      : "r"(local), "r"(rank), "l"(value)
      : "memory");
#else
  *address = value;
#endif
}

}  // namespace spectralkv::cuda
