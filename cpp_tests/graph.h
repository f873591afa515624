// Graphs as tests see them: read from a manager, made by hand, put into a manager.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "manager.h"
#include "tensors.h"

namespace spectralkv::test {

struct Edge {
  Index slot = 0;
  double probability = 0.0;

  friend bool operator==(const Edge&, const Edge&) = default;
};

/// What one manager holds for one layer, sequence and graph.
struct Graph {
  std::vector<Index> positions;         ///< by slot, -1: empty
  std::vector<std::vector<Edge>> rows;  ///< by slot: the live edges

  Index length() const { return count_of(positions); }
  bool live(Index slot) const { return positions[at(slot)] >= 0; }
  Index held() const {
    return static_cast<Index>(
        std::count_if(positions.begin(), positions.end(), [](Index p) { return p >= 0; }));
  }
  /// One more than the newest position.
  Index seen() const {
    return positions.empty() ? 0 : *std::max_element(positions.begin(), positions.end()) + 1;
  }
  /// -1 where no slot holds that position.
  Index slot_of(Index position) const {
    const auto found = std::find(positions.begin(), positions.end(), position);
    return found == positions.end() ? -1 : static_cast<Index>(found - positions.begin());
  }
  /// Live slots, oldest token first.
  std::vector<Index> by_age() const {
    std::vector<Index> slots;
    for (Index slot = 0; slot < length(); ++slot) {
      if (live(slot)) slots.push_back(slot);
    }
    std::sort(slots.begin(), slots.end(),
              [this](Index a, Index b) { return positions[at(a)] < positions[at(b)]; });
    return slots;
  }

