#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

constexpr Index kTokens = 24;

GraphConfig graph_config(GraphScope scope = GraphScope::head) {
  return {.batch_size = 2,
          .num_query_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 16,
          .capacity = 40,
          .scope = scope,
          .num_sinks = 2,
          .num_threads = 1};
}

struct Prompt {
  HostTensor keys;
  HostTensor queries;
};

Prompt make_prompt(DType dtype, std::uint64_t seed) {
  Random random(seed);
  Prompt prompt{HostTensor(dtype, {2, 2, kTokens, 16}), HostTensor(dtype, {2, 4, kTokens, 16})};
  prompt.keys.fill_normal(random);
  prompt.queries.fill_normal(random);
  return prompt;
}

/// Feeds a prompt token by token, or in one block.
void feed(GraphManager& manager, const Prompt& prompt, bool block) {
  if (block) {
    manager.update_rows(0, prompt.queries.view(), prompt.keys.view(), {}, Stream{});
    return;
  }
  for (Index slot = 0; slot < kTokens; ++slot) {
    HostTensor query(prompt.queries.dtype(), {2, 4, 16});
    query.for_each([&](const std::vector<Index>& index) {
      query.set(index, prompt.queries.get({index[0], index[1], slot, index[2]}));
    });
    manager.update(0, query.view(), prompt.keys.view(), {}, {}, Stream{});
  }
}

/// Whether token `slot` gets no row in graph g of sequence b.
bool is_spoiled(const Prompt& prompt, Index b, Index g, Index slot) {
  bool spoiled = !all_finite(prompt.keys.vector({b, g, slot}));
  for (Index h = 2 * g; h < 2 * g + 2; ++h) {
    spoiled = spoiled || !all_finite(prompt.queries.vector({b, h, slot}));
  }
  return spoiled;
}

/// Rows as the reference gives them to the finite tokens.
void expect_rows(const GraphManager& manager, const Prompt& prompt, double tolerance) {
  const Graphs graphs = read_graphs(manager, 0);
  for (Index b = 0; b < 2; ++b) {
    const std::vector<Matrix> keys{matrix_of(prompt.keys, b, 0, kTokens),
                                   matrix_of(prompt.keys, b, 1, kTokens)};
    for (Index g = 0; g < 2; ++g) {
      const Graph& graph = graphs[at(b)][at(g)];
      expect_sound(graph, 2);
      for (Index slot = 0; slot < kTokens; ++slot) {
        SCOPED_TRACE(::testing::Message()
                     << "sequence " << b << ", graph " << g << ", slot " << slot);
        EXPECT_EQ(graph.positions[at(slot)], slot);
        const std::vector<Edge>& row = graph.rows[at(slot)];
        if (is_spoiled(prompt, b, g, slot)) {
          EXPECT_TRUE(row.empty());
          continue;
        }
        Matrix queries;
        for (Index h = 0; h < 4; ++h) queries.push_back(prompt.queries.vector({b, h, slot}));
        std::vector<bool> visible(kTokens, false);
        std::fill_n(visible.begin(), slot + 1, true);
        const Vector attention =
            graph_attention(queries, keys, manager.graph_config(), g, visible, {});
        double sum = 0.0;
        for (const Edge& edge : row) {
          EXPECT_TRUE(all_finite(keys[at(g)][at(edge.slot)])) << edge.slot;
          sum += attention[at(edge.slot)];
        }
        Index candidates = 0;
        for (Index j = 2; j < slot; ++j) candidates += attention[at(j)] > 0.0 ? 1 : 0;
        EXPECT_EQ(count_of(row), std::min<Index>(8, candidates));
        for (const Edge& edge : row) {
          EXPECT_NEAR(edge.probability, attention[at(edge.slot)] / sum,
                      tolerance + packing_error(manager.graph_config()));
        }
      }
    }
  }
}

TEST(Nonfinite, SpoilsItsOwnRowOnly) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const bool block : {false, true}) {
      SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", block " << block);
      Prompt prompt = make_prompt(dtype, 1);
      prompt.queries.set({0, 0, 5, 3}, kNan);
      prompt.queries.set({0, 3, 7, 0}, kInfinity);
      prompt.queries.set({1, 1, kTokens - 1, 15}, -kInfinity);
      prompt.keys.set({0, 0, 9, 2}, kNan);
      prompt.keys.set({1, 1, 3, 8}, kInfinity);
      prompt.keys.set({1, 1, 12, 15}, -kInfinity);
      prompt.keys.set({1, 0, 0, 0}, kNan);     // a sink
      prompt.queries.set({0, 0, 9, 2}, kNan);  // query and key: counted once
      GraphManager manager(graph_config(), {});
      feed(manager, prompt, block);
      EXPECT_EQ(manager.statistics().rows_nonfinite, 7);
      expect_rows(manager, prompt, 1e-5);
    }
  }
}

