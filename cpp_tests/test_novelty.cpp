#include <gtest/gtest.h>

#include <algorithm>
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

const WalkConfig kWalk{.populations = {{.restart = Restart::novelty}}};

GraphConfig graph_config(Index head_dim = 16) {
  return {.batch_size = 2,
          .num_query_heads = 2,
          .num_kv_heads = 2,
          .head_dim = head_dim,
          .capacity = 100,
          .num_threads = 1};
}

/// Weights are integers with the largest at 2^20.
void expect_distribution(const Vector& expected, const Vector& actual) {
  ASSERT_EQ(expected.size(), actual.size());
  const double tolerance = 1e-5 * *std::max_element(expected.begin(), expected.end());
  for (std::size_t slot = 0; slot < expected.size(); ++slot) {
    EXPECT_NEAR(expected[slot], actual[slot], tolerance) << "slot " << slot;
  }
}

/// Keys that point mostly one way, some of them far off it.
void fill_keys(HostTensor& keys, Random& random) {
  keys.for_each([&](const std::vector<Index>& index) {
    const double scale = index[2] % 9 == 5 ? 3.0 : 0.7;
    keys.set(index, std::cos(static_cast<double>(index[3])) + scale * random.normal());
  });
}

Graphs with_gaps(Random& random, Index length) {
  Graphs graphs(2);
  for (auto& sequence : graphs) {
    for (int g = 0; g < 2; ++g) {
      sequence.push_back(random_graph(
          random, {.slots = length, .tokens = std::max<Index>(1, length - 6), .seen = length + 20},
          8, EdgeLaw::weighted));
    }
  }
  return graphs;
}

TEST(Novelty, IsTheSoftmaxOfTheDistanceFromTheMeanDirection) {
  Random random(1);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const Index head_dim : {3, 64, 80, 96, 128, 256}) {
      for (const bool strided : {false, true}) {
        SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", head_dim " << head_dim);
        GraphManager manager(graph_config(head_dim), kWalk);
        const Graphs graphs = with_gaps(random, 80);
        load_graphs(manager, 0, graphs);
        const std::vector<Index> shape{2, 2, 90, head_dim};
        HostTensor keys =
            strided ? HostTensor(dtype, shape, {2, 1, 0, 3}, 1) : HostTensor(dtype, shape);
        fill_keys(keys, random);
        for (Index slot = 0; slot < 90; ++slot) {  // empty slots may hold anything
          for (Index b = 0; b < 2; ++b) {
            for (Index h = 0; h < 2; ++h) {
              if (slot < 80 && graphs[at(b)][at(h)].live(slot)) continue;
              for (Index d = 0; d < head_dim; ++d) keys.set({b, h, slot, d}, kNan);
            }
          }
        }
        manager.update_novelty(0, keys.view(), Stream{});
        const HostTensor restart = read_restart(manager, 0, 0);
        for (Index b = 0; b < 2; ++b) {
          for (Index h = 0; h < 2; ++h) {
            const Vector expected =
                restart_novelty(graphs[at(b)][at(h)], matrix_of(keys, b, h, 80), 4);
            expect_distribution(expected, restart.vector({b, h}));
          }
        }
      }
    }
  }
}

TEST(Novelty, ComparesKeysAsTheyWereBeforeTheyWereTurned) {
  Random random(11);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const Index head_dim : {6, 64, 80, 128, 256}) {
      for (const bool interleaved : {false, true}) {
        for (const Index pairs : {head_dim / 2, head_dim / 4}) {
          SCOPED_TRACE(::testing::Message()
                       << name_of(dtype) << ", head_dim " << head_dim << ", " << pairs << " pairs");
          GraphConfig config = graph_config(head_dim);
          config.rotary.interleaved = interleaved;
          for (Index i = 0; i < pairs; ++i) {
            config.rotary.inv_freq.push_back(
                std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(pairs)));
          }
          GraphManager manager(config, kWalk);
          Graphs graphs = with_gaps(random, 80);
          // Tokens of a long text, of which these are left.
          for (auto& sequence : graphs) {
            for (Graph& graph : sequence) {
              for (Index& position : graph.positions) {
                if (position >= 0) position = 40 * position + 1234567;
              }
            }
          }
          load_graphs(manager, 0, graphs);
          HostTensor keys(dtype, {2, 2, 80, head_dim});
          fill_keys(keys, random);
          manager.update_novelty(0, keys.view(), Stream{});
          const HostTensor restart = read_restart(manager, 0, 0);
          for (Index b = 0; b < 2; ++b) {
            for (Index h = 0; h < 2; ++h) {
              const Graph& graph = graphs[at(b)][at(h)];
              Matrix plain = matrix_of(keys, b, h, 80);
              for (std::size_t slot = 0; slot < plain.size(); ++slot) {
                if (graph.positions[slot] < 0) continue;
                plain[slot] = unturned(plain[slot], config.rotary, graph.positions[slot]);
              }
              expect_distribution(restart_novelty(graph, plain, 4), restart.vector({b, h}));
            }
          }
        }
      }
    }
  }
}

