// Packed rows beside wide ones: what they take, how far they follow the law of the rows they came
// from, and rows that change from one to the other with the size of a graph.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "device.h"
#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

constexpr GraphShape kShape{.slots = 64, .tokens = 50, .seen = 90};
constexpr Index kMost = 65'535;  // slots that packed rows can tell apart
constexpr Index kMany = 70'000;

GraphConfig graph_config(EdgeLaw law, bool pack = true, Index capacity = 64) {
  return {.num_query_heads = 2,
          .num_kv_heads = 2,
          .head_dim = 8,
          .capacity = capacity,
          .edge_law = law,
          .pack_rows = pack,
          .seed = 5,
          .num_threads = 1};
}

/// One population that counts every arrival.
WalkConfig walk_config(double restart_prob = 0.2) {
  return {.num_walkers = 512,
          .restart_prob = restart_prob,
          .populations = {{.count = VisitCount::all, .recent_tokens = 30}}};
}

Graphs two_graphs(std::uint64_t seed, EdgeLaw law, int top_k = 8,
                  const GraphShape& shape = kShape) {
  Random random(seed);
  Graphs graphs(1);
  for (int g = 0; g < 2; ++g) graphs[0].push_back(random_graph(random, shape, top_k, law));
  return graphs;
}

void expect_same_graphs(const Graphs& expected, const Graphs& actual, double tolerance) {
  ASSERT_EQ(expected.size(), actual.size());
  for (std::size_t b = 0; b < expected.size(); ++b) {
    ASSERT_EQ(expected[b].size(), actual[b].size());
    for (std::size_t g = 0; g < expected[b].size(); ++g) {
      SCOPED_TRACE(::testing::Message() << "sequence " << b << ", graph " << g);
      expect_same_graph(expected[b][g], actual[b][g], tolerance);
    }
  }
}

constexpr std::array kLawsWithThresholds{EdgeLaw::weighted, EdgeLaw::attention};

// -- memory

Index bytes_of(EdgeLaw law, int top_k, bool pack, Index capacity) {
  GraphConfig config = graph_config(law, pack, capacity);
  config.top_k = top_k;
  return GraphManager(config, walk_config()).memory_use().graph_bytes;
}

TEST(RowFormat, HalvesTheMemoryOfRows) {
  // Arrays on CUDA start at round addresses.
  const bool on_cpu = on_tested_device({}).device.type == DeviceType::cpu;
  const Index slack = on_cpu ? 0 : 1 << 14;
  const auto expect_saved = [&](EdgeLaw law, int top_k, Index capacity, Index bytes_a_slot) {
    const Index saved =
        bytes_of(law, top_k, false, capacity) - bytes_of(law, top_k, true, capacity);
    EXPECT_LE(std::abs(saved - bytes_a_slot * 2 * capacity), slack) << saved;
  };
  for (const int top_k : {4, 8, 16, 32}) {
    for (const EdgeLaw law : kEdgeLaws) {
      SCOPED_TRACE(::testing::Message() << "top_k " << top_k << ", law " << static_cast<int>(law));
      expect_saved(law, top_k, 3000, law == EdgeLaw::uniform ? 0 : 4 * top_k);
    }
  }
  expect_saved(EdgeLaw::weighted, 4, kMost, 4 * 4);
  expect_saved(EdgeLaw::weighted, 4, kMost + 1, 0);
}

// -- the law

double total_variation(const Vector& a, const Vector& b) {
  double sum = 0.0;
  for (std::size_t v = 0; v < a.size(); ++v) sum += std::abs(a[v] - b[v]);
  return sum / 2.0;
}

