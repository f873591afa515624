// Restart distributions.
#include <algorithm>
#include <bit>

#include "cpu/layer.h"

namespace spectralkv::detail {

RestartTable::RestartTable(const CpuContext& context, const CpuLayer& layer,
                           const LayerState& state, std::int64_t b, std::int64_t g,
                           int population) {
  const Population& config = context.walk.populations[static_cast<std::size_t>(population)];
  const std::int32_t* positions = layer.positions(b, g);
  const std::int64_t seen = state.seen[static_cast<std::size_t>(b)];
  const std::int64_t slots = layer.extent(g, state.length);
  if (config.restart != Restart::novelty) {
    const std::int64_t first = config.restart == Restart::current
                                   ? std::max(seen - 1, context.graph.num_sinks)
                                   : first_recent_position(config, seen, context.graph.num_sinks);
    for (std::int64_t slot = 0; slot < slots; ++slot) {
      if (positions[slot] >= first) slots_.push_back(static_cast<std::int32_t>(slot));
    }
    return;
  }

  const std::uint32_t* weights = layer.novelty(b, g);
  std::uint64_t sum = 0;
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    if (positions[slot] < 0 || weights[slot] == 0) continue;
    sum += weights[slot];
    slots_.push_back(static_cast<std::int32_t>(slot));
    cumulative_.push_back(sum);
  }
  if (slots_.empty()) return;
  const unsigned bits = std::clamp(static_cast<unsigned>(std::bit_width(slots_.size())), 1U, 16U);
  guide_shift_ = 32U - bits;
  guide_.reserve(std::size_t{1} << bits);
  std::uint32_t i = 0;
  for (std::uint32_t bucket = 0; bucket < (1U << bits); ++bucket) {
    while (cumulative_[i] <= scaled(sum, bucket << guide_shift_)) ++i;
    guide_.push_back(i);
  }
}

}  // namespace spectralkv::detail
