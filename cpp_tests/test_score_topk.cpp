#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
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

constexpr double kTolerance = 5e-6;  // fp32 scores and 32-bit cumulative probabilities

/// A row against the attention it was drawn from. Slots whose probabilities agree to `tolerance`
/// may stand for each other. What packing changes comes on top.
void expect_row(const Vector& attention, const std::vector<bool>& eligible,
                const std::vector<Edge>& row, const GraphConfig& config,
                double tolerance = kTolerance) {
  Vector candidates;
  for (std::size_t slot = 0; slot < attention.size(); ++slot) {
    if (eligible[slot] && attention[slot] > 0.0) candidates.push_back(attention[slot]);
  }
  std::sort(candidates.rbegin(), candidates.rend());
  const std::size_t edges = std::min(candidates.size(), at(config.top_k));
  candidates.resize(edges);
  const double sum = std::accumulate(candidates.begin(), candidates.end(), 0.0);
  const double total = config.edge_law == EdgeLaw::weighted ? sum : 1.0;
  // An edge that is nearly never followed may round to nothing.
  const double least = std::max(packing_error(config), 0x1p-32);
  std::size_t sure = edges;
  while (config.edge_law != EdgeLaw::uniform && sure > 0 && candidates[sure - 1] < least * total) {
    --sure;
  }
  ASSERT_GE(row.size(), sure);
  ASSERT_LE(row.size(), edges);
  if (edges == 0) return;
  const double lowest = candidates[edges - 1];
  std::set<Index> slots;
  for (const Edge& edge : row) {
    ASSERT_LT(edge.slot, count_of(attention));
    EXPECT_TRUE(eligible[at(edge.slot)]) << edge.slot;
    EXPECT_TRUE(slots.insert(edge.slot).second) << edge.slot;
    EXPECT_GE(attention[at(edge.slot)], lowest * (1.0 - tolerance)) << edge.slot;
  }
  for (const Edge& edge : row) {
    double expected = attention[at(edge.slot)] / total;
    if (config.edge_law == EdgeLaw::uniform) expected = 1.0 / static_cast<double>(edges);
    EXPECT_NEAR(edge.probability, expected, tolerance + packing_error(config)) << edge.slot;
  }
}

std::vector<bool> visible_to(const std::vector<Index>& positions, Index position) {
  std::vector<bool> visible;
  for (const Index other : positions) visible.push_back(other >= 0 && other <= position);
  return visible;
}

std::vector<bool> eligible_for(const std::vector<Index>& positions, Index position,
                               Index num_sinks) {
  std::vector<bool> eligible;
  for (const Index other : positions) eligible.push_back(other >= num_sinks && other < position);
  return eligible;
}

struct Case {
  DType dtype = DType::f32;
  Index group = 1;
  Index head_dim = 64;
  Index length = 0;
  int top_k = 8;
  EdgeLaw law = EdgeLaw::weighted;
  bool pack = true;
  GraphScope scope = GraphScope::head;
  Index num_sinks = 0;
  bool strided = false;
  ScoreOptions options{};
  Index batch = 2;
};

