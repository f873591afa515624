// The device memory of one layer.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "backend.h"
#include "cuda/device_memory.h"
#include "cuda/layer.h"

namespace spectralkv::cuda {

/// What all layers of a manager share on the device.
struct SharedMemory {
  FaultRecord* fault;
  FaultRecord* reported;
  Statistics* statistics;
};

class LayerMemory {
 public:
  /// Empty arrays for `batch` sequences of `capacity` slots; queued on `stream`.
  LayerMemory(const GraphConfig& graph, const WalkConfig& walk, const SharedMemory& shared,
              std::int64_t index, std::int64_t batch, std::int64_t capacity, cudaStream_t stream);

  const LayerView& view() const { return view_; }
  /// The same with counters of its own: those of the beginning of a walk, see launch_begin_walk.
  const LayerView& walk_view() const { return walk_view_; }
  std::int64_t graph_bytes() const { return graph_bytes_; }
  std::int64_t scratch_bytes() const { return memory_.bytes() - graph_bytes_; }

  /// Takes over sequence `from` of a layer of the same shape but for batch and capacity, of which
  /// `length` slots are in use.
  void copy_sequence(std::int64_t to, const LayerMemory& other, std::int64_t from,
                     std::int64_t length, cudaStream_t stream);

 private:
  LayerView view_{};
  LayerView walk_view_{};
  Memory memory_;
  std::int64_t graph_bytes_ = 0;
};

}  // namespace spectralkv::cuda
