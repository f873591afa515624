// Which slots stay, as src/cpu/select.cpp has it: one thread-block cluster a graph, each block with
// its run of the slots. A thread looks at the same slots in every pass, so that marks need no
// exchange.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_rows.cuh"
#include "cuda/device/thread_cluster.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kBins = 2 * kThreads;
constexpr int kAhead = 4;  ///< slots whose values a thread loads at once
constexpr int kMostCluster = 8;
/// Slots that a block needs to be worth having, and blocks that keep a GPU busy.
constexpr std::int64_t kLeastSlots = 1024;
constexpr std::int64_t kBusy = 132;
/// Keys that a block keeps in shared memory; with more slots it computes them anew in every pass.
constexpr int kMostKeys = 24 * 1024;

enum Mark : std::int32_t { kFree, kKept, kEmpty };

/// Of a round of graphs of each sequence.
struct Budgets {
  static constexpr std::int64_t kMost = 256;
  std::int64_t first_graph;
  std::int32_t values[kMost];
};

struct alignas(16) Shared {
  /// Of this block; two, so that a pass may fill one while others still read that before it.
  std::uint32_t bins[2][kBins];
  int counts[2];  ///< of this block, for everyone
  int warps[kWarps];
  std::uint32_t bin;  ///< found: the one in which the last place falls
  int left;           ///< places left in it
  int in_bin;         ///< candidates in it
};

/// One graph of a sequence, and what of it belongs to this block.
struct Graph {
  const std::int32_t* positions;
  std::int32_t* marks;
  const float* scores;  ///< of the first population to count
  int populations;      ///< whose scores are summed
  std::int64_t room;    ///< from one population to the next
  int begin;            ///< slots [begin, end)
  int end;
  std::uint64_t* keys;  ///< of these slots, 0 where a slot is not free; null: there is no room
};

/// Two words as block `rank` has them where this block has `local`.
__device__ uint2 read_from(const void* local, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint2 value;
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(local));
  asm volatile(
      "{\n\t.reg .b32 from;\n\t"
      "mapa.shared::cluster.u32 from, %2, %3;\n\t"
      "ld.shared::cluster.v2.u32 {%0, %1}, [from];\n\t}"
      : "=r"(value.x), "=r"(value.y)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
#else
  return *static_cast<const uint2*>(local);
#endif
}

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
  const auto of_warp = static_cast<std::uint32_t>(warps[lane]);
  all = static_cast<int>(warp_add(of_warp));
  return static_cast<int>(warp_add(lane < warp ? of_warp : 0)) + sum - value;
}

/// Sums of two numbers of each thread over the cluster, and over the blocks in front of this one.
struct ClusterSums {
  int first;
  int second;
  int first_before;
};
__device__ ClusterSums cluster_sums(int first, int second, int cluster, int rank, Shared& shared) {
  int all_first = 0;
  int all_second = 0;
  sum_before(first, shared.warps, all_first);
  sum_before(second, shared.warps, all_second);
  if (threadIdx.x == 0) {
    shared.counts[0] = all_first;
    shared.counts[1] = all_second;
  }
  cluster_sync(cluster);
  ClusterSums sums{};
  for (int other = 0; other < cluster; ++other) {
    const uint2 counts = read_from(shared.counts, other);
    sums.first += static_cast<int>(counts.x);
    sums.second += static_cast<int>(counts.y);
    if (other < rank) sums.first_before += static_cast<int>(counts.x);
  }
  // Nobody writes the next numbers while these are read.
  cluster_sync(cluster);
  return sums;
}

__device__ float score_of(const Graph& graph, int slot) {
  if (graph.populations == 1) return graph.scores[slot];
  float sum = 0.0F;
  for (int p = 0; p < graph.populations; ++p) sum += graph.scores[p * graph.room + slot];
  return sum;
}

/// Orders as (score, position) does; no two tokens have the same, and none has 0.
__device__ std::uint64_t key_of(float score, std::int32_t position) {
  const std::uint32_t bits = score == 0.0F ? 0U : __float_as_uint(score);  // -0 equals 0
  const std::uint32_t ordered = (bits & 0x80000000U) != 0U ? ~bits : bits | 0x80000000U;
  return static_cast<std::uint64_t>(ordered) << 32U | static_cast<std::uint32_t>(position);
}

