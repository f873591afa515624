#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

/// Slots kept by each head of each sequence, without the -1 in front.
using Kept = std::vector<std::vector<std::vector<Index>>>;

Kept select(const GraphManager& manager, const EvictionConfig& eviction, bool force,
            const std::vector<int>& order = {}, Index gap = 0) {
  const Index length = manager.kept_length(0, eviction, force);
  HostTensor out(DType::i32, {manager.batch_size(0), manager.graph_config().num_kv_heads, length},
                 order, gap);
  out.fill(-7);
  manager.select(0, eviction, force, out.view(), Stream{});
  EXPECT_TRUE(out.gaps_untouched());
  Kept kept(at(manager.batch_size(0)));
  for (Index b = 0; b < manager.batch_size(0); ++b) {
    for (Index h = 0; h < manager.graph_config().num_kv_heads; ++h) {
      kept[at(b)].emplace_back();
      for (Index i = 0; i < length; ++i) {
        const Index slot = out.get_index({b, h, i});
        if (slot == -1) {
          EXPECT_TRUE(kept[at(b)].back().empty()) << "an empty entry behind a kept slot";
        } else {
          kept[at(b)].back().push_back(slot);
        }
      }
    }
  }
  return kept;
}

struct Plan {
  std::vector<Index> tokens;  ///< of each sequence, 1 or more
  std::vector<Population> populations;
  Index num_walkers = 64;  ///< few: many equal scores
  bool exact = false;
  GraphScope scope = GraphScope::head;
};

struct Stage {
  GraphManager manager;
  Graphs graphs;
};

Stage make_stage(const Plan& plan, Random& random) {
  const Index batch = count_of(plan.tokens);
  const Index slots = *std::max_element(plan.tokens.begin(), plan.tokens.end()) + 5;
  GraphConfig config{.batch_size = batch,
                     .num_query_heads = 3,
                     .num_kv_heads = 3,
                     .head_dim = 8,
                     .capacity = slots,
                     .scope = plan.scope,
                     .seed = random.bits(),
                     .num_threads = 1};
  Stage stage{GraphManager(config, {.num_walkers = plan.num_walkers,
                                    .walk_length = 10,
                                    .populations = plan.populations}),
              {}};
  for (Index b = 0; b < batch; ++b) {
    stage.graphs.emplace_back();
    for (Index g = 0; g < stage.manager.graphs_per_sequence(); ++g) {
      stage.graphs.back().push_back(random_graph(
          random, {.slots = slots, .tokens = plan.tokens[at(b)], .seen = plan.tokens[at(b)] + 30},
          config.top_k, config.edge_law));
    }
  }
  load_graphs(stage.manager, 0, stage.graphs);
  if (stage.manager.walk_config().needs_novelty()) {
    HostTensor keys = key_slab(config, batch);
    keys.fill_normal(random);
    stage.manager.update_novelty(0, keys.view(), Stream{});
  }
  if (plan.exact) {
    stage.manager.solve(0, {}, Stream{});
  } else {
    stage.manager.walk(0, {}, Stream{});
  }
  return stage;
}

void expect_selection(const Stage& stage, const EvictionConfig& eviction, bool force,
                      const Kept& kept) {
  const GraphManager& manager = stage.manager;
  const std::vector<Population>& populations = manager.walk_config().populations;
  Index longest = 0;
  for (Index b = 0; b < manager.batch_size(0); ++b) {
    const Index held = manager.tokens_held(0, b);
    const bool full = held >= eviction.budget + (force ? 1 : eviction.interval);
    longest = std::max(longest, full ? eviction.budget : held);
    if (!force) {
      EXPECT_EQ(manager.full_sequences(0, eviction)[at(b)] != 0, full);
    }
    for (Index h = 0; h < manager.graph_config().num_kv_heads; ++h) {
      SCOPED_TRACE(::testing::Message() << "sequence " << b << ", head " << h);
      const Graph& graph = stage.graphs[at(b)][at(std::min(h, manager.graphs_per_sequence() - 1))];
      const std::vector<Index>& slots = kept[at(b)][at(h)];
      EXPECT_TRUE(std::is_sorted(slots.begin(), slots.end()));
      EXPECT_EQ(std::set<Index>(slots.begin(), slots.end()).size(), slots.size());
      if (!full) {
        EXPECT_EQ(slots, live_slots(graph));
        continue;
      }
      EXPECT_EQ(count_of(slots), eviction.budget);
      for (const Index slot : live_slots(graph)) {
        const Index position = graph.positions[at(slot)];
        if (position >= eviction.sinks && position < graph.seen() - eviction.window) continue;
        EXPECT_TRUE(std::binary_search(slots.begin(), slots.end(), slot)) << position;
      }
      Matrix scores;
      for (int p = 0; p < static_cast<int>(populations.size()); ++p) {
        scores.push_back(read_scores(manager, 0, p).vector({b, h}));
      }
      EXPECT_EQ(slots, select_reference(graph, graph.seen(), scores, populations, eviction));
    }
  }
  EXPECT_EQ(manager.kept_length(0, eviction, force), longest);
}