/// Loads `length` tokens without edges, feeds one and compares its row.
void check_update(const Case& c, Random& random, double tolerance = kTolerance) {
  const GraphConfig config{.batch_size = c.batch,
                           .num_query_heads = 2 * c.group,
                           .num_kv_heads = 2,
                           .head_dim = c.head_dim,
                           .capacity = c.length + 3,
                           .top_k = c.top_k,
                           .edge_law = c.law,
                           .pack_rows = c.pack,
                           .scope = c.scope,
                           .num_sinks = c.num_sinks,
                           .num_threads = 1};
  GraphManager manager(config, {});
  const Index graphs = manager.graphs_per_sequence();
  if (c.length > 0) {
    load_graphs(manager, 0,
                Graphs(at(c.batch), std::vector<Graph>(at(graphs), plain_graph(c.length))));
  }
  const std::vector<Index> shape{c.batch, 2, c.length + 3, c.head_dim};
  HostTensor keys =
      c.strided ? HostTensor(c.dtype, shape, {2, 0, 1, 3}, 3) : HostTensor(c.dtype, shape);
  const std::vector<Index> query_shape{c.batch, 2 * c.group, c.head_dim};
  HostTensor query =
      c.strided ? HostTensor(c.dtype, query_shape, {1, 0, 2}, 5) : HostTensor(c.dtype, query_shape);
  keys.fill_normal(random);
  query.fill_normal(random);
  for (Index b = 0; b < c.batch; ++b) {
    for (Index h = 0; h < 2; ++h) {
      for (Index slot = c.length + 1; slot < c.length + 3; ++slot) {  // nobody may read these
        for (Index d = 0; d < c.head_dim; ++d) keys.set({b, h, slot, d}, kNan);
      }
    }
  }
  manager.update(0, query.view(), keys.view(), {}, c.options, Stream{});

  ASSERT_EQ(manager.length(0), c.length + 1);
  const Graphs state = read_graphs(manager, 0);
  for (Index b = 0; b < c.batch; ++b) {
    EXPECT_EQ(manager.tokens_seen(0, b), c.length + 1);
    EXPECT_EQ(manager.tokens_held(0, b), c.length + 1);
    const std::vector<Matrix> matrices{matrix_of(keys, b, 0, c.length + 1),
                                       matrix_of(keys, b, 1, c.length + 1)};
    Matrix queries;
    for (Index h = 0; h < 2 * c.group; ++h) queries.push_back(query.vector({b, h}));
    for (Index g = 0; g < graphs; ++g) {
      SCOPED_TRACE(::testing::Message() << "sequence " << b << ", graph " << g);
      const Graph& graph = state[at(b)][at(g)];
      ASSERT_EQ(graph.positions, plain_graph(c.length + 1).positions);
      const Vector attention = graph_attention(queries, matrices, config, g,
                                               visible_to(graph.positions, c.length), c.options);
      expect_row(attention, eligible_for(graph.positions, c.length, c.num_sinks), graph.rows.back(),
                 config, tolerance);
      for (Index slot = 0; slot < c.length; ++slot) EXPECT_TRUE(graph.rows[at(slot)].empty());
    }
  }
}

TEST(ScoreTopK, EqualsTheReferenceForEveryTypeGroupAndHeadDim) {
  Random random(1);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const Index group : {1, 2, 3, 4, 8, 16}) {
      for (const Index head_dim : {64, 80, 96, 128, 256}) {
        for (const Index length : {0, 1, 7, 8, 9, 300}) {
          // The reference is slow: a part of the long rows will do.
          if (length == 300 && random.chance(0.7)) continue;
          SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", group " << group
                                            << ", head_dim " << head_dim << ", length " << length);
          check_update({.dtype = dtype,
                        .group = group,
                        .head_dim = head_dim,
                        .length = length,
                        .law = kEdgeLaws[at(random.integer(0, 2))],
                        .scope = random.chance(0.3) ? GraphScope::layer : GraphScope::head,
                        .num_sinks = random.chance(0.3) ? 4 : 0,
                        .strided = random.chance(0.5)},
                       random);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(ScoreTopK, EqualsTheReferenceForEveryTopK) {
  Random random(2);
  for (const int top_k : {4, 8, 16, 32}) {
    for (const EdgeLaw law : kEdgeLaws) {
      for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
        for (const Index length :
             {Index{0}, Index{1}, Index{top_k - 1}, Index{top_k}, Index{top_k + 1}, Index{300}}) {
          SCOPED_TRACE(::testing::Message() << "top_k " << top_k << ", length " << length);
          for (const bool pack : {true, false}) {
            check_update({.group = 2,
                          .length = length,
                          .top_k = top_k,
                          .law = law,
                          .pack = pack,
                          .scope = scope},
                         random);
          }
        }
      }
    }
  }
}

TEST(ScoreTopK, EqualsTheReferenceForOddHeadDims) {
  Random random(3);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const Index head_dim : {1, 2, 3, 5, 7, 8, 15, 17, 31, 33, 65, 100, 192, 576}) {
      SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", head_dim " << head_dim);
      check_update({.dtype = dtype, .group = 3, .head_dim = head_dim, .length = 37}, random);
    }
  }
}

TEST(ScoreTopK, EqualsTheReferenceForLongCaches) {
  Random random(14);
  for (const EdgeLaw law : {EdgeLaw::weighted, EdgeLaw::attention}) {
    check_update({.dtype = DType::bf16,
                  .group = 4,
                  .head_dim = 128,
                  .length = 4096,
                  .law = law,
                  .num_sinks = 4},
                 random);
    check_update({.dtype = DType::f32,
                  .group = 8,
                  .head_dim = 80,
                  .length = 4095,
                  .law = law,
                  .strided = true},
                 random);
    // The probabilities of 65540 tokens are small: they agree to a part of the largest of a row.
    check_update({.dtype = DType::f16,
                  .group = 2,
                  .length = 65539,
                  .top_k = 32,
                  .law = law,
                  .num_sinks = 4,
                  .batch = 1},
                 random);
  }
}

