// Moves kept slots to the front, in place: of the caller's tensors and, at the same time, of the
// graph.
//
// keep[i] - i never falls along the slots of a list, so all moves to the right come before all
// moves to the left, and the two kinds never touch each other's slots. Moves to the left are done
// in ascending chunks: what a later chunk reads lies behind everything that an earlier one writes,
// so its loads may be under way already. Only within a chunk all loads must be done before any
// store. Moves to the right mirror this. Where the slots stand in front of every -1, there are no
// moves to the right.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_rows.cuh"
#include "cuda/device/thread_cluster.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

/// One thread block holds kStages chunks of its share, kVectors a thread each.
constexpr int kMoveThreads = 512;
constexpr int kVectors = 4;
constexpr int kStages = 3;
constexpr int kMostVectorBytes = 16;
constexpr int kMoveShared = kStages * kVectors * kMoveThreads * kMostVectorBytes;
/// Thread blocks that share one row's chunks; more than 8 are not portable.
constexpr int kMostCluster = 8;
/// Thread blocks that keep a GPU busy: about two a multiprocessor.
constexpr std::int64_t kBusy = 240;

/// A task is a part of one graph, or one row of one sequence of a tensor; a cluster does one. The
/// rows of the graphs, which take longest, come first, then the tensors, then what graphs have one
/// number a slot of.
struct MoveArgs {
  MoveJob jobs[kMostMoveJobs];
  std::int64_t first_task[kMostMoveJobs];
  std::int32_t vector_bytes[kMostMoveJobs];
  std::int32_t count;
  std::int32_t graphs;       ///< of all sequences; 0: only tensors move
  std::int32_t graph_tasks;  ///< their parts
  std::int64_t first_array;  ///< task
  std::int32_t cluster;
  std::int32_t kept_length;
  TableView<const std::int32_t> keep;
  const FaultRecord* fault;
};

/// One row of a tensor and its list of kept slots.
struct RowMove {
  char* base;
  std::int64_t slot_stride;
  std::int32_t vectors;  ///< of a slot
  const std::int32_t* keep;
  std::int64_t keep_stride;
};

/// Vectors [number, number + ...) of a row in the order in which they move: slot and vector in it.
struct Cursor {
  std::int32_t slot;
  std::int32_t vector;

  __device__ void advance(std::int32_t slots, std::int32_t vectors, std::int32_t width) {
    slot += slots;
    vector += vectors;
    if (vector >= width) {
      vector -= width;
      ++slot;
    }
  }
};

template <class Vector>
__device__ void copy_async(Vector* to, const Vector* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Vector) >= 4) {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (sizeof(Vector) == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from),
                   "n"(static_cast<int>(sizeof(Vector)))
                   : "memory");
    }
    return;
  }
#endif
  *static_cast<volatile Vector*>(to) = *from;
}
template <>
__device__ void copy_async<uint4>(uint4* to, const uint4* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
#else
  *to = *from;
#endif
}

__device__ void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits until all but the newest kStages - 1 groups of the thread are there.
__device__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
#endif
}

/// All threads that share a chunk. What they loaded has arrived before they come here and nobody
/// reads what another one stored, so no memory needs to become visible: "relaxed" spares the wait
/// for the stores of the last chunk.
__device__ void chunk_barrier(int cluster) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (cluster > 1) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

