// Personalized PageRank without noise: one sweep from the newest token to the oldest, a run of
// tokens at a time.
//
// Edges point to older tokens only. So when a run's turn comes, all that arrives from newer runs
// has arrived; what its tokens send each other is passed on in rounds until what is still under way
// does not matter, and only then is what they send to older runs added there. Masses are integers,
// whose sums do not depend on their order: the result is the same at every call.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_tasks.cuh"
#include "cuda/device/restart.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffU;
/// Graphs that are solved side by side, one a thread block.
constexpr std::int64_t kMostSolvers = 132;
/// Bytes of a slot: the mass that arrived over edges, and two words to order slots.
constexpr std::int64_t kBytesASlot = 8 + 2 * 4;
/// A mass waits in its token while it is less than 2^-30 of what went through already.
constexpr int kIdleShift = 30;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

struct SolveRules {
  double restart_prob;
  double unit;  ///< what a mass of 1 is
  std::int64_t scratch_slots;
  std::int64_t steps[kMaxPopulations];
};

struct Scratch {
  unsigned long long* arrived;
  std::int32_t* order;  ///< slots, the newest token's first
  std::int32_t* rank;   ///< where a slot stands in `order`
};

template <int kThreads>
union Shared {
  /// Masses on their way to the tokens of a run, by turns: what arrives in a round goes on in the
  /// next. Two halves, since shared memory adds no 64-bit words at once.
  struct {
    std::uint32_t low[2][kThreads];
    std::uint32_t high[2][kThreads];
  } masses;
  struct {
    std::uint32_t counts[kThreads / 32][kDigits];
    std::uint32_t starts[kDigits];
  } sort;
};

/// Whether a slot with this position holds a token. New ones may come meanwhile: theirs are as
/// empty as they were.
__device__ bool is_seen(std::int32_t position, std::int64_t seen) {
  return position >= 0 && position < seen;
}

/// Orders slots by position, the newest first, empty slots last: radix sort by one thread block.
template <int kThreads>
__device__ void sort_newest_first(Shared<kThreads>& shared, const std::int32_t* positions,
                                  std::int64_t length, std::int64_t seen, Scratch& scratch) {
  auto& counts = shared.sort.counts;
  auto& starts = shared.sort.starts;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const auto key = [&](std::int32_t slot) {
    const std::int32_t position = positions[slot];
    return static_cast<std::uint32_t>(is_seen(position, seen) ? seen - 1 - position : seen);
  };
  std::int32_t* from = scratch.rank;
  std::int32_t* to = scratch.order;
  const int bits = 64 - __clzll(seen);
  for (int shift = 0; shift < bits || shift == 0; shift += kDigitBits) {
    const bool first_pass = shift == 0;
    const auto slot_at = [&](std::int64_t i) {
      return first_pass ? static_cast<std::int32_t>(i) : from[i];
    };
    const auto digit = [&](std::int32_t slot) { return key(slot) >> shift & (kDigits - 1U); };
    for (int d = thread; d < kDigits; d += kThreads) starts[d] = 0;
    __syncthreads();
    for (std::int64_t i = thread; i < length; i += kThreads) {
      atomicAdd(&starts[digit(slot_at(i))], 1U);
    }
    __syncthreads();
    if (warp == 0) {
      constexpr int kEach = kDigits / 32;
      std::uint32_t sum = 0;
      for (int i = 0; i < kEach; ++i) sum += starts[lane * kEach + i];
      std::uint32_t before = sum;
      for (int offset = 1; offset < 32; offset *= 2) {
        const std::uint32_t other = __shfl_up_sync(kAllLanes, before, offset);
        if (lane >= offset) before += other;
      }
      before -= sum;
      for (int i = 0; i < kEach; ++i) {
        const std::uint32_t count = starts[lane * kEach + i];
        starts[lane * kEach + i] = before;
        before += count;
      }
    }
    for (std::int64_t start = 0; start < length; start += kThreads) {
      for (int d = lane; d < kDigits; d += 32) counts[warp][d] = 0;
      __syncwarp();
      const std::int64_t i = start + thread;
      const std::int32_t slot = i < length ? slot_at(i) : 0;
      const std::uint32_t mine = i < length ? digit(slot) : kDigits;
      const unsigned peers = __match_any_sync(kAllLanes, mine);
      const unsigned in_front = __popc(peers & ((1U << lane) - 1U));
      if (in_front == 0 && i < length) counts[warp][mine] = __popc(peers);
      __syncthreads();
      for (int d = thread; d < kDigits; d += kThreads) {
        std::uint32_t next = starts[d];
        for (int w = 0; w < kThreads / 32; ++w) {
          const std::uint32_t count = counts[w][d];
          counts[w][d] = next;
          next += count;
        }
        starts[d] = next;
      }
      __syncthreads();
      if (i < length) to[counts[warp][mine] + in_front] = slot;
      __syncthreads();
    }
    std::int32_t* const sorted = to;
    to = from;
    from = sorted;
  }
  for (std::int64_t i = thread; i < length; i += kThreads)
    to[from[i]] = static_cast<std::int32_t>(i);
  scratch.order = from;
  scratch.rank = to;
  __syncthreads();
}