/// Calls function(slot, key) for the thread's slots, all lanes of a warp together; key 0: the slot
/// is not free. `fresh`: scores or marks have changed since the last time.
template <class Function>
__device__ __forceinline__ void for_keys(const Graph& graph, bool fresh, Function&& function) {
  const int first = graph.begin + static_cast<int>(threadIdx.x);
  if (!fresh && graph.keys != nullptr) {
    for (int base = graph.begin; base < graph.end; base += kThreads) {
      const int i = base - graph.begin + static_cast<int>(threadIdx.x);
      function(base + static_cast<int>(threadIdx.x),
               i < graph.end - graph.begin ? graph.keys[i] : 0);
    }
    return;
  }
  for (int base = 0; base < graph.end - graph.begin; base += kThreads * kAhead) {
    std::uint64_t keys[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int slot = first + base + k * kThreads;
      const bool inside = slot < graph.end;
      const bool is_free = inside && graph.marks[slot] == kFree;
      keys[k] = inside ? key_of(score_of(graph, slot), graph.positions[slot]) : 0U;
      if (!is_free) keys[k] = 0;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int slot = first + base + k * kThreads;
      if (slot < graph.end && graph.keys != nullptr) graph.keys[slot - graph.begin] = keys[k];
      function(slot, keys[k]);
    }
  }
}

/// The key from which on `count` free slots lie; 0 < count < number of free slots. All blocks of
/// the cluster find the same.
__device__ __forceinline__ std::uint64_t lowest_of_best(const Graph& graph, int count, int cluster,
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
    std::uint32_t* const bins = shared.bins[pass % 2];
    bins[threadIdx.x] = 0;
    bins[threadIdx.x + kThreads] = 0;
    __syncthreads();
    for_keys(graph, pass == 0, [&](int, std::uint64_t key) {
      const bool counts = key != 0 && (key & above) == prefix;
      const unsigned counting = __ballot_sync(kAllLanes, counts);
      if (!counts) return;
      // Many scores are alike: one addition for all lanes of a bin.
      const auto bin = static_cast<std::uint32_t>(key >> shift) & mask;
      const unsigned peers = __match_any_sync(counting, bin);
      if (static_cast<int>(threadIdx.x % 32) == __ffs(static_cast<int>(peers)) - 1) {
        atomicAdd(&bins[bin], static_cast<std::uint32_t>(__popc(peers)));
      }
    });
    cluster_sync(cluster);
    const std::uint32_t high = kBins - 1 - 2 * threadIdx.x;
    int in_high = 0;
    int in_low = 0;
    for (int other = 0; other < cluster; ++other) {
      const uint2 both = read_from(&bins[high - 1], other);
      in_low += static_cast<int>(both.x);
      in_high += static_cast<int>(both.y);
    }
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
  // Others may still read these bins when the next search begins.
  cluster_sync(cluster);
  return prefix;
}

/// Marks the `count` best of `free` slots as kept.
__device__ __forceinline__ void keep_best(const Graph& graph, int count, int free, int cluster,
                                          Shared& shared) {
  if (count <= 0) return;
  const bool all = count >= free;
  const std::uint64_t lowest = all ? 1 : lowest_of_best(graph, count, cluster, shared);
  for_keys(graph, all, [&](int slot, std::uint64_t key) {
    if (key >= lowest) graph.marks[slot] = kKept;
  });
}

__device__ bool is_protected(std::int32_t position, std::int64_t seen, std::int64_t window,
                             std::int64_t sinks) {
  return position < sinks || position >= seen - window;
}

/// The run of this block.
__device__ Graph graph_of(const LayerView& layer, std::int64_t b, std::int64_t g,
                          std::int32_t* marks_scratch, int cluster, int rank, int most_keys) {
  extern __shared__ std::uint64_t keys[];
  const auto length = static_cast<int>(length_of(layer, g));
  const int part = (length + cluster - 1) / cluster;
  const int begin = min(rank * part, length);
  return {.positions = positions_of(layer, b, g),
          .marks = marks_scratch + graph_index(layer, b, g) * layer.capacity,
          .scores = scores_of(layer, b, g, 0),
          .populations = 1,
          .room = room_of(layer, g),
          .begin = begin,
          .end = min(begin + part, length),
          .keys = part <= most_keys ? keys : nullptr};
}