std::vector<std::vector<Population>> mixes() {
  return {{{.recent_tokens = 20}},
          {{.share = 0.5, .recent_tokens = 20},
           {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.5}},
          {{.restart = Restart::current, .share = 0.25},
           {.count = VisitCount::all, .share = 0.25},
           {.restart = Restart::novelty, .share = 0.5}},
          {{.share = 0.1, .recent_tokens = 20},
           {.restart = Restart::novelty, .share = 0.2},
           {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.3},
           {.count = VisitCount::all, .share = 0.4, .recent_tokens = 50}}};
}

TEST(Select, KeepsSinksWindowAndTheQuotasOfTheBest) {
  Random random(1);
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(round);
    Plan plan{.tokens = {}, .populations = mixes()[at(round % 4)]};
    for (Index b = random.integer(1, 3); b > 0; --b) {
      plan.tokens.push_back(random.integer(1, 120));
    }
    plan.exact = round % 3 == 0;
    plan.num_walkers = round % 2 == 0 ? 16 : 512;
    plan.scope = round % 5 == 0 ? GraphScope::layer : GraphScope::head;
    const Stage stage = make_stage(plan, random);
    for (int choice = 0; choice < 4; ++choice) {
      EvictionConfig eviction{.budget = 0,
                              .interval = random.integer(1, 20),
                              .window = random.integer(0, 30),
                              .sinks = random.integer(0, 6)};
      eviction.budget = eviction.sinks + eviction.window + random.integer(1, 40);
      for (const bool force : {false, true}) {
        expect_selection(stage, eviction, force, select(stage.manager, eviction, force));
      }
    }
    if (HasFailure()) return;
  }
}

TEST(Select, WritesThroughStrides) {
  Random random(2);
  const Stage stage = make_stage({.tokens = {100, 40}, .populations = mixes()[1]}, random);
  const EvictionConfig eviction{.budget = 50, .interval = 10, .window = 10, .sinks = 4};
  const Kept expected = select(stage.manager, eviction, false);
  EXPECT_EQ(expected, select(stage.manager, eviction, false, {1, 0, 2}, 3));
}

TEST(Select, LetsTheNewerOfEqualsStay) {
  // Never walked: all scores are 0.
  GraphManager manager({.head_dim = 8, .capacity = 100, .num_threads = 1},
                       {.populations = {{.recent_tokens = 9}}});
  Random random(3);
  const Graph graph =
      random_graph(random, {.slots = 90, .tokens = 80, .seen = 120}, 8, EdgeLaw::weighted);
  load_graphs(manager, 0, {{graph}});
  const EvictionConfig eviction{.budget = 30, .interval = 5, .window = 10, .sinks = 4};
  std::vector<Index> expected;
  for (const Index slot : graph.by_age()) {
    if (graph.positions[at(slot)] < 4) expected.push_back(slot);
  }
  const std::vector<Index> ages = graph.by_age();
  expected.insert(expected.end(), ages.end() - (30 - count_of(expected)), ages.end());
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(select(manager, eviction, false)[0][0], expected);
}

TEST(Select, GivesTheFirstPopulationTheRemainder) {
  // One place is left: floor(0.5) is 0 for both, so the first gets it.
  GraphManager manager(
      {.num_query_heads = 1,
       .num_kv_heads = 1,
       .head_dim = 8,
       .capacity = 100,
       .num_sinks = 0,
       .num_threads = 1},
      {.restart_prob = 1.0,
       .populations = {{.count = VisitCount::all, .share = 0.5, .recent_tokens = 20},
                       {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.5}}});
  load_graphs(manager, 0, {{plain_graph(60)}});
  HostTensor keys(DType::f32, {1, 1, 60, 8});
  Random random(4);
  keys.for_each([&](const std::vector<Index>& index) {  // token 7 points away from all others
    keys.set(index, index[2] == 7 ? -5.0 : 1.0 + 0.2 * random.normal());
  });
  manager.update_novelty(0, keys.view(), Stream{});
  manager.solve(0, {}, Stream{});
  EvictionConfig eviction{.budget = 15, .interval = 5, .window = 10, .sinks = 4};
  const auto keeps = [&](Index slot) {
    const std::vector<Index> kept = select(manager, eviction, false)[0][0];
    return std::binary_search(kept.begin(), kept.end(), slot);
  };
  EXPECT_TRUE(keeps(49));
  EXPECT_FALSE(keeps(48));
  EXPECT_FALSE(keeps(7));
  eviction.budget = 16;
  EXPECT_TRUE(keeps(49));
  EXPECT_FALSE(keeps(48));
  EXPECT_TRUE(keeps(7));
  EXPECT_EQ(count_of(select(manager, eviction, false)[0][0]), 16);
}

