// Naive references in double: what the stages have to compute, as plainly as it can be written.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "graph.h"
#include "spectralkv/config.h"
#include "spectralkv/graph_manager.h"
#include "tensors.h"

namespace spectralkv::test {

using Vector = std::vector<double>;
using Matrix = std::vector<Vector>;

// -- attention

/// Rows [0, count) of `tensor`[b, h].
inline Matrix matrix_of(const HostTensor& tensor, Index b, Index h, Index count) {
  Matrix rows;
  for (Index slot = 0; slot < count; ++slot) rows.push_back(tensor.vector({b, h, slot}));
  return rows;
}

inline double dot(const Vector& a, const Vector& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

inline bool all_finite(const Vector& values) {
  return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); });
}

/// One query's softmax over the visible slots with finite keys and scores; 0 elsewhere.
inline Vector attention(const Vector& query, const Matrix& keys, const std::vector<bool>& visible,
                        const ScoreOptions& options) {
  const double scale =
      options.scale == 0.0 ? 1.0 / std::sqrt(static_cast<double>(query.size())) : options.scale;
  Vector scores(keys.size(), -kInfinity);
  double highest = -kInfinity;
  for (std::size_t j = 0; j < keys.size(); ++j) {
    if (!visible[j] || !all_finite(keys[j])) continue;
    double score = scale * dot(query, keys[j]);
    if (options.softcap != 0.0) score = options.softcap * std::tanh(score / options.softcap);
    if (!std::isfinite(static_cast<float>(score))) continue;
    scores[j] = score;
    highest = std::max(highest, score);
  }
  double sum = 0.0;
  for (double& score : scores) {
    score = std::isfinite(score) ? std::exp(score - highest) : 0.0;
    sum += score;
  }
  for (double& score : scores) score /= sum > 0.0 ? sum : 1.0;
  return scores;
}

/// Attention of a token whose queries are `queries` (Hq vectors), averaged over the query heads of
/// one graph. `keys` has a matrix for each KV head.
inline Vector graph_attention(const Matrix& queries, const std::vector<Matrix>& keys,
                              const GraphConfig& config, Index graph,
                              const std::vector<bool>& visible, const ScoreOptions& options) {
  const Index group = config.num_query_heads / config.num_kv_heads;
  const bool shared = config.scope == GraphScope::layer;
  const Index first = shared ? 0 : graph * group;
  const Index last = shared ? config.num_query_heads : first + group;
  Vector mean(visible.size(), 0.0);
  for (Index head = first; head < last; ++head) {
    const Vector row = attention(queries[at(head)], keys[at(head / group)], visible, options);
    for (std::size_t j = 0; j < mean.size(); ++j) {
      mean[j] += row[j] / static_cast<double>(last - first);
    }
  }
  return mean;
}

// -- walks

inline Vector normalized(Vector weights) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& weight : weights) weight /= sum > 0.0 ? sum : 1.0;
  return weights;
}

/// Probability that a walker in `slot` follows an edge of its row: a row may leave something over.
inline double following(const Graph& graph, std::size_t slot, double restart_prob) {
  double kept = 0.0;
  for (const Edge& edge : graph.rows[slot]) kept += edge.probability;
  return (1.0 - restart_prob) * kept;
}

/// The walk without restarts: p(u, v) over live edges, zero rows where there are none.
inline Matrix transition_matrix(const Graph& graph) {
  Matrix matrix(graph.rows.size(), Vector(graph.rows.size(), 0.0));
  for (std::size_t u = 0; u < graph.rows.size(); ++u) {
    for (const Edge& edge : graph.rows[u]) matrix[u][at(edge.slot)] += edge.probability;
  }
  return matrix;
}

/// One step of a distribution over tokens. `over_edges` holds the arrivals that came over an edge.
struct Step {
  Vector all;
  Vector over_edges;
};

