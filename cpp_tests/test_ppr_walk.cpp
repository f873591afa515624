#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

GraphConfig graph_config(EdgeLaw law = EdgeLaw::weighted, int top_k = 8, bool pack = true) {
  return {.num_query_heads = 1,
          .num_kv_heads = 1,
          .head_dim = 8,
          .capacity = 128,
          .top_k = top_k,
          .edge_law = law,
          .pack_rows = pack,
          .seed = 42,
          .num_threads = 1};
}

constexpr GraphShape kShape{.slots = 64, .tokens = 50, .seen = 90};

/// A manager whose layers, sequences and heads all hold the same graph.
class Stage {
 public:
  Stage(const GraphConfig& config, const WalkConfig& walk, Graph same_graph)
      : manager(config, walk), graph(std::move(same_graph)), keys_(key_slab(config, 1)) {
    Random random(77);
    keys_.fill_normal(random);
    load();
  }

  void load() {
    for (Index layer = 0; layer < manager.graph_config().num_layers; ++layer) {
      load_graphs(manager, layer,
                  Graphs(at(manager.batch_size(layer)),
                         std::vector<Graph>(at(manager.graphs_per_sequence()), graph)));
      if (!manager.walk_config().needs_novelty()) continue;
      ConstTensorView keys = keys_.view();  // every sequence has the same
      keys.shape[0] = manager.batch_size(layer);
      keys.strides[0] = 0;
      manager.update_novelty(layer, keys, Stream{});
    }
  }

  Vector restart(int population) const {
    const Population& chosen = manager.walk_config().populations[at(population)];
    switch (chosen.restart) {
      case Restart::current:
        return restart_current(graph);
      case Restart::recent:
        return restart_recent(graph, chosen, manager.graph_config().num_sinks);
      case Restart::novelty:
        return restart_novelty(graph, matrix_of(keys_, 0, 0, graph.length()),
                               manager.graph_config().num_sinks);
    }
    return {};
  }

  Vector visits(int population, Index layer = 0, Index b = 0, Index h = 0) const {
    return read_visits(manager, layer, population).vector({b, h});
  }
  Vector scores(int population, Index layer = 0, Index b = 0, Index h = 0) const {
    return read_scores(manager, layer, population).vector({b, h});
  }
  Vector walk(Index layer = 0) {
    manager.walk(layer, {}, Stream{});
    return visits(0, layer);
  }

  GraphManager manager;
  Graph graph;

 private:
  HostTensor keys_;
};

