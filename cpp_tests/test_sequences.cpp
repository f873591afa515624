#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
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

GraphConfig graph_config(Index batch = 2, Index layers = 1) {
  return {.num_layers = layers,
          .batch_size = batch,
          .num_query_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 8,
          .capacity = 64,
          .seed = 9,
          .num_threads = 1};
}

const WalkConfig kWalk{.num_walkers = 128,
                       .decay = 0.5,
                       .populations = {{.count = VisitCount::all, .recent_tokens = 20}}};

std::vector<Index> identity(Index count) {
  std::vector<Index> slots(at(count));
  std::iota(slots.begin(), slots.end(), 0);
  return slots;
}

HostTensor keep_all_heads(const GraphManager& manager, const std::vector<Index>& slots) {
  return keep_tensor(std::vector(at(manager.batch_size(0)),
                                 std::vector(at(manager.graph_config().num_kv_heads), slots)));
}

// -- truncate

TEST(Truncate, ForgetsTheNewest) {
  GraphManager once(graph_config(), kWalk);
  Feeder feeder(once, 0, 1);
  feeder.prefill(40);
  const Graphs before = read_graphs(once, 0);
  for (const Index count : {0, 1, 7, 32}) {
    const Index length = once.length(0) - count;
    once.truncate(0, count);
    ASSERT_EQ(once.length(0), length);
    const Graphs after = read_graphs(once, 0);
    for (Index b = 0; b < 2; ++b) {
      EXPECT_EQ(once.tokens_seen(0, b), length);
      EXPECT_EQ(once.tokens_held(0, b), length);
      for (Index h = 0; h < 2; ++h) {
        Graph expected = before[at(b)][at(h)];
        expected.positions.resize(at(length));
        expected.rows.resize(at(length));
        EXPECT_EQ(expected, after[at(b)][at(h)]);
      }
    }
  }
  EXPECT_EQ(once.length(0), 0);
  feeder.prefill(3);
  EXPECT_EQ(once.tokens_seen(0, 0), 3);
}

TEST(Truncate, TakesBackADraft) {
  // Drafts that are refused leave nothing behind.
  GraphManager plain(graph_config(), kWalk);
  GraphManager drafting(graph_config(), kWalk);
  Feeder plain_feeder(plain, 0, 2);
  Feeder feeder(drafting, 0, 2);
  plain_feeder.prefill(30);
  feeder.prefill(30);
  for (int round = 0; round < 5; ++round) {
    const Random saved = feeder.random;
    feeder.prefill(4);
    drafting.truncate(0, 4);
    feeder.random = saved;
    feeder.append();
    plain_feeder.append();
  }
  plain.walk(0, {}, Stream{});
  drafting.walk(0, {}, Stream{});
  EXPECT_EQ(read_positions(plain, 0).bytes(), read_positions(drafting, 0).bytes());
  EXPECT_EQ(read_graphs(plain, 0), read_graphs(drafting, 0));
  EXPECT_EQ(read_scores(plain, 0, 0).bytes(), read_scores(drafting, 0, 0).bytes());
}

TEST(Truncate, ClearsTheScoresOfItsSlots) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 4);
  feeder.prefill(30);
  manager.walk(0, {}, Stream{});
  manager.truncate(0, 5);
  for (int i = 0; i < 5; ++i) feeder.append();
  for (Index slot = 25; slot < 30; ++slot) {
    EXPECT_EQ(read_scores(manager, 0, -1).get({1, 1, slot}), 0.0);
    EXPECT_EQ(read_visits(manager, 0, 0).get({1, 1, slot}), 0.0);
  }
}

TEST(Truncate, KnowsWhichWalksItUndid) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 5);
  feeder.prefill(20);
  EXPECT_EQ(manager.tokens_walked(0, 0), -1);
  manager.walk(0, std::vector<std::uint8_t>{1, 0}, Stream{});
  feeder.prefill(5);
  manager.walk(0, std::vector<std::uint8_t>{0, 1}, Stream{});
  EXPECT_EQ(manager.tokens_walked(0, 0), 20);
  EXPECT_EQ(manager.tokens_walked(0, 1), 25);
  manager.truncate(0, 3);
  EXPECT_EQ(manager.tokens_walked(0, 0), 20);
  EXPECT_EQ(manager.tokens_walked(0, 1), -1);
}

