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

/// Of numbers that are no NaN.
__device__ inline float warp_max(float value) {
  // Numbers in the order of the floats whose bits they are made of.
  constexpr std::uint32_t kSign = 0x80000000U;
  const std::uint32_t bits = __float_as_uint(value);
  const std::uint32_t highest = warp_max((bits & kSign) != 0 ? ~bits : bits | kSign);
  return __uint_as_float((highest & kSign) != 0 ? highest ^ kSign : ~highest);
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
