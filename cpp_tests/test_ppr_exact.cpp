#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

constexpr GraphShape kShape{.slots = 64, .tokens = 50, .seen = 90};

GraphConfig graph_config(EdgeLaw law, Index heads = 1) {
  return {.num_query_heads = heads,
          .num_kv_heads = heads,
          .head_dim = 8,
          .capacity = 128,
          .edge_law = law,
          .num_threads = 1};
}

Vector restart_of(const GraphManager& manager, int population, Index b = 0, Index g = 0) {
  return normalized(read_restart(manager, 0, population).vector({b, g}));
}

/// Scores of one graph against power iteration, to 1e-6 of all visits.
void expect_solution(const GraphManager& manager, const Graph& graph, Index b = 0, Index h = 0) {
  const WalkConfig& walk = manager.walk_config();
  const std::vector<Index> walkers = walkers_of(walk);
  for (int p = 0; p < static_cast<int>(walkers.size()); ++p) {
    SCOPED_TRACE(::testing::Message() << "population " << p);
    const auto visits = static_cast<double>(walkers[at(p)] * walk.walk_length);
    const Vector expected = stationary_visits(graph, restart_of(manager, p, b, h),
                                              walk.restart_prob, walk.populations[at(p)].count);
    const Vector scores = read_scores(manager, 0, p).vector({b, h});
    double sum = 0.0;
    for (std::size_t v = 0; v < scores.size(); ++v) {
      EXPECT_NEAR(scores[v] / visits, expected[v], 1e-6) << "token " << v;
      sum += scores[v];
    }
    if (walk.populations[at(p)].count == VisitCount::all) {
      EXPECT_NEAR(sum / visits, 1.0, 1e-6);
    }
  }
}

TEST(PprExact, EqualsPowerIteration) {
  Random random(1);
  for (const EdgeLaw law : kEdgeLaws) {
    for (const double restart_prob : {0.05, 0.15, 0.5, 0.85, 1.0}) {
      for (const double dead_ends : {0.0, 0.1, 0.6, 1.0}) {
        SCOPED_TRACE(::testing::Message()
                     << "restart_prob " << restart_prob << ", dead ends " << dead_ends);
        const WalkConfig walk{
            .num_walkers = 1001,
            .restart_prob = restart_prob,
            .populations = {
                {.count = VisitCount::edges, .share = 0.25},
                {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.25},
                {.restart = Restart::current, .count = VisitCount::all, .share = 0.25},
                {.restart = Restart::novelty, .count = VisitCount::edges, .share = 0.25}}};
        GraphConfig config = graph_config(law);
        config.pack_rows = dead_ends != 0.1;
        GraphManager manager(config, walk);
        GraphShape shape = kShape;
        shape.dead_ends = dead_ends;
        load_graphs(manager, 0, {{random_graph(random, shape, 8, law)}});
        HostTensor keys = key_slab(manager.graph_config(), 1);
        keys.fill_normal(random);
        manager.update_novelty(0, keys.view(), Stream{});
        manager.solve(0, {}, Stream{});
        expect_solution(manager, read_graphs(manager, 0)[0][0]);  // as rounded
      }
    }
  }
}

TEST(PprExact, LeavesStaleEdgesOut) {
  for (const EdgeLaw law : kEdgeLaws) {
    GraphConfig config = graph_config(law, 2);
    config.batch_size = 2;
    GraphManager manager(config, WalkConfig{.restart_prob = 0.2});
    Feeder feeder(manager, 0, 2);
    feeder.prefill(70);
    std::vector<std::vector<std::vector<Index>>> kept(2, std::vector<std::vector<Index>>(2));
    for (std::size_t b = 0; b < 2; ++b) {
      for (std::size_t h = 0; h < 2; ++h) {
        kept[b][h] = random_part(feeder.random, plain_graph(70).positions, 40);
      }
    }
    manager.release(0, keep_tensor(kept).view(), Stream{});
    for (int i = 0; i < 15; ++i) feeder.reuse();
    manager.update_novelty(0, feeder.keys.view(), Stream{});
    manager.solve(0, {}, Stream{});
    const Graphs graphs = read_graphs(manager, 0);
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 2; ++h) {
        expect_sound(graphs[at(b)][at(h)], config.num_sinks, law);
        expect_solution(manager, graphs[at(b)][at(h)], b, h);
      }
    }
  }
}

