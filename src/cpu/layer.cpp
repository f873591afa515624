#include "cpu/layer.h"

#include <algorithm>

namespace spectralkv::detail {

CpuLayer::CpuLayer(const GraphConfig& graph, const WalkConfig& walk, std::int64_t batch,
                   std::int64_t capacity, std::span<const std::int64_t> rooms)
    : batch_(batch),
      divided_(!rooms.empty()),
      rooms_(rooms.begin(), rooms.end()),
      top_k_(graph.top_k),
      format_(row_format(graph, capacity)),
      populations_(static_cast<std::int64_t>(walk.populations.size())) {
  if (!divided_) {
    const std::int64_t graphs = graph.scope == GraphScope::head ? graph.num_kv_heads : 1;
    rooms_.assign(static_cast<std::size_t>(graphs), capacity);
  }
  before_.push_back(0);
  for (const std::int64_t room : rooms_) before_.push_back(before_.back() + room);
  const std::int64_t slots = batch * before_.back();
  positions_ = AlignedBuffer<std::int32_t>(slots, -1);
  rows_ = AlignedBuffer<std::uint32_t>(slots * words_of_row(format_, top_k_), 0);
  scores_ = AlignedBuffer<float>(slots * populations_, 0.0F);
  if (needs_visits(walk)) visits_ = AlignedBuffer<std::uint32_t>(slots * populations_, 0);
  if (walk.needs_novelty()) novelty_ = AlignedBuffer<std::uint32_t>(slots, 0);
}

void CpuLayer::clear(std::int64_t b, std::int64_t g, std::int64_t slot) {
  positions(b, g)[slot] = -1;
  const Row edges = row(b, g, slot);
  for (int k = 0; k < top_k_; ++k) edges.set(k, -1, 0);
  for (int p = 0; p < populations_; ++p) {
    scores(b, g, p)[slot] = 0.0F;
    if (has_visits()) visits(b, g, p)[slot] = 0;
  }
  if (novelty_.bytes() > 0) novelty(b, g)[slot] = 0;
}

void CpuLayer::copy_sequence(std::int64_t to, const CpuLayer& other, std::int64_t from,
                             std::int64_t length) {
  for (std::int64_t g = 0; g < graphs(); ++g) {
    const std::int64_t n = std::min(extent(g, length), other.extent(g, length));
    std::copy_n(other.positions(from, g), n, positions(to, g));
    for (std::int64_t slot = 0; slot < n; ++slot) {
      copy_row(other.row(from, g, slot), row(to, g, slot), top_k_, room(g));
    }
    for (int p = 0; p < populations_; ++p) {
      std::copy_n(other.scores(from, g, p), n, scores(to, g, p));
      if (has_visits()) std::copy_n(other.visits(from, g, p), n, visits(to, g, p));
    }
    if (novelty_.bytes() > 0) std::copy_n(other.novelty(from, g), n, novelty(to, g));
  }
}

std::int64_t CpuLayer::bytes() const {
  return positions_.bytes() + rows_.bytes() + scores_.bytes() + visits_.bytes() + novelty_.bytes();
}

}  // namespace spectralkv::detail
