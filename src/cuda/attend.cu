// The attention of one new token a sequence, and its row of the graph from the same scores.
//
// A cluster of thread blocks a KV head: each block reads its part of the keys and values once, with
// a softmax whose maximum may still rise, and the blocks merge their maxima, sums and means through
// each other's shared memory. Where shared memory holds the scores of a graph, the row is drawn
// from them as in score_topk.cu, in the same launch. Where it does not (long caches of many query
// heads, and graphs that heads share) the row takes an update of its own, which reads the keys
// again.
#include <algorithm>
#include <array>
#include <cfloat>
#include <cstdint>
#include <span>
#include <type_traits>

#include "cuda/clusters.h"
#include "cuda/cuda_check.h"
#include "cuda/device/kernel_order.cuh"
#include "cuda/device/key_dots.cuh"
#include "cuda/device/new_row.cuh"
#include "cuda/device/thread_cluster.cuh"
#include "cuda/device/value_means.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_shape.h"

namespace spectralkv::cuda {
namespace {

/// Threads of a block: as many as have the registers for what is under way.
template <class Dots>
inline constexpr int kThreads = 256;
template <class T, int kBlocks, int kHeads, int kDepth>
inline constexpr int kThreads<TensorDots<T, kBlocks, kHeads, kDepth>> =
    kBlocks <= 4 && kHeads <= 8 ? 384 : 256;
/// Query heads that the blocks take at a time, at most.
constexpr int kMostColumns = 16;
/// The way that takes most shared memory.
using WidestDots = TensorDots<__nv_bfloat16, 4, kMostColumns, 1>;

/// How a launch is spread, and what it sees besides its arguments.
struct AttendPlan {
  int cluster;     ///< thread blocks a KV head
  int slots;       ///< most of a block
  bool draws_row;  ///< scores stay, and the row is drawn from them
  /// Of each KV head's slots, where the layer is divided at its first_slots; data null: all are
  /// seen.
  TableView<const std::int32_t> positions;
};

/// Where a block keeps what in shared memory, in bytes: behind a RowLayout.
struct AttendLayout {
  int peaks;   ///< f32 (query heads): the block's highest score
  int means;   ///< f32 (query heads, D): of the block, and one more element
  int parts;   ///< u64 (cluster, pairs of a block): pairs of elements from all blocks
  int merged;  ///< f32 (warps, columns, pitch)
  int scores;  ///< f32 (warps, columns, kScorePitch): of one tile, where scores do not stay
  int bytes;
  int pitch;
  int pairs;     ///< of elements of all query heads
  int per_rank;  ///< pairs that a block of the cluster puts together

  /// Query heads lie in different banks.
  static constexpr int kScorePitch = kTile + 8;

  __host__ __device__ AttendLayout(int behind, int warps, int columns, int query_heads,
                                   int head_dim, const AttendPlan& plan)
      : peaks(aligned(behind)),
        means(aligned(peaks + 4 * query_heads)),
        pitch((head_dim + 3) / 4 * 4 + 4),
        pairs((query_heads * head_dim + 1) / 2),
        per_rank((pairs + plan.cluster - 1) / plan.cluster) {
    parts = aligned(means + 8 * pairs);
    merged = aligned(parts + 8 * plan.cluster * per_rank);
    scores = merged + 4 * warps * columns * pitch;
    bytes = scores + (plan.draws_row ? 0 : 4 * warps * columns * kScorePitch);
  }

  /// Pairs that block `rank` puts together.
  __device__ int pairs_of(int rank) const { return max(min(pairs - rank * per_rank, per_rank), 0); }