template <int kThreads>
__device__ void add_mass(Shared<kThreads>& shared, int turn, int to, unsigned long long mass) {
  const auto low = static_cast<std::uint32_t>(mass);
  const std::uint32_t before = atomicAdd(&shared.masses.low[turn][to], low);
  const auto high = static_cast<std::uint32_t>(mass >> 32U) + (before + low < low ? 1U : 0U);
  if (high != 0) atomicAdd(&shared.masses.high[turn][to], high);
}

template <int kTopK, RowFormat kFormat, EdgeLaw kLaw, int kThreads>
__global__ void __launch_bounds__(kThreads)
    solve_kernel(Launch launch, LayerView shape, WalkRules rules, SolveRules solve, unsigned tasks,
                 std::byte* scratch_bytes) {
  constexpr int kRowWords = detail::words_of_row(kFormat, kTopK);
  __shared__ Shared<kThreads> shared;
  __shared__ unsigned long long sum;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t slots = solve.scratch_slots;
  scratch_bytes += std::int64_t{blockIdx.x} * slots * kBytesASlot;

  for (unsigned index = blockIdx.x; index < tasks; index += gridDim.x) {
    GraphTask task;
    if (!find<false>(launch, shape, index, task)) continue;
    const LayerView& layer = layer_of<false>(launch, shape, task);
    if (has_fault(layer)) continue;
    const std::int64_t b = task.sequence;
    const std::int64_t g = task.graph;
    const int p = task.population;
    const std::int64_t length = length_of(layer, g);
    const bool ordered = layer.counters->ordered != 0;
    const std::int64_t seen = layer.sequences[b].seen;
    const std::int32_t* const positions = positions_of(layer, b, g);
    const std::uint32_t* const rows = row_of(layer, b, g, 0);
    const RestartWeights weight = restart_weights(layer, rules, b, g, p);
    const std::uint64_t weights = restart_table_of(layer, b, g, p).header->total;
    const auto restart = [&](std::int64_t slot) -> unsigned long long {
      if (weights == 0) return 0;
      return __double2ull_rn(static_cast<double>(weight(slot)) / static_cast<double>(weights) *
                             solve.unit);
    };
    Scratch scratch{.arrived = reinterpret_cast<unsigned long long*>(scratch_bytes),
                    .order = reinterpret_cast<std::int32_t*>(scratch_bytes + slots * 8),
                    .rank = reinterpret_cast<std::int32_t*>(scratch_bytes + slots * 12)};
    for (std::int64_t j = thread; j < length; j += kThreads) scratch.arrived[j] = 0;
    if (!ordered) {
      sort_newest_first<kThreads>(shared, positions, length, seen, scratch);
    }
    if (thread == 0) sum = 0;
    __syncthreads();

    unsigned long long total = 0;
    for (std::int64_t start = 0; start < length; start += kThreads) {
      const std::int64_t i = start + thread;
      const std::int64_t slot = i >= length ? -1 : ordered ? length - 1 - i : scratch.order[i];
      const std::int32_t position = slot >= 0 ? positions[slot] : -1;
      // Where edges lead: into the run (from 0 on), behind it (~slot), nowhere (no width).
      std::int32_t target[kTopK];
      std::uint32_t width[kTopK];
      std::uint64_t widths = 0;
#pragma unroll
      for (int k = 0; k < kTopK; ++k) width[k] = 0;
      unsigned long long from_restart = 0;
      unsigned long long mass = 0;
      if (is_seen(position, seen)) {
        const auto* row = reinterpret_cast<const uint4*>(rows + slot * kRowWords);
        std::uint32_t before = 0;
#pragma unroll
        for (int k = 0; k < kTopK; k += 4) {
          const uint4 to = __ldg(row + k / 4);
          uint4 thresholds{before + 1, before + 2, before + 3, before + 4};
          if constexpr (kFormat == RowFormat::wide) thresholds = __ldg(row + (kTopK + k) / 4);
          const std::uint32_t words[] = {to.x, to.y, to.z, to.w};
          std::uint32_t uppers[] = {thresholds.x, thresholds.y, thresholds.z, thresholds.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            target[k + e] = static_cast<std::int32_t>(words[e]);
            if constexpr (kFormat == RowFormat::packed) {
              target[k + e] = detail::packed_slot(words[e]);
              uppers[e] = detail::packed_threshold(words[e]);
            }
            width[k + e] = uppers[e] - before;
            before = uppers[e];
          }
        }
        from_restart = restart(slot);
        mass = from_restart + __ldcg(scratch.arrived + slot);
#pragma unroll
        for (int k = 0; k < kTopK; ++k) {
          if (width[k] != 0 && !is_live(positions, position, target[k])) width[k] = 0;
          widths += width[k];
          if (width[k] == 0) continue;
          const std::int64_t to =
              (ordered ? length - 1 - target[k] : scratch.rank[target[k]]) - start;
          target[k] = to < kThreads ? static_cast<std::int32_t>(to) : ~target[k];
        }
      }
      // What a row leaves over, or its stale edges held, is a restart.
      if constexpr (kLaw == EdgeLaw::attention) widths = std::uint64_t{1} << 32U;
      const double share =
          widths == 0 ? 0.0 : (1.0 - solve.restart_prob) / static_cast<double>(widths);
      const auto part = [&](unsigned long long sent, std::uint32_t of) {
        return __double2ull_rd(static_cast<double>(sent) * share * static_cast<double>(of));
      };

      shared.masses.low[0][thread] = 0;
      shared.masses.high[0][thread] = 0;
      shared.masses.low[1][thread] = 0;
      shared.masses.high[1][thread] = 0;
      unsigned long long waiting = mass;
      int moved = 0;
      int turn = 0;
      __syncthreads();
      do {
        moved = 0;
        if (waiting > mass >> kIdleShift) {
#pragma unroll
          for (int k = 0; k < kTopK; ++k) {
            if (width[k] == 0 || target[k] < 0) continue;
            const unsigned long long sent = part(waiting, width[k]);
            if (sent == 0) continue;
            add_mass<kThreads>(shared, turn, target[k], sent);
            moved = 1;
          }
          waiting = 0;
        }
        moved = __syncthreads_or(moved);
        const unsigned long long arriving = std::uint64_t{shared.masses.high[turn][thread]} << 32U |
                                            shared.masses.low[turn][thread];
        shared.masses.low[turn][thread] = 0;
        shared.masses.high[turn][thread] = 0;
        mass += arriving;
        waiting += arriving;
        turn ^= 1;
      } while (moved != 0);

      if (mass != 0) {
        scratch.arrived[slot] = mass - from_restart;
        total += mass;
#pragma unroll
        for (int k = 0; k < kTopK; ++k) {
          if (width[k] == 0 || target[k] >= 0) continue;
          const unsigned long long sent = part(mass, width[k]);
          if (sent != 0) atomicAdd(scratch.arrived + ~target[k], sent);
        }
      }
      __syncthreads();
    }

    for (int offset = 16; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(kAllLanes, total, offset);
    }
    if (thread % 32 == 0) atomicAdd(&sum, total);
    __syncthreads();
    const auto all_mass = static_cast<double>(sum);
    const bool all = rules.population[p].count_restarts != 0;
    const double decay = rules.population[p].decay;
    float* const scores = scores_of(layer, b, g, p);
    for (std::int64_t j = thread; j < length; j += kThreads) {
      const auto mass =
          static_cast<double>(__ldcg(scratch.arrived + j) + (all ? restart(j) : 0ULL));
      const double visits =
          all_mass > 0.0 ? static_cast<double>(solve.steps[p]) * (mass / all_mass) : 0.0;
      if (layer.visits != nullptr) {
        visits_of(layer, b, g, p)[j] = static_cast<std::uint32_t>(llround(visits));
      }
      scores[j] = static_cast<float>(__dadd_rn(__dmul_rn(decay, scores[j]), visits));
    }
    if (g == 0 && p == launch.populations.numbers[0] && thread == 0) {
      layer.sequences[b].walked_at = seen;
    }
    __syncthreads();  // the scratch is used again
  }
}

