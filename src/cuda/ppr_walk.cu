// Personalized PageRank by random walks: the draws of src/cpu/ppr_walk.cpp, number for number.
#include <curand_kernel.h>

#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/restart.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kWalkThreads = 64;
constexpr int kAddThreads = 256;

/// Which graph of a launch a number means.
struct GraphTask {
  int layer;
  std::int64_t sequence;
  std::int64_t graph;
  int population;
};

__device__ GraphTask task_of(std::int64_t index, const LayerView& shape, std::int64_t sequences) {
  GraphTask task;
  task.population = static_cast<int>(index % shape.populations);
  index /= shape.populations;
  task.graph = index % shape.graphs;
  index /= shape.graphs;
  task.sequence = index % sequences;
  task.layer = static_cast<int>(index / sequences);
  return task;
}

struct Launch {
  const LayerView* layers;
  std::int64_t sequences;
  std::int64_t first_sequence;
  SequenceMarks marks;
};

/// False where the sequence takes no part.
__device__ bool find(const Launch& launch, const LayerView& shape, std::int64_t index,
                     GraphTask& task, LayerView& layer) {
  task = task_of(index, shape, launch.sequences);
  const bool marked = is_marked(launch.marks, task.sequence);
  task.sequence += launch.first_sequence;
  layer = launch.layers[task.layer];
  return marked && task.sequence < layer.batch && !has_fault(layer);
}

__global__ void __launch_bounds__(kTableThreads)
    prepare_kernel(Launch launch, LayerView shape, WalkRules rules) {
  GraphTask task;
  LayerView layer;
  if (!find(launch, shape, blockIdx.x, task, layer)) return;
  const std::int64_t b = task.sequence;
  fill_restart_table(layer, rules, b, task.graph, task.population);
  const std::int64_t length = layer.counters->length;
  if (layer.visits != nullptr) {
    std::uint32_t* visits = visits_of(layer, b, task.graph, task.population);
    for (std::int64_t j = threadIdx.x; j < length; j += kTableThreads) visits[j] = 0U;
  } else {
    float* scores = scores_of(layer, b, task.graph, task.population);
    for (std::int64_t j = threadIdx.x; j < length; j += kTableThreads) scores[j] = 0.0F;
  }
  if (task.graph != 0 || task.population != 0 || threadIdx.x != 0) return;
  SequenceCounters& counters = layer.sequences[b];
  layer.walk_blocks[b] = counters.walk_block;
  counters.walk_block += (static_cast<std::uint64_t>(rules.walk_length) + 2) / 2;
  counters.walked_at = counters.seen;
}

/// Numbers of one walker, a block of four at a time.
class Numbers {
 public:
  __device__ Numbers(std::uint64_t seed, std::uint64_t subsequence, std::uint64_t block)
      : key_{static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32U)},
        subsequence_(subsequence),
        block_(block) {}
  __device__ uint4 next() {
    const uint4 counter{static_cast<unsigned>(block_), static_cast<unsigned>(block_ >> 32U),
                        static_cast<unsigned>(subsequence_),
                        static_cast<unsigned>(subsequence_ >> 32U)};
    ++block_;
    return curand_Philox4x32_10(counter, key_);
  }

 private:
  uint2 key_;
  std::uint64_t subsequence_;
  std::uint64_t block_;
};

struct Restarts {
  RestartWeights weight;
  const std::uint64_t* sums;
  const std::uint32_t* guide;
  std::uint64_t total;
  int guide_shift;

  __device__ std::int32_t draw(std::uint32_t random) const {
    const std::uint64_t target = scaled(total, random);
    std::int64_t block = guide[random >> guide_shift];
    while (sums[block] <= target) ++block;
    std::uint64_t sum = block == 0 ? 0 : sums[block - 1];
    std::int64_t slot = block * kRestartBlock;
    while ((sum += weight(slot)) <= target) ++slot;
    return static_cast<std::int32_t>(slot);
  }
};

template <int kTopK, bool kWeighted>
struct Edges {
  static constexpr int kRowWords = kWeighted ? 2 * kTopK : kTopK;
  const std::int32_t* rows;
  const std::int32_t* positions;

  __device__ const std::int32_t* row(std::int32_t slot) const {
    return rows + static_cast<std::int64_t>(slot) * kRowWords;
  }

