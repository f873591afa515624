// Rows of the graph on the device: the rules of src/cpu/graph_rows.cpp, word for word.
#pragma once

#include <cstdint>

#include "cuda/layer.h"

namespace spectralkv::cuda {

inline constexpr std::uint32_t kAllOnes = 0xffffffffU;

/// Number of graph g of sequence b in the layer's arrays.
__device__ inline std::int64_t graph_index(const LayerView& layer, std::int64_t b, std::int64_t g) {
  return b * layer.graphs + g;
}
/// Slots that graph g has.
__device__ inline std::int64_t room_of(const LayerView& layer, std::int64_t g) {
  if (layer.first_slots == nullptr) return layer.capacity;
  return __ldg(layer.first_slots + g + 1) - __ldg(layer.first_slots + g);
}
/// Of the slots [0, length) those that graph g has.
__device__ inline std::int64_t extent_of(const LayerView& layer, std::int64_t g,
                                         std::int64_t length) {
  return layer.first_slots == nullptr ? length : min(length, room_of(layer, g));
}
/// Slots of graph g that may be in use.
__device__ inline std::int64_t length_of(const LayerView& layer, std::int64_t g) {
  return extent_of(layer, g, layer.counters->length);
}
/// Slots in front of those of a graph. What an even layer needs is asked for in any case, so that
/// nothing waits for the pointer first.
__device__ inline std::int64_t slots_before(const LayerView& layer, std::int64_t b,
                                            std::int64_t g) {
  std::int64_t slots = graph_index(layer, b, g) * layer.capacity;
  if (layer.first_slots != nullptr) slots = b * layer.pool + __ldg(layer.first_slots + g);
  return slots;
}
/// Whether the values of a graph, one a slot, can be read four at a time.
__device__ inline bool has_quads(const LayerView& layer, std::int64_t g) {
  if (layer.first_slots == nullptr) return layer.capacity % 4 == 0;
  const std::int64_t bounds = __ldg(layer.first_slots + g) | __ldg(layer.first_slots + g + 1);
  return (bounds | layer.pool) % 4 == 0;
}
__device__ inline std::int32_t* positions_of(const LayerView& layer, std::int64_t b,
                                             std::int64_t g) {
  return layer.positions + slots_before(layer, b, g);
}
__device__ inline std::uint32_t* row_of(const LayerView& layer, std::int64_t b, std::int64_t g,
                                        std::int64_t slot) {
  return layer.rows + (slots_before(layer, b, g) + slot) * layer.row_words;
}
/// Where the values of a population begin, one a slot.
__device__ inline std::int64_t values_before(const LayerView& layer, std::int64_t b, std::int64_t g,
                                             int p) {
  return slots_before(layer, b, g) * layer.populations + p * room_of(layer, g);
}
__device__ inline float* scores_of(const LayerView& layer, std::int64_t b, std::int64_t g, int p) {
  return layer.scores + values_before(layer, b, g, p);
}
__device__ inline std::uint32_t* visits_of(const LayerView& layer, std::int64_t b, std::int64_t g,
                                           int p) {
  return layer.visits + values_before(layer, b, g, p);
}
__device__ inline std::uint32_t* novelty_of(const LayerView& layer, std::int64_t b,
                                            std::int64_t g) {
  return layer.novelty + slots_before(layer, b, g);
}
/// Elements in front of those of a token.
__device__ inline std::int64_t token_offset(const TokensView& tokens, std::int64_t b,
                                            std::int64_t h, std::int64_t slot) {
  const std::int64_t of_sequence = b * tokens.sequence_stride;
  if (tokens.first_slots == nullptr) {
    return of_sequence + h * tokens.head_stride + slot * tokens.token_stride;
  }
  return of_sequence + (__ldg(tokens.first_slots + h) + slot) * tokens.token_stride;
}
__device__ inline bool is_marked(const SequenceMarks& marks, std::int64_t i) {
  return (marks.bits[i >> 5] >> (i & 31) & 1U) != 0;
}

__device__ inline bool has_fault(const LayerView& layer) {
  return *static_cast<const volatile std::uint32_t*>(&layer.fault->fault) != 0;
}
/// Keeps the first fault only.
__device__ inline void report(const LayerView& layer, Fault fault, std::int64_t b, std::int64_t h,
                              std::int64_t value, std::int64_t limit) {
  if (atomicCAS(&layer.fault->fault, 0U, static_cast<std::uint32_t>(fault)) != 0U) return;
  volatile FaultRecord* out = layer.reported;
  out->layer = layer.index;
  out->sequence = static_cast<std::int32_t>(b);
  out->head = static_cast<std::int32_t>(h);
  out->value = value;
  out->limit = limit;
  __threadfence_system();
  out->fault = static_cast<std::uint32_t>(fault);
}

/// An edge is live when it points to an older token that is still there.
__device__ inline bool is_live(const std::int32_t* positions, std::int32_t from_position,
                               std::int32_t to) {
  if (to < 0) return false;
  const std::int32_t position = positions[to];
  return position >= 0 && position < from_position;
}

template <RowFormat kFormat>
__device__ std::int32_t neighbor_at(const std::uint32_t* row, int k) {
  if constexpr (kFormat == RowFormat::packed) return detail::packed_slot(row[k]);
  return static_cast<std::int32_t>(row[k]);
}
/// Not of RowFormat::slots.
template <RowFormat kFormat>
__device__ std::uint32_t threshold_at(const std::uint32_t* row, int top_k, int k) {
  if constexpr (kFormat == RowFormat::packed) return detail::packed_threshold(row[k]);
  return row[top_k + k];
}
/// The threshold is left out where rows have none.
template <RowFormat kFormat>
__device__ void put_edge(std::uint32_t* row, int top_k, int k, std::int32_t neighbor,
                         std::uint32_t threshold) {
  if constexpr (kFormat == RowFormat::packed) {
    row[k] = detail::pack_edge(neighbor, threshold);
  } else {
    row[k] = static_cast<std::uint32_t>(neighbor);
    if constexpr (kFormat == RowFormat::wide) row[top_k + k] = threshold;
  }
}
/// A new threshold for the edge that is there.
template <RowFormat kFormat>
__device__ void put_threshold(std::uint32_t* row, int top_k, int k, std::uint32_t threshold) {
  if constexpr (kFormat == RowFormat::packed) {
    put_edge<kFormat>(row, top_k, k, neighbor_at<kFormat>(row, k), threshold);
  } else if constexpr (kFormat == RowFormat::wide) {
    row[top_k + k] = threshold;
  }
}

// The same where the format is not known when compiled.
__device__ inline std::int32_t neighbor_of(const LayerView& layer, const std::uint32_t* row,
                                           int k) {
  return layer.format == RowFormat::packed ? neighbor_at<RowFormat::packed>(row, k)
                                           : neighbor_at<RowFormat::wide>(row, k);
}
__device__ inline std::uint32_t threshold_of(const LayerView& layer, const std::uint32_t* row,
                                             int k) {
  return layer.format == RowFormat::packed ? threshold_at<RowFormat::packed>(row, layer.top_k, k)
                                           : threshold_at<RowFormat::wide>(row, layer.top_k, k);
}
__device__ inline void set_edge(const LayerView& layer, std::uint32_t* row, int k,
                                std::int32_t neighbor, std::uint32_t threshold) {
  if (layer.format == RowFormat::packed) {
    put_edge<RowFormat::packed>(row, layer.top_k, k, neighbor, threshold);
  } else if (layer.format == RowFormat::wide) {
    put_edge<RowFormat::wide>(row, layer.top_k, k, neighbor, threshold);
  } else {
    put_edge<RowFormat::slots>(row, layer.top_k, k, neighbor, threshold);
  }
}

/// Empties a slot's row, scores, visits and restart weight; the position is the caller's to write.
__device__ inline void clear_slot(const LayerView& layer, std::int64_t b, std::int64_t g,
                                  std::int64_t slot) {
  std::uint32_t* row = row_of(layer, b, g, slot);
  for (int k = 0; k < layer.top_k; ++k) set_edge(layer, row, k, -1, 0);
  for (int p = 0; p < layer.populations; ++p) {
    scores_of(layer, b, g, p)[slot] = 0.0F;
    if (layer.visits != nullptr) visits_of(layer, b, g, p)[slot] = 0U;
  }
  if (layer.novelty != nullptr) novelty_of(layer, b, g)[slot] = 0U;
}

/// EdgeLaw::attention: the width of an edge, which is rounded by itself. Thresholds are their sums,
/// at most kAllOnes.
__device__ inline std::uint64_t attention_width(double probability) {
  return static_cast<std::uint64_t>(floor(__dadd_rn(__dmul_rn(probability, 0x1p32), 0.5)));
}
__device__ inline std::uint32_t attention_threshold(std::uint64_t widths) {
  return widths < kAllOnes ? static_cast<std::uint32_t>(widths) : kAllOnes;
}

/// EdgeLaw::weighted: that of edges which have this part of the weight.
__device__ inline std::uint32_t weighted_threshold(double part) {
  const double scaled = floor(__dadd_rn(__dmul_rn(part, 0x1p32), 0.5));
  return scaled < 0x1p32 ? static_cast<std::uint32_t>(scaled) : kAllOnes;
}

/// `count` neighbours with their probabilities among all tokens, descending.
__device__ inline void write_row(const LayerView& layer, std::uint32_t* row,
                                 const std::int32_t* neighbors, const float* probabilities,
                                 int count) {
  double total = 0.0;
  for (int k = 0; k < count; ++k) total += static_cast<double>(probabilities[k]);
  double sum = 0.0;
  std::uint64_t widths = 0;
  std::uint32_t threshold = 0;
  for (int k = 0; k < layer.top_k; ++k) {
    if (layer.law == EdgeLaw::attention && k < count) {
      widths += attention_width(static_cast<double>(probabilities[k]));
      threshold = attention_threshold(widths);
    } else if (layer.law == EdgeLaw::weighted && k < count) {
      sum += static_cast<double>(probabilities[k]);
      threshold = k + 1 == count ? kAllOnes : weighted_threshold(sum / total);
    }
    set_edge(layer, row, k, k < count ? neighbors[k] : -1, threshold);
  }
}

}  // namespace spectralkv::cuda
