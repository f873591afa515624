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

GraphConfig graph_config(Index capacity = 40, EdgeLaw law = EdgeLaw::weighted) {
  return {.batch_size = 2,
          .num_query_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 8,
          .capacity = capacity,
          .edge_law = law,
          .num_threads = 1};
}

class SlotsOfEveryLaw : public ::testing::TestWithParam<EdgeLaw> {};
INSTANTIATE_TEST_SUITE_P(Laws, SlotsOfEveryLaw, ::testing::ValuesIn(kEdgeLaws));

/// A random part of every head, of the same size.
Lists random_keep(Random& random, const Graphs& graphs, Index count) {
  Lists keep;
  for (const auto& sequence : graphs) {
    keep.emplace_back();
    for (const Graph& graph : sequence) {
      keep.back().push_back(random_part(random, live_slots(graph), count));
    }
  }
  return keep;
}

bool holds(const std::vector<Index>& slots, Index slot) {
  return std::find(slots.begin(), slots.end(), slot) != slots.end();
}

TEST_P(SlotsOfEveryLaw, AreFreedWhereTheyAre) {
  GraphManager manager(graph_config(40, GetParam()),
                       {.decay = 0.5, .populations = {{.recent_tokens = 20}}});
  Feeder feeder(manager, 0, 1);
  feeder.prefill(30);
  manager.walk(0, {}, Stream{});
  const Graphs before = read_graphs(manager, 0);
  const HostTensor scores = read_scores(manager, 0, 0);
  const HostTensor visits = read_visits(manager, 0, 0);
  const Lists keep = random_keep(feeder.random, before, 18);
  manager.release(0, keep_tensor(keep).view(), Stream{});

  EXPECT_EQ(manager.length(0), 30);
  EXPECT_EQ(manager.statistics().evicted, 12 * 4);
  const Graphs after = read_graphs(manager, 0);
  for (Index b = 0; b < 2; ++b) {
    EXPECT_EQ(manager.tokens_held(0, b), 18);
    EXPECT_EQ(manager.tokens_seen(0, b), 30);
    for (Index h = 0; h < 2; ++h) {
      const std::vector<Index>& kept = keep[at(b)][at(h)];
      Graph expected = before[at(b)][at(h)];
      for (Index slot = 0; slot < 30; ++slot) {
        const bool stays = holds(kept, slot);
        if (!stays) {
          expected.positions[at(slot)] = -1;
          expected.rows[at(slot)].clear();
        }
        EXPECT_EQ(read_scores(manager, 0, 0).get({b, h, slot}),
                  stays ? scores.get({b, h, slot}) : 0.0);
        EXPECT_EQ(read_visits(manager, 0, 0).get({b, h, slot}),
                  stays ? visits.get({b, h, slot}) : 0.0);
      }
      for (Index slot = 0; slot < 30; ++slot) {
        expected.rows[at(slot)] = live_row(expected, slot, GetParam());
      }
      expect_same_graph(expected, after[at(b)][at(h)], 1e-6);
    }
  }
}

TEST(Slots, AcceptKeepListsBehindMinusOne) {
  GraphManager manager(graph_config(), {});
  Feeder feeder(manager, 0, 2);
  feeder.prefill(20);
  const Lists keep{{{1, 5, 19}, {0, 2, 3}}, {{4}, {7}}};
  manager.release(0, keep_tensor(keep, 9).view(), Stream{});
  EXPECT_EQ(manager.tokens_held(0, 0), 3);
  EXPECT_EQ(manager.tokens_held(0, 1), 1);
  const Graphs graphs = read_graphs(manager, 0);
  for (std::size_t b = 0; b < 2; ++b) {
    for (std::size_t h = 0; h < 2; ++h) EXPECT_EQ(live_slots(graphs[b][h]), keep[b][h]);
  }
}

