// Launches over many graphs: which graph of which layer a thread block has.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device/graph_rows.cuh"
#include "cuda/layer.h"

namespace spectralkv::cuda {

/// Graphs of `layers`, each with some of its populations. All layers share what is not a pointer,
/// batch, capacity or pool; those whose rows have another format than the launch's shape take no
/// part.
struct Launch {
  const LayerView* layers;  ///< null: there is one, which is handed over by value
  std::int64_t sequences;
  std::int64_t first_sequence;
  SequenceMarks marks;
  PopulationList populations;

  /// Graphs, each counted once for each of its populations.
  std::int64_t tasks(int layer_count, const LayerView& shape) const {
    return layer_count * sequences * shape.graphs * populations.count;
  }
};

inline Launch launch_of(const LayerView* layers, std::int64_t most_batch,
                        std::int64_t first_sequence, const SequenceMarks& marks,
                        const PopulationList& populations) {
  return {.layers = layers,
          .sequences = std::min<std::int64_t>(most_batch - first_sequence, SequenceMarks::kMost),
          .first_sequence = first_sequence,
          .marks = marks,
          .populations = populations};
}

struct GraphTask {
  int layer;
  std::int64_t sequence;
  std::int64_t graph;
  int population;
};

/// kOne: the layer that was handed over by value, whose fields need not be fetched.
template <bool kOne>
__device__ const LayerView& layer_of(const Launch& launch, const LayerView& shape,
                                     const GraphTask& task) {
  if constexpr (kOne) return shape;
  return launch.layers[task.layer];
}

/// The task of a number; false where its layer or sequence takes no part. Faults are the caller's
/// to check, once it has asked memory for more.
template <bool kOne>
__device__ bool find(const Launch& launch, const LayerView& shape, unsigned index,
                     GraphTask& task) {
  const auto populations = static_cast<unsigned>(launch.populations.count);
  const auto graphs = static_cast<unsigned>(shape.graphs);
  const auto sequences = static_cast<unsigned>(launch.sequences);
  task.population = launch.populations.numbers[index % populations];
  index /= populations;
  task.graph = index % graphs;
  index /= graphs;
  if constexpr (kOne) {
    task.sequence = index;
    task.layer = 0;
  } else {
    task.sequence = index % sequences;
    task.layer = static_cast<int>(index / sequences);
  }
  const bool marked = is_marked(launch.marks, task.sequence);
  task.sequence += launch.first_sequence;
  const LayerView& layer = layer_of<kOne>(launch, shape, task);
  return marked && task.sequence < layer.batch && layer.format == shape.format;
}

}  // namespace spectralkv::cuda