inline Step walk_step(const Graph& graph, const Vector& restart, double restart_prob,
                      const Vector& from) {
  Step step{Vector(from.size(), 0.0), Vector(from.size(), 0.0)};
  double restarting = 0.0;
  for (std::size_t u = 0; u < from.size(); ++u) {
    restarting += from[u] * (1.0 - following(graph, u, restart_prob));
    for (const Edge& edge : graph.rows[u]) {
      step.over_edges[at(edge.slot)] += from[u] * (1.0 - restart_prob) * edge.probability;
    }
  }
  for (std::size_t v = 0; v < from.size(); ++v) {
    step.all[v] = step.over_edges[v] + restarting * restart[v];
  }
  return step;
}

inline const Vector& counted(const Step& step, VisitCount count) {
  return count == VisitCount::all ? step.all : step.over_edges;
}

/// Mean and variance of the visits that one walker pays to each token.
struct Moments {
  Vector mean;
  Vector variance;
};

inline Moments visit_moments(const Graph& graph, const Vector& restart, const WalkConfig& walk,
                             VisitCount count) {
  const std::size_t n = restart.size();
  Matrix arrivals;  // probability of a counted arrival at each step
  Vector state = restart;
  for (Index t = 0; t < walk.walk_length; ++t) {
    const Step step = walk_step(graph, restart, walk.restart_prob, state);
    arrivals.push_back(counted(step, count));
    state = step.all;
  }
  Moments moments{Vector(n, 0.0), Vector(n, 0.0)};
  for (std::size_t v = 0; v < n; ++v) {
    for (const Vector& arrival : arrivals) moments.mean[v] += arrival[v];
    if (moments.mean[v] == 0.0) continue;
    // E[N^2] = E[N] + 2 sum over t < u of P(arrival at t and at u)
    double second = moments.mean[v];
    Vector from(n, 0.0);
    from[v] = 1.0;
    for (std::size_t later = 1; later < arrivals.size(); ++later) {
      const Step step = walk_step(graph, restart, walk.restart_prob, from);
      from = step.all;
      double earlier = 0.0;
      for (std::size_t t = 0; t + later < arrivals.size(); ++t) earlier += arrivals[t][v];
      second += 2.0 * earlier * counted(step, count)[v];
    }
    moments.variance[v] = second - moments.mean[v] * moments.mean[v];
  }
  return moments;
}

/// Part of the arrivals that a token gets in an endless walk, by power iteration on the dense
/// matrix; dead ends and what rows leave over return to the restart distribution.
inline Vector stationary_visits(const Graph& graph, const Vector& restart, double restart_prob,
                                VisitCount count) {
  const std::size_t n = restart.size();
  const Matrix follow = transition_matrix(graph);
  Matrix matrix(n, Vector(n, 0.0));
  for (std::size_t u = 0; u < n; ++u) {
    const double restarting = 1.0 - following(graph, u, restart_prob);
    for (std::size_t v = 0; v < n; ++v) {
      matrix[u][v] = (1.0 - restart_prob) * follow[u][v] + restarting * restart[v];
    }
  }
  Vector state = restart;
  double change = 1.0;
  for (int round = 0; round < 20000 && change > 1e-13; ++round) {
    Vector next(n, 0.0);
    for (std::size_t u = 0; u < n; ++u) {
      if (state[u] == 0.0) continue;
      for (std::size_t v = 0; v < n; ++v) next[v] += state[u] * matrix[u][v];
    }
    next = normalized(std::move(next));  // rows are sums of rounded probabilities
    change = 0.0;
    for (std::size_t v = 0; v < n; ++v) change += std::abs(next[v] - state[v]);
    state = std::move(next);
  }
  return counted(walk_step(graph, restart, restart_prob, state), count);
}

/// Walkers of each population.
inline std::vector<Index> walkers_of(const WalkConfig& walk) {
  std::vector<Index> walkers;
  Index left = walk.num_walkers;
  for (const Population& population : walk.populations) {
    const auto part = static_cast<Index>(
        std::floor(population.share * static_cast<double>(walk.num_walkers) + 1e-9));
    walkers.push_back(walkers.size() + 1 == walk.populations.size() ? left : part);
    left -= part;
  }
  return walkers;
}

