// Which slots hold tokens: admission, checks of the caller's slots, release, truncation, other
// rooms, reset.
#include <algorithm>
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/graph_rows.cuh"
#include "cuda/device/kernel_order.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_shape.h"

namespace spectralkv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWideThreads = 1024;
constexpr int kWarps = kWideThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffU;
/// Above every index of a list.
constexpr unsigned long long kNowhere = ~0ULL;

template <class T>
__device__ T& at(const TableView<T>& table, std::int64_t b, std::int64_t h, std::int64_t i = 0) {
  return table.data[b * table.sequence_stride + h * table.head_stride + i * table.slot_stride];
}

/// What one thread block does: a run of kThreads slots of one graph.
struct Run {
  std::int64_t b;
  std::int64_t g;
  std::int64_t begin;
};

__device__ Run run_of(std::int64_t graphs, std::int64_t runs) {
  const std::int64_t graph = std::int64_t{blockIdx.x} / runs;
  return {.b = graph / graphs,
          .g = graph % graphs,
          .begin = (std::int64_t{blockIdx.x} % runs) * kThreads};
}

std::int64_t runs_of(std::int64_t slots) { return (slots + kThreads - 1) / kThreads; }

/// Empties slots [first, first + count) of those that `goes` marks (a flag a thread). All threads
/// of the block take part: rows are written word by word, next to each other.
__device__ void clear_marked(const LayerView& layer, std::int64_t b, std::int64_t g,
                             std::int64_t first, std::int64_t count, bool goes) {
  __shared__ bool marked[kThreads];
  marked[threadIdx.x] = goes;
  if (__syncthreads_or(static_cast<int>(goes)) == 0) return;
  std::uint32_t* const rows = row_of(layer, b, g, first);
  const int words = static_cast<int>(min(count, std::int64_t{kThreads})) * layer.row_words;
  for (int w = static_cast<int>(threadIdx.x); w < words; w += kThreads) {
    const int slot = w / layer.row_words;
    if (!marked[slot]) continue;
    rows[w] = detail::empty_word(layer.format, layer.top_k, w - slot * layer.row_words);
  }
  if (!goes) return;
  const std::int64_t slot = first + threadIdx.x;
  for (int p = 0; p < layer.populations; ++p) {
    scores_of(layer, b, g, p)[slot] = 0.0F;
    if (layer.visits != nullptr) visits_of(layer, b, g, p)[slot] = 0U;
  }
  if (layer.novelty != nullptr) novelty_of(layer, b, g)[slot] = 0U;
}

// ---- admission

struct Valid {
  const std::uint8_t* data;
  std::int64_t sequence_stride;
  std::int64_t token_stride;
};

/// Whether a token with so many newer ones of its block gets a row.
__device__ bool gets_row(std::int64_t newer, std::int64_t row_stride) {
  return row_stride > 0 && newer % row_stride == 0;
}

/// One block a sequence: positions of graph 0, rows to draw, and what the sequence gained.
__global__ void __launch_bounds__(kWideThreads)
    rank_tokens_kernel(LayerView layer, std::int64_t first_slot, std::int64_t count, Valid valid,
                       std::int64_t row_stride, std::int32_t* drawn) {
  if (has_fault(layer)) return;
  __shared__ int warp_counts[kWarps];
  const std::int64_t b = blockIdx.x;
  const std::uint8_t* const flags = valid.data + b * valid.sequence_stride;
  const unsigned warp = threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;

  std::int64_t total = 0;
  for (std::int64_t base = 0; base < count; base += kWideThreads) {
    const std::int64_t i = base + threadIdx.x;
    total += __syncthreads_count(static_cast<int>(i < count && flags[i * valid.token_stride] != 0));
  }
  SequenceCounters& sequence = layer.sequences[b];
  const std::int64_t seen = sequence.seen;
  std::int32_t* const positions = positions_of(layer, b, 0) + first_slot;
  std::int64_t before = 0;
  for (std::int64_t base = 0; base < count; base += kWideThreads) {
    const std::int64_t i = base + threadIdx.x;
    const bool token = i < count && flags[i * valid.token_stride] != 0;
    const unsigned tokens = __ballot_sync(kAllLanes, token);
    if (lane == 0) warp_counts[warp] = __popc(tokens);
    __syncthreads();
    int in_front = 0;
    int all = 0;
    for (unsigned w = 0; w < kWarps; ++w) {
      in_front += w < warp ? warp_counts[w] : 0;
      all += warp_counts[w];
    }
    __syncthreads();
    const std::int64_t rank = before + in_front + __popc(tokens & ((1U << lane) - 1U));
    if (i < count) {
      positions[i] = token ? static_cast<std::int32_t>(seen + rank) : -1;
      drawn[b * count + i] = token && gets_row(total - 1 - rank, row_stride) ? 1 : 0;
    }
    before += all;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sequence.seen = seen + total;
    sequence.held += total;
  }
}