__global__ void __launch_bounds__(kThreads)
    select_kernel(LayerView layer, const __grid_constant__ SelectArgs args,
                  const __grid_constant__ Budgets budgets, std::int64_t first_sequence,
                  const __grid_constant__ SequenceMarks cut, TableView<std::int32_t> out,
                  std::int32_t* marks_scratch, int most_keys) {
  __shared__ Shared shared;
  const int cluster = cluster_size();
  const int rank = cluster_rank();
  const std::int64_t b = first_sequence + blockIdx.y;
  const int of_round = static_cast<int>(blockIdx.x) / cluster;
  const std::int64_t g = budgets.first_graph + of_round;
  const bool is_cut = is_marked(cut, blockIdx.y);
  Graph graph = graph_of(layer, b, g, marks_scratch, cluster, rank, most_keys);
  const std::int64_t seen = layer.sequences[b].seen;

  int my_kept = 0;
  int my_free = 0;
#pragma unroll 4
  for (int slot = graph.begin + static_cast<int>(threadIdx.x); slot < graph.end; slot += kThreads) {
    const std::int32_t position = graph.positions[slot];
    const bool held = position >= 0;
    const bool stays = held && (!is_cut || is_protected(position, seen, args.window, args.sinks));
    graph.marks[slot] = !held ? kEmpty : stays ? kKept : kFree;
    my_kept += stays ? 1 : 0;
    my_free += held && !stays ? 1 : 0;
  }
  const ClusterSums sums = cluster_sums(my_kept, my_free, cluster, rank, shared);
  int kept = sums.first;
  int free = sums.second;

  if (is_cut) {
    // Every population takes its share of the places from what the ones before it left; the first
    // one takes what rounding leaves over.
    const std::int64_t places = budgets.values[of_round] - kept;
    const bool all_stay = free <= places;
    const auto quota_of = [&](int p) {
      return static_cast<std::int64_t>(
          floor(__dadd_rn(__dmul_rn(args.shares[p], static_cast<double>(places)), 1e-9)));
    };
    std::int64_t given = 0;
    for (int p = 0; p < layer.populations; ++p) given += quota_of(p);
    for (int p = 0; p < layer.populations; ++p) {
      std::int64_t quota = quota_of(p) + (p == 0 ? places - given : 0);
      quota = all_stay ? free : max(std::int64_t{0}, min(quota, std::int64_t{free}));
      graph.scores = scores_of(layer, b, g, p);
      keep_best(graph, static_cast<int>(quota), free, cluster, shared);
      free -= static_cast<int>(quota);
      kept += static_cast<int>(quota);
    }
  }

  // A replay may hold more than was planned for: then the oldest slots find no room.
  const std::int64_t none = args.kept_length - kept;
  const std::int64_t begin = args.left_aligned ? min(none, std::int64_t{0}) : none;
  const std::int64_t first_none = args.left_aligned ? kept : 0;
  const auto write = [&](std::int64_t i, std::int32_t slot) {
    std::int32_t* to = out.data + b * out.sequence_stride +
                       g * layer.heads_per_graph * out.head_stride + i * out.slot_stride;
    for (int h = 0; h < layer.heads_per_graph; ++h, to += out.head_stride) *to = slot;
  };
  for (std::int64_t i = rank * kThreads + static_cast<int>(threadIdx.x); i < none;
       i += std::int64_t{cluster} * kThreads) {
    write(first_none + i, -1);
  }
  int mine = 0;
#pragma unroll 4
  for (int slot = graph.begin + static_cast<int>(threadIdx.x); slot < graph.end; slot += kThreads) {
    mine += graph.marks[slot] == kKept ? 1 : 0;
  }
  std::int64_t next = begin + cluster_sums(mine, 0, cluster, rank, shared).first_before;
  for (int base = graph.begin; base < graph.end; base += kThreads) {
    const int slot = base + static_cast<int>(threadIdx.x);
    const bool stays = slot < graph.end && graph.marks[slot] == kKept;
    int all = 0;
    const std::int64_t i = next + sum_before(stays ? 1 : 0, shared.warps, all);
    if (stays && i >= 0) write(i, slot);
    next += all;
  }
}

