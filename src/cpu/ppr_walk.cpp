// Personalized PageRank by random walks.
//
// Every walker reads its own Philox stream, two numbers for its start and two for each step,
// whatever happens in the step: for the same rows and restart weights, visits depend on the seed
// alone, not on threads, devices or batching.
#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

struct Graph {
  const std::int32_t* positions;
  const std::uint32_t* rows;  ///< see Row
};

constexpr std::int32_t kNone = -1;

/// Most threads that share one walk.
constexpr std::int64_t kMostParts = 16;

/// floor(total * random / 2^32) for a total below 2^32
inline std::uint32_t scaled(std::uint64_t total, std::uint32_t random) {
  return static_cast<std::uint32_t>((total * random) >> 32U);
}

template <int kTopK, RowFormat kFormat>
struct Edges {
  static constexpr std::int64_t kRowWords = words_of_row(kFormat, kTopK);

  const Graph graph;

  ConstRow row(std::int32_t slot) const { return {graph.rows + slot * kRowWords, kFormat, kTopK}; }

  void prefetch(std::int32_t slot) const {
    __builtin_prefetch(graph.rows + slot * kRowWords);
    __builtin_prefetch(graph.positions + slot);
  }

  /// The edge that a number means, stale or not; kNone: the number lies above all edges.
  std::int32_t draw(std::int32_t slot, std::uint32_t random) const {
    const ConstRow edges = row(slot);
    if constexpr (kFormat == RowFormat::slots) {
      return edges.neighbor(static_cast<int>(scaled(kTopK, random)));
    }
    int k = 0;
    if constexpr (kFormat == RowFormat::packed) {
      const std::uint32_t reached = highest_reached(random);
      for (int i = 0; i < kTopK; ++i) k += edges.words()[i] <= reached ? 1 : 0;
    } else {
      for (int i = 0; i < kTopK; ++i) k += random >= edges.threshold(i) ? 1 : 0;
    }
    return k < kTopK ? edges.neighbor(k) : kNone;
  }

  /// A draw among the live edges only; kNone: there are none.
  std::int32_t draw_live(std::int32_t slot, std::uint32_t random) const {
    const ConstRow edges = row(slot);
    std::uint64_t total = 0;
    for (int k = 0; k < kTopK; ++k) {
      if (is_live_edge(graph.positions, slot, edges.neighbor(k))) total += edges.width(k);
    }
    if (total == 0) return kNone;
    const std::uint32_t target = scaled(total, random);
    std::uint64_t sum = 0;
    for (int k = 0; k < kTopK; ++k) {
      if (!is_live_edge(graph.positions, slot, edges.neighbor(k))) continue;
      sum += edges.width(k);
      if (target < sum) return edges.neighbor(k);
    }
    return kNone;
  }
};

struct WalkRules {
  std::uint64_t seed;
  std::uint64_t first_block;
  std::int64_t walk_length;
  std::uint64_t restart_threshold;  ///< restart_prob in units of 2^-32
  bool count_restarts;
};

