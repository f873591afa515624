// Attention of one token with its row of the graph, and without a graph.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "expect.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

/// Of a mean of standard normal values: the rounding of `dtype` in weights and result.
double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return 4e-3;
    case DType::bf16:
      return 3e-2;
    default:
      return 2e-5;
  }
}

/// Means of the values by the attention over `visible`; NaN where nothing is seen.
Vector mean_value(const Vector& query, const Matrix& keys, const Matrix& values,
                  const std::vector<bool>& visible, const ScoreOptions& options) {
  const Vector weights = attention(query, keys, visible, options);
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  Vector mean(query.size(), sum > 0.0 ? 0.0 : kNan);
  for (std::size_t j = 0; j < weights.size(); ++j) {
    if (weights[j] == 0.0) continue;
    for (std::size_t d = 0; d < mean.size(); ++d) mean[d] += weights[j] * values[j][d];
  }
  return mean;
}

struct Case {
  DType dtype = DType::f32;
  Index group = 1;
  Index head_dim = 64;
  Index length = 0;
  int top_k = 8;
  EdgeLaw law = EdgeLaw::weighted;
  GraphScope scope = GraphScope::head;
  Index num_sinks = 0;
  bool strided = false;
  ScoreOptions options{};
  Index batch = 2;
  double tolerance = 0.0;  ///< 0: that of the type
};

struct Tensors {
  HostTensor query;
  HostTensor keys;
  HostTensor values;
  HostTensor out;
};

Tensors make_tensors(const Case& c, Index slots, Random& random) {
  const auto make = [&](const std::vector<Index>& shape, const std::vector<int>& order, Index gap) {
    return c.strided ? HostTensor(c.dtype, shape, order, gap) : HostTensor(c.dtype, shape);
  };
  const std::vector<Index> cache{c.batch, 2, slots, c.head_dim};
  const std::vector<Index> token{c.batch, 2 * c.group, c.head_dim};
  Tensors tensors{.query = make(token, {1, 0, 2}, 5),
                  .keys = make(cache, {2, 0, 1, 3}, 3),
                  .values = make(cache, {0, 2, 1, 3}, 1),
                  .out = make(token, {1, 0, 2}, 3)};
  tensors.query.fill_normal(random);
  tensors.keys.fill_normal(random);
  tensors.values.fill_normal(random);
  return tensors;
}

/// Nobody may read this slot.
void poison(Tensors& tensors, Index b, Index h, Index slot) {
  for (Index d = 0; d < tensors.keys.size(3); ++d) {
    tensors.keys.set({b, h, slot, d}, kNan);
    tensors.values.set({b, h, slot, d}, kNan);
  }
}

/// `visible(b, h)`: of each slot.
template <class Visible>
void expect_output(const Tensors& tensors, const Case& c, Index length, Visible&& visible) {
  const double tolerance = c.tolerance > 0.0 ? c.tolerance : tolerance_of(c.dtype);
  for (Index b = 0; b < c.batch; ++b) {
    for (Index h = 0; h < 2; ++h) {
      const Matrix keys = matrix_of(tensors.keys, b, h, length);
      const Matrix values = matrix_of(tensors.values, b, h, length);
      for (Index q = h * c.group; q < (h + 1) * c.group; ++q) {
        const Vector expected =
            mean_value(tensors.query.vector({b, q}), keys, values, visible(b, h), c.options);
        const Vector actual = tensors.out.vector({b, q});
        for (std::size_t d = 0; d < expected.size(); ++d) {
          ASSERT_NEAR(actual[d], expected[d], tolerance)
              << "sequence " << b << ", query head " << q << ", element " << d;
        }
      }
    }
  }
  EXPECT_TRUE(tensors.out.gaps_untouched());
}

GraphConfig config_of(const Case& c, Index capacity) {
  return {.batch_size = c.batch,
          .num_query_heads = 2 * c.group,
          .num_kv_heads = 2,
          .head_dim = c.head_dim,
          .capacity = capacity,
          .top_k = c.top_k,
          .edge_law = c.law,
          .scope = c.scope,
          .num_sinks = c.num_sinks,
          .num_threads = 1};
}

