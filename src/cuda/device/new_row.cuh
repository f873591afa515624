// The row of one new token by a cluster of thread blocks, each of which holds the scores of its
// part of the slots in shared memory: the blocks exchange maxima and sums, and each names its K
// best.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/clusters.h"
#include "cuda/device/attention_row.cuh"
#include "cuda/device/exp_sum.cuh"
#include "cuda/device/key_dots.cuh"
#include "cuda/device/thread_cluster.cuh"
#include "cuda/device/top_k.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {

/// Where a block keeps what in shared memory; offsets in bytes.
struct RowLayout {
  int lists;      ///< u64 (cluster, 32): candidates of all blocks, in the first block
  int sums;       ///< u64 (cluster, query heads): maximum and sum of a block
  int warp_sums;  ///< u64 (warps, query heads)
  int shifts;     ///< f32 (query heads): binary logarithm of the softmax's sum
  int barred;     ///< one bit a slot: gets no edge
  int scores;     ///< f32 (query heads, pitch), in units of log(2); pairs of them are aligned
  int pitch;      ///< the rows of a tile fall into different banks

  __host__ __device__ RowLayout(int query_heads, int cluster, int threads, int slots)
      : lists(0),
        sums(8 * 32 * cluster),
        warp_sums(sums + 8 * cluster * query_heads),
        shifts(warp_sums + threads / 4 * query_heads),
        barred(shifts + 4 * query_heads),
        scores((barred + (slots + 31) / 32 * 4 + 7) / 8 * 8),
        pitch(slots + 8) {}
};

/// Bytes of all of it.
inline std::int64_t layout_bytes(int query_heads, int cluster, int threads, std::int64_t slots) {
  const std::int64_t sums = std::int64_t{query_heads} * (8 * cluster + threads / 4 + 4);
  return 8 * 32 * cluster + sums + (slots + 31) / 32 * 4 + 4 + 4 * (slots + 8) * query_heads;
}

__device__ inline std::int64_t slot_at(const UpdateArgs& args, std::int64_t b, std::int64_t h,
                                       std::int64_t length) {
  if (args.slots.data == nullptr) return length;
  return args.slots.data[b * args.slots.sequence_stride + h * args.slots.head_stride];
}

/// Slots of a graph that may be taken lie below this: the host has seen to it that so many keys are
/// there.
__device__ inline std::int64_t slot_limit(const LayerView& layer, std::int64_t g,
                                          std::int64_t extent) {
  return min(room_of(layer, g), extent);
}

/// Asks for what check_slots looks at, ahead of time; by the first threads of a block.
__device__ inline void prefetch_slots(const LayerView& layer, const UpdateArgs& args,
                                      std::int64_t length) {
  const int i = static_cast<int>(threadIdx.x);
  if (args.slots.data == nullptr || i >= layer.batch * layer.heads) return;
  const int b = i / layer.heads;
  const int h = i - b * layer.heads;
  const std::int64_t slot = slot_at(args, b, h, length);
  if (slot < 0 || slot >= length) return;
  asm volatile(
      "prefetch.global.L2 [%0];" ::"l"(positions_of(layer, b, h / layer.heads_per_graph) + slot));
}

/// Whether the slots of all sequences can be taken; each thread of a block says whether those that
/// it looked at can. Every graph looks at all of them, so that all decide alike before any writes.
static __device__ __noinline__ bool check_slots(const LayerView& layer, const UpdateArgs& args,
                                                std::int64_t length, std::int64_t extent) {
  if (args.slots.data == nullptr) {  // the layer is even
    const std::int64_t limit = slot_limit(layer, 0, extent);
    if (length < limit) return true;
    if (threadIdx.x == 0) report(layer, Fault::layer_full, 0, 0, length + 1, limit);
    return false;
  }
  bool good = true;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < layer.batch * layer.heads;
       i += static_cast<int>(blockDim.x)) {
    const int b = i / layer.heads;
    const int h = i - b * layer.heads;
    const int g = h / layer.heads_per_graph;
    const std::int64_t slot = slot_at(args, b, h, length);
    const std::int64_t of_graph = slot_at(args, b, g * layer.heads_per_graph, length);
    const std::int64_t limit = slot_limit(layer, g, extent);
    Fault fault = Fault::none;
    std::int64_t other = 0;
    if (slot < 0 || slot >= limit) {
      fault = Fault::slot_range;
      other = limit - 1;
    } else if (slot < length && positions_of(layer, b, g)[slot] >= 0) {
      fault = Fault::slot_taken;
    } else if (slot != of_graph) {
      fault = Fault::slots_differ;
      other = of_graph;
    }
    if (fault == Fault::none) continue;
    good = false;
    report(layer, fault, b, h, slot, other);
  }
  return good;
}