TEST(Truncate, HoldsForPaddedSequences) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 6);
  HostTensor valid(DType::u8, {2, 20});
  valid.for_each([&](const std::vector<Index>& index) {
    valid.set(index, index[0] == 0 || index[1] >= 12 ? 1.0 : 0.0);
  });
  feeder.prefill(20, valid.view());
  manager.truncate(0, 3);
  EXPECT_EQ(manager.tokens_seen(0, 0), 17);
  EXPECT_EQ(manager.tokens_seen(0, 1), 5);
  manager.truncate(0, 10);  // into the padding: all of sequence 1 goes
  EXPECT_EQ(manager.length(0), 7);
  EXPECT_EQ(manager.tokens_seen(0, 0), 7);
  EXPECT_EQ(manager.tokens_seen(0, 1), 0);
}

TEST(Truncate, HoldsAfterCompaction) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 7);
  feeder.prefill(30);
  // Tokens 25 to 29 are there, 24 is not.
  const HostTensor keep = keep_all_heads(manager, {0, 1, 2, 20, 22, 25, 26, 27, 28, 29});
  manager.compact(0, keep.view(), feeder.keys.view(), {}, Stream{});
  for (const Index count : {6, 7, 10}) {
    expect_rejected(manager, "truncate", [&] { manager.truncate(0, count); });
  }
  manager.truncate(0, 5);
  EXPECT_EQ(manager.length(0), 5);
  EXPECT_EQ(manager.tokens_seen(0, 1), 25);
  EXPECT_EQ(manager.tokens_held(0, 1), 5);
  expect_rejected(manager, "truncate", [&] { manager.truncate(0, 1); });
  feeder.append();
  EXPECT_EQ(read_positions(manager, 0).get({1, 1, 5}), 25.0);
}

TEST(Truncate, GoesByPositionWhereSlotsAreReused) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 8);
  feeder.prefill(20);
  std::vector<Index> kept = identity(20);
  kept.erase(kept.begin() + 5, kept.begin() + 9);
  manager.release(0, keep_all_heads(manager, kept).view(), Stream{});
  const Graphs before = read_graphs(manager, 0);
  for (int i = 0; i < 6; ++i) feeder.reuse();  // slots 5, 6, 7, 8, 20, 21
  EXPECT_EQ(manager.length(0), 22);
  manager.truncate(0, 5);
  const Graphs after = read_graphs(manager, 0);
  for (Index b = 0; b < 2; ++b) {
    EXPECT_EQ(manager.tokens_seen(0, b), 21);
    EXPECT_EQ(manager.tokens_held(0, b), 17);
    for (Index h = 0; h < 2; ++h) {
      const Graph& graph = after[at(b)][at(h)];
      EXPECT_EQ(graph.positions[5], 20);
      for (const Index slot : {6, 7, 8}) EXPECT_EQ(graph.positions[at(slot)], -1);
      for (const Index slot : kept) {
        expect_same_row(before[at(b)][at(h)].rows[at(slot)], graph.rows[at(slot)], 1e-6);
      }
      expect_sound(graph, 4);
    }
  }
  EXPECT_EQ(feeder.reuse().get({1, 1}), 6.0);
  EXPECT_EQ(read_positions(manager, 0).get({1, 1, 6}), 21.0);
  // Tokens 12 to 21 are there, but token 8 was released.
  expect_rejected(manager, "truncate", [&] { manager.truncate(0, 14); });
  manager.truncate(0, 13);
  EXPECT_EQ(manager.tokens_seen(0, 0), 9);
  EXPECT_EQ(manager.tokens_held(0, 0), 5);
}