TEST(Slots, AreFoundFromTheLowest) {
  GraphManager manager(graph_config(), {});
  Feeder feeder(manager, 0, 3);
  const auto next = [&] {
    HostTensor out(DType::i32, {2, 2});
    manager.next_slots(0, out.view(), Stream{});
    std::vector<Index> result;
    out.for_each([&](const auto& index) { result.push_back(static_cast<Index>(out.get(index))); });
    return result;
  };
  EXPECT_EQ(next(), (std::vector<Index>{0, 0, 0, 0}));
  feeder.prefill(6);
  EXPECT_EQ(next(), (std::vector<Index>{6, 6, 6, 6}));
  manager.release(
      0,
      keep_tensor({{{0, 1, 3, 5}, {1, 2, 3, 4}}, {{0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}}}).view(),
      Stream{});
  EXPECT_EQ(next(), (std::vector<Index>{2, 0, 6, 6}));
  feeder.reuse();
  EXPECT_EQ(manager.length(0), 7);
  EXPECT_EQ(next(), (std::vector<Index>{4, 5, 7, 7}));
  feeder.reuse();
  EXPECT_EQ(manager.length(0), 8);
  EXPECT_EQ(next(), (std::vector<Index>{6, 6, 8, 8}));
}

TEST(Slots, RunOutAtTheCapacity) {
  GraphManager manager(graph_config(10), {});
  Feeder feeder(manager, 0, 4);
  feeder.prefill(10);
  HostTensor out(DType::i32, {2, 2});
  expect_rejected(manager, "next_slots", [&] { manager.next_slots(0, out.view(), Stream{}); });
  std::vector<Index> all = plain_graph(10).positions;
  std::vector<Index> some{0, 1, 2, 9};
  manager.release(0, keep_tensor({{some, some}, {all, all}}).view(), Stream{});
  expect_rejected(manager, "next_slots", [&] { manager.next_slots(0, out.view(), Stream{}); });
  manager.reserve(0, 11);
  manager.next_slots(0, out.view(), Stream{});
  EXPECT_EQ(out.get({0, 0}), 3.0);
  EXPECT_EQ(out.get({1, 1}), 10.0);
}

TEST(Slots, GetKeysAndValuesOfNewTokens) {
  for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
    GraphConfig config = graph_config(12);
    config.scope = scope;
    GraphManager manager(config, {});
    Feeder feeder(manager, 0, 3);
    feeder.prefill(6);
    const std::vector<Index> some{0, 1, 4, 5};
    const std::vector<Index> other =
        scope == GraphScope::head ? std::vector<Index>{0, 3, 4, 5} : some;
    manager.release(
        0, keep_tensor({{some, other}, {{0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}}}).view(), Stream{});
    for (const DType dtype : {DType::f32, DType::bf16, DType::u8}) {
      HostTensor keys(dtype, {2, 2, 12, 5}, {2, 0, 1, 3}, 1);
      HostTensor values(DType::f16, {2, 2, 12, 3});
      HostTensor new_keys(dtype, {2, 2, 5}, {1, 0, 2}, 1);
      HostTensor new_values(DType::f16, {2, 2, 3});
      new_keys.for_each([&](const std::vector<Index>& i) {
        new_keys.set(i, static_cast<double>(1 + i[0] * 10 + i[1] * 5 + i[2]));
      });
      new_values.for_each([&](const std::vector<Index>& i) {
        new_values.set(i, static_cast<double>(1 + i[0] * 6 + i[1] * 3 + i[2]));
      });
      HostTensor slots(DType::i32, {2, 2});
      manager.place(0, new_keys.view(), new_values.view(), keys.view(), values.view(), slots.view(),
                    Stream{});
      const Index second = scope == GraphScope::head ? 1 : 2;
      EXPECT_EQ(slots.get_index({0, 0}), 2);
      EXPECT_EQ(slots.get_index({0, 1}), second);
      EXPECT_EQ(slots.get_index({1, 0}), 6);
      EXPECT_EQ(slots.get_index({1, 1}), 6);
      keys.for_each([&](const std::vector<Index>& i) {
        const bool placed = i[2] == slots.get_index({i[0], i[1]});
        EXPECT_EQ(keys.get(i), placed ? new_keys.get({i[0], i[1], i[3]}) : 0.0);
      });
      values.for_each([&](const std::vector<Index>& i) {
        const bool placed = i[2] == slots.get_index({i[0], i[1]});
        EXPECT_EQ(values.get(i), placed ? new_values.get({i[0], i[1], i[3]}) : 0.0);
      });
    }
  }
}