void expect_same_state(const GraphManager& expected, const GraphManager& actual) {
  ASSERT_EQ(expected.length(0), actual.length(0));
  const Statistics statistics = actual.statistics();
  EXPECT_EQ(expected.statistics().rows_written, statistics.rows_written);
  EXPECT_EQ(expected.statistics().rows_nonfinite, statistics.rows_nonfinite);
  const Graphs updated = read_graphs(expected, 0);
  const Graphs attended = read_graphs(actual, 0);
  for (std::size_t b = 0; b < updated.size(); ++b) {
    EXPECT_EQ(expected.tokens_seen(0, static_cast<Index>(b)),
              actual.tokens_seen(0, static_cast<Index>(b)));
    EXPECT_EQ(expected.tokens_held(0, static_cast<Index>(b)),
              actual.tokens_held(0, static_cast<Index>(b)));
    for (std::size_t g = 0; g < updated[b].size(); ++g) {
      expect_same_graph(updated[b][g], attended[b][g],
                        1e-5 + 2.0 * packing_error(actual.graph_config()));
    }
  }
}

/// Loads `length` tokens, feeds one to `attend` and to `update` of a twin, and compares the output
/// with the reference and the graphs with each other.
void check_attend(const Case& c, Random& random) {
  const GraphConfig config = config_of(c, c.length + 3);
  GraphManager manager(config, {});
  GraphManager twin(config, {});
  if (c.length > 0) {
    const Graphs graphs(
        at(c.batch), std::vector<Graph>(at(manager.graphs_per_sequence()), plain_graph(c.length)));
    load_graphs(manager, 0, graphs);
    load_graphs(twin, 0, graphs);
  }
  Tensors tensors = make_tensors(c, c.length + 3, random);
  for (Index b = 0; b < c.batch; ++b) {
    for (Index h = 0; h < 2; ++h) {
      for (Index slot = c.length + 1; slot < c.length + 3; ++slot) poison(tensors, b, h, slot);
    }
  }
  manager.attend(0, tensors.query.view(), tensors.keys.view(), tensors.values.view(), {},
                 tensors.out.view(), c.options, Stream{});
  twin.update(0, tensors.query.view(), tensors.keys.view(), {}, c.options, Stream{});
  expect_output(tensors, c, c.length + 1,
                [&](Index, Index) { return std::vector<bool>(at(c.length + 1), true); });
  expect_same_state(twin, manager);
}

TEST(Attend, EqualsTheReferenceForEveryTypeGroupAndHeadDim) {
  Random random(21);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const Index group : {1, 2, 3, 4, 8, 16}) {
      for (const Index head_dim : {64, 80, 96, 128, 256}) {
        for (const Index length : {0, 1, 7, 8, 9, 300}) {
          // The reference is slow: a part of the long caches will do.
          if (length == 300 && random.chance(0.7)) continue;
          SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", group " << group
                                            << ", head_dim " << head_dim << ", length " << length);
          check_attend({.dtype = dtype,
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

TEST(Attend, EqualsTheReferenceForOddShapes) {
  Random random(22);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const Index head_dim : {1, 3, 8, 17, 33, 100, 192}) {
      SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", head_dim " << head_dim);
      check_attend({.dtype = dtype, .group = 3, .head_dim = head_dim, .length = 37}, random);
    }
    check_attend({.dtype = dtype, .group = 20, .length = 50}, random);
  }
}

TEST(Attend, EqualsTheReferenceForLongCaches) {
  Random random(23);
  for (const EdgeLaw law : {EdgeLaw::weighted, EdgeLaw::attention}) {
    check_attend({.dtype = DType::bf16,
                  .group = 4,
                  .head_dim = 128,
                  .length = 4096,
                  .law = law,
                  .num_sinks = 4},
                 random);
    check_attend({.dtype = DType::f32,
                  .group = 8,
                  .head_dim = 80,
                  .length = 4095,
                  .law = law,
                  .strided = true},
                 random);
  }
  check_attend({.dtype = DType::f16, .group = 2, .length = 65539, .num_sinks = 4, .batch = 1},
               random);
}

TEST(Attend, AppliesScaleAndSoftcap) {
  Random random(24);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const double scale : {0.0, 0.5}) {
      for (const double softcap : {0.0, 0.7, 50.0}) {
        SCOPED_TRACE(::testing::Message() << "scale " << scale << ", softcap " << softcap);
        check_attend({.dtype = dtype,
                      .group = 4,
                      .length = 70,
                      .num_sinks = 4,
                      .options = {.scale = scale, .softcap = softcap}},
                     random);
      }
    }
  }
}