 private:
  __host__ __device__ static int aligned(int offset) { return (offset + 15) / 16 * 16; }
};

/// Of a multiple of 16 bytes, so that the memory behind it begins where it ends.
struct alignas(16) AttendShared {
  RowShared row;
  Mailbox parts;  ///< of all blocks, to all blocks
};

/// A task whose slots may all be taken for tokens: positions null.
template <class T>
struct AttendTask : DotsTask<T> {
  __device__ std::int32_t position(int slot) const {
    return this->positions != nullptr ? this->positions[slot] : 0;
  }
};

template <class T>
__device__ inline T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

/// i / divisor of numbers up to 2^18: i + 1/2 lies half a divisor away from where the quotient
/// changes, much further than the product of floats is off.
struct SmallDivision {
  float inverse;

  __device__ explicit SmallDivision(int divisor) : inverse(1.0F / static_cast<float>(divisor)) {}
  __device__ int operator()(int i) const {
    return static_cast<int>((static_cast<float>(i) + 0.5F) * inverse);
  }
};

/// Asks for the first tile of each warp, of slots [begin, end), to be in the L2 cache: who reads it
/// sees what is written to it meanwhile.
template <class T>
__device__ void prefetch_tiles(const T* keys, std::int64_t key_stride, const T* values,
                               std::int64_t value_stride, int head_dim, int begin, int end) {
  constexpr int kLine = 128 / static_cast<int>(sizeof(T));  // elements
  const auto prefetch = [](const T* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
  };
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int slot = begin + static_cast<int>(threadIdx.x) / 32 * kTile + lane / 2;
  if (slot >= end) return;
#pragma unroll 1
  for (int d = lane % 2 * kLine; d < head_dim; d += 2 * kLine) {
    prefetch(keys + slot * key_stride + d);
    prefetch(values + slot * value_stride + d);
  }
}

/// A cluster of thread blocks a KV head, one head after the other.
template <class Dots, class Means>
__global__ void __launch_bounds__(kThreads<Dots>, 1)
    attend_kernel(const __grid_constant__ LayerView layer, const __grid_constant__ AttendArgs args,
                  const __grid_constant__ AttendPlan plan, std::int64_t extent) {
  using T = typename Dots::T;
  constexpr int kBlockThreads = kThreads<Dots>;
  constexpr int kWarps = kBlockThreads / 32;
  extern __shared__ uint4 attend_memory[];
  __shared__ AttendShared shared;
  const UpdateArgs& update = args.update;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int cluster = cluster_size();
  const int query_heads = layer.group;
  const int dim = layer.head_dim;
  const bool draws_row = plan.draws_row;

  auto* const bytes = reinterpret_cast<unsigned char*>(attend_memory);
  const RowLayout row_layout(query_heads, cluster, kBlockThreads, draws_row ? plan.slots : 0);
  const RowBlock block(row_layout, bytes, cluster, query_heads);
  const int rank = block.rank;
  const AttendLayout layout(row_layout.scores + (draws_row ? 4 * block.pitch * query_heads : 0),
                            kWarps, Dots::kColumns, query_heads, dim, plan);
  auto* const peaks = reinterpret_cast<float*>(bytes + layout.peaks);
  auto* const means = reinterpret_cast<float*>(bytes + layout.means);
  auto* const parts = reinterpret_cast<std::uint64_t*>(bytes + layout.parts);
  auto* const merged = reinterpret_cast<float*>(bytes + layout.merged);
  constexpr int kColumns = Dots::kColumns;
  float* const own_merged = merged + warp * kColumns * layout.pitch;
  float* const tile_scores =
      reinterpret_cast<float*>(bytes + layout.scores) + warp * kColumns * AttendLayout::kScorePitch;

  if (thread == 0) {
    constexpr int kEntry = sizeof(std::uint64_t);
    open_mailbox(shared.row.sums, cluster * query_heads * kEntry);
    open_mailbox(shared.row.lists, cluster * (32 + 1) * kEntry);
    open_mailbox(shared.parts, cluster * layout.pairs_of(rank) * kEntry);
    shared.row.suspect = 0;
    shared.row.merged = 0;
    means[2 * layout.pairs - 1] = 0.0F;  // where the elements are an odd number, nobody's
  }
  cluster_arrive();
  if (warp == 1) clear(shared.row.top_k, lane);
  if (draws_row) block.clear_barred(plan.slots);

  const auto index = static_cast<unsigned>(cluster_index());
  const auto places =
      static_cast<unsigned>(layer.first_slots == nullptr ? layer.heads : layer.batch);
  const GraphOfRun graph(layer, static_cast<int>(index / places), static_cast<int>(index % places));
  const int b = graph.b;
  const int h = graph.g;
  if (update.slots.data != nullptr || layer.counters == nullptr) {
    // While the token is placed. The length may change yet, but it is one that the layer had.
    const std::int64_t about = layer.counters != nullptr ? layer.counters->length : extent;
    const int slots = visible_slots(layer, h, -1, about, extent);
    const int part = part_of(slots, cluster);
    prefetch_tiles(key_at<T>(update.keys, b, h, 0), update.keys.token_stride,
                   key_at<T>(args.values, b, h, 0), args.values.token_stride, dim, rank * part,
                   min((rank + 1) * part, slots));
  }
  cluster_wait();  // which empties the L1 cache, so not between loads
  wait_for_former_kernels();
  const std::int64_t length = layer.counters != nullptr ? layer.counters->length : extent;
  const bool fault = draws_row && rank == 0 && thread == 0 && has_fault(layer);
  const bool finishes = draws_row && rank == 0 && warp == 1;
  SequenceCounters counters{};
  if (finishes) counters = counters_of_lane(layer);
  __syncthreads();

  // The length of the layer is still on its way: what needs it comes after the queries.
  const SmallDivision of_dim(dim);
  const SmallDivision of_rank(layout.per_rank);
  std::int64_t slot = -1;
  int begin = 0;
  int end = 0;
  const auto find_slots = [&](auto& task) {
    if (layer.counters != nullptr) slot = slot_at(update, b, h, length);
    if (draws_row && rank == 0) prefetch_slots(layer, update, length);
    const int visible = visible_slots(layer, h, slot, length, extent);
    const int part = part_of(visible, cluster);
    begin = min(rank * part, visible);
    end = min(begin + part, visible);
    task.begin = begin;
    task.end = end;
    task.own_slot = static_cast<int>(slot);
  };
  const std::int32_t* positions = plan.positions.data;
  if (positions != nullptr) {
    positions += b * plan.positions.sequence_stride + (layer.first_slots == nullptr
                                                           ? h * plan.positions.head_stride
                                                           : __ldg(layer.first_slots + h));
  }
  const float scale = update.scale * kLog2E;
#pragma unroll 1
  for (int first = 0; first < query_heads; first += kColumns) {
    const AttendTask<T> task{
        {.keys = key_at<T>(update.keys, b, h, 0),
         .key_stride = update.keys.token_stride,
         .queries = key_at<T>(update.queries, b, std::int64_t{h} * query_heads + first, 0),
         .query_stride = update.queries.head_stride,
         .positions = positions,
         .query_heads = min(query_heads - first, kColumns),
         .head_dim = dim,
         .begin = 0,
         .end = 0,
         .own_slot = 0}};
    const TileScores scores{.scores = draws_row ? block.scores + first * block.pitch : tile_scores,
                            .pitch = draws_row ? block.pitch : AttendLayout::kScorePitch,
                            .mask = draws_row ? -1 : kTile - 1};
    Means tap({.values = key_at<T>(args.values, b, h, 0),
               .stride = args.values.token_stride,
               .head_dim = dim},
              scores);
    Dots::run(
        task, warp, kWarps, find_slots,
        [&](int i, int column, int j, std::int32_t place, float dot, bool valid) {
          const float x = dot * scale;
          const bool seen = valid & (place != kNoPlace);
          const bool finite = fabsf(x) <= FLT_MAX;
          float score = seen & finite ? x : -INFINITY;
          if (update.softcap > 0.0F) score = soften(update, score);
          if (valid) scores.at(column, j - begin) = score;
          if (!draws_row) return;
          // Both are rare: sinks and the new token itself.
          if (i == 0 && seen && place < layer.num_sinks) {
            atomicOr(&block.barred[(j - begin) / 32], 1U << ((j - begin) % 32));
          }
          if (seen & !finite && place == kOwnPlace) shared.row.suspect = 1;
        },
        tap);
    tap.finish(task.query_heads, [&](int column, const ExpSum& sum) {
      block.warp_sums[warp * query_heads + first + column] = sum.packed();
    });
    __syncthreads();
    block.post_sums(shared.row, first, task.query_heads);

    // The warps' means, relative to the block's highest score, and their sum.
    const auto maximum_of = [&](int w, int column) {
      return ExpSum::unpacked(block.warp_sums[w * query_heads + first + column]).maximum;
    };
    const auto peak_of = [&](int column) {
      float highest = -FLT_MAX;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, maximum_of(w, column));
      return highest;
    };
    if (thread < task.query_heads) peaks[first + thread] = peak_of(thread);
    tap.store(own_merged, layout.pitch, task.query_heads,
              [&](int column) { return exp2_of(maximum_of(warp, column) - peak_of(column)); });
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < task.query_heads * dim; i += kBlockThreads) {
      const int column = of_dim(i);
      const float* const from = merged + column * layout.pitch + i - column * dim;
      float sum = 0.0F;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += from[w * kColumns * layout.pitch];
      means[first * dim + i] = sum;
    }
  }