/// Walks kWalkerLanes walkers side by side, so that their memory accesses overlap; `active` of them
/// are counted. A step first parts the walkers that follow an edge from those that restart: a
/// branch on a fair coin would be mispredicted half the time.
template <int kTopK, RowFormat kFormat, EdgeLaw kLaw>
void walk_lanes(const Edges<kTopK, kFormat>& edges, const RestartTable& restarts,
                const WalkRules& rules, const std::uint32_t* random, int active,
                std::uint32_t* visits) {
  std::array<std::int32_t, kWalkerLanes> node;
  std::array<std::uint8_t, kWalkerLanes> following;
  std::array<std::uint8_t, 2 * kWalkerLanes> restarting;
  for (int lane = 0; lane < active; ++lane) {
    node[static_cast<std::size_t>(lane)] = restarts.draw(random[kWalkerLanes + lane]);
    edges.prefetch(node[static_cast<std::size_t>(lane)]);
  }
  const std::uint64_t follow_range = (std::uint64_t{1} << 32U) - rules.restart_threshold;
  // What decided to follow an edge is, rescaled, uniform again.
  const auto again = [&](std::uint32_t number) {
    const std::uint64_t above = number - rules.restart_threshold;
    return static_cast<std::uint32_t>((above << 32U) / follow_range);
  };
  const std::uint32_t restart_visit = rules.count_restarts ? 1 : 0;
  for (std::int64_t step = 0; step < rules.walk_length; ++step) {
    const std::uint32_t* const first = random + (2 + 2 * step) * kWalkerLanes;
    const std::uint32_t* const second = first + kWalkerLanes;
    std::size_t num_following = 0;
    std::size_t num_restarting = 0;
    for (int lane = 0; lane < active; ++lane) {
      const bool follows = first[lane] >= rules.restart_threshold;
      following[num_following] = static_cast<std::uint8_t>(lane);
      restarting[num_restarting] = static_cast<std::uint8_t>(lane);
      num_following += follows ? 1 : 0;
      num_restarting += follows ? 0 : 1;
    }
    const std::size_t num_decided = num_restarting;  // whose second number is unused
    for (std::size_t i = 0; i < num_following; ++i) {
      const std::size_t lane = following[i];
      std::int32_t next = edges.draw(node[lane], second[lane]);
      if (!is_live_edge(edges.graph.positions, node[lane], next)) {
        next = kNone;
        if constexpr (kLaw != EdgeLaw::attention) {
          next = edges.draw_live(node[lane], again(first[lane]));
        }
        if (next == kNone) {
          restarting[num_restarting++] = static_cast<std::uint8_t>(lane);
          continue;
        }
      }
      ++visits[next];
      node[lane] = next;
      edges.prefetch(next);
    }
    for (std::size_t i = 0; i < num_restarting; ++i) {
      const std::size_t lane = restarting[i];
      std::uint32_t number = second[lane];
      // It has said that the walker restarts, so it is not free to say where.
      if constexpr (kLaw == EdgeLaw::attention) {
        if (i >= num_decided) number = again(first[lane]);
      }
      const std::int32_t next = restarts.draw(number);
      visits[next] += restart_visit;
      node[lane] = next;
      edges.prefetch(next);
    }
  }
}

template <int kTopK, RowFormat kFormat, EdgeLaw kLaw>
void walk_graph(const CpuContext& context, const Graph& graph, const RestartTable& restarts,
                const WalkRules& rules, std::uint64_t first_stream, std::int64_t num_walkers,
                std::uint32_t* random, std::uint32_t* visits) {
  const Edges<kTopK, kFormat> edges{graph};
  const auto blocks = static_cast<std::int64_t>(blocks_of_walk(rules.walk_length));
  for (std::int64_t w = 0; w < num_walkers; w += kWalkerLanes) {
    context.simd.philox_lanes(rules.seed, first_stream + static_cast<std::uint64_t>(w),
                              rules.first_block, blocks, random);
    const auto active = static_cast<int>(std::min<std::int64_t>(kWalkerLanes, num_walkers - w));
    walk_lanes<kTopK, kFormat, kLaw>(edges, restarts, rules, random, active, visits);
  }
}

using WalkGraph = void (*)(const CpuContext&, const Graph&, const RestartTable&, const WalkRules&,
                           std::uint64_t, std::int64_t, std::uint32_t*, std::uint32_t*);

template <int kTopK>
WalkGraph walk_graph_for(EdgeLaw law, RowFormat format) {
  const bool is_packed = format == RowFormat::packed;
  switch (law) {
    case EdgeLaw::uniform:
      return walk_graph<kTopK, RowFormat::slots, EdgeLaw::uniform>;
    case EdgeLaw::weighted:
      return is_packed ? walk_graph<kTopK, RowFormat::packed, EdgeLaw::weighted>
                       : walk_graph<kTopK, RowFormat::wide, EdgeLaw::weighted>;
    default:
      return is_packed ? walk_graph<kTopK, RowFormat::packed, EdgeLaw::attention>
                       : walk_graph<kTopK, RowFormat::wide, EdgeLaw::attention>;
  }
}

WalkGraph walk_graph_for(const GraphConfig& graph, RowFormat format) {
  switch (graph.top_k) {
    case 4:
      return walk_graph_for<4>(graph.edge_law, format);
    case 8:
      return walk_graph_for<8>(graph.edge_law, format);
    case 16:
      return walk_graph_for<16>(graph.edge_law, format);
    default:
      return walk_graph_for<32>(graph.edge_law, format);
  }
}

}  // namespace