double sum_of(const Vector& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

Graph some_graph(std::uint64_t seed, EdgeLaw law = EdgeLaw::weighted, int top_k = 8) {
  Random random(seed);
  return random_graph(random, kShape, top_k, law);
}

/// Visits of `walkers` walkers against what one is expected to pay: no token deviates much, and all
/// together neither too much nor too little.
void expect_visits(const Vector& visits, const Moments& moments, double walkers) {
  double squares = 0.0;
  int counted_tokens = 0;
  for (std::size_t v = 0; v < visits.size(); ++v) {
    const double mean = moments.mean[v] * walkers;
    const double deviation = std::sqrt(std::max(0.0, moments.variance[v]) * walkers);
    if (mean == 0.0) {
      EXPECT_EQ(visits[v], 0.0) << "token " << v;
      continue;
    }
    EXPECT_NEAR(visits[v], mean, 5.0 * deviation + 3.0) << "token " << v;
    if (mean < 20.0 || deviation < 3.0) continue;
    squares += (visits[v] - mean) * (visits[v] - mean) / (deviation * deviation);
    ++counted_tokens;
  }
  if (counted_tokens < 8) return;
  const double spread = 4.0 * std::sqrt(2.0 / counted_tokens);
  EXPECT_LT(squares / counted_tokens, 1.0 + spread);
  EXPECT_GT(squares / counted_tokens, std::max(0.05, 1.0 - spread));
}

/// Walks `rounds` times and compares the sums of every population.
void check_expectation(Stage& stage, int rounds) {
  const WalkConfig& walk = stage.manager.walk_config();
  const std::vector<Index> walkers = walkers_of(walk);
  std::vector<Vector> totals(walk.populations.size(), Vector(at(stage.graph.length()), 0.0));
  for (int round = 0; round < rounds; ++round) {
    stage.manager.walk(0, {}, Stream{});
    for (std::size_t p = 0; p < totals.size(); ++p) {
      const Vector visits = stage.visits(static_cast<int>(p));
      if (walk.populations[p].count == VisitCount::all) {
        ASSERT_EQ(sum_of(visits), static_cast<double>(walkers[p] * walk.walk_length));
      }
      for (std::size_t v = 0; v < visits.size(); ++v) totals[p][v] += visits[v];
    }
  }
  for (std::size_t p = 0; p < totals.size(); ++p) {
    SCOPED_TRACE(::testing::Message() << "population " << p);
    expect_visits(totals[p],
                  visit_moments(stage.graph, stage.restart(static_cast<int>(p)), walk,
                                walk.populations[p].count),
                  static_cast<double>(rounds * walkers[p]));
  }
}

TEST(PprWalk, HasTheExpectedVisitsFromEveryRestart) {
  std::uint64_t seed = 100;
  for (const EdgeLaw law : kEdgeLaws) {
    for (const Restart restart : {Restart::current, Restart::recent, Restart::novelty}) {
      for (const VisitCount count : {VisitCount::edges, VisitCount::all}) {
        for (const double restart_prob : {0.15, 0.5, 0.85}) {
          SCOPED_TRACE(::testing::Message()
                       << "law " << static_cast<int>(law) << ", restart "
                       << static_cast<int>(restart) << ", count " << static_cast<int>(count)
                       << ", restart_prob " << restart_prob);
          const WalkConfig walk{.restart_prob = restart_prob,
                                .populations = {{.restart = restart, .count = count}}};
          Stage stage(graph_config(law), walk, some_graph(++seed, law));
          check_expectation(stage, 8);
        }
      }
    }
  }
}

TEST(PprWalk, HasTheExpectedVisitsForEveryTopKAndLength) {
  std::uint64_t seed = 200;
  for (const int top_k : {4, 8, 16, 32}) {
    for (const EdgeLaw law : kEdgeLaws) {
      for (const Index walk_length : {1, 2, 3, 50}) {
        SCOPED_TRACE(::testing::Message() << "top_k " << top_k << ", walk_length " << walk_length);
        const WalkConfig walk{.num_walkers = 2048,
                              .walk_length = walk_length,
                              .restart_prob = 0.2,
                              .populations = {{.count = VisitCount::all}}};
        const Graph graph = some_graph(++seed, law, top_k);
        for (const bool pack : {true, false}) {
          Stage stage(graph_config(law, top_k, pack), walk, graph);
          check_expectation(stage, 4);
        }
      }
    }
  }
}

TEST(PprWalk, HasTheExpectedVisitsOfAMix) {
  const WalkConfig walk{
      .num_walkers = 2001,
      .restart_prob = 0.3,
      .populations = {{.restart = Restart::recent, .count = VisitCount::edges, .share = 0.3},
                      {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.3},
                      {.restart = Restart::current, .count = VisitCount::all, .share = 0.15},
                      {.restart = Restart::recent,
                       .count = VisitCount::all,
                       .share = 0.25,
                       .recent_tokens = 40}}};
  Stage stage(graph_config(), walk, some_graph(300));
  check_expectation(stage, 16);
}

TEST(PprWalk, RestartsAtDeadEnds) {
  GraphShape shape = kShape;
  shape.dead_ends = 0.7;
  Random random(301);
  for (const EdgeLaw law : {EdgeLaw::weighted, EdgeLaw::attention}) {
    for (const VisitCount count : {VisitCount::edges, VisitCount::all}) {
      const WalkConfig walk{.restart_prob = 0.1, .populations = {{.count = count}}};
      Stage stage(graph_config(law), walk, random_graph(random, shape, 8, law));
      check_expectation(stage, 8);
    }
  }
}

TEST(PprWalk, OnlyRestartsWithoutEdges) {
  const WalkConfig walk{
      .restart_prob = 0.1,
      .populations = {{.count = VisitCount::all, .share = 0.5, .recent_tokens = 30},
                      {.count = VisitCount::edges, .share = 0.5}}};
  Stage stage(graph_config(), walk, plain_graph(60));
  check_expectation(stage, 4);
  EXPECT_EQ(sum_of(stage.visits(1)), 0.0);
}

TEST(PprWalk, OnlyRestartsWithRestartProbabilityOne) {
  const WalkConfig walk{
      .restart_prob = 1.0,
      .populations = {{.restart = Restart::novelty, .count = VisitCount::all, .share = 0.5},
                      {.count = VisitCount::edges, .share = 0.5}}};
  Stage stage(graph_config(), walk, some_graph(302));
  check_expectation(stage, 4);
  EXPECT_EQ(sum_of(stage.visits(1)), 0.0);
}

TEST(PprWalk, AlmostNeverRestarts) {
  const WalkConfig walk{.restart_prob = 1e-9, .populations = {{.count = VisitCount::edges}}};
  Stage stage(graph_config(), walk, some_graph(303));
  check_expectation(stage, 8);
}

TEST(PprWalk, RestartsAnywhereWhenItsRowIsUsedUp) {
  // The number that lies beyond the last edge is a high one: were it to say where the walker goes,
  // it would be to the last of the restarts only. Twelve tokens, each alike, whatever is left over.
  GraphConfig config = graph_config(EdgeLaw::attention);
  config.num_sinks = 0;
  for (const double left_over : {0.02, 0.5, 0.98}) {
    Graph graph = plain_graph(13);
    for (Index slot = 1; slot < 13; ++slot) {
      graph.rows[at(slot)] = {{0, 1.0 - left_over}};
    }
    for (const bool stale : {false, true}) {
      SCOPED_TRACE(::testing::Message() << "left over " << left_over << ", stale " << stale);
      const WalkConfig walk{.num_walkers = 4096,
                            .restart_prob = 0.05,
                            .populations = {{.count = VisitCount::all, .recent_tokens = 12}}};
      Stage stage(config, walk, graph);
      if (stale) {
        std::vector<Index> kept = live_slots(graph);
        kept.erase(kept.begin());
        stage.manager.release(0, keep_tensor({{kept}}).view(), Stream{});
        stage.graph = read_graphs(stage.manager, 0)[0][0];
        ASSERT_TRUE(stage.graph.rows.back().empty());
      }
      check_expectation(stage, 8);
    }
  }
}

TEST(PprWalk, OnlyRestartsWhereRowsRoundToNothing) {
  Graph graph = plain_graph(20);
  for (Index slot = 5; slot < 20; ++slot) graph.rows[at(slot)] = {{slot - 1, 1e-11}};
  const WalkConfig walk{.restart_prob = 0.1, .populations = {{.count = VisitCount::edges}}};
  Stage stage(graph_config(EdgeLaw::attention), walk, graph);
  EXPECT_EQ(sum_of(stage.walk()), 0.0);
}

TEST(PprWalk, LeavesStaleEdgesOut) {
  // Slots are freed and taken by newer tokens; the rows that the manager shows are renormalised,
  // but for those whose law makes restarts of what is lost.
  GraphConfig config = graph_config();
  config.capacity = 64;
  const WalkConfig walk{.restart_prob = 0.2,
                        .populations = {{.count = VisitCount::all, .recent_tokens = 40}}};
  for (const auto& [law, pack] : {std::pair{EdgeLaw::uniform, true},
                                  {EdgeLaw::weighted, true},
                                  {EdgeLaw::weighted, false},
                                  {EdgeLaw::attention, true},
                                  {EdgeLaw::attention, false}}) {
    config.edge_law = law;
    config.pack_rows = pack;
    GraphManager manager(config, walk);
    Feeder feeder(manager, 0, 304);
    feeder.prefill(60);
    const Graph before = read_graphs(manager, 0)[0][0];
    std::vector<Index> kept = random_part(feeder.random, live_slots(before), 30);
    manager.release(0, keep_tensor({{kept}}).view(), Stream{});
    for (int i = 0; i < 20; ++i) feeder.reuse();
    const Graph graph = read_graphs(manager, 0)[0][0];
    Index thinner = 0;
    for (const Index slot : kept) {
      if (graph.rows[at(slot)].size() < before.rows[at(slot)].size()) ++thinner;
    }
    ASSERT_GT(thinner, 10);
    Vector total(60, 0.0);
    for (int round = 0; round < 8; ++round) {
      manager.walk(0, {}, Stream{});
      const Vector visits = read_visits(manager, 0, 0).vector({0, 0});
      for (std::size_t v = 0; v < total.size(); ++v) total[v] += visits[v];
    }
    expect_visits(
        total,
        visit_moments(graph, restart_recent(graph, walk.populations[0], 4), walk, VisitCount::all),
        8.0 * 1024.0);
  }
}

TEST(PprWalk, ComesCloseToTheExactSolution) {
  for (const VisitCount count : {VisitCount::edges, VisitCount::all}) {
    const WalkConfig walk{.num_walkers = 64,
                          .walk_length = 10000,
                          .restart_prob = 0.3,
                          .populations = {{.restart = Restart::novelty, .count = count}}};
    Stage stage(graph_config(), walk, some_graph(305));
    const Vector visits = stage.walk();
    stage.manager.solve(0, {}, Stream{});
    const Vector exact = stage.scores(0);
    double distance = 0.0;
    for (std::size_t v = 0; v < visits.size(); ++v) distance += std::abs(visits[v] - exact[v]);
    EXPECT_LT(distance / (64.0 * 10000.0), 0.02);
  }
}

TEST(PprWalk, GivesTheLastPopulationTheRest) {
  for (const Index walkers : {3, 10, 999, 1023}) {
    const WalkConfig walk{
        .num_walkers = walkers,
        .walk_length = 7,
        .populations = {{.count = VisitCount::all, .share = 0.25},
                        {.restart = Restart::current, .count = VisitCount::all, .share = 0.3},
                        {.count = VisitCount::all, .share = 0.45}}};
    Stage stage(graph_config(), walk, some_graph(306));
    stage.walk();
    const std::vector<Index> expected = walkers_of(walk);
    for (int p = 0; p < 3; ++p) {
      EXPECT_EQ(sum_of(stage.visits(p)), static_cast<double>(7 * expected[at(p)])) << walkers;
    }
    EXPECT_EQ(sum_of(stage.scores(-1)), static_cast<double>(7 * walkers));
  }
}

TEST(PprWalk, GivesEveryWalkerItsOwnNumbers) {
  // Populations that do the same are parts of one: its walkers, dealt out.
  const Graph graph = some_graph(309);
  const Population alike{.count = VisitCount::all, .share = 0.5, .recent_tokens = 30};
  Stage parts(graph_config(), {.num_walkers = 333, .populations = {alike, alike}}, graph);
  WalkConfig walk{.num_walkers = 333, .populations = {alike}};
  walk.populations.front().share = 1.0;
  Stage whole(graph_config(), walk, graph);
  for (int round = 0; round < 3; ++round) {
    Vector sum = parts.walk();
    const Vector second = parts.visits(1);
    EXPECT_NE(sum, second);
    for (std::size_t v = 0; v < sum.size(); ++v) sum[v] += second[v];
    EXPECT_EQ(sum, whole.walk());
  }
}

TEST(PprWalk, CountsTheSameArrivalsUnderBothRules) {
  WalkConfig walk{.populations = {{.count = VisitCount::all, .recent_tokens = 9}}};
  const Graph graph = some_graph(307);
  Stage all(graph_config(), walk, graph);
  walk.populations.front().count = VisitCount::edges;
  Stage edges(graph_config(), walk, graph);
  const Vector all_visits = all.walk();
  const Vector edge_visits = edges.walk();
  const Vector restart = all.restart(0);
  for (std::size_t v = 0; v < restart.size(); ++v) {
    if (restart[v] > 0.0) {
      EXPECT_LE(edge_visits[v], all_visits[v]);
    } else {
      EXPECT_EQ(edge_visits[v], all_visits[v]);
    }
  }
  EXPECT_LT(sum_of(edge_visits), sum_of(all_visits));
  EXPECT_GT(sum_of(edge_visits), 0.0);
}

TEST(PprWalk, AddsVisitsToDecayedScores) {
  // What a population says for itself comes before what the walk says for all.
  using Decays = std::array<std::optional<double>, 3>;
  constexpr std::optional<double> kUnset;
  for (const Decays& given : {Decays{0.0, kUnset, kUnset},
                              {0.5, kUnset, kUnset},
                              {0.9, kUnset, kUnset},
                              {1.0, kUnset, kUnset},
                              {0.0, 0.9, kUnset},
                              {0.0, kUnset, 1.0},
                              {0.5, 0.0, kUnset},
                              {0.9, 0.3, 0.0},
                              {0.7, 0.0, 0.0}}) {
    WalkConfig walk{.decay = *given[0]};
    std::array<double, 2> decays;
    for (std::size_t p = 0; p < 2; ++p) {
      walk.populations[p].solver = Solver::walk;
      walk.populations[p].decay = given[p + 1];
      decays[p] = given[p + 1].value_or(walk.decay);
    }
    SCOPED_TRACE(::testing::Message() << "decays " << decays[0] << " and " << decays[1]);
    Stage stage(graph_config(), walk, some_graph(308));
    std::vector<Vector> expected(2, Vector(at(kShape.slots), 0.0));
    for (int round = 0; round < 5; ++round) {
      stage.walk();
      Vector sum(at(kShape.slots), 0.0);
      for (int p = 0; p < 2; ++p) {
        const Vector visits = stage.visits(p);
        const Vector scores = stage.scores(p);
        for (std::size_t v = 0; v < sum.size(); ++v) {
          expected[at(p)][v] = decays[at(p)] * expected[at(p)][v] + visits[v];
          sum[v] += expected[at(p)][v];
          EXPECT_NEAR(scores[v], expected[at(p)][v], 1e-6 * expected[at(p)][v]);
        }
      }
      const Vector scores = stage.scores(-1);
      for (std::size_t v = 0; v < sum.size(); ++v) EXPECT_NEAR(scores[v], sum[v], 1e-6 * sum[v]);
    }
  }
}

// -- random numbers

WalkConfig plain_walk() {
  return {.num_walkers = 256, .populations = {{.count = VisitCount::all, .recent_tokens = 30}}};
}

TEST(PprWalk, RepeatsWithItsSeed) {
  GraphConfig config = graph_config();
  const Graph graph = some_graph(400);
  Stage first(config, plain_walk(), graph);
  Stage second(config, plain_walk(), graph);
  config.seed = 43;
  Stage other(config, plain_walk(), graph);
  config.seed = 42 + (std::uint64_t{1} << 32U);
  Stage far(config, plain_walk(), graph);
  const Vector visits = first.walk();
  EXPECT_EQ(visits, second.walk());
  EXPECT_NE(visits, other.walk());
  EXPECT_NE(visits, far.walk());
  const Vector next = first.walk();
  EXPECT_NE(visits, next);
  EXPECT_EQ(next, second.walk());
}

TEST(PprWalk, GoesOnInItsStreamAfterReset) {
  const Graph graph = some_graph(401);
  Stage stage(graph_config(), plain_walk(), graph);
  Stage other(graph_config(), plain_walk(), graph);
  const Vector visits = stage.walk();
  stage.manager.reset(0);
  stage.load();
  const Vector next = stage.walk();
  EXPECT_NE(visits, next);
  other.walk();
  EXPECT_EQ(next, other.walk());
}

TEST(PprWalk, TakesNoNumbersForSolving) {
  const Graph graph = some_graph(402);
  Stage stage(graph_config(), plain_walk(), graph);
  Stage other(graph_config(), plain_walk(), graph);
  stage.manager.solve(0, {}, Stream{});
  EXPECT_EQ(stage.walk(), other.walk());
}

TEST(PprWalk, TreatsEqualSequencesAlike) {
  GraphConfig config = graph_config();
  config.batch_size = 3;
  Stage stage(config, plain_walk(), some_graph(403));
  const Vector first = stage.walk();
  for (Index b = 1; b < 3; ++b) EXPECT_EQ(stage.visits(0, 0, b), first);
  // Sequence 1 alone: its stream advances, those of the others wait.
  stage.manager.walk(0, std::vector<std::uint8_t>{0, 7, 0}, Stream{});
  const Vector second = stage.visits(0, 0, 1);
  EXPECT_NE(first, second);
  EXPECT_EQ(stage.visits(0, 0, 0), first);
  EXPECT_EQ(stage.visits(0, 0, 2), first);
  stage.manager.walk(0, {}, Stream{});
  EXPECT_EQ(stage.visits(0, 0, 0), second);
  EXPECT_NE(stage.visits(0, 0, 1), second);
  EXPECT_EQ(stage.visits(0, 0, 2), second);
  EXPECT_EQ(stage.manager.statistics().walks, 7);
}

TEST(PprWalk, MarksNobody) {
  GraphConfig config = graph_config();
  config.batch_size = 2;
  Stage stage(config, plain_walk(), some_graph(404));
  stage.manager.walk(0, std::vector<std::uint8_t>{0, 0}, Stream{});
  EXPECT_EQ(stage.manager.statistics().walks, 0);
  EXPECT_EQ(sum_of(stage.visits(0)), 0.0);
  EXPECT_EQ(stage.manager.tokens_walked(0, 0), -1);
}

TEST(PprWalk, DiffersBetweenHeadsAndLayers) {
  GraphConfig config = graph_config();
  config.num_layers = 2;
  config.num_query_heads = config.num_kv_heads = 2;
  Stage stage(config, plain_walk(), some_graph(405));
  stage.manager.walk(kAllLayers, {}, Stream{});
  EXPECT_EQ(stage.manager.statistics().walks, 4);
  std::vector<Vector> visits;
  for (Index layer = 0; layer < 2; ++layer) {
    for (Index h = 0; h < 2; ++h) visits.push_back(stage.visits(0, layer, 0, h));
  }
  for (std::size_t i = 0; i < visits.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) EXPECT_NE(visits[i], visits[j]);
  }
  // Layer by layer it is the same walk.
  Stage single(config, plain_walk(), stage.graph);
  single.walk(1);
  EXPECT_EQ(single.visits(0, 1, 0, 1), visits[3]);
  EXPECT_EQ(sum_of(single.visits(0, 0, 0, 0)), 0.0);
}