/// Takes the slots and counts the tokens, by one warp. `counters` are those of sequence `lane`,
/// where there is such a one.
static __device__ void take_slots(const LayerView& layer, const UpdateArgs& args,
                                  std::int64_t length, const SequenceCounters& counters) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int graphs = layer.batch * layer.graphs;
  int behind = static_cast<int>(length);
  bool ordered = true;
#pragma unroll 1
  for (int first = 0; first < graphs; first += 32) {
    const int i = min(first + lane, graphs - 1);
    const int b = i / layer.graphs;
    const int g = i % layer.graphs;
    std::int64_t seen = __shfl_sync(0xffffffffU, counters.seen, b % 32);
    if (b >= 32) seen = layer.sequences[b].seen;
    const std::int64_t slot = slot_at(args, b, std::int64_t{g} * layer.heads_per_graph, length);
    positions_of(layer, b, g)[slot] = static_cast<std::int32_t>(seen);
    behind = max(behind, static_cast<int>(slot) + 1);
    ordered = ordered && slot == length;
  }
  ordered = __all_sync(0xffffffffU, ordered) != 0;
  for (int offset = 16; offset > 0; offset /= 2) {
    behind = max(behind, __shfl_xor_sync(0xffffffffU, behind, offset));
  }
#pragma unroll 1
  for (int b = lane; b < layer.batch; b += 32) {
    const SequenceCounters& before = b < 32 ? counters : layer.sequences[b];
    layer.sequences[b].seen = before.seen + 1;
    layer.sequences[b].held = before.held + 1;
  }
  if (lane != 0) return;
  layer.counters->length = behind;
  if (!ordered) layer.counters->ordered = 0;
}

/// Of sequence `lane`, for take_slots: asked for early, it is there when it is needed.
__device__ inline SequenceCounters counters_of_lane(const LayerView& layer) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  SequenceCounters counters{};
  if (lane < layer.batch) {
    counters.seen = layer.sequences[lane].seen;
    counters.held = layer.sequences[lane].held;
  }
  return counters;
}

/// write_row by one warp: `best` has 32 candidates in descending order, 0 behind the last, with
/// their probabilities among all tokens.
static __device__ void write_row(const LayerView& layer, std::uint32_t* row,
                                 const std::uint64_t* best) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint64_t own = best[lane];
  const int count = __popc(__ballot_sync(0xffffffffU, own != 0));
  std::uint32_t threshold = 0;
  if (layer.law == EdgeLaw::attention) {
    std::uint64_t widths = own != 0 ? attention_width(static_cast<double>(value_of(own))) : 0U;
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint64_t before = __shfl_up_sync(0xffffffffU, widths, offset);
      if (lane >= offset) widths += before;
    }
    threshold = attention_threshold(widths);
  } else if (layer.law == EdgeLaw::weighted && count > 0) {
    double total = 0.0;
    double sum = 0.0;
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      total += static_cast<double>(value_of(best[k]));
      if (k == lane) sum = total;
    }
    threshold = lane + 1 < count ? weighted_threshold(sum / total) : kAllOnes;
  }
  if (lane < layer.top_k) set_edge(layer, row, lane, own != 0 ? slot_of(own) : -1, threshold);
}