TEST(Novelty, LeavesOutWhatIsNotFinite) {
  Random random(2);
  GraphManager manager(graph_config(), kWalk);
  const Graphs graphs = with_gaps(random, 60);
  load_graphs(manager, 0, graphs);
  HostTensor keys(DType::f32, {2, 2, 60, 16});
  fill_keys(keys, random);
  for (Index slot = 1; slot < 60; slot += 7) {
    keys.set({0, 1, slot, slot % 16}, slot % 2 == 0 ? kNan : kInfinity);
  }
  manager.update_novelty(0, keys.view(), Stream{});
  const HostTensor restart = read_restart(manager, 0, 0);
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 2; ++h) {
      expect_distribution(restart_novelty(graphs[at(b)][at(h)], matrix_of(keys, b, h, 60), 4),
                          restart.vector({b, h}));
    }
  }
}

TEST(Novelty, AveragesTheHeadsOfALayer) {
  GraphConfig config = graph_config();
  config.scope = GraphScope::layer;
  config.batch_size = 1;
  GraphManager manager(config, kWalk);
  load_graphs(manager, 0, {{plain_graph(50)}});
  Random random(3);
  HostTensor keys(DType::f32, {1, 2, 50, 16});
  fill_keys(keys, random);
  manager.update_novelty(0, keys.view(), Stream{});
  // exp of the mean z-score: the geometric mean of the heads' weights
  const Vector first = restart_novelty(plain_graph(50), matrix_of(keys, 0, 0, 50), 4, 1);
  const Vector second = restart_novelty(plain_graph(50), matrix_of(keys, 0, 1, 50), 4, 1);
  Vector expected;
  for (std::size_t v = 0; v < first.size(); ++v) {
    expected.push_back(std::sqrt(first[v] * second[v]));
  }
  const Vector shared = shared_weights(plain_graph(50), expected, WalkConfig{}.novelty_width);
  expect_distribution(normalized(shared), read_restart(manager, 0, 0).vector({0, 0}));
}

TEST(Novelty, IsSharedAmongNeighboursInTheText) {
  Random random(12);
  for (const Index width : {1, 3, 9, 1023}) {
    for (const bool shuffled : {false, true}) {
      SCOPED_TRACE(::testing::Message() << "width " << width << ", shuffled " << shuffled);
      WalkConfig walk = kWalk;
      walk.novelty_width = width;
      GraphManager manager(graph_config(), walk);
      Graphs graphs = with_gaps(random, 90);
      for (auto& sequence : graphs) {
        for (Graph& graph : sequence) {
          graph = plain_graph(90);
          // Runs of the text with gaps between them, and two empty slots.
          for (Index& position : graph.positions) position += position / 7 * 4;
          graph.positions[11] = graph.positions[50] = -1;
          if (shuffled) random.shuffle(graph.positions);
        }
      }
      load_graphs(manager, 0, graphs);
      HostTensor keys(DType::f32, {2, 2, 90, 16});
      fill_keys(keys, random);
      keys.set({0, 0, 30, 3}, kNan);
      manager.update_novelty(0, keys.view(), Stream{});
      const HostTensor restart = read_restart(manager, 0, 0);
      for (Index b = 0; b < 2; ++b) {
        for (Index h = 0; h < 2; ++h) {
          expect_distribution(
              restart_novelty(graphs[at(b)][at(h)], matrix_of(keys, b, h, 90), 4, width),
              restart.vector({b, h}));
        }
      }
    }
  }
}

TEST(Novelty, IsUniformOverEqualKeys) {
  GraphManager manager(graph_config(), kWalk);
  load_graphs(manager, 0, Graphs(2, {plain_graph(20), plain_graph(20)}));
  HostTensor keys(DType::f32, {2, 2, 20, 16});
  keys.fill(0.3);
  keys.for_each([&](const std::vector<Index>& index) {
    if (index[0] == 1) keys.set(index, 0.0);  // without any direction
  });
  manager.update_novelty(0, keys.view(), Stream{});
  for (Index b = 0; b < 2; ++b) {
    const Vector restart = read_restart(manager, 0, 0).vector({b, 0});
    for (std::size_t slot = 0; slot < 20; ++slot) {
      EXPECT_NEAR(restart[slot], slot < 4 ? 0.0 : 1.0 / 16.0, 1e-6) << "sequence " << b;
    }
  }
}

