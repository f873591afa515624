// The device memory of one layer.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

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
  /// Empty arrays for `batch` sequences whose graphs have `rooms` slots (empty: `capacity` each);
  /// queued on `stream`.
  LayerMemory(const GraphConfig& graph, const WalkConfig& walk, const SharedMemory& shared,
              std::int64_t index, std::int64_t batch, std::int64_t capacity,
              std::span<const std::int64_t> rooms, cudaStream_t stream);

  const LayerView& view() const { return view_; }
  /// The same with counters of its own: those of the beginning of a walk, see launch_begin_walk.
  const LayerView& walk_view() const { return walk_view_; }
  std::int64_t graph_bytes() const { return graph_bytes_; }
  std::int64_t scratch_bytes() const { return memory_.bytes() - graph_bytes_; }

  /// Slots of all graphs of all sequences.
  std::int64_t slots() const { return view_.batch * slots_before(view_.graphs); }

  /// Takes over sequence `from` of a layer of the same shape but for batch, rooms and format of
  /// rows: of the first `length` slots those that both have, and the edges to them.
  void copy_sequence(std::int64_t to, const LayerMemory& other, std::int64_t from,
                     std::int64_t length, cudaStream_t stream);

 private:
  bool is_divided() const { return !division_.empty(); }
  /// Of a sequence, before those of graph g.
  std::int64_t slots_before(std::int64_t g) const {
    return is_divided() ? division_[static_cast<std::size_t>(g)] : g * view_.capacity;
  }
  std::int64_t room(std::int64_t g) const { return slots_before(g + 1) - slots_before(g); }

  LayerView view_{};
  LayerView walk_view_{};
  Memory memory_;
  std::vector<std::int32_t> division_;  ///< first_slots and head_order of a LayerView
  std::int64_t graph_bytes_ = 0;
};

}  // namespace spectralkv::cuda