/// Clears the new slots of all graphs. Where there is no padding positions follow from the slot;
/// otherwise they are those of graph 0.
__global__ void __launch_bounds__(kThreads)
    admit_kernel(LayerView layer, std::int64_t first_slot, std::int64_t count, std::int64_t runs,
                 bool has_padding, std::int64_t row_stride, std::int32_t* drawn) {
  if (has_fault(layer)) return;
  const Run run = run_of(layer.graphs, runs);
  const std::int64_t i = run.begin + threadIdx.x;
  clear_marked(layer, run.b, run.g, first_slot + run.begin, count - run.begin, i < count);
  if (i >= count) return;
  std::int32_t* const positions = positions_of(layer, run.b, run.g) + first_slot;
  if (has_padding) {
    if (run.g > 0) positions[i] = positions_of(layer, run.b, 0)[first_slot + i];
    return;
  }
  positions[i] = static_cast<std::int32_t>(layer.sequences[run.b].seen + i);
  if (run.g == 0) drawn[run.b * count + i] = gets_row(count - 1 - i, row_stride) ? 1 : 0;
}

/// Its own launch: blocks of the one before read the counters as they were.
__global__ void __launch_bounds__(kThreads)
    advance_kernel(LayerView layer, std::int64_t length, std::int64_t tokens) {
  if (has_fault(layer)) return;
  for (std::int64_t b = threadIdx.x; b < layer.batch; b += kThreads) {
    layer.sequences[b].seen += tokens;
    layer.sequences[b].held += tokens;
  }
  if (threadIdx.x == 0) layer.counters->length = length;
}

// ---- slots of new tokens

__device__ FaultRecord check_slot(const LayerView& layer,
                                  const TableView<const std::int32_t>& slots, std::int64_t length,
                                  std::int64_t b, std::int64_t h) {
  const std::int64_t g = h / layer.heads_per_graph;
  const std::int32_t slot = at(slots, b, h);
  const std::int32_t first = at(slots, b, g * layer.heads_per_graph);
  FaultRecord record{.fault = 0U,
                     .layer = layer.index,
                     .sequence = static_cast<std::int32_t>(b),
                     .head = static_cast<std::int32_t>(h),
                     .value = slot,
                     .limit = 0};
  const std::int64_t room = room_of(layer, g);
  if (slot < 0 || slot >= room) {
    record.fault = static_cast<std::uint32_t>(Fault::slot_range);
    record.limit = room - 1;
  } else if (slot < length && positions_of(layer, b, g)[slot] >= 0) {
    record.fault = static_cast<std::uint32_t>(Fault::slot_taken);
  } else if (slot != first) {
    record.fault = static_cast<std::uint32_t>(Fault::slots_differ);
    record.limit = first;
  }
  return record;
}

__global__ void __launch_bounds__(kThreads)
    plan_slots_kernel(LayerView layer, TableView<const std::int32_t> slots, std::int64_t* plan,
                      FaultRecord* result) {
  __shared__ unsigned long long first_bad;
  __shared__ unsigned long long longest;
  const std::int64_t length = layer.counters->length;
  if (threadIdx.x == 0) {
    first_bad = kNowhere;
    longest = static_cast<unsigned long long>(length);
  }
  __syncthreads();
  const std::int64_t all = std::int64_t{layer.batch} * layer.heads;
  bool moved = false;
  for (std::int64_t i = threadIdx.x; i < all; i += kThreads) {
    const FaultRecord record = check_slot(layer, slots, length, i / layer.heads, i % layer.heads);
    if (record.fault != 0U) {
      atomicMin(&first_bad, static_cast<unsigned long long>(i));
      continue;
    }
    moved = moved || record.value != length;
    if (record.value >= length) {
      atomicMax(&longest, static_cast<unsigned long long>(record.value + 1));
    }
  }
  const bool appended = __syncthreads_or(static_cast<int>(moved)) == 0;
  if (threadIdx.x != 0) return;
  plan[0] = static_cast<std::int64_t>(longest);
  plan[1] = appended ? 1 : 0;
  if (first_bad == kNowhere) {
    *result = {};
    return;
  }
  const auto i = static_cast<std::int64_t>(first_bad);
  *result = check_slot(layer, slots, length, i / layer.heads, i % layer.heads);
}

