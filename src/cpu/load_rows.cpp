// Graphs from outside, checked.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/layer.h"
#include "validate.h"

namespace spectralkv::detail {
namespace {

/// Sums of probabilities are those of rounded numbers.
constexpr double kSlack = 1e-3;

std::int64_t row_offset(const ConstTensorView& view, std::int64_t b, std::int64_t g,
                        std::int64_t slot) {
  return b * view.stride(0) + g * view.stride(1) + slot * view.stride(2);
}

}  // namespace

LoadResult load_graphs(const GraphConfig& graph, CpuLayer& next, const ConstTensorView& positions,
                       const ConstTensorView& neighbors, const ConstTensorView& probabilities) {
  const std::int64_t slots = positions.size(2);
  LoadResult result;
  for (std::int64_t b = 0; b < next.batch(); ++b) {
    for (std::int64_t g = 0; g < next.graphs(); ++g) {
      std::int32_t* own = next.positions(b, g);
      std::copy_n(element_pointer<std::int32_t>(positions,
                                                b * positions.stride(0) + g * positions.stride(1)),
                  slots, own);
      std::vector<std::int32_t> sorted;
      for (std::int64_t slot = 0; slot < slots; ++slot) {
        if (own[slot] < -1) {
          throw_invalid("load_rows", "a position", "-1 or more", std::to_string(own[slot]));
        }
        if (own[slot] >= 0) sorted.push_back(own[slot]);
      }
      result.ordered = result.ordered && std::is_sorted(sorted.begin(), sorted.end());
      std::sort(sorted.begin(), sorted.end());
      const auto twin = std::adjacent_find(sorted.begin(), sorted.end());
      if (twin != sorted.end()) {
        throw_invalid("load_rows", "the positions of a graph", "unique",
                      std::to_string(*twin) + " twice");
      }
      const std::int64_t seen = sorted.empty() ? 0 : std::int64_t{sorted.back()} + 1;
      const auto held = static_cast<std::int64_t>(sorted.size());
      if (g == 0) result.seen.push_back(seen);
      result.held.push_back(held);
      const std::int64_t first = result.held[static_cast<std::size_t>(b * next.graphs())];
      if (held != first) {
        throw_invalid("load_rows", "the number of tokens of each graph of a sequence",
                      std::to_string(first), std::to_string(held));
      }
      result.seen.back() = std::max(result.seen.back(), seen);

      for (std::int64_t slot = 0; slot < slots; ++slot) {
        const auto* to =
            element_pointer<std::int32_t>(neighbors, row_offset(neighbors, b, g, slot));
        const auto* weight =
            element_pointer<float>(probabilities, row_offset(probabilities, b, g, slot));
        std::vector<std::int32_t> edges;
        std::vector<double> weights;
        double total = 0.0;
        for (int k = 0; k < graph.top_k; ++k) {
          if (!(weight[k] >= 0.0F && weight[k] <= 1.0F)) {
            throw_invalid("load_rows", "a probability", "in [0, 1]", std::to_string(weight[k]));
          }
          if (weight[k] == 0.0F) continue;
          if (to[k] < 0 || to[k] >= slots || !is_live_edge(own, slot, to[k])) {
            throw_invalid("load_rows", "an edge of slot " + std::to_string(slot),
                          "to a slot with an older token", std::to_string(to[k]));
          }
          edges.push_back(to[k]);
          weights.push_back(weight[k]);
          total += weight[k];
        }
        const bool all_to_neighbors = graph.edge_law != EdgeLaw::attention;
        const double least = edges.empty() || !all_to_neighbors ? 0.0 : 1.0;
        if (total < least - kSlack || total > 1.0 + kSlack) {
          throw_invalid("load_rows", "the sum of a row's probabilities",
                        all_to_neighbors ? "1 or 0" : "in [0, 1]", std::to_string(total));
        }
        write_row(next.row(b, g, slot), graph.edge_law, graph.top_k, edges.data(), weights.data(),
                  static_cast<int>(edges.size()));
      }
    }
  }
  return result;
}

}  // namespace spectralkv::detail
