// Which slots stay, as src/cpu/select.cpp has it: one thread block a graph. A thread looks at the
// same slots in every pass, so that marks need no exchange.
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_rows.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kBins = 2048;
constexpr int kAhead = 4;  ///< slots whose values a thread loads at once

enum Mark : std::int32_t { kFree, kKept, kEmpty };

struct Shared {
  std::uint32_t bins[kBins];
  int warps[kWarps];
  std::uint32_t bin;  ///< found: the one in which the last place falls
  int left;           ///< places left in it
  int in_bin;         ///< candidates in it
};

/// One graph of a sequence.
struct Graph {
  const std::int32_t* positions;
  std::int32_t* marks;
  const float* scores;    ///< of the first population to count
  int populations;        ///< whose scores are summed
  std::int64_t capacity;  ///< from one population to the next
  int length;
};

/// Exclusive sum over the threads of the block; `all` is the sum of everyone's.
__device__ int sum_before(int value, int* warps, int& all) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  const int of_warp = warps[lane];
  all = __reduce_add_sync(kAllLanes, of_warp);
  return __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0) + sum - value;
}

__device__ float score_of(const Graph& graph, int slot) {
  if (graph.populations == 1) return graph.scores[slot];
  float sum = 0.0F;
  for (int p = 0; p < graph.populations; ++p) sum += graph.scores[p * graph.capacity + slot];
  return sum;
}

/// Orders as (score, position) does; no two tokens have the same.
__device__ std::uint64_t key_of(float score, std::int32_t position) {
  const std::uint32_t bits = score == 0.0F ? 0U : __float_as_uint(score);  // -0 equals 0
  const std::uint32_t ordered = (bits & 0x80000000U) != 0U ? ~bits : bits | 0x80000000U;
  return static_cast<std::uint64_t>(ordered) << 32U | static_cast<std::uint32_t>(position);
}

/// Calls function(slot, is_free, key) for the thread's slots, all lanes of a warp together.
template <class Function>
__device__ void for_free(const Graph& graph, Function&& function) {
  for (int base = 0; base < graph.length; base += kThreads * kAhead) {
    bool is_free[kAhead];
    std::uint64_t keys[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int slot = base + k * kThreads + static_cast<int>(threadIdx.x);
      const bool inside = slot < graph.length;
      is_free[k] = inside && graph.marks[slot] == kFree;
      keys[k] = inside ? key_of(score_of(graph, slot), graph.positions[slot]) : 0U;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      function(base + k * kThreads + static_cast<int>(threadIdx.x), is_free[k], keys[k]);
    }
  }
}

/// The key from which on `count` free slots lie; 0 < count < number of free slots.
__device__ __forceinline__ std::uint64_t lowest_of_best(const Graph& graph, int count,
                                                        Shared& shared) {
  constexpr int kPasses = 6;
  constexpr int kShifts[kPasses] = {53, 42, 32, 21, 10, 0};
  constexpr int kBits[kPasses] = {11, 11, 10, 11, 11, 10};
  std::uint64_t prefix = 0;
  int places = count;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = kShifts[pass];
    const std::uint32_t mask = (1U << kBits[pass]) - 1U;
    const std::uint64_t above = pass == 0 ? 0 : ~0ULL << kShifts[pass - 1];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) shared.bins[i] = 0;
    __syncthreads();
    for_free(graph, [&](int, bool is_free, std::uint64_t key) {
      const bool counts = is_free && (key & above) == prefix;
      const unsigned counting = __ballot_sync(kAllLanes, counts);
      if (!counts) return;
      // Many scores are alike: one addition for all lanes of a bin.
      const auto bin = static_cast<std::uint32_t>(key >> shift) & mask;
      const unsigned peers = __match_any_sync(counting, bin);
      if (static_cast<int>(threadIdx.x % 32) == __ffs(static_cast<int>(peers)) - 1) {
        atomicAdd(&shared.bins[bin], static_cast<std::uint32_t>(__popc(peers)));
      }
    });
    __syncthreads();
    const std::uint32_t high = kBins - 1 - 2 * threadIdx.x;
    const auto in_high = static_cast<int>(shared.bins[high]);
    const auto in_low = static_cast<int>(shared.bins[high - 1]);
    int all = 0;
    const int before = sum_before(in_high + in_low, shared.warps, all);
    if (before < places && places <= before + in_high + in_low) {
      const bool in_first = places <= before + in_high;
      shared.bin = in_first ? high : high - 1;
      shared.left = in_first ? places - before : places - before - in_high;
      shared.in_bin = in_first ? in_high : in_low;
    }
    __syncthreads();
    prefix |= static_cast<std::uint64_t>(shared.bin) << shift;
    places = shared.left;
    if (shared.in_bin == places) break;  // the whole bin stays
  }
  return prefix;
}

