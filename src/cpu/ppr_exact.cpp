// Personalized PageRank without noise. Edges point to older tokens only, so one sweep from the
// newest token to the oldest sums all paths: y(v) = r(v) + (1 - restart_prob) * sum over u -> v of
// y(u) p(u, v), with r the restart distribution. Restarts, dead ends and what rows leave over
// included, all return to r, so y is PageRank up to its sum.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

/// Slots with a token, newest first.
std::vector<std::int32_t> newest_first(const std::int32_t* positions, std::int64_t length) {
  std::vector<std::int32_t> order;
  order.reserve(static_cast<std::size_t>(length));
  for (std::int64_t slot = length; slot-- > 0;) {
    if (positions[slot] >= 0) order.push_back(static_cast<std::int32_t>(slot));
  }
  const auto newer = [&](std::int32_t a, std::int32_t b) { return positions[a] > positions[b]; };
  if (!std::is_sorted(order.begin(), order.end(), newer)) {
    std::sort(order.begin(), order.end(), newer);
  }
  return order;
}

/// What the sweep over one graph reads, and what it fills.
struct Sweep {
  const std::int32_t* positions;
  const std::uint32_t* rows;
  EdgeLaw law;
  double follow_prob;
  const double* restart;
  double* arriving;  ///< over edges
};

/// Returns the mass of all slots. What a row is like is the compiler's to know: this is a loop over
/// rows and little else.
template <RowFormat kFormat, int kTopK>
double sweep(const Sweep& graph, const std::vector<std::int32_t>& order) {
  constexpr std::int64_t kWords = words_of_row(kFormat, kTopK);
  double total = 0.0;
  for (const std::int32_t slot : order) {
    const double mass = graph.restart[slot] + graph.arriving[slot];
    if (mass == 0.0) continue;
    total += mass;
    const double sent = mass * graph.follow_prob;
    for_each_live_edge(ConstRow(graph.rows + slot * kWords, kFormat, kTopK), graph.law, kTopK,
                       graph.positions, slot, [&](std::int32_t neighbor, double probability) {
                         graph.arriving[neighbor] += sent * probability;
                       });
  }
  return total;
}

template <RowFormat kFormat>
double sweep(const Sweep& graph, int top_k, const std::vector<std::int32_t>& order) {
  switch (top_k) {
    case 4:
      return sweep<kFormat, 4>(graph, order);
    case 8:
      return sweep<kFormat, 8>(graph, order);
    case 16:
      return sweep<kFormat, 16>(graph, order);
    default:
      return sweep<kFormat, 32>(graph, order);
  }
}

double sweep(const Sweep& graph, RowFormat format, int top_k,
             const std::vector<std::int32_t>& order) {
  switch (format) {
    case RowFormat::slots:
      return sweep<RowFormat::slots>(graph, top_k, order);
    case RowFormat::wide:
      return sweep<RowFormat::wide>(graph, top_k, order);
    default:
      return sweep<RowFormat::packed>(graph, top_k, order);
  }
}

}  // namespace

void solve(const CpuContext& context, CpuLayer& layer, const LayerState& state,
           std::span<const std::uint8_t> sequences, std::span<const int> populations) {
  if (populations.empty()) return;
  const WalkConfig& config = context.walk;
  const auto a_graph = static_cast<std::int64_t>(populations.size());
  const int threads = context.threads_for(layer.batch() * layer.graphs() * a_graph * state.length *
                                          context.graph.top_k * 4);

  parallel_for(layer.batch() * layer.graphs() * a_graph, threads, [&](std::int64_t task, int) {
    const std::int64_t b = task / (layer.graphs() * a_graph);
    const std::int64_t g = task / a_graph % layer.graphs();
    const int p = populations[static_cast<std::size_t>(task % a_graph)];
    if (!sequences.empty() && sequences[static_cast<std::size_t>(b)] == 0) return;
    const RestartTable restarts(context, layer, state, b, g, p);

    const auto length = static_cast<std::size_t>(layer.extent(g, state.length));
    std::vector<double> restart(length, 0.0);
    std::vector<double> arriving(length, 0.0);  // over edges
    restarts.for_each([&](std::int32_t slot, double probability) {
      restart[static_cast<std::size_t>(slot)] = probability;
    });
    const std::int32_t* positions = layer.positions(b, g);
    const Sweep graph{.positions = positions,
                      .rows = layer.row(b, g, 0).words(),
                      .law = context.graph.edge_law,
                      .follow_prob = 1.0 - config.restart_prob,
                      .restart = restart.data(),
                      .arriving = arriving.data()};
    const double total = sweep(graph, layer.format(), context.graph.top_k,
                               newest_first(positions, layer.extent(g, state.length)));

    const double decay = decay_of(config, p);
    const bool all = config.populations[static_cast<std::size_t>(p)].count == VisitCount::all;
    const double steps = static_cast<double>(walkers_of(config, p).count * config.walk_length);
    float* const scores = layer.scores(b, g, p);
    for (std::size_t i = 0; i < length; ++i) {
      const double share = total > 0.0 ? (arriving[i] + (all ? restart[i] : 0.0)) / total : 0.0;
      const double visits = steps * share;
      if (layer.has_visits()) {
        layer.visits(b, g, p)[i] = static_cast<std::uint32_t>(std::lround(visits));
      }
      scores[i] = static_cast<float>(decay * static_cast<double>(scores[i]) + visits);
    }
  });
}

}  // namespace spectralkv::detail