TEST(Nonfinite, CountsOncePerGraph) {
  for (const bool block : {false, true}) {
    Prompt prompt = make_prompt(DType::f32, 2);
    for (Index h = 0; h < 4; ++h) prompt.queries.set({0, h, 6, 0}, kNan);
    GraphManager heads(graph_config(), {});
    feed(heads, prompt, block);
    EXPECT_EQ(heads.statistics().rows_nonfinite, 2);
    GraphManager layer(graph_config(GraphScope::layer), {});
    feed(layer, prompt, block);
    EXPECT_EQ(layer.statistics().rows_nonfinite, 1);
  }
}

TEST(Nonfinite, EmptiesTheRowOfASharedGraphByAnyHead) {
  for (const bool block : {false, true}) {
    Prompt prompt = make_prompt(DType::f32, 3);
    prompt.queries.set({0, 3, 10, 1}, kNan);
    prompt.keys.set({1, 1, 11, 1}, kInfinity);
    GraphManager manager(graph_config(GraphScope::layer), {});
    feed(manager, prompt, block);
    const Graphs graphs = read_graphs(manager, 0);
    for (Index slot = 3; slot < kTokens; ++slot) {
      EXPECT_EQ(graphs[0][0].rows[at(slot)].empty(), slot == 10) << slot;
      EXPECT_EQ(graphs[1][0].rows[at(slot)].empty(), slot == 11) << slot;
    }
    for (const auto& sequence : graphs) expect_sound(sequence[0], 2);
    EXPECT_EQ(manager.statistics().rows_nonfinite, 2);
  }
}

TEST(Nonfinite, LeavesOutScoresThatOverflow) {
  for (const bool block : {false, true}) {
    Prompt prompt = make_prompt(DType::f32, 4);
    for (Index d = 0; d < 16; ++d) {
      prompt.queries.set({0, 0, 20, d}, 1e20);
      prompt.queries.set({0, 1, 20, d}, 1e20);
      prompt.keys.set({0, 0, 4, d}, 1e20);   // +inf together
      prompt.keys.set({0, 0, 5, d}, -1e20);  // -inf
      prompt.keys.set({0, 0, 15, d}, 3.0);   // the highest of the finite ones
    }
    GraphManager manager(graph_config(), {});
    feed(manager, prompt, block);
    const Graph graph = read_graphs(manager, 0)[0][0];
    expect_sound(graph, 2);
    ASSERT_FALSE(graph.rows[20].empty());
    for (const Edge& edge : graph.rows[20]) {
      EXPECT_NE(edge.slot, 4);
      EXPECT_NE(edge.slot, 5);
    }
    EXPECT_EQ(manager.statistics().rows_nonfinite, 0);
  }
}

TEST(Nonfinite, IsNotCountedInPadding) {
  Prompt prompt = make_prompt(DType::f32, 5);
  HostTensor valid(DType::u8, {2, kTokens});
  for (Index b = 0; b < 2; ++b) {
    for (Index slot = 0; slot < kTokens; ++slot) {
      const bool is_token = slot % 5 != 2;
      valid.set({b, slot}, is_token ? 1.0 : 0.0);
      if (is_token) continue;
      for (Index d = 0; d < 16; ++d) {
        for (Index h = 0; h < 4; ++h) prompt.queries.set({b, h, slot, d}, kNan);
        for (Index h = 0; h < 2; ++h) prompt.keys.set({b, h, slot, d}, kNan);
      }
    }
  }
  GraphManager manager(graph_config(), {});
  manager.update_rows(0, prompt.queries.view(), prompt.keys.view(),
                      {.score = {}, .valid = valid.view()}, Stream{});
  EXPECT_EQ(manager.statistics().rows_nonfinite, 0);
  for (const auto& sequence : read_graphs(manager, 0)) {
    for (const Graph& graph : sequence) {
      expect_sound(graph, 2);
      for (Index slot = 4; slot < kTokens; ++slot) {
        EXPECT_EQ(graph.rows[at(slot)].empty(), slot % 5 == 2) << slot;
      }
    }
  }
}