TEST(Truncate, GoesByPositionWherePaddingIsReused) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 24);
  HostTensor valid(DType::u8, {2, 20});
  valid.for_each([&](const std::vector<Index>& index) {
    valid.set(index, index[0] == 0 || index[1] >= 12 ? 1.0 : 0.0);
  });
  feeder.prefill(20, valid.view());
  for (int i = 0; i < 3; ++i) feeder.reuse();  // slots 20 to 22, and 0 to 2
  manager.truncate(0, 2);
  EXPECT_EQ(manager.tokens_seen(0, 0), 21);
  EXPECT_EQ(manager.tokens_seen(0, 1), 9);
  const HostTensor positions = read_positions(manager, 0);
  EXPECT_EQ(positions.get({0, 0, 20}), 20.0);
  EXPECT_EQ(positions.get({1, 0, 0}), 8.0);
  EXPECT_EQ(positions.get({1, 0, 1}), -1.0);
  EXPECT_EQ(positions.get({1, 0, 19}), 7.0);
}

TEST(Truncate, HoldsForAllLayersOrNone) {
  GraphManager manager(graph_config(2, 3), kWalk);
  for (Index layer = 0; layer < 3; ++layer) Feeder(manager, layer, 9).prefill(10 + layer);
  expect_rejected(manager, "truncate", [&] { manager.truncate(kAllLayers, 11); });
  manager.truncate(kAllLayers, 10);
  EXPECT_EQ(manager.length(0), 0);
  EXPECT_EQ(manager.length(2), 2);
}

// -- select_batch

/// Everything of one sequence of a layer.
struct SequenceState {
  Index seen, held, walked;
  std::vector<Graph> graphs;
  std::vector<Vector> tables;

  SequenceState(const GraphManager& manager, Index b)
      : seen(manager.tokens_seen(0, b)),
        held(manager.tokens_held(0, b)),
        walked(manager.tokens_walked(0, b)),
        graphs(read_graphs(manager, 0)[at(b)]) {
    for (Index h = 0; h < 2; ++h) {
      tables.push_back(read_scores(manager, 0, 0).vector({b, h}));
      tables.push_back(read_visits(manager, 0, 0).vector({b, h}));
    }
  }
  friend bool operator==(const SequenceState&, const SequenceState&) = default;
};

TEST(SelectBatch, CopiesSequences) {
  GraphManager manager(graph_config(3), kWalk);
  Feeder feeder(manager, 0, 10);
  HostTensor valid(DType::u8, {3, 30});
  valid.for_each([&](const std::vector<Index>& index) {
    valid.set(index, index[1] >= 5 * index[0] ? 1.0 : 0.0);
  });
  feeder.prefill(30, valid.view());
  manager.walk(0, {}, Stream{});
  manager.walk(0, std::vector<std::uint8_t>{0, 1, 0}, Stream{});
  const std::vector<SequenceState> before{{manager, 0}, {manager, 1}, {manager, 2}};
  // a permutation, beams that share a parent, growth, an early end
  for (const std::vector<Index>& sequences :
       {std::vector<Index>{2, 0, 1}, {1, 1, 0}, {0, 0, 1, 1, 2, 2, 0}, {2}}) {
    GraphManager copy(graph_config(3), kWalk);
    Feeder(copy, 0, 10).prefill(30, valid.view());
    copy.walk(0, {}, Stream{});
    copy.walk(0, std::vector<std::uint8_t>{0, 1, 0}, Stream{});
    copy.select_batch(0, sequences);
    ASSERT_EQ(copy.batch_size(0), count_of(sequences));
    EXPECT_EQ(copy.length(0), 30);
    EXPECT_EQ(copy.capacity(0), 64);
    EXPECT_EQ(copy.graph_config().batch_size, 3);
    for (Index b = 0; b < count_of(sequences); ++b) {
      EXPECT_TRUE(before[at(sequences[at(b)])] == SequenceState(copy, b)) << b;
    }
    // Copies go on alike, and in the stream of random numbers of what they were copied from.
    copy.walk(0, {}, Stream{});
    GraphManager other(graph_config(3), kWalk);
    Feeder(other, 0, 10).prefill(30, valid.view());
    other.walk(0, {}, Stream{});
    other.walk(0, std::vector<std::uint8_t>{0, 1, 0}, Stream{});
    other.walk(0, {}, Stream{});
    for (Index b = 0; b < count_of(sequences); ++b) {
      EXPECT_TRUE(SequenceState(other, sequences[at(b)]) == SequenceState(copy, b)) << b;
    }
    // And it goes on with the new batch.
    Feeder more(copy, 0, 11);
    more.append();
    copy.walk(0, {}, Stream{});
    EXPECT_EQ(copy.tokens_seen(0, 0), before[at(sequences[0])].seen + 1);
  }
}

