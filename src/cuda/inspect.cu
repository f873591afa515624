// What a layer holds, copied out: scores, visits, positions, rows. Slots that the layer has and a
// graph has no room for are empty.
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_rows.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kThreads = 256;

/// Calls function(b, h, slot) for the thread's slot of (B, heads, length), if it has one.
template <class Function>
__device__ void for_slot(const LayerView& layer, std::int64_t heads, std::int64_t runs,
                         Function&& function) {
  const std::int64_t row = std::int64_t{blockIdx.x} / runs;
  const std::int64_t slot = (std::int64_t{blockIdx.x} % runs) * kThreads + threadIdx.x;
  if (slot < layer.counters->length) function(row / heads, row % heads, slot);
}

template <class T>
__device__ T& at(const TableView<T>& table, std::int64_t b, std::int64_t h, std::int64_t slot) {
  return table.data[b * table.sequence_stride + h * table.head_stride + slot * table.slot_stride];
}

__global__ void __launch_bounds__(kThreads)
    scores_kernel(LayerView layer, int population, TableView<float> out, std::int64_t runs) {
  for_slot(layer, layer.heads, runs, [&](std::int64_t b, std::int64_t h, std::int64_t slot) {
    const std::int64_t g = h / layer.heads_per_graph;
    const bool has_slot = slot < room_of(layer, g);
    float sum = 0.0F;
    for (int p = 0; has_slot && p < layer.populations; ++p) {
      if (population < 0 || population == p) sum += scores_of(layer, b, g, p)[slot];
    }
    at(out, b, h, slot) = sum;
  });
}

__global__ void __launch_bounds__(kThreads)
    visits_kernel(LayerView layer, int population, TableView<std::uint32_t> out,
                  std::int64_t runs) {
  for_slot(layer, layer.heads, runs, [&](std::int64_t b, std::int64_t h, std::int64_t slot) {
    const std::int64_t g = h / layer.heads_per_graph;
    std::uint32_t visits = 0;
    if (slot < room_of(layer, g)) {
      visits = layer.visits != nullptr
                   ? visits_of(layer, b, g, population)[slot]
                   : static_cast<std::uint32_t>(lroundf(scores_of(layer, b, g, population)[slot]));
    }
    at(out, b, h, slot) = visits;
  });
}

__global__ void __launch_bounds__(kThreads)
    positions_kernel(LayerView layer, TableView<std::int32_t> out, std::int64_t runs) {
  for_slot(layer, layer.heads, runs, [&](std::int64_t b, std::int64_t h, std::int64_t slot) {
    const std::int64_t g = h / layer.heads_per_graph;
    at(out, b, h, slot) = slot < room_of(layer, g) ? positions_of(layer, b, g)[slot] : -1;
  });
}

__global__ void __launch_bounds__(kThreads)
    rows_kernel(LayerView layer, TableView<std::int32_t> neighbors, TableView<float> probabilities,
                std::int64_t runs) {
  for_slot(layer, layer.graphs, runs, [&](std::int64_t b, std::int64_t g, std::int64_t slot) {
    const int top_k = layer.top_k;
    const std::int32_t* const positions = positions_of(layer, b, g);
    const std::uint32_t* const row = row_of(layer, b, g, slot);
    const auto width_of = [&](int k) {
      if (layer.law == EdgeLaw::uniform) return 1U;
      return threshold_of(layer, row, k) - (k == 0 ? 0U : threshold_of(layer, row, k - 1));
    };
    std::int32_t* const to = &at(neighbors, b, g, slot);
    float* const weight = &at(probabilities, b, g, slot);
    const std::int32_t position = slot < room_of(layer, g) ? positions[slot] : -1;
    int count = 0;
    if (position >= 0) {
      std::uint64_t total = std::uint64_t{1} << 32U;
      if (layer.law != EdgeLaw::attention) {
        total = 0;
        for (int k = 0; k < top_k; ++k) {
          if (is_live(positions, position, neighbor_of(layer, row, k))) total += width_of(k);
        }
      }
      const double unit = 1.0 / static_cast<double>(total);
      for (int k = 0; total != 0 && k < top_k; ++k) {
        const std::uint32_t width = width_of(k);
        const std::int32_t neighbor = neighbor_of(layer, row, k);
        if (width == 0 || !is_live(positions, position, neighbor)) continue;
        to[count] = neighbor;
        weight[count++] = static_cast<float>(static_cast<double>(width) * unit);
      }
    }
    for (; count < top_k; ++count) {
      to[count] = -1;
      weight[count] = 0.0F;
    }
  });
}

std::int64_t runs_of(std::int64_t extent) { return (extent + kThreads - 1) / kThreads; }

unsigned grid_of(const LayerView& layer, std::int64_t heads, std::int64_t extent) {
  return static_cast<unsigned>(runs_of(extent) * layer.batch * heads);
}

}  // namespace

void launch_scores(const LayerView& layer, int population, const TableView<float>& out,
                   std::int64_t extent, cudaStream_t stream) {
  const unsigned grid = grid_of(layer, layer.heads, extent);
  if (grid == 0) return;
  scores_kernel<<<grid, kThreads, 0, stream>>>(layer, population, out, runs_of(extent));
  check(cudaGetLastError(), "scores_kernel");
}

void launch_visits(const LayerView& layer, int population, const TableView<std::uint32_t>& out,
                   std::int64_t extent, cudaStream_t stream) {
  const unsigned grid = grid_of(layer, layer.heads, extent);
  if (grid == 0) return;
  visits_kernel<<<grid, kThreads, 0, stream>>>(layer, population, out, runs_of(extent));
  check(cudaGetLastError(), "visits_kernel");
}

void launch_positions(const LayerView& layer, const TableView<std::int32_t>& out,
                      std::int64_t extent, cudaStream_t stream) {
  const unsigned grid = grid_of(layer, layer.heads, extent);
  if (grid == 0) return;
  positions_kernel<<<grid, kThreads, 0, stream>>>(layer, out, runs_of(extent));
  check(cudaGetLastError(), "positions_kernel");
}

void launch_rows(const LayerView& layer, const TableView<std::int32_t>& neighbors,
                 const TableView<float>& probabilities, std::int64_t extent, cudaStream_t stream) {
  const unsigned grid = grid_of(layer, layer.graphs, extent);
  if (grid == 0) return;
  rows_kernel<<<grid, kThreads, 0, stream>>>(layer, neighbors, probabilities, runs_of(extent));
  check(cudaGetLastError(), "rows_kernel");
}

}  // namespace spectralkv::cuda
