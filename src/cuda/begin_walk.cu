// What a walk or a solve sees of the counters: those of the moment when it was asked for. Tokens
// that come while it runs stand at positions that it takes for the future, so that it passes over
// them.
#include <algorithm>
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_rows.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kThreads = 128;

/// A thread block a layer.
__global__ void __launch_bounds__(kThreads)
    begin_walk_kernel(const LayerView* layers, const LayerView* copies, std::uint64_t blocks,
                      std::int64_t first_sequence, const __grid_constant__ SequenceMarks marks) {
  const LayerView& layer = layers[blockIdx.x];
  const LayerView& copy = copies[blockIdx.x];
  if (has_fault(layer)) return;
  if (threadIdx.x == 0) *copy.counters = *layer.counters;
  const std::int64_t end =
      min(std::int64_t{layer.batch}, first_sequence + std::int64_t{SequenceMarks::kMost});
  for (std::int64_t b = first_sequence + threadIdx.x; b < end; b += kThreads) {
    SequenceCounters counters = layer.sequences[b];
    copy.sequences[b] = counters;
    if (!is_marked(marks, b - first_sequence)) continue;
    counters.walk_block += blocks;
    counters.walked_at = counters.seen;
    layer.sequences[b] = counters;
  }
}

}  // namespace

void launch_begin_walk(const LayerView* layers, const LayerView* copies, int count,
                       std::uint64_t blocks, std::int64_t most_batch, std::int64_t first_sequence,
                       const SequenceMarks& marks, cudaStream_t stream) {
  if (count == 0 || first_sequence >= most_batch) return;
  begin_walk_kernel<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(layers, copies, blocks,
                                                                           first_sequence, marks);
  check(cudaGetLastError(), "begin_walk_kernel");
}

}  // namespace spectralkv::cuda
