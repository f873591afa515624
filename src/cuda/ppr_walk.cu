// Personalized PageRank by random walks: the draws of src/cpu/ppr_walk.cpp, number for number.
#include <cuda_pipeline.h>
#include <curand_kernel.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_tasks.cuh"
#include "cuda/device/restart.cuh"
#include "cuda/device/thread_cluster.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_shape.h"

namespace spectralkv::cuda {
namespace {

constexpr int kTableThreads = 1024;
/// Slots that a thread block of a table takes at once.
constexpr std::int64_t kTableSlots = std::int64_t{kTableThreads} * kRestartBlock;
constexpr unsigned kMostTableCluster = 8;
/// Up to so many walkers a launch, waiting for memory is what takes time, not work.
constexpr std::int64_t kFewWalkers = 2048;
constexpr int kWalkThreads = 256;
constexpr int kMostRunThreads = 640;
/// Steps of a walker that are drawn at once.
constexpr std::int64_t kMostSteps = 32;
constexpr std::int64_t kMostGridY = 65535;
/// Thread blocks that runs are spread over before these grow.
constexpr std::int64_t kRunBlocks = 128;
constexpr int kAddThreads = 256;

// Below sm_90 a launch begins when the one in front of it is done.
__device__ void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ void wait_for_launch_in_front() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

__host__ __device__ bool is_novelty(const WalkRules& rules, int population) {
  return rules.population[population].restart == static_cast<std::int32_t>(Restart::novelty);
}

/// Whether slots [0, length) ascend with positions and none is empty.
__device__ bool has_dense_slots(const LayerView& layer, std::int64_t b) {
  const std::int32_t ordered = layer.counters->ordered;
  const std::int64_t held = layer.sequences[b].held;
  return ordered != 0 && held == layer.counters->length;
}

/// First slot of ascending positions, without empty slots, that is `first` or above. One warp;
/// `while_waiting` is done once, while memory is waited for.
template <class Work>
__device__ std::int32_t first_slot_from(const std::int32_t* positions, std::int64_t length,
                                        std::int64_t seen, std::int32_t first,
                                        Work&& while_waiting) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto high = static_cast<std::int32_t>(length);
  // At most seen - first tokens can be as new.
  auto low =
      static_cast<std::int32_t>(max(std::int64_t{0}, length - max(std::int64_t{0}, seen - first)));
  // Most often the answer is the lowest that it can be.
  std::int32_t step = 1;
  std::int32_t position = low + lane < high ? __ldg(positions + low + lane) : first;
  while_waiting();
  while (low < high) {
    const int count = __popc(__ballot_sync(0xffffffffU, position < first));
    if (count < 32) high = min(high, low + count * step);
    if (count > 0) low += (count - 1) * step + 1;
    step = max(1, (high - low + 31) / 32);
    const std::int32_t probe = low + lane * step;
    position = probe < high ? __ldg(positions + probe) : first;
  }
  return low;
}

/// Fills the table of one population of one graph; all threads of the cluster take part. Where
/// slots ascend with positions and none is empty, a search takes the place of sums.
__device__ void fill_restart_table(const LayerView& layer, const WalkRules& rules, std::int64_t b,
                                   std::int64_t g, int p) {
  __shared__ std::uint64_t warp_sums[kTableThreads / 32];
  __shared__ std::uint64_t totals[2];  // by turns: the other one may still be read
  const std::int64_t length = length_of(layer, g);
  const RestartWeights weights = restart_weights(layer, rules, b, g, p);
  const RestartTable table = restart_table_of(layer, b, g, p);
  const int cluster = cluster_size();
  const int rank = cluster_rank();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;

  if (weights.novelty == nullptr && has_dense_slots(layer, b)) {
    if (rank != 0 || warp != 0) return;
    const std::int32_t first =
        first_slot_from(weights.positions, length, layer.sequences[b].seen, weights.first, [] {});
    if (lane == 0) {
      *table.header = {
          .total = static_cast<std::uint64_t>(length - first), .first = first, .coarse = 0};
    }
    return;
  }

  const bool aligned = has_quads(layer, g);
  const std::int64_t room = room_of(layer, g);
  const std::int64_t group = layer.restart_group;
  const std::int64_t coarse = (length + group * kRestartBlock - 1) / (group * kRestartBlock);
  const std::int64_t blocks = coarse * group;
  const std::int64_t a_round = std::int64_t{cluster} * kTableThreads;
  std::uint64_t carry = 0;
  for (std::int64_t start = 0, round = 0; start < blocks; start += a_round, ++round) {
    const std::int64_t block = start + std::int64_t{rank} * kTableThreads + threadIdx.x;
    const std::int64_t slot = block * kRestartBlock;
    std::uint64_t sum = 0;
    if (slot < length) {
      std::int32_t positions[kRestartBlock];
      std::uint32_t novelty[kRestartBlock] = {};
      load_block(weights.positions, slot, room, aligned, positions);
      if (weights.novelty != nullptr) {
        load_block(weights.novelty, slot, room, aligned, novelty);
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
    cluster_sync(cluster);
    std::uint64_t total = carry;
    std::uint64_t in_front = carry;
    for (int r = 0; r < cluster; ++r) {
      const std::uint64_t its = *copy_in_block(&totals[round % 2], r);
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
    *table.header = {.total = carry, .first = 0, .coarse = static_cast<std::int32_t>(coarse)};
  }
  cluster_sync(cluster);  // others may still read this block's totals
}

/// Zeroes the slots [0, length) of an array; all threads of the cluster take part.
template <class T>
__device__ void clear(T* values, std::int64_t length, bool aligned) {
  const int cluster = cluster_size();
  const std::int64_t threads = std::int64_t{cluster} * kTableThreads;
  const std::int64_t thread = std::int64_t{cluster_rank()} * kTableThreads + threadIdx.x;
  const std::int64_t quads = aligned ? length / 4 : 0;
  for (std::int64_t i = thread; i < quads; i += threads) {
    reinterpret_cast<uint4*>(values)[i] = uint4{};
  }
  for (std::int64_t i = quads * 4 + thread; i < length; i += threads) values[i] = T{0};
}

/// A cluster a graph and population: its restart table and, before a walk, empty counts. Walks find
/// tables by novelty ready.
template <bool kOne>
__global__ void __launch_bounds__(kTableThreads)
    prepare_kernel(Launch launch, LayerView shape, WalkRules rules, bool walks) {
  let_next_launch_begin();
  GraphTask task;
  if (!find<kOne>(launch, shape, static_cast<unsigned>(cluster_index()), task)) return;
  const LayerView& layer = layer_of<kOne>(launch, shape, task);
  const std::int64_t b = task.sequence;
  const std::int64_t length = length_of(layer, task.graph);
  const bool dense = has_dense_slots(layer, b);
  if (has_fault(layer)) return;
  if (walks) {
    const bool aligned = has_quads(layer, task.graph);
    if (layer.visits != nullptr) {
      clear(visits_of(layer, b, task.graph, task.population), length, aligned);
    } else {
      clear(scores_of(layer, b, task.graph, task.population), length, aligned);
    }
  }
  if (walks && dense) return;  // walkers find their way alone
  if (walks && is_novelty(rules, task.population)) return;
  fill_restart_table(layer, rules, b, task.graph, task.population);
}

constexpr std::int32_t kNone = -1;   ///< a number that means no edge
constexpr std::int32_t kEmpty = -2;  ///< a row without edges

/// The edges of one graph.
template <int kTopK, RowFormat kFormat>
struct Edges {
  static constexpr int kRowWords = detail::words_of_row(kFormat, kTopK);
  const std::uint32_t* rows;
  const std::int32_t* positions;

  __device__ const std::uint32_t* row(std::int32_t slot) const {
    return rows + static_cast<std::int64_t>(slot) * kRowWords;
  }
  __device__ std::int32_t position(std::int32_t slot) const { return __ldg(positions + slot); }

  /// The edge that a number means, stale or not. Short rows are read as a whole, so that a step
  /// waits for memory once.
  __device__ std::int32_t draw(std::int32_t slot, std::uint32_t random) const {
    const std::uint32_t* edges = row(slot);
    if constexpr (kFormat == RowFormat::slots) {
      return neighbor(__ldg(edges + ((static_cast<std::uint64_t>(kTopK) * random) >> 32U)));
    }
    // An edge is passed over where its threshold is `reached` at most: words of packed rows are
    // compared as they lie.
    constexpr bool kPacked = kFormat == RowFormat::packed;
    constexpr int kFours = kTopK / 4;
    const std::uint32_t reached = kPacked ? detail::highest_reached(random) : random;
    const auto* from = reinterpret_cast<const uint4*>(edges + (kPacked ? 0 : kTopK));
    uint4 thresholds[kFours];
#pragma unroll
    for (int i = 0; i < kFours; ++i) thresholds[i] = __ldg(from + i);
    std::uint32_t next = 0;
    if constexpr (kTopK <= 8) {
      uint4 neighbors[kFours];
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        neighbors[i] = thresholds[i];
        if constexpr (!kPacked) neighbors[i] = __ldg(reinterpret_cast<const uint4*>(edges) + i);
      }
      // Choices of two, then of four: the shortest chain.
      std::uint32_t of_four[kFours];
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const std::uint32_t low = reached >= thresholds[i].x ? neighbors[i].y : neighbors[i].x;
        const std::uint32_t high = reached >= thresholds[i].z ? neighbors[i].w : neighbors[i].z;
        of_four[i] = reached >= thresholds[i].y ? high : low;
      }
      next = of_four[0];
      if constexpr (kFours == 2) next = reached >= thresholds[0].w ? of_four[1] : next;
      if (reached >= thresholds[kFours - 1].w) next = ~0U;
    } else {
      int k = 0;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        k += (reached >= thresholds[i].x ? 1 : 0) + (reached >= thresholds[i].y ? 1 : 0) +
             (reached >= thresholds[i].z ? 1 : 0) + (reached >= thresholds[i].w ? 1 : 0);
      }
      next = k < kTopK ? __ldg(edges + k) : ~0U;
    }
    const std::uint32_t last = thresholds[kFours - 1].w;
    return (kPacked ? last >> 16U : last) == 0 ? kEmpty : neighbor(next);
  }

  /// A draw among the live edges only; kNone: there are none.
  __device__ std::int32_t draw_live(std::int32_t slot, std::int32_t from_position,
                                    std::uint32_t random) const {
    const std::uint32_t* edges = row(slot);
    std::int32_t to[kTopK];
#pragma unroll
    for (int k = 0; k < kTopK; k += 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(edges + k));
      to[k] = neighbor(four.x);
      to[k + 1] = neighbor(four.y);
      to[k + 2] = neighbor(four.z);
      to[k + 3] = neighbor(four.w);
    }
#pragma unroll
    for (int k = 0; k < kTopK; ++k) to[k] = to[k] >= 0 ? position(to[k]) : -1;
    std::uint32_t live = 0;
    std::uint64_t total = 0;
#pragma unroll
    for (int k = 0; k < kTopK; ++k) {
      if (to[k] < 0 || to[k] >= from_position) continue;
      live |= 1U << k;
      total += width(edges, k);
    }
    const std::uint64_t target = (total * random) >> 32U;
    std::uint64_t sum = 0;
    for (; live != 0; live &= live - 1) {
      const int k = __ffs(static_cast<int>(live)) - 1;
      sum += width(edges, k);
      if (target < sum) return neighbor(__ldg(edges + k));
    }
    return kNone;
  }

