#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

using Lists = std::vector<std::vector<std::vector<Index>>>;

GraphConfig graph_config(EdgeLaw law = EdgeLaw::weighted) {
  return {.batch_size = 2,
          .num_query_heads = 2,
          .num_kv_heads = 2,
          .head_dim = 8,
          .capacity = 80,
          .edge_law = law,
          .num_threads = 1};
}

Graphs random_graphs(Random& random, const GraphConfig& config, const GraphShape& shape) {
  Graphs graphs(at(config.batch_size));
  const Index per_sequence = config.scope == GraphScope::layer ? 1 : config.num_kv_heads;
  for (auto& sequence : graphs) {
    for (Index g = 0; g < per_sequence; ++g) {
      sequence.push_back(random_graph(random, shape, config.top_k, config.edge_law));
    }
  }
  return graphs;
}

/// The same number for each head of a sequence.
Lists random_keep(Random& random, const Graphs& graphs, const std::vector<Index>& counts,
                  Index heads) {
  Lists keep(graphs.size());
  for (std::size_t b = 0; b < graphs.size(); ++b) {
    for (const Graph& graph : graphs[b]) {
      keep[b].push_back(random_part(random, live_slots(graph), counts[b]));
    }
    keep[b].resize(at(heads), keep[b].front());
  }
  return keep;
}

/// Entries of one head as compact sees them, behind their -1.
std::vector<Index> padded(const std::vector<Index>& list, Index columns) {
  std::vector<Index> entries(at(columns - count_of(list)), -1);
  entries.insert(entries.end(), list.begin(), list.end());
  return entries;
}

void expect_moved(const HostTensor& before, const HostTensor& after, const Lists& keep,
                  Index columns) {
  for (Index b = 0; b < count_of(keep); ++b) {
    for (Index h = 0; h < count_of(keep[at(b)]); ++h) {
      const std::vector<Index> entries = padded(keep[at(b)][at(h)], columns);
      for (Index slot = 0; slot < columns; ++slot) {
        if (entries[at(slot)] < 0) continue;
        for (Index d = 0; d < before.size(3); ++d) {
          ASSERT_EQ(after.bits({b, h, slot, d}), before.bits({b, h, entries[at(slot)], d}))
              << "sequence " << b << ", head " << h << ", slot " << slot << ", element " << d;
        }
      }
    }
  }
  EXPECT_TRUE(after.gaps_untouched());
}

TEST(Compact, MovesEveryTypeThroughAnyStrides) {
  Random random(1);
  const GraphConfig config = graph_config();
  for (const DType dtype :
       {DType::f32, DType::f16, DType::bf16, DType::i32, DType::u32, DType::u8}) {
    for (const std::vector<int>& order :
         {std::vector<int>{0, 1, 2, 3}, {0, 2, 1, 3}, {2, 1, 0, 3}}) {
      for (const Index gap : {0, 1, 5}) {
        SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", gap " << gap);
        GraphManager manager(config, {});
        const Graphs graphs = random_graphs(random, config, {.slots = 60, .tokens = 50});
        load_graphs(manager, 0, graphs);
        HostTensor keys(dtype, {2, 2, 60, 8}, order, gap);
        HostTensor values(dtype, {2, 2, 70, 13}, order, gap);  // another size, more slots
        keys.fill_bits(random);
        values.fill_bits(random);
        const HostTensor keys_before = keys;
        const HostTensor values_before = values;
        const Lists keep = random_keep(random, graphs, {20, 33}, 2);
        manager.compact(0, keep_tensor(keep).view(), keys.view(), values.view(), Stream{});
        expect_moved(keys_before, keys, keep, 33);
        expect_moved(values_before, values, keep, 33);
      }
    }
  }
}

