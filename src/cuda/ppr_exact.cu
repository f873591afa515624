// Personalized PageRank without noise: y = sum over t of ((1 - p) A^T)^t r. Edges point to older
// tokens only, so the sum is finite. Masses are integers, whose sums do not depend on their order:
// the result is the same at every call.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/restart.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kTableThreads = 1024;

/// Bytes of a slot: masses under way, masses arriving, all that arrived over edges; the live edges
/// of its row and the sum of their widths.
constexpr std::int64_t kBytesASlot = 3 * 8 + 2 * 4;

struct SolveRules {
  double restart_prob;
  double unit;  ///< what a mass of 1 is
  double decay;
  std::int64_t steps[kMaxPopulations];
};

/// 32 bits of a row's live edges.
__device__ std::uint32_t live_edges(const LayerView& layer, const std::int32_t* positions,
                                    std::int64_t slot, const std::int32_t* row,
                                    std::uint32_t& total) {
  std::uint32_t live = 0;
  total = 0;
  const std::int32_t position = positions[slot];
  if (position < 0) return 0;
  const auto* thresholds = reinterpret_cast<const std::uint32_t*>(row + layer.top_k);
  std::uint32_t before = 0;
  for (int k = 0; k < layer.top_k; ++k) {
    const std::uint32_t width = layer.weighted ? thresholds[k] - before : 1U;
    if (layer.weighted) before = thresholds[k];
    if (width == 0 || !is_live(positions, position, row[k])) continue;
    live |= 1U << k;
    total += width;
  }
  return live;
}

__global__ void __launch_bounds__(kTableThreads)
    solve_kernel(LayerView layer, WalkRules rules, SolveRules solve, std::int64_t first_sequence,
                 SequenceMarks marks, std::byte* scratch) {
  __shared__ unsigned long long sum;
  const int p = static_cast<int>(blockIdx.x % layer.populations);
  const std::int64_t graph = blockIdx.x / layer.populations;
  const std::int64_t b = first_sequence + graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  if (!is_marked(marks, b - first_sequence) || has_fault(layer)) return;
  const std::int64_t length = layer.counters->length;
  auto* under_way = reinterpret_cast<unsigned long long*>(
      scratch + ((b * layer.graphs + g) * layer.populations + p) * layer.capacity * kBytesASlot);
  auto* arriving = under_way + layer.capacity;
  auto* const arrived = arriving + layer.capacity;
  auto* const live = reinterpret_cast<std::uint32_t*>(arrived + layer.capacity);
  auto* const totals = live + layer.capacity;
  const RestartWeights weight = restart_weights(layer, rules, b, g, p);
  const std::uint64_t weights = restart_table_of(layer, b, g, p).header->total;
  const std::int32_t* positions = positions_of(layer, b, g);
  const auto restart = [&](std::int64_t j) -> unsigned long long {
    if (weights == 0) return 0;
    return __double2ull_rn(static_cast<double>(weight(j)) / static_cast<double>(weights) *
                           solve.unit);
  };
  for (std::int64_t j = threadIdx.x; j < length; j += kTableThreads) {
    under_way[j] = restart(j);
    arriving[j] = 0;
    arrived[j] = 0;
    live[j] = live_edges(layer, positions, j, row_of(layer, b, g, j), totals[j]);
  }
  __syncthreads();
  while (true) {
    int moved = 0;
    for (std::int64_t j = threadIdx.x; j < length; j += kTableThreads) {
      const unsigned long long mass = under_way[j];
      if (mass == 0) continue;
      under_way[j] = 0;
      std::uint32_t edges = live[j];
      if (edges == 0) continue;
      const double sent =
          static_cast<double>(mass) * (1.0 - solve.restart_prob) / static_cast<double>(totals[j]);
      const std::int32_t* row = row_of(layer, b, g, j);
      const auto* thresholds = reinterpret_cast<const std::uint32_t*>(row + layer.top_k);
      while (edges != 0) {
        const int k = __ffs(static_cast<int>(edges)) - 1;
        edges &= edges - 1;
        const std::uint32_t width =
            layer.weighted ? thresholds[k] - (k == 0 ? 0U : thresholds[k - 1]) : 1U;
        const unsigned long long part = __double2ull_rd(sent * static_cast<double>(width));
        if (part == 0) continue;
        atomicAdd(arriving + row[k], part);
        moved = 1;
      }
    }
    if (__syncthreads_or(moved) == 0) break;
    for (std::int64_t j = threadIdx.x; j < length; j += kTableThreads) {
      const unsigned long long mass = arriving[j];
      under_way[j] = mass;
      arriving[j] = 0;
      arrived[j] += mass;
    }
    __syncthreads();
  }

  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (std::int64_t j = threadIdx.x; j < length; j += kTableThreads) {
    mine += arrived[j] + restart(j);
  }
  atomicAdd(&sum, mine);
  __syncthreads();
  const auto total = static_cast<double>(sum);
  const bool all = rules.population[p].count_restarts != 0;
  float* const scores = scores_of(layer, b, g, p);
  for (std::int64_t j = threadIdx.x; j < length; j += kTableThreads) {
    const auto mass = static_cast<double>(arrived[j] + (all ? restart(j) : 0ULL));
    const double visits = total > 0.0 ? static_cast<double>(solve.steps[p]) * (mass / total) : 0.0;
    if (layer.visits != nullptr) {
      visits_of(layer, b, g, p)[j] = static_cast<std::uint32_t>(llround(visits));
    }
    scores[j] = static_cast<float>(__dadd_rn(__dmul_rn(solve.decay, scores[j]), visits));
  }
  if (g == 0 && p == 0 && threadIdx.x == 0) {
    layer.sequences[b].walked_at = layer.sequences[b].seen;
  }
}

}  // namespace

std::int64_t solve_scratch(const LayerView& layer) {
  return std::int64_t{layer.batch} * layer.graphs * layer.populations * layer.capacity *
         kBytesASlot;
}

void launch_solve(const LayerView& layer, const WalkRules& rules, double restart_prob,
                  std::int64_t first_sequence, const SequenceMarks& marks, void* scratch,
                  std::int64_t extent, cudaStream_t stream) {
  const std::int64_t sequences =
      std::min<std::int64_t>(layer.batch - first_sequence, SequenceMarks::kMost);
  const std::int64_t graphs = sequences * layer.graphs * layer.populations;
  if (graphs <= 0 || layer.capacity == 0) return;
  // All masses together are 1 / restart_prob, or as many as there are tokens if that is less.
  const double most = std::min(1.0 / restart_prob, static_cast<double>(layer.capacity) + 1.0);
  SolveRules solve{.restart_prob = restart_prob,
                   .unit = std::exp2(62.0 - std::ceil(std::log2(most))),
                   .decay = rules.decay,
                   .steps = {}};
  for (int p = 0; p < rules.populations; ++p) {
    solve.steps[p] = rules.population[p].walkers * rules.walk_length;
  }
  launch_restart_tables(layer, rules, extent, first_sequence, marks, stream);
  solve_kernel<<<static_cast<unsigned>(graphs), kTableThreads, 0, stream>>>(
      layer, rules, solve, first_sequence, marks, static_cast<std::byte*>(scratch));
  check(cudaGetLastError(), "solve_kernel");
}

}  // namespace spectralkv::cuda
