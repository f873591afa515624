#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

/// Big enough that every stage is worth several threads.
GraphConfig graph_config(int num_threads, Index batch = 4) {
  return {.batch_size = batch,
          .num_query_heads = 8,
          .num_kv_heads = 4,
          .head_dim = 64,
          .capacity = 700,
          .seed = 11,
          .num_threads = num_threads};
}

WalkConfig walk_config() {
  return {.num_walkers = 300,
          .populations = {{.share = 0.25},
                          {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.25},
                          {.restart = Restart::current, .share = 0.25},
                          {.restart = Restart::novelty, .share = 0.25}}};
}

/// A whole life of a layer; the state at its end and all that was selected on the way.
std::vector<Bytes> run(const GraphConfig& config, const WalkConfig& walk) {
  GraphManager manager(config, walk);
  std::vector<Bytes> results;
  const auto record = [&](const Snapshot& snapshot) {
    results.insert(results.end(), snapshot.tensors.begin(), snapshot.tensors.end());
  };
  Random random(1);
  Graphs graphs(at(config.batch_size));
  for (auto& sequence : graphs) {
    for (Index g = 0; g < manager.graphs_per_sequence(); ++g) {
      sequence.push_back(random_graph(random, {.slots = 600, .tokens = 590, .seen = 900},
                                      config.top_k, config.edge_law));
    }
  }
  load_graphs(manager, 0, graphs);
  Feeder feeder(manager, 0, 2, DType::bf16);
  feeder.keys.fill_normal(random);
  feeder.prefill(12);
  feeder.append();
  record(Snapshot(manager));
  if (walk.needs_novelty()) manager.update_novelty(0, feeder.keys.view(), Stream{});
  manager.walk(0, {}, Stream{});
  manager.walk(0, {}, Stream{});
  record(Snapshot(manager));
  manager.solve(0, {}, Stream{});
  record(Snapshot(manager));
  const EvictionConfig eviction{.budget = 560, .interval = 32, .window = 50, .sinks = 4};
  HostTensor keep(DType::i32, {config.batch_size, 4, 560});
  manager.select(0, eviction, false, keep.view(), Stream{});
  results.push_back(keep.bytes());
  manager.compact(0, keep.view(), feeder.keys.view(), {}, Stream{});
  feeder.append();
  record(Snapshot(manager));
  results.push_back(feeder.keys.bytes());
  return results;
}

TEST(Threads, ChangeNothing) {
  for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
    GraphConfig config = graph_config(1);
    config.scope = scope;
    const auto expected = run(config, walk_config());
    for (const int num_threads : {2, 5}) {
      config.num_threads = num_threads;
      EXPECT_TRUE(expected == run(config, walk_config())) << num_threads << " threads";
    }
  }
}

TEST(Threads, ShareTheWalkersOfOneGraph) {
  Random random(3);
  GraphConfig config{.head_dim = 8, .capacity = 100, .num_threads = 1};
  const Graph graph =
      random_graph(random, {.slots = 100, .tokens = 90, .seen = 300}, 8, EdgeLaw::weighted);
  for (const double decay : {0.0, 0.5}) {
    for (const Index walkers : {1000, 1024, 1033, 7}) {
      const WalkConfig walk{.num_walkers = walkers,
                            .walk_length = walkers == 7 ? 10000 : 90,
                            .decay = decay,
                            .populations = {{.count = VisitCount::all, .recent_tokens = 50}}};
      std::vector<Vector> results;
      for (const int num_threads : {1, 2, 3, 16}) {
        config.num_threads = num_threads;
        GraphManager manager(config, walk);
        load_graphs(manager, 0, {{graph}});
        manager.walk(0, {}, Stream{});
        manager.walk(0, {}, Stream{});
        results.push_back(read_visits(manager, 0, 0).vector({0, 0}));
        double sum = 0.0;
        for (const double visits : results.back()) sum += visits;
        EXPECT_EQ(sum, static_cast<double>(walkers * walk.walk_length));
        results.push_back(read_scores(manager, 0, 0).vector({0, 0}));
        EXPECT_EQ(results[0], results[results.size() - 2]) << num_threads << " threads";
        EXPECT_EQ(results[1], results.back()) << num_threads << " threads";
      }
    }
  }
}

TEST(Threads, OfManagersAreIndependent) {
  const WalkConfig walk{.decay = 0.5, .populations = {{.recent_tokens = 50}}};
  const auto expected = run(graph_config(2, 1), walk);
  std::vector<std::vector<Bytes>> results(3);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&result, &walk] { result = run(graph_config(2, 1), walk); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_TRUE(expected == result);
}

/// Rows of one block, of `tokens` tokens a sequence whose keys are `distinct` ones over and over.
Snapshot rows_of(const GraphConfig& config, Index tokens, Index distinct, DType dtype) {
  GraphManager manager(config, {});
  Random random(5);
  HostTensor keys = key_slab(config, config.batch_size, dtype);
  for (Index b = 0; b < config.batch_size; ++b) {
    for (Index h = 0; h < config.num_kv_heads; ++h) {
      for (Index d = 0; d < config.head_dim; ++d) {
        for (Index j = 0; j < tokens; ++j) {
          keys.set({b, h, j, d},
                   j < distinct ? random.normal() : keys.get({b, h, j - distinct, d}));
        }
      }
    }
  }
  HostTensor queries(dtype, {config.batch_size, config.num_query_heads, tokens, config.head_dim});
  queries.fill_normal(random);
  manager.update_rows(0, queries.view(), keys.view(), {}, Stream{});
  return Snapshot(manager);
}

TEST(Threads, DrawRowsOfABlockInAnyOrder) {
  constexpr Index kTokens = 1100;
  for (const int top_k : {4, 32}) {
    for (const Index group : {1, 4}) {
      // Many equal keys: lists overflow, and many tokens are left over for another look.
      for (const Index distinct : {kTokens, Index{40}}) {
        const GraphConfig config{.batch_size = 2,
                                 .num_query_heads = 2 * group,
                                 .num_kv_heads = 2,
                                 .head_dim = 64,
                                 .capacity = kTokens,
                                 .top_k = top_k};
        const Snapshot expected = rows_of(config, kTokens, distinct, DType::f16);
        for (int again = 0; again < 2; ++again) {
          EXPECT_EQ(rows_of(config, kTokens, distinct, DType::f16), expected)
              << "top_k " << top_k << ", group " << group << ", " << distinct << " keys";
        }
      }
    }
  }
}

TEST(Threads, AreAsManyAsProcessorsByDefault) {
  EXPECT_TRUE(run(graph_config(0, 1), walk_config()) == run(graph_config(1, 1), walk_config()));
}

}  // namespace
}  // namespace spectralkv::test
