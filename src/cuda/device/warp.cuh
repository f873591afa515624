// Reductions over the 32 threads of a warp. Before sm_80 there is no instruction for them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spectralkv::cuda {

__device__ inline std::uint32_t warp_max(std::uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffU, value);
#else
  for (int offset = 16; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffU, value, offset));
  }
  return value;
#endif
}

__device__ inline std::uint32_t warp_min(std::uint32_t value) { return ~warp_max(~value); }

__device__ inline std::uint32_t warp_add(std::uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffU, value);
#else
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
#endif
}

}  // namespace spectralkv::cuda