/// Moves slots [begin, end) of the list; `left`: those that come from behind, in ascending order,
/// else those that come from in front, in descending order.
template <class Vector>
__device__ void move_slots(const RowMove& row, bool left, std::int32_t begin, std::int32_t end,
                           int cluster, int rank, Vector* staged) {
  const std::int32_t slots = end - begin;
  const std::int64_t all = std::int64_t{slots} * row.vectors;
  const std::int32_t step = cluster * kVectors * kMoveThreads;
  const auto chunks = static_cast<std::int32_t>((all + step - 1) / step);
  const std::int32_t step_slots = step / row.vectors;
  const std::int32_t step_vectors = step % row.vectors;
  const auto index_of = [&](std::int32_t slot) { return left ? begin + slot : end - 1 - slot; };

  Cursor load[kVectors] = {};
  Cursor store[kVectors];
  std::int32_t from[kVectors];
  const auto fetch = [&](int u) {
    from[u] = load[u].slot < slots ? row.keep[index_of(load[u].slot) * row.keep_stride] : -1;
  };
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const std::int32_t number =
        (rank * kVectors + u) * kMoveThreads + static_cast<std::int32_t>(threadIdx.x);
    load[u] = {number / row.vectors, number % row.vectors};
    store[u] = load[u];
    fetch(u);
  }
  std::uint32_t moving = 0;  // a bit a vector, the newest chunk's last
  int load_stage = 0;
  int store_stage = 0;
  for (std::int32_t chunk = 0; chunk < chunks + kStages - 1; ++chunk) {
    moving <<= kVectors;
    if (chunk < chunks) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        const std::int32_t to = index_of(load[u].slot);
        if (from[u] >= 0 && (left ? from[u] > to : from[u] < to)) {
          moving |= 1U << u;
          const char* source =
              row.base + from[u] * row.slot_stride +
              std::int64_t{load[u].vector} * static_cast<std::int64_t>(sizeof(Vector));
          copy_async(staged + (load_stage * kVectors + u) * kMoveThreads + threadIdx.x,
                     reinterpret_cast<const Vector*>(source));
        }
        load[u].advance(step_slots, step_vectors, row.vectors);
        fetch(u);
      }
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
    commit_copies();
    if (chunk < kStages - 1) continue;
    wait_for_copies();
    chunk_barrier(cluster);
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if ((moving >> ((kStages - 1) * kVectors + u) & 1U) != 0) {
        char* to = row.base + index_of(store[u].slot) * row.slot_stride +
                   std::int64_t{store[u].vector} * static_cast<std::int64_t>(sizeof(Vector));
        *reinterpret_cast<Vector*>(to) =
            staged[(store_stage * kVectors + u) * kMoveThreads + threadIdx.x];
      }
      store[u].advance(step_slots, step_vectors, row.vectors);
    }
    store_stage = store_stage + 1 == kStages ? 0 : store_stage + 1;
  }
}

/// First index i of the list for which is_in_front(i, keep[i]) does not hold, as for none behind
/// it. All threads of the block take part and get the same.
template <class IsInFront>
__device__ std::int32_t first_index(const RowMove& row, std::int32_t length,
                                    IsInFront&& is_in_front) {
  std::int32_t low = 0;
  std::int32_t high = length;  // the answer lies in [low, high]
  while (low < high) {
    const std::int32_t step = (high - low + kMoveThreads - 1) / kMoveThreads;
    const std::int32_t i =
        min(low + static_cast<std::int32_t>(threadIdx.x) * step, std::int32_t{high - 1});
    const std::int32_t slot = row.keep[i * row.keep_stride];
    // Samples ascend with the thread, so those in front of the answer are counted.
    const int in_front = __syncthreads_count(static_cast<int>(is_in_front(i, slot)));
    if (in_front == 0) return low;
    const std::int32_t last = min(low + (in_front - 1) * step, std::int32_t{high - 1});
    if (in_front < kMoveThreads) high = min(low + in_front * step, std::int32_t{high});
    low = last + 1;
  }
  return low;
}

template <class Vector>
__device__ void move_row(const RowMove& row, std::int32_t length, int cluster, int rank,
                         char* shared) {
  auto* const staged = reinterpret_cast<Vector*>(shared);
  std::int32_t stays = 0;  // slots from here on stay or come from behind
  const bool begins_with_slot = row.keep[0] >= 0;
  const bool ends_with_slot = row.keep[(length - 1) * row.keep_stride] >= 0;
  if (begins_with_slot && !ends_with_slot) {
    length = first_index(row, length, [](std::int32_t, std::int32_t slot) { return slot >= 0; });
  } else if (!begins_with_slot) {
    const std::int32_t full =
        first_index(row, length, [](std::int32_t, std::int32_t slot) { return slot < 0; });
    stays = first_index(row, length, [](std::int32_t i, std::int32_t slot) { return slot < i; });
    if (full < stays) move_slots(row, false, full, stays, cluster, rank, staged);
  }
  if (stays < length) move_slots(row, true, stays, length, cluster, rank, staged);
}