__global__ void __launch_bounds__(kThreads)
    safety_mask_kernel(LayerView layer, std::int64_t window, std::int64_t sinks,
                       double top_fraction, TableView<std::uint8_t> out,
                       std::int32_t* marks_scratch, int most_keys) {
  __shared__ Shared shared;
  const int cluster = cluster_size();
  const int rank = cluster_rank();
  const std::int64_t b = static_cast<int>(blockIdx.x) / cluster / layer.graphs;
  const std::int64_t g = static_cast<int>(blockIdx.x) / cluster % layer.graphs;
  Graph graph = graph_of(layer, b, g, marks_scratch, cluster, rank, most_keys);
  graph.populations = layer.populations;
  const std::int64_t seen = layer.sequences[b].seen;
  int mine = 0;
#pragma unroll 4
  for (int slot = graph.begin + static_cast<int>(threadIdx.x); slot < graph.end; slot += kThreads) {
    const bool held = graph.positions[slot] >= 0;
    graph.marks[slot] = held ? kFree : kEmpty;
    mine += held ? 1 : 0;
  }
  const int held = cluster_sums(mine, 0, cluster, rank, shared).first;
  const auto safe = static_cast<std::int64_t>(
      ceil(__dadd_rn(__dmul_rn(top_fraction, static_cast<double>(held)), -1e-9)));
  keep_best(graph, static_cast<int>(min(safe, std::int64_t{held})), held, cluster, shared);
#pragma unroll 4
  for (int slot = graph.begin + static_cast<int>(threadIdx.x); slot < graph.end; slot += kThreads) {
    const bool may_go =
        graph.marks[slot] == kFree && !is_protected(graph.positions[slot], seen, window, sinks);
    std::uint8_t* to = out.data + b * out.sequence_stride +
                       g * layer.heads_per_graph * out.head_stride + slot * out.slot_stride;
    for (int h = 0; h < layer.heads_per_graph; ++h, to += out.head_stride) *to = may_go ? 1 : 0;
  }
  // What the table has and the graph has no room for; the graphs of such layers have a head each.
  const std::int64_t length = layer.counters->length;
  for (std::int64_t slot = length_of(layer, g) + rank * kThreads + static_cast<int>(threadIdx.x);
       slot < length; slot += std::int64_t{cluster} * kThreads) {
    out.data[b * out.sequence_stride + g * out.head_stride + slot * out.slot_stride] = 0;
  }
}

struct Shape {
  int cluster;
  int keys;  ///< that fit into the shared memory of a block
};

/// Blocks for `graphs` of up to `extent` slots.
Shape shape_of(std::int64_t graphs, std::int64_t extent) {
  int device = 0;
  int major = 0;
  int most_bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  const std::int64_t room =
      std::min<std::int64_t>(kMostKeys, (most_bytes - static_cast<int>(sizeof(Shared)) - 1024) / 8);
  Shape shape{.cluster = 1, .keys = 0};
  std::int64_t part = extent;
  while (major >= 9 && shape.cluster < kMostCluster &&
         (part > room || (part > kLeastSlots && graphs * shape.cluster < kBusy))) {
    shape.cluster *= 2;
    part = (extent + shape.cluster - 1) / shape.cluster;
  }
  if (part <= room) shape.keys = static_cast<int>(part);
  return shape;
}

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const char* name, const Shape& shape,
            std::int64_t graphs, std::int64_t sequences, cudaStream_t stream, Args... args) {
  const std::size_t bytes = static_cast<std::size_t>(shape.keys) * sizeof(std::uint64_t);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(graphs * shape.cluster), static_cast<unsigned>(sequences));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

}  // namespace

void launch_select(const LayerView& layer, const SelectArgs& args, const std::int64_t* budgets,
                   std::int64_t first_sequence, const SequenceMarks& cut,
                   const TableView<std::int32_t>& out, std::int32_t* marks_scratch,
                   std::int64_t extent, cudaStream_t stream) {
  const std::int64_t sequences =
      std::min<std::int64_t>(layer.batch - first_sequence, SequenceMarks::kMost);
  if (sequences <= 0 || layer.graphs == 0) return;
  const Shape shape = shape_of(layer.graphs * sequences, extent);
  for (std::int64_t first = 0; first < layer.graphs; first += Budgets::kMost) {
    const std::int64_t graphs = std::min(layer.graphs - first, Budgets::kMost);
    Budgets round{.first_graph = first, .values = {}};
    std::transform(budgets + first, budgets + first + graphs, round.values, [](std::int64_t slots) {
      constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
      return static_cast<std::int32_t>(std::min(slots, kLargest));
    });
    launch(select_kernel, "select_kernel", shape, graphs, sequences, stream, layer, args, round,
           first_sequence, cut, out, marks_scratch, shape.keys);
  }
}

void launch_safety_mask(const LayerView& layer, std::int64_t window, std::int64_t sinks,
                        double top_fraction, const TableView<std::uint8_t>& out,
                        std::int32_t* marks_scratch, std::int64_t extent, cudaStream_t stream) {
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  if (graphs == 0) return;
  const Shape shape = shape_of(graphs, extent);
  launch(safety_mask_kernel, "safety_mask_kernel", shape, graphs, 1, stream, layer, window, sinks,
         top_fraction, out, marks_scratch, shape.keys);
}

}  // namespace spectralkv::cuda