/// Marks the `count` best of `free` slots as kept.
__device__ __forceinline__ void keep_best(const Graph& graph, int count, int free, Shared& shared) {
  if (count <= 0) return;
  const std::uint64_t lowest = count >= free ? 0 : lowest_of_best(graph, count, shared);
  for_free(graph, [&](int slot, bool is_free, std::uint64_t key) {
    if (is_free && key >= lowest) graph.marks[slot] = kKept;
  });
}

__device__ bool is_protected(std::int32_t position, std::int64_t seen, std::int64_t window,
                             std::int64_t sinks) {
  return position < sinks || position >= seen - window;
}

__global__ void __launch_bounds__(kThreads)
    select_kernel(LayerView layer, const __grid_constant__ SelectArgs args,
                  std::int64_t first_sequence, const __grid_constant__ SequenceMarks cut,
                  TableView<std::int32_t> out, std::int32_t* marks_scratch) {
  __shared__ Shared shared;
  const std::int64_t b = first_sequence + blockIdx.y;
  const std::int64_t g = blockIdx.x;
  const bool is_cut = is_marked(cut, blockIdx.y);
  Graph graph{.positions = positions_of(layer, b, g),
              .marks = marks_scratch + graph_index(layer, b, g) * layer.capacity,
              .scores = nullptr,
              .populations = 1,
              .capacity = layer.capacity,
              .length = static_cast<int>(layer.counters->length)};
  const std::int64_t seen = layer.sequences[b].seen;

  int my_kept = 0;
  int my_free = 0;
  for (int slot = static_cast<int>(threadIdx.x); slot < graph.length; slot += kThreads) {
    const std::int32_t position = graph.positions[slot];
    const bool held = position >= 0;
    const bool stays = held && (!is_cut || is_protected(position, seen, args.window, args.sinks));
    graph.marks[slot] = !held ? kEmpty : stays ? kKept : kFree;
    my_kept += stays ? 1 : 0;
    my_free += held && !stays ? 1 : 0;
  }
  int kept = 0;
  int free = 0;
  sum_before(my_kept, shared.warps, kept);
  sum_before(my_free, shared.warps, free);

  if (is_cut) {
    // Every population takes its share of the places from what the ones before it left; the first
    // one takes what rounding leaves over.
    const std::int64_t places = args.budget - kept;
    const auto quota_of = [&](int p) {
      return static_cast<std::int64_t>(
          floor(__dadd_rn(__dmul_rn(args.shares[p], static_cast<double>(places)), 1e-9)));
    };
    std::int64_t given = 0;
    for (int p = 0; p < layer.populations; ++p) given += quota_of(p);
    for (int p = 0; p < layer.populations; ++p) {
      std::int64_t quota = quota_of(p) + (p == 0 ? places - given : 0);
      quota = max(std::int64_t{0}, min(quota, std::int64_t{free}));
      graph.scores = scores_of(layer, b, g, p);
      keep_best(graph, static_cast<int>(quota), free, shared);
      free -= static_cast<int>(quota);
      kept += static_cast<int>(quota);
    }
  }

  // A replay may hold more than was planned for: then the oldest slots find no room.
  const std::int64_t empty = args.kept_length - kept;
  const auto write = [&](std::int64_t i, std::int32_t slot) {
    std::int32_t* to = out.data + b * out.sequence_stride +
                       g * layer.heads_per_graph * out.head_stride + i * out.slot_stride;
    for (int h = 0; h < layer.heads_per_graph; ++h, to += out.head_stride) *to = slot;
  };
  for (std::int64_t i = threadIdx.x; i < empty; i += kThreads) write(i, -1);
  std::int64_t next = empty;
  for (int base = 0; base < graph.length; base += kThreads) {
    const int slot = base + static_cast<int>(threadIdx.x);
    const bool stays = slot < graph.length && graph.marks[slot] == kKept;
    int all = 0;
    const std::int64_t i = next + sum_before(stays ? 1 : 0, shared.warps, all);
    if (stays && i >= 0) write(i, slot);
    next += all;
  }
}