/// The lowest free slot of a graph, the end of those in use if none below is; by a block of
/// kWideThreads.
__device__ std::int64_t lowest_free_slot(const LayerView& layer, std::int64_t b, std::int64_t g) {
  __shared__ int lowest;
  const std::int32_t* const positions = positions_of(layer, b, g);
  const int room = static_cast<int>(room_of(layer, g));
  const int length = static_cast<int>(length_of(layer, g));
  if (room == 0) return 0;
  if (threadIdx.x == 0) lowest = room;
  // All loads of a round are under way at once, those of the first one before the length is there.
  constexpr int kEach = 16;
  const int thread = static_cast<int>(threadIdx.x);
  for (int first = thread; first - thread < room; first += kWideThreads * kEach) {
    std::int32_t there[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int slot = first + k * kWideThreads;
      there[k] = slot < room ? positions[slot] : 0;
    }
    if (first == thread) __syncthreads();
    int mine = length;
#pragma unroll
    for (int k = kEach - 1; k >= 0; --k) {
      if (there[k] < 0) mine = min(mine, first + k * kWideThreads);
    }
    if (mine < length) atomicMin(&lowest, mine);
    const bool all_seen = first - thread + kWideThreads * kEach >= length;
    if (__syncthreads_or(static_cast<int>(mine < length || all_seen)) != 0) break;
  }
  return min(lowest, length);
}

__global__ void __launch_bounds__(kWideThreads)
    next_slots_kernel(LayerView layer, TableView<std::int32_t> out) {
  const std::int64_t b = blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  const std::int64_t slot = lowest_free_slot(layer, b, g);
  for (int k = static_cast<int>(threadIdx.x); k < layer.heads_per_graph; k += kWideThreads) {
    at(out, b, g * layer.heads_per_graph + k) = static_cast<std::int32_t>(slot);
  }
}

/// A row of `dim` elements that a block of kWideThreads is about to copy: each thread has its first
/// element.
template <class T>
struct RowCopy {
  const T* source;
  std::int64_t dim;
  T first{};

  __device__ RowCopy(const TokensView& from, std::int64_t b, std::int64_t h, std::int64_t elements)
      : source(static_cast<const T*>(from.data) + token_offset(from, b, h, 0)), dim(elements) {
    if (threadIdx.x < dim) first = source[threadIdx.x];
  }
  /// `to`: a view of the caller's that launch_place was given to write.
  __device__ void write(const TokensView& to, std::int64_t b, std::int64_t h,
                        std::int64_t slot) const {
    T* const target = static_cast<T*>(const_cast<void*>(to.data)) + token_offset(to, b, h, slot);
    if (threadIdx.x < dim) target[threadIdx.x] = first;
    for (std::int64_t d = threadIdx.x + kWideThreads; d < dim; d += kWideThreads) {
      target[d] = source[d];
    }
  }
};

/// One block a graph.
template <class Key, class Value>
__global__ void __launch_bounds__(kWideThreads)
    place_kernel(const __grid_constant__ LayerView layer, const __grid_constant__ PlaceArgs args) {
  wait_for_former_kernels();
  let_next_kernel_begin();  // the attention of the token follows
  const std::int64_t b = blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  const std::int64_t first_head = g * layer.heads_per_graph;
  const RowCopy<Key> first_key(args.new_keys, b, first_head, args.key_dim);
  const RowCopy<Value> first_value(args.new_values, b, first_head, args.value_dim);
  const std::int64_t slot = lowest_free_slot(layer, b, g);
  std::int64_t limit = room_of(layer, g);
  if (layer.first_slots == nullptr) limit = min(limit, args.num_slots);
  const bool fits = slot < limit;
  if (!fits && threadIdx.x == 0) report(layer, Fault::layer_full, b, g, slot + 1, limit);
  for (int k = 0; k < layer.heads_per_graph; ++k) {
    const std::int64_t h = first_head + k;
    if (threadIdx.x == 0) at(args.slots, b, h) = fits ? static_cast<std::int32_t>(slot) : -1;
    if (!fits) continue;
    const RowCopy<Key> key = k == 0 ? first_key : RowCopy<Key>(args.new_keys, b, h, args.key_dim);
    const RowCopy<Value> value =
        k == 0 ? first_value : RowCopy<Value>(args.new_values, b, h, args.value_dim);
    key.write(args.keys, b, h, slot);
    value.write(args.values, b, h, slot);
  }
}

/// Calls `use(T{})` with a type of as many bytes as the elements have.
template <class Use>
void with_size_of(DType dtype, Use&& use) {
  switch (size_of(dtype)) {
    case 1:
      use(std::uint8_t{});
      break;
    case 2:
      use(std::uint16_t{});
      break;
    default:
      use(std::uint32_t{});
      break;
  }
}

// ---- kept slots