// ---- the graph

/// A row of the graph for the slots to come, where it lies: edges to tokens that go are left out.
template <RowFormat kFormat>
__device__ void remap_row(const LayerView& layer, const std::int32_t* positions,
                          const std::int32_t* keep, std::int64_t keep_stride,
                          std::int32_t kept_length, const std::int32_t* new_slots,
                          std::int32_t position, std::uint32_t* row) {
  const int top_k = layer.top_k;
  // Kept edges are pushed together first; writing never overtakes reading. Some edges are read
  // ahead, so that their loads do not wait for each other.
  constexpr int kAhead = 8;
  int count = 0;
  std::uint32_t sum = 0;
  std::uint32_t before = 0;
  for (int first = 0; first < top_k; first += kAhead) {
    std::int32_t targets[kAhead];
    std::uint32_t uppers[kAhead] = {};
#pragma unroll
    for (int e = 0; e < kAhead; e += 4) {
      const bool there = first + e < top_k;  // four at a time: top_k is a multiple of four
      const auto four = [&](const std::uint32_t* words, std::uint32_t out[4]) {
        constexpr std::uint32_t kNone = ~0U;  // in a packed row, too
        const uint4 read = there ? *reinterpret_cast<const uint4*>(words + first + e)
                                 : uint4{kNone, kNone, kNone, kNone};
        out[0] = read.x;
        out[1] = read.y;
        out[2] = read.z;
        out[3] = read.w;
      };
      std::uint32_t words[4];
      four(row, words);
      if constexpr (kFormat == RowFormat::wide) four(row + top_k, uppers + e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        targets[e + i] = neighbor_at<kFormat>(words, i);
        if constexpr (kFormat == RowFormat::packed) {
          uppers[e + i] = threshold_at<kFormat>(words, top_k, i);
        }
      }
    }
    std::int32_t moved[kAhead];
    bool is_older[kAhead];
#pragma unroll
    for (int e = 0; e < kAhead; ++e) {
      const std::int32_t neighbor = targets[e];
      moved[e] = neighbor >= 0 ? new_slots[neighbor] : -1;
      const std::int32_t its = neighbor >= 0 ? positions[neighbor] : -1;
      is_older[e] = its >= 0 && its < position;
    }
#pragma unroll
    for (int e = 0; e < kAhead; ++e) {
      // Only an entry of new_slots that its list confirms is one of this compaction.
      const std::int32_t to = moved[e];
      const bool stays =
          is_older[e] && to >= 0 && to < kept_length && keep[to * keep_stride] == targets[e];
      targets[e] = stays ? to : -1;
    }
#pragma unroll
    for (int e = 0; e < kAhead; ++e) {
      if (first + e >= top_k) break;
      std::uint32_t width = 1;
      if constexpr (kFormat != RowFormat::slots) {
        width = uppers[e] - before;
        before = uppers[e];
      }
      if (width == 0 || targets[e] < 0) continue;
      sum += width;
      put_edge<kFormat>(row, top_k, count++, targets[e], sum);
    }
  }
  const std::uint32_t total = sum;
  if (layer.law == EdgeLaw::weighted && total != kAllOnes) {
    for (int k = 0; k < count; ++k) {
      const std::uint64_t widths = threshold_at<kFormat>(row, top_k, k);
      const std::uint64_t scaled = ((widths << 32U) + total / 2) / total;
      put_threshold<kFormat>(row, top_k, k,
                             k + 1 == count ? kAllOnes : static_cast<std::uint32_t>(scaled));
    }
  }
  if (layer.law == EdgeLaw::weighted && count > 0) sum = kAllOnes;
  for (int k = count; k < top_k; ++k) put_edge<kFormat>(row, top_k, k, -1, sum);
}

