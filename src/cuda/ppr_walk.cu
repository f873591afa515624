// Personalized PageRank by random walks: the draws of src/cpu/ppr_walk.cpp, number for number.
#include <cooperative_groups.h>
#include <curand_kernel.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_tasks.cuh"
#include "cuda/device/restart.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kTableThreads = 1024;
/// Slots that a thread block of a table takes at once.
constexpr std::int64_t kTableSlots = std::int64_t{kTableThreads} * kRestartBlock;
constexpr unsigned kMostTableCluster = 8;
constexpr int kMostWalkThreads = 640;
/// Steps of a walker that are drawn at once.
constexpr std::int64_t kMostSteps = 32;
/// Thread blocks that walks are spread over before they grow.
constexpr std::int64_t kWalkBlocks = 128;
constexpr int kAddThreads = 256;

/// First slot of ascending positions, without empty slots, that is `first` or above. One warp.
__device__ std::int64_t first_slot_from(const std::int32_t* positions, std::int64_t length,
                                        std::int64_t seen, std::int32_t first) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // At most seen - first tokens can be as new.
  std::int64_t low = max(std::int64_t{0}, length - max(std::int64_t{0}, seen - first));
  std::int64_t high = length;
  std::int64_t step = 1;  // most often the answer is the lowest that it can be
  while (low < high) {
    const std::int64_t probe = low + lane * step;
    const unsigned older = __ballot_sync(0xffffffffU, probe < high && positions[probe] < first);
    const int count = __popc(older);
    high = min(high, low + count * step);
    if (count > 0) low += (count - 1) * step + 1;
    step = max(std::int64_t{1}, (high - low + 31) / 32);
  }
  return low;
}

/// Fills the table of one population of one graph; all threads of the cluster take part.
__device__ void fill_restart_table(const cooperative_groups::cluster_group& cluster,
                                   const LayerView& layer, const WalkRules& rules, std::int64_t b,
                                   std::int64_t g, int p) {
  __shared__ std::uint64_t warp_sums[kTableThreads / 32];
  __shared__ std::uint64_t totals[2];  // by turns: the other one may still be read
  const std::int64_t length = layer.counters->length;
  const RestartWeights weights = restart_weights(layer, rules, b, g, p);
  const RestartTable table = restart_table_of(layer, b, g, p);
  const unsigned rank = cluster.block_rank();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;

  const SequenceCounters& sequence = layer.sequences[b];
  if (weights.novelty == nullptr && layer.counters->ordered != 0 && sequence.held == length) {
    if (rank != 0 || warp != 0) return;
    const std::int64_t first =
        first_slot_from(weights.positions, length, sequence.seen, weights.first);
    if (lane == 0) {
      *table.header = {.total = static_cast<std::uint64_t>(length - first),
                       .first = static_cast<std::int32_t>(first),
                       .coarse = 0};
    }
    return;
  }

  const bool aligned = layer.capacity % 4 == 0;
  const std::int64_t group = layer.restart_group;
  const std::int64_t coarse = (length + group * kRestartBlock - 1) / (group * kRestartBlock);
  const std::int64_t blocks = coarse * group;
  const std::int64_t a_round = std::int64_t{cluster.num_blocks()} * kTableThreads;
  std::uint64_t carry = 0;
  for (std::int64_t start = 0, round = 0; start < blocks; start += a_round, ++round) {
    const std::int64_t block = start + std::int64_t{rank} * kTableThreads + threadIdx.x;
    const std::int64_t slot = block * kRestartBlock;
    std::uint64_t sum = 0;
    if (slot < length) {
      std::int32_t positions[kRestartBlock];
      std::uint32_t novelty[kRestartBlock] = {};
      load_block(weights.positions, slot, layer.capacity, aligned, positions);
      if (weights.novelty != nullptr) {
        load_block(weights.novelty, slot, layer.capacity, aligned, novelty);
      }
#pragma unroll
      for (int i = 0; i < kRestartBlock; ++i) {
        if (slot + i >= length) continue;
        const std::uint32_t weight = weights.of(positions[i], novelty[i]);
        sum += weight;
        // Draws read these weights without the positions.
        if (weight != novelty[i] && weights.novelty != nullptr) {
          novelty_of(layer, b, g)[slot + i] = weight;
        }
      }
    }
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint64_t before = __shfl_up_sync(0xffffffffU, sum, offset);
      if (lane >= offset) sum += before;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      std::uint64_t all = warp_sums[lane];
      for (int offset = 1; offset < 32; offset *= 2) {
        const std::uint64_t before = __shfl_up_sync(0xffffffffU, all, offset);
        if (lane >= offset) all += before;
      }
      warp_sums[lane] = all;
      if (lane == 31) totals[round % 2] = all;
    }
    cluster.sync();
    std::uint64_t total = carry;
    std::uint64_t in_front = carry;
    for (unsigned r = 0; r < cluster.num_blocks(); ++r) {
      const std::uint64_t its = *cluster.map_shared_rank(&totals[round % 2], r);
      if (r < rank) in_front += its;
      total += its;
    }
    carry = total;
    sum += in_front + (warp > 0 ? warp_sums[warp - 1] : 0U);
    if (block < blocks) {
      table.fine[block] = sum;
      if (block % group == group - 1) table.coarse[block / group] = sum;
    }
  }
  if (rank == 0 && threadIdx.x == 0) {
    *table.header = {
        .total = carry, .first = weights.first, .coarse = static_cast<std::int32_t>(coarse)};
  }
  cluster.sync();  // others may still read this block's totals
}

