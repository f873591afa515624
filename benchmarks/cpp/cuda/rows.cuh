// Rows of a layer, read back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/layer.h"

namespace spectralkv::bench {

/// Rows as neighbours and thresholds, whatever their format.
inline std::vector<std::int32_t> unpacked(const std::vector<std::uint32_t>& words,
                                          const cuda::LayerView& layer) {
  if (layer.format != cuda::RowFormat::packed) return {words.begin(), words.end()};
  const auto top_k = static_cast<std::size_t>(layer.top_k);
  std::vector<std::int32_t> rows;
  for (std::size_t row = 0; row < words.size(); row += top_k) {
    for (std::size_t k = 0; k < top_k; ++k) {
      rows.push_back(detail::packed_slot(words[row + k]));
    }
    for (std::size_t k = 0; k < top_k; ++k) {
      rows.push_back(static_cast<std::int32_t>(detail::packed_threshold(words[row + k])));
    }
  }
  return rows;
}

}  // namespace spectralkv::bench