  __device__ std::int32_t draw(std::int32_t slot, std::uint32_t random) const {
    const std::int32_t* edges = row(slot);
    if constexpr (kWeighted) {
      int k = 0;
#pragma unroll
      for (int i = 0; i < kTopK; i += 4) {
        const uint4 t = *reinterpret_cast<const uint4*>(edges + kTopK + i);
        k += (random >= t.x ? 1 : 0) + (random >= t.y ? 1 : 0) + (random >= t.z ? 1 : 0) +
             (random >= t.w ? 1 : 0);
      }
      return k < kTopK ? edges[k] : -1;
    } else {
      return edges[(static_cast<std::uint64_t>(kTopK) * random) >> 32U];
    }
  }

  __device__ std::uint32_t width(const std::int32_t* edges, int k) const {
    if constexpr (!kWeighted) return 1U;
    const auto* thresholds = reinterpret_cast<const std::uint32_t*>(edges + kTopK);
    return thresholds[k] - (k == 0 ? 0U : thresholds[k - 1]);
  }

  __device__ std::int32_t draw_live(std::int32_t slot, std::int32_t position,
                                    std::uint32_t random) const {
    const std::int32_t* edges = row(slot);
    std::uint64_t total = 0;
    for (int k = 0; k < kTopK; ++k) {
      if (is_live(positions, position, edges[k])) total += width(edges, k);
    }
    if (total == 0) return -1;
    const std::uint64_t target = (total * random) >> 32U;
    std::uint64_t sum = 0;
    for (int k = 0; k < kTopK; ++k) {
      if (!is_live(positions, position, edges[k])) continue;
      sum += width(edges, k);
      if (target < sum) return edges[k];
    }
    return -1;
  }
};

template <int kTopK, bool kWeighted>
__global__ void __launch_bounds__(kWalkThreads)
    walk_kernel(Launch launch, LayerView shape, WalkRules rules, std::int64_t blocks_a_graph) {
  GraphTask task;
  LayerView layer;
  if (!find(launch, shape, blockIdx.x / blocks_a_graph, task, layer)) return;
  const auto& population = rules.population[task.population];
  const std::int64_t walker = blockIdx.x % blocks_a_graph * kWalkThreads + threadIdx.x;
  if (walker >= population.walkers) return;
  const std::int64_t b = task.sequence;
  const std::int64_t g = task.graph;
  const std::int64_t graph = graph_index(layer, b, g);
  const std::uint64_t* sums = restart_sums_of(layer, graph, task.population);
  const Restarts restarts{restart_weights(layer, rules, b, g, task.population), sums,
                          restart_guide_of(layer, graph, task.population),
                          layer.restart_blocks > 0 ? sums[layer.restart_blocks - 1] : 0,
                          32 - layer.guide_bits};
  if (restarts.total == 0) return;
  const Edges<kTopK, kWeighted> edges{row_of(layer, b, g, 0), positions_of(layer, b, g)};
  float* const scores = scores_of(layer, b, g, task.population);
  std::uint32_t* const visits =
      layer.visits == nullptr ? nullptr : visits_of(layer, b, g, task.population);
  const auto visit = [&](std::int32_t slot) {
    if (visits != nullptr) {
      atomicAdd(visits + slot, 1U);
    } else {
      atomicAdd(scores + slot, 1.0F);
    }
  };

  const auto graph_id =
      static_cast<std::uint64_t>(layer.index * rules.first_stream_of_layer + rules.head_offset + g);
  Numbers numbers(rules.seed,
                  (graph_id << 32U) | static_cast<std::uint64_t>(population.first_walker + walker),
                  layer.walk_blocks[b]);
  uint4 block = numbers.next();
  std::int32_t node = restarts.draw(block.y);
  const std::uint64_t follow_range = (std::uint64_t{1} << 32U) - rules.restart_threshold;
  for (std::int64_t step = 0; step < rules.walk_length; ++step) {
    const bool second_half = step % 2 == 0;
    if (!second_half) block = numbers.next();
    const std::uint32_t first = second_half ? block.z : block.x;
    const std::uint32_t second = second_half ? block.w : block.y;
    bool follows = first >= rules.restart_threshold;
    std::int32_t next = -1;
    if (follows) {
      const std::int32_t position = edges.positions[node];
      next = edges.draw(node, second);
      if (!is_live(edges.positions, position, next)) {
        const std::uint64_t again = first - rules.restart_threshold;
        next = edges.draw_live(node, position,
                               static_cast<std::uint32_t>((again << 32U) / follow_range));
        follows = next >= 0;
      }
    }
    if (follows) {
      visit(next);
    } else {
      next = restarts.draw(second);
      if (population.count_restarts != 0) visit(next);
    }
    node = next;
  }
}