TEST(ScoreTopK, AppliesScaleAndSoftcap) {
  Random random(4);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const double scale : {0.0, 0.05, 0.5}) {
      for (const double softcap : {0.0, 0.7, 5.0, 50.0}) {
        SCOPED_TRACE(::testing::Message() << "scale " << scale << ", softcap " << softcap);
        check_update({.dtype = dtype,
                      .group = 4,
                      .length = 70,
                      .num_sinks = 4,
                      .options = {.scale = scale, .softcap = softcap}},
                     random, 2e-5);
      }
    }
  }
}

/// One sequence, one head, keys in one dimension: the score of a slot is what is written there.
class OneHead : public ::testing::Test {
 protected:
  static GraphConfig config(int top_k = 4, Index num_sinks = 0) {
    return {
        .head_dim = 1, .capacity = 64, .top_k = top_k, .num_sinks = num_sinks, .num_threads = 1};
  }
  /// Edges of the token behind `scores`, whose own score is `own`.
  static std::vector<Edge> row_of(const GraphConfig& config, const Vector& scores,
                                  double own = 0.0) {
    GraphManager manager(config, {});
    load_graphs(manager, 0, {{plain_graph(count_of(scores))}});
    HostTensor keys(DType::f32, {1, 1, count_of(scores) + 1, 1});
    for (Index slot = 0; slot < count_of(scores); ++slot) {
      keys.set({0, 0, slot, 0}, scores[at(slot)]);
    }
    keys.set({0, 0, count_of(scores), 0}, own);
    HostTensor query(DType::f32, {1, 1, 1});
    query.fill(1.0);
    manager.update(0, query.view(), keys.view(), {}, {.scale = 1.0}, Stream{});
    return read_graphs(manager, 0)[0][0].rows.back();
  }
  static std::vector<Index> slots_of(const std::vector<Edge>& row) {
    std::vector<Index> slots;
    for (const Edge& edge : row) slots.push_back(edge.slot);
    std::sort(slots.begin(), slots.end());
    return slots;
  }
};

TEST_F(OneHead, BreaksTiesByTheLowerSlot) {
  EXPECT_EQ(slots_of(row_of(config(), Vector(40, 0.5))), (std::vector<Index>{0, 1, 2, 3}));
  EXPECT_EQ(slots_of(row_of(config(4, 6), Vector(40, 0.5))), (std::vector<Index>{6, 7, 8, 9}));
  Vector scores(40, 0.5);
  scores[39] = 1.0;
  scores[20] = 2.0;
  scores[0] = 0.0;
  EXPECT_EQ(slots_of(row_of(config(), scores)), (std::vector<Index>{1, 2, 20, 39}));
  for (const int top_k : {8, 16, 32}) {
    EXPECT_EQ(slots_of(row_of(config(top_k), Vector(40, -3.0))), plain_graph(top_k).positions);
  }
}

TEST_F(OneHead, LeavesOutItselfAndSinks) {
  Vector scores(12, 0.0);
  scores[1] = 9.0;
  scores[2] = 8.0;
  const std::vector<Edge> row = row_of(config(4, 2), scores, 20.0);
  EXPECT_EQ(slots_of(row), (std::vector<Index>{2, 3, 4, 5}));
  for (const Edge& edge : row) {
    const double expected = (edge.slot == 2 ? std::exp(8.0) : 1.0) / (std::exp(8.0) + 3.0);
    EXPECT_NEAR(edge.probability, expected, kTolerance + kPackedTolerance);
  }
}

TEST_F(OneHead, LeavesOutZeroProbabilities) {
  Vector scores(12, -1e4);
  scores[3] = 0.0;
  scores[7] = 1.0;
  EXPECT_EQ(slots_of(row_of(config(), scores)), (std::vector<Index>{3, 7}));
  // Its own score takes all there is.
  EXPECT_TRUE(row_of(config(), Vector(12, -1e4), 1e4).empty());
}