  friend bool operator==(const Graph&, const Graph&) = default;
};

/// By sequence, then by graph.
using Graphs = std::vector<std::vector<Graph>>;

inline HostTensor read_positions(const GraphManager& manager, Index layer) {
  HostTensor out(DType::i32, {manager.batch_size(layer), manager.graph_config().num_kv_heads,
                              manager.length(layer)});
  manager.positions(layer, out.view(), Stream{});
  return out;
}

inline HostTensor read_scores(const GraphManager& manager, Index layer, int population) {
  HostTensor out(DType::f32, {manager.batch_size(layer), manager.graph_config().num_kv_heads,
                              manager.length(layer)});
  manager.scores(layer, population, out.view(), Stream{});
  return out;
}

inline HostTensor read_visits(const GraphManager& manager, Index layer, int population) {
  HostTensor out(DType::u32, {manager.batch_size(layer), manager.graph_config().num_kv_heads,
                              manager.length(layer)});
  manager.visits(layer, population, out.view(), Stream{});
  return out;
}

inline HostTensor read_restart(const GraphManager& manager, Index layer, int population) {
  HostTensor out(DType::f32,
                 {manager.batch_size(layer), manager.graphs_per_sequence(), manager.length(layer)});
  manager.restart_distribution(layer, population, out.view(), Stream{});
  return out;
}

/// Neighbours and probabilities as `rows` writes them.
struct RawRows {
  HostTensor neighbors;
  HostTensor probabilities;
};

inline RawRows read_raw_rows(const GraphManager& manager, Index layer) {
  const std::vector<Index> shape{manager.batch_size(layer), manager.graphs_per_sequence(),
                                 manager.length(layer), manager.graph_config().top_k};
  RawRows raw{HostTensor(DType::i32, shape), HostTensor(DType::f32, shape)};
  manager.rows(layer, raw.neighbors.view(), raw.probabilities.view(), Stream{});
  return raw;
}

inline Graphs read_graphs(const GraphManager& manager, Index layer) {
  const HostTensor positions = read_positions(manager, layer);
  const RawRows raw = read_raw_rows(manager, layer);
  Graphs graphs(at(manager.batch_size(layer)));
  for (Index b = 0; b < count_of(graphs); ++b) {
    for (Index g = 0; g < manager.graphs_per_sequence(); ++g) {
      Graph graph;
      for (Index slot = 0; slot < manager.length(layer); ++slot) {
        graph.positions.push_back(positions.get_index({b, g, slot}));
        graph.rows.emplace_back();
        for (Index k = 0; k < manager.graph_config().top_k; ++k) {
          const Index neighbor = raw.neighbors.get_index({b, g, slot, k});
          if (neighbor < 0) continue;
          graph.rows.back().push_back({neighbor, raw.probabilities.get({b, g, slot, k})});
        }
      }
      graphs[at(b)].push_back(std::move(graph));
    }
  }
  return graphs;
}

/// All graphs must have the same length.
inline void load_graphs(GraphManager& manager, Index layer, const Graphs& graphs) {
  const Index batch = count_of(graphs);
  const Index per_sequence = count_of(graphs.front());
  const Index length = graphs.front().front().length();
  const Index top_k = manager.graph_config().top_k;
  HostTensor positions(DType::i32, {batch, per_sequence, length});
  HostTensor neighbors(DType::i32, {batch, per_sequence, length, top_k});
  HostTensor probabilities(DType::f32, {batch, per_sequence, length, top_k});
  neighbors.fill(-1);
  for (Index b = 0; b < batch; ++b) {
    for (Index g = 0; g < per_sequence; ++g) {
      const Graph& graph = graphs[at(b)][at(g)];
      for (Index slot = 0; slot < length; ++slot) {
        positions.set({b, g, slot}, static_cast<double>(graph.positions[at(slot)]));
        Index k = 0;
        for (const Edge& edge : graph.rows[at(slot)]) {
          neighbors.set({b, g, slot, k}, static_cast<double>(edge.slot));
          probabilities.set({b, g, slot, k++}, edge.probability);
        }
      }
    }
  }
  manager.load_rows(layer, positions.view(), neighbors.view(), probabilities.view());
}

/// Tokens at positions 0, 1, ... in slots of the same number, without edges.
inline Graph plain_graph(Index length) {
  Graph graph;
  graph.positions.resize(at(length));
  std::iota(graph.positions.begin(), graph.positions.end(), 0);
  graph.rows.resize(at(length));
  return graph;
}

inline constexpr std::array kEdgeLaws{EdgeLaw::uniform, EdgeLaw::weighted, EdgeLaw::attention};

struct GraphShape {
  Index slots = 64;
  Index tokens = 48;       ///< in as many of the slots
  Index seen = 80;         ///< the newest token stands at seen - 1
  Index num_sinks = 4;     ///< no edges to positions below
  double dead_ends = 0.1;  ///< part of the rows left empty
  bool in_order = false;   ///< whether slots ascend with positions
};

/// Random edges, denser to some tokens than to others. Under EdgeLaw::attention rows leave
/// something over, most of them.
inline Graph random_graph(Random& random, const GraphShape& shape, int top_k, EdgeLaw law) {
  std::vector<Index> positions(at(shape.seen - 1));
  std::iota(positions.begin(), positions.end(), 0);
  random.shuffle(positions);
  positions.resize(at(shape.tokens - 1));
  positions.push_back(shape.seen - 1);
  std::vector<Index> slots(at(shape.slots));
  std::iota(slots.begin(), slots.end(), 0);
  random.shuffle(slots);
  slots.resize(at(shape.tokens));
  if (shape.in_order) {
    std::sort(positions.begin(), positions.end());
    std::sort(slots.begin(), slots.end());
  }
  Graph graph;
  graph.positions.assign(at(shape.slots), -1);
  graph.rows.resize(at(shape.slots));
  for (std::size_t i = 0; i < slots.size(); ++i) graph.positions[at(slots[i])] = positions[i];
  const std::vector<Index> ages = graph.by_age();
  for (Index age = 0; age < count_of(ages); ++age) {
    std::vector<Index> targets;
    for (Index older = 0; older < age; ++older) {
      if (graph.positions[at(ages[at(older)])] >= shape.num_sinks) {
        targets.push_back(ages[at(older)]);
      }
    }
    if (targets.empty() || random.chance(shape.dead_ends)) continue;
    random.shuffle(targets);
    targets.resize(at(std::min({count_of(targets), Index{top_k}, random.integer(1, top_k)})));
    std::vector<Edge>& row = graph.rows[at(ages[at(age)])];
    double sum = 0.0;
    for (const Index target : targets) {
      const double weight = law == EdgeLaw::uniform ? 1.0 : std::exp(random.normal());
      row.push_back({target, weight});
      sum += weight;
    }
    if (law == EdgeLaw::attention && !random.chance(0.1)) sum /= random.uniform();
    for (Edge& edge : row) edge.probability /= sum;
  }
  return graph;
}

}  // namespace spectralkv::test
