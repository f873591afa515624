// How the words of a row hold its edges, on every device.
#pragma once

#include <cstdint>

#include "spectralkv/config.h"

#ifdef __CUDACC__
#define SPECTRALKV_EVERYWHERE __host__ __device__
#else
#define SPECTRALKV_EVERYWHERE
#endif

namespace spectralkv::detail {

enum class RowFormat : std::uint8_t {
  slots,   ///< a word an edge, its slot: EdgeLaw::uniform
  wide,    ///< top_k slots, then top_k thresholds
  packed,  ///< a word an edge: a slot of 16 bits below a threshold of 16 bits
};

/// Most slots whose numbers fit into a packed row, where the highest number of 16 bits means none.
inline constexpr std::int64_t kMostPackedSlots = 0xffff;

/// Of graphs with `capacity` slots (of a divided layer: the largest room).
inline RowFormat row_format(const GraphConfig& graph, std::int64_t capacity) {
  if (graph.edge_law == EdgeLaw::uniform) return RowFormat::slots;
  return graph.pack_rows && capacity <= kMostPackedSlots ? RowFormat::packed : RowFormat::wide;
}

SPECTRALKV_EVERYWHERE constexpr int words_of_row(RowFormat format, int top_k) {
  return format == RowFormat::wide ? 2 * top_k : top_k;
}

/// A packed threshold t stands for t * 65537: 0 and 2^32 - 1 stay what they are, others come off by
/// 2^15 + 1 at most, and packing twice is packing once. `slot` is -1 or below kMostPackedSlots.
SPECTRALKV_EVERYWHERE constexpr std::uint32_t pack_edge(std::int32_t slot,
                                                        std::uint32_t threshold) {
  const std::uint32_t rounded = threshold - (threshold >> 16U) + 0x8000U;
  return (rounded & 0xffff0000U) | (static_cast<std::uint32_t>(slot) & 0xffffU);
}
SPECTRALKV_EVERYWHERE constexpr std::int32_t packed_slot(std::uint32_t word) {
  return (word & 0xffffU) == 0xffffU ? -1 : static_cast<std::int32_t>(word & 0xffffU);
}
SPECTRALKV_EVERYWHERE constexpr std::uint32_t packed_threshold(std::uint32_t word) {
  return (word >> 16U) * 0x10001U;
}
/// The highest word whose threshold a number is not below: words are compared as they lie.
SPECTRALKV_EVERYWHERE constexpr std::uint32_t highest_reached(std::uint32_t random) {
  const std::uint32_t high = random >> 16U;
  const std::uint32_t above = high + ((random & 0xffffU) >= high ? 1U : 0U);  // 1 to 65536
  return (above << 16U) - 1U;
}

/// The word at k of a row without edges.
SPECTRALKV_EVERYWHERE constexpr std::uint32_t empty_word(RowFormat format, int top_k, int k) {
  if (format == RowFormat::packed) return pack_edge(-1, 0);
  return k < top_k ? ~0U : 0U;
}

}  // namespace spectralkv::detail

#undef SPECTRALKV_EVERYWHERE