TEST(SelectBatch, SelectsInAllLayers) {
  GraphManager manager(graph_config(2, 2), kWalk);
  for (Index layer = 0; layer < 2; ++layer) Feeder(manager, layer, 12).prefill(10);
  manager.select_batch(kAllLayers, std::vector<Index>{1, 0, 1});
  EXPECT_EQ(manager.batch_size(0), 3);
  EXPECT_EQ(manager.batch_size(1), 3);
  manager.select_batch(1, std::vector<Index>{2});
  EXPECT_EQ(manager.batch_size(0), 3);
  EXPECT_EQ(manager.batch_size(1), 1);
}

TEST(SelectBatch, KeepsNoveltyWeights) {
  GraphManager manager(graph_config(2), WalkConfig{});
  Feeder feeder(manager, 0, 13);
  feeder.prefill(20);
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  const Vector second = read_restart(manager, 0, 1).vector({1, 1});
  manager.select_batch(0, std::vector<Index>{1});
  EXPECT_EQ(read_restart(manager, 0, 1).vector({0, 1}), second);
  manager.walk(0, {}, Stream{});
}

// -- reset

TEST(Reset, ForgetsEverything) {
  GraphManager manager(graph_config(2, 2), kWalk);
  for (Index layer = 0; layer < 2; ++layer) Feeder(manager, layer, 14).prefill(30);
  manager.walk(kAllLayers, {}, Stream{});
  manager.reset(0);
  EXPECT_EQ(manager.length(0), 0);
  EXPECT_EQ(manager.length(1), 30);
  EXPECT_EQ(manager.tokens_seen(0, 1), 0);
  EXPECT_EQ(manager.tokens_held(0, 1), 0);
  EXPECT_EQ(manager.tokens_walked(0, 1), -1);
  EXPECT_EQ(manager.capacity(0), 64);
  Feeder feeder(manager, 0, 15);
  feeder.prefill(10);
  EXPECT_EQ(read_positions(manager, 0).vector({0, 0}), Vector({0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(read_scores(manager, 0, -1).vector({0, 0}), Vector(10, 0.0));
  EXPECT_EQ(read_visits(manager, 0, 0).vector({0, 0}), Vector(10, 0.0));
  manager.reset(kAllLayers);
  EXPECT_EQ(manager.length(0), 0);
  EXPECT_EQ(manager.length(1), 0);
}

TEST(Reset, ForgetsNoveltyWeights) {
  GraphManager manager(graph_config(), WalkConfig{});
  Feeder feeder(manager, 0, 16);
  feeder.prefill(10);
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  manager.reset(0);
  feeder.prefill(10);
  expect_rejected(manager, "walk", [&] { manager.walk(0, {}, Stream{}); });
}

TEST(Reset, EmptiesOneSequence) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 17);
  feeder.prefill(20);
  manager.walk(0, {}, Stream{});
  const SequenceState other(manager, 1);
  manager.reset(0, 0);
  EXPECT_EQ(manager.length(0), 20);
  EXPECT_EQ(manager.tokens_seen(0, 0), 0);
  EXPECT_EQ(manager.tokens_held(0, 0), 0);
  EXPECT_TRUE(other == SequenceState(manager, 1));
  const Graphs emptied = read_graphs(manager, 0);
  EXPECT_EQ(emptied[0][0].held(), 0);
  EXPECT_EQ(read_scores(manager, 0, -1).vector({0, 0}), Vector(20, 0.0));
  // Its slots are free: the next sequence moves in, the other one goes on behind.
  for (Index position = 0; position < 3; ++position) {
    const HostTensor slots = feeder.reuse();
    EXPECT_EQ(slots.get({0, 1}), static_cast<double>(position));
    EXPECT_EQ(slots.get({1, 1}), static_cast<double>(20 + position));
  }
  EXPECT_EQ(manager.length(0), 23);
  EXPECT_EQ(manager.tokens_seen(0, 0), 3);
  EXPECT_EQ(manager.tokens_seen(0, 1), 23);
  for (const auto& sequence : read_graphs(manager, 0)) {
    for (const Graph& graph : sequence) expect_sound(graph, 4);
  }
  manager.reset(0, 0);
  manager.reset(0, 1);
  EXPECT_EQ(manager.length(0), 0);
}

// -- reserve, memory and the rest

TEST(Reserve, KeepsWhatIsThere) {
  GraphManager manager(graph_config(), WalkConfig{});
  Feeder feeder(manager, 0, 18);
  feeder.prefill(30);
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  manager.walk(0, {}, Stream{});
  const Snapshot before(manager);
  const HostTensor restart = read_restart(manager, 0, 1);
  const Index bytes = manager.memory_use().graph_bytes;
  EXPECT_GT(bytes, 0);
  for (const Index capacity : {1000, 30, 64}) {
    manager.reserve(0, capacity);
    EXPECT_EQ(manager.capacity(0), capacity);
    const Index now = manager.memory_use().graph_bytes;
    EXPECT_EQ(now > bytes, capacity > 64) << capacity;
    EXPECT_EQ(now < bytes, capacity < 64) << capacity;
    EXPECT_EQ(read_restart(manager, 0, 1).bytes(), restart.bytes());
  }
  EXPECT_TRUE(before == Snapshot(manager));
}

TEST(Reserve, GrowsFromNothing) {
  GraphConfig config = graph_config(2, 2);
  config.capacity = 0;
  GraphManager manager(config, kWalk);
  EXPECT_EQ(manager.length(0), 0);
  manager.walk(kAllLayers, {}, Stream{});
  manager.reserve(kAllLayers, 8);
  HostTensor keys(DType::f16, {2, 2, 8, 8});
  HostTensor queries(DType::f16, {2, 4, 8, 8});
  manager.update_rows(1, queries.view(), keys.view(), {}, Stream{});
  EXPECT_EQ(manager.length(1), 8);
  EXPECT_EQ(manager.capacity(0), 8);
  expect_rejected(manager, "reserve", [&] { manager.reserve(1, 7); });
  expect_rejected(manager, "reserve", [&] { manager.reserve(kAllLayers, 7); });
  manager.reserve(0, 0);
  EXPECT_EQ(manager.capacity(0), 0);
}

TEST(Reserve, ForgetsWhatLiesBehindTheLength) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 19);
  feeder.prefill(30);
  manager.walk(0, {}, Stream{});
  manager.truncate(0, 10);
  manager.reserve(0, 64 + 32);
  manager.reserve(0, 64);
  for (int i = 0; i < 10; ++i) feeder.append();
  for (Index slot = 20; slot < 30; ++slot) {
    EXPECT_EQ(read_scores(manager, 0, -1).get({0, 0, slot}), 0.0);
  }
}

