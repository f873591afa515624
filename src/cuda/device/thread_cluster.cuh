// Thread-block clusters. Where there are none (below sm_90) each block is one of its own.
//
// Blocks tell each other numbers by mail: a mailbox counts the bytes that come in, and those who
// wait for it need no barrier and no fence. A block without others must not send mail: it writes
// for itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spectralkv::cuda {

__device__ inline int cluster_size() {
  std::uint32_t size = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
#endif
  return static_cast<int>(size);
}

__device__ inline int cluster_rank() {
  std::uint32_t rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

/// Of a grid along x.
__device__ inline int cluster_index() {
  std::uint32_t index = blockIdx.x;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
#endif
  return static_cast<int>(index);
}

/// All threads of a cluster of so many blocks: everyone sees what the others stored before, in
/// memory and in shared memory. A cluster of one needs no sm_90.
__device__ inline void cluster_sync(int cluster) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (cluster > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

/// Where block `rank` of the cluster has its copy of `address`, which lies in shared memory.
template <class T>
__device__ T* copy_in_block(T* address, [[maybe_unused]] int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(address, static_cast<unsigned>(rank)));
#else
  return address;
#endif
}

/// In shared memory.
struct Mailbox {
  std::uint64_t barrier;
};

/// By one thread, before cluster_arrive: `bytes` will come in.
__device__ inline void open_mailbox([[maybe_unused]] Mailbox& box, [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(&box.barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// All threads of all blocks arrive, then wait before they post: the mailboxes are open.
__device__ inline void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// Writes `value` where block `rank` has its copy of `address`, and tells its copy of `box`.
__device__ inline void post(std::uint64_t* address, [[maybe_unused]] int rank, std::uint64_t value,
                            [[maybe_unused]] Mailbox& box) {
  if (cluster_size() == 1) {
    *address = value;
    return;
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto local = static_cast<std::uint32_t>(__cvta_generic_to_shared(address));
  const auto local_box = static_cast<std::uint32_t>(__cvta_generic_to_shared(&box.barrier));
  asm volatile(
      "{\n\t.reg .b32 to;\n\t.reg .b32 to_box;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 to_box, %1, %2;\n\t"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [to], %3, [to_box];\n\t}"
      :
      : "r"(local), "r"(local_box), "r"(rank), "l"(value)
      : "memory");
#endif
}

/// By all threads: everything that was announced has come.
__device__ inline void wait_for_mail([[maybe_unused]] Mailbox& box) {
  if (cluster_size() == 1) {
    __syncthreads();
    return;
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(&box.barrier));
  std::uint32_t complete = 0;
  while (complete == 0) {
    asm volatile(
        "{\n\t.reg .pred complete;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], 0;\n\t"
        "selp.u32 %0, 1, 0, complete;\n\t}"
        : "=r"(complete)
        : "r"(address)
        : "memory");
  }
#endif
}

}  // namespace spectralkv::cuda
