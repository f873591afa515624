// The row of one new token a sequence.
//
// A key's probability needs every score of its query heads, so either the scores stay somewhere
// until all are there, or the keys are read twice. Where the shared memory of a thread-block
// cluster holds the scores of a graph, one launch does all: each block of the cluster reads its
// part of the keys once, the blocks exchange maxima and sums, and each names its K best.
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <span>

#include "cuda/clusters.h"
#include "cuda/cuda_check.h"
#include "cuda/device/exp_sum.cuh"
#include "cuda/device/key_dots.cuh"
#include "cuda/device/new_row.cuh"
#include "cuda/device/thread_cluster.cuh"
#include "cuda/device/top_k.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_shape.h"

namespace spectralkv::cuda {
namespace {

constexpr int kPortableCluster = 8;
/// Blocks of update_kernel whose registers a multiprocessor must have; 0: of any number. The one
/// named here needs few more than two blocks can have, and outside its loops.
template <class Dots>
inline constexpr int kLeastBlocks = 0;
template <>
inline constexpr int kLeastBlocks<CoreDots<float, true, 8>> = 2;

/// Calls `use(task, first query head of the graph)` for all of the graph's query heads, as many at
/// a time as Dots takes.
template <class Dots, class Use>
__device__ inline void for_each_task(const LayerView& layer, const UpdateArgs& args, std::int64_t b,
                                     std::int64_t g, Use&& use) {
  using T = typename Dots::T;
  for (int head = 0; head < layer.heads_per_graph; ++head) {
    const std::int64_t h = g * layer.heads_per_graph + head;
    for (int first = 0; first < layer.group; first += Dots::kColumns) {
      use(DotsTask<T>{.keys = key_at<T>(args.keys, b, h, 0),
                      .key_stride = args.keys.token_stride,
                      .queries = key_at<T>(args.queries, b, h * layer.group + first, 0),
                      .query_stride = args.queries.head_stride,
                      .positions = positions_of(layer, b, g),
                      .query_heads = min(layer.group - first, Dots::kColumns),
                      .head_dim = layer.head_dim,
                      .begin = 0,
                      .end = 0,
                      .own_slot = 0},
          head * layer.group + first);
    }
  }
}

/// Sums over the lanes that share columns.
template <class Dots>
__device__ inline void sum_warp(ExpSum (&sums)[Dots::kValues]) {
#pragma unroll
  for (int i = 0; i < Dots::kValues; ++i) {
    for (int offset = 16; offset >= Dots::kFirstRowBit; offset /= 2) {
      sums[i].add(sums[i].from_lane(offset));
    }
  }
}

/// A cluster of thread blocks a graph, runs of clusters along y.
template <class Dots>
__global__ void __launch_bounds__(Dots::kMostThreads, kLeastBlocks<Dots>)
    update_kernel(const __grid_constant__ LayerView layer, const __grid_constant__ UpdateArgs args,
                  std::int64_t extent, int most_slots) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using T = typename Dots::T;
  extern __shared__ std::uint64_t memory[];
  __shared__ RowShared shared;
  const std::int64_t length = layer.counters->length;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int warps = threads / 32;
  const int cluster = cluster_size();
  const GraphOfRun graph(layer, static_cast<int>(blockIdx.y), cluster_index());
  const int b = graph.b;
  const int g = graph.g;
  const int query_heads = layer.heads_per_graph * layer.group;

  const RowLayout layout(query_heads, cluster, threads, most_slots);
  const RowBlock block(layout, reinterpret_cast<unsigned char*>(memory), cluster, query_heads);
  const int rank = block.rank;

  const bool fault = rank == 0 && thread == 0 && has_fault(layer);
  const bool finishes = rank == 0 && warp == 1;
  SequenceCounters counters{};
  if (finishes) counters = counters_of_lane(layer);
  if (thread == 0) {
    constexpr int kEntry = sizeof(std::uint64_t);
    open_mailbox(shared.sums, cluster * query_heads * kEntry);
    open_mailbox(shared.lists, cluster * (32 + 1) * kEntry);
    shared.suspect = 0;
    shared.merged = 0;
  }
  cluster_arrive();
  if (warp == 1) clear(shared.top_k, lane);
  block.clear_barred(most_slots);
  cluster_wait();  // which empties the L1 cache, so not behind loads
  __syncthreads();