 private:
  static_assert(kNone == -1, "what words without an edge mean");
  __device__ static std::int32_t neighbor(std::uint32_t word) {
    if constexpr (kFormat == RowFormat::packed) return detail::packed_slot(word);
    return static_cast<std::int32_t>(word);
  }
  __device__ static std::uint32_t threshold(const std::uint32_t* edges, int k) {
    if constexpr (kFormat == RowFormat::packed) return detail::packed_threshold(__ldg(edges + k));
    return __ldg(edges + kTopK + k);
  }
  __device__ static std::uint32_t width(const std::uint32_t* edges, int k) {
    if constexpr (kFormat == RowFormat::slots) return 1U;
    return threshold(edges, k) - (k == 0 ? 0U : threshold(edges, k - 1));
  }
};

/// What the thread blocks of one graph and population share.
template <int kTopK, RowFormat kFormat, EdgeLaw kLaw>
struct Walk {
  Edges<kTopK, kFormat> edges;
  Restarts restarts;
  std::uint32_t* counts;  ///< or float
  bool counts_integers;
  std::uint64_t threshold;
  std::uint64_t first_block;  ///< of this walk in every walker's stream
  std::uint64_t stream;       ///< of the population's first walker
  uint2 key;
  bool counts_restarts;

  __device__ void visit(std::int32_t slot) const {
    // Said in PTX: an atomicAdd on a pointer that was read from memory waits for an answer, since
    // it might point to shared memory.
    if (counts_integers) {
      asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counts + slot) : "memory");
    } else {
      asm volatile("red.relaxed.gpu.global.add.f32 [%0], 0f3F800000;" ::"l"(counts + slot)
                   : "memory");
    }
  }
  __device__ bool follows(uint2 number) const { return number.x >= threshold; }
  /// Four numbers of a walker's stream.
  __device__ uint4 numbers(std::uint64_t walker, std::uint64_t block) const {
    const std::uint64_t counter = first_block + block;
    return curand_Philox4x32_10(
        uint4{static_cast<unsigned>(counter), static_cast<unsigned>(counter >> 32U),
              static_cast<unsigned>(stream + walker),
              static_cast<unsigned>((stream + walker) >> 32U)},
        key);
  }
  /// Where a walker goes that drew no live edge. What decided to follow an edge is, rescaled,
  /// uniform again; the number that drew the edge is not once it has said that there is a restart.
  __device__ std::int32_t leave(std::int32_t node, std::int32_t position, std::int32_t drawn,
                                uint2 number, bool& counts) const {
    const auto again = [&] {
      const std::uint64_t range = (std::uint64_t{1} << 32U) - threshold;
      return static_cast<std::uint32_t>(((number.x - threshold) << 32U) / range);
    };
    if constexpr (kLaw == EdgeLaw::attention) {
      counts = counts_restarts;
      return restarts.draw(again());
    } else {
      std::int32_t next = kNone;
      if (drawn != kEmpty) next = edges.draw_live(node, position, again());
      counts = next >= 0 || counts_restarts;
      return next >= 0 ? next : restarts.draw(number.y);
    }
  }
};

