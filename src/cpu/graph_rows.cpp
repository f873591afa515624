// How a token's edges are stored: the two edge laws.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/layer.h"

namespace spectralkv::detail {
namespace {

constexpr std::uint32_t kAllOnes = std::numeric_limits<std::uint32_t>::max();

}  // namespace

void write_row(Row row, int top_k, const std::int32_t* neighbors, const double* probabilities,
               int count) {
  std::fill_n(row.neighbors, top_k, -1);
  std::copy_n(neighbors, count, row.neighbors);
  if (row.thresholds == nullptr) return;
  double total = 0.0;
  for (int k = 0; k < count; ++k) total += probabilities[k];
  double sum = 0.0;
  std::uint32_t threshold = 0;
  for (int k = 0; k < count; ++k) {
    sum += probabilities[k];
    const double scaled = std::floor(sum / total * 0x1p32 + 0.5);
    threshold = scaled < 0x1p32 ? static_cast<std::uint32_t>(scaled) : kAllOnes;
    if (k + 1 == count) threshold = kAllOnes;
    row.thresholds[k] = threshold;
  }
  std::fill(row.thresholds + count, row.thresholds + top_k, threshold);
}

void remap_row(Row row, int top_k, const std::int32_t* positions, std::int64_t slot,
               const std::int32_t* new_slot) {
  const ConstRow old{row.neighbors, row.thresholds};
  const auto stays = [&](int k) {
    const std::int32_t neighbor = old.neighbors[k];
    return is_live_edge(positions, slot, neighbor) && new_slot[neighbor] >= 0 &&
           edge_width(old, k) > 0;
  };
  std::uint64_t total = 0;
  for (int k = 0; k < top_k; ++k) {
    if (stays(k)) total += edge_width(old, k);
  }
  // Writing never overtakes reading, but a width needs the threshold before it as it was.
  std::uint64_t sum = 0;
  std::uint32_t before = 0;
  int count = 0;
  std::uint32_t threshold = 0;
  for (int k = 0; k < top_k; ++k) {
    const std::uint32_t upper = row.thresholds != nullptr ? row.thresholds[k] : 0;
    const std::int32_t neighbor = row.neighbors[k];
    const std::uint32_t width = row.thresholds != nullptr ? upper - before : 1;
    before = upper;
    if (width == 0 || !is_live_edge(positions, slot, neighbor) || new_slot[neighbor] < 0) continue;
    sum += width;
    row.neighbors[count] = new_slot[neighbor];
    if (row.thresholds != nullptr) {
      threshold =
          sum == total ? kAllOnes : static_cast<std::uint32_t>(((sum << 32U) + total / 2) / total);
      row.thresholds[count] = threshold;
    }
    ++count;
  }
  std::fill(row.neighbors + count, row.neighbors + top_k, -1);
  if (row.thresholds != nullptr) {
    std::fill(row.thresholds + count, row.thresholds + top_k, threshold);
  }
}

}  // namespace spectralkv::detail