  // The length of the layer is still on its way: what needs it comes after the queries.
  std::int64_t slot = 0;
  int begin = 0;
  int end = 0;
  const auto find_slots = [&](auto& task) {
    slot = slot_at(args, b, std::int64_t{g} * layer.heads_per_graph, length);
    const int visible = visible_slots(layer, g, slot, length, extent);
    const int part = part_of(visible, cluster);
    begin = min(rank * part, visible);
    end = min(begin + part, visible);
    task.begin = begin;
    task.end = end;
    task.own_slot = static_cast<int>(slot);
  };
  const float scale = args.scale * kLog2E;
  for_each_task<Dots>(layer, args, b, g, [&](const auto& described, int first_query) {
    ExpSum mine[Dots::kValues];
    Dots::run(described, warp, warps, find_slots,
              [&](int i, int column, int j, std::int32_t place, float dot, bool valid) {
                const float x = dot * scale;
                const bool seen = valid & (place != kNoPlace);
                const bool finite = fabsf(x) <= FLT_MAX;
                const float score = seen & finite ? x : -INFINITY;
                mine[i].add(score);
                if (valid) block.scores[(first_query + column) * block.pitch + j - begin] = score;
                // Both are rare: sinks and the new token itself.
                if (i == 0 && seen && place < layer.num_sinks) {
                  atomicOr(&block.barred[(j - begin) / 32], 1U << ((j - begin) % 32));
                }
                if (seen & !finite && place == kOwnPlace) shared.suspect = 1;
              });
    sum_warp<Dots>(mine);
#pragma unroll
    for (int i = 0; i < Dots::kValues; ++i) {
      const int column = Dots::column(lane, i);
      if (lane < Dots::kFirstRowBit && column < described.query_heads) {
        block.warp_sums[warp * query_heads + first_query + column] = mine[i].packed();
      }
    }
  });
  __syncthreads();
  if (args.softcap > 0.0F) {
#pragma unroll 1
    for (int q = 0; q < query_heads; ++q) {
      ExpSum sum;
#pragma unroll 1
      for (int j = thread; j < end - begin; j += threads) {
        const float score = soften(args, block.scores[q * block.pitch + j]);
        block.scores[q * block.pitch + j] = score;
        sum.add(score);
      }
      sum = ExpSum::of_lanes(sum);
      if (lane == 0) block.warp_sums[warp * query_heads + q] = sum.packed();
    }
    __syncthreads();
  }

  block.post_sums(shared, 0, query_heads);
  bool good = true;
  if (rank == 0) good = check_slots(layer, args, length, extent) && !fault;
  block.take_shifts(shared);
  good = __syncthreads_and(good ? 1 : 0) != 0;
  std::uint32_t ticket = 0;
  if (finishes) ticket = take_ticket(layer);
  draw_new_row<T>(layer, args, block, shared,
                  {.length = length,
                   .slot = slot,
                   .b = b,
                   .g = g,
                   .good = good,
                   .ticket = ticket,
                   .counters = counters},
                  begin, end, [] {});
#endif
}

// ---- Where no cluster holds the scores: the keys are read twice, by many blocks a graph.

constexpr int kSplitThreads = 256;
constexpr int kSplitWarps = kSplitThreads / 32;
/// Slots whose probabilities a block sums at a time.
constexpr int kChunk = 1024;
constexpr int kChunkPitch = kChunk + 8;

/// What the kernels of a split update leave for each other.
struct SplitScratch {
  std::uint64_t* sums;   ///< (B, G, splits, query heads)
  std::uint64_t* lists;  ///< (B, G, splits, K)
  float* shifts;         ///< (B, G, query heads)
  std::int64_t extent;
  std::int32_t splits;
};

/// The slots [begin, end) of a block, and whose they are.
struct SplitPart {
  std::int64_t b;
  std::int64_t g;
  std::int64_t slot;  ///< of the new token
  int begin;
  int end;

