#include <curand_kernel.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/cuda_check.h"
#include "cuda/philox.h"
#include "spectralkv/error.h"

namespace spectralkv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxGrid = 4096;

__global__ void __launch_bounds__(kThreads)
    philox_fill_kernel(uint4* __restrict__ out, std::int64_t blocks, unsigned long long seed,
                       unsigned long long subsequence, unsigned long long offset) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < blocks; i += step) {
    curandStatePhilox4_32_10_t state;
    curand_init(seed, subsequence, offset + 4 * static_cast<unsigned long long>(i), &state);
    out[i] = curand4(&state);
  }
}

}  // namespace

void launch_philox_fill(std::uint32_t* out, std::int64_t blocks, std::uint64_t seed,
                        std::uint64_t subsequence, std::uint64_t offset, void* stream) {
  if (blocks < 0) {
    throw InvalidArgument("[philox_fill] blocks must not be negative, got " +
                          std::to_string(blocks));
  }
  if (offset % 4 != 0) {
    throw InvalidArgument("[philox_fill] offset must be a multiple of 4, got " +
                          std::to_string(offset));
  }
  if (blocks == 0) {
    return;
  }
  const auto grid = static_cast<unsigned>(std::min((blocks + kThreads - 1) / kThreads, kMaxGrid));
  philox_fill_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<uint4*>(out), blocks, seed, subsequence, offset);
  check(cudaGetLastError(), "philox_fill_kernel");
}

}  // namespace spectralkv::cuda