TEST(Novelty, HoldsForOneToken) {
  GraphConfig config = graph_config();
  config.num_sinks = 0;
  GraphManager manager(config, kWalk);
  load_graphs(manager, 0, Graphs(2, {plain_graph(1), plain_graph(1)}));
  HostTensor keys(DType::bf16, {2, 2, 1, 16});
  keys.fill(1.0);
  manager.update_novelty(0, keys.view(), Stream{});
  EXPECT_NEAR(read_restart(manager, 0, 0).get({0, 0, 0}), 1.0, 1e-6);
}

TEST(Novelty, DoesNotDependOnTheScaleOfKeys) {
  Random random(4);
  GraphManager manager(graph_config(), kWalk);
  load_graphs(manager, 0, Graphs(2, {plain_graph(60), plain_graph(60)}));
  HostTensor keys(DType::f32, {2, 2, 60, 16});
  fill_keys(keys, random);
  HostTensor scaled = keys;
  scaled.for_each([&](const std::vector<Index>& index) {
    scaled.set(index, keys.get(index) * std::ldexp(1.0, static_cast<int>(index[2] % 50) - 25));
  });
  manager.update_novelty(0, keys.view(), Stream{});
  const Vector expected = read_restart(manager, 0, 0).vector({1, 1});
  manager.update_novelty(0, scaled.view(), Stream{});
  expect_distribution(expected, read_restart(manager, 0, 0).vector({1, 1}));
}

TEST(Novelty, GivesNewTokensNoWeightUntilItIsRenewed) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 5);
  feeder.prefill(40);
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  const Vector before = read_restart(manager, 0, 0).vector({0, 0});
  // Tokens come where others, with weights, have been.
  manager.truncate(0, 5);
  for (int i = 0; i < 7; ++i) feeder.append();
  Vector expected = before;
  std::fill(expected.begin() + 35, expected.end(), 0.0);
  expected.resize(42, 0.0);
  expect_distribution(normalized(expected), read_restart(manager, 0, 0).vector({0, 0}));
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  expect_distribution(restart_novelty(plain_graph(42), matrix_of(feeder.keys, 0, 0, 42), 4),
                      read_restart(manager, 0, 0).vector({0, 0}));
}

TEST(Novelty, MovesWithItsTokens) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 6);
  feeder.prefill(40);
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  const HostTensor before = read_restart(manager, 0, 0);
  std::vector<std::vector<std::vector<Index>>> kept(2);
  for (auto& heads : kept) {
    for (int h = 0; h < 2; ++h) {
      heads.push_back(random_part(feeder.random, plain_graph(40).positions, 25));
    }
  }
  manager.compact(0, keep_tensor(kept).view(), feeder.keys.view(), {}, Stream{});
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 2; ++h) {
      Vector expected;
      for (const Index slot : kept[at(b)][at(h)]) expected.push_back(before.get({b, h, slot}));
      expect_distribution(normalized(expected), read_restart(manager, 0, 0).vector({b, h}));
    }
  }
}

TEST(Novelty, ForgetsReleasedTokens) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 7);
  feeder.prefill(40);
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  Vector expected = read_restart(manager, 0, 0).vector({1, 0});
  const std::vector<Index> kept = random_part(feeder.random, plain_graph(40).positions, 25);
  manager.release(0, keep_tensor({{kept, kept}, {kept, kept}}).view(), Stream{});
  feeder.reuse();
  for (Index slot = 0; slot < 40; ++slot) {
    if (std::find(kept.begin(), kept.end(), slot) == kept.end()) expected[at(slot)] = 0.0;
  }
  expect_distribution(normalized(expected), read_restart(manager, 0, 0).vector({1, 0}));
}

TEST(Novelty, MustBeThereForAWalk) {
  GraphManager manager(graph_config(), kWalk);
  Feeder feeder(manager, 0, 8);
  feeder.prefill(40);
  HostTensor out(DType::f32, {2, 2, 40});
  expect_rejected(manager, "walk", [&] { manager.walk(0, {}, Stream{}); });
  expect_rejected(manager, "solve", [&] { manager.solve(0, {}, Stream{}); });
  expect_rejected(manager, "restart_distribution",
                  [&] { manager.restart_distribution(0, 0, out.view(), Stream{}); });
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  manager.walk(0, {}, Stream{});
  EXPECT_EQ(manager.statistics().walks, 4);
}

TEST(Novelty, NeedsAPopulation) {
  GraphManager manager(graph_config(), WalkConfig{.populations = {{.recent_tokens = 5}}});
  Feeder feeder(manager, 0, 9);
  feeder.prefill(10);
  expect_rejected(manager, "update_novelty",
                  [&] { manager.update_novelty(0, feeder.keys.view(), Stream{}); });
}

}  // namespace
}  // namespace spectralkv::test
