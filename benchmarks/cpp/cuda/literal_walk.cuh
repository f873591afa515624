// The walk as its definition reads: one thread a walker, one cuRAND state a walker in memory, edges
// looked up one after the other, visits counted by atomics in memory. A rival of launch_walk, whose
// distribution it has, not its numbers.
#pragma once

#include <curand_kernel.h>

#include <cstdint>

namespace spectralkv::bench {

struct LiteralGraph {
  const std::int32_t* positions;
  const std::int32_t* rows;  ///< top_k neighbours, and behind them top_k thresholds if weighted
  const std::uint64_t* cumulative;  ///< of the restart weights of the second half of the walkers
  std::uint32_t* visits;
  std::int64_t slots;
  std::int64_t first_recent;  ///< the first half restarts in [first_recent, slots)
  int top_k;
  bool weighted;
};

__global__ void literal_init_kernel(curandStatePhilox4_32_10_t* states, int walkers,
                                    unsigned long long seed) {
  const int walker = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (walker < walkers) {
    curand_init(seed, static_cast<unsigned long long>(walker), 0, states + walker);
  }
}

__device__ inline std::int32_t literal_restart(const LiteralGraph& graph, bool recent,
                                               std::uint32_t random) {
  if (recent) {
    const auto count = static_cast<std::uint64_t>(graph.slots - graph.first_recent);
    return static_cast<std::int32_t>(graph.first_recent +
                                     static_cast<std::int64_t>((count * random) >> 32U));
  }
  const std::uint64_t total = graph.cumulative[graph.slots - 1];
  const std::uint64_t target = (__umul64hi(total, random) << 32U) | ((total * random) >> 32U);
  std::int64_t low = 0;
  std::int64_t high = graph.slots - 1;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (graph.cumulative[middle] > target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<std::int32_t>(low);
}

__global__ void literal_walk_kernel(LiteralGraph graph, curandStatePhilox4_32_10_t* states,
                                    int walkers, int steps, std::uint32_t restart_threshold) {
  const int walker = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (walker >= walkers) return;
  const bool recent = walker < walkers / 2;
  const int words = graph.weighted ? 2 * graph.top_k : graph.top_k;
  curandStatePhilox4_32_10_t state = states[walker];
  std::int32_t node = literal_restart(graph, recent, curand(&state));
  for (int step = 0; step < steps; ++step) {
    const std::uint32_t first = curand(&state);
    const std::uint32_t second = curand(&state);
    std::int32_t next = -1;
    if (first >= restart_threshold) {
      const std::int32_t* row = graph.rows + static_cast<std::int64_t>(node) * words;
      if (graph.weighted) {
        for (int k = 0; k < graph.top_k; ++k) {
          if (second < static_cast<std::uint32_t>(row[graph.top_k + k])) {
            next = row[k];
            break;
          }
        }
      } else {
        next = row[(static_cast<std::uint64_t>(graph.top_k) * second) >> 32U];
      }
      if (next >= 0) {
        const std::int32_t position = graph.positions[next];
        if (position < 0 || position >= graph.positions[node]) next = -1;
      }
    }
    const bool restarts = next < 0;
    if (restarts) next = literal_restart(graph, recent, second);
    if (!restarts || !recent) atomicAdd(graph.visits + next, 1U);
    node = next;
  }
  states[walker] = state;
}

}  // namespace spectralkv::bench