TEST_F(OneHead, HoldsHugeScores) {
  for (const double base : {1e4, -1e4, 1e30, -1e30}) {
    Vector scores(12, base);
    const std::vector<Edge> row = row_of(config(), scores, base);
    EXPECT_EQ(slots_of(row), (std::vector<Index>{0, 1, 2, 3})) << base;
    for (const Edge& edge : row) {
      EXPECT_NEAR(edge.probability, 0.25, kTolerance + kPackedTolerance);
    }
  }
}

TEST(ScoreTopK, CountsOwnAndSinkAttentionInTheMeanOverHeads) {
  // Head 0 looks at itself only, head 1 at slots 1 and 2: the row is head 1's.
  const GraphConfig config{.num_query_heads = 2,
                           .num_kv_heads = 1,
                           .head_dim = 2,
                           .capacity = 8,
                           .top_k = 4,
                           .num_sinks = 1,
                           .num_threads = 1};
  GraphManager manager(config, {});
  load_graphs(manager, 0, {{plain_graph(4)}});
  HostTensor keys(DType::f32, {1, 1, 5, 2});
  keys.set({0, 0, 4, 0}, 30.0);
  keys.set({0, 0, 3, 0}, 10.0);  // head 0's favourite but for itself
  keys.set({0, 0, 1, 1}, 10.0);
  keys.set({0, 0, 2, 1}, 9.0);
  HostTensor query(DType::f32, {1, 2, 2});
  query.set({0, 0, 0}, 1.0);
  query.set({0, 1, 1}, 1.0);
  manager.update(0, query.view(), keys.view(), {}, {.scale = 1.0}, Stream{});
  const std::vector<Edge> row = read_graphs(manager, 0)[0][0].rows.back();
  for (const Edge& edge : row) {
    const double share = 1.0 / (1.0 + std::exp(-1.0));
    if (edge.slot == 1) {
      EXPECT_NEAR(edge.probability, share, 1e-3);
    }
    if (edge.slot == 2) {
      EXPECT_NEAR(edge.probability, 1.0 - share, 1e-3);
    }
    if (edge.slot == 3) {
      EXPECT_LT(edge.probability, 1e-3);
    }
  }
}

TEST(ScoreTopK, ReadsKeysThatSequencesShare) {
  const GraphConfig config{.batch_size = 3,
                           .num_query_heads = 2,
                           .num_kv_heads = 2,
                           .head_dim = 16,
                           .capacity = 30,
                           .num_threads = 1};
  GraphManager manager(config, {});
  load_graphs(manager, 0, Graphs(3, {plain_graph(20), plain_graph(20)}));
  Random random(5);
  HostTensor keys(DType::f16, {1, 2, 21, 16});
  keys.fill_normal(random);
  HostTensor query(DType::f16, {1, 2, 16});
  query.fill_normal(random);
  ConstTensorView all_keys = keys.view();
  ConstTensorView all_queries = query.view();
  all_keys.shape[0] = all_queries.shape[0] = 3;
  all_keys.strides[0] = all_queries.strides[0] = 0;
  manager.update(0, all_queries, all_keys, {}, {}, Stream{});
  const Graphs graphs = read_graphs(manager, 0);
  EXPECT_FALSE(graphs[0][0].rows.back().empty());
  EXPECT_NE(graphs[0][0], graphs[0][1]);
  EXPECT_EQ(graphs[0], graphs[1]);
  EXPECT_EQ(graphs[0], graphs[2]);
}

// -- blocks of rows

struct Prompt {
  HostTensor keys;     // (B, Hkv, S, D)
  HostTensor queries;  // (B, Hq, S, D)
};

Prompt make_prompt(const GraphConfig& config, DType dtype, Index tokens, Random& random,
                   bool strided) {
  const std::vector<Index> keys{config.batch_size, config.num_kv_heads, tokens, config.head_dim};
  const std::vector<Index> queries{config.batch_size, config.num_query_heads, tokens,
                                   config.head_dim};
  Prompt prompt = strided ? Prompt{HostTensor(dtype, keys, {0, 2, 1, 3}, 1),
                                   HostTensor(dtype, queries, {0, 2, 1, 3}, 7)}
                          : Prompt{HostTensor(dtype, keys), HostTensor(dtype, queries)};
  prompt.keys.fill_normal(random);
  prompt.queries.fill_normal(random);
  return prompt;
}

/// Tokens [first, last) of a tensor (B, H, S, D).
ConstTensorView part(const HostTensor& tensor, Index first, Index last) {
  ConstTensorView view = tensor.view();
  view.data =
      static_cast<const std::byte*>(view.data) + first * view.stride(2) * size_of(view.dtype);
  view.shape[2] = last - first;
  return view;
}