/// Whether queries of a graph and the keys of its new token are numbers, by all threads of a block.
template <class T>
__device__ __noinline__ bool all_finite(const LayerView& layer, const UpdateArgs& args,
                                        std::int64_t b, std::int64_t g, std::int64_t slot) {
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

/// Slots of graph g that the new token sees: its own may lie behind all others.
__device__ inline int visible_slots(const LayerView& layer, std::int64_t g, std::int64_t slot,
                                    std::int64_t length, std::int64_t extent) {
  const std::int64_t limit = slot_limit(layer, g, extent);
  const bool fits = slot >= 0 && slot < limit;
  return static_cast<int>(min(fits ? max(length, slot + 1) : length, limit));
}
/// Slots of each of `parts` blocks.
__host__ __device__ inline int part_of(int slots, int parts) {
  const unsigned tiles = static_cast<unsigned>(slots + kTile - 1) / kTile;
  const auto count = static_cast<unsigned>(parts);
  return static_cast<int>((tiles + count - 1) / count * kTile);
}

/// Most slots of a block, whose memory is never empty.
inline int slots_a_block(std::int64_t extent, int cluster) {
  return part_of(static_cast<int>(std::max<std::int64_t>(extent, 1)), cluster);
}

/// The row and what else belongs to a new slot, by one warp. Not drawn: `best` has none.
__device__ inline void finish_row(const LayerView& layer, std::int64_t b, std::int64_t g,
                                  std::int64_t slot, bool drawn, const std::uint64_t* best) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  write_row(layer, row_of(layer, b, g, slot), best);
  if (lane < layer.populations) {
    scores_of(layer, b, g, lane)[slot] = 0.0F;
    if (layer.visits != nullptr) visits_of(layer, b, g, lane)[slot] = 0U;
  }
  if (lane != 0) return;
  if (layer.novelty != nullptr) novelty_of(layer, b, g)[slot] = 0U;
  atomicAdd(&layer.statistics->rows_written, 1ULL);
  if (!drawn) atomicAdd(&layer.statistics->rows_nonfinite, 1ULL);
}

/// By one warp, once all blocks of its graph have got what they read of what take_slots changes:
/// lane 0 gets a ticket, and the graph with the last one takes the slots of all. It waits for no
/// write of others, so nothing is fenced.
__device__ inline std::uint32_t take_ticket(const LayerView& layer) {
  if (threadIdx.x % 32 != 0) return 0;
  return atomicInc(&layer.counters->ticket,
                   static_cast<std::uint32_t>(layer.batch * layer.graphs - 1));
}
__device__ inline bool is_last(const LayerView& layer, std::uint32_t ticket) {
  return __shfl_sync(0xffffffffU, ticket, 0) ==
         static_cast<std::uint32_t>(layer.batch * layer.graphs - 1);
}

/// Whose row a cluster draws, cluster `place` of run `run`. A run has the graphs of a sequence; of
/// a divided layer a graph of all sequences, the longest first, and the short ones fill what these
/// leave.
struct GraphOfRun {
  int b;
  int g;

  __device__ GraphOfRun(const LayerView& layer, int run, int place)
      : b(layer.first_slots == nullptr ? run : place),
        g(layer.first_slots == nullptr ? place : __ldg(layer.head_order + run)) {}
};

struct RowShared {
  TopKScratch top_k;
  std::uint64_t reports[kMostCluster];  ///< of all blocks, in the first: see draw_new_row
  Mailbox sums;                         ///< of all blocks, to all blocks
  Mailbox lists;                        ///< of all blocks, to the first
  int suspect;                          ///< the block met a new key without a score
  int merged;                           ///< candidates of the graph
};

/// A block of the cluster, and its memory.
struct RowBlock {
  std::uint64_t* lists;
  std::uint64_t* sums;
  std::uint64_t* warp_sums;
  float* shifts;
  std::uint32_t* barred;
  float* scores;
  int pitch;
  int cluster;
  int rank;
  int query_heads;

  __device__ RowBlock(const RowLayout& layout, unsigned char* bytes, int blocks, int heads)
      : lists(reinterpret_cast<std::uint64_t*>(bytes + layout.lists)),
        sums(reinterpret_cast<std::uint64_t*>(bytes + layout.sums)),
        warp_sums(reinterpret_cast<std::uint64_t*>(bytes + layout.warp_sums)),
        shifts(reinterpret_cast<float*>(bytes + layout.shifts)),
        barred(reinterpret_cast<std::uint32_t*>(bytes + layout.barred)),
        scores(reinterpret_cast<float*>(bytes + layout.scores)),
        pitch(layout.pitch),
        cluster(blocks),
        rank(cluster_rank()),
        query_heads(heads) {}

  /// No slot is barred; the block waits afterwards.
  __device__ void clear_barred(int slots) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (slots + 31) / 32;
         i += static_cast<int>(blockDim.x)) {
      barred[i] = 0;
    }
  }

  /// Tells all blocks this one's sums of query heads [first, first + count), which the warps left.
  __device__ void post_sums(RowShared& shared, int first, int count) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / 32; i < count; i += warps) {
      const int q = first + i;
      ExpSum of_warp;
      if (lane < warps) of_warp = ExpSum::unpacked(warp_sums[lane * query_heads + q]);
      const ExpSum sum = ExpSum::of_lanes(of_warp);
      if (lane < cluster) post(&sums[rank * query_heads + q], lane, sum.packed(), shared.sums);
    }
  }

  /// Waits for the sums of all blocks. The block waits afterwards.
  __device__ void take_shifts(RowShared& shared) const {
    wait_for_mail(shared.sums);
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int q = static_cast<int>(threadIdx.x) / 32; q < query_heads;
         q += static_cast<int>(blockDim.x) / 32) {
      ExpSum of_block;
      if (lane < cluster) of_block = ExpSum::unpacked(sums[lane * query_heads + q]);
      const float shift = ExpSum::of_lanes(of_block).shift();
      if (lane == 0) shifts[q] = shift;
    }
  }
};
static_assert(kMostCluster <= 32);