/// Checks entry i of a head's list, provided that those before it are right. Every -1 stands before
/// the slots, or every -1 behind them.
__device__ FaultRecord check_entry(const LayerView& layer,
                                   const TableView<const std::int32_t>& keep, std::int64_t length,
                                   std::int64_t b, std::int64_t h, std::int64_t i) {
  const std::int64_t g = h / layer.heads_per_graph;
  const std::int64_t first = g * layer.heads_per_graph;
  const std::int32_t slot = at(keep, b, h, i);
  const bool begins_with_slot = at(keep, b, h, 0) >= 0;
  // Where the entry before is out of range it is the one to report; this one must only not be
  // followed to a wrong address.
  const std::int32_t before = i == 0 ? -1 : max(at(keep, b, h, i - 1), -1);
  FaultRecord record{.fault = 0U,
                     .layer = layer.index,
                     .sequence = static_cast<std::int32_t>(b),
                     .head = static_cast<std::int32_t>(h),
                     .value = slot,
                     .limit = 0};
  const bool is_none = slot == -1 && (before == -1 || begins_with_slot);
  const bool is_behind_none = begins_with_slot && i > 0 && before == -1;
  if (!is_none && (slot <= before || slot >= extent_of(layer, g, length) || is_behind_none)) {
    record.fault = static_cast<std::uint32_t>(Fault::keep_order);
    record.limit = before;
  } else if (!is_none && positions_of(layer, b, g)[slot] < 0) {
    record.fault = static_cast<std::uint32_t>(Fault::keep_empty);
  } else if (h != first && slot != at(keep, b, first, i)) {
    record.fault = static_cast<std::uint32_t>(Fault::keep_differ);
  }
  return record;
}

/// One block a head. Only notes that something is wrong: find_bad_keep_kernel says what.
__global__ void __launch_bounds__(kWideThreads)
    check_keep_kernel(LayerView layer, TableView<const std::int32_t> keep, std::int64_t count,
                      const std::int64_t* expected, std::int64_t* kept, FaultRecord* result) {
  const std::int64_t b = blockIdx.x / layer.heads;
  const std::int64_t h = blockIdx.x % layer.heads;
  const std::int64_t length = layer.counters->length;
  bool bad = false;
  std::int64_t own = 0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < count; i += kWideThreads) {
    bad |= check_entry(layer, keep, length, b, h, i).fault != 0U;
    own += at(keep, b, h, i) >= 0 ? 1 : 0;
  }
  __shared__ unsigned long long sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  const unsigned of_warp = warp_add(static_cast<unsigned>(own));
  if (threadIdx.x % 32 == 0) atomicAdd(&sum, static_cast<unsigned long long>(of_warp));
  bad = __syncthreads_or(static_cast<int>(bad)) != 0;
  if (threadIdx.x != 0) return;
  const auto counted = static_cast<std::int64_t>(sum);
  const std::int64_t graph = graph_index(layer, b, h / layer.heads_per_graph);
  bad = bad || (expected != nullptr && expected[graph] != counted);
  if (h % layer.heads_per_graph == 0) kept[graph] = counted;
  if (bad) result->fault = static_cast<std::uint32_t>(Fault::keep_order);
}

/// One block: the first fault in the order of sequences, heads and slots.
__global__ void __launch_bounds__(kWideThreads)
    find_bad_keep_kernel(LayerView layer, TableView<const std::int32_t> keep, std::int64_t count,
                         const std::int64_t* expected, FaultRecord* result) {
  if (result->fault == 0U) return;
  __shared__ unsigned long long first_bad;
  const std::int64_t length = layer.counters->length;
  for (std::int64_t b = 0; b < layer.batch; ++b) {
    for (std::int64_t h = 0; h < layer.heads; ++h) {
      __syncthreads();
      if (threadIdx.x == 0) first_bad = kNowhere;
      __syncthreads();
      std::int64_t own = 0;
      for (std::int64_t base = 0; base < count; base += kWideThreads) {
        const std::int64_t i = base + threadIdx.x;
        if (i < count && check_entry(layer, keep, length, b, h, i).fault != 0U) {
          atomicMin(&first_bad, static_cast<unsigned long long>(i));
        }
        own += __syncthreads_count(static_cast<int>(i < count && at(keep, b, h, i) >= 0));
      }
      __syncthreads();
      const unsigned long long found = first_bad;
      const std::int64_t graph = graph_index(layer, b, h / layer.heads_per_graph);
      const bool unexpected = expected != nullptr && own != expected[graph];
      if (found == kNowhere && !unexpected) continue;
      if (threadIdx.x != 0) return;
      if (found != kNowhere) {
        *result = check_entry(layer, keep, length, b, h, static_cast<std::int64_t>(found));
      } else {
        *result = {.fault = static_cast<std::uint32_t>(Fault::keep_count),
                   .layer = layer.index,
                   .sequence = static_cast<std::int32_t>(b),
                   .head = static_cast<std::int32_t>(h),
                   .value = own,
                   .limit = expected[graph]};
      }
      return;
    }
  }
}

/// Kept slots of a round of graphs, where the host knows them.
struct KeptCounts {
  static constexpr int kMost = 512;
  bool known;
  std::int32_t values[kMost];
};