/// A graph, and the cluster that works at it.
struct GraphMove {
  std::int64_t b;
  std::int64_t g;
  RowMove move;  ///< one word a slot
  /// The kept slots in the list, of a graph that keeps fewer than others: behind or before the rest
  /// of it, which is empty afterwards.
  std::int32_t begin;
  std::int32_t end;
  int cluster;
  int rank;
  int thread;  ///< of the cluster
  int threads;

  __device__ GraphMove(const LayerView& layer, const MoveArgs& args, const std::int64_t* kept,
                       int graph, int its_rank)
      : b(graph / layer.graphs),
        g(graph % layer.graphs),
        move{.base = nullptr,
             .slot_stride = 4,
             .vectors = 1,
             .keep = args.keep.data + b * args.keep.sequence_stride +
                     g * layer.heads_per_graph * args.keep.head_stride,
             .keep_stride = args.keep.slot_stride},
        begin(0),
        end(static_cast<std::int32_t>(kept[graph])),
        cluster(args.cluster),
        rank(its_rank),
        thread(its_rank * kMoveThreads + static_cast<int>(threadIdx.x)),
        threads(args.cluster * kMoveThreads) {
    if (end < args.kept_length && !(end > 0 && move.keep[0] >= 0)) {
      begin = args.kept_length - end;
      end = args.kept_length;
    }
  }
};

/// One number a slot: they move, then those in front of the kept slots and behind them become
/// `nothing`.
__device__ void rearrange(GraphMove graph, void* data, std::int32_t nothing, std::int32_t length,
                          char* shared) {
  if (graph.begin < graph.end) {
    graph.move.base = static_cast<char*>(data);
    move_row<unsigned>(graph.move, graph.end, graph.cluster, graph.rank, shared);
  }
  auto* const words = static_cast<std::int32_t*>(data);
  for (std::int32_t i = graph.thread; i < graph.begin; i += graph.threads) words[i] = nothing;
  for (std::int32_t i = graph.end + graph.thread; i < length; i += graph.threads) {
    words[i] = nothing;
  }
}

/// Rows are rewritten, which reads all positions; then both move. Rows behind those of the list are
/// written when a token takes their place.
__device__ void move_rows_of_graph(const LayerView& layer, const MoveArgs& args,
                                   const GraphMove& graph, const std::int32_t* new_slots,
                                   std::int32_t length, char* shared) {
  std::int32_t* const positions = positions_of(layer, graph.b, graph.g);
  std::uint32_t* const rows = row_of(layer, graph.b, graph.g, 0);
  const std::int64_t row_words = layer.row_words;
  RowMove move = graph.move;
  new_slots += graph_index(layer, graph.b, graph.g) * layer.capacity;
  const auto remap = [&]<RowFormat kFormat>() {
    for (std::int32_t i = graph.begin + graph.thread; i < graph.end; i += graph.threads) {
      const std::int32_t slot = move.keep[i * move.keep_stride];
      remap_row<kFormat>(layer, positions, move.keep, move.keep_stride, args.kept_length, new_slots,
                         positions[slot], rows + slot * row_words);
    }
  };
  if (layer.format == RowFormat::packed) {
    remap.template operator()<RowFormat::packed>();
  } else if (layer.format == RowFormat::wide) {
    remap.template operator()<RowFormat::wide>();
  } else {
    remap.template operator()<RowFormat::slots>();
  }
  cluster_sync(graph.cluster);

  if (graph.begin < graph.end) {
    move.base = reinterpret_cast<char*>(rows);
    move.slot_stride = std::int64_t{4} * layer.row_words;
    move.vectors = layer.row_words / 4;
    move_row<uint4>(move, graph.end, graph.cluster, graph.rank, shared);
    __syncthreads();  // words are staged elsewhere than vectors
  }
  std::uint32_t* const empty = rows + (graph.begin == 0 ? graph.end * row_words : 0);
  const std::int32_t empty_slots = args.kept_length - (graph.end - graph.begin);
  for (std::int64_t w = graph.thread; w < empty_slots * row_words; w += graph.threads) {
    empty[w] = detail::empty_word(layer.format, layer.top_k, static_cast<int>(w % row_words));
  }
  rearrange(graph, positions, -1, length, shared);
}

