// What the kernels see of a layer: device pointers and counts, handed over by value.
//
// Every array's leading axes are (sequence, graph of the sequence), as on the CPU. Graphs have as
// many slots each, or, in a divided layer, rooms of different size in one pool a sequence: then
// `capacity` in the shape of an array stands for the room of its graph, and `length`, which is one
// number a layer, for what of it a graph has room for. The counters
// live on the device and are advanced there, so that a captured step goes on where the last replay
// ended; the host keeps its own copy (LayerState) for checks that need no device.
#pragma once

#include <cstdint>

#include "row_format.h"
#include "spectralkv/config.h"
#include "spectralkv/tensor.h"

namespace spectralkv::cuda {

using detail::RowFormat;

struct SequenceCounters {
  std::int64_t seen;
  std::int64_t held;  ///< by graph 0; by each of them while the layer is `ordered`
  std::int64_t walked_at;
  std::uint64_t walk_block;  ///< Philox block at which the next walk starts
};

struct LayerCounters {
  std::int64_t length;
  std::int32_t ordered;
  std::uint32_t ticket;  ///< thread blocks of an update that are done; 0 between updates
};

/// What the device found wrong with the contents of a caller's tensor.
enum class Fault : std::uint32_t {
  none,
  slot_range,    ///< value: the slot, limit: the highest allowed
  slot_taken,    ///< value: the slot
  slots_differ,  ///< value: the slot, limit: that of the first head of the graph
  layer_full,    ///< value: slots needed, limit: capacity
  keep_order,    ///< value: the slot, limit: the one before it
  keep_empty,    ///< value: the slot
  keep_differ,   ///< value: the slot
  keep_count,    ///< value: kept by this head, limit: expected
};

/// The first fault. Kernels that change the graph do nothing once `fault` is set.
struct FaultRecord {
  std::uint32_t fault;
  std::int32_t layer;
  std::int32_t sequence;
  std::int32_t head;
  std::int64_t value;
  std::int64_t limit;
};

struct Statistics {
  unsigned long long rows_written;
  unsigned long long rows_nonfinite;
};

/// Slots whose restart weights are summed into one number: those of one sector of memory.
inline constexpr int kRestartBlock = 8;
/// Most sums of the coarse level of a restart table, which a thread block holds in shared memory.
inline constexpr int kMostCoarseSums = 1024;

struct LayerView {
  std::int32_t index;  ///< of the layer
  std::int32_t batch;
  std::int32_t heads;            ///< KV heads
  std::int32_t graphs;           ///< of a sequence: `heads`, or 1 where the heads share one
  std::int32_t heads_per_graph;  ///< heads / graphs; graph g holds heads [g * that, (g + 1) * that)
  std::int32_t group;            ///< query heads of a KV head
  std::int32_t head_dim;
  std::int32_t top_k;
  std::int32_t row_words;  ///< of 32 bits
  std::int32_t populations;
  std::int32_t num_sinks;
  EdgeLaw law;
  RowFormat format;
  std::int64_t capacity;            ///< of a divided layer: the largest room
  std::int64_t pool;                ///< of a divided layer: slots of a sequence
  const std::int32_t* first_slots;  ///< (G + 1), of a divided layer: where rooms begin; null: even
  const std::int32_t* head_order;   ///< (G), of a divided layer: by descending room

  std::int32_t* positions;  ///< (B, G, capacity), -1: empty
  std::uint32_t* rows;      ///< (B, G, capacity, row_words), a row starts at a multiple of its size
  float* scores;            ///< (B, G, P, capacity)
  std::uint32_t* visits;    ///< (B, G, P, capacity), null: the scores are the visits
  std::uint32_t* novelty;   ///< (B, G, capacity), null: no population needs it

  LayerCounters* counters;
  SequenceCounters* sequences;  ///< (B)
  FaultRecord* fault;           ///< of the manager, on the device
  FaultRecord* reported;        ///< the same, in memory that the host reads
  Statistics* statistics;       ///< of the manager
  void* update_scratch;         ///< see update_scratch() in kernels.h; null: never needed

  // Restart tables, see device/restart.cuh.
  std::int32_t restart_group;     ///< blocks of one coarse sum, a power of two
  std::int64_t restart_stride;    ///< words of a table, an even number
  std::uint64_t* restart_tables;  ///< (B, G, P, restart_stride)
  std::uint32_t* walk_tickets;    ///< (B): thread blocks that have begun a walk, 0 between walks
};

/// (B, H, S or Q, D) of the caller; strides count elements, the last axis is contiguous. Of a
/// divided layer: (B, 1, pool, D), where a head's slots begin at first_slots[head].
struct TokensView {
  const void* data;
  DType dtype;
  std::int64_t sequence_stride;
  std::int64_t head_stride;
  std::int64_t token_stride;
  const std::int32_t* first_slots = nullptr;  ///< as in LayerView
};

/// (B, H, n) or (B, H) of the caller.
template <class T>
struct TableView {
  T* data;
  std::int64_t sequence_stride;
  std::int64_t head_stride;
  std::int64_t slot_stride;
};

/// One bit a sequence, for a round of sequences.
struct SequenceMarks {
  static constexpr int kMost = 1024;
  std::uint32_t bits[kMost / 32];
};

/// The populations that a launch is about, by number.
struct PopulationList {
  std::int32_t count;
  std::int32_t numbers[kMaxPopulations];
};

}  // namespace spectralkv::cuda
