// The row of one new token a sequence.
//
// A key's probability needs every score of its query heads, so either the scores stay somewhere
// until all are there, or the keys are read twice. Where the shared memory of a thread-block
// cluster holds the scores of a graph, one launch does all: each block of the cluster reads its
// part of the keys once, the blocks exchange maxima and sums, and each names its K best.
#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/attention_row.cuh"
#include "cuda/device/key_dots.cuh"
#include "cuda/device/thread_cluster.cuh"
#include "cuda/device/top_k.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kPortableCluster = 8;
constexpr int kMostCluster = 16;
constexpr float kLog2E = 1.44269504F;

/// Where a block keeps what in shared memory; offsets in bytes.
struct Layout {
  std::int64_t merged;      ///< u64 (cluster, K): candidates of all blocks, in the first block
  std::int64_t sums;        ///< u64 (cluster, query heads): maximum and sum of a block
  std::int64_t warp_sums;   ///< u64 (warps, query heads)
  std::int64_t shifts;      ///< f32 (query heads): log of the softmax's sum
  std::int64_t barred;      ///< one bit a slot: gets no edge
  std::int64_t scores;      ///< f32 (query heads, pitch)
  std::int64_t pitch;       ///< the rows of a tile fall into different banks
  std::int64_t bytes;
};

__host__ __device__ inline Layout layout_of(int query_heads, int top_k, int cluster, int threads,
                                            int slots) {
  Layout layout{};
  layout.pitch = slots + 8;
  layout.sums = layout.merged + std::int64_t{8} * cluster * top_k;
  layout.warp_sums = layout.sums + std::int64_t{8} * cluster * query_heads;
  layout.shifts = layout.warp_sums + std::int64_t{8} * (threads / 32) * query_heads;
  layout.barred = layout.shifts + std::int64_t{4} * query_heads;
  layout.scores = layout.barred + std::int64_t{4} * ((slots + 31) / 32);
  layout.bytes = layout.scores + 4 * layout.pitch * query_heads;
  return layout;
}

__device__ std::int64_t slot_at(const UpdateArgs& args, std::int64_t b, std::int64_t h,
                                std::int64_t length) {
  if (args.slots.data == nullptr) return length;
  return args.slots.data[b * args.slots.sequence_stride + h * args.slots.head_stride];
}

/// Whether the slots of all sequences can be taken, by threads [first, first + count) of a block:
/// each says whether those that it looked at can. Every graph looks at all of them, so that all
/// decide alike before any writes.
__device__ bool check_slots(const LayerView& layer, const UpdateArgs& args, std::int64_t length,
                            int thread, int threads) {
  bool good = true;
  if (args.slots.data == nullptr) {
    if (length < layer.capacity) return true;
    if (thread == 0) report(layer, Fault::layer_full, 0, 0, length + 1, layer.capacity);
    return false;
  }
  for (int i = thread; i < layer.batch * layer.heads; i += threads) {
    const std::int64_t b = i / layer.heads;
    const std::int64_t h = i % layer.heads;
    const std::int64_t g = h / layer.heads_per_graph;
    const std::int64_t slot = slot_at(args, b, h, length);
    const std::int64_t of_graph = slot_at(args, b, g * layer.heads_per_graph, length);
    if (slot < 0 || slot > length || slot >= layer.capacity) {
      good = false;
      report(layer, Fault::slot_range, b, h, slot, min(length, layer.capacity - 1));
    } else if (slot < length && positions_of(layer, b, g)[slot] >= 0) {
      good = false;
      report(layer, Fault::slot_taken, b, h, slot, 0);
    } else if (slot != of_graph) {
      good = false;
      report(layer, Fault::slots_differ, b, h, slot, of_graph);
    }
  }
  return good;
}