TEST(PprExact, IsBitwiseDeterministic) {
  WalkConfig walk;
  for (Population& population : walk.populations) {
    population.solver = Solver::walk;
    population.decay = 0.0;
  }
  GraphManager manager(graph_config(EdgeLaw::weighted), walk);
  Feeder feeder(manager, 0, 3);
  feeder.prefill(120);
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  manager.solve(0, {}, Stream{});
  const HostTensor first = read_scores(manager, 0, -1);
  manager.solve(0, {}, Stream{});
  EXPECT_EQ(first.bytes(), read_scores(manager, 0, -1).bytes());
  manager.walk(0, {}, Stream{});
  manager.solve(0, {}, Stream{});
  EXPECT_EQ(first.bytes(), read_scores(manager, 0, -1).bytes());
  EXPECT_EQ(manager.statistics().solves, 3);
  EXPECT_EQ(manager.statistics().walks, 1);
}

TEST(PprExact, DecaysAsWalksDo) {
  const WalkConfig walk{.decay = 0.5,
                        .populations = {{.share = 0.5, .recent_tokens = 20},
                                        {.share = 0.25, .recent_tokens = 30, .decay = 0.9},
                                        {.count = VisitCount::all, .share = 0.25, .decay = 0.0}}};
  GraphManager manager(graph_config(EdgeLaw::weighted), walk);
  Random random(4);
  load_graphs(manager, 0, {{random_graph(random, kShape, 8, EdgeLaw::weighted)}});
  manager.solve(0, {}, Stream{});
  Matrix first;
  for (int p = 0; p < 3; ++p) first.push_back(read_scores(manager, 0, p).vector({0, 0}));
  manager.solve(0, {}, Stream{});
  for (int p = 0; p < 3; ++p) {
    const Vector second = read_scores(manager, 0, p).vector({0, 0});
    const double factor = 1.0 + walk.populations[at(p)].decay.value_or(walk.decay);
    for (std::size_t v = 0; v < second.size(); ++v) {
      EXPECT_NEAR(second[v], factor * first[at(p)][v], 1e-5 * first[at(p)][v]);
    }
  }
}

TEST(PprExact, RoundsItsVisits) {
  for (const double decay : {0.0, 0.5}) {
    GraphManager manager(graph_config(EdgeLaw::weighted),
                         WalkConfig{.decay = decay, .populations = {{.recent_tokens = 20}}});
    Random random(7);
    load_graphs(manager, 0, {{random_graph(random, kShape, 8, EdgeLaw::weighted)}});
    manager.walk(0, {}, Stream{});
    const Vector before = read_scores(manager, 0, 0).vector({0, 0});
    manager.solve(0, {}, Stream{});
    const Vector scores = read_scores(manager, 0, 0).vector({0, 0});
    const Vector visits = read_visits(manager, 0, 0).vector({0, 0});
    for (std::size_t v = 0; v < visits.size(); ++v) {
      EXPECT_NEAR(visits[v], scores[v] - decay * before[v], 0.501) << "token " << v;
    }
  }
}

TEST(PprExact, SolvesTheMarkedSequences) {
  GraphConfig config = graph_config(EdgeLaw::weighted);
  config.batch_size = 3;
  GraphManager manager(config, WalkConfig{.populations = {{.recent_tokens = 20}}});
  Random random(5);
  const Graph graph = random_graph(random, kShape, 8, EdgeLaw::weighted);
  load_graphs(manager, 0, {{graph}, {graph}, {graph}});
  manager.solve(0, std::vector<std::uint8_t>{1, 0, 255}, Stream{});
  const HostTensor scores = read_scores(manager, 0, 0);
  const Vector first = scores.vector({0, 0});
  EXPECT_GT(std::accumulate(first.begin(), first.end(), 0.0), 0.0);
  EXPECT_EQ(scores.vector({1, 0}), Vector(first.size(), 0.0));
  EXPECT_EQ(scores.vector({2, 0}), first);
  EXPECT_EQ(manager.statistics().solves, 2);
  EXPECT_EQ(manager.tokens_walked(0, 0), 90);
  EXPECT_EQ(manager.tokens_walked(0, 1), -1);
}

