// How a token's edges are stored: the edge laws.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/layer.h"

namespace spectralkv::detail {
namespace {

constexpr std::uint32_t kAllOnes = std::numeric_limits<std::uint32_t>::max();

}  // namespace

void write_row(Row row, EdgeLaw law, int top_k, const std::int32_t* neighbors,
               const double* probabilities, int count) {
  std::fill_n(row.neighbors, top_k, -1);
  std::copy_n(neighbors, count, row.neighbors);
  if (law == EdgeLaw::uniform) return;
  if (law == EdgeLaw::attention) {
    // Each width is rounded by itself: sums of integers ascend and depend on no order.
    std::uint64_t sum = 0;
    for (int k = 0; k < top_k; ++k) {
      if (k < count) {
        sum += static_cast<std::uint64_t>(std::floor(probabilities[k] * 0x1p32 + 0.5));
      }
      row.thresholds[k] = static_cast<std::uint32_t>(std::min<std::uint64_t>(sum, kAllOnes));
    }
    return;
  }
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

void remap_row(ConstRow from, Row to, EdgeLaw law, int top_k, const std::int32_t* positions,
               std::int64_t slot, const std::int32_t* new_slot) {
  const auto target = [&](std::int32_t neighbor) {
    return is_live_edge(positions, slot, neighbor) ? new_slot[neighbor] : -1;
  };
  int count = 0;
  if (law == EdgeLaw::uniform) {
    for (int k = 0; k < top_k; ++k) {
      const std::int32_t neighbor = target(from.neighbors[k]);
      if (neighbor >= 0) to.neighbors[count++] = neighbor;
    }
    std::fill(to.neighbors + count, to.neighbors + top_k, -1);
    return;
  }
  // Kept edges are pushed together first. Writing never overtakes reading, but a width needs the
  // threshold before it as it was.
  std::uint32_t sum = 0;
  std::uint32_t before = 0;
  for (int k = 0; k < top_k; ++k) {
    const std::uint32_t upper = from.thresholds[k];
    const std::uint32_t width = upper - before;
    before = upper;
    if (width == 0) continue;
    const std::int32_t neighbor = target(from.neighbors[k]);
    if (neighbor < 0) continue;
    sum += width;
    to.neighbors[count] = neighbor;
    to.thresholds[count++] = sum;
  }
  std::fill(to.neighbors + count, to.neighbors + top_k, -1);
  if (law == EdgeLaw::attention) {
    std::fill(to.thresholds + count, to.thresholds + top_k, sum);
    return;
  }
  const std::uint32_t total = sum;
  if (total != kAllOnes) {
    for (int k = 0; k + 1 < count; ++k) {
      to.thresholds[k] = static_cast<std::uint32_t>(
          ((std::uint64_t{to.thresholds[k]} << 32U) + total / 2) / total);
    }
    if (count > 0) to.thresholds[count - 1] = kAllOnes;
  }
  std::fill(to.thresholds + count, to.thresholds + top_k, count > 0 ? kAllOnes : 0U);
}

}  // namespace spectralkv::detail