/// How the walkers of a launch are parted.
struct Parts {
  unsigned blocks_a_graph;
  unsigned blocks_a_sequence;  ///< that walk
  int walkers_a_block;
  int steps_a_round;
};

/// The last thread block that has read where the numbers of a sequence's walk start moves that on.
class Ticket {
 public:
  __device__ void take(const LayerView& layer, std::int64_t b, unsigned blocks) {
    last_ = atomicInc(layer.walk_tickets + b, blocks - 1) == blocks - 1;
  }
  __device__ void finish(const LayerView& layer, std::int64_t b, const WalkRules& rules) const {
    if (!last_) return;
    SequenceCounters& counters = layer.sequences[b];
    counters.walk_block += (static_cast<std::uint64_t>(rules.walk_length) + 2) / 2;
    counters.walked_at = counters.seen;
  }

 private:
  bool last_ = false;
};

/// Collects what a thread block needs, and copies the coarse restart sums; false where it has
/// nothing to do. `while_waiting` is done once, when Walk::numbers can be asked for; the caller
/// synchronizes the thread block. That must not count visits before the launch in front is done,
/// which empties the counts and fills tables by position; all else may come earlier.
template <int kTopK, RowFormat kFormat, EdgeLaw kLaw, class Work>
__device__ bool set_up(const LayerView& layer, const GraphTask& task, const WalkRules& rules,
                       std::uint64_t* coarse, Walk<kTopK, kFormat, kLaw>& walk,
                       Work&& while_waiting) {
  const std::int64_t b = task.sequence;
  const std::int64_t g = task.graph;
  const int p = task.population;
  // What does not depend on each other is asked for at once.
  const std::uint32_t fault = __ldcg(&layer.fault->fault);
  const LayerCounters* const counters = layer.counters;
  const SequenceCounters* const sequence = layer.sequences + b;
  const std::int64_t length = __ldcg(&counters->length);
  const std::int32_t ordered = __ldcg(&counters->ordered);
  const std::int64_t held = __ldcg(&sequence->held);
  const std::int64_t seen = __ldcg(&sequence->seen);
  walk.first_block = __ldcg(&sequence->walk_block);
  const RestartTable table = restart_table_of(layer, b, g, p);
  walk.edges = {row_of(layer, b, g, 0), positions_of(layer, b, g)};
  walk.counts_integers = layer.visits != nullptr;
  walk.counts = layer.visits != nullptr
                    ? visits_of(layer, b, g, p)
                    : reinterpret_cast<std::uint32_t*>(scores_of(layer, b, g, p));
  walk.threshold = rules.restart_threshold;
  walk.stream =
      (static_cast<std::uint64_t>(layer.index * rules.first_stream_of_layer + rules.head_offset + g)
       << 32U) +
      static_cast<std::uint64_t>(rules.population[p].first_walker);
  walk.key = {static_cast<unsigned>(rules.seed), static_cast<unsigned>(rules.seed >> 32U)};
  walk.counts_restarts = rules.population[p].count_restarts != 0;
  Restarts& restarts = walk.restarts;
  restarts.coarse = coarse;
  restarts.coarse_step = 0;
  restarts.fine = table.fine;
  restarts.group = layer.restart_group;
  restarts.aligned = has_quads(layer, g);
  restarts.room = static_cast<std::int32_t>(room_of(layer, g));
  restarts.weights = {walk.edges.positions, nullptr, 0, static_cast<std::int32_t>(seen)};
  const auto read_table = [&] {
    const uint4 header = __ldcg(reinterpret_cast<const uint4*>(table.header));
    const auto sums = static_cast<std::int32_t>(table.fine - table.coarse);
    for (auto i = 2 * static_cast<std::int32_t>(threadIdx.x); i < sums;
         i += 2 * static_cast<std::int32_t>(blockDim.x)) {
      __pipeline_memcpy_async(coarse + i, table.coarse + i, 2 * sizeof(std::uint64_t));
    }
    restarts.header = {.total = std::uint64_t{header.y} << 32U | header.x,
                       .first = static_cast<std::int32_t>(header.z),
                       .coarse = static_cast<std::int32_t>(header.w)};
  };
  if (is_novelty(rules, p)) {
    restarts.weights.novelty = novelty_of(layer, b, g);
    read_table();
  } else {
    restarts.weights.first = first_recent(layer, rules, seen, p);
    if (ordered != 0 && held == length) {
      const std::int32_t first = first_slot_from(walk.edges.positions, length, seen,
                                                 restarts.weights.first, while_waiting);
      restarts.header = {
          .total = static_cast<std::uint64_t>(length - first), .first = first, .coarse = 0};
      return fault == 0;
    }
    wait_for_launch_in_front();
    read_table();
  }
  while_waiting();
  __pipeline_commit();
  __pipeline_wait_prior(0);
  if (restarts.header.coarse > 0) restarts.coarse_step = 1 << (31 - __clz(restarts.header.coarse));
  return fault == 0;
}

