#include "busy.h"
#include "cuda/cuda_check.h"

namespace spectralkv::test {
namespace {

__device__ unsigned long long nanoseconds() {
  unsigned long long now = 0;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__global__ void spin_kernel(unsigned long long duration) {
  const unsigned long long start = nanoseconds();
  while (nanoseconds() - start < duration) __nanosleep(1000);
}

__global__ void trap_kernel() { asm volatile("trap;"); }

}  // namespace

void launch_spin(double milliseconds, cudaStream_t stream) {
  spin_kernel<<<1, 1, 0, stream>>>(static_cast<unsigned long long>(milliseconds * 1e6));
  cuda::check(cudaGetLastError(), "spin_kernel");
}

void launch_trap(cudaStream_t stream) {
  trap_kernel<<<1, 1, 0, stream>>>();
  cuda::check(cudaGetLastError(), "trap_kernel");
}

}  // namespace spectralkv::test