/// A thread an entry, graphs of the round along y. One entry of a head's list knows how many slots
/// are kept: the first of them, or the last where they stand in front.
__global__ void __launch_bounds__(kThreads)
    admit_keep_kernel(LayerView layer, TableView<const std::int32_t> keep, std::int64_t count,
                      std::int64_t runs, std::int64_t first_graph,
                      const __grid_constant__ KeptCounts expected, std::int32_t* new_slots,
                      std::int64_t* kept) {
  if (has_fault(layer)) return;
  const std::int64_t graph = first_graph + blockIdx.y;
  const std::int64_t b = graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  const std::int64_t head_of_graph = std::int64_t{blockIdx.x} / runs;
  const std::int64_t h = g * layer.heads_per_graph + head_of_graph;
  const std::int64_t i = (std::int64_t{blockIdx.x} % runs) * kThreads + threadIdx.x;
  if (i > 0 && i >= count) return;
  std::int64_t own = 0;
  if (count > 0) {
    const FaultRecord record = check_entry(layer, keep, layer.counters->length, b, h, i);
    if (record.fault != 0U) {
      report(layer, static_cast<Fault>(record.fault), b, h, record.value, record.limit);
      return;
    }
    const std::int32_t slot = record.value;
    if (slot >= 0 && head_of_graph == 0) {
      new_slots[graph * layer.capacity + slot] = static_cast<std::int32_t>(i);
    }
    const bool is_last = i == count - 1;
    if (at(keep, b, h, 0) >= 0) {
      if (slot < 0 || (!is_last && at(keep, b, h, i + 1) >= 0)) return;
      own = i + 1;
    } else if (slot >= 0) {
      if (at(keep, b, h, i - 1) >= 0) return;
      own = count - i;
    } else if (!is_last) {
      return;
    }
  }
  if (head_of_graph == 0) kept[graph] = own;
  if (expected.known && expected.values[blockIdx.y] != own) {
    report(layer, Fault::keep_count, b, h, own, expected.values[blockIdx.y]);
  }
}

__global__ void __launch_bounds__(kThreads)
    release_kernel(LayerView layer, TableView<const std::int32_t> keep, std::int64_t count,
                   const std::int32_t* new_slots, const std::int64_t* kept, std::int64_t runs) {
  if (has_fault(layer)) return;
  if (blockIdx.x == 0) {
    for (std::int64_t b = threadIdx.x; b < layer.batch; b += kThreads) {
      layer.sequences[b].held = kept[b * layer.graphs];
    }
    if (threadIdx.x == 0) layer.counters->ordered = 0;
  }
  if (runs == 0) return;
  const Run run = run_of(layer.graphs, runs);
  const std::int64_t length = length_of(layer, run.g);
  const std::int64_t slot = run.begin + threadIdx.x;
  bool goes = false;
  if (slot < length) {
    // Only an entry of new_slots that its list confirms is one of this release.
    const std::int32_t to = new_slots[graph_index(layer, run.b, run.g) * layer.capacity + slot];
    goes = to < 0 || to >= count || at(keep, run.b, run.g * layer.heads_per_graph, to) != slot;
  }
  clear_marked(layer, run.b, run.g, run.begin, length - run.begin, goes);
  if (goes) positions_of(layer, run.b, run.g)[slot] = -1;
}

// ---- truncation

__device__ bool is_newest(const LayerView& layer, std::int64_t b, std::int64_t slot,
                          std::int32_t position, std::int64_t length, std::int64_t count,
                          bool ordered) {
  return ordered ? slot >= length - count : position >= layer.sequences[b].seen - count;
}

__global__ void __launch_bounds__(kWideThreads)
    plan_truncate_kernel(LayerView layer, std::int64_t count, bool ordered, std::int64_t* found,
                         std::int64_t* oldest) {
  __shared__ unsigned found_in_block;
  __shared__ unsigned oldest_in_block;
  const std::int64_t b = blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  const std::int32_t* const positions = positions_of(layer, b, g);
  const std::int64_t length = length_of(layer, g);
  const auto seen = static_cast<unsigned>(layer.sequences[b].seen);
  if (threadIdx.x == 0) {
    found_in_block = 0;
    oldest_in_block = seen;
  }
  __syncthreads();
  unsigned mine = 0;
  unsigned lowest = seen;
#pragma unroll 4
  for (std::int64_t slot = threadIdx.x; slot < length; slot += kWideThreads) {
    const std::int32_t position = positions[slot];
    if (position < 0 || !is_newest(layer, b, slot, position, length, count, ordered)) continue;
    ++mine;
    lowest = min(lowest, static_cast<unsigned>(position));
  }
  mine = warp_add(mine);
  lowest = warp_min(lowest);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&found_in_block, mine);
    atomicMin(&oldest_in_block, lowest);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  found[blockIdx.x] = found_in_block;
  oldest[blockIdx.x] = oldest_in_block;
}