/// One thread a walker.
template <int kTopK, RowFormat kFormat, EdgeLaw kLaw>
__global__ void __launch_bounds__(kWalkThreads, 4)
    walk_kernel(Launch launch, LayerView shape, WalkRules rules, Parts parts) {
  __shared__ __align__(16) std::uint64_t coarse[kMostCoarseSums];
  GraphTask task;
  if (!find<false>(launch, shape, blockIdx.x / parts.blocks_a_graph, task)) return;
  const LayerView& layer = layer_of<false>(launch, shape, task);
  const std::int64_t walkers = rules.population[task.population].walkers;
  const std::int64_t first = std::int64_t{blockIdx.x % parts.blocks_a_graph} * kWalkThreads;
  if (first >= walkers) return;
  Walk<kTopK, kFormat, kLaw> walk;
  const auto walker = static_cast<std::uint64_t>(first) + threadIdx.x;
  uint4 four;
  if (!set_up(layer, task, rules, coarse, walk, [&] { four = walk.numbers(walker, 0); })) return;
  __syncthreads();
  Ticket ticket;
  if (threadIdx.x == kWalkThreads - 1) {
    ticket.take(layer, task.sequence, parts.blocks_a_sequence);
    ticket.finish(layer, task.sequence, rules);
  }
  if (walker >= static_cast<std::uint64_t>(walkers) || walk.restarts.header.total == 0) return;

  // A step's edge is drawn when its node is reached, before it is known that the edge to the node
  // is live: a step waits for memory once.
  uint2 number{four.z, four.w};
  bool follows = walk.follows(number);
  std::int32_t node = walk.restarts.draw(four.y);
  std::int32_t position = 0;
  std::int32_t drawn = kNone;
  if (follows) {
    position = walk.edges.position(node);
    drawn = walk.edges.draw(node, number.y);
  }
  wait_for_launch_in_front();
  const auto steps = static_cast<std::uint64_t>(rules.walk_length);
  for (std::uint64_t step = 0; step < steps; ++step) {
    if (step % 2 == 0) four = walk.numbers(walker, step / 2 + 1);
    const uint2 next_number = step % 2 == 0 ? uint2{four.x, four.y} : uint2{four.z, four.w};
    const bool next_follows = step + 1 < steps && walk.follows(next_number);
    std::int32_t next = follows ? drawn : walk.restarts.draw(number.y);
    const std::int32_t assumed = max(next, 0);
    const std::int32_t used = drawn;
    std::int32_t next_position = 0;
    if (follows || next_follows) next_position = walk.edges.position(assumed);
    if (next_follows) drawn = walk.edges.draw(assumed, next_number.y);
    bool counts = follows || walk.counts_restarts;
    if (follows && (next < 0 || next_position < 0 || next_position >= position)) {
      next = walk.leave(node, position, used, number, counts);
      next_position = walk.edges.position(next);
      if (next_follows) drawn = walk.edges.draw(next, next_number.y);
    }
    if (counts) walk.visit(next);
    node = next;
    position = next_position;
    number = next_number;
    follows = next_follows;
  }
}