/// Zeroes the slots [0, length) of an array; all threads of the cluster take part.
template <class T>
__device__ void clear(const cooperative_groups::cluster_group& cluster, T* values,
                      std::int64_t length, bool aligned) {
  const std::int64_t threads = std::int64_t{cluster.num_blocks()} * kTableThreads;
  const std::int64_t thread = std::int64_t{cluster.block_rank()} * kTableThreads + threadIdx.x;
  const std::int64_t quads = aligned ? length / 4 : 0;
  for (std::int64_t i = thread; i < quads; i += threads) {
    reinterpret_cast<uint4*>(values)[i] = uint4{};
  }
  for (std::int64_t i = quads * 4 + thread; i < length; i += threads) values[i] = T{0};
}

/// A cluster a graph and population: its restart table and, before a walk, empty counts.
__global__ void __launch_bounds__(kTableThreads)
    prepare_kernel(Launch launch, LayerView shape, WalkRules rules, bool walks) {
  cudaTriggerProgrammaticLaunchCompletion();
  const auto cluster = cooperative_groups::this_cluster();
  GraphTask task;
  if (!find(launch, shape, blockIdx.x / cluster.num_blocks(), task)) return;
  const LayerView& layer = layer_of(launch, shape, task);
  const std::int64_t b = task.sequence;
  if (walks) {
    const std::int64_t length = layer.counters->length;
    const bool aligned = layer.capacity % 4 == 0;
    if (layer.visits != nullptr) {
      clear(cluster, visits_of(layer, b, task.graph, task.population), length, aligned);
    } else {
      clear(cluster, scores_of(layer, b, task.graph, task.population), length, aligned);
    }
    if (task.graph == 0 && task.population == 0 && cluster.thread_rank() == 0) {
      SequenceCounters& counters = layer.sequences[b];
      layer.walk_blocks[b] = counters.walk_block;
      counters.walk_block += (static_cast<std::uint64_t>(rules.walk_length) + 2) / 2;
      counters.walked_at = counters.seen;
    }
  }
  fill_restart_table(cluster, layer, rules, b, task.graph, task.population);
}

/// The edges of one graph.
template <int kTopK, bool kWeighted>
struct Edges {
  static constexpr int kRowWords = kWeighted ? 2 * kTopK : kTopK;
  const std::int32_t* rows;
  const std::int32_t* positions;

  __device__ const std::int32_t* row(std::int32_t slot) const {
    return rows + static_cast<std::int64_t>(slot) * kRowWords;
  }