std::int64_t scratch_slots(std::int64_t capacity) { return (capacity + 1) / 2 * 2; }

}  // namespace

std::int64_t solve_scratch(std::int64_t graphs, std::int64_t most_capacity) {
  return std::min(graphs, kMostSolvers) * scratch_slots(most_capacity) * kBytesASlot;
}

void launch_solve(const LayerView* layers, int count, const LayerView& shape,
                  const WalkRules& rules, const PopulationList& populations, double restart_prob,
                  std::int64_t most_batch, std::int64_t most_capacity, std::int64_t most_extent,
                  std::int64_t first_sequence, const SequenceMarks& marks, void* scratch,
                  cudaStream_t stream) {
  const Launch launch = launch_of(layers, most_batch, first_sequence, marks, populations);
  const std::int64_t tasks = launch.tasks(count, shape);
  if (tasks <= 0 || most_capacity == 0) return;
  // All masses together are 1 / restart_prob, or as many as there are tokens if that is less.
  const double most = std::min(1.0 / restart_prob, static_cast<double>(most_capacity) + 1.0);
  SolveRules solve{.restart_prob = restart_prob,
                   .unit = std::exp2(62.0 - std::ceil(std::log2(most))),
                   .scratch_slots = scratch_slots(most_capacity),
                   .steps = {}};
  for (int p = 0; p < shape.populations; ++p) {
    solve.steps[p] = rules.population[p].walkers * rules.walk_length;
  }
  launch_restart_tables(RestartTables::recent, layers, count, shape, rules, populations, most_batch,
                        most_extent, first_sequence, marks, stream);
  const auto launch_as = [&](auto kernel, int threads) {
    kernel<<<static_cast<unsigned>(std::min(tasks, kMostSolvers)), static_cast<unsigned>(threads),
             0, stream>>>(launch, shape, rules, solve, static_cast<unsigned>(tasks),
                          static_cast<std::byte*>(scratch));
    check(cudaGetLastError(), "solve_kernel");
  };
  const auto launch_by_law = [&]<int kTopK, int kThreads>() {
    const bool is_packed = shape.format == RowFormat::packed;
    if (shape.law == EdgeLaw::uniform) {
      launch_as(solve_kernel<kTopK, RowFormat::slots, EdgeLaw::uniform, kThreads>, kThreads);
    } else if (shape.law == EdgeLaw::weighted && is_packed) {
      launch_as(solve_kernel<kTopK, RowFormat::packed, EdgeLaw::weighted, kThreads>, kThreads);
    } else if (shape.law == EdgeLaw::weighted) {
      launch_as(solve_kernel<kTopK, RowFormat::wide, EdgeLaw::weighted, kThreads>, kThreads);
    } else if (is_packed) {
      launch_as(solve_kernel<kTopK, RowFormat::packed, EdgeLaw::attention, kThreads>, kThreads);
    } else {
      launch_as(solve_kernel<kTopK, RowFormat::wide, EdgeLaw::attention, kThreads>, kThreads);
    }
  };
  switch (shape.top_k) {
    case 4:
      launch_by_law.template operator()<4, 1024>();
      break;
    case 8:
      launch_by_law.template operator()<8, 1024>();
      break;
    case 16:
      launch_by_law.template operator()<16, 512>();
      break;
    default:
      launch_by_law.template operator()<32, 512>();
  }
}

}  // namespace spectralkv::cuda
