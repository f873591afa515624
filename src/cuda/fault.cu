#include "cuda/cuda_check.h"
#include "cuda/fault.h"

namespace spectralkv::cuda {
namespace {

__global__ void clear_fault_kernel(FaultRecord* fault, FaultRecord* reported) {
  *fault = {};
  *reported = {};
}

}  // namespace

void launch_clear_fault(FaultRecord* fault, FaultRecord* reported, cudaStream_t stream) {
  clear_fault_kernel<<<1, 1, 0, stream>>>(fault, reported);
  check(cudaGetLastError(), "clear_fault_kernel");
}

}  // namespace spectralkv::cuda