  /// The edge that a number means, stale or not; -1: the number lies above all edges. Short rows
  /// are read as a whole, so that a step waits for memory once.
  __device__ std::int32_t draw(std::int32_t slot, std::uint32_t random) const {
    const std::int32_t* edges = row(slot);
    if constexpr (!kWeighted) {
      return __ldg(edges + ((static_cast<std::uint64_t>(kTopK) * random) >> 32U));
    } else {
      uint4 thresholds[kTopK / 4];
      const auto* from = reinterpret_cast<const uint4*>(edges + kTopK);
      if constexpr (kTopK <= 8) {
        int4 neighbors[kTopK / 4];
#pragma unroll
        for (int i = 0; i < kTopK / 4; ++i) {
          thresholds[i] = __ldg(from + i);
          neighbors[i] = __ldg(reinterpret_cast<const int4*>(edges) + i);
        }
        std::int32_t next = neighbors[0].x;
#pragma unroll
        for (int i = 0; i < kTopK / 4; ++i) {
          next = random >= thresholds[i].x ? neighbors[i].y : next;
          next = random >= thresholds[i].y ? neighbors[i].z : next;
          next = random >= thresholds[i].z ? neighbors[i].w : next;
          next = random >= thresholds[i].w
                     ? (i + 1 < kTopK / 4 ? neighbors[(i + 1) % (kTopK / 4)].x : -1)
                     : next;
        }
        return next;
      } else {
#pragma unroll
        for (int i = 0; i < kTopK / 4; ++i) thresholds[i] = __ldg(from + i);
        int k = 0;
#pragma unroll
        for (int i = 0; i < kTopK / 4; ++i) {
          k += (random >= thresholds[i].x ? 1 : 0) + (random >= thresholds[i].y ? 1 : 0) +
               (random >= thresholds[i].z ? 1 : 0) + (random >= thresholds[i].w ? 1 : 0);
        }
        return k < kTopK ? __ldg(edges + k) : -1;
      }
    }
  }

  __device__ std::uint32_t width(const std::int32_t* edges, int k) const {
    if constexpr (!kWeighted) return 1U;
    const auto* thresholds = reinterpret_cast<const std::uint32_t*>(edges + kTopK);
    return thresholds[k] - (k == 0 ? 0U : thresholds[k - 1]);
  }

  /// A draw among the live edges only; -1: there are none.
  __device__ std::int32_t draw_live(std::int32_t slot, std::int32_t position,
                                    std::uint32_t random) const {
    const std::int32_t* edges = row(slot);
    std::uint64_t total = 0;
#pragma unroll 4
    for (int k = 0; k < kTopK; ++k) {
      if (is_live(positions, position, edges[k])) total += width(edges, k);
    }
    if (total == 0) return -1;
    const std::uint64_t target = (total * random) >> 32U;
    std::uint64_t sum = 0;
#pragma unroll 1
    for (int k = 0; k < kTopK; ++k) {
      if (!is_live(positions, position, edges[k])) continue;
      sum += width(edges, k);
      if (target < sum) return edges[k];
    }
    return -1;
  }
};