/// Takes the slots and counts the tokens, by one warp.
__device__ void take_slots(const LayerView& layer, const UpdateArgs& args, std::int64_t length) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool grows = false;
  bool ordered = true;
  for (int i = lane; i < layer.batch * layer.graphs; i += 32) {
    const std::int64_t b = i / layer.graphs;
    const std::int64_t g = i % layer.graphs;
    const std::int64_t slot = slot_at(args, b, g * layer.heads_per_graph, length);
    positions_of(layer, b, g)[slot] = static_cast<std::int32_t>(layer.sequences[b].seen);
    if (slot == length) {
      grows = true;
    } else {
      ordered = false;
    }
  }
  grows = __any_sync(0xffffffffU, grows) != 0;
  ordered = __all_sync(0xffffffffU, ordered) != 0;
  for (int b = lane; b < layer.batch; b += 32) {
    ++layer.sequences[b].seen;
    ++layer.sequences[b].held;
  }
  if (lane != 0) return;
  layer.counters->length = length + (grows ? 1 : 0);
  if (!ordered) layer.counters->ordered = 0;
}

/// write_row by one warp: lane k has the k-th candidate, 0 where there is none.
__device__ void write_row(const LayerView& layer, std::int32_t* row, std::uint64_t own) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int count = __popc(__ballot_sync(0xffffffffU, own != 0));
  if (lane < layer.top_k) row[lane] = own != 0 ? slot_of(own) : -1;
  if (!layer.weighted) return;
  double total = 0.0;
  double sum = 0.0;
  for (int k = 0; k < count; ++k) {
    total += static_cast<double>(__shfl_sync(0xffffffffU, value_of(own), k));
    if (k == lane) sum = total;
  }
  std::uint32_t threshold = 0;
  if (lane + 1 < count) {
    const double scaled = floor(__dadd_rn(__dmul_rn(sum / total, 0x1p32), 0.5));
    threshold = scaled < 0x1p32 ? static_cast<std::uint32_t>(scaled) : kAllOnes;
  } else if (count > 0) {
    threshold = kAllOnes;
  }
  if (lane < layer.top_k) row[layer.top_k + lane] = static_cast<std::int32_t>(threshold);
}

/// Whether queries of a graph and the keys of its new token are numbers, by all threads of a block.
template <class T>
__device__ bool all_finite(const LayerView& layer, const UpdateArgs& args, std::int64_t b,
                           std::int64_t g, std::int64_t slot) {
  const int dim = layer.head_dim;
  const int query_heads = layer.heads_per_graph * layer.group;
  const std::int64_t first_head = g * layer.heads_per_graph;
  int finite = 1;
  for (int h = 0; h < query_heads; ++h) {
    const T* query = key_at<T>(args.queries, b, first_head * layer.group + h, 0);
    for (int d = static_cast<int>(threadIdx.x); d < dim; d += static_cast<int>(blockDim.x)) {
      if (!isfinite(as_float(query[d]))) finite = 0;
    }
  }
  for (int h = 0; h < layer.heads_per_graph; ++h) {
    const T* key = key_at<T>(args.keys, b, first_head + h, slot);
    for (int d = static_cast<int>(threadIdx.x); d < dim; d += static_cast<int>(blockDim.x)) {
      if (!isfinite(as_float(key[d]))) finite = 0;
    }
  }
  return __syncthreads_and(finite) != 0;
}