/// One thread a step of a walker, for walks of one layer. What a walker does after a restart does
/// not depend on what it did before, so every restart that the numbers foretell starts a run of its
/// own, up to the next such restart: the longest wait is for the longest run of edges, not for all
/// steps. Restarts where a walker meets a dead end belong to the run that meets it.
template <int kTopK, RowFormat kFormat, EdgeLaw kLaw>
__global__ void __launch_bounds__(kMostRunThreads)
    walk_runs_kernel(Launch launch, LayerView layer, WalkRules rules, Parts parts) {
  extern __shared__ __align__(16) std::uint64_t coarse[];
  auto* const numbers = reinterpret_cast<uint2*>(coarse + kMostCoarseSums);
  auto* const carried = reinterpret_cast<std::int32_t*>(numbers + blockDim.x);

  GraphTask task;
  if (!find<true>(launch, layer, blockIdx.y, task)) return;
  const std::int64_t walkers = rules.population[task.population].walkers;
  const std::int64_t first = std::int64_t{blockIdx.x} * parts.walkers_a_block;
  if (first >= walkers) return;
  Walk<kTopK, kFormat, kLaw> walk;
  const int thread = static_cast<int>(threadIdx.x);
  const int in_block = thread / parts.steps_a_round;
  const int turn = thread - in_block * parts.steps_a_round;
  // Two numbers for the start and for every step.
  uint4 four;
  uint2 number;
  const auto draw_numbers = [&](std::int64_t step) {
    four = walk.numbers(static_cast<std::uint64_t>(first + in_block),
                        static_cast<std::uint64_t>((step + 1) / 2));
    number = step % 2 == 0 ? uint2{four.z, four.w} : uint2{four.x, four.y};
    numbers[thread] = number;
  };
  if (!set_up(layer, task, rules, coarse, walk, [&] { draw_numbers(turn); })) return;
  __syncthreads();
  Ticket ticket;
  if (threadIdx.x + 1 == blockDim.x) ticket.take(layer, task.sequence, parts.blocks_a_sequence);
  const bool walks = in_block < parts.walkers_a_block && first + in_block < walkers &&
                     walk.restarts.header.total != 0;
  const uint2* const mine = numbers + in_block * parts.steps_a_round;
  for (std::int64_t begin = 0; begin < rules.walk_length; begin += parts.steps_a_round) {
    if (begin > 0) {
      __syncthreads();
      draw_numbers(begin + turn);
      __syncthreads();
    }
    const int steps =
        static_cast<int>(min(std::int64_t{parts.steps_a_round}, rules.walk_length - begin));
    const bool restarts_here = !walk.follows(number);
    const bool runs = walks && turn < steps && (restarts_here || turn == 0);
    std::int32_t node = 0;
    std::int32_t position = 0;
    std::int32_t drawn = kNone;
    const auto follows_at = [&](int step_at, uint2& out) {
      if (step_at < steps) out = mine[step_at];
      return step_at < steps && walk.follows(out);
    };
    int at = restarts_here ? turn + 1 : turn;  // steps done
    uint2 next_number = number;
    bool goes_on = false;
    bool goes_on_next = false;
    if (runs) {
      if (restarts_here || begin == 0) {
        node = walk.restarts.draw(restarts_here ? number.y : four.y);
      } else {
        node = carried[in_block];
      }
      goes_on = follows_at(at, number);
      if (goes_on) {
        position = walk.edges.position(node);
        drawn = walk.edges.draw(node, number.y);
        goes_on_next = follows_at(at + 1, next_number);
      }
    }
    if (begin == 0) wait_for_launch_in_front();
    if (!runs) continue;
    if (restarts_here && walk.counts_restarts) walk.visit(node);
    while (goes_on) {
      // The edge behind the next node is drawn before it is known that the edge to it is live.
      std::int32_t next = drawn;
      const std::int32_t assumed = max(next, 0);
      std::int32_t next_position = walk.edges.position(assumed);
      if (goes_on_next) drawn = walk.edges.draw(assumed, next_number.y);
      const uint2 used = number;
      number = next_number;
      goes_on = goes_on_next;
      ++at;
      goes_on_next = goes_on && follows_at(at + 1, next_number);
      bool counts = true;
      if (next < 0 || next_position < 0 || next_position >= position) {
        next = walk.leave(node, position, next, used, counts);
        next_position = walk.edges.position(next);
        if (goes_on) drawn = walk.edges.draw(next, number.y);
      }
      if (counts) walk.visit(next);
      node = next;
      position = next_position;
    }
    if (at == steps) carried[in_block] = node;
  }
  ticket.finish(layer, task.sequence, rules);
}