ConstTensorView token(const HostTensor& queries, Index slot) {
  ConstTensorView view = part(queries, slot, slot + 1);
  view.rank = 3;
  view.shape[2] = view.shape[3];
  view.strides[2] = view.strides[3];
  return view;
}

void expect_rows(const GraphManager& manager, const Prompt& prompt, const ScoreOptions& options) {
  const GraphConfig& config = manager.graph_config();
  const Index length = manager.length(0);
  const Graphs graphs = read_graphs(manager, 0);
  for (Index b = 0; b < config.batch_size; ++b) {
    std::vector<Matrix> keys;
    for (Index h = 0; h < config.num_kv_heads; ++h) {
      keys.push_back(matrix_of(prompt.keys, b, h, length));
    }
    for (Index slot = 0; slot < length; ++slot) {
      Matrix queries;
      for (Index h = 0; h < config.num_query_heads; ++h) {
        queries.push_back(prompt.queries.vector({b, h, slot}));
      }
      for (Index g = 0; g < manager.graphs_per_sequence(); ++g) {
        const Graph& graph = graphs[at(b)][at(g)];
        const Index position = graph.positions[at(slot)];
        SCOPED_TRACE(::testing::Message()
                     << "sequence " << b << ", graph " << g << ", slot " << slot);
        if (position < 0) {
          EXPECT_TRUE(graph.rows[at(slot)].empty());
          continue;
        }
        expect_row(graph_attention(queries, keys, config, g, visible_to(graph.positions, position),
                                   options),
                   eligible_for(graph.positions, position, config.num_sinks), graph.rows[at(slot)],
                   config, 1e-5);
      }
    }
  }
}

GraphConfig prompt_config(GraphScope scope, EdgeLaw law) {
  return {.batch_size = 2,
          .num_query_heads = 6,
          .num_kv_heads = 2,
          .head_dim = 24,
          .capacity = 80,
          .edge_law = law,
          .scope = scope,
          .num_sinks = 2,
          .num_threads = 2};
}

TEST(UpdateRows, EqualsTheReference) {
  Random random(6);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
      for (const EdgeLaw law : kEdgeLaws) {
        for (const double softcap : {0.0, 2.0}) {
          GraphConfig config = prompt_config(scope, law);
          config.pack_rows = dtype != DType::bf16;
          GraphManager manager(config, {});
          const Prompt prompt =
              make_prompt(manager.graph_config(), dtype, 50, random, softcap != 0.0);
          const RowOptions options{.score = {.softcap = softcap}, .valid = {}};
          manager.update_rows(0, prompt.queries.view(), prompt.keys.view(), options, Stream{});
          EXPECT_EQ(manager.length(0), 50);
          expect_rows(manager, prompt, options.score);
        }
      }
    }
  }
}

TEST(UpdateRows, EqualsALoopOfUpdates) {
  Random random(7);
  for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
    for (const EdgeLaw law : {EdgeLaw::weighted, EdgeLaw::attention}) {
      const GraphConfig config = prompt_config(scope, law);
      const Prompt prompt = make_prompt(config, DType::f32, 60, random, false);
      GraphManager block(config, {});
      GraphManager chunks(config, {});
      GraphManager loop(config, {});
      block.update_rows(0, prompt.queries.view(), prompt.keys.view(), {}, Stream{});
      Index first = 0;
      for (const Index last : {1, 2, 17, 49, 60}) {
        chunks.update_rows(0, part(prompt.queries, first, last), prompt.keys.view(), {}, Stream{});
        first = last;
      }
      for (Index slot = 0; slot < 60; ++slot) {
        loop.update(0, token(prompt.queries, slot), prompt.keys.view(), {}, {}, Stream{});
      }
      const Graphs expected = read_graphs(loop, 0);
      const Graphs in_block = read_graphs(block, 0);
      const Graphs in_chunks = read_graphs(chunks, 0);
      for (std::size_t b = 0; b < expected.size(); ++b) {
        for (std::size_t g = 0; g < expected[b].size(); ++g) {
          const double tolerance = 1e-5 + 2.0 * packing_error(config);
          expect_same_graph(expected[b][g], in_block[b][g], tolerance);
          expect_same_graph(expected[b][g], in_chunks[b][g], tolerance);
          expect_sound(in_block[b][g], config.num_sinks, law);
        }
      }
      for (Index b = 0; b < 2; ++b) {
        EXPECT_EQ(block.tokens_seen(0, b), 60);
        EXPECT_EQ(chunks.tokens_seen(0, b), 60);
      }
      EXPECT_EQ(block.statistics().rows_written, 60 * 2 * block.graphs_per_sequence());
      EXPECT_EQ(chunks.statistics().rows_written, block.statistics().rows_written);
      EXPECT_EQ(loop.statistics().rows_written, block.statistics().rows_written);
    }
  }
}