TEST(PprWalk, NumbersItsHeadsOverAllRanks) {
  GraphConfig config = graph_config();
  config.num_layers = 2;
  config.num_query_heads = config.num_kv_heads = 4;
  const Graph graph = some_graph(406);
  Stage whole(config, plain_walk(), graph);
  config.num_query_heads = config.num_kv_heads = 2;
  config.total_kv_heads = 4;
  config.head_offset = 2;
  Stage rank(config, plain_walk(), graph);
  whole.manager.walk(kAllLayers, {}, Stream{});
  rank.manager.walk(kAllLayers, {}, Stream{});
  for (Index layer = 0; layer < 2; ++layer) {
    for (Index h = 0; h < 2; ++h) {
      EXPECT_EQ(whole.visits(0, layer, 0, h + 2), rank.visits(0, layer, 0, h));
    }
  }
}

TEST(PprWalk, SharesTheGraphOfALayer) {
  GraphConfig config = graph_config();
  config.num_query_heads = config.num_kv_heads = 3;
  config.scope = GraphScope::layer;
  Stage stage(config, plain_walk(), some_graph(407));
  ASSERT_EQ(stage.manager.graphs_per_sequence(), 1);
  const Vector visits = stage.walk();
  EXPECT_EQ(sum_of(visits), 256.0 * 20.0);
  for (Index h = 1; h < 3; ++h) {
    EXPECT_EQ(stage.visits(0, 0, 0, h), visits);
    EXPECT_EQ(stage.scores(-1, 0, 0, h), visits);
  }
  EXPECT_EQ(stage.manager.statistics().walks, 1);
  check_expectation(stage, 8);
}