/// 2^x, 0 where that is subnormal.
__device__ inline float exp2_of(float x) {
  float result = 0.0F;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// Sum of exp(x - maximum), whose maximum may still rise. Scores are finite or -inf.
struct ExpSum {
  float maximum = -FLT_MAX;
  float sum = 0.0F;

  __device__ void add(float x) {
    const float above = x - maximum;
    const float factor = exp2_of(-fabsf(above) * kLog2E);
    sum = above > 0.0F ? fmaf(sum, factor, 1.0F) : sum + factor;
    maximum = fmaxf(maximum, x);
  }
  __device__ void add(const ExpSum& other) {
    const float highest = fmaxf(maximum, other.maximum);
    sum = sum * exp2_of((maximum - highest) * kLog2E) +
          other.sum * exp2_of((other.maximum - highest) * kLog2E);
    maximum = highest;
  }
  /// What is subtracted from a score to get the logarithm of its probability.
  __device__ float shift() const { return sum > 0.0F ? maximum + logf(sum) : INFINITY; }

  __device__ ExpSum from_lane(int offset) const {
    return {.maximum = __shfl_xor_sync(0xffffffffU, maximum, offset),
            .sum = __shfl_xor_sync(0xffffffffU, sum, offset)};
  }
  __device__ std::uint64_t packed() const {
    return std::uint64_t{__float_as_uint(maximum)} << 32U | __float_as_uint(sum);
  }
  __device__ static ExpSum unpacked(std::uint64_t bits) {
    return {.maximum = __uint_as_float(static_cast<std::uint32_t>(bits >> 32U)),
            .sum = __uint_as_float(static_cast<std::uint32_t>(bits))};
  }
};

/// The score of a dot product, -inf where it is no number.
__device__ inline float scaled(const UpdateArgs& args, float dot) {
  const float x = dot * args.scale;
  if (!(fabsf(x) <= FLT_MAX)) return -INFINITY;
  return args.softcap > 0.0F ? args.softcap * tanhf(x / args.softcap) : x;
}

/// Slots that the new token sees: its own may lie behind all others.
__device__ inline int visible_slots(const LayerView& layer, std::int64_t slot,
                                    std::int64_t length) {
  const bool fits = slot >= 0 && slot <= length && slot < layer.capacity;
  return static_cast<int>(fits ? max(length, slot + 1) : length);
}
/// Slots of each of `parts` blocks.
__host__ __device__ inline int part_of(std::int64_t slots, int parts) {
  const std::int64_t tiles = (slots + kTile - 1) / kTile;
  return static_cast<int>((tiles + parts - 1) / parts * kTile);
}

/// Calls `use(task, first query head of the graph)` for all of the graph's query heads, as many at
/// a time as Dots takes.
template <class Dots, class Use>
__device__ inline void for_each_task(const LayerView& layer, const UpdateArgs& args, std::int64_t b,
                                     std::int64_t g, int begin, int end, Use&& use) {
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
                      .begin = begin,
                      .end = end},
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

/// The row and what else belongs to a new slot, by one warp.
__device__ inline void finish_row(const LayerView& layer, std::int64_t b, std::int64_t g,
                                  std::int64_t slot, bool drawn, std::uint64_t best) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  write_row(layer, row_of(layer, b, g, slot), drawn ? best : 0);
  if (lane < layer.populations) {
    scores_of(layer, b, g, lane)[slot] = 0.0F;
    if (layer.visits != nullptr) visits_of(layer, b, g, lane)[slot] = 0U;
  }
  if (lane != 0) return;
  if (layer.novelty != nullptr) novelty_of(layer, b, g)[slot] = 0U;
  atomicAdd(&layer.statistics->rows_written, 1ULL);
  if (!drawn) atomicAdd(&layer.statistics->rows_nonfinite, 1ULL);
}

/// By one warp, once its graph has read what take_slots changes: lane 0 gets a ticket, and the
/// graph with the last one takes the slots of all.
__device__ inline std::uint32_t take_ticket(const LayerView& layer) {
  if (threadIdx.x % 32 != 0) return 0;
  __threadfence();
  return atomicInc(&layer.counters->ticket,
                   static_cast<std::uint32_t>(layer.batch * layer.graphs - 1));
}
__device__ inline bool is_last(const LayerView& layer, std::uint32_t ticket) {
  ticket = __shfl_sync(0xffffffffU, ticket, 0);
  __threadfence();
  return ticket == static_cast<std::uint32_t>(layer.batch * layer.graphs - 1);
}

struct Shared {
  TopKScratch top_k;
  std::uint64_t best[32];
  std::uint64_t suspects[kMostCluster];  ///< not 0: the block met a new key without a score
  int suspect;
  int good;
};