/// Raises `highest` to the last of a graph's slots in use for which counts(slot, position) holds.
/// By a block of kWideThreads, from the end: most graphs have a token there.
template <class Counts>
__device__ void raise_to_last(const LayerView& layer, std::int64_t b, std::int64_t g,
                              long long& highest, Counts&& counts) {
  const std::int32_t* const positions = positions_of(layer, b, g);
  for (std::int64_t end = length_of(layer, g); end > highest + 1; end -= kWideThreads) {
    const std::int64_t slot = end - 1 - threadIdx.x;
    const bool found = slot >= 0 && positions[slot] >= 0 && counts(slot, positions[slot]);
    // Everyone has read `highest` before it changes, and sees the change before the next round.
    const bool any = __syncthreads_or(static_cast<int>(found)) != 0;
    if (found) atomicMax(&highest, static_cast<long long>(slot));
    __syncthreads();
    if (any) break;
  }
}

/// One block looks at the graphs one after the other.
__global__ void __launch_bounds__(kWideThreads)
    last_staying_kernel(LayerView layer, std::int64_t count, bool ordered, std::int64_t* last) {
  __shared__ long long highest;
  if (threadIdx.x == 0) highest = -1;
  __syncthreads();
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  for (std::int64_t graph = 0; graph < graphs; ++graph) {
    const std::int64_t b = graph / layer.graphs;
    const std::int64_t g = graph % layer.graphs;
    const std::int64_t length = length_of(layer, g);
    raise_to_last(layer, b, g, highest, [&](std::int64_t slot, std::int32_t position) {
      return !is_newest(layer, b, slot, position, length, count, ordered);
    });
  }
  if (threadIdx.x == 0) *last = highest;
}

/// A block a graph of all sequences.
__global__ void __launch_bounds__(kWideThreads)
    taken_slots_kernel(LayerView layer, std::int64_t* taken) {
  __shared__ long long highest;
  if (threadIdx.x == 0) highest = -1;
  __syncthreads();
  for (std::int64_t b = 0; b < layer.batch; ++b) {
    raise_to_last(layer, b, blockIdx.x, highest, [](std::int64_t, std::int32_t) { return true; });
  }
  if (threadIdx.x == 0) taken[blockIdx.x] = highest + 1;
}

/// A block a graph.
__global__ void __launch_bounds__(kWideThreads)
    count_held_kernel(LayerView layer, std::int64_t* held) {
  const std::int64_t b = blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  const std::int32_t* const positions = positions_of(layer, b, g);
  const std::int64_t length = length_of(layer, g);
  std::int64_t sum = 0;
  for (std::int64_t base = 0; base < length; base += kWideThreads) {
    const std::int64_t slot = base + threadIdx.x;
    sum += __syncthreads_count(static_cast<int>(slot < length && positions[slot] >= 0));
  }
  if (threadIdx.x == 0) held[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    truncate_kernel(LayerView layer, std::int64_t length, const std::int64_t* dropped,
                    std::int64_t runs) {
  if (has_fault(layer)) return;
  const Run run = run_of(layer.graphs, runs);
  const std::int64_t old_length = length_of(layer, run.g);
  const std::int64_t first = layer.sequences[run.b].seen - dropped[run.b];
  const std::int64_t slot = run.begin + threadIdx.x;
  std::int32_t* const positions = positions_of(layer, run.b, run.g);
  const bool goes = slot < old_length && (slot >= length || positions[slot] >= first);
  clear_marked(layer, run.b, run.g, run.begin, old_length - run.begin, goes);
  if (goes) positions[slot] = -1;
}

__global__ void __launch_bounds__(kThreads)
    book_truncate_kernel(LayerView layer, std::int64_t length, const std::int64_t* dropped) {
  if (has_fault(layer)) return;
  for (std::int64_t b = threadIdx.x; b < layer.batch; b += kThreads) {
    SequenceCounters& sequence = layer.sequences[b];
    sequence.seen -= dropped[b];
    sequence.held -= dropped[b];
    if (sequence.walked_at > sequence.seen) sequence.walked_at = -1;
  }
  if (threadIdx.x == 0) layer.counters->length = length;
}

// ---- other rooms

/// A thread an edge, `runs` blocks a graph.
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(LayerView to, std::int64_t to_sequence, LayerView from,
                     std::int64_t from_sequence, std::int64_t length, std::int64_t runs) {
  const std::int64_t g = std::int64_t{blockIdx.x} / runs;
  const std::int64_t edge = std::int64_t{blockIdx.x} % runs * kThreads + threadIdx.x;
  const std::int64_t slot = edge / to.top_k;
  const int k = static_cast<int>(edge % to.top_k);
  if (slot >= min(extent_of(to, g, length), extent_of(from, g, length))) return;
  const std::uint32_t* const row = row_of(from, from_sequence, g, slot);
  const std::int32_t neighbor = neighbor_of(from, row, k);
  set_edge(to, row_of(to, to_sequence, g, slot), k, neighbor < room_of(to, g) ? neighbor : -1,
           from.format == RowFormat::slots ? 0U : threshold_of(from, row, k));
}

// ---- begin, reset

__global__ void __launch_bounds__(kThreads) begin_layer_kernel(LayerView layer) {
  for (int b = static_cast<int>(threadIdx.x); b < layer.batch; b += kThreads) {
    layer.sequences[b].walked_at = -1;
  }
  if (threadIdx.x == 0) layer.counters->ordered = 1;
}

/// No block reads the counters that the first one writes.
__global__ void __launch_bounds__(kThreads)
    reset_kernel(LayerView layer, std::int64_t sequence, std::int64_t length, bool ordered,
                 std::int64_t extent, std::int64_t runs) {
  if (has_fault(layer)) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    SequenceCounters& counters = layer.sequences[sequence];
    counters.seen = 0;
    counters.held = 0;
    counters.walked_at = -1;
    layer.counters->length = length;
    layer.counters->ordered = ordered ? 1 : 0;
  }
  if (runs == 0) return;
  const Run run = run_of(layer.graphs, runs);
  const std::int64_t slot = run.begin + threadIdx.x;
  const std::int64_t end = extent_of(layer, run.g, extent);
  clear_marked(layer, sequence, run.g, run.begin, end - run.begin, slot < end);
  if (slot < end) positions_of(layer, sequence, run.g)[slot] = -1;
}

}  // namespace