TEST(Select, CutsWhatHoldsBudgetAndInterval) {
  GraphManager manager({.batch_size = 2, .head_dim = 8, .capacity = 64, .num_threads = 1},
                       {.populations = {{.recent_tokens = 9}}});
  const EvictionConfig eviction{.budget = 20, .interval = 8, .window = 10, .sinks = 4};
  Feeder feeder(manager, 0, 5);
  HostTensor valid(DType::u8, {2, 20});
  valid.for_each([&](const std::vector<Index>& index) {
    valid.set(index, index[0] == 1 || index[1] >= 6 ? 1.0 : 0.0);
  });
  feeder.prefill(20, valid.view());
  EXPECT_EQ(manager.kept_length(0, eviction, false), 20);
  EXPECT_EQ(manager.kept_length(0, eviction, true), 20);
  for (int i = 0; i < 7; ++i) {
    feeder.append();
    EXPECT_FALSE(manager.is_full(0, eviction));
    EXPECT_EQ(manager.kept_length(0, eviction, false), 21 + i);
    EXPECT_EQ(manager.kept_length(0, eviction, true), 20);
  }
  EXPECT_EQ(manager.full_sequences(0, eviction), (std::vector<std::uint8_t>{0, 0}));
  feeder.append();
  EXPECT_TRUE(manager.is_full(0, eviction));
  std::vector<std::uint8_t> full = manager.full_sequences(0, eviction);
  EXPECT_EQ(full[0], 0);
  EXPECT_NE(full[1], 0);
  EXPECT_EQ(manager.kept_length(0, eviction, false), 22);
  const Kept kept = select(manager, eviction, false);
  EXPECT_EQ(count_of(kept[0][0]), 22);
  EXPECT_EQ(kept[0][0].front(), 6);
  EXPECT_EQ(count_of(kept[1][0]), 20);
  EXPECT_EQ(count_of(select(manager, eviction, true)[0][0]), 20);
}

TEST(Select, HoldsForAnEmptyLayer) {
  GraphManager manager({.batch_size = 2, .head_dim = 8, .capacity = 64, .num_threads = 1}, {});
  const EvictionConfig eviction{.budget = 20, .interval = 8, .window = 10, .sinks = 4};
  EXPECT_FALSE(manager.is_full(0, eviction));
  EXPECT_EQ(manager.kept_length(0, eviction, true), 0);
  EXPECT_TRUE(select(manager, eviction, true)[1][0].empty());
}

// -- safety mask

TEST(SafetyMask, ProtectsSinksWindowAndTheBest) {
  Random random(6);
  for (int round = 0; round < 20; ++round) {
    SCOPED_TRACE(round);
    const Stage stage = make_stage({.tokens = {100, 17},
                                    .populations = mixes()[at(round % 4)],
                                    .num_walkers = 512,
                                    .exact = true,
                                    .scope = round % 4 == 0 ? GraphScope::layer : GraphScope::head},
                                   random);
    const GraphManager& manager = stage.manager;
    const EvictionConfig eviction{.budget = 40, .interval = 8, .window = 10, .sinks = 4};
    const HostTensor scores = read_scores(manager, 0, -1);
    for (const double fraction : {0.0, 0.2, 0.5, 0.9, 1.0}) {
      HostTensor out(DType::u8, {2, 3, manager.length(0)}, {1, 0, 2}, 5);
      out.fill(9);
      manager.safety_mask(0, eviction, fraction, out.view(), Stream{});
      EXPECT_TRUE(out.gaps_untouched());
      for (Index b = 0; b < 2; ++b) {
        for (Index h = 0; h < 3; ++h) {
          const Graph& graph =
              stage.graphs[at(b)][at(std::min(h, manager.graphs_per_sequence() - 1))];
          Vector all;
          for (const Index slot : live_slots(graph)) all.push_back(scores.get({b, h, slot}));
          std::sort(all.rbegin(), all.rend());
          const double best = fraction * static_cast<double>(all.size());
          for (Index slot = 0; slot < graph.length(); ++slot) {
            const Index position = graph.positions[at(slot)];
            const double mask = out.get({b, h, slot});
            ASSERT_TRUE(mask == 0.0 || mask == 1.0);
            if (position < eviction.sinks || position >= graph.seen() - eviction.window) {
              EXPECT_EQ(mask, 0.0) << "position " << position;
              continue;
            }
            // Rank of its score: how many are better, and how many are at least as good.
            const double score = scores.get({b, h, slot});
            const auto better = static_cast<double>(
                std::count_if(all.begin(), all.end(), [&](double s) { return s > score; }));
            const auto as_good = static_cast<double>(
                std::count_if(all.begin(), all.end(), [&](double s) { return s >= score; }));
            if (as_good <= std::floor(best)) {
              EXPECT_EQ(mask, 0.0) << "position " << position;
            }
            if (better >= std::ceil(best)) {
              EXPECT_EQ(mask, 1.0) << "position " << position;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace spectralkv::test