/// A cluster of thread blocks a graph.
template <class Dots>
__global__ void __launch_bounds__(kMostThreads)
    update_kernel(LayerView layer, UpdateArgs args, int most_slots) {
  using T = typename Dots::T;
  extern __shared__ std::uint64_t memory[];
  __shared__ Shared shared;
  cluster_arrive();  // a block may write to another once that runs
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int warps = threads / 32;
  const int cluster = cluster_size();
  const int rank = cluster_rank();
  const int graph = static_cast<int>(blockIdx.x) / cluster;
  const std::int64_t b = graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  const int query_heads = layer.heads_per_graph * layer.group;

  const Layout layout = layout_of(query_heads, layer.top_k, cluster, threads, most_slots);
  auto* const bytes = reinterpret_cast<unsigned char*>(memory);
  auto* const merged = reinterpret_cast<std::uint64_t*>(bytes + layout.merged);
  auto* const sums = reinterpret_cast<std::uint64_t*>(bytes + layout.sums);
  auto* const warp_sums = reinterpret_cast<std::uint64_t*>(bytes + layout.warp_sums);
  auto* const shifts = reinterpret_cast<float*>(bytes + layout.shifts);
  auto* const barred = reinterpret_cast<std::uint32_t*>(bytes + layout.barred);
  auto* const scores = reinterpret_cast<float*>(bytes + layout.scores);
  const int pitch = static_cast<int>(layout.pitch);

  const std::int64_t length = layer.counters->length;
  const bool fault = rank == 0 && has_fault(layer);
  const std::int64_t slot = slot_at(args, b, g * layer.heads_per_graph, length);
  const int own_slot = static_cast<int>(slot);
  const int visible = visible_slots(layer, slot, length);
  const int part = part_of(visible, cluster);
  const int begin = min(rank * part, visible);
  const int end = min(begin + part, visible);
  for (int i = thread; i < (most_slots + 31) / 32; i += threads) barred[i] = 0;
  for (int i = thread; i < cluster * layer.top_k; i += threads) merged[i] = 0;
  if (thread < 32) shared.best[thread] = 0;
  if (thread == 0) {
    shared.suspect = 0;
    shared.top_k.found = 0;
    shared.good = fault ? 0 : 1;
  }
  __syncthreads();

  for_each_task<Dots>(
      layer, args, b, g, begin, end, [&](const auto& task, int first_query) {
        ExpSum mine[Dots::kValues];
        Dots::run(task, warp, warps,
                  [&](int i, int column, int j, std::int32_t position, float dot) {
                    float x = scaled(args, dot);
                    if (j == own_slot) {
                      if (x == -INFINITY) shared.suspect = 1;
                    } else if (position < 0) {
                      x = -INFINITY;
                    }
                    mine[i].add(x);
                    scores[(first_query + column) * pitch + j - begin] = x;
                    const bool sink = position >= 0 && position < layer.num_sinks;
                    if (column == 0 && (sink || j == own_slot)) {
                      atomicOr(&barred[(j - begin) / 32], 1U << ((j - begin) % 32));
                    }
                  });
        sum_warp<Dots>(mine);
#pragma unroll
        for (int i = 0; i < Dots::kValues; ++i) {
          const int column = Dots::column(lane, i);
          if (lane < Dots::kFirstRowBit && column < task.query_heads) {
            warp_sums[warp * query_heads + first_query + column] = mine[i].packed();
          }
        }
      });
  __syncthreads();

  cluster_wait();
  for (int i = thread; i < cluster * query_heads; i += threads) {
    const int q = i % query_heads;
    ExpSum sum;
    for (int w = 0; w < warps; ++w) sum.add(ExpSum::unpacked(warp_sums[w * query_heads + q]));
    store_remote(&sums[rank * query_heads + q], i / query_heads, sum.packed());
  }
  if (thread == 0) {
    store_remote(&shared.suspects[rank], 0, static_cast<std::uint64_t>(shared.suspect));
  }
  cluster_arrive();
  if (rank == 0 && !check_slots(layer, args, length, thread, threads)) shared.good = 0;
  cluster_wait();

  // From here on nothing reads what the last graph to come changes.
  std::uint32_t ticket = 0;
  if (rank == 0 && warp == 1) ticket = take_ticket(layer);
  for (int q = thread; q < query_heads; q += threads) {
    ExpSum sum;
    for (int c = 0; c < cluster; ++c) sum.add(ExpSum::unpacked(sums[c * query_heads + q]));
    shifts[q] = sum.shift();
  }
  __syncthreads();

  const float weight = 1.0F / static_cast<float>(query_heads);
  float highest = 0.0F;
#pragma unroll 4
  for (int j = thread; j < end - begin; j += threads) {
    float probability = 0.0F;
    for (int q = 0; q < query_heads; ++q) {
      probability += exp2_of((scores[q * pitch + j] - shifts[q]) * kLog2E);
    }
    probability *= weight;
    if ((barred[j / 32] >> (j % 32) & 1U) != 0) probability = 0.0F;
    scores[j] = probability;
    highest = fmaxf(highest, probability);
  }
  block_top_k(scores, end - begin, begin, highest, layer.top_k, shared.top_k,
              [&](int place, std::uint64_t found) {
                store_remote(&merged[rank * layer.top_k + place], 0, found);
              });
  __syncwarp();
  cluster_arrive();
  if (rank != 0) return;
  cluster_wait();

  bool drawn = true;
  for (int c = 0; c < cluster; ++c) drawn = drawn && shared.suspects[c] == 0;
  if (!drawn && shared.good != 0) drawn = all_finite<T>(layer, args, b, g, slot);
  for (int i = thread; i < cluster * layer.top_k; i += threads) {
    const std::uint64_t own = merged[i];
    if (own == 0) continue;
    const int mine = i / layer.top_k;
    int better = i % layer.top_k;
    for (int c = 0; c < cluster; ++c) {
      if (c == mine) continue;
      // Lists descend: the number of entries above is found by halving.
      int above = 0;
      for (int step = layer.top_k; step > 0; step /= 2) {
        if (above + step <= layer.top_k && merged[c * layer.top_k + above + step - 1] > own) {
          above += step;
        }
      }
      better += above;
    }
    if (better < layer.top_k) shared.best[better] = own;
  }
  __syncthreads();
  if (shared.good == 0) return;
  if (warp == 0) {
    finish_row(layer, b, g, slot, drawn, shared.best[lane]);
  } else if (warp == 1 && is_last(layer, ticket)) {
    take_slots(layer, args, length);
  }
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
  std::int32_t splits;
};