void launch_admit(const LayerView& layer, std::int64_t first_slot, std::int64_t count,
                  const std::uint8_t* valid, std::int64_t valid_sequence_stride,
                  std::int64_t valid_token_stride, std::int64_t row_stride, std::int32_t* drawn,
                  cudaStream_t stream) {
  if (layer.batch == 0) return;
  const bool has_padding = valid != nullptr;
  if (has_padding) {
    const Valid flags{valid, valid_sequence_stride, valid_token_stride};
    rank_tokens_kernel<<<static_cast<unsigned>(layer.batch), kWideThreads, 0, stream>>>(
        layer, first_slot, count, flags, row_stride, drawn);
    check(cudaGetLastError(), "rank_tokens_kernel");
  }
  const std::int64_t runs = runs_of(count);
  if (runs > 0) {
    const auto grid = static_cast<unsigned>(runs * layer.batch * layer.graphs);
    admit_kernel<<<grid, kThreads, 0, stream>>>(layer, first_slot, count, runs, has_padding,
                                                row_stride, drawn);
    check(cudaGetLastError(), "admit_kernel");
  }
  advance_kernel<<<1, kThreads, 0, stream>>>(layer, first_slot + count, has_padding ? 0 : count);
  check(cudaGetLastError(), "advance_kernel");
}

void launch_plan_slots(const LayerView& layer, const TableView<const std::int32_t>& slots,
                       std::int64_t* plan, FaultRecord* result, cudaStream_t stream) {
  plan_slots_kernel<<<1, kThreads, 0, stream>>>(layer, slots, plan, result);
  check(cudaGetLastError(), "plan_slots_kernel");
}

void launch_next_slots(const LayerView& layer, const TableView<std::int32_t>& out,
                       std::int64_t /*extent*/, cudaStream_t stream) {
  const auto graphs = static_cast<unsigned>(layer.batch * layer.graphs);
  if (graphs == 0) return;
  next_slots_kernel<<<graphs, kWideThreads, 0, stream>>>(layer, out);
  check(cudaGetLastError(), "next_slots_kernel");
}

void launch_place(const LayerView& layer, const PlaceArgs& args, cudaStream_t stream) {
  const auto graphs = static_cast<unsigned>(layer.batch * layer.graphs);
  if (graphs == 0) return;
  with_size_of(args.keys.dtype, [&]<class Key>(Key) {
    with_size_of(args.values.dtype, [&]<class Value>(Value) {
      cudaLaunchAttribute early{};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(graphs);
      config.blockDim = dim3(kWideThreads);
      config.stream = stream;
      config.attrs = &early;
      config.numAttrs = begin_early(early) ? 1 : 0;
      check(cudaLaunchKernelEx(&config, place_kernel<Key, Value>, layer, args), "place_kernel");
    });
  });
}

void launch_check_keep(const LayerView& layer, const TableView<const std::int32_t>& keep,
                       std::int64_t count, const std::int64_t* expected, std::int64_t* kept,
                       FaultRecord* result, cudaStream_t stream) {
  check(cudaMemsetAsync(result, 0, sizeof(FaultRecord), stream), "cudaMemsetAsync");
  const auto heads = static_cast<unsigned>(layer.batch * layer.heads);
  if (heads == 0) return;
  check_keep_kernel<<<heads, kWideThreads, 0, stream>>>(layer, keep, count, expected, kept, result);
  check(cudaGetLastError(), "check_keep_kernel");
  find_bad_keep_kernel<<<1, kWideThreads, 0, stream>>>(layer, keep, count, expected, result);
  check(cudaGetLastError(), "find_bad_keep_kernel");
}