TEST(Manager, CanBeMoved) {
  GraphManager first(graph_config(), kWalk);
  Feeder(first, 0, 20).prefill(20);
  const Snapshot before(first);
  GraphManager second = std::move(first);
  EXPECT_TRUE(before == Snapshot(second));
  GraphManager third(graph_config(1, 3), kWalk);
  third = std::move(second);
  EXPECT_TRUE(before == Snapshot(third));
  third.walk(0, {}, Stream{});
  third.synchronize();
  EXPECT_EQ(third.statistics().walks, 4);
}

TEST(Manager, KnowsItsConfiguration) {
  const GraphManager manager(graph_config(3, 2), kWalk);
  EXPECT_EQ(manager.graph_config().num_layers, 2);
  EXPECT_EQ(manager.graph_config().seed, 9U);
  EXPECT_EQ(manager.walk_config().num_walkers, 128);
  EXPECT_EQ(manager.batch_size(1), 3);
  EXPECT_EQ(manager.capacity(1), 64);
  EXPECT_EQ(manager.length(1), 0);
  EXPECT_EQ(manager.graphs_per_sequence(), 2);
  EXPECT_EQ(manager.tokens_seen(1, 2), 0);
}

TEST(LoadRows, ReplacesALayer) {
  GraphManager manager(graph_config(1, 2), kWalk);
  Feeder(manager, 0, 21).prefill(40);
  Feeder(manager, 1, 22).prefill(40);
  manager.walk(kAllLayers, {}, Stream{});
  const Graphs other = read_graphs(manager, 1);
  Random random(23);
  for (const EdgeLaw law : {EdgeLaw::weighted, EdgeLaw::uniform, EdgeLaw::attention}) {
    for (const Index slots : {0, 1, 50, 64}) {
      Graphs graphs(1);
      for (int g = 0; g < 2; ++g) {
        graphs[0].push_back(
            slots == 0 ? Graph{}
                       : random_graph(
                             random,
                             {.slots = slots, .tokens = std::max<Index>(1, slots - 9), .seen = 100},
                             8, law));
      }
      GraphConfig config = graph_config(1, 2);
      config.edge_law = law;
      if (law != EdgeLaw::weighted) manager = GraphManager(config, kWalk);
      load_graphs(manager, 0, graphs);
      EXPECT_EQ(manager.length(0), slots);
      EXPECT_EQ(manager.tokens_seen(0, 0), slots == 0 ? 0 : 100);
      EXPECT_EQ(manager.tokens_held(0, 0), slots == 0 ? 0 : std::max<Index>(1, slots - 9));
      const Graphs read = read_graphs(manager, 0);
      for (std::size_t g = 0; g < 2; ++g) {
        expect_same_graph(graphs[0][g], read[0][g], 1e-6 + packing_error(config));
      }
      EXPECT_EQ(read_scores(manager, 0, 0).vector({0, 1}), Vector(at(slots), 0.0));
      if (law == EdgeLaw::weighted) {
        EXPECT_EQ(other, read_graphs(manager, 1));
      }
    }
  }
}