// -- restart distributions

inline Vector restart_current(const Graph& graph) {
  Vector weights(graph.positions.size(), 0.0);
  weights[at(graph.slot_of(graph.seen() - 1))] = 1.0;
  return weights;
}

inline Vector restart_recent(const Graph& graph, const Population& population, Index num_sinks) {
  const Index seen = graph.seen();
  const auto fraction =
      static_cast<Index>(std::floor(population.recent_fraction * static_cast<double>(seen) + 1e-9));
  const Index newest =
      population.recent_tokens > 0 ? population.recent_tokens : std::max<Index>(1, fraction);
  Vector weights(graph.positions.size(), 0.0);
  for (std::size_t slot = 0; slot < weights.size(); ++slot) {
    const Index position = graph.positions[slot];
    weights[slot] = position >= std::max(num_sinks, seen - newest) ? 1.0 : 0.0;
  }
  return normalized(weights);
}

/// A key as it was before it was turned.
inline Vector unturned(Vector key, const Rotary& rotary, Index position) {
  const std::size_t pairs = rotary.inv_freq.size();
  for (std::size_t i = 0; i < pairs; ++i) {
    const std::size_t first = rotary.interleaved ? 2 * i : i;
    const std::size_t second = rotary.interleaved ? 2 * i + 1 : i + pairs;
    const double angle = static_cast<double>(position) * rotary.inv_freq[i];
    const double x = key[first];
    const double y = key[second];
    key[first] = x * std::cos(angle) + y * std::sin(angle);
    key[second] = y * std::cos(angle) - x * std::sin(angle);
  }
  return key;
}

/// Each weight becomes the mean of those, not 0, among `width` positions around it.
inline Vector shared_weights(const Graph& graph, const Vector& weights, Index width) {
  Vector shared(weights.size(), 0.0);
  for (std::size_t slot = 0; slot < weights.size(); ++slot) {
    if (weights[slot] == 0.0) continue;
    double count = 0.0;
    for (std::size_t other = 0; other < weights.size(); ++other) {
      const Index apart = std::abs(graph.positions[other] - graph.positions[slot]);
      if (weights[other] == 0.0 || apart > width / 2) continue;
      shared[slot] += weights[other];
      count += 1.0;
    }
    shared[slot] /= count;
  }
  return shared;
}

/// softmax of the z-score of -cos(k, mean of k / |k|), shared among neighbours in the text
inline Vector restart_novelty(const Graph& graph, const Matrix& keys, Index num_sinks,
                              Index width = WalkConfig{}.novelty_width) {
  std::vector<std::size_t> counted_slots;
  for (std::size_t slot = 0; slot < graph.positions.size(); ++slot) {
    if (graph.positions[slot] >= 0 && all_finite(keys[slot])) counted_slots.push_back(slot);
  }
  Vector weights(graph.positions.size(), 0.0);
  if (counted_slots.empty()) return weights;
  const auto n = static_cast<double>(counted_slots.size());
  Vector direction(keys.front().size(), 0.0);
  for (const std::size_t slot : counted_slots) {
    const double norm = std::sqrt(dot(keys[slot], keys[slot]));
    for (std::size_t d = 0; d < direction.size(); ++d) direction[d] += keys[slot][d] / norm / n;
  }
  Vector distance;
  for (const std::size_t slot : counted_slots) {
    const double norms =
        std::sqrt(dot(keys[slot], keys[slot])) * std::sqrt(dot(direction, direction));
    distance.push_back(-dot(keys[slot], direction) / norms);
  }
  const double mean = std::accumulate(distance.begin(), distance.end(), 0.0) / n;
  double squares = 0.0;
  for (const double value : distance) squares += (value - mean) * (value - mean);
  const double deviation = std::sqrt(squares / (n - 1.0));
  for (std::size_t i = 0; i < counted_slots.size(); ++i) {
    if (graph.positions[counted_slots[i]] < num_sinks) continue;
    weights[counted_slots[i]] = std::exp((distance[i] - mean) / deviation);
  }
  return normalized(shared_weights(graph, weights, width));
}