TEST(Slots, TakeNewTokensWhoseRowsAreAsAnywhere) {
  // A manager that reuses slots, and one that appends: the same tokens get the same rows.
  GraphConfig config = graph_config(64);
  config.batch_size = config.num_kv_heads = config.num_query_heads = 1;
  config.num_sinks = 2;
  GraphManager reusing(config, {});
  GraphManager appending(config, {});
  Random random(5);
  HostTensor reused_keys = key_slab(config, 1);
  HostTensor appended_keys = key_slab(config, 1);
  const std::vector<Index> kept{0, 1, 4, 5, 6, 11, 17, 18, 19};
  std::vector<Index> slot_of_position;
  for (Index position = 0; position < 40; ++position) {
    HostTensor query(DType::f32, {1, 1, 8});
    query.fill_normal(random);
    HostTensor slot(DType::i32, {1, 1});
    reusing.next_slots(0, slot.view(), Stream{});
    slot_of_position.push_back(slot.get_index({0, 0}));
    const Index appended = appending.length(0);
    for (Index d = 0; d < 8; ++d) {
      const double value = random.normal();
      reused_keys.set({0, 0, slot_of_position.back(), d}, value);
      appended_keys.set({0, 0, appended, d}, value);
    }
    reusing.update(0, query.view(), reused_keys.view(), slot.view(), {}, Stream{});
    appending.update(0, query.view(), appended_keys.view(), {}, {}, Stream{});
    if (position == 19) {
      reusing.release(0, keep_tensor({{kept}}).view(), Stream{});
      appending.release(0, keep_tensor({{kept}}).view(), Stream{});
    }
  }
  EXPECT_EQ(reusing.length(0), 29);
  EXPECT_EQ(appending.length(0), 40);
  EXPECT_EQ(reusing.tokens_seen(0, 0), 40);
  EXPECT_EQ(reusing.tokens_held(0, 0), 29);
  const Graph first = read_graphs(reusing, 0)[0][0];
  const Graph second = read_graphs(appending, 0)[0][0];
  expect_sound(first, 2);
  for (Index slot = 0; slot < 40; ++slot) {
    const Index position = second.positions[at(slot)];
    if (position < 0) continue;
    ASSERT_EQ(first.positions[at(slot_of_position[at(position)])], position);
    std::vector<Edge> expected = second.rows[at(slot)];
    for (Edge& edge : expected) edge.slot = slot_of_position[at(edge.slot)];
    expect_same_row(expected, first.rows[at(slot_of_position[at(position)])],
                    2e-6 + 2.0 * packing_error(config));
  }
}

TEST_P(SlotsOfEveryLaw, MakeOldEdgesStale) {
  GraphManager manager(graph_config(40, GetParam()), {.populations = {{.recent_tokens = 20}}});
  Feeder feeder(manager, 0, 6);
  feeder.prefill(30);
  manager.walk(0, {}, Stream{});
  const Graphs before = read_graphs(manager, 0);
  const Lists keep = random_keep(feeder.random, before, 15);
  manager.release(0, keep_tensor(keep).view(), Stream{});
  Index position = 30;
  for (int round = 0; round < 15; ++round) {
    const HostTensor slots = feeder.reuse();
    ++position;
    EXPECT_EQ(manager.length(0), 30);
    const Graphs after = read_graphs(manager, 0);
    const HostTensor scores = read_scores(manager, 0, 0);
    for (Index b = 0; b < 2; ++b) {
      EXPECT_EQ(manager.tokens_seen(0, b), position);
      EXPECT_EQ(manager.tokens_held(0, b), 16 + round);
      for (Index h = 0; h < 2; ++h) {
        const Graph& graph = after[at(b)][at(h)];
        const Index slot = slots.get_index({b, h});
        EXPECT_FALSE(holds(keep[at(b)][at(h)], slot));
        EXPECT_EQ(graph.positions[at(slot)], position - 1);
        EXPECT_EQ(scores.get({b, h, slot}), 0.0) << "the score of the token before";
        EXPECT_EQ(graph.rows[at(slot)].size(), 8U);
        expect_sound(graph, 4, GetParam());
        // What the old tokens' rows have left does not change, whoever moves in.
        Graph expected = before[at(b)][at(h)];
        for (Index j = 0; j < 30; ++j) {
          if (!holds(keep[at(b)][at(h)], j)) expected.positions[at(j)] = -1;
        }
        for (const Index kept : keep[at(b)][at(h)]) {
          expect_same_row(live_row(expected, kept, GetParam()), graph.rows[at(kept)], 1e-6);
        }
      }
    }
  }
}