/// What a graph has one number a slot of besides positions: scores and visits of each population,
/// and novelty.
__host__ __device__ int arrays_of(const LayerView& layer) {
  return layer.populations * (layer.visits != nullptr ? 2 : 1) + (layer.novelty != nullptr ? 1 : 0);
}
__device__ void* array_of(const LayerView& layer, std::int64_t b, std::int64_t g, int array) {
  if (array < layer.populations) return scores_of(layer, b, g, array);
  array -= layer.populations;
  if (layer.visits == nullptr || array == layer.populations) return novelty_of(layer, b, g);
  return visits_of(layer, b, g, array);
}

/// A part of one graph, by a cluster: its rows and positions, or one of its arrays. The last part
/// of all books the lengths.
__device__ void move_graph(const LayerView& layer, const MoveArgs& args,
                           const std::int32_t* new_slots, const std::int64_t* kept, int task,
                           int rank, char* shared) {
  const auto length = static_cast<std::int32_t>(layer.counters->length);
  const GraphMove graph(layer, args, kept, task % args.graphs, rank);
  const int part = task / args.graphs;
  if (part == 0) {
    move_rows_of_graph(layer, args, graph, new_slots, length, shared);
  } else {
    rearrange(graph, array_of(layer, graph.b, graph.g, part - 1), 0, length, shared);
  }
  cluster_sync(graph.cluster);
  if (graph.thread != 0) return;
  const std::int64_t first_graph = graph_index(layer, graph.b, 0);
  if (part == 0 && kept[first_graph + graph.g] != kept[first_graph]) layer.counters->ordered = 0;
  const auto last = static_cast<std::uint32_t>(args.graph_tasks - 1);
  if (atomicInc(&layer.counters->ticket, last) != last) return;
  for (std::int64_t i = 0; i < layer.batch; ++i) {
    layer.sequences[i].held = kept[i * layer.graphs];
  }
  layer.counters->length = args.kept_length;
}

__global__ void __launch_bounds__(kMoveThreads, 2)
    compact_kernel(const __grid_constant__ LayerView layer, const __grid_constant__ MoveArgs args,
                   const std::int32_t* new_slots, const std::int64_t* kept) {
  if (*static_cast<const volatile std::uint32_t*>(&args.fault->fault) != 0) return;
  extern __shared__ __align__(16) char shared[];
  std::int64_t task = blockIdx.x / args.cluster;
  const int rank = static_cast<int>(blockIdx.x % args.cluster);
  const bool is_array = task >= args.first_array;
  if (task < args.graphs || is_array) {
    if (is_array) task -= args.first_array - args.graphs;
    move_graph(layer, args, new_slots, kept, static_cast<int>(task), rank, shared);
    return;
  }
  int j = 0;
  while (j + 1 < args.count && task >= args.first_task[j + 1]) ++j;
  const MoveJob& job = args.jobs[j];
  task -= args.first_task[j];
  const std::int64_t b = task / job.rows;
  const std::int64_t head = task % job.rows;
  const int vector_bytes = args.vector_bytes[j];
  const RowMove row{
      .base = static_cast<char*>(job.data) + b * job.sequence_stride + head * job.row_stride,
      .slot_stride = job.slot_stride,
      .vectors = static_cast<std::int32_t>(job.width / vector_bytes),
      .keep = args.keep.data + b * args.keep.sequence_stride + head * args.keep.head_stride,
      .keep_stride = args.keep.slot_stride};
  switch (vector_bytes) {
    case 16:
      move_row<uint4>(row, args.kept_length, args.cluster, rank, shared);
      break;
    case 8:
      move_row<unsigned long long>(row, args.kept_length, args.cluster, rank, shared);
      break;
    case 4:
      move_row<unsigned>(row, args.kept_length, args.cluster, rank, shared);
      break;
    case 2:
      move_row<unsigned short>(row, args.kept_length, args.cluster, rank, shared);
      break;
    default:
      move_row<unsigned char>(row, args.kept_length, args.cluster, rank, shared);
      break;
  }
}

