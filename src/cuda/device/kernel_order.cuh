// A kernel that is launched to begin before the one in front of it has ended.
#pragma once

namespace spectralkv::cuda {

/// Until it returns, nothing may be read or written that kernels in front write or read. Where the
/// launch did not ask for an early beginning they have ended anyway.
__device__ inline void wait_for_former_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// From here on the next kernel may begin, if its launch asks for it; it waits as above.
__device__ inline void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace spectralkv::cuda