/// Walkers of one graph and population, one thread for each step of a walker. What a walker does
/// after a restart does not depend on what it did before, so every restart that the numbers
/// foretell starts a thread of its own, which goes on to the next such restart: the longest wait is
/// for the longest run of edges, not for all steps. Restarts where a walker meets a dead end belong
/// to the run that meets it.
template <int kTopK, bool kWeighted>
__global__ void __launch_bounds__(kMostWalkThreads)
    walk_kernel(Launch launch, LayerView shape, WalkRules rules, unsigned blocks_a_graph,
                int walkers_a_block, int steps_a_round) {
  extern __shared__ std::uint64_t coarse[];
  auto* const numbers = reinterpret_cast<uint2*>(coarse + kMostCoarseSums);
  auto* const carried = reinterpret_cast<std::int32_t*>(numbers + blockDim.x);

  GraphTask task;
  if (!find(launch, shape, blockIdx.x / blocks_a_graph, task)) return;
  const LayerView& layer = layer_of(launch, shape, task);
  const auto& population = rules.population[task.population];
  const std::int64_t b = task.sequence;
  const std::int64_t g = task.graph;
  const int thread = static_cast<int>(threadIdx.x);
  const int in_block = thread / steps_a_round;
  const int turn = thread - in_block * steps_a_round;
  const std::int64_t first_walker = std::int64_t{blockIdx.x % blocks_a_graph} * walkers_a_block;
  if (first_walker >= population.walkers) return;
  const bool walks = in_block < walkers_a_block && first_walker + in_block < population.walkers;
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
  const RestartTable table = restart_table_of(layer, b, g, task.population);
  Restarts restarts{.header = {},
                    .coarse = coarse,
                    .fine = table.fine,
                    .group = layer.restart_group,
                    .coarse_step = 0,
                    .aligned = layer.capacity % 4 == 0,
                    .capacity = layer.capacity,
                    .positions = edges.positions,
                    .novelty = population.restart == static_cast<std::int32_t>(Restart::novelty)
                                   ? novelty_of(layer, b, g)
                                   : nullptr};
  const auto graph_id =
      static_cast<std::uint64_t>(layer.index * rules.first_stream_of_layer + rules.head_offset + g);
  const std::uint64_t stream =
      (graph_id << 32U) |
      static_cast<std::uint64_t>(population.first_walker + first_walker + in_block);
  const uint2 key{static_cast<unsigned>(rules.seed), static_cast<unsigned>(rules.seed >> 32U)};

  cudaGridDependencySynchronize();
  restarts.header = *table.header;
  const std::uint64_t first_block = layer.walk_blocks[b];
  if (restarts.header.total == 0) return;
  for (std::int32_t i = thread; i < restarts.header.coarse; i += static_cast<int>(blockDim.x)) {
    coarse[i] = table.coarse[i];
  }
  if (restarts.header.coarse > 0) restarts.coarse_step = 1 << (31 - __clz(restarts.header.coarse));

  const std::uint64_t follow_range = (std::uint64_t{1} << 32U) - rules.restart_threshold;
  const auto follows = [&](uint2 number) { return number.x >= rules.restart_threshold; };
  for (std::int64_t begin = 0; begin < rules.walk_length; begin += steps_a_round) {
    const int steps = static_cast<int>(min(std::int64_t{steps_a_round}, rules.walk_length - begin));
    // Two numbers for the start and for every step.
    const std::int64_t step = begin + turn;
    const std::uint64_t counter = first_block + static_cast<std::uint64_t>((step + 1) / 2);
    const uint4 four = curand_Philox4x32_10(
        uint4{static_cast<unsigned>(counter), static_cast<unsigned>(counter >> 32U),
              static_cast<unsigned>(stream), static_cast<unsigned>(stream >> 32U)},
        key);
    uint2 number = step % 2 == 0 ? uint2{four.z, four.w} : uint2{four.x, four.y};
    numbers[thread] = number;
    __syncthreads();
    const bool restarts_here = !follows(number);
    if (walks && turn < steps && (restarts_here || turn == 0)) {
      const uint2* const mine = numbers + in_block * steps_a_round;
      int at = turn;
      std::int32_t node = 0;
      if (restarts_here || begin == 0) {
        node = restarts.draw(restarts_here ? number.y : four.y);
      } else {
        node = carried[in_block];
      }
      if (restarts_here) {
        if (population.count_restarts != 0) visit(node);
        ++at;
      }
      bool goes_on = at < steps && follows(number = mine[at]);
      std::int32_t position = 0;
      std::int32_t drawn = -1;
      if (goes_on) {
        position = __ldg(edges.positions + node);
        drawn = edges.draw(node, number.y);
      }
      while (goes_on) {
        // The row of the next node is read before it is known that the edge to it is live.
        const uint2 used = number;
        std::int32_t next = drawn;
        const std::int32_t assumed = max(next, 0);
        std::int32_t next_position = __ldg(edges.positions + assumed);
        ++at;
        goes_on = at < steps && follows(number = mine[at]);
        if (goes_on) drawn = edges.draw(assumed, number.y);
        bool counts = true;
        if (next < 0 || next_position < 0 || next_position >= position) {
          const std::uint64_t again = used.x - rules.restart_threshold;
          next = edges.draw_live(node, position,
                                 static_cast<std::uint32_t>((again << 32U) / follow_range));
          if (next < 0) {
            next = restarts.draw(used.y);
            counts = population.count_restarts != 0;
          }
          next_position = __ldg(edges.positions + next);
          if (goes_on) drawn = edges.draw(next, number.y);
        }
        if (counts) visit(next);
        node = next;
        position = next_position;
      }
      if (at == steps) carried[in_block] = node;
    }
    if (begin + steps < rules.walk_length) __syncthreads();
  }
}