TEST(UpdateRows, SkipsPadding) {
  Random random(8);
  GraphManager manager(prompt_config(GraphScope::head, EdgeLaw::weighted), {});
  const GraphConfig& config = manager.graph_config();
  const Prompt prompt = make_prompt(config, DType::f32, 40, random, false);
  HostTensor valid(DType::u8, {2, 40});
  std::vector<std::vector<Index>> positions(2);
  for (Index b = 0; b < 2; ++b) {
    Index position = 0;
    for (Index slot = 0; slot < 40; ++slot) {
      // sequence 0: padded left; sequence 1: padded right and in the middle
      const bool is_token = b == 0 ? slot >= 13 : slot < 35 && slot % 7 != 3;
      valid.set({b, slot}, is_token ? 1.0 : 0.0);
      positions[at(b)].push_back(is_token ? position++ : -1);
    }
  }
  manager.update_rows(0, prompt.queries.view(), prompt.keys.view(),
                      {.score = {}, .valid = valid.view()}, Stream{});
  EXPECT_EQ(manager.length(0), 40);
  const Graphs graphs = read_graphs(manager, 0);
  for (Index b = 0; b < 2; ++b) {
    const Index tokens = *std::max_element(positions[at(b)].begin(), positions[at(b)].end()) + 1;
    EXPECT_EQ(manager.tokens_seen(0, b), tokens);
    EXPECT_EQ(manager.tokens_held(0, b), tokens);
    for (Index g = 0; g < 2; ++g) EXPECT_EQ(graphs[at(b)][at(g)].positions, positions[at(b)]);
  }
  expect_rows(manager, prompt, {});
}

TEST(UpdateRows, GivesPaddedSequencesTheirOwnRows) {
  // Sequence 0 alone, and padded to the length of another one: the same edges, 9 slots further.
  Random random(9);
  const GraphConfig config = prompt_config(GraphScope::head, EdgeLaw::weighted);
  const Prompt prompt = make_prompt(config, DType::f32, 40, random, false);
  HostTensor valid(DType::u8, {2, 40});
  valid.for_each([&](const std::vector<Index>& index) {
    valid.set(index, index[0] == 1 || index[1] >= 9 ? 1.0 : 0.0);
  });
  GraphManager batch(config, {});
  batch.update_rows(0, prompt.queries.view(), prompt.keys.view(),
                    {.score = {}, .valid = valid.view()}, Stream{});
  GraphConfig alone_config = config;
  alone_config.batch_size = 1;
  GraphManager alone(alone_config, {});
  ConstTensorView queries = part(prompt.queries, 9, 40);
  ConstTensorView keys = part(prompt.keys, 9, 40);
  queries.shape[0] = keys.shape[0] = 1;
  alone.update_rows(0, queries, keys, {}, Stream{});
  const Graphs padded = read_graphs(batch, 0);
  const Graphs plain = read_graphs(alone, 0);
  for (std::size_t g = 0; g < 2; ++g) {
    for (Index slot = 0; slot < 31; ++slot) {
      std::vector<Edge> row = plain[0][g].rows[at(slot)];
      for (Edge& edge : row) edge.slot += 9;
      EXPECT_EQ(plain[0][g].positions[at(slot)], padded[0][g].positions[at(slot + 9)]);
      expect_same_row(row, padded[0][g].rows[at(slot + 9)], 1e-6 + 2.0 * packing_error(config));
    }
  }
}