TEST(Attend, FollowsAHeadThatStandsOut) {
  // One slot after the other outweighs all before it: what was summed up counts no more.
  const Case c{.dtype = DType::f16, .group = 4, .length = 400, .batch = 1};
  const GraphConfig config = config_of(c, c.length + 1);
  GraphManager manager(config, {});
  load_graphs(manager, 0, {{plain_graph(c.length), plain_graph(c.length)}});
  Random random(25);
  Tensors tensors = make_tensors(c, c.length + 1, random);
  tensors.query.fill(1.0);
  tensors.keys.for_each([&](const std::vector<Index>& index) {
    tensors.keys.set(index, 0.02 * static_cast<double>(index[2]));
  });
  manager.attend(0, tensors.query.view(), tensors.keys.view(), tensors.values.view(), {},
                 tensors.out.view(), {.scale = 1.0}, Stream{});
  Case same = c;
  same.options.scale = 1.0;
  expect_output(tensors, same, c.length + 1,
                [&](Index, Index) { return std::vector<bool>(at(c.length + 1), true); });
}

TEST(Attend, TakesFreeSlotsAndPassesOverEmptyOnes) {
  Random random(26);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
      for (const Index head_dim : {20, 64}) {
        const Case c{
            .dtype = dtype, .group = 4, .head_dim = head_dim, .scope = scope, .num_sinks = 2};
        const GraphConfig config = config_of(c, 120);
        GraphManager manager(config, {});
        GraphManager twin(config, {});
        const GraphShape shape{.slots = 100, .tokens = 70, .seen = 160, .num_sinks = 2};
        Graphs graphs(at(c.batch));
        for (std::vector<Graph>& sequence : graphs) {
          for (Index g = 0; g < manager.graphs_per_sequence(); ++g) {
            sequence.push_back(random_graph(random, shape, config.top_k, config.edge_law));
          }
        }
        load_graphs(manager, 0, graphs);
        load_graphs(twin, 0, graphs);
        HostTensor slots(DType::i32, {2, 2});
        manager.next_slots(0, slots.view(), Stream{});
        Tensors tensors = make_tensors(c, 120, random);
        std::vector<std::vector<std::vector<bool>>> visible(2);
        for (Index b = 0; b < 2; ++b) {
          for (Index h = 0; h < 2; ++h) {
            const Graph& graph = graphs[at(b)][scope == GraphScope::head ? at(h) : 0];
            visible[at(b)].emplace_back();
            for (Index slot = 0; slot < 120; ++slot) {
              const bool own = slot == slots.get_index({b, h});
              const bool seen = own || (slot < 100 && graph.live(slot));
              if (slot < 100) visible[at(b)].back().push_back(seen);
              if (!seen) poison(tensors, b, h, slot);
            }
          }
        }
        manager.attend(0, tensors.query.view(), tensors.keys.view(), tensors.values.view(),
                       slots.view(), tensors.out.view(), {}, Stream{});
        twin.update(0, tensors.query.view(), tensors.keys.view(), slots.view(), {}, Stream{});
        expect_output(tensors, c, 100, [&](Index b, Index h) { return visible[at(b)][at(h)]; });
        expect_same_state(twin, manager);
      }
    }
  }
}