__global__ void __launch_bounds__(kAddThreads)
    accumulate_kernel(Launch launch, LayerView shape, WalkRules rules, unsigned blocks_a_graph) {
  GraphTask task;
  if (!find<false>(launch, shape, blockIdx.x / blocks_a_graph, task)) return;
  const LayerView& layer = layer_of<false>(launch, shape, task);
  const std::int64_t j = std::int64_t{blockIdx.x % blocks_a_graph} * kAddThreads + threadIdx.x;
  if (j >= length_of(layer, task.graph) || has_fault(layer)) return;
  float* const scores = scores_of(layer, task.sequence, task.graph, task.population);
  const auto visits =
      static_cast<float>(visits_of(layer, task.sequence, task.graph, task.population)[j]);
  const auto decay = static_cast<float>(rules.population[task.population].decay);
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
  const std::uint32_t weight =
      j < room_of(layer, g) ? restart_weights(layer, rules, b, g, population)(j) : 0U;
  out.data[b * out.sequence_stride + g * out.head_stride + j * out.slot_stride] =
      total == 0 ? 0.0F
                 : static_cast<float>(static_cast<double>(weight) / static_cast<double>(total));
}

void launch_prepare(const Launch& launch, const LayerView& shape, const WalkRules& rules,
                    std::int64_t graphs, std::int64_t extent, bool walks, cudaStream_t stream) {
  const unsigned most = device_attribute(cudaDevAttrClusterLaunch) != 0 ? kMostTableCluster : 1;
  unsigned cluster = 1;
  while (cluster < most && cluster * kTableSlots < extent) cluster *= 2;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {.x = cluster, .y = 1, .z = 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(graphs) * cluster);
  config.blockDim = dim3(kTableThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config,
                           launch.layers == nullptr ? prepare_kernel<true> : prepare_kernel<false>,
                           launch, shape, rules, walks),
        "prepare_kernel");
}