TEST(UpdateRows, DrawsEveryNthRowFromTheNewest) {
  Random random(10);
  const GraphConfig config = prompt_config(GraphScope::head, EdgeLaw::weighted);
  const Prompt prompt = make_prompt(config, DType::f32, 40, random, false);
  GraphManager every(config, {});
  every.update_rows(0, prompt.queries.view(), prompt.keys.view(), {}, Stream{});
  const Graphs all = read_graphs(every, 0);
  for (const Index stride : {2, 3, 7, 100}) {
    GraphManager some(config, {});
    some.update_rows(0, prompt.queries.view(), prompt.keys.view(),
                     {.score = {}, .valid = {}, .row_stride = stride}, Stream{});
    EXPECT_EQ(some.length(0), 40);
    EXPECT_EQ(some.statistics().rows_written, ((39 / stride) + 1) * 2 * 2);
    const Graphs strided = read_graphs(some, 0);
    for (std::size_t b = 0; b < 2; ++b) {
      for (std::size_t g = 0; g < 2; ++g) {
        Graph expected = all[b][g];
        for (Index slot = 0; slot < 40; ++slot) {
          if ((39 - slot) % stride != 0) expected.rows[at(slot)].clear();
        }
        expect_same_graph(expected, strided[b][g], 1e-6 + 2.0 * packing_error(config));
      }
    }
  }
}

TEST(UpdateRows, CountsTheStrideOverTokens) {
  // Padding on the right or in between moves no row: a sequence has the rows that it has alone.
  Random random(13);
  const GraphConfig config = prompt_config(GraphScope::head, EdgeLaw::weighted);
  const Prompt prompt = make_prompt(config, DType::f32, 40, random, false);
  HostTensor valid(DType::u8, {2, 40});
  valid.for_each([&](const std::vector<Index>& index) {
    valid.set(index, index[0] == 0 ? (index[1] < 33 ? 1.0 : 0.0) : (index[1] % 4 == 1 ? 0.0 : 1.0));
  });
  GraphManager every(config, {});
  every.update_rows(0, prompt.queries.view(), prompt.keys.view(),
                    {.score = {}, .valid = valid.view()}, Stream{});
  GraphManager some(config, {});
  some.update_rows(0, prompt.queries.view(), prompt.keys.view(),
                   {.score = {}, .valid = valid.view(), .row_stride = 5}, Stream{});
  const Graphs all = read_graphs(every, 0);
  const Graphs strided = read_graphs(some, 0);
  for (std::size_t b = 0; b < 2; ++b) {
    for (std::size_t g = 0; g < 2; ++g) {
      Graph expected = all[b][g];
      for (Index slot = 0; slot < 40; ++slot) {
        const Index position = expected.positions[at(slot)];
        if ((expected.seen() - 1 - position) % 5 != 0) expected.rows[at(slot)].clear();
      }
      expect_same_graph(expected, strided[b][g], 1e-6 + 2.0 * packing_error(config));
    }
  }
}

TEST(UpdateRows, AdmitsTokensWithoutRows) {
  // One by one between updates, and in a block with padding: a token without a row takes its slot
  // and position, and later rows are what they would be had it one.
  Random random(14);
  for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
    const GraphConfig config = prompt_config(scope, EdgeLaw::weighted);
    const Prompt prompt = make_prompt(config, DType::f32, 40, random, false);
    HostTensor valid(DType::u8, {2, 10});
    valid.for_each([&](const std::vector<Index>& index) {
      valid.set(index, index[0] == 0 || index[1] % 3 != 1 ? 1.0 : 0.0);
    });
    GraphManager all(config, {});
    GraphManager some(config, {});
    const auto add = [&](GraphManager& manager, Index first, Index last, Index stride) {
      manager.update_rows(0, part(prompt.queries, first, last), prompt.keys.view(),
                          {.score = {},
                           .valid = first == 30 ? std::as_const(valid).view() : ConstTensorView{},
                           .row_stride = stride},
                          Stream{});
    };
    for (Index slot = 0; slot < 30; ++slot) {
      add(all, slot, slot + 1, 1);
      add(some, slot, slot + 1, slot % 4 == 3 ? 1 : 0);
    }
    add(all, 30, 40, 1);
    add(some, 30, 40, 0);
    EXPECT_EQ(some.length(0), 40);
    EXPECT_EQ(some.statistics().rows_written, 7 * 2 * some.graphs_per_sequence());
    const Graphs drawn = read_graphs(all, 0);
    const Graphs sampled = read_graphs(some, 0);
    for (Index b = 0; b < 2; ++b) {
      EXPECT_EQ(some.tokens_seen(0, b), all.tokens_seen(0, b));
      EXPECT_EQ(some.tokens_held(0, b), all.tokens_held(0, b));
      for (std::size_t g = 0; g < drawn[at(b)].size(); ++g) {
        Graph expected = drawn[at(b)][g];
        for (Index slot = 0; slot < 40; ++slot) {
          if (slot >= 30 || slot % 4 != 3) expected.rows[at(slot)].clear();
        }
        expect_same_graph(expected, sampled[at(b)][g], 0.0);
      }
    }
  }
}