TEST(RowFormat, ChangesPageRankByItsRoundingOnly) {
  // A walker beside another one that draws the same numbers parts from it where a number lies
  // between a threshold and what it was rounded to: of top_k thresholds each moves by half a unit.
  // They meet again at the next restart.
  constexpr double kRestart = 0.15;
  for (const EdgeLaw law : kLawsWithThresholds) {
    for (const int top_k : {4, 8, 16, 32}) {
      SCOPED_TRACE(::testing::Message() << "top_k " << top_k << ", law " << static_cast<int>(law));
      const double bound = kPackedTolerance / 2.0 * top_k * (1.0 - kRestart) / kRestart;
      const Graphs graphs = two_graphs(at(top_k), law, top_k);
      std::vector<Vector> found;
      Vector expected;
      for (const bool pack : {true, false}) {
        GraphConfig config = graph_config(law, pack);
        config.top_k = top_k;
        GraphManager manager(config, walk_config(kRestart));
        load_graphs(manager, 0, graphs);
        manager.solve(0, {}, Stream{});
        found.push_back(normalized(read_scores(manager, 0, 0).vector({0, 1})));
        expected = stationary_visits(
            graphs[0][1], restart_recent(graphs[0][1], manager.walk_config().populations[0], 4),
            kRestart, VisitCount::all);
      }
      EXPECT_LT(total_variation(found[0], expected), bound);
      EXPECT_LT(total_variation(found[1], expected), 1e-6);
      EXPECT_GT(total_variation(found[0], found[1]), 1e-7);  // it was packed
    }
  }
}

// -- from one format to the other

TEST(RowFormat, LosesNothingWhereAGraphOutgrowsIt) {
  for (const EdgeLaw law : kLawsWithThresholds) {
    GraphManager manager(graph_config(law), walk_config());
    GraphManager twin(graph_config(law), walk_config());
    for (GraphManager* one : {&manager, &twin}) load_graphs(*one, 0, two_graphs(1, law));
    const Graphs before = read_graphs(manager, 0);
    manager.reserve(0, kMany);
    EXPECT_EQ(read_graphs(manager, 0), before);
    for (int round = 0; round < 2; ++round) {
      manager.walk(0, {}, Stream{});
      twin.walk(0, {}, Stream{});
      EXPECT_EQ(read_visits(manager, 0, 0).bytes(), read_visits(twin, 0, 0).bytes());
      manager.reserve(0, 64);  // what was packed once is packed again without a loss
      EXPECT_EQ(read_graphs(manager, 0), before);
    }
  }
}

