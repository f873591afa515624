#include "cuda/cuda_check.h"
#include "cuda/device/graph_rows.cuh"
#include "cuda/fault.h"

namespace spectralkv::cuda {
namespace {

__global__ void raise_kernel(LayerView layer, const FaultRecord* found) {
  const FaultRecord record = *found;
  if (record.fault == 0U) return;
  report(layer, static_cast<Fault>(record.fault), record.sequence, record.head, record.value,
         record.limit);
}

__global__ void clear_fault_kernel(FaultRecord* fault, FaultRecord* reported) {
  *fault = {};
  *reported = {};
}

}  // namespace

void launch_raise(const LayerView& layer, const FaultRecord* found, cudaStream_t stream) {
  raise_kernel<<<1, 1, 0, stream>>>(layer, found);
  check(cudaGetLastError(), "raise_kernel");
}

void launch_clear_fault(FaultRecord* fault, FaultRecord* reported, cudaStream_t stream) {
  clear_fault_kernel<<<1, 1, 0, stream>>>(fault, reported);
  check(cudaGetLastError(), "clear_fault_kernel");
}

}  // namespace spectralkv::cuda