void walk(const CpuContext& context, CpuLayer& layer, const LayerState& state,
          std::int64_t layer_index, std::span<const std::uint8_t> sequences,
          std::span<const int> populations, std::vector<Scratch>& scratch) {
  if (populations.empty()) return;
  const WalkConfig& config = context.walk;
  const auto a_graph = static_cast<std::int64_t>(populations.size());
  std::int64_t walkers_a_graph = 0;
  for (const int p : populations) walkers_a_graph += walkers_of(config, p).count;
  const WalkGraph walk_graph = walk_graph_for(context.graph, layer.format());
  const std::int64_t random_words =
      static_cast<std::int64_t>(blocks_of_walk(config.walk_length)) * 4 * kWalkerLanes;
  const int threads = context.threads_for(layer.batch() * layer.graphs() * walkers_a_graph *
                                          config.walk_length * 16);
  // Where there are fewer walks than threads, the walkers of one are parted too.
  const std::int64_t walks = layer.batch() * layer.graphs() * a_graph;
  const std::int64_t parts = std::clamp<std::int64_t>(threads / walks, 1, kMostParts);

  parallel_for(walks, parts > 1 ? 1 : threads, [&](std::int64_t task, int worker) {
    const std::int64_t b = task / (layer.graphs() * a_graph);
    const std::int64_t g = task / a_graph % layer.graphs();
    const int p = populations[static_cast<std::size_t>(task % a_graph)];
    if (!sequences.empty() && sequences[static_cast<std::size_t>(b)] == 0) return;
    const RestartTable restarts(context, layer, state, b, g, p);

    // Heads are counted over all ranks; the sequence is left out, so that a sequence walks in a
    // batch as it would alone.
    const std::int64_t global_head =
        context.graph.scope == GraphScope::head ? context.graph.head_offset + g : 0;
    const auto graph_id =
        static_cast<std::uint64_t>(layer_index * context.graph.total_kv_heads + global_head);
    const WalkerRange walkers = walkers_of(config, p);
    const WalkRules rules{
        .seed = context.graph.seed,
        .first_block = state.walk_block[static_cast<std::size_t>(b)],
        .walk_length = config.walk_length,
        .restart_threshold = static_cast<std::uint64_t>(config.restart_prob * 0x1p32),
        .count_restarts = config.populations[static_cast<std::size_t>(p)].count == VisitCount::all};
    const Graph graph{layer.positions(b, g), layer.row(b, g, 0).words()};
    const std::int64_t slots = layer.extent(g, state.length);

    const std::int64_t per_part = (walkers.count + parts - 1) / parts;
    std::array<std::uint32_t*, kMostParts> counts;
    for (std::int64_t part = 0; part < parts; ++part) {
      Scratch& own = scratch[static_cast<std::size_t>(parts > 1 ? part : worker)];
      std::uint32_t* const random = own.words.at_least(random_words + slots);
      counts[static_cast<std::size_t>(part)] = random + random_words;
    }
    parallel_for(parts, threads, [&](std::int64_t part, int) {
      std::uint32_t* const visits = counts[static_cast<std::size_t>(part)];
      std::fill_n(visits, slots, 0U);
      const std::int64_t first = part * per_part;
      if (restarts.empty()) return;  // nobody starts: no visits, and scores decay
      walk_graph(context, graph, restarts, rules,
                 (graph_id << 32U) | static_cast<std::uint64_t>(walkers.first + first),
                 std::min(per_part, walkers.count - first), visits - random_words, visits);
    });
    std::uint32_t* const visits = counts[0];
    for (std::int64_t part = 1; part < parts; ++part) {
      for (std::int64_t j = 0; j < slots; ++j) {
        visits[j] += counts[static_cast<std::size_t>(part)][j];
      }
    }

    if (layer.has_visits()) std::copy_n(visits, slots, layer.visits(b, g, p));
    float* const scores = layer.scores(b, g, p);
    const auto decay = static_cast<float>(decay_of(config, p));
    for (std::int64_t j = 0; j < slots; ++j) {
      scores[j] = (decay == 0.0F ? 0.0F : decay * scores[j]) + static_cast<float>(visits[j]);
    }
  });
}

}  // namespace spectralkv::detail