__global__ void __launch_bounds__(kAddThreads)
    accumulate_kernel(Launch launch, LayerView shape, float decay, unsigned blocks_a_graph) {
  GraphTask task;
  if (!find(launch, shape, blockIdx.x / blocks_a_graph, task)) return;
  const LayerView& layer = layer_of(launch, shape, task);
  const std::int64_t j = std::int64_t{blockIdx.x % blocks_a_graph} * kAddThreads + threadIdx.x;
  if (j >= layer.counters->length) return;
  float* const scores = scores_of(layer, task.sequence, task.graph, task.population);
  const auto visits =
      static_cast<float>(visits_of(layer, task.sequence, task.graph, task.population)[j]);
  scores[j] = decay == 0.0F ? visits : __fadd_rn(__fmul_rn(decay, scores[j]), visits);
}

__global__ void __launch_bounds__(kAddThreads)
    distribution_kernel(LayerView layer, WalkRules rules, int population, unsigned blocks_a_graph,
                        TableView<float> out) {
  if (has_fault(layer)) return;
  const std::int64_t graph = blockIdx.x / blocks_a_graph;
  const std::int64_t b = graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  const std::int64_t j = std::int64_t{blockIdx.x % blocks_a_graph} * kAddThreads + threadIdx.x;
  if (j >= layer.counters->length) return;
  const std::uint64_t total = restart_table_of(layer, b, g, population).header->total;
  const std::uint32_t weight = restart_weights(layer, rules, b, g, population)(j);
  out.data[b * out.sequence_stride + g * out.head_stride + j * out.slot_stride] =
      total == 0 ? 0.0F
                 : static_cast<float>(static_cast<double>(weight) / static_cast<double>(total));
}

void launch_prepare(const Launch& launch, const LayerView& shape, const WalkRules& rules,
                    std::int64_t graphs, std::int64_t extent, bool walks, cudaStream_t stream) {
  unsigned cluster = 1;
  while (cluster < kMostTableCluster && cluster * kTableSlots < extent) cluster *= 2;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {.x = cluster, .y = 1, .z = 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(graphs) * cluster);
  config.blockDim = dim3(kTableThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, prepare_kernel, launch, shape, rules, walks), "prepare_kernel");
}

template <int kTopK, bool kWeighted>
void launch_walkers(const Launch& launch, const LayerView& shape, const WalkRules& rules,
                    std::int64_t graphs, cudaStream_t stream) {
  std::int64_t most = 0;
  std::int64_t walkers = 0;
  for (int p = 0; p < rules.populations; ++p) {
    most = std::max(most, rules.population[p].walkers);
    walkers += rules.population[p].walkers;
  }
  if (most == 0) return;
  walkers *= graphs / rules.populations;
  const std::int64_t rounds = (rules.walk_length + kMostSteps - 1) / kMostSteps;
  const std::int64_t steps = (rules.walk_length + rounds - 1) / rounds;
  const std::int64_t a_block =
      std::clamp((walkers + kWalkBlocks - 1) / kWalkBlocks, std::int64_t{1},
                 std::min(most, kMostWalkThreads / steps));
  const std::int64_t blocks = (most + a_block - 1) / a_block;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(graphs * blocks));
  config.blockDim = dim3(static_cast<unsigned>((a_block * steps + 31) / 32 * 32));
  config.dynamicSmemBytes = kMostCoarseSums * sizeof(std::uint64_t) +
                            config.blockDim.x * sizeof(uint2) +
                            (config.blockDim.x / static_cast<unsigned>(steps) + 1) * 4;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, walk_kernel<kTopK, kWeighted>, launch, shape, rules,
                           static_cast<unsigned>(blocks), static_cast<int>(a_block),
                           static_cast<int>(steps)),
        "walk_kernel");
}