template <int kTopK, RowFormat kFormat, EdgeLaw kLaw>
void launch_walkers(const Launch& launch, bool one, const LayerView& shape, const WalkRules& rules,
                    std::int64_t graphs, cudaStream_t stream) {
  std::int64_t most = 0;
  std::int64_t walkers = 0;
  const PopulationList& walking = launch.populations;
  for (int i = 0; i < walking.count; ++i) {
    most = std::max(most, rules.population[walking.numbers[i]].walkers);
    walkers += rules.population[walking.numbers[i]].walkers;
  }
  if (most == 0) return;
  walkers *= graphs / walking.count;
  const bool few = one && walkers <= kFewWalkers && graphs <= kMostGridY;
  const std::int64_t rounds = (rules.walk_length + kMostSteps - 1) / kMostSteps;
  const std::int64_t steps = (rules.walk_length + rounds - 1) / rounds;
  const std::int64_t a_block =
      few ? std::min({(walkers + kRunBlocks - 1) / kRunBlocks, most, kMostRunThreads / steps})
          : kWalkThreads;
  std::int64_t of_a_graph = 0;
  for (int i = 0; i < walking.count; ++i) {
    of_a_graph += (rules.population[walking.numbers[i]].walkers + a_block - 1) / a_block;
  }
  const std::int64_t blocks = (most + a_block - 1) / a_block;
  const Parts parts{.blocks_a_graph = static_cast<unsigned>(blocks),
                    .blocks_a_sequence = static_cast<unsigned>(of_a_graph * shape.graphs),
                    .walkers_a_block = static_cast<int>(a_block),
                    .steps_a_round = static_cast<int>(steps)};
  // Starts while the launch in front runs, see set_up.
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(graphs * blocks));
  config.blockDim = dim3(kWalkThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  auto* kernel = walk_kernel<kTopK, kFormat, kLaw>;
  if (few) {
    kernel = walk_runs_kernel<kTopK, kFormat, kLaw>;
    config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(graphs));
    config.blockDim = dim3(static_cast<unsigned>((a_block * steps + 31) / 32 * 32));
    config.dynamicSmemBytes = kMostCoarseSums * sizeof(std::uint64_t) +
                              config.blockDim.x * sizeof(uint2) +
                              (config.blockDim.x / static_cast<unsigned>(steps) + 1) * 4;
  }
  check(cudaLaunchKernelEx(&config, kernel, launch, shape, rules, parts), "walk_kernel");
}

