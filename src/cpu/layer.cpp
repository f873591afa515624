#include "cpu/layer.h"

#include <algorithm>

namespace spectralkv::detail {

CpuLayer::CpuLayer(const GraphConfig& graph, const WalkConfig& walk, std::int64_t batch,
                   std::int64_t capacity)
    : batch_(batch),
      graphs_(graph.scope == GraphScope::head ? graph.num_kv_heads : 1),
      capacity_(capacity),
      top_k_(graph.top_k),
      row_words_(words_of_row(graph)),
      populations_(static_cast<std::int64_t>(walk.populations.size())),
      has_thresholds_(graph.edge_law != EdgeLaw::uniform),
      positions_(batch * graphs_ * capacity, -1),
      rows_(batch * graphs_ * capacity * row_words_, 0),
      scores_(batch * graphs_ * capacity * populations_, 0.0F),
      visits_(needs_visits(walk) ? batch * graphs_ * capacity * populations_ : 0, 0),
      novelty_(walk.needs_novelty() ? batch * graphs_ * capacity : 0, 0) {}

void CpuLayer::clear(std::int64_t b, std::int64_t g, std::int64_t slot) {
  positions(b, g)[slot] = -1;
  const Row edges = row(b, g, slot);
  std::fill_n(edges.neighbors, top_k_, -1);
  if (edges.thresholds != nullptr) std::fill_n(edges.thresholds, top_k_, 0U);
  for (int p = 0; p < populations_; ++p) {
    scores(b, g, p)[slot] = 0.0F;
    if (has_visits()) visits(b, g, p)[slot] = 0;
  }
  if (novelty_.bytes() > 0) novelty(b, g)[slot] = 0;
}

void CpuLayer::copy_sequence(std::int64_t to, const CpuLayer& other, std::int64_t from,
                             std::int64_t length) {
  for (std::int64_t g = 0; g < graphs_; ++g) {
    std::copy_n(other.positions(from, g), length, positions(to, g));
    std::copy_n(other.row(from, g, 0).neighbors, length * row_words_, row(to, g, 0).neighbors);
    for (int p = 0; p < populations_; ++p) {
      std::copy_n(other.scores(from, g, p), length, scores(to, g, p));
      if (has_visits()) std::copy_n(other.visits(from, g, p), length, visits(to, g, p));
    }
    if (novelty_.bytes() > 0) std::copy_n(other.novelty(from, g), length, novelty(to, g));
  }
}

std::int64_t CpuLayer::bytes() const {
  return positions_.bytes() + rows_.bytes() + scores_.bytes() + visits_.bytes() + novelty_.bytes();
}

}  // namespace spectralkv::detail