__global__ void __launch_bounds__(kThreads)
    safety_mask_kernel(LayerView layer, std::int64_t window, std::int64_t sinks,
                       double top_fraction, TableView<std::uint8_t> out,
                       std::int32_t* marks_scratch) {
  __shared__ Shared shared;
  const std::int64_t b = blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  const Graph graph{.positions = positions_of(layer, b, g),
                    .marks = marks_scratch + graph_index(layer, b, g) * layer.capacity,
                    .scores = scores_of(layer, b, g, 0),
                    .populations = layer.populations,
                    .capacity = layer.capacity,
                    .length = static_cast<int>(layer.counters->length)};
  const std::int64_t seen = layer.sequences[b].seen;
  int mine = 0;
  for (int slot = static_cast<int>(threadIdx.x); slot < graph.length; slot += kThreads) {
    const bool held = graph.positions[slot] >= 0;
    graph.marks[slot] = held ? kFree : kEmpty;
    mine += held ? 1 : 0;
  }
  int held = 0;
  sum_before(mine, shared.warps, held);
  const auto safe = static_cast<std::int64_t>(
      ceil(__dadd_rn(__dmul_rn(top_fraction, static_cast<double>(held)), -1e-9)));
  keep_best(graph, static_cast<int>(min(safe, std::int64_t{held})), held, shared);
  for (int slot = static_cast<int>(threadIdx.x); slot < graph.length; slot += kThreads) {
    const bool may_go =
        graph.marks[slot] == kFree && !is_protected(graph.positions[slot], seen, window, sinks);
    std::uint8_t* to = out.data + b * out.sequence_stride +
                       g * layer.heads_per_graph * out.head_stride + slot * out.slot_stride;
    for (int h = 0; h < layer.heads_per_graph; ++h, to += out.head_stride) *to = may_go ? 1 : 0;
  }
}

}  // namespace

void launch_select(const LayerView& layer, const SelectArgs& args, std::int64_t first_sequence,
                   const SequenceMarks& cut, const TableView<std::int32_t>& out,
                   std::int32_t* marks_scratch, std::int64_t /*extent*/, cudaStream_t stream) {
  const std::int64_t rest = layer.batch - first_sequence;
  const auto sequences =
      static_cast<unsigned>(rest < SequenceMarks::kMost ? rest : SequenceMarks::kMost);
  if (rest <= 0 || layer.graphs == 0) return;
  const dim3 grid(static_cast<unsigned>(layer.graphs), sequences);
  select_kernel<<<grid, kThreads, 0, stream>>>(layer, args, first_sequence, cut, out,
                                               marks_scratch);
  check(cudaGetLastError(), "select_kernel");
}

void launch_safety_mask(const LayerView& layer, std::int64_t window, std::int64_t sinks,
                        double top_fraction, const TableView<std::uint8_t>& out,
                        std::int32_t* marks_scratch, std::int64_t /*extent*/, cudaStream_t stream) {
  const auto graphs = static_cast<unsigned>(layer.batch * layer.graphs);
  if (graphs == 0) return;
  safety_mask_kernel<<<graphs, kThreads, 0, stream>>>(layer, window, sinks, top_fraction, out,
                                                      marks_scratch);
  check(cudaGetLastError(), "safety_mask_kernel");
}

}  // namespace spectralkv::cuda