__global__ void __launch_bounds__(kAddThreads)
    accumulate_kernel(Launch launch, LayerView shape, float decay, std::int64_t blocks_a_graph) {
  GraphTask task;
  LayerView layer;
  if (!find(launch, shape, blockIdx.x / blocks_a_graph, task, layer)) return;
  const std::int64_t j = blockIdx.x % blocks_a_graph * kAddThreads + threadIdx.x;
  if (j >= layer.counters->length) return;
  float* const scores = scores_of(layer, task.sequence, task.graph, task.population);
  const auto visits =
      static_cast<float>(visits_of(layer, task.sequence, task.graph, task.population)[j]);
  scores[j] = decay == 0.0F ? visits : __fadd_rn(__fmul_rn(decay, scores[j]), visits);
}

__global__ void __launch_bounds__(kTableThreads)
    distribution_kernel(LayerView layer, WalkRules rules, int population, TableView<float> out) {
  if (has_fault(layer)) return;
  const std::int64_t b = blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  fill_restart_table(layer, rules, b, g, population);
  __syncthreads();
  const std::int64_t length = layer.counters->length;
  const RestartWeights weight = restart_weights(layer, rules, b, g, population);
  const std::uint64_t total =
      restart_sums_of(layer, graph_index(layer, b, g), population)[layer.restart_blocks - 1];
  float* row = out.data + b * out.sequence_stride + g * out.head_stride;
  for (std::int64_t j = threadIdx.x; j < length; j += kTableThreads) {
    row[j * out.slot_stride] =
        total == 0
            ? 0.0F
            : static_cast<float>(static_cast<double>(weight(j)) / static_cast<double>(total));
  }
}

template <int kTopK>
void launch_walkers(const Launch& launch, const LayerView& shape, const WalkRules& rules,
                    std::int64_t graphs, cudaStream_t stream) {
  std::int64_t most = 0;
  for (int p = 0; p < rules.populations; ++p) {
    most = std::max(most, rules.population[p].walkers);
  }
  const std::int64_t blocks = (most + kWalkThreads - 1) / kWalkThreads;
  if (blocks == 0) return;
  const auto grid = static_cast<unsigned>(graphs * blocks);
  if (shape.weighted) {
    walk_kernel<kTopK, true><<<grid, kWalkThreads, 0, stream>>>(launch, shape, rules, blocks);
  } else {
    walk_kernel<kTopK, false><<<grid, kWalkThreads, 0, stream>>>(launch, shape, rules, blocks);
  }
  check(cudaGetLastError(), "walk_kernel");
}

}  // namespace

void launch_walk(const LayerView* layers, int count, const LayerView& shape, const WalkRules& rules,
                 std::int64_t most_batch, std::int64_t most_extent, std::int64_t first_sequence,
                 const SequenceMarks& marks, cudaStream_t stream) {
  const Launch launch{layers,
                      std::min<std::int64_t>(most_batch - first_sequence, SequenceMarks::kMost),
                      first_sequence, marks};
  const std::int64_t graphs = count * launch.sequences * shape.graphs * shape.populations;
  if (graphs <= 0) return;
  prepare_kernel<<<static_cast<unsigned>(graphs), kTableThreads, 0, stream>>>(launch, shape, rules);
  check(cudaGetLastError(), "prepare_kernel");
  switch (shape.top_k) {
    case 4:
      launch_walkers<4>(launch, shape, rules, graphs, stream);
      break;
    case 8:
      launch_walkers<8>(launch, shape, rules, graphs, stream);
      break;
    case 16:
      launch_walkers<16>(launch, shape, rules, graphs, stream);
      break;
    default:
      launch_walkers<32>(launch, shape, rules, graphs, stream);
  }
  if (shape.visits == nullptr || most_extent == 0) return;
  const std::int64_t blocks = (most_extent + kAddThreads - 1) / kAddThreads;
  accumulate_kernel<<<static_cast<unsigned>(graphs * blocks), kAddThreads, 0, stream>>>(
      launch, shape, rules.decay, blocks);
  check(cudaGetLastError(), "accumulate_kernel");
}

void launch_restart_distribution(const LayerView& layer, const WalkRules& rules, int population,
                                 const TableView<float>& out, std::int64_t /*extent*/,
                                 cudaStream_t stream) {
  distribution_kernel<<<static_cast<unsigned>(layer.batch * layer.graphs), kTableThreads, 0,
                        stream>>>(layer, rules, population, out);
  check(cudaGetLastError(), "distribution_kernel");
}

}  // namespace spectralkv::cuda