TEST(PprExact, SharesTheGraphOfALayer) {
  GraphConfig config = graph_config(EdgeLaw::weighted, 4);
  config.scope = GraphScope::layer;
  GraphManager manager(config, WalkConfig{.populations = {{.recent_tokens = 20}}});
  Random random(6);
  load_graphs(manager, 0, {{random_graph(random, kShape, 8, EdgeLaw::weighted)}});
  manager.solve(0, {}, Stream{});
  expect_solution(manager, read_graphs(manager, 0)[0][0]);
  const HostTensor scores = read_scores(manager, 0, 0);
  for (Index h = 1; h < 4; ++h) EXPECT_EQ(scores.vector({0, h}), scores.vector({0, 0}));
}

TEST(PprExact, IsTheOnlyPossibleWayOfAChain) {
  // 5 -> 4 -> 3 -> 2 -> 1 -> 0, restart at 5: y halves at every hop.
  GraphConfig config = graph_config(EdgeLaw::uniform);
  config.num_sinks = 0;
  const WalkConfig walk{
      .num_walkers = 10,
      .walk_length = 10,
      .restart_prob = 0.5,
      .populations = {{.restart = Restart::current, .count = VisitCount::all, .share = 0.5},
                      {.restart = Restart::current, .count = VisitCount::edges, .share = 0.5}}};
  GraphManager manager(config, walk);
  Graph chain = plain_graph(6);
  for (Index slot = 1; slot < 6; ++slot) chain.rows[at(slot)] = {{slot - 1, 1.0}};
  load_graphs(manager, 0, {{chain}});
  manager.solve(0, {}, Stream{});
  const double sum = 1.0 + 0.5 + 0.25 + 0.125 + 0.0625 + 0.03125;
  const Vector all = read_scores(manager, 0, 0).vector({0, 0});
  const Vector edges = read_scores(manager, 0, 1).vector({0, 0});
  for (int slot = 0; slot < 6; ++slot) {
    const double expected = 50.0 * std::ldexp(1.0, slot - 5) / sum;
    EXPECT_NEAR(all[at(slot)], expected, 1e-5);
    EXPECT_NEAR(edges[at(slot)], slot == 5 ? 0.0 : expected, 1e-5);
  }
}

// -- populations that walk beside populations that are solved

/// Three populations, of which those of `exact` (bits) are solved. `decay` of the last one.
WalkConfig mixed_walk(unsigned exact, double decay = 0.0) {
  WalkConfig walk{
      .num_walkers = 301,
      .restart_prob = 0.3,
      .populations = {{.share = 0.4, .recent_tokens = 20},
                      {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.35},
                      {.restart = Restart::current, .share = 0.25, .decay = decay}}};
  for (std::size_t p = 0; p < walk.populations.size(); ++p) {
    if ((exact >> p & 1U) != 0) walk.populations[p].solver = Solver::exact;
  }
  return walk;
}

/// A manager with two sequences whose slots are not in order, and the keys of its novelty.
struct Mixed {
  GraphManager manager;
  Feeder feeder;

  Mixed(const GraphConfig& config, const WalkConfig& walk)
      : manager(config, walk), feeder(manager, 0, 8) {
    feeder.prefill(60);
    const std::vector<Index> stay = random_part(feeder.random, live_slots(plain_graph(60)), 45);
    manager.release(0, keep_tensor(std::vector(2, std::vector(2, stay))).view(), Stream{});
    for (int i = 0; i < 8; ++i) feeder.reuse();
    manager.update_novelty(0, feeder.keys.view(), Stream{});
  }

  Bytes found(int population) const {
    Bytes bytes = read_scores(manager, 0, population).bytes();
    const Bytes visits = read_visits(manager, 0, population).bytes();
    bytes.insert(bytes.end(), visits.begin(), visits.end());
    return bytes;
  }
};