TEST_P(SlotsOfEveryLaw, AreMadeDenseAgain) {
  // compact after reuse: slots and positions are in any order.
  GraphManager manager(graph_config(40, GetParam()), {});
  Feeder feeder(manager, 0, 7);
  feeder.prefill(30);
  manager.release(0, keep_tensor(random_keep(feeder.random, read_graphs(manager, 0), 15)).view(),
                  Stream{});
  for (int i = 0; i < 10; ++i) feeder.reuse();
  const Graphs before = read_graphs(manager, 0);
  const HostTensor keys = feeder.keys;
  const Lists keep = random_keep(feeder.random, before, 12);
  manager.compact(0, keep_tensor(keep).view(), feeder.keys.view(), {}, Stream{});
  EXPECT_EQ(manager.length(0), 12);
  const Graphs after = read_graphs(manager, 0);
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 2; ++h) {
      expect_same_graph(compacted(before[at(b)][at(h)], keep[at(b)][at(h)], GetParam()),
                        after[at(b)][at(h)], 1e-6 + packing_error(manager.graph_config()));
      for (Index slot = 0; slot < 12; ++slot) {
        EXPECT_EQ(feeder.keys.vector({b, h, slot}),
                  keys.vector({b, h, keep[at(b)][at(h)][at(slot)]}));
      }
    }
  }
  feeder.append();
  EXPECT_EQ(manager.length(0), 13);
  EXPECT_EQ(manager.tokens_seen(0, 0), 41);
}

TEST(Slots, MayLeaveAGap) {
  // A slot behind the first free one; what lies between stays empty.
  GraphManager manager(graph_config(), {});
  Feeder feeder(manager, 0, 8);
  feeder.prefill(5);
  HostTensor slots(DType::i32, {2, 2});
  slots.set({0, 0}, 5);
  slots.set({0, 1}, 8);
  slots.set({1, 0}, 6);
  slots.set({1, 1}, 5);
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 2; ++h) feeder.write_key(b, h, slots.get_index({b, h}));
  }
  manager.update(0, feeder.query().view(), feeder.keys.view(), slots.view(), {}, Stream{});
  EXPECT_EQ(manager.length(0), 9);
  for (const auto& sequence : read_graphs(manager, 0)) {
    for (const Graph& graph : sequence) {
      EXPECT_EQ(graph.held(), 6);
      EXPECT_EQ(graph.seen(), 6);
      expect_sound(graph, 4);
    }
  }
  feeder.reuse();
  EXPECT_EQ(manager.length(0), 9);
  EXPECT_EQ(manager.tokens_held(0, 1), 7);
}

TEST(Slots, OfALayersGraphAreCommonToItsHeads) {
  GraphConfig config = graph_config();
  config.scope = GraphScope::layer;
  GraphManager manager(config, {.populations = {{.recent_tokens = 20}}});
  Feeder feeder(manager, 0, 9);
  feeder.prefill(20);
  manager.walk(0, {}, Stream{});
  const EvictionConfig eviction{.budget = 12, .interval = 4, .window = 4, .sinks = 4};
  HostTensor keep(DType::i32, {2, 2, 12});
  manager.select(0, eviction, false, keep.view(), Stream{});
  for (Index b = 0; b < 2; ++b) EXPECT_EQ(keep.vector({b, 0}), keep.vector({b, 1}));
  manager.release(0, keep.view(), Stream{});
  const HostTensor slots = feeder.reuse();
  for (Index b = 0; b < 2; ++b) EXPECT_EQ(slots.get({b, 0}), slots.get({b, 1}));
  EXPECT_EQ(manager.tokens_held(0, 0), 13);
  EXPECT_EQ(manager.statistics().evicted, 8 * 4);
}

}  // namespace
}  // namespace spectralkv::test