TEST(Compact, MovesTheGraphWithItsTokens) {
  Random random(2);
  for (const EdgeLaw law : kEdgeLaws) {
    for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
      for (int round = 0; round < 10; ++round) {
        SCOPED_TRACE(round);
        GraphConfig config = graph_config(law);
        config.scope = scope;
        config.pack_rows = round % 3 != 0;
        GraphManager manager(
            config, {.decay = 0.5,
                     .populations = {
                         {.share = 0.5, .recent_tokens = 30},
                         {.restart = Restart::current, .count = VisitCount::all, .share = 0.5}}});
        load_graphs(
            manager, 0,
            random_graphs(random, config, {.slots = 60, .tokens = 50, .in_order = round % 2 == 0}));
        manager.walk(0, {}, Stream{});
        manager.walk(0, {}, Stream{});
        const Graphs before = read_graphs(manager, 0);
        std::vector<HostTensor> tables;
        for (int p = 0; p < 2; ++p) {
          tables.push_back(read_scores(manager, 0, p));
          tables.push_back(read_visits(manager, 0, p));
        }
        const Lists keep =
            random_keep(random, before, {random.integer(1, 50), random.integer(1, 50)}, 2);
        const HostTensor keep_argument = keep_tensor(keep);
        const Index columns = keep_argument.size(2);
        manager.compact(0, keep_argument.view(), {}, {}, Stream{});

        ASSERT_EQ(manager.length(0), columns);
        const Graphs after = read_graphs(manager, 0);
        std::vector<HostTensor> moved;
        for (int p = 0; p < 2; ++p) {
          moved.push_back(read_scores(manager, 0, p));
          moved.push_back(read_visits(manager, 0, p));
        }
        for (Index b = 0; b < 2; ++b) {
          EXPECT_EQ(manager.tokens_held(0, b), count_of(keep[at(b)][0]));
          EXPECT_EQ(manager.tokens_seen(0, b), 80);
          for (Index h = 0; h < 2; ++h) {
            const Index g = scope == GraphScope::layer ? 0 : h;
            const std::vector<Index> entries = padded(keep[at(b)][at(h)], columns);
            // Nothing is rescaled where edges keep their probabilities.
            const double tolerance = law == EdgeLaw::attention ? 0.0 : 1e-6 + packing_error(config);
            expect_same_graph(compacted(before[at(b)][at(g)], entries, law), after[at(b)][at(g)],
                              tolerance);
            for (std::size_t table = 0; table < tables.size(); ++table) {
              for (Index slot = 0; slot < columns; ++slot) {
                const Index from = entries[at(slot)];
                EXPECT_EQ(moved[table].get({b, h, slot}),
                          from < 0 ? 0.0 : tables[table].get({b, h, from}));
              }
            }
          }
        }
      }
    }
  }
}

TEST(Compact, MovesSlotsToTheRight) {
  GraphConfig config = graph_config();
  config.batch_size = config.num_query_heads = config.num_kv_heads = 1;
  Random random(3);
  for (const std::vector<Index>& entries : {std::vector<Index>{-1, 0, 1, 2, 3},
                                            {-1, -1, 0, 2, 5},
                                            {-1, -1, -1, 0, 1, 2},
                                            {-1, 0, 2, 5},
                                            {-1, 0, 2, 3, 5, 6, 7},
                                            {-1, -1, -1, -1, -1, -1, -1, 0},
                                            {0, 1, 2, 3, 4, 5, 6, 7},
                                            {7},
                                            {}}) {
    GraphManager manager(config, {});
    load_graphs(manager, 0,
                {{random_graph(random, {.slots = 8, .tokens = 8, .seen = 30, .in_order = true}, 8,
                               EdgeLaw::weighted)}});
    const Graph graph = read_graphs(manager, 0)[0][0];
    HostTensor keys(DType::i32, {1, 1, 8, 8});
    keys.fill_bits(random);
    const HostTensor before = keys;
    HostTensor keep(DType::i32, {1, 1, count_of(entries)});
    for (Index i = 0; i < count_of(entries); ++i) {
      keep.set({0, 0, i}, static_cast<double>(entries[at(i)]));
    }
    manager.compact(0, keep.view(), keys.view(), {}, Stream{});
    for (Index slot = 0; slot < count_of(entries); ++slot) {
      if (entries[at(slot)] < 0) continue;
      for (Index d = 0; d < 8; ++d) {
        EXPECT_EQ(keys.bits({0, 0, slot, d}), before.bits({0, 0, entries[at(slot)], d}));
      }
    }
    EXPECT_EQ(manager.length(0), count_of(entries));
    expect_same_graph(compacted(graph, entries, config.edge_law), read_graphs(manager, 0)[0][0],
                      1e-6 + packing_error(config));
  }
}

TEST(Compact, LeavesFiniteWhatWasFinite) {
  Random random(4);
  const GraphConfig config = graph_config();
  GraphManager manager(config, {});
  const Graphs graphs = random_graphs(random, config, {.slots = 60, .tokens = 50});
  load_graphs(manager, 0, graphs);
  HostTensor keys(DType::f32, {2, 2, 60, 8});
  HostTensor values(DType::f16, {2, 2, 60, 8});
  keys.fill_normal(random);
  values.fill_normal(random);
  manager.compact(0, keep_tensor(random_keep(random, graphs, {5, 33}, 2)).view(), keys.view(),
                  values.view(), Stream{});
  keys.for_each([&](const std::vector<Index>& index) {
    ASSERT_TRUE(std::isfinite(keys.get(index)));
    ASSERT_TRUE(std::isfinite(values.get(index)));
  });
}