/// The new token whose row is drawn.
struct NewToken {
  std::int64_t length;  ///< of the layer, before it
  std::int64_t slot;
  int b;
  int g;
  bool good;  ///< its slot may be taken, as far as this block knows; the first block knows
  std::uint32_t ticket;
  SequenceCounters counters;  ///< see counters_of_lane
};

/// The row from the scores of slots [begin, end) in each block. Calls `meanwhile()` when this block
/// has named its candidates. Warp 1 of the first block holds the token's ticket and counters.
template <class T, class Meanwhile>
__device__ inline void draw_new_row(const LayerView& layer, const UpdateArgs& args,
                                    const RowBlock& block, RowShared& shared, const NewToken& token,
                                    int begin, int end, Meanwhile&& meanwhile) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const float weight = 1.0F / static_cast<float>(block.query_heads);
  float highest = 0.0F;
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int first = thread; first < end - begin; first += kAtOnce * threads) {
    float probabilities[kAtOnce] = {};
    int slots[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      // Where there is no more: the first again, which no other thread writes meanwhile.
      slots[i] = first + i * threads < end - begin ? first + i * threads : first;
    }
#pragma unroll 4
    for (int q = 0; q < block.query_heads; ++q) {
      const float shift = block.shifts[q];
      const float* const plane = block.scores + q * block.pitch;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) probabilities[i] += exp2_of(plane[slots[i]] - shift);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int j = first + i * threads;
      if (j >= end - begin) break;
      const bool is_barred = (block.barred[j / 32] >> (j % 32) & 1U) != 0;
      const float probability = is_barred ? 0.0F : probabilities[i] * weight;
      block.scores[j] = probability;
      highest = fmaxf(highest, probability);
    }
  }
  const Found found =
      block_top_k(block.scores, end - begin, begin, highest, layer.top_k, shared.top_k);
  if (warp == 0) {
    post(&block.lists[block.rank * 32 + lane], 0, lane < found.count ? found.candidates[lane] : 0,
         shared.lists);
  } else if (warp == 1 && lane == 0) {
    const auto suspect = static_cast<std::uint64_t>(shared.suspect);
    post(&shared.reports[block.rank], 0, suspect << 32U | found.bound, shared.lists);
  }
  meanwhile();
  if (block.rank != 0) return;
  wait_for_mail(shared.lists);

  // The highest bound of any block leaves few candidates.
  const std::uint64_t report = lane < block.cluster ? shared.reports[lane] : 0;
  const std::uint32_t bound = warp_max(static_cast<std::uint32_t>(report));
  bool drawn = __any_sync(0xffffffffU, report >> 32U != 0) == 0;
  if (!drawn && token.good) {
    drawn = all_finite<T>(layer, args, token.b, token.g, token.slot);
  }
  if (warp == 0) shared.top_k.best[lane] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = thread; drawn && i < block.cluster * 32; i += threads) {
    const std::uint64_t own = block.lists[i];
    const bool stays = own != 0 && own >> 32U >= bound;
    const std::uint32_t staying = __ballot_sync(0xffffffffU, stays);
    if (staying == 0) continue;
    int at = 0;
    if (lane == 0) at = atomicAdd(&shared.merged, __popc(staying));
    at = __shfl_sync(0xffffffffU, at, 0) + __popc(staying & ((1U << lane) - 1U));
    if (stays) shared.top_k.list[at] = own;
  }
  __syncthreads();
  rank_list(shared.top_k, shared.merged, layer.top_k);
  __syncthreads();
  if (!token.good) return;
  if (warp == 0) {
    finish_row(layer, token.b, token.g, token.slot, drawn, shared.top_k.best);
  } else if (warp == 1 && is_last(layer, token.ticket)) {
    take_slots(layer, args, token.length, token.counters);
  }
}

}  // namespace spectralkv::cuda