  bool good = true;
  if (draws_row && rank == 0) good = check_slots(layer, update, length, extent) && !fault;
  block.take_shifts(shared.row);
  good = __syncthreads_and(good ? 1 : 0) != 0;
  std::uint32_t ticket = 0;
  if (finishes) ticket = take_ticket(layer);

  // Each block puts a part of the elements together, in the order of the blocks.
  const auto factor_of = [&](int element) {
    const int q = min(of_dim(element), query_heads - 1);
    return exp2_of(peaks[q] - block.shifts[q]);
  };
#pragma unroll 1
  for (int i = thread; i < layout.pairs; i += kBlockThreads) {
    const auto element = [&](int at) {
      return std::uint64_t{__float_as_uint(means[at] * factor_of(at))};
    };
    const int to = of_rank(i);
    post(&parts[rank * layout.per_rank + i - to * layout.per_rank], to,
         element(2 * i + 1) << 32U | element(2 * i), shared.parts);
  }
  const auto write_out = [&] {
    wait_for_mail(shared.parts);
#pragma unroll 1
    for (int i = thread; i < 2 * layout.pairs_of(rank); i += kBlockThreads) {
      const int element = 2 * rank * layout.per_rank + i;
      if (element >= query_heads * dim) break;
      const int q = of_dim(element);
      float sum = 0.0F;
#pragma unroll 4
      for (int from = 0; from < cluster; ++from) {
        sum += reinterpret_cast<const float*>(parts + from * layout.per_rank)[i];
      }
      if (block.shifts[q] == INFINITY) sum = NAN;  // it sees nothing
      auto* const out = static_cast<T*>(args.out.data) + b * args.out.sequence_stride +
                        (std::int64_t{h} * query_heads + q) * args.out.head_stride;
      out[element - q * dim] = from_float<T>(sum);
    }
  };
  if (!draws_row) {
    write_out();
    return;
  }
  draw_new_row<T>(layer, update, block, shared.row,
                  {.length = length,
                   .slot = slot,
                   .b = b,
                   .g = h,
                   .good = good,
                   .ticket = ticket,
                   .counters = counters},
                  begin, end, write_out);
}