TEST(Nonfinite, MayLieInFreeSlots) {
  GraphManager manager(graph_config(), {});
  Feeder feeder(manager, 0, 6);
  feeder.prefill(20);
  const std::vector<Index> kept{0, 1, 2, 3, 8, 9, 10, 19};
  manager.release(0, keep_tensor({{kept, kept}, {kept, kept}}).view(), Stream{});
  for (Index slot = 4; slot < 19; ++slot) {
    if (slot >= 8 && slot <= 10) continue;
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 2; ++h) {
        for (Index d = 0; d < 16; ++d) feeder.keys.set({b, h, slot, d}, kNan);
      }
    }
  }
  for (int i = 0; i < 5; ++i) feeder.reuse();
  EXPECT_EQ(manager.statistics().rows_nonfinite, 0);
  const Graphs graphs = read_graphs(manager, 0);
  for (const auto& sequence : graphs) {
    for (const Graph& graph : sequence) {
      expect_sound(graph, 2);
      for (Index position = 20; position < 25; ++position) {
        EXPECT_EQ(graph.rows[at(graph.slot_of(position))].size(),
                  at(std::min<Index>(8, 6 + position - 20)));
      }
    }
  }
}

TEST(Nonfinite, StopsNoWalk) {
  Prompt prompt = make_prompt(DType::f16, 7);
  for (Index slot = 0; slot < kTokens; slot += 3) prompt.keys.set({0, 0, slot, 0}, kNan);
  prompt.queries.fill(kNan);  // no row at all
  const WalkConfig walk{
      .num_walkers = 100,
      .walk_length = 10,
      .populations = {{.count = VisitCount::all, .share = 0.5},
                      {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.5}}};
  GraphManager manager(graph_config(), walk);
  feed(manager, prompt, true);
  EXPECT_EQ(manager.statistics().rows_nonfinite, kTokens * 4);
  manager.update_novelty(0, prompt.keys.view(), Stream{});
  manager.walk(0, {}, Stream{});
  const Vector scores = read_scores(manager, 0, -1).vector({0, 0});
  double sum = 0.0;
  for (const double score : scores) sum += score;
  EXPECT_EQ(sum, 1000.0);
  manager.solve(0, {}, Stream{});
  EXPECT_TRUE(all_finite(read_scores(manager, 0, -1).vector({0, 0})));
  const EvictionConfig eviction{.budget = 12, .interval = 4, .window = 4, .sinks = 2};
  HostTensor keep(DType::i32, {2, 2, 12});
  manager.select(0, eviction, false, keep.view(), Stream{});
  EXPECT_EQ(keep.get({0, 0, 11}), static_cast<double>(kTokens - 1));
}

TEST(Nonfinite, HasNoNoveltyWithoutFiniteKeys) {
  Prompt prompt = make_prompt(DType::f32, 8);
  prompt.keys.fill(kNan);
  const WalkConfig walk{.populations = {{.restart = Restart::novelty}}};
  GraphManager manager(graph_config(), walk);
  feed(manager, prompt, true);
  manager.update_novelty(0, prompt.keys.view(), Stream{});
  EXPECT_EQ(read_restart(manager, 0, 0).vector({0, 0}), Vector(kTokens, 0.0));
  manager.walk(0, {}, Stream{});
  manager.solve(0, {}, Stream{});
  EXPECT_EQ(read_scores(manager, 0, 0).vector({0, 0}), Vector(kTokens, 0.0));
}

TEST(Nonfinite, StaysAwayFromHugeFiniteKeys) {
  Prompt prompt = make_prompt(DType::f32, 9);
  for (Index d = 0; d < 16; ++d) prompt.keys.set({0, 0, 10, d}, 1e30);  // its square overflows
  const WalkConfig walk{.populations = {{.restart = Restart::novelty}}};
  GraphManager manager(graph_config(), walk);
  feed(manager, prompt, true);
  manager.update_novelty(0, prompt.keys.view(), Stream{});
  const Vector restart = read_restart(manager, 0, 0).vector({0, 0});
  double sum = 0.0;
  for (const double part : restart) {
    EXPECT_TRUE(std::isfinite(part));
    sum += part;
  }
  EXPECT_NEAR(sum, 1.0, 1e-5);
}

}  // namespace
}  // namespace spectralkv::test