void expect_mix(const GraphConfig& config, double decay, unsigned exact) {
  SCOPED_TRACE(::testing::Message()
               << "law " << static_cast<int>(config.edge_law) << ", scope "
               << static_cast<int>(config.scope) << ", decay " << decay << ", exact " << exact);
  Mixed walked(config, mixed_walk(0, decay));
  Mixed solved(config, mixed_walk(0, decay));
  Mixed mixed(config, mixed_walk(exact, decay));
  for (const std::vector<std::uint8_t>& marks : {std::vector<std::uint8_t>{}, {1, 0}, {}, {0, 1}}) {
    walked.manager.walk(0, marks, Stream{});
    solved.manager.solve(0, marks, Stream{});
    mixed.manager.walk(0, marks, Stream{});
    for (int p = 0; p < 3; ++p) {
      const Mixed& expected = (exact >> p & 1U) != 0 ? solved : walked;
      EXPECT_EQ(mixed.found(p), expected.found(p)) << "population " << p;
    }
    for (Mixed* one : {&walked, &solved, &mixed}) {
      one->feeder.append();
      one->manager.update_novelty(0, one->feeder.keys.view(), Stream{});
    }
  }
  for (Index b = 0; b < 2; ++b) {
    EXPECT_EQ(mixed.manager.tokens_walked(0, b), walked.manager.tokens_walked(0, b));
  }
  const Statistics counts = mixed.manager.statistics();
  EXPECT_EQ(counts.walks, exact == 7 ? 0 : walked.manager.statistics().walks);
  EXPECT_EQ(counts.solves, exact == 0 ? 0 : solved.manager.statistics().solves);
}

GraphConfig mixed_graph(EdgeLaw law, GraphScope scope) {
  GraphConfig config = graph_config(law, 2);
  config.batch_size = 2;
  config.scope = scope;
  config.seed = 11;
  return config;
}

TEST(PprMix, FindsWhatWalksAndSolvesFindAlone) {
  for (const EdgeLaw law : kEdgeLaws) {
    for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
      for (const double decay : {0.0, 0.5}) {
        for (unsigned exact = 0; exact < 8; ++exact) {
          expect_mix(mixed_graph(law, scope), decay, exact);
        }
      }
    }
  }
}

TEST(PprMix, HasTheSameNumbersInEveryLayer) {
  // Short: sanitizers see this test.
  GraphConfig config = mixed_graph(EdgeLaw::weighted, GraphScope::head);
  config.num_layers = 2;
  const auto run = [&](bool together) {
    GraphManager manager(config, mixed_walk(2, 0.5));
    for (Index layer = 0; layer < 2; ++layer) {
      Feeder feeder(manager, layer, 9);
      feeder.prefill(30);
      manager.update_novelty(layer, feeder.keys.view(), Stream{});
      if (!together) manager.walk(layer, {}, Stream{});
    }
    if (together) manager.walk(kAllLayers, {}, Stream{});
    return Snapshot(manager);
  };
  const Snapshot one_by_one = run(false);
  EXPECT_TRUE(one_by_one == run(true));
}

TEST(PprMix, OfExactPopulationsIsASolve) {
  for (const EdgeLaw law : kEdgeLaws) {
    const GraphConfig config = mixed_graph(law, GraphScope::head);
    Mixed expected(config, mixed_walk(7, 0.5));
    Mixed actual(config, mixed_walk(7, 0.5));
    for (int round = 0; round < 2; ++round) {
      expected.manager.solve(0, {}, Stream{});
      actual.manager.walk(0, {}, Stream{});
    }
    EXPECT_TRUE(Snapshot(expected.manager) == Snapshot(actual.manager));
    // The random numbers stand where they stood, too.
    EXPECT_EQ(expected.manager.save_layer(0), actual.manager.save_layer(0));
  }
}

TEST(PprMix, IsRenewedByAStep) {
  const GraphConfig config = mixed_graph(EdgeLaw::weighted, GraphScope::head);
  Mixed expected(config, mixed_walk(2));
  Mixed actual(config, mixed_walk(2));
  expected.feeder.append();
  expected.manager.update_novelty(0, expected.feeder.keys.view(), Stream{});
  expected.manager.walk(0, {}, Stream{});
  const Index slot = actual.manager.length(0);
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 2; ++h) actual.feeder.write_key(b, h, slot);
  }
  actual.manager.update_and_step(0, actual.feeder.query().view(), actual.feeder.keys.view(), {}, {},
                                 Stream{});
  EXPECT_TRUE(Snapshot(expected.manager) == Snapshot(actual.manager));
}

}  // namespace
}  // namespace spectralkv::test