// ---- launching

int most_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
         static_cast<int>(sizeof(AttendShared));
}

/// Shared memory of a block. Slots are few enough for it to be counted, see plan_of.
template <class Dots>
std::int64_t shared_bytes(const LayerView& layer, const AttendPlan& plan) {
  constexpr int kBlockThreads = kThreads<Dots>;
  const std::int64_t row =
      layout_bytes(layer.group, plan.cluster, kBlockThreads, plan.draws_row ? plan.slots : 0);
  return AttendLayout(static_cast<int>(row), kBlockThreads / 32, Dots::kColumns, layer.group,
                      layer.head_dim, plan)
      .bytes;
}

/// Lets a kernel take all shared memory and any cluster: not what one launch needs, for another
/// thread may launch the same kernel for another shape.
template <class Kernel>
cudaLaunchConfig_t configured(Kernel kernel, int threads, int cluster,
                              std::array<cudaLaunchAttribute, 2>& attributes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most_shared_bytes()),
        "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.attrs = attributes.data();
  if (begin_early(attributes[0])) config.numAttrs = 1;
  if (cluster > 1) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
    cudaLaunchAttribute& shape = attributes[config.numAttrs++];
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  return config;
}

/// How a launch is spread; where nothing has room the `cluster` is 0.
template <class Dots>
AttendPlan plan_of(const LayerView& layer, std::int64_t extent, std::span<const std::int64_t> rooms,
                   bool draws_row) {
  const std::int64_t most_bytes = most_shared_bytes();
  const auto plan_with = [&](int cluster) {
    return AttendPlan{.cluster = cluster,
                      .slots = slots_a_block(extent, cluster),
                      .draws_row = draws_row,
                      .positions = {}};
  };
  const int cluster = best_cluster(
      std::int64_t{layer.batch} * layer.heads, extent, rooms, slots_a_block, [&](int size) {
        const AttendPlan plan = plan_with(size);
        const std::int64_t scores = draws_row ? std::int64_t{4} * layer.group * plan.slots : 0;
        // The scores alone may be more than an int can count.
        return scores <= most_bytes && shared_bytes<Dots>(layer, plan) <= most_bytes;
      });
  AttendPlan plan = plan_with(std::max(cluster, 1));
  plan.cluster = cluster;
  return plan;
}