template <int kTopK>
void launch_walkers_by_law(const Launch& launch, const LayerView& shape, const WalkRules& rules,
                           std::int64_t graphs, cudaStream_t stream) {
  if (shape.weighted) {
    launch_walkers<kTopK, true>(launch, shape, rules, graphs, stream);
  } else {
    launch_walkers<kTopK, false>(launch, shape, rules, graphs, stream);
  }
}

}  // namespace

void launch_walk(const LayerView* layers, int count, const LayerView& shape, const WalkRules& rules,
                 std::int64_t most_batch, std::int64_t most_extent, std::int64_t first_sequence,
                 const SequenceMarks& marks, cudaStream_t stream) {
  const Launch launch = launch_of(layers, most_batch, first_sequence, marks);
  const std::int64_t graphs = count * launch.sequences * shape.graphs * shape.populations;
  if (graphs <= 0) return;
  launch_prepare(launch, shape, rules, graphs, most_extent, true, stream);
  switch (shape.top_k) {
    case 4:
      launch_walkers_by_law<4>(launch, shape, rules, graphs, stream);
      break;
    case 8:
      launch_walkers_by_law<8>(launch, shape, rules, graphs, stream);
      break;
    case 16:
      launch_walkers_by_law<16>(launch, shape, rules, graphs, stream);
      break;
    default:
      launch_walkers_by_law<32>(launch, shape, rules, graphs, stream);
  }
  if (shape.visits == nullptr || most_extent == 0) return;
  const std::int64_t blocks = (most_extent + kAddThreads - 1) / kAddThreads;
  accumulate_kernel<<<static_cast<unsigned>(graphs * blocks), kAddThreads, 0, stream>>>(
      launch, shape, rules.decay, static_cast<unsigned>(blocks));
  check(cudaGetLastError(), "accumulate_kernel");
}

void launch_restart_tables(const LayerView* layers, int count, const LayerView& shape,
                           const WalkRules& rules, std::int64_t most_batch,
                           std::int64_t most_extent, std::int64_t first_sequence,
                           const SequenceMarks& marks, cudaStream_t stream) {
  const Launch launch = launch_of(layers, most_batch, first_sequence, marks);
  const std::int64_t graphs = count * launch.sequences * shape.graphs * shape.populations;
  if (graphs > 0) launch_prepare(launch, shape, rules, graphs, most_extent, false, stream);
}

void launch_restart_distribution(const LayerView& layer, const WalkRules& rules, int population,
                                 const TableView<float>& out, std::int64_t extent,
                                 cudaStream_t stream) {
  SequenceMarks all{};
  std::fill(std::begin(all.bits), std::end(all.bits), ~0U);
  for (std::int64_t b = 0; b < layer.batch; b += SequenceMarks::kMost) {
    launch_restart_tables(nullptr, 1, layer, rules, layer.batch, extent, b, all, stream);
  }
  const std::int64_t blocks = (extent + kAddThreads - 1) / kAddThreads;
  distribution_kernel<<<static_cast<unsigned>(layer.batch * layer.graphs * blocks), kAddThreads, 0,
                        stream>>>(layer, rules, population, static_cast<unsigned>(blocks), out);
  check(cudaGetLastError(), "distribution_kernel");
}

}  // namespace spectralkv::cuda