TEST(LoadRows, TakesRowsThatLeaveSomethingOver) {
  Graph graph = plain_graph(8);
  const auto loads = [&](EdgeLaw law, std::vector<double> probabilities, bool pack = true) {
    GraphConfig config = graph_config(1, 1);
    config.num_query_heads = config.num_kv_heads = 1;
    config.edge_law = law;
    config.pack_rows = pack;
    GraphManager manager(config, kWalk);
    graph.rows.back().clear();
    for (const double probability : probabilities) {
      graph.rows.back().push_back({4 + count_of(graph.rows.back()), probability});
    }
    try {
      load_graphs(manager, 0, {{graph}});
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    expect_same_graph(graph, read_graphs(manager, 0)[0][0], 1e-7 + packing_error(config));
    return std::string();
  };
  for (const std::vector<double>& row :
       {std::vector<double>{0.5, 0.25}, {1e-6}, {0.3, 0.3, 0.4}, {1.0}, {}}) {
    for (const bool pack : {true, false}) EXPECT_EQ(loads(EdgeLaw::attention, row, pack), "");
  }
  EXPECT_NE(loads(EdgeLaw::attention, {0.7, 0.4}).find("must be in [0, 1], got 1.1"),
            std::string::npos);
  EXPECT_NE(loads(EdgeLaw::weighted, {0.5, 0.25}).find("must be 1 or 0, got 0.75"),
            std::string::npos);
}

}  // namespace
}  // namespace spectralkv::test