template <int kTopK>
void launch_walkers_by_law(const Launch& launch, bool one, const LayerView& shape,
                           const WalkRules& rules, std::int64_t graphs, cudaStream_t stream) {
  const auto launch_as = [&]<RowFormat kFormat, EdgeLaw kLaw>() {
    launch_walkers<kTopK, kFormat, kLaw>(launch, one, shape, rules, graphs, stream);
  };
  const bool is_packed = shape.format == RowFormat::packed;
  if (shape.law == EdgeLaw::uniform) {
    launch_as.template operator()<RowFormat::slots, EdgeLaw::uniform>();
  } else if (shape.law == EdgeLaw::weighted && is_packed) {
    launch_as.template operator()<RowFormat::packed, EdgeLaw::weighted>();
  } else if (shape.law == EdgeLaw::weighted) {
    launch_as.template operator()<RowFormat::wide, EdgeLaw::weighted>();
  } else if (is_packed) {
    launch_as.template operator()<RowFormat::packed, EdgeLaw::attention>();
  } else {
    launch_as.template operator()<RowFormat::wide, EdgeLaw::attention>();
  }
}

}  // namespace

void launch_walk(const LayerView* layers, int count, const LayerView& shape, const WalkRules& rules,
                 const PopulationList& populations, std::int64_t most_batch,
                 std::int64_t most_extent, std::int64_t first_sequence, const SequenceMarks& marks,
                 cudaStream_t stream) {
  const Launch launch = launch_of(layers, most_batch, first_sequence, marks, populations);
  const bool one = count == 1;
  const std::int64_t graphs = launch.tasks(count, shape);
  if (graphs <= 0) return;
  Launch by_value = launch;
  if (one) by_value.layers = nullptr;
  launch_prepare(by_value, shape, rules, graphs, most_extent, true, stream);
  switch (shape.top_k) {
    case 4:
      launch_walkers_by_law<4>(launch, one, shape, rules, graphs, stream);
      break;
    case 8:
      launch_walkers_by_law<8>(launch, one, shape, rules, graphs, stream);
      break;
    case 16:
      launch_walkers_by_law<16>(launch, one, shape, rules, graphs, stream);
      break;
    default:
      launch_walkers_by_law<32>(launch, one, shape, rules, graphs, stream);
  }
  if (shape.visits == nullptr || most_extent == 0) return;
  const std::int64_t blocks = (most_extent + kAddThreads - 1) / kAddThreads;
  accumulate_kernel<<<static_cast<unsigned>(graphs * blocks), kAddThreads, 0, stream>>>(
      launch, shape, rules, static_cast<unsigned>(blocks));
  check(cudaGetLastError(), "accumulate_kernel");
}

void launch_restart_tables(RestartTables which, const LayerView* layers, int count,
                           const LayerView& shape, const WalkRules& rules,
                           const PopulationList& populations, std::int64_t most_batch,
                           std::int64_t most_extent, std::int64_t first_sequence,
                           const SequenceMarks& marks, cudaStream_t stream) {
  PopulationList due{};
  for (int i = 0; i < populations.count; ++i) {
    const std::int32_t p = populations.numbers[i];
    const bool by_novelty = is_novelty(rules, p);
    if (by_novelty == (which == RestartTables::novelty)) due.numbers[due.count++] = p;
  }
  const Launch launch = launch_of(layers, most_batch, first_sequence, marks, due);
  const std::int64_t graphs = launch.tasks(count, shape);
  if (graphs > 0) launch_prepare(launch, shape, rules, graphs, most_extent, false, stream);
}

void launch_restart_distribution(const LayerView& layer, const WalkRules& rules, int population,
                                 const TableView<float>& out, std::int64_t extent,
                                 cudaStream_t stream) {
  SequenceMarks all{};
  std::fill(std::begin(all.bits), std::end(all.bits), ~0U);
  for (std::int64_t b = 0; b < layer.batch; b += SequenceMarks::kMost) {
    launch_restart_tables(RestartTables::recent, nullptr, 1, layer, rules,
                          {.count = 1, .numbers = {population}}, layer.batch, extent, b, all,
                          stream);
  }
  const std::int64_t blocks = (extent + kAddThreads - 1) / kAddThreads;
  distribution_kernel<<<static_cast<unsigned>(layer.batch * layer.graphs * blocks), kAddThreads, 0,
                        stream>>>(layer, rules, population, static_cast<unsigned>(blocks), out);
  check(cudaGetLastError(), "distribution_kernel");
}

}  // namespace spectralkv::cuda
