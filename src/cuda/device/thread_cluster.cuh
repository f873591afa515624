// Thread-block clusters: but for cluster_sync, for kernels that are only launched where there are
// such (sm_90 and up).
//
// Blocks tell each other numbers by mail: a mailbox counts the bytes that come in, and those who
// wait for it need no barrier and no fence. A block without others must not send mail: it writes
// for itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spectralkv::cuda {

__device__ inline int cluster_size() {
  std::uint32_t size = 0;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return static_cast<int>(size);
}

__device__ inline int cluster_rank() {
  std::uint32_t rank = 0;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
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

/// In shared memory.
struct Mailbox {
  std::uint64_t barrier;
};

/// By one thread, before cluster_arrive: `bytes` will come in.
__device__ inline void open_mailbox(Mailbox& box, int bytes) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(&box.barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// All threads of all blocks arrive, then wait before they post: the mailboxes are open.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Writes `value` where block `rank` has its copy of `address`, and tells its copy of `box`.
__device__ inline void post(std::uint64_t* address, int rank, std::uint64_t value, Mailbox& box) {
  if (cluster_size() == 1) {
    *address = value;
    return;
  }
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
}

/// By all threads: everything that was announced has come.
__device__ inline void wait_for_mail(Mailbox& box) {
  if (cluster_size() == 1) {
    __syncthreads();
    return;
  }
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
}

}  // namespace spectralkv::cuda