// -- eviction

/// The slots that a head keeps when it is cut to its budget, ascending.
inline std::vector<Index> select_reference(const Graph& graph, Index seen, const Matrix& scores,
                                           const std::vector<Population>& populations,
                                           const EvictionConfig& eviction) {
  std::vector<bool> taken(graph.positions.size(), false);
  Index left = eviction.budget;
  for (std::size_t slot = 0; slot < taken.size(); ++slot) {
    const Index position = graph.positions[slot];
    taken[slot] =
        position >= 0 && (position < eviction.sinks || position >= seen - eviction.window);
    if (taken[slot]) --left;
  }
  std::vector<Index> quotas;
  for (const Population& population : populations) {
    quotas.push_back(
        static_cast<Index>(std::floor(population.share * static_cast<double>(left) + 1e-9)));
  }
  quotas.front() += left - std::accumulate(quotas.begin(), quotas.end(), Index{0});
  for (std::size_t p = 0; p < populations.size(); ++p) {
    for (Index place = 0; place < quotas[p]; ++place) {
      Index best = -1;
      for (Index slot = 0; slot < graph.length(); ++slot) {
        if (!graph.live(slot) || taken[at(slot)]) continue;
        if (best < 0 || scores[p][at(slot)] > scores[p][at(best)] ||
            (scores[p][at(slot)] == scores[p][at(best)] &&
             graph.positions[at(slot)] > graph.positions[at(best)])) {
          best = slot;
        }
      }
      if (best >= 0) taken[at(best)] = true;
    }
  }
  std::vector<Index> kept;
  for (Index slot = 0; slot < graph.length(); ++slot) {
    if (taken[at(slot)]) kept.push_back(slot);
  }
  return kept;
}

/// Live slots, ascending.
inline std::vector<Index> live_slots(const Graph& graph) {
  std::vector<Index> slots;
  for (Index slot = 0; slot < graph.length(); ++slot) {
    if (graph.live(slot)) slots.push_back(slot);
  }
  return slots;
}

/// The edges a walk may follow, renormalised unless what is lost is a restart.
inline std::vector<Edge> live_row(const Graph& graph, Index slot, EdgeLaw law) {
  std::vector<Edge> row;
  double sum = 0.0;
  for (const Edge& edge : graph.rows[at(slot)]) {
    const Index target = graph.positions[at(edge.slot)];
    if (target < 0 || target >= graph.positions[at(slot)]) continue;
    row.push_back(edge);
    sum += edge.probability;
  }
  if (law == EdgeLaw::attention) return row;
  for (Edge& edge : row) edge.probability /= sum > 0.0 ? sum : 1.0;
  return row;
}

/// Slot i of the result is slot keep[i] of `graph`, or empty where keep[i] is -1.
inline Graph compacted(const Graph& graph, const std::vector<Index>& keep, EdgeLaw law) {
  std::vector<Index> moved(graph.positions.size(), -1);
  for (Index slot = 0; slot < count_of(keep); ++slot) {
    if (keep[at(slot)] >= 0) moved[at(keep[at(slot)])] = slot;
  }
  Graph result;
  for (const Index from : keep) {
    result.positions.push_back(from < 0 ? -1 : graph.positions[at(from)]);
    result.rows.emplace_back();
    if (from < 0) continue;
    for (const Edge& edge : graph.rows[at(from)]) {
      if (moved[at(edge.slot)] < 0) continue;
      result.rows.back().push_back({moved[at(edge.slot)], edge.probability});
    }
  }
  for (Index slot = 0; slot < result.length(); ++slot) {
    result.rows[at(slot)] = live_row(result, slot, law);
  }
  return result;
}

}  // namespace spectralkv::test
