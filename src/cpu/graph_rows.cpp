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
  double total = 0.0;
  for (int k = 0; k < count; ++k) total += probabilities[k];
  double sum = 0.0;
  std::uint64_t widths = 0;
  std::uint32_t threshold = 0;
  for (int k = 0; k < top_k; ++k) {
    if (law == EdgeLaw::attention && k < count) {
      // Each width is rounded by itself: sums of integers ascend and depend on no order.
      widths += static_cast<std::uint64_t>(std::floor(probabilities[k] * 0x1p32 + 0.5));
      threshold = static_cast<std::uint32_t>(std::min<std::uint64_t>(widths, kAllOnes));
    } else if (law == EdgeLaw::weighted && k < count) {
      sum += probabilities[k];
      const double scaled = std::floor(sum / total * 0x1p32 + 0.5);
      const bool is_last = k + 1 == count || !(scaled < 0x1p32);
      threshold = is_last ? kAllOnes : static_cast<std::uint32_t>(scaled);
    }
    row.set(k, k < count ? neighbors[k] : -1, threshold);
  }
}

void copy_row(ConstRow from, Row to, int top_k, std::int64_t slots) {
  for (int k = 0; k < top_k; ++k) {
    const std::int32_t neighbor = from.neighbor(k);
    to.set(k, neighbor < slots ? neighbor : -1, from.has_thresholds() ? from.threshold(k) : 0);
  }
}

void remap_row(ConstRow from, Row to, EdgeLaw law, int top_k, const std::int32_t* positions,
               std::int64_t slot, const std::int32_t* new_slot) {
  // Kept edges are pushed together first. Writing never overtakes reading, but a width needs the
  // threshold before it as it was.
  int count = 0;
  std::uint32_t sum = 0;
  std::uint32_t before = 0;
  for (int k = 0; k < top_k; ++k) {
    const std::int32_t old = from.neighbor(k);
    std::uint32_t width = 1;
    if (from.has_thresholds()) {
      const std::uint32_t upper = from.threshold(k);
      width = upper - before;
      before = upper;
    }
    const std::int32_t neighbor = is_live_edge(positions, slot, old) ? new_slot[old] : -1;
    if (width == 0 || neighbor < 0) continue;
    sum += width;
    to.set(count++, neighbor, sum);
  }
  const std::uint32_t total = sum;
  if (law == EdgeLaw::weighted && total != kAllOnes) {
    for (int k = 0; k < count; ++k) {
      const std::uint64_t scaled = ((std::uint64_t{to.threshold(k)} << 32U) + total / 2) / total;
      to.set(k, to.neighbor(k), k + 1 == count ? kAllOnes : static_cast<std::uint32_t>(scaled));
    }
  }
  if (law == EdgeLaw::weighted && count > 0) sum = kAllOnes;
  for (int k = count; k < top_k; ++k) to.set(k, -1, sum);
}

}  // namespace spectralkv::detail