/// Returns whether the row was drawn, too.
template <class Dots, class Means>
bool launch_as(const LayerView& layer, const AttendArgs& args, std::int64_t extent,
               std::span<const std::int64_t> rooms, bool draws_row,
               const TableView<const std::int32_t>& positions, cudaStream_t stream) {
  AttendPlan plan = plan_of<Dots>(layer, extent, rooms, draws_row);
  if (plan.cluster == 0) plan = plan_of<Dots>(layer, extent, rooms, false);
  plan.positions = positions;
  const auto kernel = attend_kernel<Dots, Means>;
  std::array<cudaLaunchAttribute, 2> attributes{};
  cudaLaunchConfig_t config = configured(kernel, kThreads<Dots>, plan.cluster, attributes);
  config.gridDim = dim3(static_cast<unsigned>(layer.batch * layer.heads * plan.cluster));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes<Dots>(layer, plan));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, layer, args, plan, extent), "attend_kernel");
  return plan.draws_row;
}

/// Calls launch<Dots, Means>() with the way to read keys and values of this shape.
template <class T, class Launch>
bool with_ways(const LayerView& layer, const AttendArgs& args, Launch&& launch) {
  constexpr std::int64_t kElement = sizeof(T);
  const int dim = layer.head_dim;
  const TokensView& keys = args.update.keys;
  const auto start_at = [&](std::int64_t bytes) {
    return rows_start_at(keys, bytes, kElement) &&
           rows_start_at(args.update.queries, bytes, kElement);
  };
  if constexpr (kElement == 2) {
    if (dim % 8 == 0 && start_at(16) && rows_start_at(args.values, 16, kElement) &&
        is_near(keys.token_stride, kElement) && is_near(args.values.token_stride, kElement) &&
        device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8) {
      const auto with = [&]<class Dots>() {
        return launch.template operator()<Dots, TensorMeans<Dots>>();
      };
      // Keys and values of one tile under way, or of two short ones: up to 8 KiB a warp.
      const auto with_heads = [&]<int kHeads>() {
        if (dim <= 64) return with.template operator()<TensorDots<T, 2, kHeads, 2>>();
        if (dim <= 96) return with.template operator()<TensorDots<T, 3, kHeads, 1>>();
        return with.template operator()<TensorDots<T, 4, kHeads, 1>>();
      };
      // One for all numbers of query heads: the means of more do not fit the registers.
      if (dim > 128) return with.template operator()<TensorDots<T, 8, 8, 2>>();
      if (layer.group <= 4) return with_heads.template operator()<4>();
      if (layer.group <= 8) return with_heads.template operator()<8>();
      return with_heads.template operator()<kMostColumns>();
    }
  }
  const auto with = [&]<class Dots>() {
    return launch.template operator()<Dots, CoreMeans<Dots>>();
  };
  if constexpr (kElement == 4) {
    if (dim % 4 == 0 && start_at(4 * kElement)) {
      return with.template operator()<CoreDots<T, true, 4>>();
    }
  }
  return with.template operator()<CoreDots<T, false, 4>>();
}