TEST(PprWalk, DoesNothingWithoutRestart) {
  WalkConfig walk = plain_walk();
  for (const Restart restart : {Restart::current, Restart::recent}) {
    walk.populations.front().restart = restart;
    Stage sinks_only(graph_config(), walk, plain_graph(4));
    sinks_only.manager.walk(0, {}, Stream{});
    EXPECT_EQ(sum_of(sinks_only.visits(0)), 0.0);
    sinks_only.manager.solve(0, {}, Stream{});
    EXPECT_EQ(sum_of(sinks_only.scores(0)), 0.0);
    EXPECT_EQ(sum_of(read_restart(sinks_only.manager, 0, 0).vector({0, 0})), 0.0);
  }
  GraphManager empty(graph_config(), WalkConfig{});
  empty.walk(0, {}, Stream{});
  empty.solve(kAllLayers, {}, Stream{});
  EXPECT_EQ(read_visits(empty, 0, 0).elements(), 0);
  // One sequence has tokens, the other has none.
  GraphConfig config = graph_config();
  config.batch_size = 2;
  GraphManager half(config, plain_walk());
  Graph nothing = plain_graph(60);
  nothing.positions.assign(60, -1);
  load_graphs(half, 0, {{plain_graph(60)}, {nothing}});
  half.walk(0, {}, Stream{});
  EXPECT_EQ(sum_of(read_visits(half, 0, 0).vector({0, 0})), 256.0 * 20.0);
  EXPECT_EQ(sum_of(read_visits(half, 0, 0).vector({1, 0})), 0.0);
}

TEST(PprWalk, IsTheLastPartOfAStep) {
  GraphConfig config = graph_config();
  config.num_query_heads = 4;
  config.num_kv_heads = 2;
  config.batch_size = 2;
  GraphManager step(config, WalkConfig{});
  GraphManager parts(config, WalkConfig{});
  Feeder first(step, 0, 500);
  Feeder second(parts, 0, 500);
  first.prefill(30);
  second.prefill(30);
  for (Index i = 0; i < 3; ++i) {
    HostTensor query = first.query();
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 2; ++h) first.write_key(b, h, 30 + i);
    }
    step.update_and_step(0, query.view(), first.keys.view(), {}, {}, Stream{});
    parts.update(0, query.view(), first.keys.view(), {}, {}, Stream{});
    parts.update_novelty(0, first.keys.view(), Stream{});
    parts.walk(0, {}, Stream{});
  }
  EXPECT_TRUE(Snapshot(step) == Snapshot(parts));
  EXPECT_EQ(step.statistics().walks, 3 * 4);
  EXPECT_EQ(step.tokens_walked(0, 1), 33);
}

}  // namespace
}  // namespace spectralkv::test