TEST(Attend, CountsRowsThatAreNotFinite) {
  for (const bool in_query : {true, false}) {
    const Case c{.group = 2, .length = 40, .batch = 1};
    const GraphConfig config = config_of(c, 48);
    GraphManager manager(config, {});
    load_graphs(manager, 0, {{plain_graph(40), plain_graph(40)}});
    Random random(27);
    Tensors tensors = make_tensors(c, 48, random);
    if (in_query) {
      tensors.query.set({0, 1, 5}, kNan);
    } else {
      tensors.keys.set({0, 0, 40, 5}, kInfinity);
    }
    manager.attend(0, tensors.query.view(), tensors.keys.view(), tensors.values.view(), {},
                   tensors.out.view(), {}, Stream{});
    EXPECT_EQ(manager.statistics().rows_written, 2);
    EXPECT_EQ(manager.statistics().rows_nonfinite, 1);
    const Graphs graphs = read_graphs(manager, 0);
    EXPECT_TRUE(graphs[0][0].rows[40].empty());
    EXPECT_FALSE(graphs[0][1].rows[40].empty());
    if (in_query) {
      for (Index d = 0; d < c.head_dim; ++d) {
        EXPECT_TRUE(std::isnan(tensors.out.get({0, 1, d}))) << d;
        EXPECT_FALSE(std::isnan(tensors.out.get({0, 0, d}))) << d;
      }
      continue;
    }
    expect_output(tensors, c, 41, [&](Index, Index) { return std::vector<bool>(41, true); });
  }
}

TEST(DecodeAttention, EqualsTheReference) {
  Random random(28);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const Index length : {1, 15, 16, 17, 333}) {
      for (const bool marked : {false, true}) {
        const Case c{.dtype = dtype,
                     .group = random.integer(1, 9),
                     .head_dim = 8 * random.integer(1, 32),
                     .strided = random.chance(0.5),
                     .options = {.softcap = random.chance(0.3) ? 3.0 : 0.0}};
        SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", group " << c.group
                                          << ", head_dim " << c.head_dim << ", length " << length);
        Tensors tensors = make_tensors(c, length + 5, random);
        HostTensor positions(DType::i32, {2, 2, length + 2}, {1, 0, 2}, 3);
        std::vector<std::vector<std::vector<bool>>> visible(2);
        for (Index b = 0; b < 2; ++b) {
          for (Index h = 0; h < 2; ++h) {
            visible[at(b)].emplace_back();
            for (Index slot = 0; slot < length + 5; ++slot) {
              const bool seen = slot < length && (!marked || slot == 0 || random.chance(0.6));
              if (slot < length) visible[at(b)].back().push_back(seen);
              if (slot < length + 2) {
                positions.set({b, h, slot}, seen ? static_cast<double>(slot) : -1.0);
              }
              if (!seen) poison(tensors, b, h, slot);
            }
          }
        }
        decode_attention(tensors.query.view(), tensors.keys.view(), tensors.values.view(),
                         marked ? std::as_const(positions).view() : ConstTensorView{}, length,
                         tensors.out.view(), c.options);
        expect_output(tensors, c, length, [&](Index b, Index h) { return visible[at(b)][at(h)]; });
        if (HasFailure()) return;
      }
    }
  }
}

TEST(DecodeAttention, EqualsTheReferenceForLongCaches) {
  Random random(29);
  const Case c{.dtype = DType::bf16, .group = 4, .head_dim = 128, .batch = 1};
  Tensors tensors = make_tensors(c, 9000, random);
  decode_attention(tensors.query.view(), tensors.keys.view(), tensors.values.view(), {}, 9000,
                   tensors.out.view(), {});
  expect_output(tensors, c, 9000, [&](Index, Index) { return std::vector<bool>(9000, true); });
}

TEST(DecodeAttention, IsNanWhereNothingIsSeen) {
  Random random(30);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Case c{.dtype = dtype, .group = 2};
    Tensors tensors = make_tensors(c, 40, random);
    HostTensor positions(DType::i32, {2, 2, 40});
    for (Index slot = 0; slot < 40; ++slot) positions.set({1, 0, slot}, -1.0);
    decode_attention(tensors.query.view(), tensors.keys.view(), tensors.values.view(),
                     positions.view(), 40, tensors.out.view(), {});
    EXPECT_TRUE(std::isnan(tensors.out.get({1, 0, 0})));
    EXPECT_TRUE(std::isnan(tensors.out.get({1, 1, 63})));
    EXPECT_FALSE(std::isnan(tensors.out.get({1, 2, 0})));
    EXPECT_FALSE(std::isnan(tensors.out.get({0, 0, 0})));
    decode_attention(tensors.query.view(), tensors.keys.view(), tensors.values.view(), {}, 0,
                     tensors.out.view(), {});
    EXPECT_TRUE(std::isnan(tensors.out.get({0, 0, 0})));
  }
}

}  // namespace
}  // namespace spectralkv::test