  __device__ SplitPart(const LayerView& layer, const UpdateArgs& args, std::int64_t extent,
                       int graph, int split, int splits)
      : b(graph / layer.graphs), g(graph % layer.graphs) {
    const std::int64_t length = layer.counters->length;
    slot = slot_at(args, b, g * layer.heads_per_graph, length);
    const int visible = visible_slots(layer, g, slot, length, extent);
    const int part = part_of(visible, splits);
    begin = min(split * part, visible);
    end = min(begin + part, visible);
  }

  /// Slots [first, last) for a task.
  template <class Task>
  __device__ void set(Task& task, int first, int last) const {
    task.begin = first;
    task.end = last;
    task.own_slot = static_cast<int>(slot);
  }
};

template <class Dots>
__global__ void __launch_bounds__(kSplitThreads)
    split_sums_kernel(const __grid_constant__ LayerView layer,
                      const __grid_constant__ UpdateArgs args, SplitScratch scratch) {
  __shared__ std::uint64_t warp_sums[kSplitWarps][Dots::kColumns];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int block = static_cast<int>(blockIdx.x);
  const int graph = block / scratch.splits;
  const SplitPart part(layer, args, scratch.extent, graph, block % scratch.splits, scratch.splits);
  const int query_heads = layer.heads_per_graph * layer.group;
  for_each_task<Dots>(layer, args, part.b, part.g, [&](const auto& task, int first_query) {
    ExpSum mine[Dots::kValues];
    const auto find_slots = [&](auto& found) { part.set(found, part.begin, part.end); };
    Dots::run(task, warp, kSplitWarps, find_slots,
              [&](int i, int /*column*/, int /*j*/, std::int32_t place, float dot, bool valid) {
                mine[i].add(valid && place != kNoPlace ? scaled(args, dot) : -INFINITY);
              });
    sum_warp<Dots>(mine);
    for (int i = 0; i < Dots::kValues; ++i) {
      if (lane < Dots::kFirstRowBit) warp_sums[warp][Dots::column(lane, i)] = mine[i].packed();
    }
    __syncthreads();
#pragma unroll 1
    for (int column = warp; column < task.query_heads; column += kSplitWarps) {
      ExpSum of_warp;
      if (lane < kSplitWarps) of_warp = ExpSum::unpacked(warp_sums[lane][column]);
      const ExpSum sum = ExpSum::of_lanes(of_warp);
      if (lane == 0) {
        scratch.sums[std::int64_t{block} * query_heads + first_query + column] = sum.packed();
      }
    }
    __syncthreads();
  });
}

/// One warp a query head.
__global__ void __launch_bounds__(kSplitThreads)
    split_shifts_kernel(SplitScratch scratch, int query_heads, std::int64_t count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t i = blockIdx.x * std::int64_t{kSplitWarps} + threadIdx.x / 32;
  if (i >= count) return;
  const std::uint64_t* const sums =
      scratch.sums + i / query_heads * scratch.splits * query_heads + i % query_heads;
  ExpSum sum;
  for (int split = lane; split < scratch.splits; split += 32) {
    sum.add(ExpSum::unpacked(sums[std::int64_t{split} * query_heads]));
  }
  sum = ExpSum::of_lanes(sum);
  if (lane == 0) scratch.shifts[i] = sum.shift();
}

template <class Dots>
__global__ void __launch_bounds__(kSplitThreads)
    split_lists_kernel(const __grid_constant__ LayerView layer,
                       const __grid_constant__ UpdateArgs args, SplitScratch scratch) {
  extern __shared__ float columns[];  // (kColumns, kChunkPitch)
  __shared__ float probabilities[kChunk];
  __shared__ TopKScratch top_k;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x);
  const int graph = block / scratch.splits;
  const SplitPart part(layer, args, scratch.extent, graph, block % scratch.splits, scratch.splits);
  const int query_heads = layer.heads_per_graph * layer.group;
  const float weight = 1.0F / static_cast<float>(query_heads);
  const float* const shifts = scratch.shifts + std::int64_t{graph} * query_heads;
  const std::int32_t* const positions = positions_of(layer, part.b, part.g);
  std::uint64_t kept = 0;  // of warp 0: the best so far
  for (int begin = part.begin; begin < part.end; begin += kChunk) {
    const int count = min(kChunk, part.end - begin);
    for (int j = thread; j < count; j += kSplitThreads) probabilities[j] = 0.0F;
    for_each_task<Dots>(layer, args, part.b, part.g, [&](const auto& task, int first_query) {
      const auto find_slots = [&](auto& found) { part.set(found, begin, begin + count); };
      Dots::run(task, warp, kSplitWarps, find_slots,
                [&](int /*i*/, int column, int j, std::int32_t place, float dot, bool valid) {
                  if (!valid) return;
                  columns[column * kChunkPitch + j - begin] =
                      place != kNoPlace ? scaled(args, dot) : -INFINITY;
                });
      __syncthreads();
      for (int j = thread; j < count; j += kSplitThreads) {
        float sum = probabilities[j];
        for (int q = 0; q < task.query_heads; ++q) {
          sum += exp2_of(columns[q * kChunkPitch + j] - shifts[first_query + q]);
        }
        probabilities[j] = sum;
      }
      __syncthreads();
    });
    float highest = 0.0F;
    for (int j = thread; j < count; j += kSplitThreads) {
      const bool can_be_edge = begin + j != part.slot && positions[begin + j] >= layer.num_sinks;
      const float probability = can_be_edge ? probabilities[j] * weight : 0.0F;
      probabilities[j] = probability;
      highest = fmaxf(highest, probability);
    }
    if (thread < 32) clear(top_k, thread);
    __syncthreads();
    const Found found = block_top_k(probabilities, count, begin, highest, layer.top_k, top_k);
    if (warp == 0) insert(kept, lane < found.count ? found.candidates[lane] : 0, layer.top_k);
    __syncthreads();
  }
  if (thread < layer.top_k) scratch.lists[std::int64_t{block} * layer.top_k + thread] = kept;
}