void launch_admit_keep(const LayerView& layer, const TableView<const std::int32_t>& keep,
                       std::int64_t count, const std::int64_t* expected, std::int32_t* new_slots,
                       std::int64_t* kept, cudaStream_t stream) {
  const std::int64_t runs = std::max<std::int64_t>(1, runs_of(count));
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  for (std::int64_t first = 0; first < graphs; first += KeptCounts::kMost) {
    const std::int64_t part = std::min<std::int64_t>(KeptCounts::kMost, graphs - first);
    KeptCounts counts{};
    counts.known = expected != nullptr;
    if (counts.known) {
      std::transform(expected + first, expected + first + part, counts.values,
                     [](std::int64_t slots) { return static_cast<std::int32_t>(slots); });
    }
    const dim3 grid(static_cast<unsigned>(runs * layer.heads_per_graph),
                    static_cast<unsigned>(part));
    admit_keep_kernel<<<grid, kThreads, 0, stream>>>(layer, keep, count, runs, first, counts,
                                                     new_slots, kept);
    check(cudaGetLastError(), "admit_keep_kernel");
  }
}

void launch_release(const LayerView& layer, const TableView<const std::int32_t>& keep,
                    std::int64_t count, const std::int32_t* new_slots, const std::int64_t* kept,
                    std::int64_t extent, cudaStream_t stream) {
  const std::int64_t runs = runs_of(extent);
  const std::int64_t blocks = runs * layer.batch * layer.graphs;
  release_kernel<<<static_cast<unsigned>(std::max<std::int64_t>(1, blocks)), kThreads, 0, stream>>>(
      layer, keep, count, new_slots, kept, blocks > 0 ? runs : 0);
  check(cudaGetLastError(), "release_kernel");
}

void launch_plan_truncate(const LayerView& layer, std::int64_t count, bool ordered,
                          std::int64_t* found, std::int64_t* oldest, std::int64_t* last,
                          std::int64_t /*extent*/, cudaStream_t stream) {
  const auto graphs = static_cast<unsigned>(layer.batch * layer.graphs);
  if (graphs > 0) {
    plan_truncate_kernel<<<graphs, kWideThreads, 0, stream>>>(layer, count, ordered, found, oldest);
    check(cudaGetLastError(), "plan_truncate_kernel");
  }
  last_staying_kernel<<<1, kWideThreads, 0, stream>>>(layer, count, ordered, last);
  check(cudaGetLastError(), "last_staying_kernel");
}

void launch_copy_rows(const LayerView& to, std::int64_t to_sequence, const LayerView& from,
                      std::int64_t from_sequence, std::int64_t length, cudaStream_t stream) {
  const std::int64_t runs = runs_of(std::min({length, to.capacity, from.capacity}) * to.top_k);
  if (runs == 0) return;
  copy_rows_kernel<<<static_cast<unsigned>(to.graphs * runs), kThreads, 0, stream>>>(
      to, to_sequence, from, from_sequence, length, runs);
  check(cudaGetLastError(), "copy_rows_kernel");
}

void launch_taken_slots(const LayerView& layer, std::int64_t* taken, cudaStream_t stream) {
  if (layer.graphs == 0) return;
  taken_slots_kernel<<<static_cast<unsigned>(layer.graphs), kWideThreads, 0, stream>>>(layer,
                                                                                       taken);
  check(cudaGetLastError(), "taken_slots_kernel");
}

void launch_count_held(const LayerView& layer, std::int64_t* held, cudaStream_t stream) {
  const auto graphs = static_cast<unsigned>(layer.batch * layer.graphs);
  if (graphs == 0) return;
  count_held_kernel<<<graphs, kWideThreads, 0, stream>>>(layer, held);
  check(cudaGetLastError(), "count_held_kernel");
}

void launch_truncate(const LayerView& layer, std::int64_t length, const std::int64_t* dropped,
                     std::int64_t extent, cudaStream_t stream) {
  const std::int64_t runs = runs_of(extent);
  const auto grid = static_cast<unsigned>(runs * layer.batch * layer.graphs);
  if (grid > 0) {
    truncate_kernel<<<grid, kThreads, 0, stream>>>(layer, length, dropped, runs);
    check(cudaGetLastError(), "truncate_kernel");
  }
  book_truncate_kernel<<<1, kThreads, 0, stream>>>(layer, length, dropped);
  check(cudaGetLastError(), "book_truncate_kernel");
}

void launch_begin_layer(const LayerView& layer, cudaStream_t stream) {
  begin_layer_kernel<<<1, kThreads, 0, stream>>>(layer);
  check(cudaGetLastError(), "begin_layer_kernel");
}

void launch_reset(const LayerView& layer, std::int64_t sequence, std::int64_t length, bool ordered,
                  std::int64_t extent, cudaStream_t stream) {
  const std::int64_t runs = runs_of(extent);
  const auto grid = static_cast<unsigned>(std::max<std::int64_t>(1, runs * layer.graphs));
  reset_kernel<<<grid, kThreads, 0, stream>>>(layer, sequence, length, ordered, extent, runs);
  check(cudaGetLastError(), "reset_kernel");
}

}  // namespace spectralkv::cuda