TEST(UpdateRows, ReadsNothingOfTokensWithoutRows) {
  const GraphConfig config = prompt_config(GraphScope::head, EdgeLaw::weighted);
  GraphManager manager(config, {});
  Prompt prompt{HostTensor(DType::f32, {2, 2, 4, 24}), HostTensor(DType::f32, {2, 6, 4, 24})};
  const auto spoil = [](HostTensor& tensor) {
    tensor.for_each([&](const std::vector<Index>& index) {
      tensor.set(index, std::numeric_limits<double>::quiet_NaN());
    });
  };
  spoil(prompt.keys);
  spoil(prompt.queries);
  for (const auto& [first, last] : {std::pair<Index, Index>{0, 1}, {1, 4}}) {
    manager.update_rows(0, part(prompt.queries, first, last), prompt.keys.view(),
                        {.score = {}, .valid = {}, .row_stride = 0}, Stream{});
  }
  EXPECT_EQ(manager.tokens_held(0, 1), 4);
  EXPECT_EQ(manager.statistics().rows_written, 0);
  EXPECT_EQ(manager.statistics().rows_nonfinite, 0);
}

TEST(UpdateRows, TakesNoTokens) {
  Random random(11);
  const GraphConfig config = prompt_config(GraphScope::head, EdgeLaw::weighted);
  GraphManager manager(config, {});
  const Prompt prompt = make_prompt(config, DType::f32, 10, random, false);
  manager.update_rows(0, part(prompt.queries, 0, 0), prompt.keys.view(), {}, Stream{});
  EXPECT_EQ(manager.length(0), 0);
  HostTensor valid(DType::u8, {2, 10});
  manager.update_rows(0, prompt.queries.view(), prompt.keys.view(),
                      {.score = {}, .valid = valid.view()}, Stream{});
  EXPECT_EQ(manager.length(0), 10);
  EXPECT_EQ(manager.tokens_seen(0, 0), 0);
  EXPECT_EQ(manager.tokens_held(0, 1), 0);
}

TEST(UpdateRows, SeesWhatWasThereBefore) {
  // A draft behind an evicted cache: slots in any order of positions, some of them empty.
  Random random(12);
  GraphConfig config = prompt_config(GraphScope::head, EdgeLaw::weighted);
  config.batch_size = 1;
  GraphManager manager(config, {});
  const GraphShape shape{.slots = 40, .tokens = 30, .seen = 90, .num_sinks = 2};
  const Graph first = random_graph(random, shape, config.top_k, config.edge_law);
  const Graph second = random_graph(random, shape, config.top_k, config.edge_law);
  load_graphs(manager, 0, {{first, second}});
  EXPECT_EQ(manager.tokens_seen(0, 0), 90);
  EXPECT_EQ(manager.tokens_held(0, 0), 30);
  const Prompt prompt = make_prompt(config, DType::f32, 45, random, false);
  manager.update_rows(0, part(prompt.queries, 40, 45), prompt.keys.view(), {}, Stream{});
  const Graphs graphs = read_graphs(manager, 0);
  for (Index g = 0; g < 2; ++g) {
    const Graph& graph = graphs[0][at(g)];
    const Graph& before = g == 0 ? first : second;
    std::vector<Index> positions = before.positions;
    positions.insert(positions.end(), {90, 91, 92, 93, 94});
    ASSERT_EQ(graph.positions, positions);
    const std::vector<Matrix> keys{matrix_of(prompt.keys, 0, 0, 45),
                                   matrix_of(prompt.keys, 0, 1, 45)};
    for (Index slot = 0; slot < 40; ++slot) {
      expect_same_row(before.rows[at(slot)], graph.rows[at(slot)], 1e-6 + packing_error(config));
    }
    for (Index slot = 40; slot < 45; ++slot) {
      Matrix queries;
      for (Index h = 0; h < 6; ++h) queries.push_back(prompt.queries.vector({0, h, slot}));
      const Index position = positions[at(slot)];
      expect_row(graph_attention(queries, keys, config, g, visible_to(positions, position), {}),
                 eligible_for(positions, position, 2), graph.rows[at(slot)], config, 1e-5);
    }
  }
}

}  // namespace
}  // namespace spectralkv::test