bool launch_any(const LayerView& layer, const AttendArgs& args, std::int64_t extent,
                std::span<const std::int64_t> rooms, bool draws_row,
                const TableView<const std::int32_t>& positions, cudaStream_t stream) {
  const auto launch = [&]<class Dots, class Means>() {
    return launch_as<Dots, Means>(layer, args, extent, rooms, draws_row, positions, stream);
  };
  switch (args.update.keys.dtype) {
    case DType::f16:
      return with_ways<__half>(layer, args, launch);
    case DType::bf16:
      return with_ways<__nv_bfloat16>(layer, args, launch);
    default:
      return with_ways<float>(layer, args, launch);
  }
}

}  // namespace

bool attend_fits(std::int64_t group, std::int64_t head_dim) {
  LayerView layer{};
  layer.batch = 1;
  layer.heads = 1;
  layer.group = static_cast<std::int32_t>(group);
  layer.head_dim = static_cast<std::int32_t>(head_dim);
  return plan_of<WidestDots>(layer, 1, {}, false).cluster != 0;
}

void launch_attend(const LayerView& layer, const AttendArgs& args, std::int64_t extent,
                   std::span<const std::int64_t> rooms, cudaStream_t stream) {
  const bool shared_graph = layer.heads_per_graph > 1;
  const bool divided = layer.first_slots != nullptr;
  const TableView<const std::int32_t> positions{
      .data = layer.positions,
      .sequence_stride = divided ? layer.pool : layer.graphs * layer.capacity,
      .head_stride = shared_graph ? 0 : layer.capacity,
      .slot_stride = 1};
  const bool drawn = launch_any(layer, args, extent, rooms, !shared_graph, positions, stream);
  if (drawn) return;
  launch_update(layer, args.update, extent, plan_update(layer, extent, rooms), stream);
}

void launch_decode_attention(const AttendShape& shape, const AttendArgs& args,
                             cudaStream_t stream) {
  LayerView layer{};  // without counters: there is no graph
  layer.batch = static_cast<std::int32_t>(shape.batch);
  layer.heads = static_cast<std::int32_t>(shape.heads);
  layer.graphs = layer.heads;
  layer.heads_per_graph = 1;
  layer.group = static_cast<std::int32_t>(shape.group);
  layer.head_dim = static_cast<std::int32_t>(shape.head_dim);
  layer.capacity = shape.length;
  launch_any(layer, args, shape.length, {}, false, shape.positions, stream);
}

}  // namespace spectralkv::cuda