TEST(Compact, CountsTheEvicted) {
  Random random(5);
  const GraphConfig config = graph_config();
  GraphManager manager(config, {});
  const Graphs graphs = random_graphs(random, config, {.slots = 60, .tokens = 50});
  load_graphs(manager, 0, graphs);
  manager.compact(0, keep_tensor(random_keep(random, graphs, {20, 50}, 2)).view(), {}, {},
                  Stream{});
  EXPECT_EQ(manager.statistics().evicted, 2 * 30);
}

TEST(Compact, LeavesRoomForCleanTokens) {
  // What comes after the kept slots carries nothing of what was there before.
  GraphConfig config = graph_config();
  GraphManager manager(config, {.populations = {{.count = VisitCount::all, .recent_tokens = 50}}});
  Feeder feeder(manager, 0, 6);
  feeder.prefill(60);
  manager.walk(0, {}, Stream{});
  const Graphs graphs = read_graphs(manager, 0);
  manager.compact(0, keep_tensor(random_keep(feeder.random, graphs, {30, 30}, 2)).view(),
                  feeder.keys.view(), {}, Stream{});
  for (int i = 0; i < 10; ++i) feeder.append();
  EXPECT_EQ(manager.length(0), 40);
  EXPECT_EQ(manager.tokens_seen(0, 0), 70);
  const HostTensor scores = read_scores(manager, 0, -1);
  const HostTensor visits = read_visits(manager, 0, 0);
  for (const auto& sequence : read_graphs(manager, 0)) {
    for (const Graph& graph : sequence) expect_sound(graph, config.num_sinks);
  }
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 2; ++h) {
      for (Index slot = 30; slot < 40; ++slot) {
        EXPECT_EQ(scores.get({b, h, slot}), 0.0);
        EXPECT_EQ(visits.get({b, h, slot}), 0.0);
        EXPECT_EQ(read_positions(manager, 0).get({b, h, slot}), 30.0 + static_cast<double>(slot));
      }
    }
  }
}

TEST(Compact, KeepsTheCacheOfADecodingLoopWhole) {
  // Each key holds the position of its token: after many cuts they still agree.
  GraphConfig config = graph_config();
  config.capacity = 48;
  GraphManager manager(config, WalkConfig{.num_walkers = 64});
  const EvictionConfig eviction{.budget = 24, .interval = 8, .window = 8, .sinks = 2};
  HostTensor keys = key_slab(config, 2);
  HostTensor values(DType::bf16, {2, 2, 48, 4});
  Random random(7);
  HostTensor query(DType::f32, {2, 2, 8});
  for (Index position = 0; position < 150; ++position) {
    const Index slot = manager.length(0);
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 2; ++h) {
        keys.set({b, h, slot, 0}, static_cast<double>(position));
        for (Index d = 1; d < 8; ++d) keys.set({b, h, slot, d}, random.normal());
        values.set({b, h, slot, 3}, static_cast<double>(position));
      }
    }
    query.fill_normal(random);
    manager.update(0, query.view(), keys.view(), {}, {.scale = 0.01}, Stream{});
    if (!manager.is_full(0, eviction)) continue;
    manager.update_novelty(0, keys.view(), Stream{});
    manager.walk(0, {}, Stream{});
    HostTensor keep(DType::i32, {2, 2, manager.kept_length(0, eviction, false)});
    manager.select(0, eviction, false, keep.view(), Stream{});
    manager.compact(0, keep.view(), keys.view(), values.view(), Stream{});
    ASSERT_EQ(manager.length(0), 24);
    const HostTensor positions = read_positions(manager, 0);
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 2; ++h) {
        for (Index i = 0; i < 24; ++i) {
          ASSERT_EQ(positions.get({b, h, i}), keys.get({b, h, i, 0}));
          ASSERT_EQ(bfloat_to_double(double_to_bfloat(positions.get({b, h, i}))),
                    values.get({b, h, i, 3}));
        }
        ASSERT_EQ(positions.get({b, h, 1}), 1.0);
        ASSERT_EQ(positions.get({b, h, 16}), static_cast<double>(position - 7));
      }
    }
    for (const auto& sequence : read_graphs(manager, 0)) {
      for (const Graph& graph : sequence) expect_sound(graph, config.num_sinks);
    }
  }
  EXPECT_EQ(manager.statistics().evicted, (150 - manager.tokens_held(0, 0)) * 4);
}

}  // namespace
}  // namespace spectralkv::test