TEST(RowFormat, RoundsOnceWhereAGraphShrinks) {
  for (const EdgeLaw law : kLawsWithThresholds) {
    GraphManager manager(graph_config(law, true, kMany), walk_config());
    const Graphs graphs = two_graphs(2, law);
    load_graphs(manager, 0, graphs);
    expect_same_graphs(graphs, read_graphs(manager, 0), 1e-6);
    manager.reserve(0, 1'000);
    const Graphs packed = read_graphs(manager, 0);
    expect_same_graphs(graphs, packed, 1e-6 + kPackedTolerance);
    EXPECT_NE(packed, graphs);
    manager.reserve(0, kMany);
    EXPECT_EQ(read_graphs(manager, 0), packed);
    manager.reserve(0, 1'000);
    EXPECT_EQ(read_graphs(manager, 0), packed);
  }
}

TEST(RowFormat, TellsItsHighestSlotFromNone) {
  GraphConfig config = graph_config(EdgeLaw::weighted, true, kMost);
  config.num_query_heads = config.num_kv_heads = 1;
  config.top_k = 4;
  config.num_sinks = 0;
  Graph graph = plain_graph(kMost);
  std::reverse(graph.positions.begin(), graph.positions.end());
  graph.rows[0] = {{kMost - 1, 0.75}, {kMost - 2, 0.25}};
  GraphManager manager(config,
                       {.num_walkers = 1000,
                        .restart_prob = 0.5,
                        .populations = {{.restart = Restart::current, .count = VisitCount::all}}});
  load_graphs(manager, 0, {{graph}});
  const auto expect_edges = [&] {
    HostTensor neighbors(DType::i32, {1, 1, kMost, 4});
    HostTensor probabilities(DType::f32, {1, 1, kMost, 4});
    manager.rows(0, neighbors.view(), probabilities.view(), Stream{});
    EXPECT_EQ(neighbors.vector({0, 0, 0}), (Vector{kMost - 1, kMost - 2, -1, -1}));
    EXPECT_NEAR(probabilities.get({0, 0, 0, 0}), 0.75, kPackedTolerance);
    manager.walk(0, {}, Stream{});
    EXPECT_GT(read_visits(manager, 0, 0).get({0, 0, kMost - 1}), 1000.0);
  };
  expect_edges();
  manager.reserve(0, kMost + 1);
  expect_edges();
  manager.reserve(0, kMost);
  expect_edges();
}

TEST(RowFormat, IsNotThatOfTheManagerThatSaved) {
  for (const EdgeLaw law : kLawsWithThresholds) {
    for (const bool pack : {true, false}) {
      SCOPED_TRACE(::testing::Message() << "packed when saved " << pack);
      GraphManager saving(graph_config(law, pack), walk_config());
      load_graphs(saving, 0, two_graphs(3, law));
      saving.walk(0, {}, Stream{});
      GraphManager loading(graph_config(law, !pack), walk_config());
      loading.load_layer(0, saving.save_layer(0));
      const Graphs rows = read_graphs(saving, 0);
      expect_same_graphs(rows, read_graphs(loading, 0), pack ? 0.0 : 1e-6 + kPackedTolerance);
      EXPECT_EQ(read_scores(saving, 0, 0).bytes(), read_scores(loading, 0, 0).bytes());
      // Wide rows that were packed mean the same numbers, and packing them again changes nothing.
      if (!pack) continue;
      for (GraphManager* one : {&saving, &loading}) one->walk(0, {}, Stream{});
      EXPECT_EQ(read_visits(saving, 0, 0).bytes(), read_visits(loading, 0, 0).bytes());
      GraphManager again(graph_config(law, pack), walk_config());
      again.load_layer(0, loading.save_layer(0));
      EXPECT_EQ(again.save_layer(0), saving.save_layer(0));
    }
  }
}

// -- cuts

/// What cuts did to a row.
struct Wear {
  double left = 1.0;  ///< of its probability at first
  int cuts = 0;       ///< that took an edge
};

TEST(RowFormat, DoesNotDriftOverManyCuts) {
  // A row is rounded anew only when a cut takes edges from it: each time a probability, and the sum
  // of those that later cuts leave, move by a unit or so. Later cuts magnify this with what they
  // leave; in these graphs it stays below a unit a cut. Under EdgeLaw::attention nothing is
  // rescaled, and nothing moves.
  for (const EdgeLaw law : kLawsWithThresholds) {
    GraphManager manager(graph_config(law, true, 200), walk_config());
    load_graphs(manager, 0, two_graphs(4, law, 8, {.slots = 150, .tokens = 150, .seen = 150}));
    Random random(4);
    std::vector<Graph> expected = read_graphs(manager, 0)[0];
    std::vector<std::vector<Wear>> wear(2, std::vector<Wear>(150));
    Index worn = 0;
    for (int cut = 0; cut < 20; ++cut) {
      SCOPED_TRACE(::testing::Message() << "law " << static_cast<int>(law) << ", cut " << cut);
      std::vector<std::vector<std::vector<Index>>> keep(1);
      for (std::size_t g = 0; g < 2; ++g) {
        const Graph before = expected[g];
        const std::vector<Index> stay = random_part(random, live_slots(before), before.held() - 4);
        keep[0].push_back(stay);
        expected[g] = compacted(before, stay, law);
        std::vector<Wear> moved;
        for (const Index from : stay) {
          moved.push_back(wear[g][at(from)]);
          double left = 0.0;
          Index lost = 0;
          for (const Edge& edge : before.rows[at(from)]) {
            const bool stays = std::binary_search(stay.begin(), stay.end(), edge.slot);
            left += stays ? edge.probability : 0.0;
            lost += stays ? 0 : 1;
          }
          if (lost == 0) continue;
          moved.back().left *= left;
          ++moved.back().cuts;
        }
        wear[g] = std::move(moved);
      }
      manager.compact(0, keep_tensor(keep).view(), {}, {}, Stream{});
      const std::vector<Graph> actual = read_graphs(manager, 0)[0];
      for (std::size_t g = 0; g < 2; ++g) {
        ASSERT_EQ(expected[g].positions, actual[g].positions);
        for (Index slot = 0; slot < actual[g].length(); ++slot) {
          SCOPED_TRACE(::testing::Message() << "graph " << g << ", slot " << slot);
          const Wear& of_row = wear[g][at(slot)];
          const double magnified =
              kPackedTolerance * std::min(20.0, 2.0 * of_row.cuts / of_row.left);
          expect_same_row(expected[g].rows[at(slot)], actual[g].rows[at(slot)],
                          law == EdgeLaw::attention ? 0.0 : 1e-6 + magnified);
          worn += of_row.cuts > 2 ? 1 : 0;
        }
      }
    }
    EXPECT_GT(worn, 100);
  }
}

// -- graphs that become smaller than the numbers in their rows

/// Twelve tokens of two heads, of which those in slots [6, 11) go, and then the newest. Slot 0 had
/// edges to slot 1 and to slot 10, which held older ones. In memory six slots a graph are followed
/// by those of the next: slot 10 would be the next graph's slot 4, whose token is old enough.
struct Shrinking {
  GraphManager manager;

  Shrinking(EdgeLaw law, bool pack) : manager(config(law, pack), walk_config()) {
    Graph graph = plain_graph(12);
    graph.positions = {5, 3, 6, 7, 0, 1, 2, 8, 9, 10, 4, 11};
    graph.rows[0] = {{10, 0.5}, {1, 0.5}};
    graph.rows[2] = {{0, 1.0}};
    graph.rows[3] = {{2, 0.5}, {6, 0.25}, {10, 0.25}};
    if (law == EdgeLaw::uniform) {
      for (Edge& edge : graph.rows[3]) edge.probability = 1.0 / 3.0;
    }
    load_graphs(manager, 0, Graphs(2, {graph, graph}));
    const std::vector<Index> stay{0, 1, 2, 3, 4, 5, 11};
    manager.release(0, keep_tensor(std::vector(2, std::vector(2, stay))).view(), Stream{});
    manager.truncate(0, 1);
  }

  static GraphConfig config(EdgeLaw law, bool pack) {
    GraphConfig config = graph_config(law, pack, 12);
    config.batch_size = 2;
    config.num_sinks = 0;
    return config;
  }

  /// What is left.
  void expect_live_rows_only() {
    ASSERT_EQ(manager.length(0), 6);
    const EdgeLaw law = manager.graph_config().edge_law;
    const bool renormalised = law != EdgeLaw::attention;
    Graph expected = plain_graph(6);
    expected.positions = {5, 3, 6, 7, 0, 1};
    expected.rows[0] = {{1, renormalised ? 1.0 : 0.5}};
    expected.rows[2] = {{0, 1.0}};
    expected.rows[3] = {{2, renormalised ? 1.0 : 0.5}};
    expect_same_graphs(Graphs(2, {expected, expected}), read_graphs(manager, 0),
                       1e-6 + packing_error(manager.graph_config()));
    if (::testing::Test::HasFailure()) return;  // a solve would write anywhere
    const WalkConfig& walk = manager.walk_config();
    const double visits = static_cast<double>(walk.num_walkers * walk.walk_length);
    const Vector solution =
        stationary_visits(expected, restart_recent(expected, walk.populations[0], 0),
                          walk.restart_prob, VisitCount::all);
    manager.solve(0, {}, Stream{});
    const HostTensor solved = read_scores(manager, 0, 0);
    manager.walk(0, {}, Stream{});
    const HostTensor walked = read_visits(manager, 0, 0);
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 2; ++h) {
        const Vector counts = walked.vector({b, h});
        EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), 0.0), visits);
        EXPECT_LT(total_variation(normalized(solved.vector({b, h})), solution), 1e-4);
        EXPECT_LT(total_variation(normalized(counts), solution), 0.05);
      }
    }
  }
};

TEST(RowFormat, ForgetsEdgesBehindTheCapacity) {
  for (const EdgeLaw law : kEdgeLaws) {
    for (const bool pack : {true, false}) {
      SCOPED_TRACE(::testing::Message() << "law " << static_cast<int>(law) << ", pack " << pack);
      Shrinking even(law, pack);
      even.manager.reserve(0, 6);
      even.expect_live_rows_only();
      // The room of a head may be less than the capacity of its layer.
      Shrinking divided(law, pack);
      divided.manager.divide(0, std::vector<Index>{6, 11});
      divided.expect_live_rows_only();
      // Nor do they come back.
      even.manager.reserve(0, 12);
      even.expect_live_rows_only();
      // A layer that is saved with such edges has room for its tokens, not for those that went.
      Shrinking loaded(law, pack);
      loaded.manager.load_layer(0, Shrinking(law, pack).manager.save_layer(0));
      loaded.expect_live_rows_only();
    }
  }
}

}  // namespace
}  // namespace spectralkv::test