/// One block a graph.
template <class T>
__global__ void __launch_bounds__(kSplitThreads)
    split_merge_kernel(const __grid_constant__ LayerView layer,
                       const __grid_constant__ UpdateArgs args, SplitScratch scratch) {
  __shared__ std::uint64_t best[kSplitThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int graph = static_cast<int>(blockIdx.x);
  const std::int64_t b = graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  const std::int64_t length = layer.counters->length;
  const std::int64_t slot = slot_at(args, b, g * layer.heads_per_graph, length);
  bool good = !has_fault(layer);
  if (!check_slots(layer, args, length, scratch.extent)) good = false;
  const std::int64_t count = std::int64_t{scratch.splits} * layer.top_k;
  const std::uint64_t* const list = scratch.lists + graph * count;
  std::uint64_t kept = 0;
  for (std::int64_t first = warp * 32; first < count; first += kSplitThreads) {
    insert(kept, first + lane < count ? list[first + lane] : 0, layer.top_k);
  }
  best[thread] = kept;
  if (__syncthreads_and(good ? 1 : 0) == 0) good = false;
  const bool drawn = good && all_finite<T>(layer, args, b, g, slot);
  if (warp != 0) return;
  for (int w = 1; w < kSplitWarps; ++w) insert(kept, best[w * 32 + lane], layer.top_k);
  __syncwarp();
  best[lane] = drawn ? kept : 0;
  __syncwarp();
  if (good) finish_row(layer, b, g, slot, drawn, best);
  const bool last = is_last(layer, take_ticket(layer));
  if (good && last) take_slots(layer, args, length, counters_of_lane(layer));
}

// ---- launching

/// Blocks of a split update: enough for every processor to hold two.
constexpr std::int64_t kSplitBlocks = 264;
constexpr std::int64_t kMostSplits = 264;

std::int32_t splits_of(const LayerView& layer) {
  const std::int64_t graphs = std::max<std::int64_t>(std::int64_t{layer.batch} * layer.graphs, 1);
  return static_cast<std::int32_t>(
      std::clamp<std::int64_t>((kSplitBlocks + graphs - 1) / graphs, 1, kMostSplits));
}

template <class Dots>
void launch_splits(const LayerView& layer, const UpdateArgs& args, std::int64_t extent,
                   cudaStream_t stream) {
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  const std::int64_t query_heads = std::int64_t{layer.heads_per_graph} * layer.group;
  SplitScratch scratch{};
  scratch.splits = splits_of(layer);
  scratch.extent = extent;
  scratch.sums = static_cast<std::uint64_t*>(layer.update_scratch);
  scratch.lists = scratch.sums + graphs * scratch.splits * query_heads;
  scratch.shifts = reinterpret_cast<float*>(scratch.lists + graphs * scratch.splits * layer.top_k);
  const auto blocks = static_cast<unsigned>(graphs * scratch.splits);
  split_sums_kernel<Dots><<<blocks, kSplitThreads, 0, stream>>>(layer, args, scratch);
  check(cudaGetLastError(), "split_sums_kernel");
  const std::int64_t shifts = graphs * query_heads;
  split_shifts_kernel<<<static_cast<unsigned>((shifts + kSplitWarps - 1) / kSplitWarps),
                        kSplitThreads, 0, stream>>>(scratch, static_cast<int>(query_heads), shifts);
  check(cudaGetLastError(), "split_shifts_kernel");
  constexpr std::size_t kBytes = std::size_t{Dots::kColumns} * kChunkPitch * sizeof(float);
  check(cudaFuncSetAttribute(split_lists_kernel<Dots>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kBytes)),
        "cudaFuncSetAttribute");
  split_lists_kernel<Dots><<<blocks, kSplitThreads, kBytes, stream>>>(layer, args, scratch);
  check(cudaGetLastError(), "split_lists_kernel");
  split_merge_kernel<typename Dots::T>
      <<<static_cast<unsigned>(graphs), kSplitThreads, 0, stream>>>(layer, args, scratch);
  check(cudaGetLastError(), "split_merge_kernel");
}