/// The slots [begin, end) of a block, and whose they are.
struct SplitPart {
  std::int64_t b;
  std::int64_t g;
  std::int64_t slot;  ///< of the new token
  int begin;
  int end;

  __device__ SplitPart(const LayerView& layer, const UpdateArgs& args, int graph, int split,
                       int splits)
      : b(graph / layer.graphs), g(graph % layer.graphs) {
    const std::int64_t length = layer.counters->length;
    slot = slot_at(args, b, g * layer.heads_per_graph, length);
    const int visible = visible_slots(layer, slot, length);
    const int part = part_of(visible, splits);
    begin = min(split * part, visible);
    end = min(begin + part, visible);
  }
};

template <class Dots>
__global__ void __launch_bounds__(kSplitThreads)
    split_sums_kernel(LayerView layer, UpdateArgs args, SplitScratch scratch) {
  __shared__ std::uint64_t warp_sums[kSplitWarps][Dots::kColumns];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int block = static_cast<int>(blockIdx.x);
  const int graph = block / scratch.splits;
  const SplitPart part(layer, args, graph, block % scratch.splits, scratch.splits);
  const int query_heads = layer.heads_per_graph * layer.group;
  for_each_task<Dots>(
      layer, args, part.b, part.g, part.begin, part.end, [&](const auto& task, int first_query) {
        ExpSum mine[Dots::kValues];
        Dots::run(task, warp, kSplitWarps,
                  [&](int i, int /*column*/, int j, std::int32_t position, float dot) {
                    const bool seen = position >= 0 || j == part.slot;
                    mine[i].add(seen ? scaled(args, dot) : -INFINITY);
                  });
        sum_warp<Dots>(mine);
        for (int i = 0; i < Dots::kValues; ++i) {
          if (lane < Dots::kFirstRowBit) warp_sums[warp][Dots::column(lane, i)] = mine[i].packed();
        }
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < task.query_heads) {
          ExpSum sum;
          for (int w = 0; w < kSplitWarps; ++w) {
            sum.add(ExpSum::unpacked(warp_sums[w][threadIdx.x]));
          }
          scratch.sums[std::int64_t{block} * query_heads + first_query + threadIdx.x] =
              sum.packed();
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
  for (int offset = 16; offset > 0; offset /= 2) sum.add(sum.from_lane(offset));
  if (lane == 0) scratch.shifts[i] = sum.shift();
}

template <class Dots>
__global__ void __launch_bounds__(kSplitThreads)
    split_lists_kernel(LayerView layer, UpdateArgs args, SplitScratch scratch) {
  extern __shared__ float columns[];  // (kColumns, kChunkPitch)
  __shared__ float probabilities[kChunk];
  __shared__ std::uint64_t best[32];
  __shared__ TopKScratch top_k;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x);
  const int graph = block / scratch.splits;
  const SplitPart part(layer, args, graph, block % scratch.splits, scratch.splits);
  const int query_heads = layer.heads_per_graph * layer.group;
  const float weight = 1.0F / static_cast<float>(query_heads);
  const float* const shifts = scratch.shifts + std::int64_t{graph} * query_heads;
  const std::int32_t* const positions = positions_of(layer, part.b, part.g);
  std::uint64_t kept = 0;  // of warp 0: the best so far
  for (int begin = part.begin; begin < part.end; begin += kChunk) {
    const int count = min(kChunk, part.end - begin);
    for (int j = thread; j < count; j += kSplitThreads) probabilities[j] = 0.0F;
    for_each_task<Dots>(
        layer, args, part.b, part.g, begin, begin + count, [&](const auto& task, int first_query) {
          Dots::run(task, warp, kSplitWarps,
                    [&](int /*i*/, int column, int j, std::int32_t position, float dot) {
                      const bool seen = position >= 0 || j == part.slot;
                      columns[column * kChunkPitch + j - begin] =
                          seen ? scaled(args, dot) : -INFINITY;
                    });
          __syncthreads();
          for (int j = thread; j < count; j += kSplitThreads) {
            float sum = probabilities[j];
            for (int q = 0; q < task.query_heads; ++q) {
              sum += exp2_of((columns[q * kChunkPitch + j] - shifts[first_query + q]) * kLog2E);
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
    if (thread == 0) top_k.found = 0;
    if (thread < 32) best[thread] = 0;
    block_top_k(probabilities, count, begin, highest, layer.top_k, top_k,
                [&](int place, std::uint64_t found) { best[place] = found; });
    __syncthreads();
    if (warp == 0) insert(kept, best[lane], layer.top_k);
    __syncthreads();
  }
  if (thread < layer.top_k) scratch.lists[std::int64_t{block} * layer.top_k + thread] = kept;
}

/// One block a graph.
template <class T>
__global__ void __launch_bounds__(kSplitThreads)
    split_merge_kernel(LayerView layer, UpdateArgs args, SplitScratch scratch) {
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
  if (!check_slots(layer, args, length, thread, kSplitThreads)) good = false;
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
  if (good) finish_row(layer, b, g, slot, drawn, kept);
  const bool last = is_last(layer, take_ticket(layer));
  if (good && last) take_slots(layer, args, length);
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
void launch_splits(const LayerView& layer, const UpdateArgs& args, cudaStream_t stream) {
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  const std::int64_t query_heads = std::int64_t{layer.heads_per_graph} * layer.group;
  SplitScratch scratch{};
  scratch.splits = splits_of(layer);
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

std::int64_t slots_a_block(std::int64_t extent, int cluster) {
  return part_of(std::max<std::int64_t>(extent, 1), cluster);
}

std::int64_t shared_bytes(const LayerView& layer, std::int64_t extent, int cluster, int threads) {
  return layout_of(layer.heads_per_graph * layer.group, layer.top_k, cluster, threads,
                   static_cast<int>(slots_a_block(extent, cluster)))
      .bytes;
}

template <class Dots>
void launch_clusters(const LayerView& layer, const UpdateArgs& args, std::int64_t extent,
                     const UpdatePlan& plan, cudaStream_t stream) {
  const std::int64_t bytes = shared_bytes(layer, extent, plan.cluster, plan.threads);
  const auto kernel = update_kernel<Dots>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  if (plan.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(layer.batch * layer.graphs * plan.cluster));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, layer, args,
                           static_cast<int>(slots_a_block(extent, plan.cluster))),
        "update_kernel");
}

bool rows_start_at(const TokensView& tokens, std::int64_t bytes, std::int64_t element) {
  const auto is_multiple = [&](std::int64_t stride) { return stride * element % bytes == 0; };
  return reinterpret_cast<std::uintptr_t>(tokens.data) % static_cast<std::uintptr_t>(bytes) == 0 &&
         is_multiple(tokens.sequence_stride) && is_multiple(tokens.head_stride) &&
         is_multiple(tokens.token_stride);
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

/// Calls `launch(Dots{})` with the way to read keys of this shape.
template <class T, class Launch>
void with_dots(const LayerView& layer, const UpdateArgs& args, Launch&& launch) {
  constexpr std::int64_t kElement = sizeof(T);
  const int dim = layer.head_dim;
  const auto start_at = [&](std::int64_t bytes) {
    return rows_start_at(args.keys, bytes, kElement) && rows_start_at(args.queries, bytes, kElement);
  };
  if constexpr (kElement == 2) {
    if (dim <= 256 && dim % 8 == 0 && start_at(16) &&
        device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8) {
      const auto with_blocks = [&]<int kPanels>() {
        if (dim <= 64) {
          launch(TensorDots<T, 2, kPanels>{});
        } else if (dim <= 96) {
          launch(TensorDots<T, 3, kPanels>{});
        } else if (dim <= 128) {
          launch(TensorDots<T, 4, kPanels>{});
        } else {
          launch(TensorDots<T, 8, kPanels>{});
        }
      };
      if (layer.group <= 8) {
        with_blocks.template operator()<1>();
      } else {
        with_blocks.template operator()<2>();
      }
      return;
    }
  }
  if (dim % 4 != 0 || !start_at(4 * kElement)) {
    launch(CoreDots<T, false, 4>{});
    return;
  }
  if constexpr (kElement == 4) {
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
  with_dots<T>(layer, args, [&](auto dots) {
    if (plan.cluster == 0) {
      launch_splits<decltype(dots)>(layer, args, stream);
    } else {
      launch_clusters<decltype(dots)>(layer, args, extent, plan, stream);
    }
  });
}

}  // namespace

std::int64_t update_scratch(const LayerView& layer) {
  if (plan_update(layer, layer.capacity).cluster != 0) return 0;
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  const std::int64_t query_heads = std::int64_t{layer.heads_per_graph} * layer.group;
  return graphs * (8 * splits_of(layer) * (query_heads + layer.top_k) + 4 * query_heads);
}

UpdatePlan plan_update(const LayerView& layer, std::int64_t extent) {
  const int most_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
                         static_cast<int>(sizeof(Shared));
  const bool clusters = device_attribute(cudaDevAttrClusterLaunch) != 0;
  UpdatePlan plan{.cluster = 1, .threads = 256};
  const int most = clusters ? kPortableCluster : 1;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const auto bytes = [&] { return shared_bytes(layer, extent, plan.cluster, plan.threads); };
  while (plan.cluster < most &&
         (bytes() > most_bytes ||
          std::int64_t{layer.batch} * layer.graphs * plan.cluster < 2 * processors)) {
    plan.cluster *= 2;
  }
  if (bytes() > most_bytes) plan.cluster = 0;
  return plan;
}

void launch_update(const LayerView& layer, const UpdateArgs& args, std::int64_t extent,
                   cudaStream_t stream) {
  launch_update(layer, args, extent, plan_update(layer, extent), stream);
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