/// The widest vector that divides all addresses of a job.
std::int32_t vector_bytes_of(const MoveJob& job) {
  const auto bits = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(job.data)) |
                    static_cast<std::uint64_t>(job.sequence_stride | job.row_stride |
                                               job.slot_stride | job.width);
  std::int32_t bytes = kMostVectorBytes;
  while (bits % static_cast<std::uint64_t>(bytes) != 0) bytes /= 2;
  return bytes;
}

bool has_clusters() {
  int device = 0;
  int major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  return major >= 9;
}

void launch(const LayerView* layer, const MoveJob* jobs, int count, std::int64_t batch,
            const TableView<const std::int32_t>& keep, std::int64_t kept_length,
            const std::int32_t* new_slots, const std::int64_t* kept, const FaultRecord* fault,
            cudaStream_t stream) {
  MoveArgs args{};
  args.kept_length = static_cast<std::int32_t>(kept_length);
  args.keep = keep;
  args.fault = fault;
  args.graphs = layer == nullptr ? 0 : layer->batch * layer->graphs;
  args.graph_tasks = layer == nullptr ? 0 : args.graphs * (1 + arrays_of(*layer));
  std::int64_t widest = 0;
  for (int j = 0; j < count; ++j) widest = std::max(widest, jobs[j].width);
  std::int64_t tasks = args.graphs;
  std::int64_t long_tasks = 0;  // those that decide when the launch ends
  for (int j = 0; j < count && kept_length > 0; ++j) {
    if (jobs[j].width == 0) continue;
    args.jobs[args.count] = jobs[j];
    args.first_task[args.count] = tasks;
    args.vector_bytes[args.count++] = vector_bytes_of(jobs[j]);
    tasks += batch * jobs[j].rows;
    if (2 * jobs[j].width >= widest) long_tasks += batch * jobs[j].rows;
  }
  args.first_array = tasks;
  tasks += args.graph_tasks - args.graphs;
  if (tasks == 0) return;
  if (long_tasks == 0) long_tasks = tasks;
  args.cluster = 1;
  if (has_clusters()) {
    while (args.cluster < kMostCluster && long_tasks * args.cluster < kBusy) args.cluster *= 2;
  }
  check(cudaFuncSetAttribute(compact_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kMoveShared),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(args.cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tasks * args.cluster));
  config.blockDim = dim3(kMoveThreads);
  config.dynamicSmemBytes = kMoveShared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = args.cluster > 1 ? 1 : 0;
  const LayerView none{};
  check(cudaLaunchKernelEx(&config, compact_kernel, layer == nullptr ? none : *layer, args,
                           new_slots, kept),
        "compact_kernel");
}

}  // namespace

void launch_move(const MoveJob* jobs, int count, std::int64_t batch,
                 const TableView<const std::int32_t>& keep, std::int64_t kept_length,
                 const FaultRecord* fault, cudaStream_t stream) {
  launch(nullptr, jobs, count, batch, keep, kept_length, nullptr, nullptr, fault, stream);
}

void launch_compact(const LayerView& layer, const MoveJob* jobs, int count,
                    const TableView<const std::int32_t>& keep, std::int64_t kept_length,
                    const std::int32_t* new_slots, const std::int64_t* kept, cudaStream_t stream) {
  launch(&layer, jobs, count, layer.batch, keep, kept_length, new_slots, kept, layer.fault, stream);
}

}  // namespace spectralkv::cuda