std::int64_t shared_bytes(const LayerView& layer, std::int64_t extent, int cluster, int threads) {
  return layout_bytes(layer.heads_per_graph * layer.group, cluster, threads,
                      slots_a_block(extent, cluster));
}

int most_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
         static_cast<int>(sizeof(RowShared));
}

template <class Dots>
void launch_clusters(const LayerView& layer, const UpdateArgs& args, std::int64_t extent,
                     const UpdatePlan& plan, cudaStream_t stream) {
  const int threads = std::min(plan.threads, Dots::kMostThreads);
  const std::int64_t bytes = shared_bytes(layer, extent, plan.cluster, threads);
  const auto kernel = update_kernel<Dots>;
  // Not `bytes`: another thread may launch the same kernel for another shape.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most_shared_bytes()),
        "cudaFuncSetAttribute");
  if (plan.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  const bool divided = layer.first_slots != nullptr;
  config.gridDim =
      dim3(static_cast<unsigned>((divided ? layer.batch : layer.graphs) * plan.cluster),
           static_cast<unsigned>(divided ? layer.graphs : layer.batch));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  check(
      cudaLaunchKernelEx(&config, kernel, layer, args, extent, slots_a_block(extent, plan.cluster)),
      "update_kernel");
}

/// Calls `launch(Dots{})` with the way to read keys of this shape. kBest: one for every number of
/// query heads, else as few as there can be.
template <class T, bool kBest, class Launch>
void with_dots(const LayerView& layer, const UpdateArgs& args, Launch&& launch) {
  constexpr std::int64_t kElement = sizeof(T);
  const int dim = layer.head_dim;
  const auto start_at = [&](std::int64_t bytes) {
    return rows_start_at(args.keys, bytes, kElement) &&
           rows_start_at(args.queries, bytes, kElement);
  };
  if constexpr (kElement == 2) {
    if (dim <= 256 && dim % 8 == 0 && start_at(16) && is_near(args.keys.token_stride, kElement) &&
        device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8) {
      const auto with_heads = [&]<int kHeads>() {
        if (dim <= 64) {
          launch(TensorDots<T, 2, kHeads>{});
        } else if (dim <= 96) {
          launch(TensorDots<T, 3, kHeads>{});
        } else if (dim <= 128) {
          launch(TensorDots<T, 4, kHeads>{});
        } else {
          launch(TensorDots<T, 8, kHeads>{});
        }
      };
      if constexpr (kBest) {
        if (layer.group <= 4) {
          with_heads.template operator()<4>();
          return;
        }
        if (layer.group > 8) {
          with_heads.template operator()<16>();
          return;
        }
      }
      with_heads.template operator()<8>();
      return;
    }
  }
  if (dim % 4 != 0 || !start_at(4 * kElement)) {
    launch(CoreDots<T, false, 4>{});
    return;
  }
  if constexpr (kElement == 4 && kBest) {
    if (layer.group > 4) {
      launch(CoreDots<T, true, 8>{});
      return;
    }
  }
  launch(CoreDots<T, true, 4>{});
}

template <class T>
void launch_as(const LayerView& layer, const UpdateArgs& args, std::int64_t extent,
               const UpdatePlan& plan, cudaStream_t stream) {
  if (plan.cluster == 0) {
    with_dots<T, false>(layer, args, [&](auto dots) {
      launch_splits<decltype(dots)>(layer, args, extent, stream);
    });
  } else {
    with_dots<T, true>(layer, args, [&](auto dots) {
      launch_clusters<decltype(dots)>(layer, args, extent, plan, stream);
    });
  }
}

}  // namespace

std::int64_t update_scratch(const LayerView& layer) {
  // Rooms decide which size is best, not whether one will do.
  if (plan_update(layer, layer.capacity, {}).cluster != 0) return 0;
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  const std::int64_t query_heads = std::int64_t{layer.heads_per_graph} * layer.group;
  return graphs * (8 * splits_of(layer) * (query_heads + layer.top_k) + 4 * query_heads);
}

UpdatePlan plan_update(const LayerView& layer, std::int64_t extent,
                       std::span<const std::int64_t> rooms) {
  constexpr std::int32_t kMostRuns = 65535;  // of a grid along y
  const UpdatePlan split{.cluster = 0, .threads = 0};
  if (device_attribute(cudaDevAttrClusterLaunch) == 0) return split;
  if (std::max(layer.batch, layer.graphs) > kMostRuns) return split;
  const int most_bytes = most_shared_bytes();
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  constexpr int kLarge = 512;
  constexpr int kSmall = 256;
  const int cluster = best_cluster(graphs, extent, rooms, slots_a_block, [&](int size) {
    return shared_bytes(layer, extent, size, kLarge) <= most_bytes;
  });
  if (cluster == 0) return split;
  // Where a processor has but one block at a time, that one is large.
  const bool shares_processors = graphs * cluster > processors &&
                                 shared_bytes(layer, extent, cluster, kLarge) <= most_bytes / 2;
  return {.cluster = cluster, .threads = shares_processors ? kSmall : kLarge};
}

void launch_update(const LayerView& layer, const UpdateArgs& args, std::int64_t extent,
                   const UpdatePlan& plan, cudaStream_t stream) {
  switch (args.keys.dtype) {
    case DType::f16:
      launch_as<__half>(layer, args, extent, plan, stream);
      break;
    case DType::bf16:
      launch_as<__nv_bfloat16>(layer, args, extent, plan, stream);
      break;
    default:
      launch_as<float>(layer, args, extent, plan, stream);
  }
}

}  // namespace spectralkv::cuda
